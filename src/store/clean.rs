//! Removal: a job's clean-up and the sweep of what nobody needs.
//!
//! Both hold the store's lock alone, so no blob is put, claimed or published while they decide. A blob goes only when
//! no claim but the removed one is left; blobs go before their claims, so that a crash in between leaves a claim,
//! which the next clean-up sees, and never an unclaimed blob.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::failpoint;

use super::{ALONE_WITHIN, BRIEFLY, Error, JobKey, Store, key, reading, writing};

/// How old things must be to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ages {
    /// What no job needs any more; longer than a job may run.
    pub left_behind: Duration,
    /// Results of finished jobs; `None` keeps them for ever.
    pub results: Option<Duration>,
}

/// Age at which what lies beside a published result is no running job's.
const DAY: Duration = Duration::from_secs(86_400);

/// What a sweep removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Results that were old enough.
    pub results: u64,
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
        self.cleanup_within(job, ALONE_WITHIN)
    }

    /// As [`cleanup`](Self::cleanup) after the job has its result: gives up soon when a writer holds it up.
    pub fn cleanup_published(&self, job: &JobKey) -> Result<(), Error> {
        self.cleanup_within(job, BRIEFLY)
    }

    fn cleanup_within(&self, job: &JobKey, patience: Duration) -> Result<(), Error> {
        let _held = self.lock_alone(patience)?;
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
        self.drop_claims(job.as_str(), |sha256| !kept.contains(sha256))?;
        Ok(())
    }

    /// Removes old temporary files, the work of published jobs, what unpublished jobs and uploads left longer than
    /// `older_than` ago, and old blobs that no claim and no manifest names. `older_than` must be longer than a job
    /// may run.
    pub fn sweep(&self, older_than: Duration) -> Result<Swept, Error> {
        self.sweep_with(&Ages { left_behind: older_than, results: None }, false)
    }

    /// As [`sweep`](Self::sweep), and results of a certain age go too; `dry_run` removes nothing and only counts.
    pub fn sweep_with(&self, ages: &Ages, dry_run: bool) -> Result<Swept, Error> {
        let _held = if dry_run { self.lock_shared()? } else { self.lock_alone(ALONE_WITHIN)? };
        let rubbish = self.rubbish(ages)?;
        let swept = rubbish.count()?;
        if !dry_run {
            rubbish.remove()?;
        }
        Ok(swept)
    }

    /// Bytes of all that lies in the store.
    pub fn usage(&self) -> Result<u64, Error> {
        let mut bytes = 0;
        let mut folders = vec![self.root().to_owned()];
        while let Some(folder) = folders.pop() {
            for (_, path) in entries(&folder)? {
                match metadata(&path)? {
                    Some(data) if data.is_dir() => folders.push(path),
                    Some(data) => bytes += data.len(),
                    None => {}
                }
            }
        }
        Ok(bytes)
    }

    /// What a sweep removes.
    fn rubbish(&self, ages: &Ages) -> Result<Rubbish, Error> {
        let mut rubbish = Rubbish::default();
        for (_, path) in entries(&self.root().join("tmp"))? {
            rubbish.temp.extend(old_file(path, ages.left_behind)?);
        }
        let stays = self.published(ages, &mut rubbish)?;
        let mut at_work = HashSet::new();
        for (name, folder) in entries(&self.root().join("work"))? {
            let is_over = self.root().join("jobs").join(&name).join("manifest.json").exists();
            // An id may be used again, so that a job is at work beside the manifest of an earlier one.
            let age = if is_over { ages.left_behind.min(DAY) } else { ages.left_behind };
            if is_tree_older(&folder, age)? {
                rubbish.work.push(folder);
            } else {
                at_work.insert(name);
            }
        }
        let mut needed: HashSet<OsString> =
            stays.values().flatten().map(|sha256| OsString::from(sha256.as_str())).collect();
        let mut dropped = HashSet::new();
        for (owner, folder) in entries(&self.root().join("claims"))? {
            let is_over = rubbish.jobs.iter().any(|job| job.ends_with(&owner));
            for (sha256, claim) in entries(&folder)? {
                let Some(data) = metadata(&claim)? else { continue };
                let goes = match stays.get(&owner) {
                    Some(named) => !named.contains(&*sha256.to_string_lossy()),
                    None if at_work.contains(&owner) => {
                        is_over && is_older(&data, ages.left_behind.min(DAY))
                    }
                    None => is_over || is_older(&data, ages.left_behind),
                };
                if goes {
                    rubbish.claims.push(claim);
                    dropped.insert(sha256);
                } else {
                    needed.insert(sha256);
                }
            }
        }
        for (name, path) in entries(&self.root().join("blobs"))? {
            if needed.contains(&name) {
                continue;
            }
            if key::content_hash(&name.to_string_lossy()).is_err() {
                // What a writer that died left beside its target: `<sha256>#1`.
                rubbish.temp.extend(old_file(path, ages.left_behind)?);
            } else if dropped.contains(&name) {
                rubbish.blobs.push(path);
            } else {
                rubbish.blobs.extend(old_file(path, ages.left_behind)?);
            }
        }
        Ok(rubbish)
    }

    /// The published jobs that stay, with the hashes they name; the others go to the rubbish.
    fn published(
        &self,
        ages: &Ages,
        rubbish: &mut Rubbish,
    ) -> Result<HashMap<OsString, HashSet<String>>, Error> {
        let mut stays = HashMap::new();
        for (name, folder) in entries(&self.root().join("jobs"))? {
            let Ok(job) = JobKey::parse(&name.to_string_lossy()) else { continue };
            let data = metadata(&folder.join("manifest.json"))?;
            let is_old = |age| data.as_ref().is_some_and(|data| is_older(data, age));
            match self.named_by(&job)? {
                Some(_) if ages.results.is_some_and(is_old) => rubbish.jobs.push(folder),
                Some(named) => {
                    stays.insert(name, named);
                }
                None if is_tree_older(&folder, ages.left_behind)? => rubbish.remains.push(folder),
                None => {}
            }
        }
        Ok(stays)
    }

    /// Hashes named by the job's manifest; `None` when the job has not published.
    fn named_by(&self, job: &JobKey) -> Result<Option<HashSet<String>>, Error> {
        Ok(self.manifest(job)?.map(|manifest| key::named(&manifest).into_iter().collect()))
    }

    /// Drops those claims of `owner` that `goes` picks, and with each its blob when nobody else claims it.
    fn drop_claims(&self, owner: &str, goes: impl Fn(&str) -> bool) -> Result<(), Error> {
        let folder = self.root().join("claims").join(owner);
        for (sha256, claim) in entries(&folder)? {
            let sha256 = sha256.to_string_lossy();
            if !goes(&sha256) {
                continue;
            }
            if !self.is_claimed_by_others(owner, &sha256)? {
                remove_file(&self.root().join("blobs").join(&*sha256))?;
            }
            remove_file(&claim)?;
        }
        // Not empty when some claims stay, absent when there were none: both are fine.
        fs::remove_dir(&folder).ok();
        Ok(())
    }

    fn is_claimed_by_others(&self, owner: &str, sha256: &str) -> Result<bool, Error> {
        let claims = entries(&self.root().join("claims"))?;
        Ok(claims.into_iter().any(|(other, folder)| other != owner && folder.join(sha256).exists()))
    }
}

