//! The Temporal server a command talks to, and the worker it may run in the same process.
//!
//! An address that was given is used; without one the embedded dev server of the data folder is joined, or started.

use std::ffi::OsString;
use std::future::Future;
use std::io::Write;
use std::time::Duration;

use tokio::sync::oneshot;

use super::failure::Failure;
use super::output;
use super::signals::Signals;
use super::supervise;
use crate::client::{Jobs, Target};
use crate::config::{Config, Origin};
use crate::devserver::{self, DevServer};
use crate::hub::{Extras, Library, Places};
use crate::job::class::ErrorClass;
use crate::render::{Renderer, Settings};
use crate::store::{self, Ages, JobKey, Store};
use crate::worker::{self, WorkerSettings, fleet};

/// Port of the embedded server when nobody else has it: the one Temporal clients try by themselves.
const PORT: u16 = 7233;

/// Age after which no job can need what it left: longer than any job may go without a word; see [`Sweeper`].
const LEFT_BEHIND: Duration = Duration::from_secs(8 * 86_400);
/// How often a worker looks for it.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);

/// A server that answers.
pub(crate) struct Session {
    /// Where it is.
    pub(crate) target: Target,
    /// The handle of everything a client does.
    pub(crate) jobs: Jobs,
    embedded: Option<DevServer>,
}

impl Session {
    /// Connects to the given server, or to the embedded one.
    pub(crate) async fn open(config: &Config) -> Result<Self, Failure> {
        match &config.temporal_address {
            Some(address) => Self::given(config, address).await,
            None => Self::embedded(config).await,
        }
    }

    /// The same, but a server that does not answer gives way to the embedded one unless a flag names it.
    pub(crate) async fn open_anyhow(config: &Config) -> Result<Self, Failure> {
        let typed = config.origins().iter().any(|setting| {
            setting.key == "temporal_address" && matches!(setting.origin, Origin::Flag(_))
        });
        match Self::open(config).await {
            Err(failure) if config.temporal_address.is_some() && !typed => {
                output::note(&format!("{}; using the embedded server", failure.message));
                Self::embedded(config).await
            }
            opened => opened,
        }
    }

    /// Connects to a server that runs: the given one, the embedded one, or the one where Temporal clients look by
    /// themselves.
    pub(crate) async fn open_running(config: &Config) -> Result<Self, Failure> {
        if config.temporal_address.is_none() && devserver::is_running(&config.data_dir).is_some() {
            return Self::embedded(config).await;
        }
        let usual = format!("127.0.0.1:{PORT}");
        Self::given(config, config.temporal_address.as_deref().unwrap_or(&usual)).await
    }

    /// Connects to the server that was found before, as soon as it answers.
    pub(crate) async fn open_patiently(config: &Config) -> Result<Self, Failure> {
        let address =
            config.temporal_address.clone().unwrap_or_else(|| format!("127.0.0.1:{PORT}"));
        let target = Target { address, namespace: config.namespace.clone() };
        let jobs = Jobs::connect_patiently(&target, None).await?;
        Ok(Self { target, jobs, embedded: None })
    }

    async fn given(config: &Config, address: &str) -> Result<Self, Failure> {
        let target = Target { address: address.to_owned(), namespace: config.namespace.clone() };
        let jobs = Jobs::connect(&target).await?;
        Ok(Self { target, jobs, embedded: None })
    }

    async fn embedded(config: &Config) -> Result<Self, Failure> {
        let program = devserver::find(config.temporal_cli.as_deref(), &config.cache_dir)?;
        let server = DevServer::join_or_start(&config.data_dir, &program, Some(PORT)).await?;
        // The dev server has this one, whatever the environment says about another server.
        let namespace = "default".to_owned();
        let target = Target { address: server.address().to_owned(), namespace };
        match Jobs::connect(&target).await {
            Ok(jobs) => Ok(Self { target, jobs, embedded: Some(server) }),
            Err(error) => {
                leave(server).await;
                Err(error.into())
            }
        }
    }

    /// Whether the server is ours and ends with its last user.
    pub(crate) fn is_embedded(&self) -> bool {
        self.embedded.is_some()
    }

    /// Address of the Web UI, where we know it.
    pub(crate) fn ui_url(&self) -> Option<String> {
        self.embedded.as_ref().map(|server| server.ui_url().to_owned())
    }

    /// Runs a worker beside `job` and stops it when `job` is done.
    pub(crate) async fn with_worker<T>(
        &self,
        config: &Config,
        job: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let (stop, stopped) = oneshot::channel::<()>();
        let until_done = async {
            // A sender that is gone means stop as well.
            let _ = stopped.await;
        };
        // What the worker has to say in the meantime is the log's, not the display's.
        let log = if config.log.is_empty() { "warn" } else { &config.log };
        let worker = supervise::keep(self, config, log, until_done);
        tokio::pin!(worker, job);
        tokio::select! {
            done = &mut job => {
                let _ = stop.send(());
                if let Err(error) = worker.await {
                    tracing::warn!(error = error.message, "the worker ended badly");
                }
                done
            }
            ended = &mut worker => {
                ended?;
                Err(Failure::of(ErrorClass::Bug, "the worker ended before its job"))
            }
        }
    }

    /// Serves jobs until the first signal, by a worker process.
    pub(crate) async fn serve(&self, config: &Config, signals: &Signals) -> Result<(), Failure> {
        let log = if config.log.is_empty() { "info" } else { &config.log };
        supervise::keep(self, config, log, until_told(signals)).await
    }

