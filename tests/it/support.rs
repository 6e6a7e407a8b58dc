//! What tests share: folders, a Temporal server, a worker, jobs.
//!
//! One dev server serves the whole test binary; every test has its own queue, store and worker, so that tests do not
//! see each other. Start from [`Lab`].

#![allow(dead_code, reason = "each area uses its own part")]

#[cfg(feature = "s3")]
pub(crate) mod bucket;
pub(crate) mod fake_hub;
pub(crate) mod machine;
pub(crate) mod server;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use genvideo::client::{Jobs, Outcome, Submit, Target};
use genvideo::job::progress::Progress;
use genvideo::job::result::JobResult;
use genvideo::render::Renderer;
use genvideo::worker::{self, WorkerSettings};
use serde_json::{Value, json};
use temporalio_client::{Client, UntypedQuery, UntypedSignal, WorkflowHandle};
use temporalio_common::UntypedWorkflow;
use temporalio_common::data_converters::RawValue;
use temporalio_common::protos::temporal::api::common::v1::Payload;
use temporalio_sdk::workflow_replayer::{WorkflowReplayer, WorkflowReplayerOptions};
use tokio::sync::{mpsc, oneshot};

/// How long a test waits for anything before it says what it waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// Copies a folder with all that is in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("the folder to copy") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("its name"));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            // Written anew, since a copy would keep the mark of a file that must not be written.
            std::fs::write(target, std::fs::read(&path).expect("the file to copy"))
                .expect("a copy");
        }
    }
}

/// A worker at work in this process.
struct Hand {
    stop: oneshot::Sender<()>,
    ended: tokio::task::JoinHandle<Result<(), worker::Error>>,
}

/// One machine of its own on the shared server.
pub(crate) struct Lab {
    pub(crate) jobs: Jobs,
    pub(crate) queue: String,
    pub(crate) renderer: Renderer,
    pub(crate) store: PathBuf,
    folder: tempfile::TempDir,
    hand: Option<Hand>,
}

impl Lab {
    /// A machine whose worker does not run yet.
    pub(crate) async fn idle(name: &str) -> Self {
        Self::on_queue(&format!("{name}-{}", uuid::Uuid::now_v7())).await
    }

    /// A machine with its worker at work.
    pub(crate) async fn working(name: &str) -> Self {
        let mut lab = Self::idle(name).await;
        lab.start();
        lab
    }

    /// A machine on a queue other clients know by name.
    pub(crate) async fn on_queue(queue: &str) -> Self {
        let target = Target { address: server::address(), namespace: "default".to_owned() };
        let jobs = Jobs::connect_patiently(&target, Some(PATIENCE))
            .await
            .expect("the shared server answers");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = folder.path().join("store");
        let renderer = machine::renderer(&store, folder.path());
        Self { jobs, queue: queue.to_owned(), renderer, store, folder, hand: None }
    }

    /// Starts the worker.
    pub(crate) fn start(&mut self) {
        let (stop, stopped) = oneshot::channel();
        let settings = WorkerSettings {
            task_queue: self.queue.clone(),
            heartbeat_timeout: Duration::from_secs(30),
            drain_deadline: PATIENCE,
            identity: None,
            host: None,
        };
        let shutdown = async {
            // A dropped sender means the same.
            let _ = stopped.await;
        };
        let ended = tokio::spawn(worker::run(
            settings,
            self.jobs.client(),
            self.renderer.clone(),
            shutdown,
        ));
        self.hand = Some(Hand { stop, ended });
    }

    /// Shuts the worker down as SIGTERM does, and waits until it is gone.
    pub(crate) async fn stop(&mut self) {
        let hand = self.hand.take().expect("a worker runs");
        let _ = hand.stop.send(());
        within("the worker's end", hand.ended)
            .await
            .expect("no panic")
            .expect("an orderly shutdown");
    }

