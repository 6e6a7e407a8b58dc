//! Removal: a job's clean-up and the sweep of what nobody needs.
//!
//! Both hold the store's lock alone, so no blob is put, claimed or published while they decide. A blob goes only when
//! no claim but the removed one is left; blobs go before their claims, so that a crash in between leaves a claim,
//! which the next clean-up sees, and never an unclaimed blob.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

use object_store::ObjectMeta;

use crate::failpoint;

use super::lock::{ALONE_WITHIN, BRIEFLY, Held};
use super::{Error, JobKey, MANIFEST, Store, key, reading, writing};

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

/// How long the bytes of a bucket are not counted again.
const RECENT: Duration = Duration::from_secs(10);

/// The hashes that manifests name, by the job and when it was published.
type Manifests = HashMap<(String, SystemTime), HashSet<String>>;

/// What a sweep removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Results that were old enough.
    pub results: u64,
    /// Files under `tmp`, and in a folder what was put there and never finished.
    pub temp_files: u64,
    /// Folders with a job's checkpoints and frames.
    pub work_folders: u64,
    /// Blobs that no claim and no manifest named.
    pub blobs: u64,
    /// Bytes of those blobs and temporary files.
    pub bytes: u64,
}

/// An object; in a folder also a file that is none, such as one that was never finished, or an empty folder.
#[derive(Debug)]
struct Entry {
    /// Its key; the path below the root of a store in a folder.
    key: String,
    bytes: u64,
    changed: SystemTime,
}

impl Entry {
    fn is_older(&self, than: Duration) -> bool {
        SystemTime::now().duration_since(self.changed).unwrap_or_default() >= than
    }

