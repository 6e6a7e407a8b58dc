//! The command line: what can be typed, and who carries it out.
//!
//! One file a sub-command. Data goes to stdout, words for people to stderr, a failure becomes one line, a hint and an
//! exit code here and nowhere else.

mod cancel;
mod clean;
mod deliver;
mod display;
mod doctor;
mod failure;
mod history;
mod inspect;
mod list;
mod models;
mod output;
mod render;
mod replay;
mod request;
mod run;
mod session;
mod settings;
mod signals;
mod status;
mod steer;
mod submit;
mod supervise;
mod track;
mod up;
mod verify;
mod watch;
mod worker;
mod workers;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use failure::Failure;
use output::Output;
use steer::Word;

/// A prompt goes in, an mp4 comes out, offline
#[derive(Parser, Debug)]
#[command(
    name = "genvideo",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
#[command(
    max_term_width = 110,
    after_help = "Exit codes: 0 ok, 1 job failed, 2 usage, 3 configuration, 4 model missing, \
    5 device or memory, 6 Temporal unreachable, 130 interrupted"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    settings: settings::SettingsFlags,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make a video, or an image, from a prompt: start what is missing, show progress, copy the files here
    Run(run::Args),
    /// Run a Temporal server and a worker until Ctrl-C
    Up(up::Args),
    /// Run a worker against a Temporal server
    Worker(worker::Args),
    /// Hand a job in and print its id
    Submit(submit::Args),
    /// Say where a job is
    Status(status::Args),
    /// Follow a job to its end
    Watch(watch::Args),
    /// Stop a job and remove what it left
    Cancel(cancel::Args),
    /// Let a job with --approve go on after its image
    Approve(steer::Args),
    /// End a job with --approve, since its image is not good
    Reject(steer::RejectArgs),
    /// Give a job with --approve another image
    ReplaceImage(steer::ReplaceArgs),
    /// Stop a job where it is, and free the device
    Pause(steer::Args),
    /// Let a paused job go on
    Resume(steer::Args),
    /// List the jobs the server knows, newest first
    List(list::Args),
    /// List who works for the task queue, and at what
    Workers(workers::Args),
    /// Make a video, or an image, right here, without Temporal
    Render(render::Args),
    /// Make a result again from its receipt and say where it differs
    Verify(verify::Args),
    /// Start a new job from a receipt, with changes
    Replay(replay::Args),
    /// List, fetch, import, check and remove models
    Models(models::Args),
    /// Say what a checkpoint, LoRA, PNG or mp4 is and how it was made
    Inspect(inspect::Args),
    /// Remove what no job needs any more, and results that are old enough
    Clean(clean::Args),
    /// Check that this machine can do it all, and say how to mend what cannot
    Doctor(doctor::Args),
    /// Print a job's workflow history as JSON
    #[command(hide = true)]
    History(history::Args),
}

impl Command {
    /// Whether it takes care of signals itself, or has nothing to take care of.
    fn listens(&self) -> bool {
        matches!(
            self,
            Self::Run(_)
                | Self::Up(_)
                | Self::Worker(_)
                | Self::Watch(_)
                | Self::Render(_)
                | Self::Verify(_)
                | Self::Replay(_)
                | Self::Models(_)
                | Self::Inspect(_)
        )
    }
}

#[derive(Serialize)]
struct Ended<'a> {
    event: &'static str,
    #[serde(flatten)]
    failure: &'a Failure,
}

/// Parses the command line, carries it out and says how it ended.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => {
            return mistyped(&error, Output::new(arguments.iter().any(|typed| typed == "--json")));
        }
    };
    let mut output = Output::new(cli.settings.json);
    match carry_out(cli, &mut output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => end(&failure, None, &mut output),
    }
}

/// Help that was asked for, or a usage error in our own form.
fn mistyped(error: &clap::Error, mut output: Output) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // A reader that has left is no reason to complain.
        let _ = error.print();
        return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
    }
    let text = error.to_string();
    let mut paragraphs = text.strip_prefix("error: ").unwrap_or(&text).split("\n\n");
    let message = paragraphs.next().unwrap_or_default().split_whitespace().collect::<Vec<_>>();
    let rest: Vec<&str> = paragraphs.flat_map(str::lines).map(str::trim).collect();
    let tip = rest.iter().find_map(|line| line.strip_prefix("tip: "));
    let failure = Failure::usage(message.join(" ")).hint(tip.map_or_else(
        || "`--help` shows what can be typed".to_owned(),
        |tip| tip.replace('\'', "`"),
    ));
    let usage = rest.iter().find(|line| line.starts_with("Usage: "));
    end(&failure, usage.copied(), &mut output)
}

