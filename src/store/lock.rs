//! One lock for the whole store: writers hold it together, removal holds it alone.
//!
//! In a folder it is a lock of the system on the file `lock`. In a bucket it is objects: each writer keeps one under
//! `locks/shared`, removal keeps one under `locks/alone`, each with a key of its own. Whoever comes first makes
//! its object and then looks for one of removal, to which it gives way; removal then waits for the writers' too. So at
//! least one of two sees the other and waits.
//! Objects of dead holders are removed by who waits: one that stays as it is for a whole [`LEASE`] of the waiter's own
//! clock is dead, since a live holder writes it anew, or gives up, long before. No two clocks are compared.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
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
/// Least time between two looks at who holds the lock.
const LOOK: Duration = Duration::from_millis(50);

/// Where removal keeps an object.
const ALONE: &str = "locks/alone";
/// Where each writer keeps one.
const SHARED: &str = "locks/shared";

/// A held lock; dropping it lets go.
pub(super) enum Held {
    /// Of the system.
    File { _file: File },
    /// No lock is needed.
    Nothing,
    /// An object in a bucket, whose key nobody else has.
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

    /// As [`keep`](Self::keep) before the one step that must not be done without the lock: others may have taken it for
    /// a dead one's while the whole machine slept, which its clock does not show.
    pub(super) fn confirm(&self) -> Result<(), Error> {
        if let Self::Object { store, key, .. } = self
            && !store.has(key)?
        {
            return Err(Error::LockLost { key: key.clone() });
        }
        self.keep()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Self::Object { store, key, .. } = self
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
            return self.hold(SHARED, SHARED_WITHIN);
        }
        let (path, file) = self.lock_file()?;
        within(SHARED_WITHIN, || file.try_lock_shared())
            .map_err(|source| writing(&path, source))?;
        Ok(Held::File { _file: file })
    }

    /// As [`lock_shared`](Self::lock_shared) for what one job alone knows of, which a bucket needs no lock for: it is
    /// written whole, and a removal that comes between costs a checkpoint at most.
    pub(super) fn lock_work(&self) -> Result<Held, Error> {
        if self.inner.bucket.is_some() { Ok(Held::Nothing) } else { self.lock_shared() }
    }

    /// Held while something is removed: nobody puts or publishes.
    pub(super) fn lock_alone(&self, patience: Duration) -> Result<Held, Error> {
        if self.inner.bucket.is_some() {
            // Where it matters, until an object of a dead holder is known for one.
            let lease = if patience > BRIEFLY { LEASE } else { Duration::ZERO };
            return self.hold(ALONE, patience + lease);
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

    /// Makes an object at `place` when nobody has one at [`ALONE`]. Who wants to be alone then waits for writers.
    fn hold(&self, place: &str, patience: Duration) -> Result<Held, Error> {
        let key = format!("{place}/{}", uuid::Uuid::now_v7());
        let start = Instant::now();
        let pause = || {
            thread::sleep(LOOK + LOOK * u32::from(stamp()[15] % 4));
            let is_late = start.elapsed() > patience;
            if is_late { Err(writing(Path::new(place), held_for(patience))) } else { Ok(()) }
        };
        loop {
            let written = Instant::now();
            self.replace(&key, &stamp())?;
            let held = Held::Object {
                store: self.clone(),
                key: key.clone(),
                written: Mutex::new(written),
            };
            if !self.is_held(ALONE, &key)? {
                while place == ALONE && self.is_held(SHARED, &key)? {
                    held.keep()?;
                    pause()?;
                }
                return Ok(held);
            }
            // Of two that came at once both may be here, and each waits for another time.
            drop(held);
            pause()?;
            while self.is_held(ALONE, &key)? {
                pause()?;
            }
        }
    }

    /// Whether there is an object at `place` but `own`; removes what dead holders left.
    fn is_held(&self, place: &'static str, own: &str) -> Result<bool, Error> {
        let asked = Instant::now();
        let mut found = Versions::new();
        let objects = self.objects(place, &Held::Nothing)?;
        let now = Instant::now();
        let mut all = self.inner.seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.remove(place).unwrap_or_default();
        for object in objects.into_iter().filter(|object| object.location.as_ref() != own) {
            let version = object.e_tag.unwrap_or_else(|| object.last_modified.to_string());
            let version = (object.location.to_string(), version);
            let since = before.get(&version).copied().unwrap_or(now);
            found.insert(version, since);
        }
        let is_dead = |since: Instant| asked.saturating_duration_since(since) > LEASE;
        let dead = found.iter().filter(|(_, since)| is_dead(**since));
        let dead: Vec<String> = dead.map(|((key, _), _)| key.clone()).collect();
        let is_held = found.len() > dead.len();
        all.insert(place, found);
        drop(all);
        dead.iter().try_for_each(|key| self.remove(key))?;
        Ok(is_held)
    }
}

/// When this process first saw what holders keep, by the place it has.
#[derive(Debug, Default)]
pub(super) struct Seen(Mutex<HashMap<&'static str, Versions>>);

/// Key and version of each object, and when it was first seen.
type Versions = HashMap<(String, String), Instant>;

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
                return Err(held_for(time));
            }
        }
    }
}

