//! Starting a job exactly once: ids, what the server's lists show of it, and joining a job that is already there.

use std::time::Duration;

use sha2::{Digest, Sha256};
use temporalio_client::errors::WorkflowStartError;
use temporalio_client::{WorkflowFetchHistoryOptions, WorkflowIdReusePolicy, WorkflowStartOptions};
use temporalio_common::data_converters::RawValue;
use temporalio_common::protos::temporal::api::common::v1::Payload;
use temporalio_common::protos::temporal::api::history::v1::history_event::Attributes;
use temporalio_common::search_attributes::{SearchAttributeKey, SearchAttributes};
use temporalio_common::{MemoValues, UntypedWorkflow};

use super::{Error, Jobs, patiently};
use crate::job::{JobType, ValidJob, WORKFLOW_TYPE, parse};
use crate::worker::policy;

/// Search attribute with the user's label, where it is registered.
const USER: SearchAttributeKey<String> = SearchAttributeKey::keyword("UserId");
/// Search attribute with `IMAGE` or `VIDEO`, where it is registered.
const TYPE: SearchAttributeKey<String> = SearchAttributeKey::keyword("GvJobType");

pub(super) const MEMO_USER: &str = "user_id";
pub(super) const MEMO_TYPE: &str = "job_type";
pub(super) const MEMO_PROMPT: &str = "prompt";
const MEMO_STYLE: &str = "style";
const MEMO_SIZE: &str = "size";
const MEMO_INPUT: &str = "input_sha256";

/// Backstop for a job nobody ever finishes; a long queue on one machine stays below it.
const EXECUTION_TIMEOUT: Duration = Duration::from_secs(7 * 86_400);
/// Longest id, as the server has it.
const MAX_ID: usize = 255;
/// Characters of the prompt that lists show.
const PROMPT_SHOWN: usize = 120;

/// A job to start.
#[derive(Clone, Debug)]
pub struct Submit {
    /// Workflow id. `None` derives it from the input when that names a seed and so describes one result, else draws
    /// a fresh one.
    pub id: Option<String>,
    /// The request, as JSON.
    pub input: Vec<u8>,
    /// Task queue of the workers.
    pub queue: String,
}

/// A job that is on the server now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// Workflow id.
    pub id: String,
    /// Run id.
    pub run_id: String,
    /// Whether it was there before.
    pub joined: bool,
}

/// An id no job has.
pub fn fresh_id() -> String {
    format!("gv-{}", uuid::Uuid::now_v7())
}

pub(super) async fn submit(jobs: &Jobs, submit: Submit) -> Result<Submitted, Error> {
    let job = parse::valid(&submit.input).map_err(Error::Invalid)?;
    let fingerprint = fingerprint(&job);
    let id = match submit.id {
        Some(id) => check_id(id)?,
        None if job.seed.is_some() => format!("gv-{}", &fingerprint[..32]),
        None => fresh_id(),
    };
    let started = match start(jobs, &id, &submit.queue, &submit.input, &job, true).await {
        Err(WorkflowStartError::Rpc(status)) if is_about_attributes(&status) => {
            tracing::debug!(
                message = status.message(),
                "search attributes are not registered; going without"
            );
            start(jobs, &id, &submit.queue, &submit.input, &job, false).await
        }
        other => other,
    };
    match started {
        Ok(run_id) => Ok(Submitted { id, run_id, joined: false }),
        Err(WorkflowStartError::AlreadyStarted { .. }) => join(jobs, id, &fingerprint).await,
        Err(WorkflowStartError::Rpc(status)) => Err(jobs.rpc(&status)),
        Err(error) => Err(jobs.unexpected(&error)),
    }
}

