//! Fetches a model from the hub into the Hugging Face cache: the only part of the program that goes there.
//!
//! A file arrives as `blobs/<etag>.incomplete`, goes on where it stopped, also in another process, and becomes
//! `blobs/<etag>` once its content is what the hub said. The lock file, the snapshot and its name are written when
//! every file is there, so that half a model is never found. One pull of a repository is kept: what an earlier one put
//! there at another commit or of another variant goes when the next one is complete.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::installed::{drop_links, hold};
use super::lock::{Lock, Locked};
use super::manifest::{Upstream, is_confined};
pub use super::pull_error::{Error, size};
use super::remote::{Entry, Remote};
use super::{digest, folder, wanted};
use crate::disk;

/// The file that names a model's pipeline.
const INDEX: &str = "model_index.json";
/// Tries in a row that bring not one byte before a file is given up.
const MAX_TRIES: u32 = 5;
/// The first pause between two tries; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Bytes that stay free on the disk.
const KEEP_FREE: u64 = 64 << 20;
/// Bytes that are read at once.
const PIECE: usize = 1 << 18;

/// Where the hub is and who asks.
#[derive(Clone, Debug)]
pub struct Hub {
    /// Its address; `None` for the public one.
    pub endpoint: Option<String>,
    /// The access token.
    pub token: Option<String>,
    /// The Hugging Face cache.
    pub cache: PathBuf,
    /// Why nothing may be asked, if so.
    pub offline: Option<String>,
}

/// How far a pull is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Another process pulls the same repository.
    Waiting,
    /// It is known what there is to do.
    Planned {
        /// Files.
        files: usize,
        /// Their bytes in all.
        bytes: u64,
        /// Bytes of them that are here already.
        here: u64,
    },
    /// One file is begun.
    File {
        /// Its path in the repository.
        path: &'a str,
        /// Its size.
        bytes: u64,
        /// Bytes of it that are here already.
        here: u64,
    },
    /// So many bytes came.
    Bytes(u64),
    /// A try failed, and another follows.
    Again {
        /// The file.
        path: &'a str,
        /// Why the last one failed.
        reason: String,
    },
}

/// Hears every [`Step`].
pub type Hook<'a> = dyn FnMut(Step<'_>) + 'a;

/// What a pull left.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The model's folder.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
    /// Its files.
    pub files: usize,
    /// Their bytes in all.
    pub bytes: u64,
}

/// Fetches what is missing of a model.
///
/// # Errors
/// What the hub refuses and why, a full disk before and while it fills, a file that is not what the hub said.
pub fn pull(hub: &Hub, upstream: &Upstream, hook: &mut Hook<'_>) -> Result<Pulled, Error> {
    if let Some(why) = &hub.offline {
        return Err(Error::Offline { why: why.clone() });
    }
    let remote = Remote::open(hub, &upstream.repo)?;
    let listing = patiently("", hook, || remote.listing(&upstream.revision))?;
    let all = listing.files();
    let mut files = wanted::select(&all, upstream);
    // First what says whether the rest can be used.
    files.sort_by_key(|file| file != INDEX);
    check_choice(&upstream.repo, &all, &files)?;
    let repo = folder::repo_folder(&hub.cache, &upstream.repo);
    let mark = hold(&repo, &mut || hook(Step::Waiting))?;
    let blobs = repo.join("blobs");
    fs::create_dir_all(&blobs).map_err(|source| Error::writing(&blobs, source))?;
    let mut entries = Vec::new();
    for file in &files {
        let entry = patiently(file, hook, || remote.entry(&listing.commit, file))?;
        entries.push((file.clone(), entry));
    }
    let bytes = entries.iter().map(|(_, entry)| entry.bytes).sum();
    let here = entries.iter().map(|(_, entry)| here(&blobs, entry)).sum();
    hook(Step::Planned { files: files.len(), bytes, here });
    preflight(&blobs, bytes - here)?;
    let fetch = Fetch { remote: &remote, blobs: &blobs, mark: &mark };
    let mut locked = Vec::new();
    for (path, entry) in &entries {
        locked.push(fetch.file(path, entry, hook)?);
        if path == INDEX {
            folder::check_class(&blobs.join(&entry.etag), &upstream.repo)?;
        }
    }
    let cache = Cache::new(hub.cache.clone()).repo(Repo::with_revision(
        upstream.repo.clone(),
        RepoType::Model,
        upstream.revision.clone(),
    ));
    // What cannot be read is written anew.
    let old = Lock::read(&Lock::of_repo(&repo)).ok().flatten();
    let old = old.and_then(|lock| Some((lock.commit?, lock.files)));
    let snapshot = cache.pointer_path(&listing.commit);
    for file in &mut locked {
        let ours = old.iter().filter(|(commit, _)| *commit == listing.commit);
        let before = ours.flat_map(|(_, files)| files).find(|old| old.path == file.path);
        file.kept = before
            .map_or_else(|| snapshot.join(&file.path).symlink_metadata().is_ok(), |old| old.kept);
    }
    let lock = Lock {
        source: upstream.repo.clone(),
        revision: Some(upstream.revision.clone()),
        commit: Some(listing.commit.clone()),
        linked: None,
        files: locked,
    };
    // Before the links, so that whoever goes on after a death knows them for ours.
    lock.write(&Lock::of_repo(&repo))?;
    let folder = publish(&cache, &listing.commit, upstream, &entries)?;
    if let Some((commit, held)) = &old {
        let stays = |file: &&Locked| *commit == listing.commit && files.contains(&file.path);
        drop_links(&repo, commit, held.iter().filter(|file| !stays(file)))?;
    }
    Ok(Pulled { folder, commit: listing.commit, files: files.len(), bytes })
}

