//! Where results live: blobs under their content hash, one manifest a job, checkpoints, temporary files.
//!
//! Over `object_store`: a folder, or a bucket of an S3-compatible server (`bucket.rs`), with the same commit protocol:
//! write aside, sync, then create if absent. Keys: `blobs/<sha256>`, `jobs/<job key>/manifest.json`,
//! `work/<job key>/<sha256>`, `work/<job key>/stages/<stage>`, `work/<job key>/<stage>/<sha256>` for checkpoints,
//! `claims/<job key or imported>/<sha256>`. A claim says that a job put or published a blob; a blob without claims is
//! rubbish. Writers hold the store's lock (`lock.rs`) together, removal (`clean.rs`) holds it alone. Temporary files,
//! in `tmp/`, are always in a local folder.
//!
//! The API is synchronous and meant for blocking threads. Start from [`Store`].

pub mod key;

mod bucket;
mod clean;
mod lock;
mod objects;
mod url;
mod work;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::failpoint;
pub use clean::{Ages, Swept};
pub use key::{JobKey, hash as sha256, hex};
use lock::Held;
use objects::backend;

/// Bytes of a file that are held in memory at once, and most that goes to a bucket in one request.
const PIECE: u64 = 8 << 20;
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
    /// An address that is no bucket's.
    #[error(
        "`{address}` is not the address of a bucket, `s3://BUCKET` or `s3://BUCKET/PREFIX` wanted"
    )]
    Address {
        /// What was given.
        address: String,
    },
    /// A store that needs a feature of the build.
    #[error("the store `{address}` needs a genvideo built with the feature `s3`")]
    NotBuilt {
        /// The bucket.
        address: String,
    },
    /// A server that lets several writers create one object; then a job could be published twice.
    #[error(
        "the server of `{address}` does not create an object only if it is absent: {winners} of {writers} writers of one key were told that they made it"
    )]
    NotExclusive {
        /// The bucket.
        address: String,
        /// Writers that were told so.
        winners: usize,
        /// All writers.
        writers: usize,
    },
    /// This process was stopped for so long that others took its lock for a dead one's.
    #[error("the lock `{key}` of the store was held for too long without a sign of life")]
    LockLost {
        /// The lock's object.
        key: String,
    },
    /// The server of a bucket is down, out of reach or at fault; another attempt may find it well.
    #[error("the server of the store failed at `{key}`: {message}")]
    Unanswered {
        /// The address of what was read or written.
        key: String,
        /// What was tried, and what came of it.
        message: String,
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

/// A store in one place. Cheap to clone, usable from any thread and from several processes at once.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    objects: Arc<dyn ObjectStore>,
    /// Address of the bucket; `None` when the objects are files under `root`.
    bucket: Option<String>,
    seen: lock::Seen,
    /// Bytes in the bucket, and when they were counted.
    counted: Mutex<Option<(Instant, u64)>>,
}

