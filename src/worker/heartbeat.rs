//! Between a blocking stage and Temporal: its reports become heartbeats and now and then a signal to the workflow;
//! a cancel becomes a break of its hook.
//!
//! The stage runs on its own thread and only writes the latest report and reads one flag. The async side beats on a
//! timer as well, so that a long load or one slow step does not look like a dead worker. Start from `drive`.

use std::future::Future;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use temporalio_client::{RpcOptions, UntypedSignal, WorkflowSignalOptions};
use temporalio_common::UntypedWorkflow;
use temporalio_common::data_converters::{PayloadConverter, RawValue};
use temporalio_common::error::ApplicationFailure;
use temporalio_sdk::activities::{ActivityContext, ActivityError};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

use super::at_work::{Entry, Turn};
use super::progress::Band;
use super::request::Update;
use super::stage_thread::StageThread;
use super::{failure, policy, request};
use crate::job::SIGNAL_PROGRESS;
use crate::job::class::ErrorClass;
use crate::job::progress::{Detail, JobStatus, Step};
use crate::render::{self, Hook, Report};

/// Longest time between two beats.
const BEAT: Duration = Duration::from_secs(1);
/// How long a short stage takes at most when nothing is wrong; one that kills its worker has done so by then.
const SUSPICIOUS: Duration = Duration::from_secs(20);
/// A stage that ends sooner sends no signal: it would only make the next one wait.
const SIGNAL_FIRST: Duration = Duration::from_secs(1);
/// Shortest time between two signals.
const SIGNAL_GAP: Duration = Duration::from_secs(2);
/// Longest time between two signals while something moves.
const SIGNAL_REST: Duration = Duration::from_secs(60);
/// Time after which a new unit of work is worth a signal of its own.
const SIGNAL_STAGE: Duration = Duration::from_secs(10);
/// Percent that make a signal worth its four history events: a job of a few stages stays below sixty of them.
const SIGNAL_PERCENT: f64 = 8.0;

/// Heartbeat details: how far the stage is, for watchers and for the next attempt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// What the stage is called in the job's messages, for example `video, part 2 of 3`.
    #[serde(default)]
    pub title: String,
    /// Unit of work, as in [`Detail`].
    pub stage: String,
    /// Units done.
    pub done: u64,
    /// Units in all.
    pub total: u64,
    /// Percent of the whole job.
    #[serde(default)]
    pub percent: f64,
    /// Attempts before this one that ended without a word.
    #[serde(default)]
    pub deaths: u32,
    /// Whether it waits for its turn in the process or on the device; a death meanwhile is not this one's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waiting: bool,
    /// Attempts before and including this one that ended with an error.
    #[serde(default)]
    pub errors: u32,
    /// How often a worker gave the stage back because its device was taken.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub passes: u32,
    /// Set in the last beat of an attempt that ended in order.
    #[serde(default)]
    pub closed: bool,
    /// Attempt that beats, from 1.
    #[serde(default)]
    pub attempt: u32,
    /// Whether the stage has reported in this attempt: it is at work again.
    #[serde(default)]
    pub reported: bool,
    /// Why there is this attempt after another one; in the last beat of one that failed, why it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What the worker of this attempt died of, where somebody watched over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub death: Option<String>,
    /// SHA-256 of the newest checkpoint in the job's work, for the next attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// The host queue of who is at work, where what it makes is nowhere else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

impl Beat {
    /// The attempt that there is, or will be, because of the cause.
    fn next_attempt(&self) -> u32 {
        if self.closed { self.attempt + 1 } else { self.attempt }
    }

    /// Whether the stage is at work in this attempt.
    pub(crate) fn is_at_work(&self, attempt: u32) -> bool {
        self.reported && !self.closed && self.attempt == attempt
    }

    /// The job's message while the stage is at work.
    pub(crate) fn says(&self) -> String {
        let Self { title, stage, done, total, .. } = self;
        let unit = if self.waiting { WAITING } else { spoken(stage) };
        let count = if *total > 0 { format!(" {done}/{total}") } else { String::new() };
        format!("{title}: {unit}{count}")
    }
}

/// Where in the job a stage is; travels in its activity's argument.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lane {
    /// See [`Update::ticket`].
    pub(crate) ticket: u32,
    /// The step clients see.
    pub(crate) step: Step,
    /// What it covers of the whole.
    pub(crate) band: Band,
    /// Beginning of its messages, for example `video, part 2 of 3`.
    pub(crate) title: String,
}

