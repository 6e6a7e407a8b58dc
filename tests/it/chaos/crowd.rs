//! Many jobs at once, and faults for minutes on end.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::StreamExt;
use genvideo::client::Outcome;
use genvideo::job::result::JobResult;
use serde_json::Value;

use super::deaths::{Dice, Thaw, Trap, kill_any_time, somewhere, zombie};
use super::field::{Field, Quiet, Trial, files_of, signal, small, tick};
use super::outages::{What, outage};
use super::stops::cancel_at;
use super::tally::Row;

/// Hands in `count` images at once, kills the worker and the server on the way, and counts results.
pub(crate) async fn queue(field: &Field, count: u32, row: &mut Row) {
    let input = small("image");
    let quiet = field.quiet(&input).await;
    let mut trial = field.trial("queue");
    trial.work("");
    let submit = |_| trial.submit(&input);
    let ids: Vec<String> =
        futures::stream::iter(0..count).map(submit).buffer_unordered(8).collect().await;
    for share in [4, 2] {
        settled(&trial, count as usize / share).await;
        row.faults += 2;
        if let Some(visit) = trial.trace().last() {
            signal(visit.process, libc::SIGKILL);
        }
        field.server.kill();
        tick(Duration::from_secs(1)).await;
        field.server.begin();
    }
    let outcomes =
        futures::stream::iter(&ids).map(|id| async { (id.clone(), trial.result(id).await) });
    let mut results = Vec::new();
    let mut outcomes = std::pin::pin!(outcomes.buffer_unordered(8));
    while let Some((id, outcome)) = outcomes.next().await {
        results.extend(count_in(row, &quiet, id, outcome));
    }
    trial.workers[0].stop().await;
    let manifests = trial.trace().iter().filter(|visit| visit.point == "manifest_written").count();
    row.doubled += u32::try_from(manifests.saturating_sub(results.len())).unwrap();
    row.leaked += u32::try_from(trial.leaked(&results).len()).unwrap();
}

/// Counts how the job `id` ended; its result, if it has one.
fn count_in(
    row: &mut Row,
    quiet: &Quiet,
    id: String,
    outcome: Result<JobResult, Outcome>,
) -> Option<(String, JobResult)> {
    match outcome {
        Ok(result) => {
            row.different += u32::from(files_of(&result) != quiet.files);
            Some((id, result))
        }
        Err(outcome) => {
            row.lost += 1;
            row.say(format!("{id}: {outcome:?}"));
            None
        }
    }
}

/// Waits until so many manifests are written.
async fn settled(trial: &Trial<'_>, count: usize) {
    while trial.trace().iter().filter(|visit| visit.point == "manifest_written").count() < count {
        tick(Duration::from_millis(200)).await;
    }
}

/// A fault in every job for `time`, while one worker that nobody touches is watched for its memory.
pub(crate) async fn soak(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    (time, dice): (Duration, &mut Dice),
    row: &mut Row,
) {
    let mut steady = field.trial("steady");
    steady.work("");
    let mut memory = Vec::new();
    let mut results = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time || memory.len() < 6 {
        let id = steady.submit(input).await;
        match dice.below(5) {
            0 => {
                outage(field, (input, quiet), (What::Server, Duration::from_secs(1), dice), row)
                    .await
            }
            1 => {
                outage(field, (input, quiet), (What::Way, Duration::from_secs(2), dice), row).await
            }
            2 => {
                let skip = somewhere(quiet, "step_done", dice);
                let trap = Trap { point: "step_done", action: "freeze", skip };
                zombie(field, (input, quiet), (trap, Thaw::AfterTheResult), row).await;
            }
            3 => {
                let trap = Trap { point: "chunk_decoded", action: "stall:100", skip: 0 };
                cancel_at(field, (input, quiet), trap, row).await;
            }
            _ => kill_any_time(field, (input, quiet), dice, row).await,
        }
        let outcome = steady.result(&id).await;
        results.extend(count_in(row, quiet, id, outcome));
        let process = steady.trace().last().map(|visit| visit.process);
        memory.extend(process.and_then(resident));
    }
    let processes: BTreeSet<u32> = steady.trace().iter().map(|visit| visit.process).collect();
    steady.workers[0].stop().await;
    row.leaked += u32::try_from(steady.leaked(&results).len()).unwrap();
    let (third, last) = (memory[2], memory[memory.len() - 1]);
    row.out_of_bounds += u32::from(last * 100 > third * 105);
    row.said.push(format!(
        "{} jobs of a worker that nobody touched ({} process): {} MiB after three, {} MiB at the end",
        memory.len(),
        processes.len(),
        third / 1024,
        last / 1024
    ));
}

/// Resident memory of a process in KiB.
fn resident(process: u32) -> Option<u64> {
    let state = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = state.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}
