//! How a job is doing and how it ended: the query when a worker can answer it, the server's records otherwise.
//!
//! The fine progress between two signals comes from the heartbeat details of the pending stage, which the server
//! gives out without troubling the workflow.

use std::time::Duration;

use temporalio_client::errors::WorkflowGetResultError;
use temporalio_client::{
    RetryOptions, RpcOptions, UntypedQuery, WorkflowExecutionDescription, WorkflowExecutionStatus,
    WorkflowGetResultOptions, WorkflowQueryOptions, WorkflowResultDetails,
};
use temporalio_common::data_converters::RawValue;
use temporalio_common::error::IncomingError;
use temporalio_common::protos::temporal::api::enums::v1::{PendingActivityState, TimeoutType};
use temporalio_common::protos::temporal::api::failure::v1::Failure;
use temporalio_common::protos::temporal::api::failure::v1::failure::FailureInfo;
use temporalio_common::protos::temporal::api::workflow::v1::PendingActivityInfo;

use super::{Error, Jobs, Outcome, is_of_namespace, patiently};
use crate::job::QUERY_STATUS;
use crate::job::class::ErrorClass;
use crate::job::progress::{Detail, JobStatus, Progress, Step};
use crate::job::result::JobResult;
use crate::worker::failure::{self, Details, chain};
use crate::worker::heartbeat::Beat;

/// Pause between two looks at a job.
const LOOK: Duration = Duration::from_millis(400);
/// How long a worker may take to answer a query before the records must do.
const QUERY_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the server may be away before watching is given up.
const AWAY: Duration = Duration::from_secs(60);

pub(super) async fn status(jobs: &Jobs, id: &str) -> Result<Progress, Error> {
    let described = jobs.describe(id).await?;
    if is_open(&described) {
        let asked = query(jobs, id).await;
        return Ok(merge(asked, &described));
    }
    let (outcome, percent) = ended(jobs, id).await?;
    Ok(final_progress(outcome, percent))
}

pub(super) async fn outcome(jobs: &Jobs, id: &str) -> Result<Option<Outcome>, Error> {
    let described = jobs.describe(id).await?;
    if is_open(&described) {
        Ok(None)
    } else {
        ended(jobs, id).await.map(|(outcome, _)| Some(outcome))
    }
}

