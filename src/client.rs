//! Jobs from the outside: submit, status, watch, cancel, approve, pause, list, over any Temporal server.
//!
//! Needs no worker of its own and no models; what it asks the workflow it can also read from the server's records,
//! so that a status is there before a worker is and after the last one has gone. Start from [`Jobs`].

pub mod error;

mod death;
mod follow;
mod steer;
mod submit;
mod workers;

use std::time::{Duration, Instant, SystemTime};

use futures::TryStreamExt;
use temporalio_client::errors::WorkflowInteractionError;
use temporalio_client::{
    Client, ClientOptions, Connection, ConnectionOptions, TlsOptions, Url, WorkflowCancelOptions,
    WorkflowExecutionStatus, WorkflowFetchHistoryOptions, WorkflowHandle, WorkflowListOptions,
};
use temporalio_common::UntypedWorkflow;

pub use error::Error;
pub use submit::{Submit, Submitted, fresh_id};
pub use workers::{Stage, Worker};

use crate::job::WORKFLOW_TYPE;
use crate::job::class::ErrorClass;
use crate::job::progress::{JobStatus, Progress};
use crate::job::result::JobResult;
use crate::worker::failure::chain;

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server may not find its namespace: a busy one forgets it for seconds, and finds a new one as late.
const NAMESPACE_AWAY: Duration = Duration::from_secs(10);
/// Pause between two looks for it.
const NAMESPACE_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause between two attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_secs(5);

/// Which server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `host:port`, or an address with `http://` or `https://`.
    pub address: String,
    /// Namespace, usually `default`.
    pub namespace: String,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// With a result.
    Completed(Box<JobResult>),
    /// With an error.
    Failed {
        /// What kind.
        class: ErrorClass,
        /// One line for people.
        message: String,
        /// What the user can do.
        hint: Option<String>,
    },
    /// By request, at this point.
    Cancelled(Progress),
}

/// One job of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// Workflow id.
    pub id: String,
    /// Run id.
    pub run_id: String,
    /// How it is doing, as far as the server's index knows.
    pub status: JobStatus,
    /// When it was submitted.
    pub started: Option<SystemTime>,
    /// When it ended.
    pub ended: Option<SystemTime>,
    /// Who submitted it; `None` when another client started it without saying.
    pub user_id: Option<String>,
    /// `IMAGE` or `VIDEO`.
    pub job_type: Option<String>,
    /// Beginning of the prompt.
    pub prompt: Option<String>,
}

/// A connection to the server the jobs are on. Cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    client: Client,
    address: String,
}

