//! The workflow's own account of a job: where it is, how far, and when it should be done.
//!
//! Pure: time comes in as an argument. Percent never falls, and reaches exactly 100 only with a result.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::request::Update;
use crate::job::JobType;
use crate::job::progress::{Detail, JobStatus, Progress, Step};
use crate::job::result::JobResult;
use crate::render::plan::Shares;

/// Percent at which work on the image begins.
const START: f64 = 1.0;
/// Percent at which everything but the publication is done.
const END: f64 = 98.0;

/// The part of 0..=100 one stage of a job covers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Band {
    /// Percent at its start.
    pub(crate) from: f64,
    /// Percent at its end.
    pub(crate) to: f64,
}

impl Band {
    /// Percent of the whole job at `fraction` (0..=1) of this stage.
    pub(crate) fn at(self, fraction: f64) -> f64 {
        self.from + (self.to - self.from) * fraction.clamp(0.0, 1.0)
    }
}

/// One stage of the walk, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Choosing models, sizes and counts.
    Validate,
    /// Making the image.
    Image,
    /// Making the frames of one run of the video model, counted from 0.
    Video {
        /// Which run.
        run: u32,
        /// How many there are.
        runs: u32,
    },
    /// Frames to mp4.
    Encode,
    /// Naming the result.
    Publish,
}

impl Stage {
    /// The step clients see.
    pub(crate) fn step(self) -> Step {
        match self {
            Self::Validate | Self::Image => Step::Image,
            Self::Video { .. } => Step::Video,
            Self::Encode | Self::Publish => Step::Processing,
        }
    }

    /// What the job does or waits for when this stage is scheduled.
    pub(crate) fn waiting(self) -> String {
        match self {
            Self::Validate => "checking the request".into(),
            Self::Image => "image: waiting for the device".into(),
            Self::Video { runs: 1, .. } => "video: waiting for the device".into(),
            Self::Video { run, runs } => {
                format!("video, part {} of {runs}: waiting for the device", run + 1)
            }
            Self::Encode => "encoding: waiting for a worker".into(),
            Self::Publish => "publishing".into(),
        }
    }

    /// The part of the whole this stage covers, from the plan's estimate of the work.
    pub(crate) fn band(self, shares: &Shares) -> Band {
        let before = match self {
            Self::Validate => return Band { from: 0.0, to: START },
            Self::Publish => return Band { from: END, to: 99.0 },
            Self::Image => 0.0,
            Self::Video { run, .. } => shares.image + shares.run * f64::from(run),
            Self::Encode => 1.0 - shares.encode,
        };
        let own = match self {
            Self::Image => shares.image,
            Self::Video { .. } => shares.run,
            _ => shares.encode,
        };
        let work = Band { from: START, to: END };
        Band { from: work.at(before), to: work.at(before + own) }
    }
}

/// The state `get_status` answers from.
#[derive(Debug)]
pub(crate) struct Tracker {
    progress: Progress,
    /// How often a stage was entered: what was scheduled before is not the work of now, be it of the same stage.
    ticket: u32,
    job: JobType,
    band: Band,
    /// When work first reported, and the percent then: the base of the estimate.
    base: Option<(SystemTime, f64)>,
}

impl Default for Tracker {
    fn default() -> Self {
        Self {
            progress: Progress::pending("waiting for a worker"),
            ticket: 0,
            job: JobType::Image,
            band: Band { from: 0.0, to: 0.0 },
            base: None,
        }
    }
}

impl Tracker {
    /// What a client sees.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Names the work that was last scheduled, among all of this job.
    pub(crate) fn ticket(&self) -> u32 {
        self.ticket
    }

    /// A stage is about to be scheduled.
    pub(crate) fn enter(&mut self, stage: Stage, band: Band, job: JobType) {
        self.ticket += 1;
        self.job = job;
        self.band = band;
        self.progress.step = stage.step();
        self.progress.status = JobStatus::Running;
        self.progress.message = stage.waiting();
        self.progress.attempt = None;
        self.progress.detail = None;
        self.raise(self.band.from);
    }

    /// The job waits for somebody: nothing is at work, `stage` says what for.
    pub(crate) fn wait(&mut self, stage: &str, message: String) {
        self.progress.status = JobStatus::Pending;
        self.progress.message = message;
        self.progress.attempt = None;
        self.progress.detail = Some(Detail { stage: stage.to_owned(), done: 0, total: 1 });
        // The pace before says nothing of when it goes on.
        self.progress.estimated_completion = None;
        self.base = None;
    }

    /// How far the stage was that has just stopped, which its last news may not have said.
    pub(crate) fn reach(&mut self, percent: f64) {
        if percent.is_finite() {
            self.raise(percent.clamp(self.band.from, self.band.to));
        }
    }

    /// A note on the stage at work.
    pub(crate) fn say(&mut self, message: &str) {
        if self.is_at_work() {
            self.progress.message = message.to_owned();
        }
    }

