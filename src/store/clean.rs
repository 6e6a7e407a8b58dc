//! Removal: a job's clean-up and the sweep of what nobody needs.
//!
//! Both hold the store's lock alone, so no blob is put, claimed or published while they decide. A blob goes only when
//! no claim but the removed one is left; blobs go before their claims, so that a crash in between leaves a claim,
//! which the next clean-up sees, and never an unclaimed blob.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::failpoint;

use super::{Error, JobKey, Store, key, reading, writing};

/// What a sweep removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Files under `tmp` and uploads that were never finished.
    pub temp_files: u64,
    /// Folders with a job's checkpoints and frames.
    pub work_folders: u64,
    /// Blobs that no claim and no manifest named.
    pub blobs: u64,
    /// Bytes of those blobs and temporary files.
    pub bytes: u64,
}

impl Store {
    /// Removes what the job left: its work, its temporary files, and the blobs put for it that its manifest does not
    /// name and no other job claims. Nothing of an unpublished job stays. Does nothing the second time.
    pub fn cleanup(&self, job: &JobKey) -> Result<(), Error> {
        let _held = self.lock_alone()?;
        remove_tree(&self.root().join("work").join(job.as_str()))?;
        failpoint::hit("cleanup").map_err(|source| writing(self.root(), source))?;
        let prefix = format!("{job}-");
        for (name, path) in entries(&self.root().join("tmp"))? {
            if name.to_string_lossy().starts_with(&prefix) {
                remove_file(&path)?;
            }
        }
        let named = self.named_by(job)?;
        if named.is_none() {
            // At most what a writer left that died while it published.
            remove_tree(&self.root().join("jobs").join(job.as_str()))?;
        }
        let kept = named.unwrap_or_default();
        self.drop_claims(job.as_str(), |sha256, _| !kept.contains(sha256))?;
        Ok(())
    }

    /// Removes old temporary files, the work of published jobs, what unpublished jobs and uploads left longer than
    /// `older_than` ago, and old blobs that no claim and no manifest names. `older_than` must be longer than a job
    /// may run.
    pub fn sweep(&self, older_than: Duration) -> Result<Swept, Error> {
        let _held = self.lock_alone()?;
        let mut swept = Swept::default();
        self.sweep_temp(older_than, &mut swept)?;
        self.sweep_work(older_than, &mut swept)?;
        let mut needed = HashSet::new();
        for (owner, _) in entries(&self.root().join("claims"))? {
            let owner = owner.to_string_lossy().into_owned();
            let manifest =
                JobKey::parse(&owner).ok().map(|job| self.named_by(&job)).transpose()?.flatten();
            swept.add(self.drop_claims(&owner, |sha256, data| match &manifest {
                Some(named) => !named.contains(sha256),
                None => is_older(data, older_than),
            })?);
        }
        for (_, folder) in entries(&self.root().join("claims"))? {
            needed.extend(entries(&folder)?.into_iter().map(|(sha256, _)| sha256));
        }
        for (job, folder) in entries(&self.root().join("jobs"))? {
            let Ok(job) = JobKey::parse(&job.to_string_lossy()) else { continue };
            match self.named_by(&job)? {
                Some(named) => needed.extend(named.into_iter().map(OsString::from)),
                None if is_tree_older(&folder, older_than)? => remove_tree(&folder)?,
                None => {}
            }
        }
        self.sweep_blobs(older_than, &needed, &mut swept)?;
        Ok(swept)
    }

    /// Hashes named by the job's manifest; `None` when the job has not published.
    fn named_by(&self, job: &JobKey) -> Result<Option<HashSet<String>>, Error> {
        Ok(self.manifest(job)?.map(|manifest| key::named(&manifest).into_iter().collect()))
    }

    /// Drops those claims of `owner` that `goes` picks, and with each its blob when nobody else claims it. Gives the
    /// number of blobs removed and their bytes.
    fn drop_claims(
        &self,
        owner: &str,
        goes: impl Fn(&str, &Metadata) -> bool,
    ) -> Result<Swept, Error> {
        let mut dropped = Swept::default();
        let folder = self.root().join("claims").join(owner);
        for (sha256, claim) in entries(&folder)? {
            let sha256 = sha256.to_string_lossy();
            let Some(data) = metadata(&claim)? else { continue };
            if !goes(&sha256, &data) {
                continue;
            }
            let blob = self.root().join("blobs").join(&*sha256);
            if !self.is_claimed_by_others(owner, &sha256)?
                && let Some(bytes) = remove_file(&blob)?
            {
                dropped.blobs += 1;
                dropped.bytes += bytes;
            }
            remove_file(&claim)?;
        }
        // Not empty when some claims stay, absent when there were none: both are fine.
        fs::remove_dir(&folder).ok();
        Ok(dropped)
    }