/// Runs `work` on `thread` until it ends, beating all the while; first it waits for `device`, and keeps it.
pub(crate) async fn drive<T, W>(
    ctx: &ActivityContext,
    lane: &Lane,
    (host, device, thread): (Option<&str>, impl Future, &StageThread),
    work: W,
) -> Result<T, ActivityError>
where
    T: Send + 'static,
    W: FnOnce(&mut Hook<'_>) -> Result<T, render::Error> + Send + 'static,
{
    let (title, host) = (lane.title.clone(), host.map(str::to_owned));
    let first = Beat { title, host, waiting: true, ..first_beat(ctx) };
    if first.deaths >= policy::MAX_DEATHS {
        return Err(poison(first.deaths, first.cause.as_deref().unwrap_or(failure::DIED)));
    }
    let at_work = Entry::begin(ctx, Some(&first));
    let mut pulse = Pulse {
        ctx,
        lane,
        beat: first,
        begun: Instant::now(),
        sent: None,
        signal: None,
        at_work,
        turn: None,
    };
    let Some(_device) = pulse.wait(device).await else {
        return pulse.end(Ok(Err(render::Error::Stopped)), None).await;
    };
    let (sender, mut receiver) = watch::channel(Report::new("load", 0, 0));
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let stage = move || {
        work(&mut |report: Report| {
            sender.send_replace(report);
            if flag.load(Ordering::Relaxed) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
    };
    let thread = thread.clone();
    let mut job = tokio::task::spawn_blocking(move || thread.run(stage));
    pulse.tick().await;
    let mut timer = tokio::time::interval(interval(ctx));
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut open = true;
    loop {
        tokio::select! {
            done = &mut job => {
                // A stage that was stopped has said last where it can go on from.
                let last = receiver.borrow().checkpoint.clone();
                return pulse.end(done, last).await;
            }
            changed = receiver.changed(), if open => match changed {
                Ok(()) => {
                    let report = receiver.borrow_and_update().clone();
                    pulse.note(report).await;
                }
                Err(_) => open = false,
            },
            () = ctx.cancelled(), if !stop.load(Ordering::Relaxed) => {
                stop.store(true, Ordering::Relaxed);
                // A worker that dies on its way out was not killed by the job.
                pulse.beat.closed = true;
                pulse.beat.cause = None;
                pulse.at_work.note(Some(&pulse.beat));
                pulse.tick().await;
            }
            _ = timer.tick() => pulse.tick().await,
        }
    }
}

/// Runs a short blocking stage that reports nothing. It beats too, so that a task lost on its way to this worker is
/// noticed soon; a cancel does not stop it.
pub(crate) async fn plain<T, W>(ctx: &ActivityContext, work: W) -> Result<T, ActivityError>
where
    T: Send + 'static,
    W: FnOnce() -> Result<T, render::Error> + Send + 'static,
{
    let _at_work = Entry::begin(ctx, None);
    let mut tally = Tally::begin(ctx.heartbeat_details().deserialize().ok().flatten());
    if tally.deaths >= policy::MAX_DEATHS {
        return Err(poison(tally.deaths, failure::DIED));
    }
    let begun = Instant::now();
    let mut job = tokio::task::spawn_blocking(work);
    let mut timer = tokio::time::interval(interval(ctx));
    loop {
        tokio::select! {
            done = &mut job => return match done {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(error)) => {
                    let last = tally.count(&error);
                    say(ctx, tally).await;
                    Err(ActivityError::application(failure::of_render(&error, last, None)))
                }
                Err(error) => Err(broken(error)),
            },
            // A worker that dies on its way out was not killed by the job.
            () = ctx.cancelled(), if !tally.closed => {
                tally.closed = true;
                say(ctx, tally.clone()).await;
            }
            _ = timer.tick() => {
                // What ends it from now on is a slow store.
                tally.closed |= begun.elapsed() > SUSPICIOUS;
                say(ctx, tally.clone()).await;
            }
        }
    }
}

/// Heartbeat details of a short stage.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Tally {
    /// Attempts that ended with an error which was no outage of the store.
    errors: u32,
    /// Attempts in a row before this one that ended without a word.
    #[serde(default)]
    deaths: u32,
    /// Whether the end of this attempt, if it is one without a word, is none that the job is to blame for.
    #[serde(default)]
    closed: bool,
}

impl Tally {
    /// Counts on from what the attempt before this one said last.
    fn begin(last: Option<Self>) -> Self {
        let Some(last) = last else { return Self::default() };
        let deaths = if last.closed { 0 } else { last.deaths + 1 };
        Self { deaths, closed: false, ..last }
    }

    /// Counts an error; whether it is the last one. Whoever has to make room is not helped by minutes of waiting; an
    /// outage ends some time.
    fn count(&mut self, error: &render::Error) -> bool {
        self.closed = true;
        if render::is_outage(error) {
            return false;
        }
        self.errors += 1;
        let full = render::class(error) == ErrorClass::DiskFull;
        self.errors >= if full { policy::MAX_ERRORS } else { policy::SHORT_ATTEMPTS }
    }
}

async fn say(ctx: &ActivityContext, details: impl Serialize + 'static) {
    if let Err(error) = ctx.record_heartbeat(details).await {
        tracing::warn!(%error, "a heartbeat was not recorded");
    }
}

/// Beats often enough for the timeout the workflow set.
fn interval(ctx: &ActivityContext) -> Duration {
    let third = ctx.info().heartbeat_timeout.map_or(BEAT, |timeout| timeout / 3);
    third.clamp(Duration::from_millis(50), BEAT)
}

/// The last checkpoint of the attempts before this one.
pub(crate) fn checkpoint(ctx: &ActivityContext) -> Option<String> {
    first_beat(ctx).checkpoint
}

/// Gives the stage back to the server, so that another worker may take it; one that came back too often stays.
pub(crate) async fn pass_on(ctx: &ActivityContext) -> Result<(), ActivityError> {
    let first = first_beat(ctx);
    let Some(delay) = policy::pass(first.passes) else { return Ok(()) };
    let passes = first.passes + 1;
    let cause = Some(failure::BUSY.to_owned());
    say(ctx, Beat { passes, closed: true, waiting: true, cause, ..first }).await;
    let failure = ApplicationFailure::builder(failure::BUSY).next_retry_delay(delay).build();
    Err(ActivityError::application(failure))
}

/// What the attempts before this one left, counted on.
fn first_beat(ctx: &ActivityContext) -> Beat {
    let last: Option<Beat> = ctx.heartbeat_details().deserialize().ok().flatten();
    count_on(last, ctx.info().attempt)
}

fn count_on(last: Option<Beat>, attempt: u32) -> Beat {
    let fresh = Beat { stage: "load".into(), attempt, ..Beat::default() };
    if attempt <= 1 {
        return fresh;
    }
    let Some(last) = last else {
        return Beat { cause: Some(failure::DIED.into()), ..fresh };
    };
    let cause = if last.closed {
        last.cause.unwrap_or_else(|| failure::SHUT_DOWN.into())
    } else {
        last.death.map_or_else(|| failure::DIED.into(), |of| format!("{}: {of}", failure::DIED))
    };
    let deaths = match (last.closed, last.waiting) {
        (_, true) => last.deaths,
        (true, false) => 0,
        (false, false) => last.deaths + 1,
    };
    Beat {
        cause: Some(cause),
        deaths,
        errors: last.errors,
        passes: last.passes,
        percent: last.percent,
        checkpoint: last.checkpoint,
        ..fresh
    }
}

/// A job that takes its worker with it is not tried for ever.
fn poison(deaths: u32, cause: &str) -> ActivityError {
    let message =
        format!("{deaths} attempts at this stage ended with the worker's death; the last: {cause}");
    ActivityError::application(failure::fatal(ErrorClass::Poison, message))
}

/// A thread that panicked is a fault of ours; another attempt would panic again.
fn broken(error: JoinError) -> ActivityError {
    let message = match error.try_into_panic() {
        Ok(panic) => match panic.downcast_ref::<&str>() {
            Some(text) => format!("panic: {text}"),
            None => format!(
                "panic: {}",
                panic.downcast_ref::<String>().map_or("without a message", |text| text)
            ),
        },
        Err(error) => format!("the stage's thread ended early: {error}"),
    };
    tracing::error!(message, "a stage panicked");
    ActivityError::application(failure::fatal(ErrorClass::Bug, message))
}

/// The async side of one attempt.
struct Pulse<'a> {
    ctx: &'a ActivityContext,
    lane: &'a Lane,
    beat: Beat,
    begun: Instant,
    /// When the last signal went out, and what it said.
    sent: Option<(Instant, String, f64)>,
    signal: Option<JoinHandle<()>>,
    at_work: Entry,
    turn: Option<Turn>,
}

