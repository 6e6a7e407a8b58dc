//! `genvideo cancel`: stop one job, wherever it is, and wait until nothing of it is left.

use std::pin::pin;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::display::state;
use super::failure::{Failure, exit};
use super::output::{self, Output};
use super::session::Session;
use crate::client::Outcome;
use crate::config::Config;
use crate::job::progress::JobStatus;

/// How long a worker may take to stop the job and clean up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to look for an end before asking whether a worker answers for the job.
const LOOK: Duration = Duration::from_secs(1);

/// Flags of `cancel`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    id: String,
    /// Do not wait for the job to end
    #[arg(long)]
    no_wait: bool,
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    status: Option<JobStatus>,
}

/// Cancels the job.
pub(crate) async fn cancel(
    args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let session = Session::open(config).await?;
    let ended = stop(&session, &args).await;
    session.close().await;
    let status = ended?;
    output.object(&Answer { id: &args.id, status });
    output.line(&match status {
        Some(status) => format!("{}  {}", state(status), args.id),
        None => format!("asked to stop  {}", args.id),
    });
    Ok(())
}

/// Asks the job to stop; its final status when it was waited for.
async fn stop(session: &Session, args: &Args) -> Result<Option<JobStatus>, Failure> {
    let id = &args.id;
    let before = session.jobs.status(id).await?.status;
    if matches!(before, JobStatus::Completed | JobStatus::Failed | JobStatus::Cancelled) {
        let message = format!("job `{id}` has already ended: {}", state(before));
        return Err(Failure::new(exit::FAILED, "ALREADY_ENDED", message));
    }
    session.jobs.cancel(id).await?;
    if args.no_wait {
        return Ok(None);
    }
    let end = Instant::now() + PATIENCE;
    let mut ignore = |_| ();
    let mut watched = pin!(session.jobs.watch(id, &mut ignore));
    let mut unanswered = 0;
    loop {
        let attended = async {
            tokio::time::sleep(LOOK).await;
            session.jobs.is_attended(id).await
        };
        let attended = tokio::select! {
            biased;
            outcome = &mut watched => return Ok(Some(status_of(&outcome?))),
            attended = attended => attended,
        };
        unanswered = if attended { 0 } else { unanswered + 1 };
        // A worker that has much to do may miss one question.
        if unanswered == 2 {
            if let Some(outcome) = session.jobs.outcome(id).await? {
                return Ok(Some(status_of(&outcome)));
            }
            output::note("no worker answers; the job ends as soon as one is there (`genvideo up`)");
            return Ok(None);
        }
        if Instant::now() >= end {
            let seconds = PATIENCE.as_secs();
            let message = format!("job `{id}` was asked to stop, but did not within {seconds} s");
            return Err(Failure::new(exit::FAILED, "NOT_STOPPED", message)
                .hint("it may still end; `genvideo status` tells"));
        }
    }
}

fn status_of(outcome: &Outcome) -> JobStatus {
    match outcome {
        Outcome::Completed(_) => JobStatus::Completed,
        Outcome::Failed { .. } => JobStatus::Failed,
        Outcome::Cancelled(_) => JobStatus::Cancelled,
    }
}