    /// The image is there.
    pub(crate) fn image_ready(&mut self, url: Option<String>) {
        self.progress.image_url = url;
    }

    /// News from the stage at work; false when they are stale and were ignored.
    pub(crate) fn report(&mut self, update: Update, now: Option<SystemTime>) -> bool {
        if self.is_stale(&update) {
            return false;
        }
        if let Some(percent) = update.percent {
            self.reach(percent);
        }
        if let Some(status @ (JobStatus::Running | JobStatus::Retrying)) = update.status {
            self.progress.status = status;
        }
        if let Some(message) = update.message {
            self.progress.message = message;
        }
        self.progress.preview_url = update.preview_url.or(self.progress.preview_url.take());
        self.progress.attempt = update.attempt.or(self.progress.attempt);
        // What an attempt had done is not what the next one has.
        let kept = self.progress.detail.take();
        self.progress.detail =
            update.detail.or(kept.filter(|_| update.status != Some(JobStatus::Retrying)));
        if let Some(now) = now {
            self.estimate(now);
        }
        true
    }

    fn is_at_work(&self) -> bool {
        matches!(self.progress.status, JobStatus::Running | JobStatus::Retrying)
    }

    fn is_stale(&self, update: &Update) -> bool {
        !self.is_at_work()
            || update.ticket.is_some_and(|ticket| ticket != self.ticket)
            || update.step.is_some_and(|step| step != self.progress.step)
            || update.attempt.zip(self.progress.attempt).is_some_and(|(new, known)| new < known)
    }

    /// The job has its result: the result's own final state is the status from now on.
    pub(crate) fn complete(&mut self, result: &JobResult) {
        self.progress = result.progress.clone();
    }

    /// The job ends without a result because of an error.
    pub(crate) fn fail(&mut self, message: &str) {
        self.end();
        self.progress.step = Step::Failed;
        self.progress.status = JobStatus::Failed;
        self.progress.message = "failed".into();
        self.progress.error_message = Some(message.to_owned());
    }

    /// The job ends without a result by request; the step stays where it was stopped.
    pub(crate) fn cancel(&mut self, message: String) {
        self.end();
        self.progress.status = JobStatus::Cancelled;
        self.progress.message = message;
    }

    /// What was made for a job without a result is removed, so its addresses go too.
    fn end(&mut self) {
        self.progress.image_url = None;
        self.progress.preview_url = None;
        self.progress.estimated_completion = None;
        self.progress.detail = None;
    }

    fn raise(&mut self, percent: f64) {
        let rounded = (percent * 10.0).round() / 10.0;
        if rounded > self.progress.percent {
            self.progress.percent = rounded.min(99.9);
        }
    }

    /// Time per percent since the work began, carried on to 100.
    fn estimate(&mut self, now: SystemTime) {
        let percent = self.progress.percent;
        let (start, first) = *self.base.get_or_insert((now, percent));
        let Ok(elapsed) = now.duration_since(start) else { return };
        if percent - first < 2.0 {
            return;
        }
        let left = elapsed.as_secs_f64() * (100.0 - percent) / (percent - first);
        let done = now.checked_add(Duration::from_secs_f64(left.clamp(0.0, 1e7)));
        self.progress.estimated_completion = done.and_then(rfc3339);
    }

    /// The status as Markdown, for the Temporal UI.
    pub(crate) fn markdown(&self) -> String {
        let progress = &self.progress;
        let kind = if self.job == JobType::Video { "video" } else { "image" };
        let mut text =
            format!("**{:.1} %** of a {kind} job: {}\n", progress.percent, progress.message);
        if let Some(detail) = &progress.detail {
            text.push_str(&format!("\n- `{}` {} of {}", detail.stage, detail.done, detail.total));
        }
        if let Some(attempt) = progress.attempt.filter(|attempt| *attempt > 1) {
            text.push_str(&format!("\n- attempt {attempt}"));
        }
        for (name, url) in [("image", &progress.image_url), ("result", &progress.asset_url)] {
            if let Some(url) = url {
                text.push_str(&format!("\n- {name}: [{url}]({url})"));
            }
        }
        if let Some(error) = &progress.error_message {
            text.push_str(&format!("\n- error: {error}"));
        }
        if let Some(when) = &progress.estimated_completion {
            text.push_str(&format!("\n- done at about {when}"));
        }
        text
    }
}

