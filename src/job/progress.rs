//! What a job says about itself while it runs, and at its end.

use serde::{Deserialize, Serialize};

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Step {
    /// Making the image.
    Image,
    /// Making the frames.
    Video,
    /// Encoding and publishing.
    Processing,
    /// Done.
    Completed,
    /// Ended without a result.
    Failed,
}

/// How a job is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum JobStatus {
    /// Not at work: it has not begun, waits for an approval, or is paused.
    Pending,
    /// At work.
    Running,
    /// Ended with a result.
    Completed,
    /// Ended with an error.
    Failed,
    /// Ended by request.
    Cancelled,
    /// An attempt failed, another is due or under way.
    Retrying,
}

/// The answer to `get_status`, and the base of the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Where the job is.
    pub step: Step,
    /// How it is doing.
    pub status: JobStatus,
    /// 0..=100; never falls within a run, ends at exactly 100.
    pub percent: f64,
    /// One line for people.
    pub message: String,
    /// Set if and only if the status is FAILED.
    pub error_message: Option<String>,
    /// Set if and only if the status is COMPLETED.
    pub asset_url: Option<String>,
    /// RFC 3339 time at which the job should be done.
    pub estimated_completion: Option<String>,
    /// The finished image, as soon as there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_url: Option<String>,
    /// A preview of the work in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview_url: Option<String>,
    /// Attempt of the current stage, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// Fine progress within the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<Detail>,
}

impl Progress {
    /// A job that has not begun, and why.
    pub fn pending(message: &str) -> Self {
        Self {
            step: Step::Image,
            status: JobStatus::Pending,
            percent: 0.0,
            message: message.to_owned(),
            error_message: None,
            asset_url: None,
            estimated_completion: None,
            image_url: None,
            preview_url: None,
            attempt: None,
            detail: None,
        }
    }
}

/// Fine progress: `done` of `total` units of `stage`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detail {
    /// `load`, `encode_prompt`, `denoise`, `decode`, `interpolate`, `encode`, `publish`; `approval` or `paused` while
    /// the job waits for somebody.
    pub stage: String,
    /// Units done.
    pub done: u64,
    /// Units in all.
    pub total: u64,
}
