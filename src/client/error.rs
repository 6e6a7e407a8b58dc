//! What can go wrong between a client and the server, and what the user can do about it.

use crate::job::class::{ErrorClass, Fault};
use crate::job::progress::JobStatus;
use crate::job::validate;

/// Why a client's call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No server there, or none that answers.
    #[error("temporal server at `{address}` is not reachable: {message}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// What the connection says.
        message: String,
    },
    /// Not an address.
    #[error("temporal address `{address}`: {message}, want `host:port`")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        message: String,
    },
    /// The request has faults; nothing was started.
    #[error("{}", validate::summary(.0))]
    Invalid(Vec<Fault>),
    /// Another job has this id.
    #[error("job `{id}` exists with other input")]
    Conflict {
        /// The id.
        id: String,
    },
    /// No job has this id, or the server has forgotten it.
    #[error("no job `{id}` on this server")]
    NoSuchJob {
        /// The id.
        id: String,
    },
    /// The job is over.
    #[error("job `{id}` has already ended as {status:?}")]
    Ended {
        /// The id.
        id: String,
        /// How it ended.
        status: JobStatus,
    },
    /// Not an id.
    #[error("job id of {bytes} bytes, want 1 to 255 without control characters")]
    Id {
        /// Its length.
        bytes: usize,
    },
    /// The server refused something it should not have.
    #[error("temporal server: {0}")]
    Temporal(String),
}

impl Error {
    /// The class clients can match on; `None` when it is about the server, not about the job.
    pub fn class(&self) -> Option<ErrorClass> {
        match self {
            Self::Invalid(faults) => faults.first().map(|fault| fault.class),
            Self::Conflict { .. } => Some(ErrorClass::Conflict),
            Self::Id { .. } => Some(ErrorClass::OutOfRange),
            Self::Unreachable { .. }
            | Self::Address { .. }
            | Self::NoSuchJob { .. }
            | Self::Ended { .. }
            | Self::Temporal(_) => None,
        }
    }

    /// Exit code of the command line.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable { .. } => 6,
            Self::Address { .. } => 3,
            Self::NoSuchJob { .. } | Self::Ended { .. } | Self::Temporal(_) => 1,
            Self::Invalid(_) | Self::Conflict { .. } | Self::Id { .. } => {
                self.class().map_or(1, ErrorClass::exit_code)
            }
        }
    }

    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { .. } => {
                Some("start one with `genvideo up`, or set TEMPORAL_ADDRESS".into())
            }
            Self::Conflict { .. } => Some("choose another `--id`, or leave it out".into()),
            Self::NoSuchJob { .. } => {
                Some("`genvideo list` shows the jobs the server knows".into())
            }
            _ => None,
        }
    }
}
