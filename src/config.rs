//! Settings, resolved once: flag, environment, `.env`, configuration file, default, in this order.
//!
//! The only list of `GENVIDEO_*` names. The result is a plain [`Config`] that is passed down; no other module reads
//! the environment. Where each value came from stays known, for `doctor` and for messages.

mod dotenv;
mod source;
mod value;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use source::{Error, Origin};
use source::{Setting, Sources};
pub use value::Secret;

/// Every setting: its key in a configuration file, its variables (the first one found wins), and what it wants.
const SETTINGS: &[Setting] = &[
    setting("data_dir", &["GENVIDEO_DATA_DIR"], "a folder"),
    setting("store", &["GENVIDEO_STORE"], "a folder or a bucket such as `s3://videos/team`"),
    setting("cache_dir", &["GENVIDEO_CACHE_DIR"], "a folder"),
    setting("models_dirs", &["GENVIDEO_MODELS_DIR"], "a list of folders"),
    setting("hf_home", &["HF_HOME"], "a folder"),
    setting("hf_cache", &["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"], "a folder"),
    setting("hf_endpoint", &["HF_ENDPOINT"], "an address such as `https://example.org`"),
    setting("hf_token", &["HF_TOKEN"], "an access token of the hub"),
    setting("hf_offline", &["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"], SWITCH),
    setting("extra_model_paths", &["GENVIDEO_EXTRA_MODEL_PATHS"], "a list of files"),
    setting("device", &["GENVIDEO_DEVICE"], "`auto`, `cpu`, `cuda`, `cuda:N` or `metal`"),
    setting("dtype", &["GENVIDEO_DTYPE"], "`auto`, `f32`, `f16` or `bf16`"),
    setting("memory", &["GENVIDEO_MEMORY"], "`auto`, `low` or `full`"),
    setting("memory_limit", &["GENVIDEO_MEMORY_LIMIT"], "`none` or a size such as `8GiB`"),
    setting("image_model", &["GENVIDEO_IMAGE_MODEL"], "the name of a model"),
    setting("video_model", &["GENVIDEO_VIDEO_MODEL"], "the name of a model"),
    setting("temporal_address", &["TEMPORAL_ADDRESS"], "an address such as `127.0.0.1:7233`"),
    setting("namespace", &["TEMPORAL_NAMESPACE"], "the name of a Temporal namespace"),
    setting("task_queue", &["GENVIDEO_TASK_QUEUE"], "the name of a task queue"),
    setting(
        "heartbeat_timeout",
        &["GENVIDEO_HEARTBEAT_TIMEOUT"],
        "a time from 1s to 1h, such as `10s`",
    ),
    setting(
        "checkpoint_interval",
        &["GENVIDEO_CHECKPOINT_INTERVAL"],
        "a time from 0s to 1h, such as `10s`",
    ),
    setting("shared_store", &["GENVIDEO_SHARED_STORE"], SWITCH),
    setting("disk_quota", &["GENVIDEO_DISK_QUOTA"], "`none` or a size such as `50GB`"),
    setting("keep_results", &["GENVIDEO_KEEP_RESULTS"], "`forever` or days such as `30d`"),
    setting("drain_deadline", &["GENVIDEO_DRAIN_DEADLINE"], "a time from 0s to 1h, such as `30s`"),
    setting("temporal_cli", &["GENVIDEO_TEMPORAL_CLI"], "the path of the `temporal` program"),
    setting("threads", &["GENVIDEO_THREADS"], "`auto` or a whole number from 1 to 1024"),
    setting(
        "log",
        &["GENVIDEO_LOG", "RUST_LOG"],
        "log levels such as `info` or `warn,genvideo=debug`",
    ),
];

/// What a setting wants that is on or off.
const SWITCH: &str = "`1` or `0`";
/// What is to fail where, in builds for tests: see [`crate::failpoint`].
pub const FAILPOINTS_VARIABLE: &str = "GENVIDEO_FAILPOINTS";
/// Names the configuration file itself.
const CONFIG_VARIABLE: &str = "GENVIDEO_CONFIG";
/// Variables of the test suite, which may stand in a `.env` beside ours.
const TEST_VARIABLES: &[&str] = &["GENVIDEO_GOLDENS", "GENVIDEO_CORPUS"];
/// Where a machine's administrator puts settings for everybody.
const SYSTEM_FILE: &str = "/etc/genvideo/config.toml";

/// The variable that sets a key, for hints: `models_dirs` is set by `GENVIDEO_MODELS_DIR`.
pub fn variable(key: &str) -> Option<&'static str> {
    let setting = SETTINGS.iter().find(|setting| setting.key == key)?;
    setting.variables.first().copied()
}

