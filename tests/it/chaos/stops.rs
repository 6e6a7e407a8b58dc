//! Workers that are told to stop, jobs that are cancelled, disks that are full, jobs that kill their worker.

use std::time::{Duration, Instant};

use genvideo::client::Outcome;
use genvideo::job::class::ErrorClass;
use serde_json::Value;

use super::deaths::{Trap, judge, now};
use super::field::{Field, Quiet, files_of, small, tick};
use super::tally::Row;
use crate::support::within;

/// Longest an orderly end may take.
pub(crate) const END_WITHIN: Duration = Duration::from_secs(30);
/// Longest until the next attempt begins once the worker has ended; a start of the program is in it.
pub(crate) const NEXT_WITHIN: Duration = Duration::from_secs(3);
/// Longest that a running job lives on after a cancel, a stalled step and the clean-up in it.
pub(crate) const CANCEL_WITHIN: Duration = Duration::from_millis(1500 + 100 + 2000);
/// Longest that a job that waits lives on after a cancel.
pub(crate) const CANCEL_QUEUED_WITHIN: Duration = Duration::from_secs(1);

/// Sends SIGTERM to the worker while it is at `trap`; another one goes on. The row's times are those of the end; gives
/// the milliseconds from there to the next attempt.
pub(crate) async fn terminate_at(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    trap: Trap<'_>,
    row: &mut Row,
) -> Option<u64> {
    let mut trial = field.trial(&format!("term-{}", trap.point));
    let faults = trap.text(&trial);
    trial.work(&faults);
    let id = trial.submit(input).await;
    let Some(process) = trial.marked(&id).await else {
        row.say(format!("{} was not come to {} times", trap.point, trap.skip + 1));
        return None;
    };
    row.faults += 1;
    let took = trial.workers[0].stop().await;
    let ended = now();
    row.times.push(u64::try_from(took.as_millis()).unwrap());
    trial.work("");
    judge(&mut trial, &id, quiet, row).await;
    let trace = trial.trace();
    let next = trace.iter().find(|visit| visit.process != process && visit.at >= ended)?;
    Some(next.at - ended)
}

/// A worker that is told to stop a second time leaves at once, whatever its stage is at; another one goes on.
pub(crate) async fn told_twice(field: &Field, (input, quiet): (&Value, &Quiet), row: &mut Row) {
    let mut trial = field.trial("twice");
    let faults = Trap { point: "step_done", action: "stall:600000", skip: 2 }.text(&trial);
    trial.work(&faults);
    let id = trial.submit(input).await;
    trial.marked(&id).await.expect("the job comes there");
    trial.workers[0].signal(libc::SIGTERM, true);
    within("a worker that has heard", async {
        while !trial.logs().contains("once more to leave at once") {
            tick(Duration::from_millis(5)).await;
        }
    })
    .await;
    trial.workers[0].stop().await;
    row.faults += 1;
    let log = trial.logs();
    if log.contains("still at work") {
        row.lost += 1;
        row.say(format!("it waited for its stage; {log}"));
    }
    trial.work("");
    judge(&mut trial, &id, quiet, row).await;
}

/// Cancels the job while it is at `trap`; no file stays.
pub(crate) async fn cancel_at(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    trap: Trap<'_>,
    row: &mut Row,
) {
    let mut trial = field.trial(&format!("cancel-{}", trap.point));
    let faults = trap.text(&trial);
    trial.work(&faults);
    let id = trial.submit(input).await;
    if trial.marked(&id).await.is_none() {
        row.say(format!("{} was not come to {} times", trap.point, trap.skip + 1));
        return;
    }
    let start = Instant::now();
    let asked = trial.field.jobs.cancel(&id).await;
    match trial.outcome(&id).await {
        Outcome::Cancelled(_) => {
            asked.unwrap();
            row.faults += 1;
            row.times.push(u64::try_from(start.elapsed().as_millis()).unwrap());
            trial.workers[0].stop().await;
            let left = trial.leaked(&[]);
            row.leaked += u32::try_from(left.len()).unwrap();
            if !left.is_empty() {
                row.say(format!("{} left {left:?}", trap.point));
            }
        }
        // It was published before it heard: the one other outcome.
        Outcome::Completed(_) => judge(&mut trial, &id, quiet, row).await,
        other => {
            row.lost += 1;
            row.say(format!("{}: {other:?}; {}", trap.point, trial.logs()));
        }
    }
}

/// Cancels jobs that wait behind one that holds the device.
pub(crate) async fn cancel_queued(field: &Field, count: u32, row: &mut Row) {
    let mut trial = field.trial("queued");
    let mark = trial.mark();
    trial.work(&format!("step_done=stall:600000,once={}", mark.display()));
    let input = small("video");
    let first = trial.submit(&input).await;
    trial.marked(&first).await.expect("the first job is at its first step");
    for _ in 0..count {
        let id = trial.submit(&small("image")).await;
        // Planned: it waits for the device from now on.
        let planned =
            |visits: usize| trial.trace().iter().filter(|v| v.point == "planned").count() > visits;
        let before = row.faults as usize + 1;
        while !planned(before) {
            tick(Duration::from_millis(5)).await;
        }
        let start = Instant::now();
        field.jobs.cancel(&id).await.unwrap();
        match trial.outcome(&id).await {
            Outcome::Cancelled(_) => {
                row.faults += 1;
                row.times.push(u64::try_from(start.elapsed().as_millis()).unwrap());
            }
            other => {
                row.lost += 1;
                row.say(format!("{other:?}"));
                return;
            }
        }
    }
}

