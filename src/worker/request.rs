//! What clients send to the workflow, read leniently: a payload that is not what it should be is an answer, never
//! a failed workflow task.
//!
//! A typed handler argument that does not decode would fail the workflow task again and again; so every handler
//! takes the raw payloads and asks this file what they mean. Strictness lives in [`crate::job::parse`].

use serde::{Deserialize, Serialize};
use temporalio_common::data_converters::RawValue;

use crate::job::class::{ErrorClass, Fault};
use crate::job::progress::{Detail, JobStatus, Step};
use crate::job::{ValidJob, parse};

/// Longest message a signal may put into the status, in bytes.
const MAX_MESSAGE: usize = 500;

/// Reads the argument of a new job: exactly one JSON object.
pub(crate) fn read_job(input: &RawValue) -> Result<ValidJob, Vec<Fault>> {
    let payload = match input.payloads.as_slice() {
        [payload] => payload,
        [] => return refuse("no argument, want one JSON object"),
        more => return refuse(format!("{} arguments, want one JSON object", more.len())),
    };
    let encoding = payload.metadata.get("encoding").map(|bytes| String::from_utf8_lossy(bytes));
    match encoding.as_deref() {
        Some("json/plain") => parse::valid(&payload.data),
        Some("binary/null") => refuse("null, want one JSON object"),
        Some(other) => {
            refuse(format!("argument encoded as `{other}`, want `json/plain` with one JSON object"))
        }
        None => refuse("argument without an encoding, want `json/plain` with one JSON object"),
    }
}

fn refuse(message: impl Into<String>) -> Result<ValidJob, Vec<Fault>> {
    Err(vec![Fault::new(ErrorClass::InvalidJson, "", message)])
}

/// The Progress-like object of the `update_progress` signal; every field may be missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Update {
    /// Which stage of the walk this belongs to; an update of another stage is stale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ticket: Option<u32>,
    /// The step this belongs to; an update of another step is stale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) step: Option<Step>,
    /// RUNNING or RETRYING; anything else is not an activity's to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<JobStatus>,
    /// Percent of the whole job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) percent: Option<f64>,
    /// One line for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) message: Option<String>,
    /// A preview of the work in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) preview_url: Option<String>,
    /// Attempt of the stage, from 1; an update of an earlier attempt is stale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attempt: Option<u32>,
    /// Fine progress within the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<Detail>,
}

/// Reads the argument of `update_progress`; `None` means the signal is to be ignored.
pub(crate) fn read_update(input: &RawValue) -> Option<Update> {
    let [payload] = input.payloads.as_slice() else { return None };
    let value: serde_json::Value = serde_json::from_slice(&payload.data).ok()?;
    if !value.is_object() {
        return None;
    }
    let update: Update = serde_json::from_value(value).ok()?;
    let long = |text: &Option<String>| text.as_ref().is_some_and(|text| text.len() > MAX_MESSAGE);
    (!long(&update.message) && !long(&update.preview_url)).then_some(update)
}
