//! A Temporal server for people who have none: the dev server of the official Temporal CLI, as a child process.
//!
//! One server per data folder, with its database in `<data>/temporal/dev.db`, on loopback only. Several programs may
//! share it: the first starts it, later ones join, the last to leave stops it. Who uses it and whether it runs is told
//! by file locks, so a killed user does not count and a recycled process id is never taken for the server.
//! Start from [`DevServer`].

mod find;
mod places;
mod process;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

pub use find::find;
use places::{Places, State};
pub use process::DYNAMIC_CONFIG;

/// Why there is no dev server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The `temporal` program is nowhere.
    #[error("the `temporal` program was not found; searched: {}", listed(searched))]
    NoProgram {
        /// Files and folders that were looked at.
        searched: Vec<PathBuf>,
    },
    /// The program does not start.
    #[error("cannot start `{}`: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the dev server's folder cannot be used.
    #[error("cannot use `{}`: {source}", path.display())]
    Folder {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No free port.
    #[error("no free port on 127.0.0.1: {source}")]
    NoPort {
        /// What the system said.
        source: io::Error,
    },
    /// The server ended before it was ready.
    #[error("the Temporal dev server ended at once: {}", if said.is_empty() { "it said nothing" } else { said })]
    Died {
        /// The beginning of its log; a trace of its stack, if there is one, comes after the cause.
        said: String,
        /// Its log.
        log: PathBuf,
    },
    /// The server runs but does not answer.
    #[error(
        "the Temporal dev server at {address} (process {pid}) did not answer within {seconds} s"
    )]
    NotReady {
        /// Where it should answer.
        address: String,
        /// Its process.
        pid: i32,
        /// How long it was waited for.
        seconds: u64,
        /// Its log.
        log: PathBuf,
    },
    /// A server runs on that data folder, but nobody wrote down where.
    #[error("a Temporal dev server holds `{}`, but its address is unknown", lock.display())]
    Stray {
        /// The file it holds locked.
        lock: PathBuf,
    },
    /// Another program keeps starting or stopping the server.
    #[error("another program holds `{}` for more than {seconds} s", lock.display())]
    Busy {
        /// The lock.
        lock: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The server survives being killed.
    #[error("the Temporal dev server (process {pid}) does not end")]
    Stubborn {
        /// Its process.
        pid: i32,
    },
}

impl Error {
    /// What the user may do about it, when there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoProgram { .. } => Some(
                "run `scripts/setup`, or put the Temporal CLI on PATH, or name a running server with TEMPORAL_ADDRESS"
                    .to_owned(),
            ),
            Self::Spawn { .. } => Some("is it the Temporal CLI for this system? `temporal --version` tells".to_owned()),
            Self::Died { log, .. } | Self::NotReady { log, .. } => Some(format!("its log is `{}`", log.display())),
            Self::Stray { lock } => {
                Some(format!("end the process that `lsof {}` shows, then try again", lock.display()))
            }
            _ => None,
        }
    }
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| format!("`{}`", path.display())).collect::<Vec<_>>().join(", ")
}

/// A server that runs now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// Host and port of its gRPC service.
    pub address: String,
    /// Its web page.
    pub ui_url: String,
    /// Its process.
    pub pid: i32,
}

/// One user's hold on the dev server of a data folder. Call [`leave`](Self::leave) when done; when this is merely
/// dropped, the last user still asks the server to end but does not wait for it.
#[derive(Debug)]
pub struct DevServer {
    places: Places,
    state: State,
    started_here: bool,
    /// Locked shared for as long as this user counts.
    user: Option<File>,
}

impl DevServer {
    /// Joins the server of `data_dir`, or starts one with the Temporal CLI `program`: on `preferred_port` (7233 when
    /// `None`) if that is free, else on a free port. Returns once the server answers.
    pub async fn join_or_start(
        data_dir: &Path,
        program: &Path,
        preferred_port: Option<u16>,
    ) -> Result<Self, Error> {
        let places = Places::create(data_dir)?;
        // Dropped on the way, with the turn given back before, it lets go of the server as later on.
        let mut server = Self { places, state: State::default(), started_here: false, user: None };
        let turn = server.places.take_turn().await?;
        server.user = Some(server.places.register_user()?);
        match server.places.running()? {
            Some(state) => {
                process::wait_until_ready(&server.places, &state).await?;
                server.state = state;
            }
            None => {
                server.state = process::start(&server.places, program, preferred_port).await?;
                server.started_here = true;
            }
        }
        drop(turn);
        Ok(server)
    }

    /// Host and port of the gRPC service, for example `127.0.0.1:7233`.
    pub fn address(&self) -> &str {
        &self.state.address
    }

    /// The server's own web page.
    pub fn ui_url(&self) -> &str {
        &self.state.ui_url
    }

    /// The server's process.
    pub fn pid(&self) -> i32 {
        self.state.pid
    }

    /// Whether this call started it, rather than joined it.
    pub fn started_here(&self) -> bool {
        self.started_here
    }

    /// The server's log.
    pub fn log(&self) -> &Path {
        &self.places.log
    }

    /// Stops counting as a user; the last one stops the server and waits until it has ended.
    pub async fn leave(mut self) -> Result<(), Error> {
        let _turn = self.places.take_turn().await?;
        match self.user.take() {
            Some(user) if places::is_last_user(&user) => process::stop(&self.places).await,
            _ => Ok(()),
        }
    }
}

impl Drop for DevServer {
    fn drop(&mut self) {
        let Some(user) = self.user.take() else { return };
        // Somebody else's turn: they join or leave, and the server is theirs to stop.
        if self.places.try_turn().is_some() && places::is_last_user(&user) {
            process::ask_to_end(&self.places);
        }
    }
}

/// The server that runs on that data folder, if one does. Starts nothing, changes nothing.
pub fn is_running(data_dir: &Path) -> Option<Running> {
    let State { address, ui_url, pid } = Places::of(data_dir).running().ok().flatten()?;
    Some(Running { address, ui_url, pid })
}

/// Whether a dev server ever ran on that data folder and left its database.
pub fn has_database(data_dir: &Path) -> bool {
    Places::of(data_dir).database.is_file()
}