/// Refuses a repository that holds no diffusers model, or a part of it as a pickle alone.
fn check_choice(repo: &str, all: &[String], files: &[String]) -> Result<(), Error> {
    let repo = repo.to_owned();
    if let Some(file) = all.iter().find(|file| !is_confined(Path::new(file))) {
        return Err(Error::Answer { what: repo, why: format!("a file `{}`", file.escape_debug()) });
    }
    let pickles = wanted::only_pickles(all, files);
    if !pickles.is_empty() {
        return Err(Error::OnlyPickles { repo, files: pickles });
    }
    let bare = wanted::without_weights(files);
    if !bare.is_empty() {
        return Err(Error::NoWeights { repo, parts: bare });
    }
    let whole = files.iter().any(|file| file == INDEX)
        && files.iter().any(|file| file.ends_with(".safetensors"));
    if whole { Ok(()) } else { Err(Error::NotAModel { repo, has: all.to_vec() }) }
}

/// Bytes of a file that are here, whole or in part.
fn here(blobs: &Path, entry: &Entry) -> u64 {
    let length = |path: PathBuf| fs::metadata(path).map(|found| found.len());
    length(blobs.join(&entry.etag))
        .or_else(|_| length(incomplete(blobs, entry)))
        .map_or(0, |length| length.min(entry.bytes))
}

fn incomplete(blobs: &Path, entry: &Entry) -> PathBuf {
    blobs.join(format!("{}.incomplete", entry.etag))
}

/// Refuses to begin what the disk cannot hold.
fn preflight(folder: &Path, needed: u64) -> Result<(), Error> {
    match disk::free_space(folder) {
        Some(free) if needed > 0 && needed.saturating_add(KEEP_FREE) > free => {
            Err(Error::NoSpace { folder: folder.to_owned(), needed, free })
        }
        _ => Ok(()),
    }
}

/// Tries again what may work the next time.
fn patiently<T>(
    path: &str,
    hook: &mut Hook<'_>,
    mut ask: impl FnMut() -> Result<T, Error>,
) -> Result<T, Error> {
    let mut tries = 1;
    loop {
        match ask() {
            Err(error) if error.is_passing() && tries < MAX_TRIES => {
                pause(tries, path, &error, hook);
                tries += 1;
            }
            answer => return answer,
        }
    }
}

fn pause(tries: u32, path: &str, error: &Error, hook: &mut Hook<'_>) {
    hook(Step::Again { path, reason: error.to_string() });
    std::thread::sleep(FIRST_PAUSE * 2_u32.pow(tries.saturating_sub(1)));
}

/// Fetches files to a folder of blobs.
struct Fetch<'a> {
    remote: &'a Remote,
    blobs: &'a Path,
    /// Where the names of the blobs go that are begun.
    mark: &'a File,
}