pub(super) async fn watch(
    jobs: &Jobs,
    id: &str,
    on_change: &mut (dyn FnMut(Progress) + Send),
) -> Result<Outcome, Error> {
    let mut seen = Seen { last: None, asked: None, asked_at: 0 };
    let mut away_since = None;
    let mut end = std::pin::pin!(end(jobs, id));
    let mut has_ended = false;
    loop {
        match look(jobs, id, &mut seen).await {
            Ok(Look::Ended(outcome, percent)) => {
                on_change(final_progress((*outcome).clone(), percent));
                return Ok(*outcome);
            }
            Ok(Look::Open(progress)) => {
                let progress = *progress;
                away_since = None;
                if seen.last.as_ref() != Some(&progress) {
                    seen.last = Some(progress.clone());
                    on_change(progress);
                }
            }
            Err(error @ Error::Unreachable { .. }) => {
                let since = *away_since.get_or_insert_with(tokio::time::Instant::now);
                if since.elapsed() > AWAY {
                    return Err(error);
                }
                tracing::warn!(%error, "the job may go on; looking again");
            }
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = &mut end, if !has_ended => has_ended = true,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Waits for the job's end, so that nobody has to wait for the next look; for ever where the server cannot tell.
async fn end(jobs: &Jobs, id: &str) {
    use WorkflowGetResultError::{NotFound, Rpc};
    let end = jobs.handle(id).get_result(WorkflowGetResultOptions::default()).await;
    if matches!(end, Err(NotFound(_) | Rpc(_))) {
        std::future::pending().await
    }
}

/// What a watcher knows.
struct Seen {
    last: Option<Progress>,
    /// The workflow's last answer, and the length of the history it was given at.
    asked: Option<Progress>,
    asked_at: usize,
}

/// What one look shows.
enum Look {
    /// Still going.
    Open(Box<Progress>),
    /// The outcome, and the percent a failed job had reached.
    Ended(Box<Outcome>, f64),
}

async fn look(jobs: &Jobs, id: &str, seen: &mut Seen) -> Result<Look, Error> {
    let described = jobs.describe(id).await?;
    if !is_open(&described) {
        let (outcome, percent) = ended(jobs, id).await?;
        let percent = seen.last.as_ref().map_or(percent, |last| last.percent.max(percent));
        return Ok(Look::Ended(Box::new(outcome), percent));
    }
    // Asking costs the worker a task, so only when something happened since.
    let stale = seen.asked.is_none() || described.history_length() != seen.asked_at;
    if stale && let Some(answer) = query(jobs, id).await {
        seen.asked = Some(answer);
        seen.asked_at = described.history_length();
    }
    let mut progress = merge(seen.asked.clone(), &described);
    if let Some(last) = &seen.last {
        progress.percent = progress.percent.max(last.percent);
    }
    Ok(Look::Open(Box::new(progress)))
}

pub(super) fn is_open(described: &WorkflowExecutionDescription) -> bool {
    matches!(described.status(), WorkflowExecutionStatus::Running | WorkflowExecutionStatus::Paused)
}

/// The workflow's own answer; `None` when no worker gives one.
pub(super) async fn query(jobs: &Jobs, id: &str) -> Option<Progress> {
    let rpc = RpcOptions::builder()
        .timeout(QUERY_TIMEOUT)
        .retry_options(RetryOptions::no_retries())
        .build();
    let options = WorkflowQueryOptions::builder().rpc_options(rpc).build();
    let handle = jobs.handle(id);
    let asked = handle.query(UntypedQuery::new(QUERY_STATUS), RawValue::default(), options);
    match tokio::time::timeout(QUERY_TIMEOUT, asked).await {
        Ok(Ok(answer)) => {
            answer.payloads.first().and_then(|payload| serde_json::from_slice(&payload.data).ok())
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, id, "the workflow gave no status");
            None
        }
        Err(_) => None,
    }
}

/// The workflow's answer, brought up to date with what the server knows of the stage at work.
fn merge(asked: Option<Progress>, described: &WorkflowExecutionDescription) -> Progress {
    let waits = asked.as_ref().is_some_and(|asked| asked.status == JobStatus::Pending);
    let mut progress = asked.unwrap_or_else(|| from_records(described));
    if waits {
        // The records are older than the answer: a stage in them has ended since.
        return progress;
    }
    let Some(stage) = described.raw().pending_activities.first() else { return progress };
    let beat = beat(stage);
    if let Some(beat) = &beat {
        progress.percent = progress.percent.max((beat.percent * 10.0).round() / 10.0);
    }
    let attempt = u32::try_from(stage.attempt).unwrap_or(1);
    let is_due = stage.state() == PendingActivityState::Scheduled;
    let at_work = beat.filter(|beat| !is_due && beat.is_at_work(attempt));
    if attempt > 1 {
        progress.attempt = Some(attempt);
    }
    if let Some(beat) = at_work {
        if progress.status == JobStatus::Retrying {
            progress.status = JobStatus::Running;
        }
        // The workflow knows it from signals, which come seldom.
        if progress.status == JobStatus::Running && beat.total > 0 {
            progress.message = beat.says();
            let Beat { stage, done, total, .. } = beat;
            progress.detail = Some(Detail { stage, done, total });
        }
    } else if attempt > 1 {
        progress.status = JobStatus::Retrying;
        progress.detail = None;
        if let Some(last) = &stage.last_failure {
            progress.message = format!("attempt {attempt} after: {}", cause(last));
        }
    }
    progress
}

/// Why an attempt failed, in our words.
fn cause(failure: &Failure) -> &str {
    match &failure.failure_info {
        Some(FailureInfo::TimeoutFailureInfo(info))
            if info.timeout_type() == TimeoutType::Heartbeat =>
        {
            failure::DIED
        }
        Some(FailureInfo::ApplicationFailureInfo(info)) if info.r#type == "WorkerShutdown" => {
            failure::SHUT_DOWN
        }
        _ => &failure.message,
    }
}

fn beat(stage: &PendingActivityInfo) -> Option<Beat> {
    let payload = stage.heartbeat_details.as_ref()?.payloads.first()?;
    serde_json::from_slice(&payload.data).ok()
}

/// What can be said of a running job when no worker answers.
fn from_records(described: &WorkflowExecutionDescription) -> Progress {
    let stage = described.raw().pending_activities.first();
    let kind = stage.and_then(|stage| stage.activity_type.as_ref()).map(|kind| kind.name.as_str());
    let step = match kind {
        Some("gen_video") => Step::Video,
        Some("encode_video" | "publish") => Step::Processing,
        _ => Step::Image,
    };
    let mut progress = Progress::pending("waiting for a worker");
    progress.step = step;
    if stage.is_some_and(|stage| stage.state() != PendingActivityState::Scheduled) {
        progress.status = JobStatus::Running;
        progress.message = "at work; no worker answers for the workflow".to_owned();
    }
    progress
}

/// The status of a job that has ended; a failed one had reached `percent`.
fn final_progress(outcome: Outcome, percent: f64) -> Progress {
    match outcome {
        Outcome::Completed(result) => result.progress,
        Outcome::Cancelled(progress) => progress,
        Outcome::Failed { message, .. } => {
            let error_message = Some(message);
            Progress {
                step: Step::Failed,
                status: JobStatus::Failed,
                percent,
                error_message,
                ..Progress::pending("failed")
            }
        }
    }
}

/// The outcome of a job that is not open any more, and the percent a failed one had reached.
async fn ended(jobs: &Jobs, id: &str) -> Result<(Outcome, f64), Error> {
    let handle = jobs.handle(id);
    let ask = || handle.get_result(WorkflowGetResultOptions::default());
    let asked = patiently(ask, |error| match error {
        WorkflowGetResultError::NotFound(status) => Some(status),
        _ => None,
    });
    let outcome = match asked.await {
        Ok(value) => {
            let data =
                value.payloads.first().map(|payload| payload.data.as_slice()).unwrap_or_default();
            let result: JobResult = serde_json::from_slice(data)
                .map_err(|error| Error::Temporal(format!("result of job `{id}`: {error}")))?;
            Outcome::Completed(Box::new(result))
        }
        Err(WorkflowGetResultError::Failed(error)) => return Ok(failed(&error)),
        Err(WorkflowGetResultError::Cancelled { details }) => {
            Outcome::Cancelled(cancelled(&details))
        }
        Err(WorkflowGetResultError::Terminated { .. }) => {
            broken_off("terminated by an operator of the Temporal server")
        }
        Err(WorkflowGetResultError::TimedOut) => {
            broken_off("not finished within its execution timeout")
        }
        Err(WorkflowGetResultError::NotFound(status)) if is_of_namespace(&status) => {
            return Err(jobs.rpc(&status));
        }
        Err(WorkflowGetResultError::NotFound(_)) => {
            return Err(Error::NoSuchJob { id: id.to_owned() });
        }
        Err(WorkflowGetResultError::Rpc(status)) => return Err(jobs.rpc(&status)),
        Err(other) => return Err(jobs.unexpected(&other)),
    };
    Ok((outcome, 0.0))
}

fn failed(error: &IncomingError) -> (Outcome, f64) {
    let IncomingError::Application(application) = error else {
        return (
            Outcome::Failed { class: ErrorClass::Bug, message: chain(error), hint: None },
            0.0,
        );
    };
    let details = application.details::<Details>().ok().flatten().unwrap_or_default();
    let outcome = Outcome::Failed {
        class: failure::named(application.type_name().unwrap_or_default()),
        message: application.to_string(),
        hint: details.hint,
    };
    (outcome, details.percent.unwrap_or_default())
}

fn broken_off(message: &str) -> Outcome {
    Outcome::Failed { class: ErrorClass::Bug, message: message.to_owned(), hint: None }
}

fn cancelled(details: &WorkflowResultDetails) -> Progress {
    let told = details.raw().first().and_then(|payload| serde_json::from_slice(&payload.data).ok());
    told.unwrap_or_else(|| Progress {
        status: JobStatus::Cancelled,
        ..Progress::pending("cancelled")
    })
}
