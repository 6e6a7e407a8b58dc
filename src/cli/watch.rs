//! `genvideo watch`: follow one job to its end. The job does not mind being left.

use std::path::PathBuf;

use serde::Serialize;

use super::display::Display;
use super::failure::Failure;
use super::output::Output;
use super::run::{concluded, hand_over};
use super::session::{self, Session};
use super::signals::Signals;
use crate::config::Config;
use crate::job::progress::Progress;
use crate::job::result::JobResult;

/// Flags of `watch`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    id: String,
    /// Copy the files to this folder at the end
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Serialize)]
struct Done<'a> {
    event: &'static str,
    id: &'a str,
    result: &'a JobResult,
}

/// Follows the job, and says at the end where its files are.
pub(crate) async fn watch(args: Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let signals = Signals::listen()?;
    let session = Session::open(config).await?;
    let result = follow(&session, &args.id, signals, output).await;
    session.close().await;
    let result = result?;
    if let Some(out) = &args.out {
        let store = session::store(config)?;
        return hand_over(&store, out, &args.id, &result, output);
    }
    let assets = &result.assets;
    let others = assets.images.iter().skip(1);
    let rest = [&assets.video, &assets.receipt].into_iter().flatten();
    for asset in assets.image.iter().chain(others).chain(rest) {
        output.line(&asset.url);
    }
    output.object(&Done { event: "result", id: &args.id, result: &result });
    Ok(())
}

async fn follow(
    session: &Session,
    id: &str,
    mut signals: Signals,
    output: &mut Output,
) -> Result<JobResult, Failure> {
    let mut display = Display::new(output);
    let mut show = |progress: Progress| display.show(id, &progress, output);
    tokio::select! {
        outcome = session.jobs.watch(id, &mut show) => concluded(id, outcome?),
        _ = signals.first() => Err(Failure::interrupted(format!("job `{id}` goes on unwatched"))),
    }
}