fn held_for(time: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("another process has held it for {time:?}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Barrier};

    use object_store::memory::InMemory;

    use super::*;
    use crate::store::{Content, of_bytes};

    fn store() -> Store {
        Store::of(PathBuf::new(), Arc::new(InMemory::new()), Some("s3://a".to_owned()))
    }

    /// As if all that was seen had been seen long ago.
    fn age(store: &Store) {
        let long_ago = Instant::now().checked_sub(LEASE * 2).unwrap();
        let mut seen = store.inner.seen.0.lock().unwrap();
        seen.values_mut().flat_map(HashMap::values_mut).for_each(|since| *since = long_ago);
    }

    #[test]
    fn removal_waits_for_writers_and_writers_for_removal() {
        let store = store();
        let (one, other) = (store.lock_shared().unwrap(), store.lock_shared().unwrap());
        drop(one);
        let error = store.lock_alone(Duration::ZERO).err().unwrap();
        assert!(error.to_string().ends_with("another process has held it for 0ns"), "{error}");
        assert!(!store.is_held(ALONE, "").unwrap(), "removal that gave up holds up nobody");
        drop(other);
        let alone = store.lock_alone(Duration::ZERO).unwrap();
        for place in [SHARED, ALONE] {
            let error = store.hold(place, Duration::ZERO).err().unwrap();
            assert!(error.to_string().ends_with("another process has held it for 0ns"), "{error}");
        }
        assert!(!store.is_held(SHARED, "").unwrap());
        let barrier = Barrier::new(2);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                barrier.wait();
                let _held = store.lock_shared().unwrap();
                store.is_held(ALONE, "").unwrap()
            });
            barrier.wait();
            for _ in 0..1000 {
                assert!(store.is_held(ALONE, "").unwrap() && !writer.is_finished());
            }
            drop(alone);
            assert!(!writer.join().unwrap(), "only then");
        });
    }

    #[test]
    fn removal_is_alone() {
        let store = store();
        let (holders, barrier) = (AtomicU32::new(0), Barrier::new(4));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..4 {
                        barrier.wait();
                        let _held = store.lock_alone(ALONE_WITHIN).unwrap();
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        thread::yield_now();
                        holders.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(store.objects("locks", &Held::Nothing).unwrap().is_empty());
    }

    #[test]
    fn what_a_dead_holder_left_goes_after_its_lease() {
        let store = store();
        let dead = format!("{SHARED}/dead");
        store.replace(&dead, &stamp()).unwrap();
        assert!(store.is_held(SHARED, "").unwrap());
        age(&store);
        store.replace(&dead, &stamp()).unwrap();
        assert!(store.lock_alone(Duration::ZERO).is_err(), "it was written anew: it lives");
        age(&store);
        store.lock_alone(Duration::ZERO).unwrap();
        assert!(!store.has(&dead).unwrap());
        let alone = format!("{ALONE}/dead");
        store.replace(&alone, &stamp()).unwrap();
        assert!(store.is_held(ALONE, "").unwrap());
        age(&store);
        store.lock_shared().unwrap();
        assert!(!store.has(&alone).unwrap());
    }

    #[test]
    fn a_holder_that_was_stopped_for_long_has_lost_its_lock() {
        let store = store();
        let held = store.lock_shared().unwrap();
        let set = |age: Duration| {
            let Held::Object { written, .. } = &held else { panic!("a bucket has objects") };
            *written.lock().unwrap() = Instant::now().checked_sub(age).unwrap();
        };
        set(RENEW);
        held.keep().unwrap();
        set(SILENCE + Duration::from_secs(1));
        assert!(matches!(held.keep().unwrap_err(), Error::LockLost { .. }));
        drop(held);
        assert!(!store.is_held(SHARED, "").unwrap(), "nobody else has its key");
    }

    #[test]
    fn a_lock_that_others_took_for_a_dead_ones_is_lost() {
        let store = store();
        let held = store.lock_shared().unwrap();
        held.confirm().unwrap();
        let Held::Object { key, .. } = &held else { panic!("a bucket has objects") };
        store.remove(key).unwrap();
        assert!(matches!(held.confirm().unwrap_err(), Error::LockLost { .. }));
    }

    #[test]
    fn content_goes_while_the_lock_is_held_and_no_longer() {
        let store = store();
        let held = store.lock_shared().unwrap();
        let Held::Object { key: lock, written, .. } = &held else { panic!("a bucket has objects") };
        let set = |age| *written.lock().unwrap() = Instant::now().checked_sub(age).unwrap();
        let stamp = || store.get(lock).unwrap().unwrap();
        for content in [b"a".to_vec(), vec![0; 9 << 20]] {
            let blob = of_bytes(&content);
            let put = || store.put_content("blobs/a", &blob, &Content::Memory(&content), &held);
            set(SILENCE + Duration::from_secs(1));
            assert!(matches!(put().unwrap_err(), Error::LockLost { .. }));
            assert!(!store.has("blobs/a").unwrap());
            let before = stamp();
            set(RENEW);
            put().unwrap();
            assert_ne!(stamp(), before, "written anew");
            let before = stamp();
            set(RENEW);
            put().unwrap();
            assert_ne!(stamp(), before, "while what is there is read, too");
            store.remove("blobs/a").unwrap();
        }
    }
}