impl Fetch<'_> {
    /// Makes sure that the file is among the blobs, whole and right.
    fn file(&self, path: &str, entry: &Entry, hook: &mut Hook<'_>) -> Result<Locked, Error> {
        let blob = self.blobs.join(&entry.etag);
        hook(Step::File { path, bytes: entry.bytes, here: here(self.blobs, entry) });
        if blob.is_file() {
            match check(path, &blob, entry) {
                Err(Error::Hash { .. }) => {} // another program's, damaged: fetched again
                checked => return checked,
            }
        }
        let part = incomplete(self.blobs, entry);
        let mut mark = self.mark;
        writeln!(mark, "{}", entry.etag).map_err(|source| Error::writing(self.blobs, source))?;
        self.fetch(path, entry, &part, hook)?;
        let locked = check(path, &part, entry)?;
        fs::rename(&part, &blob).map_err(|source| Error::writing(&blob, source))?;
        Ok(locked)
    }

    fn fetch(
        &self,
        path: &str,
        entry: &Entry,
        part: &Path,
        hook: &mut Hook<'_>,
    ) -> Result<(), Error> {
        let length = || fs::metadata(part).map_or(0, |found| found.len());
        let mut tries = 1;
        loop {
            let before = length();
            if before == entry.bytes && part.is_file() {
                return Ok(());
            }
            match self.go_on(path, entry, part, hook) {
                Err(error) if error.is_passing() && (length() > before || tries < MAX_TRIES) => {
                    tries = if length() > before { 1 } else { tries + 1 };
                    pause(tries, path, &error, hook);
                }
                done => return done,
            }
        }
    }

    /// Appends what is missing of `part`, or writes it anew where that is not possible.
    fn go_on(
        &self,
        path: &str,
        entry: &Entry,
        part: &Path,
        hook: &mut Hook<'_>,
    ) -> Result<(), Error> {
        let failed = |source| Error::writing(part, source);
        let mut file = File::options().create(true).append(true).open(part).map_err(failed)?;
        let mut length = file.metadata().map_err(failed)?.len();
        if length > entry.bytes {
            file.set_len(0).map_err(failed)?;
            length = 0;
        }
        if length == entry.bytes {
            return Ok(()); // an empty file, of which no range can be asked for
        }
        let stream = self.remote.open_at(path, entry, length)?;
        if stream.start != length {
            file.set_len(stream.start).map_err(failed)?;
            length = stream.start;
        }
        let mut bytes = stream.bytes.take(entry.bytes - length);
        let mut piece = vec![0; PIECE];
        while length < entry.bytes {
            let read = match bytes.read(&mut piece) {
                Ok(0) => {
                    let why = format!("it ended after {length} of {} bytes", entry.bytes);
                    return Err(Error::Connection(why));
                }
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::Connection(error.to_string())),
            };
            file.write_all(&piece[..read]).map_err(failed)?;
            length += read as u64;
            hook(Step::Bytes(read as u64));
        }
        file.sync_all().map_err(failed)
    }
}

/// Compares a file with what the hub says of it; a wrong one is removed.
fn check(path: &str, file: &Path, entry: &Entry) -> Result<Locked, Error> {
    let unreadable = |source| super::Error::Unreadable { path: file.to_owned(), source };
    let sha256 = digest::sha256(file).map_err(unreadable)?;
    let got = match entry.etag.len() {
        64 => sha256.clone(),
        40 => digest::git_blob(file).map_err(unreadable)?,
        // No hash that is known: the size has to do.
        _ => entry.etag.clone(),
    };
    let bytes = fs::metadata(file).map_err(unreadable)?.len();
    if got == entry.etag && bytes == entry.bytes {
        return Ok(Locked { path: path.to_owned(), bytes, sha256, kept: false });
    }
    fs::remove_file(file).map_err(|source| Error::writing(file, source))?;
    Err(Error::Hash { file: path.to_owned(), wanted: entry.etag.clone(), got })
}

/// Makes the snapshot of links to the blobs, then its name.
fn publish(
    cache: &CacheRepo,
    commit: &str,
    upstream: &Upstream,
    entries: &[(String, Entry)],
) -> Result<PathBuf, Error> {
    let folder = cache.pointer_path(commit);
    for (path, entry) in entries {
        let link = folder.join(path);
        // From the file's folder up to the snapshot, to `snapshots`, to the repository.
        let up = "../".repeat(Path::new(path).components().count() + 1);
        let target = format!("{up}blobs/{}", entry.etag);
        if fs::read_link(&link).is_ok_and(|found| found == Path::new(&target)) {
            continue;
        }
        let make = || {
            link.parent().map_or(Ok(()), fs::create_dir_all)?;
            if link.symlink_metadata().is_ok() {
                fs::remove_file(&link)?;
            }
            std::os::unix::fs::symlink(&target, &link)
        };
        make().map_err(|source| Error::writing(&link, source))?;
    }
    if upstream.revision != commit {
        cache.create_ref(commit).map_err(|source| Error::writing(&folder, source))?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_too_small_is_refused_beforehand() {
        let folder = tempfile::tempdir().expect("a folder");
        let free = disk::free_space(folder.path()).expect("the system says");
        assert!(preflight(folder.path(), 0).is_ok());
        assert!(matches!(preflight(folder.path(), free), Err(Error::NoSpace { .. })));
        assert!(matches!(preflight(folder.path(), u64::MAX), Err(Error::NoSpace { .. })));
    }
}
