//! Single objects under a key, in a folder and in a bucket alike: asked for, created if absent, replaced, removed.
//!
//! Also what a failed request to either means.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use futures::executor::block_on;
use object_store::path::Path as ObjectPath;
use object_store::{MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use sha2::{Digest, Sha256};

use super::lock::{Held, PATIENCE};
use super::{
    BlobRef, Content, Error, Inner, PIECE, Store, bucket, key, next_piece, reading, writing,
};
use crate::failpoint;

/// Times a bucket is asked to create an object.
const CREATE_TRIES: u32 = 3;

impl Inner {
    /// What comes of `future`; the runtime of a bucket's connections goes on beside.
    pub(super) fn wait<F: Future>(&self, future: F) -> F::Output {
        let _inside = self.bucket.as_ref().map(|_| bucket::runtime().enter());
        // Where an async task calls this, its budget of operations ends some time, and is filled up only after this.
        block_on(tokio::task::unconstrained(future))
    }
}

impl Store {
    /// Puts content under a key that is its hash: nothing to do when it is there and intact, else written anew.
    pub(super) fn put_content(
        &self,
        key: &str,
        blob: &BlobRef,
        content: &Content<'_>,
        held: &Held,
    ) -> Result<(), Error> {
        let there = match self.has(key) {
            // The write says what is wrong with the place.
            Err(Error::Unreadable { .. }) => false,
            there => there?,
        };
        if there && self.is_intact(key, blob, held)? {
            return Ok(());
        }
        held.keep()?;
        match content {
            Content::Memory(bytes) if bytes.len() as u64 > PIECE => {
                self.stream(key, blob, (Path::new(key), &mut &bytes[..]), held)
            }
            // Another writer of the same bytes may have come first.
            Content::Memory(bytes)
                if !there && (self.create(key, bytes)? || self.is_intact(key, blob, held)?) =>
            {
                Ok(())
            }
            Content::Memory(bytes) => self.replace(key, bytes),
            Content::File(path) => {
                let mut file = File::open(path).map_err(|source| reading(path, source))?;
                self.stream(key, blob, (path, &mut file), held)
            }
        }
    }

    fn is_intact(&self, key: &str, blob: &BlobRef, held: &Held) -> Result<bool, Error> {
        match self.read(key, held, |_| Ok(())) {
            Ok(found) => Ok(found == *blob),
            Err(Error::Missing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Hash and length of what lies under `key`; `each` is given its pieces.
    pub(super) fn read(
        &self,
        key: &str,
        held: &Held,
        mut each: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<BlobRef, Error> {
        let failed = |source| self.reading(key, &source);
        let path = ObjectPath::from(key);
        let mut stream =
            self.inner.wait(self.inner.objects.get(&path)).map_err(failed)?.into_stream();
        let (mut hasher, mut bytes) = (Sha256::new(), 0_u64);
        while let Some(piece) = self.inner.wait(stream.next()) {
            let piece = piece.map_err(failed)?;
            bytes += piece.len() as u64;
            hasher.update(&piece);
            each(&piece)?;
            held.keep()?;
        }
        Ok(BlobRef { sha256: key::hex(&hasher.finalize()), bytes })
    }

    /// Creates `key` if absent; false when it is there.
    pub(super) fn create(&self, key: &str, content: &[u8]) -> Result<bool, Error> {
        let payload = PutPayload::from_bytes(Bytes::copy_from_slice(content));
        let path = ObjectPath::from(key);
        // A connection that broke before the answer is no refusal. Asked again, the object may be there by our own
        // hand; whoever is told that it exists looks at what it holds.
        let mut tries = if self.inner.bucket.is_some() { CREATE_TRIES } else { 1 };
        let start = Instant::now();
        loop {
            tries -= 1;
            let mode = PutMode::Create.into();
            let created = self.inner.objects.put_opts(&path, payload.clone(), mode);
            match self.inner.wait(created) {
                Ok(_) => return Ok(true),
                Err(object_store::Error::AlreadyExists { .. }) => return Ok(false),
                Err(source) if tries == 0 || start.elapsed() >= PATIENCE => {
                    return Err(self.failed(key, &source));
                }
                Err(_) => {}
            }
        }
    }

    /// Whether there is something under `key`.
    pub(super) fn has(&self, key: &str) -> Result<bool, Error> {
        match self.inner.wait(self.inner.objects.head(&ObjectPath::from(key))) {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(self.reading(key, &source)),
        }
    }

    pub(super) fn replace(&self, key: &str, content: &[u8]) -> Result<(), Error> {
        let payload = PutPayload::from_bytes(Bytes::copy_from_slice(content));
        self.inner
            .wait(self.inner.objects.put(&ObjectPath::from(key), payload))
            .map(|_| ())
            .map_err(|source| self.failed(key, &source))
    }

    /// Puts what is read from `path` in pieces; it appears under `key` whole or not at all.
    fn stream(
        &self,
        key: &str,
        blob: &BlobRef,
        from: (&Path, &mut dyn Read),
        held: &Held,
    ) -> Result<(), Error> {
        let target = ObjectPath::from(key);
        let begun = self.inner.wait(self.inner.objects.put_multipart(&target));
        let mut upload = begun.map_err(|source| self.failed(key, &source))?;
        let sent = self.send(upload.as_mut(), (key, blob), from, held);
        if sent.is_err() {
            // No sweep sees the pieces in a bucket. What went wrong matters more.
            self.inner.wait(upload.abort()).ok();
        }
        sent
    }

    fn send(
        &self,
        upload: &mut dyn MultipartUpload,
        (key, blob): (&str, &BlobRef),
        (path, content): (&Path, &mut dyn Read),
        held: &Held,
    ) -> Result<(), Error> {
        let failed = |source| self.failed(key, &source);
        let (mut hasher, mut bytes) = (Sha256::new(), 0_u64);
        loop {
            let piece = next_piece(&mut *content).map_err(|source| reading(path, source))?;
            if piece.is_empty() {
                break;
            }
            hasher.update(&piece);
            bytes += piece.len() as u64;
            self.inner.wait(upload.put_part(PutPayload::from(piece))).map_err(failed)?;
            held.keep()?;
        }
        failpoint::hit("blob_staged").map_err(|source| writing(Path::new(key), source))?;
        if (BlobRef { sha256: key::hex(&hasher.finalize()), bytes }) != *blob {
            return Err(Error::Changed { path: path.to_owned() });
        }
        self.inner.wait(upload.complete()).map(drop).map_err(failed)
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        let path = ObjectPath::from(key);
        match self.inner.wait(async { self.inner.objects.get(&path).await?.bytes().await }) {
            Ok(content) => Ok(Some(content)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.reading(key, &source)),
        }
    }

    pub(super) fn get_checked(&self, key: &str, sha256: &str) -> Result<Bytes, Error> {
        let content = self.get(key)?.ok_or_else(|| Error::Missing { key: key.to_owned() })?;
        let found = key::hash(&content);
        if found == sha256 {
            return Ok(content);
        }
        Err(Error::Corrupt { key: key.to_owned(), found })
    }

    /// What a failed read means.
    pub(super) fn reading(&self, key: &str, source: &object_store::Error) -> Error {
        match (source, system_error(source)) {
            (object_store::Error::NotFound { .. }, _) => Error::Missing { key: key.to_owned() },
            (_, Some(system)) if self.inner.bucket.is_none() => {
                reading(&self.inner.root.join(key), system)
            }
            _ => self.unanswered(key, source),
        }
    }

    /// What a failed write means.
    pub(super) fn failed(&self, key: &str, source: &object_store::Error) -> Error {
        match self.inner.bucket {
            None => backend(&self.inner.root, key, source),
            Some(_) => self.unanswered(key, source),
        }
    }

    fn unanswered(&self, key: &str, source: &object_store::Error) -> Error {
        let place = self.inner.bucket.as_ref().map(|address| format!("{address}/"));
        let key = format!("{}{key}", place.as_deref().unwrap_or_default());
        let message = source.to_string();
        match source {
            object_store::Error::Generic { .. } if place.is_some() => {
                Error::Unanswered { key, message }
            }
            _ => Error::Backend { key, message },
        }
    }

    /// The objects below `prefix`.
    pub(super) fn objects(&self, prefix: &str, held: &Held) -> Result<Vec<ObjectMeta>, Error> {
        let mut found = Vec::new();
        let mut listed = self.inner.objects.list(Some(&ObjectPath::from(prefix)));
        while let Some(object) = self.inner.wait(listed.next()) {
            found.push(object.map_err(|source| self.reading(prefix, &source))?);
            held.keep()?;
        }
        Ok(found)
    }

    pub(super) fn remove(&self, key: &str) -> Result<(), Error> {
        match self.inner.wait(self.inner.objects.delete(&ObjectPath::from(key))) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.failed(key, &source)),
        }
    }
}

/// What a failed write through the backend means.
pub(super) fn backend(root: &Path, key: &str, source: &object_store::Error) -> Error {
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