/// What a sweep removes, by kind.
#[derive(Debug, Default)]
struct Rubbish {
    /// Folders of results that are too old.
    jobs: Vec<PathBuf>,
    /// Folders of jobs that never published.
    remains: Vec<PathBuf>,
    work: Vec<PathBuf>,
    temp: Vec<PathBuf>,
    blobs: Vec<PathBuf>,
    claims: Vec<PathBuf>,
}

impl Rubbish {
    fn count(&self) -> Result<Swept, Error> {
        let mut bytes = 0;
        for file in self.temp.iter().chain(&self.blobs) {
            bytes += metadata(file)?.map_or(0, |data| data.len());
        }
        Ok(Swept {
            results: self.jobs.len() as u64,
            temp_files: self.temp.len() as u64,
            work_folders: self.work.len() as u64,
            blobs: self.blobs.len() as u64,
            bytes,
        })
    }

    /// A result goes before its files, and a file before its claim, so that a crash in between leaves nothing that
    /// names what is gone, and a claim for the next sweep to see.
    fn remove(self) -> Result<(), Error> {
        for folder in self.jobs.iter().chain(&self.remains).chain(&self.work) {
            remove_tree(folder)?;
        }
        for file in self.blobs.iter().chain(&self.claims).chain(&self.temp) {
            remove_file(file)?;
        }
        for owner in self.claims.iter().filter_map(|claim| claim.parent()) {
            // Not empty when some claims stay: both are fine.
            fs::remove_dir(owner).ok();
        }
        Ok(())
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

/// Removes a file if it is there.
fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(writing(path, error)),
        _ => Ok(()),
    }
}

/// The path when there is a file that has not changed since `than` ago.
fn old_file(path: PathBuf, than: Duration) -> Result<Option<PathBuf>, Error> {
    let data = metadata(&path)?;
    Ok(data.is_some_and(|data| data.is_file() && is_older(&data, than)).then_some(path))
}

fn remove_tree(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(writing(folder, error)),
        _ => Ok(()),
    }
}