/// Says why it did not work: an object for programs, a line and a hint for people, the exit code for the shell.
fn end(failure: &Failure, usage: Option<&str>, output: &mut Output) -> ExitCode {
    output.object(&Ended { event: "error", failure });
    output::note(&format!("genvideo: {}", failure.message));
    if let Some(usage) = usage {
        output::note(usage);
    }
    if let Some(hint) = &failure.hint {
        output::note(&format!("hint: {hint}"));
    }
    ExitCode::from(failure.exit)
}

fn carry_out(cli: Cli, output: &mut Output) -> Result<(), Failure> {
    let config = cli.settings.resolve()?;
    let default_log =
        if matches!(cli.command, Command::Up(_) | Command::Worker(_)) { "info" } else { "warn" };
    start_log(&config, default_log)?;
    if let Ok(faults) = std::env::var(crate::config::FAILPOINTS_VARIABLE) {
        crate::failpoint::arm(&faults).map_err(|message| {
            Failure::new(failure::exit::CONFIG, "CONFIG", format!("failpoints: {message}"))
        })?;
    }
    // Before the runtime's threads ask for any.
    crate::engine::device::keep_freed_memory();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|error| {
            Failure::of(
                crate::job::class::ErrorClass::Bug,
                format!("cannot start the runtime: {error}"),
            )
        })?;
    let done = runtime.block_on(async {
        let listens = cli.command.listens();
        let mut command = std::pin::pin!(dispatch(cli.command, &config, output));
        tokio::select! {
            done = &mut command => done,
            // Dropped, a command lets go of the server it may have started.
            _ = tokio::signal::ctrl_c(), if !listens => Err(Failure::interrupted("interrupted")),
            () = signals::again() => Err(Failure::interrupted("interrupted")),
        }
    });
    // A blocking thread that does not come back must not hold the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    done
}

async fn dispatch(command: Command, config: &Config, output: &mut Output) -> Result<(), Failure> {
    match command {
        Command::Run(args) => run::run(args, config, output).await,
        Command::Up(args) => up::up(args, config, output).await,
        Command::Worker(args) => worker::worker(args, config, output).await,
        Command::Submit(args) => submit::submit(args, config, output).await,
        Command::Status(args) => status::status(args, config, output).await,
        Command::Watch(args) => watch::watch(args, config, output).await,
        Command::Cancel(args) => cancel::cancel(args, config, output).await,
        Command::Approve(args) => steer::steer(Word::Approve(args), config, output).await,
        Command::Reject(args) => steer::steer(Word::Reject(args), config, output).await,
        Command::ReplaceImage(args) => steer::steer(Word::ReplaceImage(args), config, output).await,
        Command::Pause(args) => steer::steer(Word::Pause(args), config, output).await,
        Command::Resume(args) => steer::steer(Word::Resume(args), config, output).await,
        Command::List(args) => list::list(args, config, output).await,
        Command::Workers(args) => workers::workers(args, config, output).await,
        Command::Render(args) => render::render(args, config, output).await,
        Command::Verify(args) => verify::verify(args, config, output).await,
        Command::Replay(args) => replay::replay(args, config, output).await,
        Command::Models(args) => models::models(args, config, output),
        Command::Inspect(args) => inspect::inspect(&args, output),
        Command::Clean(args) => clean::clean(&args, config, output),
        Command::Doctor(args) => doctor::doctor(args, config, output).await,
        Command::History(args) => history::history(args, config, output).await,
    }
}

/// The log goes to stderr; `--log`, `GENVIDEO_LOG` and `RUST_LOG` speak the same language.
fn start_log(config: &Config, default: &str) -> Result<(), Failure> {
    let filter = if config.log.is_empty() { default } else { &config.log };
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Failure::new(failure::exit::CONFIG, "CONFIG", format!("log filter `{filter}`: {error}"))
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| output::LogWriter)
        .with_ansi(output::is_live() && std::env::var_os("NO_COLOR").is_none())
        .with_target(false)
        // Whoever read stderr may be gone; telling stderr of it would end the process.
        .log_internal_errors(false)
        .init();
    Ok(())
}
