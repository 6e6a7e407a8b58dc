//! The flags every command takes, and the configuration they end in.

use std::path::PathBuf;

use super::failure::Failure;
use crate::config::{Config, Flags};

/// Settings of the machine rather than of a job. Each has a variable and a key in the configuration file as well.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Settings")]
pub(crate) struct SettingsFlags {
    /// Print one JSON object per line instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to log to stderr, such as `info` or `warn,genvideo=debug`
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// Configuration file to read instead of the user's
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Temporal server to use instead of the embedded one
    #[arg(long, global = true, value_name = "HOST:PORT", visible_alias = "address")]
    temporal_address: Option<String>,
    /// Temporal namespace
    #[arg(long, global = true, value_name = "NAME")]
    namespace: Option<String>,
    /// Temporal task queue
    #[arg(long, global = true, value_name = "NAME")]
    task_queue: Option<String>,
    /// The `temporal` program
    #[arg(long, global = true, value_name = "FILE")]
    temporal_cli: Option<PathBuf>,
    /// Folder of the store and of the embedded server's database
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Folder of unpacked models and tools
    #[arg(long, global = true, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Folder with models; may be given again
    #[arg(long = "models-dir", global = true, value_name = "DIR")]
    models_dirs: Vec<PathBuf>,
    /// Where to compute: auto, cpu, cuda, cuda:N, metal
    #[arg(long, global = true, value_name = "DEVICE")]
    device: Option<String>,
    /// Number type: auto, f32, f16, bf16
    #[arg(long, global = true, value_name = "TYPE")]
    dtype: Option<String>,
    /// How much of a model is in memory at once: auto, low, full
    #[arg(long, global = true, value_name = "MODE")]
    memory: Option<String>,
    /// Threads for computing on the CPU, or auto
    #[arg(long, global = true, value_name = "N")]
    threads: Option<String>,
}

impl SettingsFlags {
    /// The configuration, from these flags, the environment, files and defaults.
    pub(crate) fn resolve(&self) -> Result<Config, Failure> {
        let flags = Flags {
            config: self.config.clone(),
            data_dir: self.data_dir.clone(),
            cache_dir: self.cache_dir.clone(),
            models_dirs: self.models_dirs.clone(),
            device: self.device.clone(),
            dtype: self.dtype.clone(),
            memory: self.memory.clone(),
            temporal_address: self.temporal_address.clone(),
            namespace: self.namespace.clone(),
            task_queue: self.task_queue.clone(),
            temporal_cli: self.temporal_cli.clone(),
            threads: self.threads.clone(),
            log: self.log.clone(),
            // Which model a job wants is the job's own flag; how long a worker waits is a matter of the files.
            ..Flags::default()
        };
        Ok(Config::resolve(&flags, &|name| std::env::var(name).ok())?)
    }
}
