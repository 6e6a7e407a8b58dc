//! Errors as Temporal failures: the type is the error class, the details say what is at fault.
//!
//! What a class means (retryable or not) is decided in [`crate::job::class`]; which class an error has, in
//! [`crate::render::class`]. Nothing is decided here.

use serde::{Deserialize, Serialize};
use temporalio_common::error::{
    ActivityExecutionError, ApplicationFailure, IncomingError, TimeoutType,
};

use super::fleet::Machine;
use crate::job::class::{ErrorClass, Fault};
use crate::job::validate;
use crate::render;

/// Type of the failure of an attempt that ended with its worker.
pub(crate) const WORKER_DIED: &str = "WORKER_DIED";
/// Why there is another attempt after one that ended without a word.
pub(crate) const DIED: &str = "its worker died";
/// Why there is another attempt after one that was handed back.
pub(crate) const SHUT_DOWN: &str = "its worker shut down";

/// Why there is another attempt after one whose worker's device was taken.
pub(crate) const BUSY: &str = "its worker was busy";

/// Details of a failure of a stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Details {
    /// What the user can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// How far the job was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<f64>,
    /// The host queue of who failed, where what it made is nowhere else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Bytes of memory that the stage takes, where its worker has too little.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needs: Option<u64>,
}

/// A failure as the workflow ends with it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ended {
    /// What kind of error.
    pub(crate) class: ErrorClass,
    /// One line for people.
    pub(crate) message: String,
    /// Faults of the request, when it was refused.
    pub(crate) faults: Vec<Fault>,
    /// What the user can do.
    pub(crate) hint: Option<String>,
}

impl Ended {
    /// A request with faults; its class is that of the first.
    pub(crate) fn refused(faults: Vec<Fault>) -> Self {
        let class = faults.first().map_or(ErrorClass::Bug, |fault| fault.class);
        Self { class, message: validate::summary(&faults), faults, hint: None }
    }

    /// A job whose hosts went away for good, `times` in a row.
    pub(crate) fn poison(times: u32) -> Self {
        let message = format!("{times} hosts that had this job's files are gone");
        Self { class: ErrorClass::Poison, message, faults: Vec::new(), hint: None }
    }

    /// What a failed activity says.
    pub(crate) fn of_activity(error: &ActivityExecutionError) -> Self {
        let plain =
            |class, message: String| Self { class, message, faults: Vec::new(), hint: None };
        match error.reason() {
            Some(IncomingError::Application(failure)) => Self {
                class: named(failure.type_name().unwrap_or_default()),
                message: failure.to_string(),
                faults: failure.details::<Vec<Fault>>().ok().flatten().unwrap_or_default(),
                hint: details(error).and_then(|details| details.hint),
            },
            Some(IncomingError::Timeout(timeout)) => match timeout.timeout_type() {
                TimeoutType::Heartbeat => {
                    plain(ErrorClass::Poison, "the worker died at this stage each time".into())
                }
                kind => plain(
                    ErrorClass::DeviceError,
                    format!("the stage did not end in time ({kind:?})"),
                ),
            },
            _ => plain(ErrorClass::Bug, error.to_string()),
        }
    }

    /// Where what a failed activity made is, when it says so.
    pub(crate) fn host(error: &ActivityExecutionError) -> Option<String> {
        details(error)?.host
    }

    /// Bytes of memory that a stage takes which failed because its worker has too little, at least, and whether numbers
    /// have two bytes there.
    pub(crate) fn needs(error: &ActivityExecutionError) -> Option<(u64, bool)> {
        let ActivityExecutionError::Failed(failed) = error else { return None };
        let machine = Machine::of(failed.identity());
        let needs = match details(error).and_then(|details| details.needs) {
            Some(needs) => needs,
            // The driver refused what the estimate had allowed.
            None if Self::of_activity(error).class == ErrorClass::OutOfMemory => {
                machine.memory? + 1
            }
            None => return None,
        };
        Some((needs, machine.is_half()))
    }

    /// As the workflow's failure: final, since no other run of the same request would do better.
    pub(crate) fn into_failure(self, percent: f64) -> ApplicationFailure {
        let builder = ApplicationFailure::builder(self.message)
            .type_name(self.class.name().to_owned())
            .non_retryable(!self.class.retryable());
        if self.faults.is_empty() {
            let details = Details { hint: self.hint, percent: Some(percent), ..Details::default() };
            builder.details(details).build()
        } else {
            builder.details(self.faults).build()
        }
    }
}

/// An error of a stage as the activity's failure; `last` when it was tried often enough.
pub(crate) fn of_render(
    error: &render::Error,
    last: bool,
    host: Option<String>,
) -> ApplicationFailure {
    let class = render::class(error);
    let builder = ApplicationFailure::builder(error.to_string())
        .type_name(class.name().to_owned())
        .non_retryable(last || !class.retryable());
    match error {
        render::Error::Refused(faults) => builder.details(faults.clone()).build(),
        _ => {
            let needs = match error {
                render::Error::ShortOfMemory { needs, .. } => Some(*needs),
                _ => None,
            };
            let hint = render::hint(error);
            builder.details(Details { hint, host, needs, ..Details::default() }).build()
        }
    }
}

fn details(error: &ActivityExecutionError) -> Option<Details> {
    match error.reason() {
        Some(IncomingError::Application(failure)) => failure.details::<Details>().ok().flatten(),
        _ => None,
    }
}

/// Whether the request was refused because its image is not where it was looked at.
pub(crate) fn lacks_image(error: &ActivityExecutionError) -> bool {
    match error.reason() {
        Some(IncomingError::Application(failure)) => {
            let faults = failure.details::<Vec<Fault>>().ok().flatten().unwrap_or_default();
            faults.iter().any(|fault| fault.field == "image")
        }
        _ => false,
    }
}

/// Whether nobody has taken the activity up in time.
pub(crate) fn is_unclaimed(error: &ActivityExecutionError) -> bool {
    let timeout = error.as_timeout();
    timeout.is_some_and(|timeout| timeout.timeout_type() == TimeoutType::ScheduleToStart)
}

/// A failure of `class` that no other attempt can mend.
pub(crate) fn fatal(class: ErrorClass, message: String) -> ApplicationFailure {
    ApplicationFailure::builder(message)
        .type_name(class.name().to_owned())
        .non_retryable(true)
        .build()
}

/// The class with this name; a name nobody knows is a fault of ours.
pub fn named(name: &str) -> ErrorClass {
    if name == WORKER_DIED {
        return ErrorClass::Poison;
    }
    ErrorClass::ALL.iter().copied().find(|class| class.name() == name).unwrap_or(ErrorClass::Bug)
}

/// An error with all its causes, as one line; the transport's debug text says nothing its causes do not.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) && !cause_text.starts_with("tonic::") {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