/// Lets every write at `point` fail for want of room; then there is room again.
pub(crate) async fn full_at(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    point: &str,
    row: &mut Row,
) {
    let mut trial = field.trial(&format!("full-{point}"));
    trial.work(&format!("{point}=error:ENOSPC"));
    let id = trial.submit(input).await;
    let outcome = trial.outcome(&id).await;
    row.faults += 1;
    if !matches!(&outcome, Outcome::Failed { class: ErrorClass::DiskFull, .. }) {
        row.lost += 1;
        row.say(format!("{point}: {outcome:?}"));
    }
    trial.workers[0].stop().await;
    let left = trial.leaked(&[]);
    row.leaked += u32::try_from(left.len()).unwrap();
    if !left.is_empty() {
        row.say(format!("{point} left {left:?}"));
    }
    trial.work("");
    let id = trial.submit(input).await;
    match trial.result(&id).await {
        Ok(result) if files_of(&result) == quiet.files => {}
        other => {
            row.lost += 1;
            row.say(format!("{point}, with room again: {other:?}"));
        }
    }
}

/// A small file system of its own, where the system lets us mount one.
struct Disk(std::path::PathBuf);

impl Disk {
    fn mount(folder: &std::path::Path) -> Option<Self> {
        std::fs::create_dir_all(folder).unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=96m", "tmpfs"]).arg(folder);
        mount.status().is_ok_and(|status| status.success()).then(|| Self(folder.to_owned()))
    }

    /// Takes every byte that is left.
    fn fill(&self) {
        use std::io::Write;
        let mut ballast = std::fs::File::create(self.0.join("ballast")).unwrap();
        while ballast.write_all(&[0; 4096]).is_ok() {}
    }

    fn clear(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        std::process::Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

/// Fills the disk of the store while the job is at `point`; then there is room again. `false` when nothing can be
/// mounted here.
pub(crate) async fn fill_at(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    point: &str,
    row: &mut Row,
) -> bool {
    let mut trial = field.trial(&format!("fill-{point}"));
    let Some(disk) = Disk::mount(&trial.folder.join("store")) else { return false };
    let faults = Trap { point, action: "stall:1000", skip: 0 }.text(&trial);
    trial.work(&faults);
    let id = trial.submit(input).await;
    trial.marked(&id).await.expect("the job comes there");
    disk.fill();
    let outcome = trial.outcome(&id).await;
    row.faults += 1;
    if !matches!(&outcome, Outcome::Failed { class: ErrorClass::DiskFull, .. }) {
        row.lost += 1;
        row.say(format!("{point}: {outcome:?}"));
    }
    disk.clear();
    let id = trial.submit(input).await;
    judge(&mut trial, &id, quiet, row).await;
    true
}

/// A job that takes its worker with it each time is given up, and said to be what it is; the worker goes on.
pub(crate) async fn poison(field: &Field, row: &mut Row) {
    for (point, cause) in [("text_encoded", "it aborted"), ("manifest_begun", "died")] {
        let mut trial = field.trial(&format!("poison-{point}"));
        trial.work(&format!("{point}=abort"));
        let id = trial.submit(&small("video")).await;
        row.faults += 1;
        let outcome = trial.outcome(&id).await;
        let log = trial.logs();
        match &outcome {
            Outcome::Failed { class: ErrorClass::Poison, message, .. }
                if message.contains(cause) && log.contains("died with the worker") => {}
            _ => {
                row.lost += 1;
                row.say(format!("{point}: {outcome:?}; {log}"));
            }
        }
        trial.workers[0].stop().await;
        row.leaked += u32::try_from(trial.leaked(&[]).len()).unwrap();
    }
}

/// A stage that ran out of memory goes on from its last step in the form that needs least, and says so.
pub(crate) async fn out_of_memory(field: &Field, (input, quiet): (&Value, &Quiet), row: &mut Row) {
    for point in ["model_loaded", "step_done"] {
        let mut trial = field.trial(&format!("memory-{point}"));
        let faults = Trap { point, action: "error:OUT_OF_MEMORY", skip: 1 }.text(&trial);
        trial.work(&faults);
        let id = trial.submit(input).await;
        row.faults += 1;
        let result = trial.result(&id).await;
        let notes =
            result.map(|result| result.done.notes).map_err(|outcome| format!("{outcome:?}"));
        let is_said = |notes: &Vec<String>| notes.iter().any(|note| note.contains("ran out"));
        let steps = trial.trace().iter().filter(|visit| visit.point == "step_done").count();
        if !notes.as_ref().is_ok_and(is_said) || steps != quiet.visits["step_done"] as usize {
            row.lost += 1;
            row.say(format!("{point}: {notes:?} after {steps} steps; {}", trial.logs()));
        }
    }
}

/// An error of the device may stay with the process, so another process tries again.
pub(crate) async fn broken_device(field: &Field, (input, quiet): (&Value, &Quiet), row: &mut Row) {
    let mut trial = field.trial("device");
    let faults = Trap { point: "step_done", action: "error:DEVICE_ERROR", skip: 2 }.text(&trial);
    trial.work(&faults);
    let id = trial.submit(input).await;
    row.faults += 1;
    judge(&mut trial, &id, quiet, row).await;
    let trace = trial.trace();
    let processes: std::collections::BTreeSet<u32> =
        trace.iter().map(|visit| visit.process).collect();
    if processes.len() != 2 {
        row.lost += 1;
        row.say(format!("processes {processes:?}, wanted two; {}", trial.logs()));
    }
}
