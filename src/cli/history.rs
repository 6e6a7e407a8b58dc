//! `genvideo history`: what the server wrote down about a job, for replay tests and bug reports.

use super::failure::Failure;
use super::output::Output;
use super::session::Session;
use crate::config::Config;

/// Flags of `history`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    id: String,
}

/// Prints the history.
pub(crate) async fn history(
    args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let session = Session::open(config).await?;
    let history = session.jobs.history_json(&args.id).await;
    session.close().await;
    output.raw(String::from_utf8_lossy(&history?).trim_end());
    Ok(())
}