    /// The parts of its key after the first.
    fn names(&self) -> (&str, &str) {
        let rest = self.key.split_once('/').map_or("", |(_, rest)| rest);
        rest.split_once('/').unwrap_or((rest, ""))
    }
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
        let held = self.lock_alone(patience)?;
        self.remove_below(&format!("work/{job}"), &held)?;
        failpoint::hit("cleanup").map_err(|source| writing(self.root(), source))?;
        let prefix = format!("{job}-");
        for (name, path) in entries(&self.root().join("tmp"))? {
            if name.to_string_lossy().starts_with(&prefix) {
                remove_file(&path)?;
            }
        }
        let named = self.named_by(job)?;
        if named.is_none() && self.inner.bucket.is_none() {
            // At most what a writer left that died while it published. In a bucket that leaves nothing, and what is
            // there now came late.
            remove_tree(&self.root().join("jobs").join(job.as_str()))?;
        }
        let kept = named.unwrap_or_default();
        self.drop_claims(job.as_str(), &held, |sha256| !kept.contains(sha256))
    }

    /// Removes old temporary files, the work of published jobs, what unpublished jobs and uploads left longer than
    /// `older_than` ago, and old blobs that no claim and no manifest names. `older_than` must be longer than a job
    /// may run.
    pub fn sweep(&self, older_than: Duration) -> Result<Swept, Error> {
        self.sweep_with(&Ages { left_behind: older_than, results: None }, false)
    }

    /// As [`sweep`](Self::sweep), and results of a certain age go too; `dry_run` removes nothing and only counts.
    pub fn sweep_with(&self, ages: &Ages, dry_run: bool) -> Result<Swept, Error> {
        // Reading takes long when there are many, and all writers wait for removal.
        let manifests = self.manifests()?;
        let held = if dry_run { self.lock_shared()? } else { self.lock_alone(ALONE_WITHIN)? };
        let rubbish = self.rubbish(ages, manifests, &held)?;
        let swept = rubbish.count()?;
        if !dry_run {
            self.discard(rubbish, &held)?;
        }
        Ok(swept)
    }

    /// Bytes of all that lies in the store.
    pub fn usage(&self) -> Result<u64, Error> {
        Ok(self.below("", &Held::Nothing)?.iter().map(|entry| entry.bytes).sum())
    }

    /// As [`usage`](Self::usage), when it is more than `most`. That it is not, a bucket may have said some seconds ago.
    pub fn usage_over(&self, most: u64) -> Result<Option<u64>, Error> {
        let counted = || self.inner.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *counted();
        if before.is_some_and(|(at, bytes)| at.elapsed() < RECENT && bytes <= most) {
            return Ok(None);
        }
        let bytes = self.usage()?;
        if self.is_remote() {
            *counted() = Some((Instant::now(), bytes));
        }
        Ok((bytes > most).then_some(bytes))
    }

    /// What a sweep removes.
    fn rubbish(&self, ages: &Ages, manifests: Manifests, held: &Held) -> Result<Rubbish, Error> {
        let mut rubbish = Rubbish::default();
        for (_, path) in entries(&self.root().join("tmp"))? {
            rubbish.temp.extend(old_file(path, ages.left_behind)?);
        }
        let mut at_work = HashSet::new();
        let stays = self.published(ages, manifests, &mut rubbish, held)?;
        for (job, work) in by_first_name(self.below("work", held)?) {
            // An id may be used again, so that a job is at work beside the manifest of an earlier one.
            let is_over = stays.contains_key(&job) || rubbish.jobs.contains(&job);
            let age = if is_over { ages.left_behind.min(DAY) } else { ages.left_behind };
            if work.iter().all(|entry| entry.is_older(age)) {
                rubbish.work.push(job);
            } else {
                at_work.insert(job);
            }
        }
        let mut needed: HashSet<String> = stays.values().flatten().cloned().collect();
        let mut dropped = HashSet::new();
        for claim in self.below("claims", held)? {
            let (owner, sha256) = claim.names();
            if sha256.is_empty() {
                continue;
            }
            let goes = match stays.get(owner) {
                Some(named) => !named.contains(sha256),
                None => {
                    let is_over = rubbish.jobs.iter().any(|job| job == owner);
                    if at_work.contains(owner) {
                        is_over && claim.is_older(ages.left_behind.min(DAY))
                    } else {
                        is_over || claim.is_older(ages.left_behind)
                    }
                }
            };
            if goes {
                dropped.insert(sha256.to_owned());
                rubbish.claims.push(claim.key);
            } else {
                needed.insert(sha256.to_owned());
            }
        }
        for blob in self.below("blobs", held)? {
            let (sha256, _) = blob.names();
            if needed.contains(sha256) || sha256.is_empty() {
                continue;
            }
            if key::content_hash(sha256).is_err() {
                // What a writer that died left beside its target: `<sha256>#1`.
                if blob.is_older(ages.left_behind) && self.inner.bucket.is_none() {
                    rubbish.temp.push(self.root().join(&blob.key));
                }
            } else if dropped.contains(sha256) || blob.is_older(ages.left_behind) {
                rubbish.blobs.push(blob);
            }
        }
        if self.is_remote() {
            // An opening whose answer was lost cannot know that it has created one.
            let probes = self.below("probe", held)?.into_iter();
            rubbish.blobs.extend(probes.filter(|probe| probe.is_older(ages.left_behind)));
        }
        Ok(rubbish)
    }

    /// What the manifests name that are there now.
    fn manifests(&self) -> Result<Manifests, Error> {
        let mut found = Manifests::new();
        for entry in self.below("jobs", &Held::Nothing)? {
            if let (name, MANIFEST) = entry.names()
                && let Ok(job) = JobKey::parse(name)
                && let Some(named) = self.named_by(&job)?
            {
                found.insert((name.to_owned(), entry.changed), named);
            }
        }
        Ok(found)
    }

    /// The published jobs that stay, with the hashes they name; the others go to the rubbish.
    fn published(
        &self,
        ages: &Ages,
        mut manifests: Manifests,
        rubbish: &mut Rubbish,
        held: &Held,
    ) -> Result<HashMap<String, HashSet<String>>, Error> {
        let mut stays = HashMap::new();
        let is_remains = |files: &[Entry]| {
            let mut files = files.iter();
            self.inner.bucket.is_none() && files.all(|entry| entry.is_older(ages.left_behind))
        };
        // As for blobs: `manifest.json#1`.
        let is_left_beside = |entry: &&Entry| {
            let name = entry.names().1;
            self.inner.bucket.is_none()
                && !["", MANIFEST].contains(&name)
                && entry.is_older(ages.left_behind)
        };
        let at = |entry: &Entry| self.root().join(&entry.key);
        for (name, files) in by_first_name(self.below("jobs", held)?) {
            let Ok(job) = JobKey::parse(&name) else { continue };
            held.keep()?;
            let manifest = files.iter().find(|entry| entry.names().1 == MANIFEST);
            let is_old = |age| manifest.is_some_and(|entry| entry.is_older(age));
            let before = manifest.and_then(|at| manifests.remove(&(name.clone(), at.changed)));
            let named = if before.is_some() { before } else { self.named_by(&job)? };
            match named {
                Some(_) if ages.results.is_some_and(is_old) => rubbish.jobs.push(name),
                Some(named) => {
                    rubbish.temp.extend(files.iter().filter(is_left_beside).map(at));
                    stays.insert(name, named);
                }
                None if is_remains(&files) => {
                    rubbish.remains.push(name);
                }
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
    fn drop_claims(
        &self,
        owner: &str,
        held: &Held,
        goes: impl Fn(&str) -> bool,
    ) -> Result<(), Error> {
        let mut gone = self.below(&format!("claims/{owner}"), held)?;
        gone.retain(|claim| !claim.names().1.is_empty() && goes(claim.names().1));
        let needed = self.claimed_by_others(owner, &gone, held)?;
        for claim in &gone {
            let (_, sha256) = claim.names();
            if !needed.contains(sha256) {
                self.erase(&format!("blobs/{sha256}"), held)?;
            }
            self.erase(&claim.key, held)?;
        }
        self.prune(owner);
        Ok(())
    }

    /// The hashes of `claims` that others than `owner` claim too.
    fn claimed_by_others(
        &self,
        owner: &str,
        claims: &[Entry],
        held: &Held,
    ) -> Result<HashSet<String>, Error> {
        let hashes = claims.iter().map(|claim| claim.names().1);
        if claims.is_empty() {
            return Ok(HashSet::new());
        }
        if self.inner.bucket.is_none() {
            let mut folders = entries(&self.root().join("claims"))?;
            folders.retain(|(other, _)| other != owner);
            let is_there = |sha256: &&str| folders.iter().any(|(_, at)| at.join(sha256).exists());
            return Ok(hashes.filter(is_there).map(str::to_owned).collect());
        }
        let mut all = self.below("claims", held)?;
        all.retain(|claim| claim.names().0 != owner);
        Ok(all.iter().map(|claim| claim.names().1.to_owned()).collect())
    }

    /// A result goes before its files, and a file before its claim, so that a crash in between leaves nothing that
    /// names what is gone, and a claim for the next sweep to see.
    fn discard(&self, rubbish: Rubbish, held: &Held) -> Result<(), Error> {
        for job in rubbish.jobs.iter().chain(&rubbish.remains) {
            self.remove_below(&format!("jobs/{job}"), held)?;
        }
        for job in &rubbish.work {
            self.remove_below(&format!("work/{job}"), held)?;
        }
        for key in rubbish.blobs.iter().map(|blob| &blob.key).chain(&rubbish.claims) {
            self.erase(key, held)?;
        }
        for file in &rubbish.temp {
            remove_file(file)?;
        }
        for claim in &rubbish.claims {
            self.prune(claim.split('/').nth(1).unwrap_or_default());
        }
        Ok(())
    }

    /// Removes the folder for the claims of `owner` when it is empty.
    fn prune(&self, owner: &str) {
        if self.inner.bucket.is_none() {
            // Not empty when some claims stay, absent when there were none: both are fine.
            fs::remove_dir(self.root().join("claims").join(owner)).ok();
        }
    }

    /// All that lies below `prefix`.
    fn below(&self, prefix: &str, held: &Held) -> Result<Vec<Entry>, Error> {
        if self.inner.bucket.is_none() {
            return walk(self.root(), prefix);
        }
        let entry = |object: ObjectMeta| Entry {
            key: object.location.to_string(),
            bytes: object.size,
            changed: object.last_modified.into(),
        };
        Ok(self.objects(prefix, held)?.into_iter().map(entry).collect())
    }

    /// Removes all below `prefix`.
    fn remove_below(&self, prefix: &str, held: &Held) -> Result<(), Error> {
        if self.inner.bucket.is_none() {
            return remove_tree(&self.root().join(prefix));
        }
        self.objects(prefix, held)?
            .iter()
            .try_for_each(|object| self.erase(object.location.as_ref(), held))
    }

    /// Removes one object if it is there.
    fn erase(&self, key: &str, held: &Held) -> Result<(), Error> {
        if self.inner.bucket.is_none() {
            return remove_file(&self.root().join(key));
        }
        held.keep()?;
        self.remove(key)
    }
}

/// Entries by the second part of their keys: the job, mostly.
fn by_first_name(entries: Vec<Entry>) -> BTreeMap<String, Vec<Entry>> {
    let mut found = BTreeMap::<String, Vec<Entry>>::new();
    for entry in entries {
        found.entry(entry.names().0.to_owned()).or_default().push(entry);
    }
    found.remove("");
    found
}

/// The files and empty folders below `prefix` of a store in a folder.
fn walk(root: &Path, prefix: &str) -> Result<Vec<Entry>, Error> {
    let mut found = Vec::new();
    let mut folders = vec![root.join(prefix)];
    while let Some(folder) = folders.pop() {
        let inside = entries(&folder)?;
        let itself = inside.is_empty().then(|| folder.clone());
        for path in inside.into_iter().map(|(_, path)| path).chain(itself) {
            let Some(data) = metadata(&path)? else { continue };
            if data.is_dir() && path != folder {
                folders.push(path);
                continue;
            }
            let key = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            let bytes = if data.is_dir() { 0 } else { data.len() };
            let changed = data.modified().map_err(|source| reading(&path, source))?;
            found.push(Entry { key, bytes, changed });
        }
    }
    Ok(found)
}

/// What a sweep removes, by kind.
#[derive(Debug, Default)]
struct Rubbish {
    /// Jobs with results that are too old.
    jobs: Vec<String>,
    /// Jobs that never published; a store in a folder may have something of them.
    remains: Vec<String>,
    /// Jobs whose work goes.
    work: Vec<String>,
    temp: Vec<PathBuf>,
    blobs: Vec<Entry>,
    /// Keys of claims.
    claims: Vec<String>,
}

impl Rubbish {
    fn count(&self) -> Result<Swept, Error> {
        let mut bytes = self.blobs.iter().map(|blob| blob.bytes).sum();
        for file in &self.temp {
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
