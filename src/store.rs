//! Where results live: blobs under their content hash, one manifest a job, checkpoints, temporary files.
//!
//! Over `object_store` (a local folder today), with the same commit protocol everywhere: write aside, sync, then
//! create if absent. Layout under the root: `blobs/<sha256>`, `jobs/<job key>/manifest.json`,
//! `work/<job key>/<sha256>`, `work/<job key>/stages/<stage>`, `work/<job key>/<stage>/<sha256>` for checkpoints,
//! `claims/<job key or imported>/<sha256>`, `tmp/`, `lock`. A claim says that a job put or
//! published a blob; a blob without claims is rubbish. Writers hold `lock` shared, removal (`clean.rs`) holds it alone;
//! neither waits for ever, since a process that was stopped may hold it.
//!
//! The API is synchronous and meant for blocking threads. Start from [`Store`].

pub mod key;

mod clean;
mod url;
mod work;

use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures::StreamExt;
use futures::executor::block_on;
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::failpoint;
pub use clean::{Ages, Swept};
pub use key::{JobKey, hash as sha256, hex};

/// Bytes of a file that are held in memory at once.
const PIECE: u64 = 8 << 20;
/// Longest that a writer waits for removal: a sweep of a large store.
const SHARED_WITHIN: Duration = Duration::from_secs(300);
/// Longest that removal waits for writers where it matters, and the watcher of one that hangs ends it meanwhile.
const ALONE_WITHIN: Duration = Duration::from_secs(20);
/// Longest that it waits where what stays does no harm until a sweep.
const BRIEFLY: Duration = Duration::from_secs(2);
/// Longest pause between two tries for the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Claims of blobs that came without a job.
const IMPORTED: &str = "imported";

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No room left, or a quota reached.
    #[error("disk full while writing `{}`: {source}", path.display())]
    DiskFull {
        /// What was written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The folder or a file in it cannot be written.
    #[error("cannot write `{}`: {source}", path.display())]
    Unwritable {
        /// What was to be written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that is there cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Unreadable {
        /// What was to be read.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nothing under that key.
    #[error("`{key}` is not in the store")]
    Missing {
        /// For example `blobs/<sha256>`.
        key: String,
    },
    /// The content does not hash to its name.
    #[error("`{key}` is corrupt: its content has the hash {found}")]
    Corrupt {
        /// For example `blobs/<sha256>`.
        key: String,
        /// Hash of what is there.
        found: String,
    },
    /// A file changed while it was put.
    #[error("`{}` changed while it was read", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The job has published another manifest.
    #[error("job {job} has already published another manifest")]
    Conflict {
        /// The job.
        job: JobKey,
    },
    /// A key that is no key.
    #[error("`{key}` is not a {what} key, {length} lower-case hex digits wanted")]
    Key {
        /// `job` or `blob`.
        what: &'static str,
        /// What was given.
        key: String,
        /// Digits of a right one.
        length: usize,
    },
    /// The suffix of a temporary file that could lead elsewhere.
    #[error("`{suffix}` is not a file suffix, letters, digits, `.`, `-` and `_` wanted")]
    Suffix {
        /// What was given.
        suffix: String,
    },
    /// Anything else the backend reports.
    #[error("the store failed at `{key}`: {message}")]
    Backend {
        /// What was read or written.
        key: String,
        /// What the backend said.
        message: String,
    },
}

/// A blob: its content hash and its length.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlobRef {
    /// Lower-case hex SHA-256 of the content.
    pub sha256: String,
    /// Length in bytes.
    pub bytes: u64,
}

/// What became of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// It is the job's manifest from now on.
    New,
    /// The job had published the same bytes before.
    Same,
}

/// A file under `<root>/tmp` that is removed when this is dropped.
#[derive(Debug)]
pub struct TempFile(tempfile::TempPath);

impl TempFile {
    /// Where it is; it exists, empty at first.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// A store under one folder. Cheap to clone, usable from any thread and from several processes at once.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    objects: LocalFileSystem,
}