const fn setting(
    key: &'static str,
    variables: &'static [&'static str],
    wanted: &'static str,
) -> Setting {
    Setting { key, variables, wanted }
}

/// What was typed on the command line; texts are read here, so that every source is read alike.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--config FILE`, read instead of the user's configuration file.
    pub config: Option<PathBuf>,
    /// `--data-dir`
    pub data_dir: Option<PathBuf>,
    /// `--cache-dir`
    pub cache_dir: Option<PathBuf>,
    /// `--models-dir`, repeatable
    pub models_dirs: Vec<PathBuf>,
    /// `--device`
    pub device: Option<String>,
    /// `--dtype`
    pub dtype: Option<String>,
    /// `--memory`
    pub memory: Option<String>,
    /// `--image-model`
    pub image_model: Option<String>,
    /// `--video-model`
    pub video_model: Option<String>,
    /// `--temporal-address`
    pub temporal_address: Option<String>,
    /// `--namespace`
    pub namespace: Option<String>,
    /// `--task-queue`
    pub task_queue: Option<String>,
    /// `--heartbeat-timeout`
    pub heartbeat_timeout: Option<String>,
    /// `--checkpoint-interval`
    pub checkpoint_interval: Option<String>,
    /// `--drain-deadline`
    pub drain_deadline: Option<String>,
    /// `--temporal-cli`
    pub temporal_cli: Option<PathBuf>,
    /// `--threads`
    pub threads: Option<String>,
    /// `--log`
    pub log: Option<String>,
}

/// Settings, complete and checked. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Store, dev-server database.
    pub data_dir: PathBuf,
    /// Where results and work in progress are: a folder, or `s3://BUCKET/PREFIX` as it stands.
    pub store: PathBuf,
    /// Unpacked default models, downloaded tools.
    pub cache_dir: PathBuf,
    /// Folders that hold models, searched in this order.
    pub models_dirs: Vec<PathBuf>,
    /// The Hugging Face folder, which holds the access token.
    pub hf_home: PathBuf,
    /// The Hugging Face cache, where pulled models go.
    pub hf_cache: PathBuf,
    /// Where the hub is; `None` for the public one.
    pub hf_endpoint: Option<String>,
    /// The access token for it, when it is not in the file `token` of the Hugging Face folder.
    pub hf_token: Option<Secret>,
    /// Whether even a pull may not go to the hub.
    pub hf_offline: bool,
    /// Files in the format of ComfyUI's `extra_model_paths.yaml`, beside those in models folders.
    pub extra_model_paths: Vec<PathBuf>,
    /// `auto`, `cpu`, `cuda`, `cuda:N`, `metal`.
    pub device: String,
    /// `auto`, `f32`, `f16`, `bf16`.
    pub dtype: String,
    /// `auto`, `low`, `full`.
    pub memory: String,
    /// Most bytes of memory that models and runs may take on the device.
    pub memory_limit: Option<u64>,
    /// Text-to-image model of jobs that name none.
    pub image_model: Option<String>,
    /// Image-to-video model of jobs that name none.
    pub video_model: Option<String>,
    /// `host:port` of a Temporal server; `None` lets `run` and `up` start one.
    pub temporal_address: Option<String>,
    /// Temporal namespace.
    pub namespace: String,
    /// Task queue of the workflows.
    pub task_queue: String,
    /// Silence after which the server gives an activity to somebody else.
    pub heartbeat_timeout: Duration,
    /// Most work that a dead worker may cost.
    pub checkpoint_interval: Duration,
    /// Whether every worker of the task queue works on this store; else a job stays with the worker that began it.
    pub shared_store: bool,
    /// Most bytes the store may hold.
    pub disk_quota: Option<u64>,
    /// Age at which results are removed; `None` keeps them.
    pub keep_results: Option<Duration>,
    /// Time a worker has to stop in good order.
    pub drain_deadline: Duration,
    /// The `temporal` program, when it is not on `PATH`.
    pub temporal_cli: Option<PathBuf>,
    /// Threads for computing; `None` for one per core.
    pub threads: Option<usize>,
    /// Log filter in the syntax of `RUST_LOG`.
    pub log: String,
    named_file: Option<PathBuf>,
    origins: Vec<Resolved>,
}

/// A setting with the source of its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Key in a configuration file.
    pub key: &'static str,
    /// The value in words; empty for none.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

impl Config {
    /// Resolves every setting, with `.env` and `genvideo.toml` looked for in the current folder.
    ///
    /// # Errors
    /// The first value that is not what its setting wants, with its source; a file that cannot be read; an unknown
    /// key in a file of ours.
    pub fn resolve(flags: &Flags, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let folder = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        Self::resolve_in(&folder, flags, env)
    }