impl Pulse<'_> {
    /// Waits for `device` and then for this stage's turn in the process, beating meanwhile; `None` when it was stopped
    /// before.
    async fn wait<D: Future>(&mut self, device: D) -> Option<D::Output> {
        let alone = self.beat.deaths > 0;
        let mut turn = std::pin::pin!(async { (device.await, Turn::wait(alone).await) });
        let mut timer = tokio::time::interval(interval(self.ctx));
        loop {
            tokio::select! {
                biased;
                (device, turn) = &mut turn => {
                    self.turn = Some(turn);
                    self.beat.waiting = false;
                    self.at_work.note(Some(&self.beat));
                    return Some(device);
                }
                () = self.ctx.cancelled() => return None,
                _ = timer.tick() => self.tick().await,
            }
        }
    }

    /// Takes in the latest report.
    async fn note(&mut self, report: Report) {
        self.beat.stage.clear();
        self.beat.stage.push_str(report.stage);
        self.beat.done = report.done;
        self.beat.total = report.total;
        self.beat.percent = self.lane.band.at(report.fraction()).max(self.beat.percent);
        self.remember(report.checkpoint);
        if !self.beat.reported {
            self.beat.reported = true;
            self.beat.cause = None;
            if self.beat.attempt > 1 {
                // The job is not being retried any more, it is at work.
                self.sent = None;
            }
        }
        self.tick().await;
    }

    fn remember(&mut self, checkpoint: Option<Arc<str>>) {
        let Some(checkpoint) = checkpoint else { return };
        if self.beat.checkpoint.as_deref() != Some(&*checkpoint) {
            // It gets on: what killed the attempts before is not the job.
            self.beat.deaths = 0;
            self.turn = self.turn.take().map(Turn::share);
            self.beat.checkpoint = Some(checkpoint.to_string());
            self.at_work.note(Some(&self.beat));
        }
    }

    /// Beats, and signals when there is something worth it.
    async fn tick(&mut self) {
        say(self.ctx, self.beat.clone()).await;
        let idle = self.signal.as_ref().is_none_or(JoinHandle::is_finished);
        if idle && self.is_news() {
            self.sent = Some((Instant::now(), self.beat.stage.clone(), self.beat.percent));
            self.signal = self.send();
        }
    }

    fn is_news(&self) -> bool {
        let Some((when, stage, percent)) = &self.sent else {
            return self.beat.attempt > 1 || self.begun.elapsed() >= SIGNAL_FIRST;
        };
        let age = when.elapsed();
        let moved = self.beat.percent - percent;
        age >= SIGNAL_GAP && moved >= SIGNAL_PERCENT
            || age >= SIGNAL_STAGE && *stage != self.beat.stage
            || age >= SIGNAL_REST && moved > 0.0
    }

    /// Sends `update_progress` beside the work; whether it arrives does not matter to the stage.
    fn send(&self) -> Option<JoinHandle<()>> {
        let handle = self.ctx.workflow_handle::<UntypedWorkflow>()?;
        let input = RawValue::from_value(&self.update(), &PayloadConverter::default());
        Some(tokio::spawn(async move {
            let options = WorkflowSignalOptions::builder()
                .rpc_options(RpcOptions::builder().timeout(SIGNAL_GAP).build())
                .build();
            let signal = handle.signal(UntypedSignal::new(SIGNAL_PROGRESS), input, options);
            // The workflow may be closed, the server away: both show in the heartbeat's own fate.
            match tokio::time::timeout(SIGNAL_GAP, signal).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a progress signal was not taken"),
                Err(_) => tracing::debug!("a progress signal took too long"),
            }
        }))
    }

    fn update(&self) -> Update {
        let Beat { stage, done, total, percent, attempt, .. } = &self.beat;
        if let Some(cause) = &self.beat.cause {
            let message =
                format!("{}: attempt {} after: {cause}", self.lane.title, self.beat.next_attempt());
            return Update {
                ticket: Some(self.lane.ticket),
                step: Some(self.lane.step),
                status: Some(JobStatus::Retrying),
                message: Some(message),
                attempt: Some(*attempt),
                ..Update::default()
            };
        }
        Update {
            ticket: Some(self.lane.ticket),
            step: Some(self.lane.step),
            status: Some(JobStatus::Running),
            percent: Some(*percent),
            message: Some(self.beat.says()),
            preview_url: None,
            attempt: Some(*attempt),
            detail: Some(Detail { stage: stage.clone(), done: *done, total: *total }),
        }
    }

    /// The stage is over: says so to the next attempt, and turns its outcome into the activity's.
    async fn end<T>(
        mut self,
        done: Result<Result<T, render::Error>, JoinError>,
        checkpoint: Option<Arc<str>>,
    ) -> Result<T, ActivityError> {
        let error = match done {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error,
            Err(error) => return Err(broken(error)),
        };
        self.beat.closed = true;
        self.remember(checkpoint);
        let stopped = matches!(error, render::Error::Stopped);
        if !stopped {
            // While the store's server is away there are as many attempts as the policy allows.
            self.beat.errors += u32::from(!render::is_outage(&error));
            self.beat.cause = Some(request::one_line(&error.to_string()));
        }
        say(self.ctx, self.beat.clone()).await;
        if stopped {
            // While the worker shuts down the SDK reports this as a retryable hand-over, not as a cancel.
            return Err(ActivityError::cancelled_with_details(self.beat));
        }
        tracing::warn!(%error, stage = self.lane.title, "a stage failed");
        let last = self.beat.errors >= policy::MAX_ERRORS;
        if !last && render::class(&error).retryable() {
            // In the order in which it happened.
            if let Some(earlier) = self.signal.take() {
                let _ = earlier.await;
            }
            self.send();
        }
        Err(ActivityError::application(failure::of_render(&error, last, self.beat.host)))
    }
}

