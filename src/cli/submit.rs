//! `genvideo submit`: hand a job in and leave.

use serde::Serialize;

use super::failure::Failure;
use super::output::{self, Output};
use super::request::{JobFlags, Request};
use super::session::{self, Session};
use crate::client::{Submit, Submitted};
use crate::config::Config;

/// Flags of `submit`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    job: JobFlags,
    /// Name of the job; the same name and request join a job that is there [default: a new one, or with --seed one
    /// that follows from the request]
    #[arg(long, value_name = "ID")]
    id: Option<String>,
}

#[derive(Serialize)]
struct HandedIn<'a> {
    event: &'static str,
    id: &'a str,
    run_id: &'a str,
    joined: bool,
    address: &'a str,
    ui: Option<String>,
}

/// Hands a job in.
pub(crate) async fn submit(
    args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let request = args.job.request(&session::store(config)?)?;
    let session = Session::open(config).await?;
    let done = hand_in(&session, config, args.id, &request, output).await;
    if let Ok(submitted) = &done {
        output.line(&submitted.id);
        explain_waiting(&session);
    }
    session.close().await;
    done.map(drop)
}

/// Starts the workflow and says where it can be watched.
pub(crate) async fn hand_in(
    session: &Session,
    config: &Config,
    id: Option<String>,
    request: &Request,
    output: &mut Output,
) -> Result<Submitted, Failure> {
    let order = Submit { id, input: request.bytes.clone(), queue: config.task_queue.clone() };
    let submitted = session.jobs.submit(order).await?;
    let verb = if submitted.joined { "joined" } else { "job" };
    output::note(&format!("{verb} `{}` on {}", submitted.id, session.target.address));
    if let Some(ui) = session.ui_url() {
        output::note(&format!("web ui {ui}"));
    }
    output.object(&HandedIn {
        event: "submitted",
        id: &submitted.id,
        run_id: &submitted.run_id,
        joined: submitted.joined,
        address: &session.target.address,
        ui: session.ui_url(),
    });
    Ok(submitted)
}

/// Tells that a job on the embedded server waits for somebody to work.
pub(crate) fn explain_waiting(session: &Session) {
    if session.is_embedded() {
        output::note("the job waits in the data folder; `genvideo up` works on it");
    }
}
