//! How long a stage may take and how often it is tried again: plain functions, no Temporal calls.

use std::time::Duration;

use temporalio_common::{Priority, RetryPolicy};
use temporalio_sdk::{ActivityCancellationType, ActivityOptions, WorkflowCancellationToken};

use crate::job::ValidJob;
use crate::job::class::ErrorClass;
use crate::store;

/// Attempts of a long stage. Hand-overs at a shutdown count as attempts too, so real errors and deaths are
/// counted apart (see `worker/heartbeat.rs`) and this is only the backstop.
const LONG_ATTEMPTS: u32 = 50 + MAX_PASSES;
/// Attempts of a short stage.
pub(crate) const SHORT_ATTEMPTS: u32 = 10;
/// Attempts at cleaning up: a job's end must not wait long for a broken disk, and a sweep comes later anyway.
const CLEANUP_ATTEMPTS: u32 = 3;
/// Real errors of one stage after which it is given up.
pub(crate) const MAX_ERRORS: u32 = 3;
/// Attempts that ended without a word after which a job is held to be what kills its worker.
pub(crate) const MAX_DEATHS: u32 = 3;

/// How often a worker whose device is taken gives a stage back that another one may be free for: for a minute or so.
const MAX_PASSES: u32 = 20;
/// Longest time between two of those.
const LONGEST_PASS: Duration = Duration::from_secs(4);

/// Time without a heartbeat after which a short stage is tried again.
const SHORT_SILENCE: Duration = Duration::from_secs(10);

/// Heartbeat timeout where a job's own is not known.
pub(crate) const BEAT: Duration = Duration::from_secs(10);
/// Longest time a stage lies in a queue of its host before that is asked after again.
const LONGEST_PATIENCE: Duration = Duration::from_secs(600);

/// Longest key of a user in the server's fairness, in bytes.
const MAX_FAIRNESS_KEY: usize = 64;

/// Whose turn `job` is among those that wait: by its priority, and within one by turns among the users.
pub(crate) fn turn(job: &ValidJob) -> Priority {
    let user = &job.user_id;
    let key =
        if user.len() <= MAX_FAIRNESS_KEY { user.clone() } else { store::sha256(user.as_bytes()) };
    Priority::builder().maybe_priority_key(job.priority).fairness_key(key).build()
}

/// Queue of the stages that need the device.
pub(crate) fn device_queue(base: &str) -> String {
    format!("{base}-gpu")
}

/// Queue of the stages that need a processor for long.
pub(crate) fn processor_queue(base: &str) -> String {
    format!("{base}-cpu")
}

/// Queue of the stages that need `mib` of memory on a device, or of main memory, where numbers are of type `dtype`.
pub(crate) fn room_queue(base: &str, on_cpu: bool, mib: u64, dtype: &str) -> String {
    let kind = if on_cpu { processor_queue(base) } else { device_queue(base) };
    format!("{kind}-mem-{mib}-{dtype}")
}

/// How long a host may be silent before a job whose files it has begins anew elsewhere: a restart takes less.
pub(crate) fn patience(heartbeat: Duration) -> Duration {
    heartbeat * 3
}

/// How long to wait next for a host that answers and is busy.
pub(crate) fn more(patience: Duration) -> Duration {
    (patience * 2).min(LONGEST_PATIENCE)
}

/// Queue that the queues of one host's own jobs are named after.
pub(crate) fn host_queue(base: &str, host: &str) -> String {
    format!("{base}-host-{host}")
}

/// A queue and how long a stage may lie in it before somebody asks after who works for it; `None` for ever.
pub(crate) struct Place {
    pub(crate) queue: String,
    pub(crate) patience: Option<Duration>,
}

/// Options of a stage that answers in seconds, when the store does: it outlives an outage.
pub(crate) fn short(place: Place, token: WorkflowCancellationToken) -> ActivityOptions {
    ActivityOptions::with_start_to_close_timeout(Duration::from_secs(120))
        .task_queue(place.queue)
        .maybe_schedule_to_start_timeout(place.patience)
        .cancellation_token(token)
        .heartbeat_timeout(SHORT_SILENCE)
        .cancellation_type(ActivityCancellationType::WaitCancellationCompleted)
        .retry_policy(retry(LONG_ATTEMPTS))
        .build()
}

/// Options of the publication, which no cancel stops.
pub(crate) fn publish(place: Place) -> ActivityOptions {
    short(place, WorkflowCancellationToken::new())
}

/// Options of the clean-up, which no cancel stops. It may have to wait until a dead writer is known for one.
pub(crate) fn cleanup(place: Place) -> ActivityOptions {
    ActivityOptions::with_start_to_close_timeout(Duration::from_secs(180))
        .task_queue(place.queue)
        .maybe_schedule_to_start_timeout(place.patience)
        .cancellation_token(WorkflowCancellationToken::new())
        .heartbeat_timeout(SHORT_SILENCE)
        .retry_policy(retry(CLEANUP_ATTEMPTS))
        .build()
}

/// Options of a stage that heartbeats; the workflow waits until its thread has really stopped.
pub(crate) fn long(
    place: Place,
    token: WorkflowCancellationToken,
    limit: Duration,
    heartbeat: Duration,
    turn: Priority,
) -> ActivityOptions {
    ActivityOptions::with_start_to_close_timeout(limit)
        .task_queue(place.queue)
        .maybe_schedule_to_start_timeout(place.patience)
        .cancellation_token(token)
        .heartbeat_timeout(heartbeat)
        .priority(turn)
        .cancellation_type(ActivityCancellationType::WaitCancellationCompleted)
        .retry_policy(retry(LONG_ATTEMPTS))
        .build()
}

/// After which time a stage that was given back `passes` times is to be offered again; `None` when it now stays.
pub(crate) fn pass(passes: u32) -> Option<Duration> {
    let delay = Duration::from_millis(500) * (passes + 1);
    (passes < MAX_PASSES).then(|| delay.min(LONGEST_PASS))
}

fn retry(attempts: u32) -> RetryPolicy {
    let final_classes =
        ErrorClass::ALL.iter().filter(|class| !class.retryable()).map(|class| class.name());
    RetryPolicy::builder()
        .initial_interval(Duration::from_millis(500))
        .backoff_coefficient(2.0)
        .maximum_interval(Duration::from_secs(60))
        .maximum_attempts(attempts)
        .non_retryable_error_types(final_classes.chain(["PayloadsTooLarge"]))
        .build()
}

/// The longest a stage may take: a slow processor with a large model stays far below it, a hung device does not.
pub(crate) fn limit(steps: u32, frames: u32, size: (u32, u32)) -> Duration {
    let megapixels = f64::from(size.0) * f64::from(size.1) / 1e6;
    let seconds = 900.0 + 300.0 * f64::from(steps) * f64::from(frames.max(1)) * megapixels;
    Duration::from_secs_f64(seconds.clamp(900.0, 86_400.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_given_back_for_a_minute_and_has_its_real_attempts_left() {
        let passes: Vec<Duration> = (0..).map_while(pass).collect();
        let all: Duration = passes.iter().sum();
        assert!((45..90).contains(&all.as_secs()), "{all:?}");
        assert!(passes.iter().all(|delay| *delay <= LONGEST_PASS));
        let left = LONG_ATTEMPTS - u32::try_from(passes.len()).unwrap();
        assert!(left >= 50, "{left}");
    }
}