    /// Submits `input` under a fresh id.
    pub(crate) async fn submit(&self, input: &Value) -> String {
        let id = genvideo::client::fresh_id();
        self.submit_as(&id, input).await.expect("submitted").id
    }

    /// Submits `input` under `id`.
    pub(crate) async fn submit_as(
        &self,
        id: &str,
        input: &Value,
    ) -> Result<genvideo::client::Submitted, genvideo::client::Error> {
        let input = serde_json::to_vec(input).expect("JSON");
        self.jobs.submit(Submit { id: Some(id.to_owned()), input, queue: self.queue.clone() }).await
    }

    /// Starts a workflow with any payloads, as a client of another language might.
    pub(crate) async fn start_raw(&self, payloads: Vec<Payload>) -> String {
        let id = genvideo::client::fresh_id();
        let options =
            temporalio_client::WorkflowStartOptions::new(self.queue.as_str(), id.as_str())
                .execution_timeout(PATIENCE)
                .build();
        let workflow = UntypedWorkflow::new(genvideo::job::WORKFLOW_TYPE);
        self.jobs
            .client()
            .start_workflow(workflow, RawValue::new(payloads), options)
            .await
            .expect("started");
        id
    }

    /// The raw handle of a job.
    pub(crate) fn handle(&self, id: &str) -> WorkflowHandle<Client, UntypedWorkflow> {
        self.jobs.client().get_workflow_handle::<UntypedWorkflow>(id)
    }

    /// Sends a signal with any payloads.
    pub(crate) async fn signal(&self, id: &str, name: &str, payloads: Vec<Payload>) {
        let handle = self.handle(id);
        let sent =
            handle.signal(UntypedSignal::new(name), RawValue::new(payloads), Default::default());
        within("a signal", sent).await.expect("the signal is taken");
    }

    /// Asks `get_status` with any payloads.
    pub(crate) async fn query(&self, id: &str, payloads: Vec<Payload>) -> Progress {
        let query = UntypedQuery::new(genvideo::job::QUERY_STATUS);
        let handle = self.handle(id);
        let asked = handle.query(query, RawValue::new(payloads), Default::default());
        let answer = within("a query", asked).await.expect("the query is answered");
        serde_json::from_slice(&answer.payloads[0].data).expect("a progress")
    }

    /// Waits until the job's progress is as `wanted`; fails when the job ends first.
    pub(crate) async fn reach(
        &self,
        id: &str,
        what: &str,
        wanted: impl Fn(&Progress) -> bool,
    ) -> Progress {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let jobs = self.jobs.clone();
        let watched = id.to_owned();
        let watcher = tokio::spawn(async move {
            jobs.watch(&watched, &mut |progress| {
                let _ = sender.send(progress);
            })
            .await
        });
        let mut last = None;
        let found = within(what, async {
            while let Some(progress) = receiver.recv().await {
                if wanted(&progress) {
                    return Some(progress);
                }
                last = Some(progress);
            }
            None
        })
        .await;
        watcher.abort();
        found.unwrap_or_else(|| panic!("the job ended before {what}; last: {last:?}"))
    }

    /// Waits for the end of a job.
    pub(crate) async fn outcome(&self, id: &str) -> Outcome {
        within("the job's end", self.jobs.watch(id, &mut |_| {})).await.expect("an outcome")
    }

    /// Waits for the result of a job that should succeed.
    pub(crate) async fn result(&self, id: &str) -> JobResult {
        match self.outcome(id).await {
            Outcome::Completed(result) => *result,
            other => panic!("want a result, got {other:?}"),
        }
    }

    /// Waits for the end of a job that should end cancelled.
    pub(crate) async fn cancelled(&self, id: &str) -> Progress {
        match self.outcome(id).await {
            Outcome::Cancelled(progress) => progress,
            other => panic!("want a cancelled job, got {other:?}"),
        }
    }

