//! What ended a command: one line for people, a hint, a word for programs, an exit code.

use serde::Serialize;

use crate::hub::{self, pull};
use crate::job::class::{ErrorClass, Fault};
use crate::{client, config, devserver, render, store, worker};

/// Exit codes that no error class stands behind.
pub(crate) mod exit {
    /// The job ended without a result.
    pub(crate) const FAILED: u8 = 1;
    /// The command line makes no sense.
    pub(crate) const USAGE: u8 = 2;
    /// A setting makes no sense.
    pub(crate) const CONFIG: u8 = 3;
    /// No Temporal server answers.
    pub(crate) const UNREACHABLE: u8 = 6;
    /// The user said stop.
    pub(crate) const INTERRUPTED: u8 = 130;
}

/// Why a command ended without doing what it was asked.
#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    /// For programs: the error class, or `USAGE`, `CONFIG`, `UNREACHABLE`, `NOT_FOUND`, `CANCELLED`, `INTERRUPTED`.
    pub(crate) code: String,
    /// Lower case, no full stop.
    pub(crate) message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
    /// Exit code of the process.
    #[serde(rename = "exit_code")]
    pub(crate) exit: u8,
}

impl Failure {
    /// A failure with a code of ours.
    pub(crate) fn new(exit: u8, code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), hint: None, exit }
    }

    /// A failure of an error class.
    pub(crate) fn of(class: ErrorClass, message: impl Into<String>) -> Self {
        Self::new(class.exit_code(), class.name(), message)
    }

    /// A failure of what was typed.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(exit::USAGE, "USAGE", message)
    }

    /// The user said stop.
    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::new(exit::INTERRUPTED, "INTERRUPTED", message)
    }

    /// The same with a hint.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Every fault of a request in one failure; the first one gives the class.
pub(crate) fn faults(faults: &[Fault]) -> Failure {
    let class = faults.first().map_or(ErrorClass::Bug, |fault| fault.class);
    Failure::of(class, crate::job::validate::summary(faults))
}

impl From<render::Error> for Failure {
    fn from(error: render::Error) -> Self {
        let failure = Self::of(render::class(&error), error.to_string());
        with_hint(failure, render::hint(&error))
    }
}

impl From<hub::Error> for Failure {
    fn from(error: hub::Error) -> Self {
        render::Error::from(error).into()
    }
}

impl From<pull::Error> for Failure {
    fn from(error: pull::Error) -> Self {
        let error = match error {
            pull::Error::Local(error) => return error.into(),
            error => error,
        };
        // Whatever is in the way, a model is missing.
        let missing =
            |code: &str| Self::new(ErrorClass::UnknownModel.exit_code(), code, error.to_string());
        let of = |class| Self::of(class, error.to_string());
        let failure = match &error {
            pull::Error::Offline { .. } => Self::new(exit::CONFIG, "OFFLINE", error.to_string()),
            pull::Error::Gated { .. } => missing("GATED"),
            pull::Error::Unauthorized { .. } => missing("UNAUTHORIZED"),
            pull::Error::NoRepo { .. } | pull::Error::NoRevision { .. } => {
                of(ErrorClass::UnknownModel)
            }
            pull::Error::NoFile { .. }
            | pull::Error::NoWeights { .. }
            | pull::Error::NotAModel { .. } => of(ErrorClass::MissingWeights),
            pull::Error::OnlyPickles { .. } => of(ErrorClass::UnsupportedWeights),
            pull::Error::NoSpace { .. } => of(ErrorClass::DiskFull),
            pull::Error::Hash { .. } => of(ErrorClass::WeightsHash),
            pull::Error::Busy { .. }
            | pull::Error::Connection(_)
            | pull::Error::Answer { .. }
            | pull::Error::Local(_) => missing("HUB_UNREACHABLE"),
        };
        with_hint(failure, error.hint())
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Address { .. }
            | store::Error::NotBuilt { .. }
            | store::Error::NotExclusive { .. } => {
                Self::new(exit::CONFIG, "CONFIG", error.to_string())
            }
            error => render::Error::from(error).into(),
        }
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        let code = match &error {
            client::Error::Unreachable { .. } => "UNREACHABLE",
            client::Error::Address { .. } => "CONFIG",
            client::Error::NoSuchJob { .. } => "NOT_FOUND",
            client::Error::Ended { .. } => "ALREADY_ENDED",
            other => other.class().map_or("TEMPORAL", ErrorClass::name),
        };
        with_hint(Self::new(error.exit_code(), code, error.to_string()), error.hint())
    }
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Self {
        Self::new(exit::CONFIG, "CONFIG", chain(&error))
    }
}

impl From<devserver::Error> for Failure {
    fn from(error: devserver::Error) -> Self {
        with_hint(Self::new(exit::UNREACHABLE, "UNREACHABLE", chain(&error)), error.hint())
    }
}

impl From<worker::Error> for Failure {
    fn from(error: worker::Error) -> Self {
        Self::new(exit::FAILED, "WORKER", chain(&error))
    }
}

fn with_hint(failure: Failure, hint: Option<String>) -> Failure {
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// An error and its causes in one line, nothing said twice.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
