//! Workers that die or freeze: at a named point, at a random moment.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::field::{Field, HEARTBEAT, Quiet, Trial, Visit, files_of, signal, tick};
use super::tally::Row;

/// Where the store's lock is held alone: whoever stops there holds up everybody else.
const ALONE: &str = "cleanup";

/// A source of numbers that look random.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `end` (xorshift64*, Vigna 2016).
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % end.max(1)
    }
}

pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

/// A job with one trap in its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trap<'a> {
    pub(crate) point: &'a str,
    pub(crate) action: &'a str,
    /// Visits that pass.
    pub(crate) skip: u32,
}

impl Trap<'_> {
    pub(crate) fn text(&self, trial: &Trial<'_>) -> String {
        let Self { point, action, skip } = self;
        format!("{point}={action},skip={skip},once={}", trial.mark().display())
    }
}

/// A place in the first half of the visits of `point`.
pub(crate) fn somewhere(quiet: &Quiet, point: &str, dice: &mut Dice) -> u32 {
    let visits = quiet.visits.get(point).copied().unwrap_or(1);
    u32::try_from(dice.below(u64::from(visits / 2).max(1))).unwrap()
}

/// Kills the worker at `point` of the job, once.
pub(crate) async fn kill_at(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    trap: Trap<'_>,
    row: &mut Row,
) {
    let mut trial = field.trial(&format!("kill-{}", trap.point));
    let faults = trap.text(&trial);
    trial.work(&faults);
    let id = trial.submit(input).await;
    let killed = trial.marked(&id).await;
    judge(&mut trial, &id, quiet, row).await;
    match killed {
        None => row.say(format!("{} was not come to {} times", trap.point, trap.skip + 1)),
        Some(process) => {
            row.faults += 1;
            let trace = trial.trace();
            let death = trace.iter().rfind(|visit| visit.process == process).unwrap().at;
            note_times(&trace, process, death, row);
        }
    }
}

/// Notes how soon somebody else went on, and how much of a stage's work was not kept.
fn note_times(trace: &[Visit], process: u32, death: u64, row: &mut Row) {
    if let Some(next) = trace.iter().find(|visit| visit.process != process && visit.at >= death) {
        row.times.push(next.at - death);
    }
    let before: Vec<&Visit> =
        trace.iter().filter(|v| v.process == process && v.at <= death).collect();
    let in_engine = [
        "model_loaded",
        "text_encoded",
        "step_done",
        "chunk_decoded",
        "checkpoint_begun",
        "checkpoint_put",
        "checkpoint_marked",
    ];
    if before.last().is_some_and(|visit| in_engine.contains(&visit.point.as_str())) {
        let kept = before
            .iter()
            .rfind(|v| ["checkpoint_marked", "model_loaded"].contains(&v.point.as_str()));
        row.work.extend(kept.map(|kept| death - kept.at));
    }
}

/// Waits for the job, ends the workers, and counts what an invariant forbids.
pub(crate) async fn judge(trial: &mut Trial<'_>, id: &str, quiet: &Quiet, row: &mut Row) {
    let result = match trial.result(id).await {
        Ok(result) => result,
        Err(outcome) => {
            row.lost += 1;
            row.say(format!("{id}: {outcome:?}; {}", trial.logs()));
            return;
        }
    };
    if files_of(&result) != quiet.files {
        row.different += 1;
        row.say(format!("{id}: {:?}, undisturbed {:?}", files_of(&result), quiet.files));
    }
    for worker in &trial.workers {
        worker.stop().await;
    }
    let trace = trial.trace();
    let count = |point: &str| {
        u32::try_from(trace.iter().filter(|visit| visit.point == point).count()).unwrap()
    };
    row.doubled += count("manifest_written").saturating_sub(1);
    row.retries += count("stage_begun").saturating_sub(quiet.visits["stage_begun"]);
    let job = [(id.to_owned(), result)];
    let left = trial.leaked(&job);
    if left.is_empty() {
        return;
    }
    let store = genvideo::store::Store::open(&trial.folder.join("store")).unwrap();
    store.sweep(Duration::ZERO).unwrap();
    let leaked = trial.leaked(&job);
    row.swept += u32::try_from(left.len() - leaked.len()).unwrap();
    row.leaked += u32::try_from(leaked.len()).unwrap();
    if !leaked.is_empty() {
        row.say(format!("{id}: {leaked:?}"));
    }
}

/// Kills a worker at a random moment of a job, with or without the process that watches over it.
pub(crate) async fn kill_any_time(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    dice: &mut Dice,
    row: &mut Row,
) {
    let mut trial = field.trial("random");
    trial.work("");
    let id = trial.submit(input).await;
    let took = u64::try_from(quiet.took.as_millis()).unwrap();
    let moment = Duration::from_millis(dice.below(took));
    let is_over = tokio::select! {
        _ = trial.outcome(&id) => true,
        () = tick(moment) => false,
    };
    let death = now();
    let at_work = trial.trace().last().map(|visit| visit.process);
    let watcher = trial.workers[0].process();
    if !is_over {
        row.faults += 1;
        // Half of the deaths take the watching process with them, as a power cut would.
        let both = dice.below(2) == 0;
        for process in watcher.filter(|_| both || at_work.is_none()).into_iter().chain(at_work) {
            signal(process, libc::SIGKILL);
        }
    }
    judge(&mut trial, &id, quiet, row).await;
    if let Some(process) = at_work.filter(|_| !is_over) {
        note_times(&trial.trace(), process, death, row);
    }
}

/// When a frozen worker goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Thaw {
    /// When the job has its result.
    AfterTheResult,
    /// When somebody else works on the same stage.
    WhileAnotherWorks,
    /// A little later than it is held for dead.
    AfterItsTime,
}

/// Freezes a worker at `point`, lets another one take over, and wakes it up.
pub(crate) async fn zombie(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    (trap, thaw): (Trap<'_>, Thaw),
    row: &mut Row,
) {
    let mut trial = field.trial(&format!("zombie-{}", trap.point));
    let faults = trap.text(&trial);
    trial.work(&faults);
    trial.work(&faults);
    let id = trial.submit(input).await;
    let Some(process) = trial.marked(&id).await else {
        row.say(format!("{} was not come to {} times", trap.point, trap.skip + 1));
        return;
    };
    row.faults += 1;
    let frozen = now();
    let watcher = parent(process)
        .filter(|watcher| trial.workers.iter().any(|worker| worker.process() == Some(*watcher)));
    let all =
        |number| watcher.into_iter().chain([process]).for_each(|process| signal(process, number));
    all(libc::SIGSTOP);
    let thaw = if trap.point == ALONE { Thaw::AfterItsTime } else { thaw };
    match thaw {
        Thaw::AfterTheResult => drop(trial.outcome(&id).await),
        Thaw::AfterItsTime => tick(HEARTBEAT + Duration::from_secs(4)).await,
        Thaw::WhileAnotherWorks => {
            let other = async {
                while !trial.trace().iter().any(|v| v.process != process && v.at >= frozen) {
                    tick(Duration::from_millis(10)).await;
                }
            };
            tokio::select! { () = other => {}, _ = trial.outcome(&id) => {} }
        }
    }
    all(libc::SIGCONT);
    judge(&mut trial, &id, quiet, row).await;
    note_times(&trial.trace(), process, frozen, row);
}

/// The parent of a process, where the system says so in `/proc`.
fn parent(process: u32) -> Option<u32> {
    let state = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // After the name in parentheses: state, parent.
    state.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}