impl Jobs {
    /// Connects, or says at once that there is no server.
    pub async fn connect(target: &Target) -> Result<Self, Error> {
        let refused =
            |message: String| Error::Unreachable { address: target.address.clone(), message };
        let with_scheme = if target.address.contains("://") {
            target.address.clone()
        } else {
            format!("http://{}", target.address)
        };
        let url: Url = with_scheme.parse().map_err(|error| Error::Address {
            address: target.address.clone(),
            message: format!("{error}"),
        })?;
        let identity = format!("genvideo-{}", std::process::id());
        let tls = (url.scheme() == "https").then(TlsOptions::default);
        let options = ConnectionOptions::new(url)
            .identity(identity)
            .connect_timeout(CONNECT_TIMEOUT)
            .maybe_tls_options(tls)
            .build();
        let attempt = tokio::time::timeout(CONNECT_TIMEOUT * 2, Connection::connect(options));
        let connection = match attempt.await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(refused(root(&error))),
            Err(_) => return Err(refused("no answer".to_owned())),
        };
        let client = Client::new(connection, ClientOptions::new(target.namespace.clone()).build())
            .map_err(|error| refused(root(&error)))?;
        Ok(Self { client, address: target.address.clone() })
    }

    /// Connects as soon as there is a server, trying again until `give_up` has passed (`None`: for ever).
    pub async fn connect_patiently(
        target: &Target,
        give_up: Option<Duration>,
    ) -> Result<Self, Error> {
        let start = tokio::time::Instant::now();
        let mut pause = Duration::from_millis(100);
        loop {
            let error = match Self::connect(target).await {
                Err(error @ Error::Unreachable { .. }) => error,
                other => return other,
            };
            if give_up.is_some_and(|limit| start.elapsed() + pause > limit) {
                return Err(error);
            }
            tracing::warn!(%error, "trying again in {pause:?}");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(CONNECT_PAUSE);
        }
    }

    /// The connection, for a worker in the same process.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Starts a job, or joins the one that already has this id and the same input.
    pub async fn submit(&self, submit: Submit) -> Result<Submitted, Error> {
        submit::submit(self, submit).await
    }

    /// How a job is doing: from the workflow when a worker is there to ask, else from the server's records.
    pub async fn status(&self, id: &str) -> Result<Progress, Error> {
        follow::status(self, id).await
    }

    /// Whether a worker answers for the job.
    pub async fn is_attended(&self, id: &str) -> bool {
        follow::query(self, id).await.is_some()
    }

    /// The outcome of a job that has ended; `None` while it runs.
    pub async fn outcome(&self, id: &str) -> Result<Option<Outcome>, Error> {
        follow::outcome(self, id).await
    }

    /// Reports every change of a job until it ends.
    pub async fn watch(
        &self,
        id: &str,
        on_change: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Outcome, Error> {
        follow::watch(self, id, on_change).await
    }

    /// Asks a job to end. A job nobody works on yet ends as soon as a worker takes it up.
    pub async fn cancel(&self, id: &str) -> Result<(), Error> {
        // The server takes a cancel of a job that has ended without a word, so ask first.
        let described = self.describe(id).await?;
        if !follow::is_open(&described) {
            return Err(Error::Ended { id: id.to_owned(), status: status_of(described.status()) });
        }
        let options = WorkflowCancelOptions::builder().reason("cancelled by request").build();
        self.handle(id).cancel(options).await.map_err(|error| self.trouble(id, error))
    }

    /// The newest jobs, newest first.
    pub async fn list(&self, limit: usize) -> Result<Vec<Listed>, Error> {
        let query = format!("WorkflowType = '{WORKFLOW_TYPE}'");
        let options = WorkflowListOptions::builder().limit(limit).build();
        let found: Vec<_> = self
            .client
            .list_workflows(query, options)
            .try_collect()
            .await
            .map_err(|error| self.unexpected(&error))?;
        let mut found: Vec<Listed> = found.iter().map(listed).collect();
        found.sort_by_key(|job| std::cmp::Reverse(job.started));
        Ok(found)
    }

    /// Ids of all jobs that have not ended.
    pub async fn open(&self) -> Result<Vec<String>, Error> {
        let query = format!("WorkflowType = '{WORKFLOW_TYPE}' AND ExecutionStatus = 'Running'");
        let open = self.client.list_workflows(query, WorkflowListOptions::default());
        open.map_ok(|job| job.id().to_owned())
            .try_collect()
            .await
            .map_err(|error| self.unexpected(&error))
    }

    /// Who works for the task queue `queue` and those named after it, and at what; those heard of last first.
    pub async fn workers(&self, queue: &str) -> Result<Vec<Worker>, Error> {
        workers::workers(self, queue).await
    }

    /// The job's history, as [`WorkflowReplayer`](temporalio_sdk::workflow_replayer::WorkflowReplayer) reads it.
    pub async fn history_json(&self, id: &str) -> Result<Vec<u8>, Error> {
        let history = self.handle(id).fetch_history(WorkflowFetchHistoryOptions::default());
        history.to_json().await.map_err(|error| match error {
            temporalio_client::WorkflowHistoryError::Fetch(error) => self.trouble(id, error),
            other => self.unexpected(&other),
        })
    }

    fn handle(&self, id: &str) -> WorkflowHandle<Client, UntypedWorkflow> {
        self.client.get_workflow_handle::<UntypedWorkflow>(id)
    }

    async fn describe(
        &self,
        id: &str,
    ) -> Result<temporalio_client::WorkflowExecutionDescription, Error> {
        let handle = self.handle(id);
        let ask = || handle.describe(Default::default());
        let described = patiently(ask, |error| match error {
            WorkflowInteractionError::NotFound(status) => Some(status),
            _ => None,
        })
        .await
        .map_err(|error| self.trouble(id, error))?;
        if described.workflow_type() == WORKFLOW_TYPE {
            Ok(described)
        } else {
            Err(Error::NoSuchJob { id: id.to_owned() })
        }
    }

    /// What an interaction error means for the job `id`.
    fn trouble(&self, id: &str, error: WorkflowInteractionError) -> Error {
        match error {
            WorkflowInteractionError::NotFound(status) if is_of_namespace(&status) => {
                self.rpc(&status)
            }
            WorkflowInteractionError::NotFound(_) => Error::NoSuchJob { id: id.to_owned() },
            WorkflowInteractionError::Rpc(status) => self.rpc(&status),
            other => self.unexpected(&other),
        }
    }

    fn rpc(&self, status: &temporalio_client::tonic::Status) -> Error {
        use temporalio_client::tonic::Code;
        let message = status.message().to_owned();
        match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                Error::Unreachable { address: self.address.clone(), message }
            }
            code => Error::Temporal(format!("{code:?}: {message}")),
        }
    }

    fn unexpected(&self, error: &(dyn std::error::Error + 'static)) -> Error {
        let mut cause = Some(error);
        while let Some(inner) = cause {
            if let Some(status) = inner.downcast_ref::<temporalio_client::tonic::Status>() {
                return self.rpc(status);
            }
            cause = inner.source();
        }
        Error::Temporal(chain(error))
    }
}