/// Where the content of a blob comes from.
enum Content<'a> {
    Memory(&'a [u8]),
    File(&'a Path),
}

impl Store {
    /// The store under `root`, made when it is not there.
    pub fn open(root: &Path) -> Result<Self, Error> {
        for folder in ["blobs", "jobs", "work", "claims", "tmp"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).map_err(|source| writing(&folder, source))?;
        }
        let root = fs::canonicalize(root).map_err(|source| writing(root, source))?;
        let objects = LocalFileSystem::new_with_prefix(&root)
            .map_err(|source| backend(&root, "", &source))?
            .with_fsync(true);
        Ok(Self { inner: Arc::new(Inner { root, objects }) })
    }

    /// The folder, absolute.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Keeps `content` for `job`. A blob that is there already is checked, and replaced when it is corrupt.
    pub fn put_blob(&self, job: &JobKey, content: &[u8]) -> Result<BlobRef, Error> {
        self.put_claimed(job.as_str(), &of_bytes(content), Content::Memory(content))
    }

    /// Keeps the content of the file at `path` for `job`; the file stays.
    pub fn put_blob_file(&self, job: &JobKey, path: &Path) -> Result<BlobRef, Error> {
        let blob = of_file(path)?;
        self.put_claimed(job.as_str(), &blob, Content::File(path))
    }

    /// Keeps `content` that belongs to no job yet, an upload. A sweep removes it once it is old and no job named it.
    pub fn import_blob(&self, content: &[u8]) -> Result<BlobRef, Error> {
        self.put_claimed(IMPORTED, &of_bytes(content), Content::Memory(content))
    }

    /// The content of a blob, checked against its name.
    pub fn get_blob(&self, sha256: &str) -> Result<Bytes, Error> {
        self.get_checked(&format!("blobs/{}", key::content_hash(sha256)?), sha256)
    }

    /// Whether there is a blob of that name; its content is not checked.
    pub fn has_blob(&self, sha256: &str) -> Result<bool, Error> {
        Ok(self.blob_path(sha256)?.is_file())
    }

    /// The blob as a `file://` address, percent-encoded.
    pub fn blob_url(&self, sha256: &str) -> Result<String, Error> {
        Ok(url::of_file(&self.blob_path(sha256)?))
    }

    /// Where the blob lies, whether it is there or not.
    pub fn blob_path(&self, sha256: &str) -> Result<PathBuf, Error> {
        Ok(self.inner.root.join("blobs").join(key::content_hash(sha256)?))
    }

    /// A new empty file under `<root>/tmp` whose name ends in `suffix` (letters, digits, `.`, `-`, `_`); it goes with
    /// the job's clean-up at the latest.
    pub fn temp_file(&self, job: Option<&JobKey>, suffix: &str) -> Result<TempFile, Error> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if !suffix.bytes().all(fits) {
            return Err(Error::Suffix { suffix: suffix.escape_debug().to_string() });
        }
        let folder = self.inner.root.join("tmp");
        let prefix = job.map_or_else(|| "any-".to_owned(), |job| format!("{job}-"));
        let file = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(suffix)
            .tempfile_in(&folder)
            .map_err(|source| writing(&folder, source))?;
        Ok(TempFile(file.into_temp_path()))
    }

    /// Makes `manifest` the job's one manifest. The first wins; the same bytes again are [`Published::Same`], others
    /// [`Error::Conflict`]. The blobs in `files` must be there, and stay from now on.
    pub fn publish(
        &self,
        job: &JobKey,
        manifest: &[u8],
        files: &[&str],
    ) -> Result<Published, Error> {
        let _held = self.lock_shared()?;
        if let Some(before) = self.manifest(job)? {
            return same_or_conflict(job, &before, manifest);
        }
        for sha256 in files {
            if !self.has_blob(sha256)? {
                return Err(Error::Missing { key: format!("blobs/{sha256}") });
            }
            self.claim(job.as_str(), sha256)?;
        }
        let at = |source| writing(Path::new(&manifest_key(job)), source);
        failpoint::hit("manifest_begun").map_err(at)?;
        if self.create(&manifest_key(job), manifest)? {
            failpoint::hit("manifest_written").map_err(at)?;
            return Ok(Published::New);
        }
        let before =
            self.manifest(job)?.ok_or_else(|| Error::Missing { key: manifest_key(job) })?;
        same_or_conflict(job, &before, manifest)
    }

    /// The job's manifest, `None` before it is published.
    pub fn manifest(&self, job: &JobKey) -> Result<Option<Bytes>, Error> {
        self.get(&manifest_key(job))
    }

    fn put_claimed(
        &self,
        owner: &str,
        blob: &BlobRef,
        content: Content<'_>,
    ) -> Result<BlobRef, Error> {
        let _held = self.lock_shared()?;
        self.claim(owner, &blob.sha256)?;
        self.put_content(&format!("blobs/{}", blob.sha256), blob, &content)?;
        Ok(blob.clone())
    }

    /// Says that `owner` needs the blob. Written before the blob is looked at, so that a removal sees it.
    fn claim(&self, owner: &str, sha256: &str) -> Result<(), Error> {
        let key = format!("claims/{owner}/{sha256}");
        let path = self.inner.root.join(&key);
        match File::options().write(true).open(&path) {
            // It counts from today again.
            Ok(claim) => {
                claim.set_modified(SystemTime::now()).map_err(|source| writing(&path, source))
            }
            Err(_) => self.create(&key, b"").map(drop),
        }
    }

    /// Puts content under a key that is its hash: nothing to do when it is there and intact, else written anew.
    fn put_content(&self, key: &str, blob: &BlobRef, content: &Content<'_>) -> Result<(), Error> {
        let there = self.inner.root.join(key).exists();
        if there && self.is_intact(key, blob)? {
            return Ok(());
        }
        match content {
            // Another writer of the same bytes may have come first.
            Content::Memory(bytes) if !there => {
                if self.create(key, bytes)? || self.is_intact(key, blob)? {
                    Ok(())
                } else {
                    self.replace(key, bytes)
                }
            }
            Content::Memory(bytes) => self.replace(key, bytes),
            Content::File(path) => self.stream(key, blob, path),
        }
    }

    fn is_intact(&self, key: &str, blob: &BlobRef) -> Result<bool, Error> {
        match self.measure(key) {
            Ok(found) => Ok(found == *blob),
            Err(Error::Missing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Hash and length of what lies under `key`, read in pieces.
    fn measure(&self, key: &str) -> Result<BlobRef, Error> {
        let path = ObjectPath::from(key);
        block_on(async {
            let mut stream = self.inner.objects.get(&path).await?.into_stream();
            let (mut hasher, mut bytes) = (Sha256::new(), 0_u64);
            while let Some(piece) = stream.next().await {
                let piece = piece?;
                bytes += piece.len() as u64;
                hasher.update(&piece);
            }
            Ok(BlobRef { sha256: key::hex(&hasher.finalize()), bytes })
        })
        .map_err(|source| self.reading(key, &source))
    }

    /// Creates `key` if absent; false when it is there.
    fn create(&self, key: &str, content: &[u8]) -> Result<bool, Error> {
        let payload = PutPayload::from_bytes(Bytes::copy_from_slice(content));
        let path = ObjectPath::from(key);
        match block_on(self.inner.objects.put_opts(&path, payload, PutMode::Create.into())) {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(source) => Err(backend(&self.inner.root, key, &source)),
        }
    }

    fn replace(&self, key: &str, content: &[u8]) -> Result<(), Error> {
        let payload = PutPayload::from_bytes(Bytes::copy_from_slice(content));
        block_on(self.inner.objects.put(&ObjectPath::from(key), payload))
            .map(|_| ())
            .map_err(|source| backend(&self.inner.root, key, &source))
    }

    /// Puts a file in pieces; it appears under `key` whole or not at all.
    fn stream(&self, key: &str, blob: &BlobRef, path: &Path) -> Result<(), Error> {
        let failed = |source| backend(&self.inner.root, key, &source);
        let mut upload =
            block_on(self.inner.objects.put_multipart(&ObjectPath::from(key))).map_err(failed)?;
        let poured = pour(upload.as_mut(), path);
        failpoint::hit("blob_staged").map_err(|source| writing(Path::new(key), source))?;
        match poured {
            Ok(found) if found == *blob => block_on(upload.complete()).map(|_| ()).map_err(failed),
            poured => {
                // The staged file goes now or with a sweep; what went wrong matters more.
                block_on(upload.abort()).ok();
                match poured {
                    Ok(_) => Err(Error::Changed { path: path.to_owned() }),
                    Err(Poured::Read(source)) => Err(reading(path, source)),
                    Err(Poured::Write(source)) => Err(failed(source)),
                }
            }
        }
    }

    fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        let path = ObjectPath::from(key);
        match block_on(async { self.inner.objects.get(&path).await?.bytes().await }) {
            Ok(content) => Ok(Some(content)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.reading(key, &source)),
        }
    }

    fn get_checked(&self, key: &str, sha256: &str) -> Result<Bytes, Error> {
        let content = self.get(key)?.ok_or_else(|| Error::Missing { key: key.to_owned() })?;
        let found = key::hash(&content);
        if found == sha256 {
            return Ok(content);
        }
        Err(Error::Corrupt { key: key.to_owned(), found })
    }

    fn reading(&self, key: &str, source: &object_store::Error) -> Error {
        match (source, system_error(source)) {
            (object_store::Error::NotFound { .. }, _) => Error::Missing { key: key.to_owned() },
            (_, Some(system)) => reading(&self.inner.root.join(key), system),
            (other, None) => Error::Backend { key: key.to_owned(), message: other.to_string() },
        }
    }

    /// Held while something is put or published: removal waits.
    fn lock_shared(&self) -> Result<File, Error> {
        let (path, file) = self.lock_file()?;
        within(SHARED_WITHIN, || file.try_lock_shared())
            .map_err(|source| writing(&path, source))?;
        Ok(file)
    }

    /// Held while something is removed: nobody puts or publishes.
    fn lock_alone(&self, patience: Duration) -> Result<File, Error> {
        let (path, file) = self.lock_file()?;
        within(patience, || file.try_lock()).map_err(|source| writing(&path, source))?;
        Ok(file)
    }

    fn lock_file(&self) -> Result<(PathBuf, File), Error> {
        let path = self.inner.root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| writing(&path, source))?;
        Ok((path, file))
    }
}