    fn is_claimed_by_others(&self, owner: &str, sha256: &str) -> Result<bool, Error> {
        let claims = entries(&self.root().join("claims"))?;
        Ok(claims.into_iter().any(|(other, folder)| other != owner && folder.join(sha256).exists()))
    }

    fn sweep_temp(&self, older_than: Duration, swept: &mut Swept) -> Result<(), Error> {
        for (_, path) in entries(&self.root().join("tmp"))? {
            swept.add_temp_file(remove_old_file(&path, older_than)?);
        }
        Ok(())
    }

    fn sweep_work(&self, older_than: Duration, swept: &mut Swept) -> Result<(), Error> {
        for (name, folder) in entries(&self.root().join("work"))? {
            let published = match JobKey::parse(&name.to_string_lossy()) {
                Ok(job) => self.manifest(&job)?.is_some(),
                Err(_) => false,
            };
            if published || is_tree_older(&folder, older_than)? {
                remove_tree(&folder)?;
                swept.work_folders += 1;
            }
        }
        Ok(())
    }

    fn sweep_blobs(
        &self,
        older_than: Duration,
        needed: &HashSet<OsString>,
        swept: &mut Swept,
    ) -> Result<(), Error> {
        for (name, path) in entries(&self.root().join("blobs"))? {
            if needed.contains(&name) {
                continue;
            }
            let removed = remove_old_file(&path, older_than)?;
            if key::content_hash(&name.to_string_lossy()).is_err() {
                // What a writer that died left beside its target: `<sha256>#1`.
                swept.add_temp_file(removed);
            } else if let Some(bytes) = removed {
                swept.blobs += 1;
                swept.bytes += bytes;
            }
        }
        Ok(())
    }
}

impl Swept {
    fn add(&mut self, other: Self) {
        self.temp_files += other.temp_files;
        self.work_folders += other.work_folders;
        self.blobs += other.blobs;
        self.bytes += other.bytes;
    }

    fn add_temp_file(&mut self, removed: Option<u64>) {
        if let Some(bytes) = removed {
            self.temp_files += 1;
            self.bytes += bytes;
        }
    }
}

/// Names and paths in a folder, none when it is not there.
fn entries(folder: &Path) -> Result<Vec<(OsString, PathBuf)>, Error> {
    let listed = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.map_err(|source| reading(folder, source))?,
    };
    listed
        .map(|entry| {
            entry
                .map(|entry| (entry.file_name(), entry.path()))
                .map_err(|source| reading(folder, source))
        })
        .collect()
}

fn metadata(path: &Path) -> Result<Option<Metadata>, Error> {
    match fs::symlink_metadata(path) {
        Ok(data) => Ok(Some(data)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(reading(path, source)),
    }
}

fn is_older(data: &Metadata, than: Duration) -> bool {
    let age =
        data.modified().ok().and_then(|changed| SystemTime::now().duration_since(changed).ok());
    age.unwrap_or_default() >= than
}

/// Whether nothing in the folder changed since `than` ago.
fn is_tree_older(folder: &Path, than: Duration) -> Result<bool, Error> {
    let mut paths = vec![folder.to_owned()];
    paths.extend(entries(folder)?.into_iter().map(|(_, path)| path));
    for path in paths {
        if metadata(&path)?.is_some_and(|data| !is_older(&data, than)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes a file; its length, or `None` when it was not there.
fn remove_file(path: &Path) -> Result<Option<u64>, Error> {
    let Some(data) = metadata(path)? else { return Ok(None) };
    match fs::remove_file(path) {
        Ok(()) => Ok(Some(data.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(writing(path, source)),
    }
}

fn remove_old_file(path: &Path, older_than: Duration) -> Result<Option<u64>, Error> {
    match metadata(path)? {
        Some(data) if data.is_file() && is_older(&data, older_than) => remove_file(path),
        _ => Ok(None),
    }
}

fn remove_tree(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(writing(folder, error)),
        _ => Ok(()),
    }
}