    /// [`Config::resolve`] with another folder in the place of the current one.
    ///
    /// # Errors
    /// As [`Config::resolve`].
    pub fn resolve_in(
        folder: &Path,
        flags: &Flags,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Error> {
        let mut sources = Sources::gather(folder, flags, env)?;
        let base = sources.base_folders()?;
        let data_dir = sources.path("data_dir")?;
        let data_dir = sources.or_default("data_dir", data_dir, || base.data.join("genvideo"));
        let store = sources.place("store")?;
        let store = sources.or_default("store", store, || data_dir.join("store"));
        let cache_dir = sources.path("cache_dir")?;
        let cache_dir = sources.or_default("cache_dir", cache_dir, || base.cache.join("genvideo"));
        let models_dirs = sources.paths("models_dirs")?;
        let models_dirs =
            sources.or_default("models_dirs", models_dirs, || vec![data_dir.join("models")]);
        let hf_home = sources.path("hf_home")?;
        let hf_home = sources.or_default("hf_home", hf_home, || base.cache.join("huggingface"));
        let hf_cache = sources.path("hf_cache")?;
        let hf_cache = sources.or_default("hf_cache", hf_cache, || hf_home.join("hub"));
        let mut text = |key, read: fn(&str) -> Option<String>, default: &str| {
            let value = sources.one(key, read)?;
            Ok::<_, Error>(sources.or_default(key, value, || default.to_owned()))
        };
        let device = text("device", value::device, "auto")?;
        let dtype = text("dtype", value::dtype, "auto")?;
        let memory = text("memory", value::memory, "auto")?;
        let namespace = text("namespace", value::name, "default")?;
        let task_queue = text("task_queue", value::name, "generation-queue")?;
        let log = text("log", value::name, "warn,genvideo=info")?;
        let heartbeat_timeout = sources.one("heartbeat_timeout", value::timeout)?;
        let heartbeat_timeout =
            sources.or_default("heartbeat_timeout", heartbeat_timeout, || Duration::from_secs(10));
        let checkpoint_interval = sources.one("checkpoint_interval", value::deadline)?;
        let checkpoint_interval =
            sources
                .or_default("checkpoint_interval", checkpoint_interval, || Duration::from_secs(10));
        let drain_deadline = sources.one("drain_deadline", value::deadline)?;
        let drain_deadline =
            sources.or_default("drain_deadline", drain_deadline, || Duration::from_secs(30));
        Ok(Self {
            hf_endpoint: sources.one("hf_endpoint", value::endpoint)?,
            hf_token: sources.one("hf_token", value::secret)?,
            hf_offline: sources.one("hf_offline", value::switch)?.unwrap_or(false),
            extra_model_paths: sources.paths("extra_model_paths")?.unwrap_or_default(),
            image_model: sources.one("image_model", value::name)?,
            video_model: sources.one("video_model", value::name)?,
            temporal_address: sources.one("temporal_address", value::address)?,
            temporal_cli: sources.path("temporal_cli")?,
            threads: sources.one("threads", value::threads)?.flatten(),
            shared_store: sources.one("shared_store", value::switch)?.unwrap_or(true),
            memory_limit: sources.one("memory_limit", value::bytes)?.flatten(),
            disk_quota: sources.one("disk_quota", value::bytes)?.flatten(),
            keep_results: sources.one("keep_results", value::days)?.flatten(),
            data_dir,
            store,
            cache_dir,
            models_dirs,
            hf_home,
            hf_cache,
            device,
            dtype,
            memory,
            namespace,
            task_queue,
            heartbeat_timeout,
            checkpoint_interval,
            drain_deadline,
            log,
            named_file: flags.config.as_ref().map(|file| folder.join(file)),
            origins: sources.into_origins(),
        })
    }

    /// The variables that make a process started from here resolve what was typed on the command line.
    pub fn typed(&self) -> Vec<(&'static str, OsString)> {
        let typed = |resolved: &&Resolved| matches!(resolved.origin, Origin::Flag(_));
        let value = |resolved: &Resolved| match resolved.key {
            // Folders with a separator in their name were refused when they were read.
            "models_dirs" => std::env::join_paths(&self.models_dirs).unwrap_or_default(),
            _ => OsString::from(&resolved.value),
        };
        let file = self.named_file.iter().map(|file| (CONFIG_VARIABLE, file.into()));
        let settings = self.origins.iter().filter(typed);
        file.chain(settings.filter_map(|it| Some((variable(it.key)?, value(it))))).collect()
    }

    /// Every setting with the source of its value, in the order of the documentation.
    pub fn origins(&self) -> &[Resolved] {
        &self.origins
    }
}
