//! `genvideo workers`: who works for the task queue, and at what.

use std::time::SystemTime;

use serde::Serialize;

use super::failure::Failure;
use super::list::rfc3339;
use super::output::{self, Output};
use super::session::Session;
use crate::client::Worker;
use crate::config::Config;
use crate::worker::fleet;

/// Flags of `workers`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Row<'a> {
    identity: &'a str,
    alive: bool,
    device: &'a str,
    /// Bytes that a run may take.
    memory: Option<u64>,
    queues: &'a [String],
    last_seen: Option<String>,
    stages: Vec<Stage<'a>>,
}

#[derive(Serialize)]
struct Stage<'a> {
    job: &'a str,
    activity: &'a str,
    attempt: u32,
    since: Option<String>,
}

/// Lists the workers, those heard of last first.
pub(crate) async fn workers(
    _args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let session = Session::open_running(config).await?;
    let found = session.jobs.workers(&config.task_queue).await;
    session.close().await;
    let (found, now) = (found?, SystemTime::now());
    if found.is_empty() {
        output::note(&format!(
            "nobody works for task queue `{}`; `genvideo worker` does",
            config.task_queue
        ));
    }
    for worker in &found {
        let stages = worker.stages.iter().map(|stage| Stage {
            job: &stage.job,
            activity: &stage.activity,
            attempt: stage.attempt,
            since: stage.since.and_then(rfc3339),
        });
        let machine = worker.machine();
        output.object(&Row {
            identity: &worker.identity,
            alive: worker.is_alive(now),
            device: machine.device,
            memory: machine.memory,
            queues: &worker.queues,
            last_seen: worker.last_seen.and_then(rfc3339),
            stages: stages.collect(),
        });
        output.line(&line(worker, now));
    }
    Ok(())
}

fn line(worker: &Worker, now: SystemTime) -> String {
    let state = match (worker.is_alive(now), worker.stages.is_empty()) {
        (false, _) => "silent",
        (true, true) => "idle",
        (true, false) => "working",
    };
    let ago = |time: SystemTime| now.duration_since(time).unwrap_or_default().as_secs();
    let seen = worker.last_seen.map_or_else(String::new, |time| format!("{} s ago", ago(time)));
    let mut line = format!("{state:<7}  {seen:<10}  {}", fleet::spoken(&worker.identity));
    for stage in &worker.stages {
        let since = stage.since.map_or(0, ago);
        line.push_str(&format!(
            "\n  {} of {}, attempt {}, {since} s",
            stage.activity, stage.job, stage.attempt
        ));
    }
    line
}
