//! `genvideo list`: the jobs the server knows.

use std::time::SystemTime;

use serde::Serialize;

use super::display::state;
use super::failure::Failure;
use super::output::Output;
use super::session::Session;
use crate::client::Listed;
use crate::config::Config;
use crate::job::progress::JobStatus;

/// Characters of a prompt that fit on a line.
const PROMPT_SHOWN: usize = 48;

/// Flags of `list`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// How many at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 50)]
    limit: usize,
}

#[derive(Serialize)]
struct Row<'a> {
    id: &'a str,
    run_id: &'a str,
    status: JobStatus,
    started: Option<String>,
    ended: Option<String>,
    user_id: &'a Option<String>,
    job_type: &'a Option<String>,
    prompt: &'a Option<String>,
}

/// Lists jobs, newest first.
pub(crate) async fn list(args: Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let session = Session::open(config).await?;
    let jobs = session.jobs.list(args.limit).await;
    session.close().await;
    for job in jobs? {
        output.object(&Row {
            id: &job.id,
            run_id: &job.run_id,
            status: job.status,
            started: job.started.and_then(rfc3339),
            ended: job.ended.and_then(rfc3339),
            user_id: &job.user_id,
            job_type: &job.job_type,
            prompt: &job.prompt,
        });
        output.line(&line(&job));
    }
    Ok(())
}

fn line(job: &Listed) -> String {
    let started = job.started.and_then(local).unwrap_or_else(|| "-".to_owned());
    let prompt = job.prompt.as_deref().unwrap_or("-");
    let shown: String = prompt.chars().take(PROMPT_SHOWN).collect();
    let more = if shown.len() < prompt.len() { "…" } else { "" };
    let kind = job.job_type.as_deref().unwrap_or("-");
    format!("{:<9}  {started:<19}  {kind:<5}  {}  {shown}{more}", state(job.status), job.id)
}

/// A time as programs read it.
pub(crate) fn rfc3339(time: SystemTime) -> Option<String> {
    Some(jiff::Timestamp::try_from(time).ok()?.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string())
}

fn local(time: SystemTime) -> Option<String> {
    let time = jiff::Timestamp::try_from(time).ok()?;
    Some(
        time.to_zoned_datetime(jiff::tz::TimeZone::system())
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
    )
}
