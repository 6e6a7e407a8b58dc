//! `genvideo run`: one prompt in, files out, whatever has to be started for it.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::display::Display;
use super::failure::Failure;
use super::output::{self, Output};
use super::request::{JobFlags, Request};
use super::session::{self, Session};
use super::signals::{Signals, Word};
use super::{deliver, submit};
use crate::client::{self, Outcome, Submitted, fresh_id};
use crate::config::Config;
use crate::job::progress::Progress;
use crate::job::result::JobResult;
use crate::store::Store;

/// Flags of `run`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    job: JobFlags,
    #[command(flatten)]
    handling: Handling,
}

/// What happens to a job that is started here.
#[derive(clap::Args, Debug)]
pub(crate) struct Handling {
    /// Name of the job; the same name and request join a job that is there [default: a new one]
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Folder the files are copied to
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
    /// Hand the job in, print its id and leave
    #[arg(long)]
    detach: bool,
}

#[derive(Serialize)]
struct Done<'a> {
    event: &'static str,
    id: &'a str,
    files: &'a deliver::Delivered,
    result: &'a JobResult,
}

/// Runs a job from the prompt to its files.
pub(crate) async fn run(args: Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let store = session::store(config)?;
    let request = args.job.request(&store)?;
    start(request, args.handling, store, config, output).await
}

/// Hands the request in and, unless it is left to others, works on it until its files are there.
pub(crate) async fn start(
    request: Request,
    handling: Handling,
    store: Store,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    if !handling.detach {
        deliver::prepare(&handling.out)?;
    }
    let signals = Signals::listen()?;
    let session = Session::open_anyhow(config).await?;
    let done = async {
        let submitted = submit::hand_in(
            &session,
            config,
            Some(handling.id.unwrap_or_else(fresh_id)),
            &request,
            output,
        )
        .await?;
        if handling.detach {
            submit::explain_waiting(&session);
            return Ok(());
        }
        let job = finish(&session, &submitted, &signals, output);
        let result = session.with_worker(config, job).await?;
        hand_over(&store, &handling.out, &submitted.id, &result, output)
    };
    let done = done.await;
    session.close().await;
    done
}

/// Watches the job to its end. Ctrl-C cancels it, SIGTERM leaves it for the next worker.
async fn finish(
    session: &Session,
    submitted: &Submitted,
    signals: &Signals,
    output: &mut Output,
) -> Result<JobResult, Failure> {
    let id = &submitted.id;
    let mut signals = signals.clone();
    let mut display = Display::new(output);
    let mut show = |progress: Progress| display.show(id, &progress, output);
    let watching = session.jobs.watch(id, &mut show);
    tokio::pin!(watching);
    let word = tokio::select! {
        outcome = &mut watching => return concluded(id, outcome?),
        word = signals.first() => word,
    };
    if word == Word::Terminate {
        let message = format!("stopped; job `{id}` goes on with the next worker");
        return Err(Failure::interrupted(message).hint(format!("genvideo watch {id}")));
    }
    output::note(&format!("cancelling job `{id}`; Ctrl-C once more leaves at once"));
    match session.jobs.cancel(id).await {
        Ok(()) | Err(client::Error::Ended { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    match watching.await? {
        // It was done before it heard us.
        Outcome::Completed(result) => Ok(*result),
        Outcome::Cancelled(_) => Err(Failure::interrupted(format!("job `{id}` was cancelled"))),
        failed => concluded(id, failed),
    }
}

/// The result of a job that has ended, or why there is none.
pub(crate) fn concluded(id: &str, outcome: Outcome) -> Result<JobResult, Failure> {
    match outcome {
        Outcome::Completed(result) => Ok(*result),
        Outcome::Failed { class, message, hint } => {
            let failure = Failure::of(class, format!("job `{id}` failed: {message}"));
            Err(match hint {
                Some(hint) => failure.hint(hint),
                None => failure,
            })
        }
        Outcome::Cancelled(progress) => Err(Failure::new(
            super::failure::exit::FAILED,
            "CANCELLED",
            format!("job `{id}` was {}", progress.message),
        )),
    }
}

/// Copies the files, prints where they are, and says what the user should know.
pub(crate) fn hand_over(
    store: &Store,
    out: &Path,
    id: &str,
    result: &JobResult,
    output: &mut Output,
) -> Result<(), Failure> {
    let files = deliver::copy(store, out, &result.assets)?;
    for text in &result.done.notes {
        output::note(&format!("note: {text}"));
    }
    for path in files.paths() {
        output.line(&path.display().to_string());
    }
    output.object(&Done { event: "result", id, files: &files, result });
    Ok(())
}
