//! What clients send to the workflow, read leniently: a payload that is not what it should be is an answer, never
//! a failed workflow task.
//!
//! A typed handler argument that does not decode would fail the workflow task again and again; so every handler
//! takes the raw payloads and asks this file what they mean. Strictness lives in [`crate::job::parse`].

use serde::{Deserialize, Serialize};
use temporalio_common::data_converters::RawValue;

use super::review::Replacement;
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
    /// Which entry into a stage this belongs to; an update of another one is stale.
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

/// The one JSON object that is the argument of a signal.
fn object(input: &RawValue) -> Option<serde_json::Map<String, serde_json::Value>> {
    let [payload] = input.payloads.as_slice() else { return None };
    serde_json::from_slice(&payload.data).ok()
}

/// Reads the argument of `reject`: the reason, on one line of bounded length, or nothing.
pub(crate) fn read_reason(input: &RawValue) -> String {
    let object = object(input).unwrap_or_default();
    let reason = object.get("reason").and_then(|reason| reason.as_str()).unwrap_or_default();
    one_line(reason)
}

/// Reads the argument of `replace_image`; `None` when it names no image.
pub(crate) fn read_replacement(input: &RawValue) -> Option<Replacement> {
    let object = object(input)?;
    let image = object.get("image")?.as_str().filter(|id| id.len() <= MAX_MESSAGE)?;
    let approve = object.get("approve").and_then(serde_json::Value::as_bool).unwrap_or(false);
    Some(Replacement { image: image.to_owned(), approve })
}

/// `text` without control characters and not longer than a message may be.
pub(crate) fn one_line(text: &str) -> String {
    let text = text.trim();
    let end = text.floor_char_boundary(MAX_MESSAGE);
    text[..end].chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// Reads the argument of `update_progress`; `None` means the signal is to be ignored.
pub(crate) fn read_update(input: &RawValue) -> Option<Update> {
    let update: Update = serde_json::from_value(object(input)?.into()).ok()?;
    let long = |text: &Option<String>| text.as_ref().is_some_and(|text| text.len() > MAX_MESSAGE);
    (!long(&update.message) && !long(&update.preview_url)).then_some(update)
}

#[cfg(test)]
mod tests {
    use temporalio_common::protos::temporal::api::common::v1::Payload;

    use super::*;

    fn raw(json: &str) -> RawValue {
        RawValue::new(vec![Payload { data: json.as_bytes().to_vec(), ..Payload::default() }])
    }

    #[test]
    fn a_reason_is_one_line_or_nothing() {
        let long = format!("{{\"reason\": \"{}\"}}", "é".repeat(400));
        for (json, reason) in [
            (r#"{"reason": "too\ndark "}"#, "too dark"),
            (r#"{"reason": 5}"#, ""),
            (r#""too dark""#, ""),
            ("{", ""),
            (&long, &"é".repeat(250)),
        ] {
            assert_eq!(read_reason(&raw(json)), reason, "{json}");
        }
        assert_eq!(read_reason(&RawValue::new(Vec::new())), "");
    }

    #[test]
    fn a_replacement_names_its_image() {
        let replacement = |approve| Some(Replacement { image: "ab".into(), approve });
        for (json, wanted) in [
            (r#"{"image": "ab"}"#, replacement(false)),
            (r#"{"image": "ab", "approve": true, "more": 1}"#, replacement(true)),
            (r#"{"image": "ab", "approve": "yes"}"#, replacement(false)),
            (r#"{"image": 7}"#, None),
            (r#"{"picture": "ab"}"#, None),
            (r#""ab""#, None),
            ("", None),
        ] {
            assert_eq!(read_replacement(&raw(json)), wanted, "{json}");
        }
        let long = format!(r#"{{"image": "{}"}}"#, "a".repeat(501));
        assert_eq!(read_replacement(&raw(&long)), None);
    }
}