/// Tries to lock for `time`, and no longer: whoever holds it may have been stopped.
fn within(time: Duration, lock: impl Fn() -> Result<(), TryLockError>) -> io::Result<()> {
    let (start, mut pause) = (Instant::now(), Duration::from_millis(1));
    loop {
        match lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if start.elapsed() < time => {
                thread::sleep(pause);
                pause = (pause * 2).min(LOCK_PAUSE);
            }
            Err(TryLockError::WouldBlock) => {
                let message = format!("another process has held it for {time:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
        }
    }
}

fn manifest_key(job: &JobKey) -> String {
    format!("jobs/{job}/manifest.json")
}

fn same_or_conflict(job: &JobKey, before: &[u8], now: &[u8]) -> Result<Published, Error> {
    if before == now { Ok(Published::Same) } else { Err(Error::Conflict { job: job.clone() }) }
}

fn of_bytes(content: &[u8]) -> BlobRef {
    BlobRef { sha256: key::hash(content), bytes: content.len() as u64 }
}

fn of_file(path: &Path) -> Result<BlobRef, Error> {
    let mut file = File::open(path).map_err(|source| reading(path, source))?;
    let (mut hasher, mut bytes) = (Sha256::new(), 0_u64);
    loop {
        let piece = next_piece(&mut file).map_err(|source| reading(path, source))?;
        if piece.is_empty() {
            return Ok(BlobRef { sha256: key::hex(&hasher.finalize()), bytes });
        }
        hasher.update(&piece);
        bytes += piece.len() as u64;
    }
}

/// The next bytes of a file, empty at its end.
fn next_piece(file: &mut File) -> io::Result<Vec<u8>> {
    let mut piece = Vec::new();
    file.take(PIECE).read_to_end(&mut piece)?;
    Ok(piece)
}

/// Which side of a copy failed.
enum Poured {
    Read(io::Error),
    Write(object_store::Error),
}

/// Sends the file at `path` into `upload`; gives the hash and length of what was sent.
fn pour(upload: &mut dyn MultipartUpload, path: &Path) -> Result<BlobRef, Poured> {
    let mut file = File::open(path).map_err(Poured::Read)?;
    let (mut hasher, mut bytes) = (Sha256::new(), 0_u64);
    loop {
        let piece = next_piece(&mut file).map_err(Poured::Read)?;
        if piece.is_empty() {
            return Ok(BlobRef { sha256: key::hex(&hasher.finalize()), bytes });
        }
        hasher.update(&piece);
        bytes += piece.len() as u64;
        block_on(upload.put_part(PutPayload::from(piece))).map_err(Poured::Write)?;
    }
}

/// What a failed write means.
pub(crate) fn writing(path: &Path, source: io::Error) -> Error {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    let path = path.to_owned();
    match source.kind() {
        StorageFull | QuotaExceeded => Error::DiskFull { path, source },
        _ => Error::Unwritable { path, source },
    }
}

fn reading(path: &Path, source: io::Error) -> Error {
    Error::Unreadable { path: path.to_owned(), source }
}

/// What a failed write through the backend means.
fn backend(root: &Path, key: &str, source: &object_store::Error) -> Error {
    match system_error(source) {
        Some(system) => writing(&root.join(key), system),
        None => Error::Backend { key: key.to_owned(), message: source.to_string() },
    }
}

/// The system's error at the bottom of a backend's one.
fn system_error(source: &object_store::Error) -> Option<io::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(source);
    while let Some(error) = cause {
        if let Some(system) = error.downcast_ref::<io::Error>() {
            let copy = |code| io::Error::from_raw_os_error(code);
            return Some(
                system
                    .raw_os_error()
                    .map_or_else(|| io::Error::new(system.kind(), system.to_string()), copy),
            );
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed_with(source: io::Error) -> Error {
        let source =
            object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(source) };
        backend(Path::new("/data"), "blobs/ab", &source)
    }

    #[test]
    fn a_full_disk_is_told_from_a_closed_one() {
        let full = failed_with(io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(
            matches!(&full, Error::DiskFull { path, .. } if path == Path::new("/data/blobs/ab")),
            "{full}"
        );
        let quota = failed_with(io::Error::from_raw_os_error(libc::EDQUOT));
        assert!(matches!(quota, Error::DiskFull { .. }), "{quota}");
        for code in [libc::EACCES, libc::EROFS, libc::ENOTDIR] {
            let closed = failed_with(io::Error::from_raw_os_error(code));
            assert!(matches!(closed, Error::Unwritable { .. }), "{closed}");
        }
    }
}
