//! `genvideo models`: which models there are, and how they come and go.
//!
//! Only `pull` goes to the network.

mod import;
mod list;
mod pull;
mod remove;
mod show;
mod verify;

use clap::Subcommand;

use super::failure::Failure;
use super::output::Output;
use crate::config::Config;
use crate::hub::{Model, Source, Task};

/// Flags of `models`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List the models that are here, and those that can be fetched by name
    List,
    /// Say everything about one model
    Show(show::Args),
    /// Fetch a model from the hub; goes on where it stopped
    Pull(pull::Args),
    /// Take a `.safetensors` file or a diffusers folder into the models folder
    Import(import::Args),
    /// Compare models' files with the hashes that were written down when they came
    Verify(verify::Args),
    /// Remove a model that was pulled or imported
    Remove(remove::Args),
}

/// Carries out one of the sub-commands.
pub(crate) fn models(args: Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    match args.command {
        Command::List => list::list(config, output),
        Command::Show(args) => show::show(&args, config, output),
        Command::Pull(args) => pull::pull(&args, config, output),
        Command::Import(args) => import::import(&args, config, output),
        Command::Verify(args) => verify::verify(&args, config, output),
        Command::Remove(args) => remove::remove(&args, config, output),
    }
}

/// What the model makes.
fn makes(task: Task) -> &'static str {
    match task {
        Task::TextToImage => "image",
        Task::ImageToVideo => "video",
    }
}

/// Where a model is.
fn whereabouts(model: &Model) -> &'static str {
    match model.source {
        Source::Embedded => "built in",
        Source::Folder => "folder",
        Source::HfCache => "hf cache",
    }
}

/// The flag that chooses a model for a job.
fn flag(task: Task) -> &'static str {
    match task {
        Task::TextToImage => "--image-model",
        Task::ImageToVideo => "--video-model",
    }
}
