//! The Temporal side of a machine that does the work: workflows, activities, and a shutdown that loses nothing.
//!
//! Three Temporal workers share one connection: one for workflows and light activities, one for the device, one for
//! the encoder; each has its own queue and its own number of slots. Another one takes what needs as much memory as
//! there is here, and where the store is this host's own, three more serve the jobs whose files are here. What a stage
//! does is [`crate::render`]'s business. Start from [`run`].

pub mod at_work;
pub mod failure;
pub mod fleet;
pub mod heartbeat;
pub mod workflow;

mod activities;
pub(crate) mod policy;
mod progress;
mod request;
mod review;
mod stage_thread;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use temporalio_client::Client;
use temporalio_sdk::runtime::RuntimeOptions;
use temporalio_sdk::runtime::worker_tuner::{FixedSizeSlotSupplier, TunerHolder, WorkerTuner};
use temporalio_sdk::{Runtime, Worker, WorkerOptions, WorkflowRegistrationError};
use tokio::sync::{Notify, Semaphore, oneshot, watch};

use crate::render::Renderer;
use activities::{DeviceActivities, EncodeActivities, LightActivities};
use stage_thread::StageThread;
use workflow::GenVideoWorkflow;

/// Longest time between two heartbeats on the wire: what a cancel takes to reach a stage, and what a crash loses.
const HEARTBEAT_THROTTLE: Duration = Duration::from_secs(1);
/// How long the next step of a workflow waits for the worker that has it in memory before any other may take it.
/// The server's own 10 s would be added to every death of a worker; a worker that was only busy loses its memory of
/// a short history.
const STICKY_WAIT: Duration = Duration::from_secs(1);
/// How many workflows may be worked on at once; each is a few kilobytes.
const WORKFLOW_SLOTS: usize = 100;
/// How many light activities may run at once.
const LIGHT_SLOTS: usize = 4;

/// How a worker works.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// Queue of the workflows; the other two queues are named after it.
    pub task_queue: String,
    /// Time without a heartbeat after which the server holds an attempt for dead; at least a second.
    pub heartbeat_timeout: Duration,
    /// How long a shutdown may take before [`Error::Drain`] gives up on it.
    pub drain_deadline: Duration,
    /// Who this is, for the server's records; `None` takes process and host.
    pub identity: Option<String>,
    /// Names the store, where other workers of the queue have others: the job stays where its files are.
    pub host: Option<String>,
}

/// Why a worker stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The SDK refused its set-up.
    #[error("temporal worker for queue `{queue}`: {message}")]
    Setup {
        /// Queue of the worker.
        queue: String,
        /// What the SDK says.
        message: String,
    },
    /// A worker ended by itself; the process should end with an error, so that its supervisor starts a new one.
    #[error("temporal worker: {0}")]
    Run(String),
    /// The device failed in a way that may stay with this process; a new one should start.
    #[error("the device failed; its driver may be of no more use to this process")]
    Device,
    /// Work went on past the drain deadline; the caller should end the process, which the server notices.
    #[error("still at work {} s after the shutdown began", .0.as_secs_f64())]
    Drain(Duration),
}

/// Works until `shutdown` resolves, then hands back what it has in hand and returns.
///
/// The workers run on a thread of their own, because the SDK's futures are tied to one; the caller's future may be
/// spawned. At shutdown no new work is taken, every stage is stopped within one step, and its attempt goes back to
/// the server as retryable, so that another worker, or this one restarted, goes on at once.
pub async fn run(
    settings: WorkerSettings,
    client: Client,
    renderer: Renderer,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let (stop, stopped) = watch::channel(false);
    let (sender, mut finished) = oneshot::channel();
    let handle = tokio::runtime::Handle::current();
    let deadline = settings.drain_deadline;
    std::thread::Builder::new()
        .name("temporal".to_owned())
        .spawn(move || {
            // Nobody listens any more once the drain deadline has passed.
            let _ = sender.send(handle.block_on(serve(&settings, client, renderer, stopped)));
        })
        .map_err(no_thread)?;
    tokio::select! {
        ended = &mut finished => return ended.unwrap_or_else(|_| Err(panicked())),
        () = shutdown => {}
    }
    stop.send_replace(true);
    match tokio::time::timeout(deadline, finished).await {
        Ok(ended) => ended.unwrap_or_else(|_| Err(panicked())),
        Err(_) => Err(Error::Drain(deadline)),
    }
}

fn no_thread(error: std::io::Error) -> Error {
    Error::Run(format!("no thread: {error}"))
}