/// Whether it is the namespace that was not found, and not the job.
fn is_of_namespace(status: &temporalio_client::tonic::Status) -> bool {
    let is_missing = status.code() == temporalio_client::tonic::Code::NotFound;
    is_missing && status.message().starts_with("Namespace ")
}

/// Makes `call` again while it is the namespace that was not found, for a bounded time; `status` reads an error of it.
async fn patiently<T, E, F: Future<Output = Result<T, E>>>(
    call: impl Fn() -> F,
    status: impl Fn(&E) -> Option<&temporalio_client::tonic::Status>,
) -> Result<T, E> {
    let start = Instant::now();
    loop {
        let answer = call().await;
        let is_away =
            answer.as_ref().is_err_and(|error| status(error).is_some_and(is_of_namespace));
        if !is_away || start.elapsed() >= NAMESPACE_AWAY {
            return answer;
        }
        tokio::time::sleep(NAMESPACE_PAUSE).await;
    }
}

/// The innermost cause, which says it in the system's words; what is around it is the transport's debug text.
fn root(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn listed(execution: &temporalio_client::WorkflowExecution) -> Listed {
    let memo = execution.memo();
    let text = |name: &str| memo.get::<String>(name).ok().flatten();
    Listed {
        id: execution.id().to_owned(),
        run_id: execution.run_id().to_owned(),
        status: status_of(execution.status()),
        started: execution.start_time(),
        ended: execution.close_time(),
        user_id: text(submit::MEMO_USER),
        job_type: text(submit::MEMO_TYPE),
        prompt: text(submit::MEMO_PROMPT),
    }
}

/// The server's word for a run in ours. A run no worker has taken up counts as running here.
fn status_of(status: WorkflowExecutionStatus) -> JobStatus {
    match status {
        WorkflowExecutionStatus::Completed => JobStatus::Completed,
        WorkflowExecutionStatus::Canceled => JobStatus::Cancelled,
        WorkflowExecutionStatus::Failed
        | WorkflowExecutionStatus::Terminated
        | WorkflowExecutionStatus::TimedOut => JobStatus::Failed,
        _ => JobStatus::Running,
    }
}