/// Where the content of a blob comes from.
enum Content<'a> {
    Memory(&'a [u8]),
    File(&'a Path),
}

impl Store {
    /// The store under the folder `root`, made when it is not there.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let root = folders(root, &["blobs", "jobs", "work", "claims", "tmp"])?;
        let objects = LocalFileSystem::new_with_prefix(&root)
            .map_err(|source| backend(&root, "", &source))?
            .with_fsync(true);
        Ok(Self::of(root, Arc::new(objects), None))
    }

    /// The store at `address`, `s3://BUCKET` or `s3://BUCKET/PREFIX`, with its temporary files under `scratch`. The
    /// `variables` of the environment name the server and the credentials (`AWS_…`). The bucket must be there, and
    /// its server must create an object only if it is absent; that is tried here.
    pub fn open_bucket(
        address: &str,
        variables: &[(String, String)],
        scratch: &Path,
    ) -> Result<Self, Error> {
        let objects = bucket::connect(address, variables)?;
        let root = folders(scratch, &["tmp"])?;
        let bucket = Some(address.trim_end_matches('/').to_owned());
        let store = Self::of(root, objects, bucket);
        store.check_exclusive(address)?;
        Ok(store)
    }

    fn of(root: PathBuf, objects: Arc<dyn ObjectStore>, bucket: Option<String>) -> Self {
        let (seen, counted) = (lock::Seen::default(), Mutex::default());
        Self { inner: Arc::new(Inner { root, objects, bucket, seen, counted }) }
    }

    /// Whether it is in a bucket, with nothing but temporary files on the disk.
    pub fn is_remote(&self) -> bool {
        self.inner.bucket.is_some()
    }

    /// The folder, absolute; of a store in a bucket the one with the temporary files.
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
        self.has(&format!("blobs/{}", key::content_hash(sha256)?))
    }

    /// The blob as a `file://` address, percent-encoded, or an `s3://` one.
    pub fn blob_url(&self, sha256: &str) -> Result<String, Error> {
        let key = format!("blobs/{}", key::content_hash(sha256)?);
        Ok(match &self.inner.bucket {
            None => url::of_file(&self.inner.root.join(key)),
            Some(address) => format!("{address}/{key}"),
        })
    }

    /// Writes the content of a blob to `file`, which is at `path`, checked against its name.
    pub fn copy_blob(&self, sha256: &str, path: &Path, file: &mut File) -> Result<(), Error> {
        let key = format!("blobs/{}", key::content_hash(sha256)?);
        let found = self.read(&key, &Held::Nothing, |piece| {
            file.write_all(piece).map_err(|source| writing(path, source))
        })?;
        if found.sha256 == sha256 {
            Ok(())
        } else {
            Err(Error::Corrupt { key, found: found.sha256 })
        }
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
        let held = self.lock_shared()?;
        if let Some(before) = self.manifest(job)? {
            return same_or_conflict(job, &before, manifest);
        }
        for sha256 in files {
            held.keep()?;
            if !self.has_blob(sha256)? {
                return Err(Error::Missing { key: format!("blobs/{sha256}") });
            }
            self.claim(job.as_str(), sha256)?;
        }
        let at = |source| writing(Path::new(&manifest_key(job)), source);
        failpoint::hit("manifest_begun").map_err(at)?;
        held.confirm()?;
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
        let held = self.lock_shared()?;
        self.claim(owner, &blob.sha256)?;
        held.keep()?;
        self.put_content(&format!("blobs/{}", blob.sha256), blob, &content, &held)?;
        Ok(blob.clone())
    }

    /// Says that `owner` needs the blob. Written before the blob is looked at, so that a removal sees it.
    fn claim(&self, owner: &str, sha256: &str) -> Result<(), Error> {
        let key = format!("claims/{owner}/{sha256}");
        if self.inner.bucket.is_some() {
            return self.replace(&key, b"");
        }
        let path = self.inner.root.join(&key);
        match File::options().write(true).open(&path) {
            // It counts from today again.
            Ok(claim) => {
                claim.set_modified(SystemTime::now()).map_err(|source| writing(&path, source))
            }
            Err(_) => self.create(&key, b"").map(drop),
        }
    }
}

/// Makes `names` under `root`; gives the absolute path.
fn folders(root: &Path, names: &[&str]) -> Result<PathBuf, Error> {
    for name in names {
        let folder = root.join(name);
        fs::create_dir_all(&folder).map_err(|source| writing(&folder, source))?;
    }
    fs::canonicalize(root).map_err(|source| writing(root, source))
}

/// What the manifest of a job is called in its folder.
const MANIFEST: &str = "manifest.json";

fn manifest_key(job: &JobKey) -> String {
    format!("jobs/{job}/{MANIFEST}")
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

/// The next bytes of `content`, empty at its end.
fn next_piece(content: impl Read) -> io::Result<Vec<u8>> {
    let mut piece = Vec::new();
    content.take(PIECE).read_to_end(&mut piece)?;
    Ok(piece)
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