fn panicked() -> Error {
    Error::Run("its thread panicked".to_owned())
}

/// Runs the workers on the current thread until they are told to stop, or one of them fails.
async fn serve(
    settings: &WorkerSettings,
    client: Client,
    renderer: Renderer,
    mut stopped: watch::Receiver<bool>,
) -> Result<(), Error> {
    let options = RuntimeOptions::builder().build().map_err(Error::Run)?;
    let runtime =
        Runtime::from_current_tokio(options).map_err(|error| Error::Run(error.to_string()))?;
    let unfit = Arc::new(Notify::new());
    let mut workers = workers(settings, &runtime, (&client, renderer), &unfit)?;
    let stops: Vec<_> = workers.iter().map(Worker::shutdown_handle).collect();
    let stop = async {
        // An error means that `run` was dropped: then the work is over too.
        let asked = tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => true,
            () = unfit.notified() => false,
        };
        stops.iter().for_each(|stop| stop());
        asked
    };
    let work = async {
        let failed = |error: temporalio_sdk::WorkerRunError| {
            stops.iter().for_each(|stop| stop());
            Error::Run(failure::chain(&error))
        };
        let runs = workers.iter_mut().map(async |worker| worker.run().await.map_err(failed));
        futures::future::join_all(runs).await.into_iter().collect()
    };
    let mut work = std::pin::pin!(work);
    tokio::select! {
        result = &mut work => result,
        asked = stop => match work.await {
            Ok(()) if !asked => Err(Error::Device),
            result => result,
        },
    }
}

fn workers(
    settings: &WorkerSettings,
    runtime: &Runtime,
    (client, renderer): (&Client, Renderer),
    unfit: &Arc<Notify>,
) -> Result<Vec<Worker>, Error> {
    let queue = &settings.task_queue;
    let heartbeat_timeout = settings.heartbeat_timeout;
    let host = settings.host.as_ref().map(|host| policy::host_queue(queue, host));
    let device = DeviceActivities {
        renderer: renderer.clone(),
        unfit: unfit.clone(),
        host: host.clone(),
        device: Arc::new(Semaphore::new(1)),
        thread: StageThread::start().map_err(no_thread)?,
    };
    let light = LightActivities {
        renderer: renderer.clone(),
        heartbeat_timeout,
        host: host.clone(),
        queue: queue.clone(),
    };
    let common = |queue: &str, slots| {
        WorkerOptions::new(queue)
            .tuner(tuner(slots))
            .max_heartbeat_throttle_interval(HEARTBEAT_THROTTLE)
            .sticky_queue_schedule_to_start_timeout(STICKY_WAIT)
            .graceful_shutdown_period(Duration::ZERO)
            .maybe_client_identity_override(settings.identity.clone())
    };
    let build = |options: WorkerOptions| {
        let queue = options.task_queue.clone();
        Worker::new(runtime, client.clone(), options)
            .map_err(|error| Error::Setup { queue, message: failure::chain(&error) })
    };
    let unregistered = |error: WorkflowRegistrationError| Error::Setup {
        queue: queue.clone(),
        message: failure::chain(&error),
    };
    let mut workers = vec![build(
        common(queue, LIGHT_SLOTS)
            .register_activities(light.clone())
            .register_workflow::<GenVideoWorkflow>()
            .map_err(unregistered)?
            .build(),
    )?];
    if let Some(host) = &host {
        workers.push(build(common(host, LIGHT_SLOTS).register_activities(light).build())?);
    }
    let places = || std::iter::once(queue).chain(&host);
    for queue in places().map(|place| policy::processor_queue(place)) {
        let thread = StageThread::start().map_err(no_thread)?;
        let encoder = EncodeActivities { renderer: renderer.clone(), thread };
        workers.push(build(common(&queue, 1).register_activities(encoder).build())?);
    }
    let room = settings.identity.as_ref().and_then(|own| fleet::room_queue(queue, own));
    for queue in places().map(|place| policy::device_queue(place)).chain(room) {
        workers.push(build(common(&queue, 1).register_activities(device.clone()).build())?);
    }
    Ok(workers)
}

fn tuner(activities: usize) -> WorkerTuner {
    TunerHolder::builder()
        .workflow_task_slot_supplier(FixedSizeSlotSupplier::new(WORKFLOW_SLOTS))
        .activity_task_slot_supplier(FixedSizeSlotSupplier::new(activities))
        .local_activity_task_slot_supplier(FixedSizeSlotSupplier::new(1))
        .nexus_task_slot_supplier(FixedSizeSlotSupplier::new(1))
        .build()
        .into()
}
