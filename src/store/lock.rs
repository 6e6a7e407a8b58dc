//! One lock for the whole store: writers hold it together, removal holds it alone.
//!
//! In a folder it is a lock of the system on the file `lock`. In a bucket it is objects: each writer keeps one under
//! `locks/shared`, removal keeps one under `locks/alone`. A writer first makes its object and then looks for removal's;
//! removal first makes its own and then looks for writers. So at least one of two sees the other and waits.
//! Objects of dead holders are removed by who waits: one that stays as it is for a whole [`LEASE`] of the waiter's own
//! clock is dead, since a live holder writes it anew, or gives up, long before. No two clocks are compared.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use super::{Error, Store, writing};

/// How long one request to a bucket may take, with its retries another time.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// Longest that a writer waits for removal: a sweep of a large store.
const SHARED_WITHIN: Duration = Duration::from_secs(300);
/// Longest that removal waits for writers where it matters, and the watcher of one that hangs ends it meanwhile.
pub(super) const ALONE_WITHIN: Duration = Duration::from_secs(20);
/// Longest that it waits where what stays does no harm until a sweep.
pub(super) const BRIEFLY: Duration = Duration::from_secs(2);
/// Age at which a holder writes its object anew.
const RENEW: Duration = Duration::from_secs(15);
/// Age at which it may not any more: it was at one request since the last look.
const SILENCE: Duration = Duration::from_secs(RENEW.as_secs() + 2 * PATIENCE.as_secs());
/// How long an object of a lock counts without being written anew: [`SILENCE`] and the request that does it.
const LEASE: Duration = Duration::from_secs(100);
/// Time between two looks at who holds the lock.
const LOOK: Duration = Duration::from_millis(50);

/// Where removal keeps its object.
const ALONE: &str = "locks/alone";
/// Where each writer keeps one.
const SHARED: &str = "locks/shared";

/// A held lock; dropping it lets go.
pub(super) enum Held {
    /// Of the system.
    File { _file: File },
    /// An object in a bucket.
    Object { store: Store, key: String, written: Mutex<Instant> },
}

impl Held {
    /// Called before each step that the lock protects: holds it for the length of a request from now.
    pub(super) fn keep(&self) -> Result<(), Error> {
        let Self::Object { store, key, written } = self else { return Ok(()) };
        let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.elapsed() < RENEW {
            return Ok(());
        }
        // A process that was stopped may have lost it meanwhile.
        if written.elapsed() > SILENCE {
            return Err(Error::LockLost { key: key.clone() });
        }
        let now = Instant::now();
        store.replace(key, &stamp())?;
        *written = now;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Later it may be somebody else's.
        if let Self::Object { store, key, written } = self
            && written.get_mut().is_ok_and(|written| written.elapsed() < LEASE / 2)
            && let Err(error) = store.remove(key)
        {
            tracing::warn!(%error, key, "a lock stays until its lease ends");
        }
    }
}

impl Store {
    /// Held while something is put or published: removal waits.
    pub(super) fn lock_shared(&self) -> Result<Held, Error> {
        if self.inner.bucket.is_some() {
            return self.hold_shared();
        }
        let (path, file) = self.lock_file()?;
        within(SHARED_WITHIN, || file.try_lock_shared())
            .map_err(|source| writing(&path, source))?;
        Ok(Held::File { _file: file })
    }

    /// As [`lock_shared`](Self::lock_shared) for what one job alone knows of, which a bucket needs no lock for: it is
    /// written whole, and a removal that comes between costs a checkpoint at most.
    pub(super) fn lock_work(&self) -> Result<Option<Held>, Error> {
        self.inner.bucket.is_none().then(|| self.lock_shared()).transpose()
    }

    /// Held while something is removed: nobody puts or publishes.
    pub(super) fn lock_alone(&self, patience: Duration) -> Result<Held, Error> {
        if self.inner.bucket.is_some() {
            return self.hold_alone();
        }
        let (path, file) = self.lock_file()?;
        within(patience, || file.try_lock()).map_err(|source| writing(&path, source))?;
        Ok(Held::File { _file: file })
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

    fn hold_shared(&self) -> Result<Held, Error> {
        let mut waiting = Waiting::default();
        loop {
            let (key, written) = (format!("{SHARED}/{}", uuid::Uuid::now_v7()), Instant::now());
            self.replace(&key, &stamp())?;
            let held = Held::Object { store: self.clone(), key, written: Mutex::new(written) };
            if !waiting.for_others(self, ALONE)? {
                return Ok(held);
            }
            // Removal goes first.
            drop(held);
            while waiting.for_others(self, ALONE)? {
                thread::sleep(LOOK);
            }
        }
    }

    fn hold_alone(&self) -> Result<Held, Error> {
        let mut waiting = Waiting::default();
        let key = format!("{ALONE}/it");
        loop {
            let (stamp, written) = (stamp(), Instant::now());
            // An answer that got lost is asked for again, and then the object is there.
            if self.create(&key, &stamp)? || self.get(&key)?.is_some_and(|found| found == stamp[..])
            {
                let held = Held::Object { store: self.clone(), key, written: Mutex::new(written) };
                while waiting.for_others(self, SHARED)? {
                    held.keep()?;
                    thread::sleep(LOOK);
                }
                return Ok(held);
            }
            waiting.for_others(self, ALONE)?;
            thread::sleep(LOOK);
        }
    }
}

/// What was seen of a lock that others hold.
#[derive(Default)]
struct Waiting(HashMap<(String, String), Instant>);

impl Waiting {
    /// Whether anybody holds something under `key`; removes what dead holders left.
    fn for_others(&mut self, store: &Store, key: &str) -> Result<bool, Error> {
        let mut held = false;
        for object in store.objects(key)? {
            let key = object.location.to_string();
            let version = object.e_tag.unwrap_or_else(|| object.last_modified.to_string());
            let seen = *self.0.entry((key.clone(), version)).or_insert_with(Instant::now);
            if seen.elapsed() > LEASE {
                store.remove(&key)?;
            } else {
                held = true;
            }
        }
        Ok(held)
    }
}

/// Content that no other object of a lock has, so that its version tells when it was written anew.
fn stamp() -> [u8; 16] {
    uuid::Uuid::now_v7().into_bytes()
}

/// Tries to lock a file for `time`, and no longer: whoever holds it may have been stopped.
fn within(time: Duration, lock: impl Fn() -> Result<(), TryLockError>) -> io::Result<()> {
    let (start, mut pause) = (Instant::now(), Duration::from_millis(1));
    loop {
        match lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if start.elapsed() < time => {
                thread::sleep(pause);
                pause = (pause * 2).min(LOOK);
            }
            Err(TryLockError::WouldBlock) => {
                let message = format!("another process has held it for {time:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
        }
    }
}