fn rfc3339(time: SystemTime) -> Option<String> {
    let timestamp = jiff::Timestamp::try_from(time).ok()?;
    let seconds = jiff::Timestamp::from_second(timestamp.as_second()).ok()?;
    Some(seconds.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARES: Shares = Shares { image: 0.2, run: 0.35, encode: 0.1 };

    fn at_work() -> Tracker {
        let mut tracker = Tracker::default();
        let stage = Stage::Video { run: 1, runs: 2 };
        tracker.enter(stage, stage.band(&SHARES), JobType::Video);
        tracker
    }

    fn percent(percent: f64) -> Update {
        Update { percent: Some(percent), ..Update::default() }
    }

    #[test]
    fn the_bands_of_a_job_follow_each_other() {
        let stages = [
            Stage::Validate,
            Stage::Image,
            Stage::Video { run: 0, runs: 2 },
            Stage::Video { run: 1, runs: 2 },
            Stage::Encode,
            Stage::Publish,
        ];
        let bands: Vec<_> = stages.iter().map(|stage| stage.band(&SHARES)).collect();
        assert_eq!((bands[0].from, bands[5].to), (0.0, 99.0));
        for pair in bands.windows(2) {
            assert!((pair[0].to - pair[1].from).abs() < 1e-9, "{pair:?}");
        }
        let image = Shares { image: 1.0, run: 0.0, encode: 0.0 };
        assert_eq!(Stage::Image.band(&image), Band { from: START, to: END });
    }

    #[test]
    fn percent_never_falls_and_stays_in_its_stage() {
        let mut tracker = at_work();
        let band = tracker.band;
        for (told, kept) in
            [(60.0, 60.0), (55.0, 60.0), (f64::NAN, 60.0), (500.0, band.to), (-1.0, band.to)]
        {
            assert!(tracker.report(percent(told), None));
            assert!(
                (tracker.progress().percent - kept).abs() < 0.06,
                "{told}: {:?}",
                tracker.progress()
            );
        }
    }

    #[test]
    fn stale_news_are_ignored() {
        let mut tracker = at_work();
        assert!(tracker.report(Update { attempt: Some(2), ..percent(60.0) }, None));
        let before = tracker.progress().clone();
        for stale in [
            Update { ticket: Some(tracker.ticket() - 1), ..percent(70.0) },
            Update { step: Some(Step::Image), ..percent(70.0) },
            Update { attempt: Some(1), ..percent(70.0) },
        ] {
            assert!(!tracker.report(stale.clone(), None), "{stale:?}");
            assert_eq!(*tracker.progress(), before);
        }
        tracker.cancel("cancelled".into());
        assert!(!tracker.report(percent(70.0), None), "news after the end");
        assert_eq!(tracker.progress().status, JobStatus::Cancelled);
    }

    #[test]
    fn late_news_of_an_activity_before_a_pause_are_not_those_of_the_one_after_it() {
        let mut tracker = at_work();
        let update = |ticket, attempt| Update {
            ticket: Some(ticket),
            attempt: Some(attempt),
            ..percent(60.0)
        };
        let old = tracker.ticket();
        assert!(tracker.report(update(old, 3), None));
        tracker.wait("paused", "paused".into());
        let stage = Stage::Video { run: 1, runs: 2 };
        tracker.enter(stage, stage.band(&SHARES), JobType::Video);
        assert!(!tracker.report(update(old, 3), None), "of the activity that was stopped");
        assert!(tracker.report(update(tracker.ticket(), 1), None), "of the one at work");
    }

    #[test]
    fn a_job_that_waits_takes_no_news_and_has_no_pace() {
        let mut tracker = at_work();
        tracker.report(percent(60.0), None);
        tracker.wait("paused", "paused".into());
        assert!(!tracker.report(percent(70.0), None));
        tracker.say("too late");
        let progress = tracker.progress();
        assert_eq!((progress.status, progress.message.as_str()), (JobStatus::Pending, "paused"));
        assert_eq!((progress.percent, &progress.estimated_completion), (60.0, &None));
        assert_eq!(progress.detail.as_ref().expect("what for").stage, "paused");
        let stage = Stage::Video { run: 1, runs: 2 };
        tracker.enter(stage, stage.band(&SHARES), JobType::Video);
        assert_eq!(
            (tracker.progress().status, tracker.progress().percent),
            (JobStatus::Running, 60.0)
        );
    }

    #[test]
    fn an_activity_cannot_end_the_job() {
        let mut tracker = at_work();
        for status in
            [JobStatus::Completed, JobStatus::Failed, JobStatus::Cancelled, JobStatus::Pending]
        {
            tracker.report(Update { status: Some(status), ..Update::default() }, None);
            assert_eq!(tracker.progress().status, JobStatus::Running, "{status:?}");
        }
        tracker.report(Update { status: Some(JobStatus::Retrying), ..Update::default() }, None);
        assert_eq!(tracker.progress().status, JobStatus::Retrying);
    }

    #[test]
    fn the_estimate_carries_the_pace_on() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let mut tracker = at_work();
        tracker.report(percent(60.0), Some(start));
        assert_eq!(tracker.progress().estimated_completion, None, "no pace yet");
        tracker.report(percent(70.0), Some(start + Duration::from_secs(10)));
        let told = tracker.progress().estimated_completion.clone().expect("an estimate");
        // Ten percent took ten seconds; thirty are left.
        assert_eq!(told, "1970-01-12T13:47:20Z");
        tracker.cancel("cancelled".into());
        assert_eq!(tracker.progress().estimated_completion, None);
    }
}
