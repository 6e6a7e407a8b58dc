//! The dev server's folder: database, log, state file and the three locks that say who runs and who uses it.
//!
//! `server.lock` is held by the server process itself: it inherits the locked file as its standard input, so the lock
//! goes exactly when the process does. `users.lock` is held shared by every user. `turn.lock` is held by whoever joins,
//! starts or stops. The state file only adds what a lock cannot say: process id and addresses.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Error;

/// How long a turn may take: a start on a busy machine, a stop of a server that resists.
const TURN: Duration = Duration::from_secs(150);
/// Pause between two looks at a lock.
pub(super) const LOOK: Duration = Duration::from_millis(25);

/// Where a server answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) pid: i32,
    pub(super) address: String,
    pub(super) ui_url: String,
}

/// A locked file that is unlocked, not merely closed, in the end: a process that another thread starts at that moment
/// has a copy of the open file until it becomes its own program, and with it the lock.
#[derive(Debug)]
pub(super) struct Turn(File);

impl Drop for Turn {
    fn drop(&mut self) {
        // What cannot be unlocked is closed next.
        let _ = self.0.unlock();
    }
}

/// The files of one data folder's server.
#[derive(Clone, Debug)]
pub(super) struct Places {
    pub(super) folder: PathBuf,
    pub(super) database: PathBuf,
    pub(super) log: PathBuf,
    state: PathBuf,
    server_lock: PathBuf,
    users_lock: PathBuf,
    turn_lock: PathBuf,
}

impl Places {
    pub(super) fn of(data_dir: &Path) -> Self {
        let folder = data_dir.join("temporal");
        Self {
            database: folder.join("dev.db"),
            log: folder.join("server.log"),
            state: folder.join("server.json"),
            server_lock: folder.join("server.lock"),
            users_lock: folder.join("users.lock"),
            turn_lock: folder.join("turn.lock"),
            folder,
        }
    }

    /// As [`of`](Self::of), with the folder made and its path absolute.
    pub(super) fn create(data_dir: &Path) -> Result<Self, Error> {
        let folder = data_dir.join("temporal");
        fs::create_dir_all(&folder).map_err(|source| failed(&folder, source))?;
        let data_dir = fs::canonicalize(data_dir).map_err(|source| failed(data_dir, source))?;
        Ok(Self::of(&data_dir))
    }

    /// Waits for the turn to join, start or stop; over when it is dropped.
    pub(super) async fn take_turn(&self) -> Result<Turn, Error> {
        self.lock_within(&self.turn_lock, TURN).await.map(Turn)
    }

    /// Waits until no other server of this user is starting, whatever its data folder; over when it is dropped.
    pub(super) async fn start_alone(&self) -> Result<Turn, Error> {
        // SAFETY: it only reads the process's own user id.
        let user = unsafe { libc::getuid() };
        let lock = std::env::temp_dir().join(format!("genvideo-{user}-start.lock"));
        self.lock_within(&lock, TURN).await.map(Turn)
    }

    /// The turn when nobody has it.
    pub(super) fn try_turn(&self) -> Option<Turn> {
        let file = open(&self.turn_lock).ok()?;
        file.try_lock().ok().map(|()| Turn(file))
    }

    /// Counts as a user until the file is dropped, by whatever death.
    pub(super) fn register_user(&self) -> Result<File, Error> {
        let file = open(&self.users_lock)?;
        // Only who has the turn ever locks this file alone, so this does not wait.
        file.lock_shared().map_err(|source| failed(&self.users_lock, source))?;
        Ok(file)
    }

    /// The lock to hand to a new server.
    pub(super) async fn lock_server(&self) -> Result<File, Error> {
        self.lock_within(&self.server_lock, Duration::from_secs(5)).await
    }

    /// Whether a server process lives. Looks with a shared lock, so that two looks never see each other.
    pub(super) fn is_alive(&self) -> bool {
        let Ok(file) = File::open(&self.server_lock) else { return false };
        matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
    }

    /// The living server.
    pub(super) fn running(&self) -> Result<Option<State>, Error> {
        if !self.is_alive() {
            return Ok(None);
        }
        let state = fs::read(&self.state).ok().and_then(|text| serde_json::from_slice(&text).ok());
        state.map(Some).ok_or_else(|| Error::Stray { lock: self.server_lock.clone() })
    }

    /// Writes the state file whole, or forgets it.
    pub(super) fn write_state(&self, state: Option<&State>) -> Result<(), Error> {
        let write = || {
            let Some(state) = state else {
                return match fs::remove_file(&self.state) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            };
            let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
            file.write_all(&serde_json::to_vec(state)?)?;
            file.persist(&self.state).map(|_| ()).map_err(|error| error.error)
        };
        write().map_err(|source| failed(&self.state, source))
    }

    /// A new log; the one of the server before is kept beside it.
    pub(super) fn open_log(&self) -> Result<File, Error> {
        let open = || {
            match fs::rename(&self.log, self.log.with_extension("log.1")) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            File::options().create(true).append(true).open(&self.log)
        };
        open().map_err(|source| failed(&self.log, source))
    }

    async fn lock_within(&self, path: &Path, limit: Duration) -> Result<File, Error> {
        let file = open(path)?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(source)) => return Err(failed(path, source)),
                Err(TryLockError::WouldBlock) if started.elapsed() > limit => {
                    return Err(Error::Busy { lock: path.to_owned(), seconds: limit.as_secs() });
                }
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOOK).await,
            }
        }
    }
}

/// Whether nobody but the holder of `user` counts as a user; asked only by who has the turn. Ends the hold.
pub(super) fn is_last_user(user: &File) -> bool {
    user.unlock().is_ok() && user.try_lock().is_ok()
}

fn open(path: &Path) -> Result<File, Error> {
    let opened = File::options().create(true).truncate(false).read(true).write(true).open(path);
    opened.map_err(|source| failed(path, source))
}

pub(super) fn failed(path: &Path, source: io::Error) -> Error {
    Error::Folder { path: path.to_owned(), source }
}