/// The same for every way to write the same job.
fn fingerprint(job: &ValidJob) -> String {
    let canonical =
        serde_json::to_vec(job).expect("a valid job holds finite numbers and string keys only");
    Sha256::digest(&canonical).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check_id(id: String) -> Result<String, Error> {
    if id.is_empty() || id.len() > MAX_ID || id.chars().any(char::is_control) {
        return Err(Error::Id { bytes: id.len() });
    }
    Ok(id)
}

async fn start(
    jobs: &Jobs,
    id: &str,
    queue: &str,
    input: &[u8],
    job: &ValidJob,
    attributes: bool,
) -> Result<String, WorkflowStartError> {
    let job_type = if job.job_type == JobType::Video { "VIDEO" } else { "IMAGE" };
    let shown: String =
        job.prompt.chars().take(PROMPT_SHOWN).map(|c| if c == '\n' { ' ' } else { c }).collect();
    let mut memo = MemoValues::new();
    memo.insert(MEMO_USER, job.user_id.clone())
        .insert(MEMO_TYPE, job_type.to_owned())
        .insert(MEMO_PROMPT, shown.clone())
        .insert(MEMO_STYLE, job.style.clone())
        .insert(MEMO_SIZE, format!("{}x{}", job.width, job.height))
        .insert(MEMO_INPUT, fingerprint(job));
    let options = WorkflowStartOptions::new(queue, id)
        .id_reuse_policy(WorkflowIdReusePolicy::AllowDuplicateFailedOnly)
        .execution_timeout(EXECUTION_TIMEOUT)
        .priority(policy::turn(job))
        .static_summary(shown)
        .memo(memo)
        .maybe_search_attributes(attributes.then(|| {
            SearchAttributes::new([
                USER.value_set(job.user_id.clone()),
                TYPE.value_set(job_type.to_owned()),
            ])
        }))
        .build();
    let start = || {
        let workflow = UntypedWorkflow::new(WORKFLOW_TYPE);
        jobs.client.start_workflow(workflow, json_argument(input), options.clone())
    };
    let started = patiently(start, |error| match error {
        WorkflowStartError::Rpc(status) => Some(status),
        _ => None,
    });
    Ok(started.await?.run_id().unwrap_or_default().to_owned())
}

fn json_argument(json: &[u8]) -> RawValue {
    let metadata = [("encoding".to_owned(), b"json/plain".to_vec())].into();
    RawValue::new(vec![Payload { metadata, data: json.to_vec(), ..Payload::default() }])
}

fn is_about_attributes(status: &temporalio_client::tonic::Status) -> bool {
    let message = status.message().to_ascii_lowercase();
    message.contains("search attribute") || message.contains("mapper")
}

/// The id is taken: by the same job, then it is ours too, or by another.
async fn join(jobs: &Jobs, id: String, fingerprint: &str) -> Result<Submitted, Error> {
    let described = match jobs.describe(&id).await {
        Err(Error::NoSuchJob { .. }) => return Err(Error::Conflict { id }),
        other => other?,
    };
    let known: Option<String> = described.memo().get(MEMO_INPUT).ok().flatten();
    let known = match known {
        Some(known) => Some(known),
        None => first_input(jobs, &id)
            .await?
            .and_then(|input| parse::valid(&input).ok())
            .map(|job| self::fingerprint(&job)),
    };
    if known.as_deref() == Some(fingerprint) {
        let run_id = described.run_id().to_owned();
        Ok(Submitted { id, run_id, joined: true })
    } else {
        Err(Error::Conflict { id })
    }
}

/// The argument a job was started with, for jobs of clients that leave no memo.
async fn first_input(jobs: &Jobs, id: &str) -> Result<Option<Vec<u8>>, Error> {
    use futures::TryStreamExt;
    let mut history = jobs.handle(id).fetch_history(WorkflowFetchHistoryOptions::default());
    let first = history.try_next().await.map_err(|error| jobs.trouble(id, error))?;
    let Some(Attributes::WorkflowExecutionStartedEventAttributes(started)) =
        first.and_then(|event| event.attributes)
    else {
        return Ok(None);
    };
    let mut payloads = started.input.map(|input| input.payloads).unwrap_or_default();
    Ok((payloads.len() == 1).then(|| payloads.remove(0).data))
}