    /// Every file in the store, but its own lock.
    pub(crate) fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.store.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).expect("a folder of the store") {
                let entry = entry.expect("an entry");
                if entry.file_type().expect("a type").is_dir() {
                    folders.push(entry.path());
                } else {
                    let path = entry.path();
                    found.push(
                        path.strip_prefix(&self.store).expect("in the store").display().to_string(),
                    );
                }
            }
        }
        found.retain(|path| path != "lock");
        found.sort();
        found
    }

    /// Checks that the store holds results alone: no work objects, no temporary files.
    pub(crate) fn assert_tidy(&self) {
        let left: Vec<_> = self
            .files()
            .into_iter()
            .filter(|path| path.starts_with("work/") || path.starts_with("tmp/"))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "left behind");
    }

    /// Checks that nothing at all is left of the jobs.
    pub(crate) fn assert_empty(&self) {
        assert_eq!(self.files(), Vec::<String>::new(), "left behind");
    }

    /// Replays the job's history against today's workflow; `GENVIDEO_HISTORIES` also keeps it under `name`.
    pub(crate) async fn replay(&self, id: &str, name: &str) {
        let history = self.jobs.history_json(id).await.expect("a history");
        replay_and_keep(&history, name).await;
    }
}

/// Replays a history against today's workflow; `GENVIDEO_HISTORIES` also keeps it under `name`.
pub(crate) async fn replay_and_keep(history: &[u8], name: &str) {
    replay(history).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    if let Some(folder) = std::env::var_os("GENVIDEO_HISTORIES") {
        let folder = PathBuf::from(folder);
        std::fs::create_dir_all(&folder).expect("a folder for histories");
        std::fs::write(folder.join(format!("{name}.json")), history).expect("a history file");
    }
}

/// A folder for what all tests of this process share. Those of processes that are gone are removed.
pub(crate) fn process_folder() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let root = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("it");
        std::fs::create_dir_all(&root).expect("a folder for the tests");
        for entry in std::fs::read_dir(&root).expect("its content").flatten() {
            let process = PathBuf::from("/proc").join(entry.file_name());
            if PathBuf::from("/proc/self").exists() && !process.exists() {
                // Another run may be removing it too.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let own = root.join(std::process::id().to_string());
        std::fs::create_dir_all(&own).expect("a folder for this process");
        own
    };
    FOLDER.get_or_init(make).clone()
}

/// Replays one recorded history.
pub(crate) async fn replay(history: &[u8]) -> Result<(), String> {
    let options = WorkflowReplayerOptions::new()
        .register_workflow::<worker::workflow::GenVideoWorkflow>()
        .map_err(|error| error.to_string())?
        .build();
    let replayer = WorkflowReplayer::new(options).map_err(|error| error.to_string())?;
    let history = temporalio_client::WorkflowHistory::from_json(history)
        .map_err(|error| error.to_string())?;
    replayer.replay_workflow(history).await.map_err(|error| error.to_string())
}

/// Awaits `future`, or fails naming `what` did not come.
pub(crate) async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} did not come within {PATIENCE:?}"),
    }
}

/// A small job of `job_type` with `more` fields on top; really made as small as that, a quarter of the models' own.
pub(crate) fn job(job_type: &str, more: Value) -> Value {
    let mut input = json!({
        "prompt": "a red ball",
        "job_type": job_type,
        "width": 64,
        "height": 64,
        "size_policy": "exact",
        "duration": 0.5,
        "user_id": "tester",
        "steps": 2,
        "seed": 7,
        "metadata": {"order": 1},
    });
    let fields = input.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    input
}

/// A payload with any encoding.
pub(crate) fn payload(encoding: &str, data: &[u8]) -> Payload {
    let metadata = [("encoding".to_owned(), encoding.as_bytes().to_vec())].into();
    Payload { metadata, data: data.to_vec(), ..Payload::default() }
}

/// A `json/plain` payload.
pub(crate) fn json_payload(value: &Value) -> Payload {
    payload("json/plain", value.to_string().as_bytes())
}