/// What a stage does in a worker that is at another one.
const WAITING: &str = "waiting for another stage to end";

/// A unit of work in words.
fn spoken(stage: &str) -> &str {
    match stage {
        "load" => "loading the model",
        "encode_prompt" => "reading the prompt",
        "denoise" => "denoising",
        "decode" => "decoding",
        "interpolate" => "interpolating",
        // Of a stage that is called encoding.
        "encode" => "frame",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store;

    #[test]
    fn an_outage_uses_up_no_attempt_of_a_short_stage() {
        let outage = || store::Error::Unanswered { key: "s3://b".into(), message: "away".into() };
        let full = || store::Error::DiskFull {
            path: "/".into(),
            source: std::io::ErrorKind::StorageFull.into(),
        };
        let mut tally = Tally::default();
        for _ in 0..policy::SHORT_ATTEMPTS * 2 {
            assert!(!tally.count(&outage().into()), "an outage ends nothing");
        }
        for error in 1..policy::MAX_ERRORS {
            assert!(!tally.count(&full().into()), "{error}");
        }
        assert!(tally.count(&full().into()));
    }

    #[test]
    fn deaths_are_counted_and_orderly_ends_forgive_them() {
        let beat = |deaths, closed| Some(Beat { deaths, closed, errors: 1, ..Beat::default() });
        for (last, attempt, deaths, errors) in [
            (None, 1, 0, 0),
            (None, 2, 0, 0),
            (beat(0, false), 1, 0, 0),
            (beat(0, false), 2, 1, 1),
            (beat(2, false), 4, 3, 1),
            (beat(2, true), 4, 0, 1),
            (beat(1, false).map(|last| Beat { waiting: true, ..last }), 3, 1, 1),
            (beat(2, true).map(|last| Beat { waiting: true, ..last }), 4, 2, 1),
        ] {
            let first = count_on(last.clone(), attempt);
            assert_eq!(
                (first.deaths, first.errors),
                (deaths, errors),
                "{last:?} attempt {attempt}"
            );
            assert_eq!(first.cause.is_some(), attempt > 1, "{last:?} attempt {attempt}");
            assert!(!first.is_at_work(attempt), "it has not reported yet");
        }
    }

    #[test]
    fn an_attempt_says_why_it_is_there() {
        let last = |closed, cause: Option<&str>| {
            let cause = cause.map(str::to_owned);
            Some(Beat { attempt: 1, closed, cause, ..Beat::default() })
        };
        for (last, cause) in [
            (None, failure::DIED),
            (last(false, None), failure::DIED),
            (last(false, Some("of the attempt before")), failure::DIED),
            (last(true, None), failure::SHUT_DOWN),
            (last(true, Some("no space left")), "no space left"),
        ] {
            assert_eq!(count_on(last, 2).cause.as_deref(), Some(cause));
        }
    }
}