    /// Serves jobs in this process until the first signal.
    pub(crate) async fn work(
        &self,
        config: &Config,
        renderer: Renderer,
        signals: &Signals,
    ) -> Result<(), Failure> {
        let _sweeper = Sweeper::start(&renderer, config, self.jobs.clone());
        let mut signals = signals.clone();
        let until_signal = async move {
            signals.first().await;
        };
        let settings = worker_settings(config, &renderer)?;
        Ok(worker::run(settings, self.jobs.client(), renderer, until_signal).await?)
    }

    /// Lets go of the server; the embedded one ends when nobody else uses it.
    pub(crate) async fn close(self) {
        if let Some(server) = self.embedded {
            leave(server).await;
        }
    }
}

/// Waits for the first signal and says what a second one does.
async fn until_told(signals: &Signals) {
    signals.clone().first().await;
    output::note("stopping; once more to leave at once");
}

/// Removes, beside the work, what is too old, now and every hour until it is dropped. What an open job has is never too
/// old, however long the job waits.
struct Sweeper(tokio::task::JoinHandle<()>);

impl Sweeper {
    fn start(renderer: &Renderer, config: &Config, jobs: Jobs) -> Self {
        let (store, ages) = (renderer.store().clone(), ages(config));
        Self(tokio::spawn(async move {
            let mut timer = tokio::time::interval(SWEEP_EVERY);
            loop {
                timer.tick().await;
                let open = match jobs.open().await {
                    Ok(open) => open,
                    Err(error) => {
                        tracing::warn!(%error, "the store is not swept: open jobs are not known");
                        continue;
                    }
                };
                let store = store.clone();
                let swept = tokio::task::spawn_blocking(move || {
                    for id in &open {
                        // A full disk above all needs the sweep; what is younger than days stays all the same.
                        if let Err(error) = store.renew(&JobKey::of_workflow(id)) {
                            tracing::warn!(%error, id, "an open job's work was not marked as of today");
                        }
                    }
                    store.sweep_with(&ages, false)
                });
                match swept.await {
                    Ok(Ok(swept)) => tracing::debug!(?swept, "swept the store"),
                    Ok(Err(error)) => tracing::warn!(%error, "the store was not swept"),
                    Err(error) => tracing::warn!(%error, "the sweep ended early"),
                }
            }
        }))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How old things in the store may become.
pub(crate) fn ages(config: &Config) -> Ages {
    Ages { left_behind: LEFT_BEHIND, results: config.keep_results }
}

async fn leave(server: DevServer) {
    if let Err(error) = server.leave().await {
        tracing::warn!(%error, "the embedded Temporal server did not end well");
    }
}

fn worker_settings(config: &Config, renderer: &Renderer) -> Result<WorkerSettings, Failure> {
    let host = (!config.shared_store).then(|| store_name(config)).transpose()?;
    let (device, memory) = renderer.machine();
    Ok(WorkerSettings {
        task_queue: config.task_queue.clone(),
        heartbeat_timeout: config.heartbeat_timeout,
        drain_deadline: config.drain_deadline,
        identity: Some(fleet::identity(&device, memory, host.as_deref())),
        host,
    })
}

/// Name of the data folder's store among those of a fleet: drawn once, so that a job finds its files after a restart.
fn store_name(config: &Config) -> Result<String, Failure> {
    let path = config.data_dir.join("host");
    let failed = |error: std::io::Error| {
        Failure::of(ErrorClass::OutputUnwritable, format!("`{}`: {error}", path.display()))
    };
    let mut file = tempfile::NamedTempFile::new_in(&config.data_dir).map_err(failed)?;
    write!(file, "{}", uuid::Uuid::now_v7().simple()).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    match file.persist_noclobber(&path) {
        Err(error) if error.error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(failed(error.error));
        }
        // The first worker of this folder has named it.
        _ => {}
    }
    Ok(std::fs::read_to_string(&path).map_err(failed)?.trim().to_owned())
}

/// The store of the configuration; what belongs to one in a bucket for a while is in the data folder.
pub(crate) fn store(config: &Config) -> Result<Store, store::Error> {
    match config.store.to_str().filter(|place| place.starts_with("s3://")) {
        Some(address) => {
            // The names are those of the server's other clients, none of our settings.
            let text = |(name, value): (OsString, OsString)| {
                Some((name.into_string().ok()?, value.into_string().ok()?))
            };
            let variables: Vec<_> = std::env::vars_os().filter_map(text).collect();
            Store::open_bucket(address, &variables, &config.data_dir.join("store"))
        }
        None => Store::open(&config.store),
    }
}

/// The models of this machine.
pub(crate) fn library(config: &Config) -> Library {
    let places = Places {
        models_dirs: config.models_dirs.clone(),
        cache_dir: config.cache_dir.clone(),
        hf_home: config.hf_home.clone(),
    };
    let usual = config.hf_home.join("hub");
    let extras = Extras {
        hf_cache: Some(config.hf_cache.clone()).filter(|cache| *cache != usual),
        extra_model_paths: config.extra_model_paths.clone(),
    };
    Library::open_with(places, extras)
}

/// What makes pictures: the store, the models and the device of the configuration.
pub(crate) fn renderer(config: &Config, store: Store) -> Renderer {
    Renderer::new(Settings {
        store,
        library: library(config),
        device: config.device.clone(),
        dtype: config.dtype.clone(),
        memory: config.memory.clone(),
        memory_limit: config.memory_limit,
        checkpoint_every: config.checkpoint_interval,
        disk_quota: config.disk_quota,
        threads: config.threads,
        image_model: config.image_model.clone(),
        video_model: config.video_model.clone(),
    })
}
