//! `genvideo status`: where one job is.

use serde::Serialize;

use super::display::{describe, state};
use super::failure::Failure;
use super::output::Output;
use super::session::Session;
use crate::config::Config;
use crate::job::progress::Progress;

/// Flags of `status`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    id: String,
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    #[serde(flatten)]
    progress: &'a Progress,
}

/// Prints where the job is.
pub(crate) async fn status(
    args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let session = Session::open(config).await?;
    let progress = session.jobs.status(&args.id).await;
    session.close().await;
    print(&args.id, &progress?, output);
    Ok(())
}

/// Prints where the job `id` is.
pub(super) fn print(id: &str, progress: &Progress, output: &mut Output) {
    output.object(&Answer { id, progress });
    for line in lines(progress) {
        output.line(&line);
    }
}

fn lines(progress: &Progress) -> Vec<String> {
    let mut lines = vec![format!(
        "{}  {:.0} %  {}",
        state(progress.status),
        progress.percent,
        describe(progress)
    )];
    let extras = [
        ("error", &progress.error_message),
        ("asset", &progress.asset_url),
        ("image", &progress.image_url),
        ("done at", &progress.estimated_completion),
    ];
    for (name, value) in extras {
        if let Some(value) = value {
            lines.push(format!("{name:<7}  {value}"));
        }
    }
    lines
}
