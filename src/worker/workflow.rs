//! `GenVideoWorkflow`: decides what happens next, and nothing else.
//!
//! No clock but the workflow's, no randomness but the run's, no files, no paths. Inputs of every kind are read
//! leniently (`worker/request.rs`), so that nothing a client sends can make a workflow task fail. Changes go behind
//! `ctx.patched`, since recorded histories are replayed against this file.

#![expect(
    missing_docs,
    reason = "the macros make undocumented constants of the documented handlers"
)]

mod elsewhere;

use std::time::Duration;

use temporalio_common::data_converters::RawValue;
use temporalio_common::error::ActivityExecutionError;
use temporalio_macros::{workflow, workflow_methods};
use temporalio_sdk::{
    ActivityOptions, SyncWorkflowContext, WaitConditionOptions, WorkflowCancellationToken,
    WorkflowContext, WorkflowContextView, WorkflowResult, WorkflowTermination,
};

use super::activities::{
    Ask, DeviceActivities, EncodeActivities, EncodeTask, ImageDone, ImageTask, LightActivities,
    Prepared, PublishTask, ReplaceTask, VideoTask,
};
use super::failure::Ended;
use super::heartbeat::{Beat, Lane};
use super::policy::Place;
use super::progress::{Band, Stage, Tracker};
use super::review::{Replacement, Review, Verdict};
use super::{failure, policy, request};
use crate::job::progress::Progress;
use crate::job::result::JobResult;
use crate::job::{
    QUERY_STATUS, SIGNAL_APPROVE, SIGNAL_CANCEL, SIGNAL_PAUSE, SIGNAL_PROGRESS, SIGNAL_REJECT,
    SIGNAL_REPLACE, SIGNAL_RESUME, ValidJob, WORKFLOW_TYPE,
};
use crate::render::plan::VideoPlan;
use crate::render::{FramesMade, Made, VideoMade};
use crate::store::BlobRef;
use elsewhere::{Search, Shortage};

/// One job, from its request to its result.
#[workflow]
#[derive(Default)]
pub struct GenVideoWorkflow {
    tracker: Tracker,
    /// Set by the signal, which may arrive before the run does.
    cancel_asked: bool,
    /// Follows the native cancel and the signal; every stage but the last two hangs on it.
    token: Option<WorkflowCancellationToken>,
    review: Review,
    is_paused: bool,
    /// Stops the stage at work and nothing else.
    work: Option<WorkflowCancellationToken>,
    /// Queue that those of the job's stages are named after, once its files are with one worker alone.
    home: Option<String>,
    /// Queue of the job's stages on the device, once they need more memory than some workers have.
    room: Option<String>,
    /// What is known of that.
    shortage: Option<Shortage>,
}

impl GenVideoWorkflow {
    fn stop(&self) {
        if let Some(token) = &self.token {
            token.cancel();
        }
    }
}

#[workflow_methods]
impl GenVideoWorkflow {
    /// Takes one JSON object, returns the [`JobResult`].
    #[run(name = WORKFLOW_TYPE)]
    pub async fn run(
        ctx: &mut WorkflowContext<Self>,
        input: RawValue,
    ) -> WorkflowResult<JobResult> {
        let token = ctx.cancellation_token().child_token();
        let asked = ctx.state_mut(|state| {
            state.token = Some(token.clone());
            state.cancel_asked
        });
        if asked {
            token.cancel();
        }
        let job = match request::read_job(&input) {
            Ok(job) => job,
            Err(faults) => return Err(refuse(ctx, Ended::refused(faults))),
        };
        ctx.state_mut(|state| {
            state.review.open(job.approve);
            if state.review.rejection().is_some() {
                token.cancel();
            }
        });
        let seed = job.seed.unwrap_or_else(|| u64::from(ctx.random::<u32>()));
        let mut walk = Walk { ctx: ctx.clone(), token, job, approved: None };
        match walk.make(seed).await {
            Ok(result) => {
                ctx.state_mut(|state| state.tracker.complete(&result));
                show(ctx);
                Ok(result)
            }
            Err(end) => Err(walk.end(end).await),
        }
    }

    /// Answers with a [`Progress`], whatever the argument.
    #[query(name = QUERY_STATUS)]
    pub fn get_status(&self, _ctx: &WorkflowContextView, _input: RawValue) -> Progress {
        self.tracker.progress().clone()
    }

    /// Ends the job as CANCELLED, whatever the argument.
    #[signal(name = SIGNAL_CANCEL)]
    pub fn cancel_generation(&mut self, _ctx: &mut SyncWorkflowContext<Self>, _input: RawValue) {
        self.cancel_asked = true;
        self.stop();
    }

    /// Lets a job with `approve` go on after its image, whatever the argument.
    #[signal(name = SIGNAL_APPROVE)]
    pub fn approve(&mut self, _ctx: &mut SyncWorkflowContext<Self>, _input: RawValue) {
        self.review.approve();
    }

    /// Ends a job with `approve` as CANCELLED; the argument may give a `reason`.
    #[signal(name = SIGNAL_REJECT)]
    pub fn reject(&mut self, _ctx: &mut SyncWorkflowContext<Self>, input: RawValue) {
        self.review.reject(request::read_reason(&input));
        if self.review.rejection().is_some() {
            self.stop();
        }
    }

    /// Gives a job with `approve` another image; one that cannot be taken is a note in the status.
    #[signal(name = SIGNAL_REPLACE)]
    pub fn replace_image(&mut self, _ctx: &mut SyncWorkflowContext<Self>, input: RawValue) {
        self.review.replace(request::read_replacement(&input));
    }

    /// Stops the job where it is, whatever the argument.
    #[signal(name = SIGNAL_PAUSE)]
    pub fn pause(&mut self, ctx: &mut SyncWorkflowContext<Self>, _input: RawValue) {
        self.is_paused = true;
        if let Some(work) = &self.work {
            work.cancel();
            self.tracker.say("pausing");
            ctx.set_current_details(self.tracker.markdown());
        }
    }

    /// Lets a paused job go on, whatever the argument.
    #[signal(name = SIGNAL_RESUME)]
    pub fn resume(&mut self, _ctx: &mut SyncWorkflowContext<Self>, _input: RawValue) {
        self.is_paused = false;
    }

    /// Takes news from the stage at work; what is malformed or stale is ignored.
    #[signal(name = SIGNAL_PROGRESS)]
    pub fn update_progress(&mut self, ctx: &mut SyncWorkflowContext<Self>, input: RawValue) {
        let Some(update) = request::read_update(&input) else { return };
        if self.tracker.report(update, ctx.workflow_time()) {
            ctx.set_current_details(self.tracker.markdown());
        }
    }
}

/// Why a job ends without a result.
enum End {
    Cancelled,
    Failed(Ended),
    /// Not yet: the host with its files is gone, so another one has to begin anew.
    Homeless,
    /// Not yet: the host with its files has too little memory, so one with more has to begin anew.
    Cramped,
}

/// How a stage is to be carried out.
struct Go {
    lane: Lane,
    token: WorkflowCancellationToken,
    /// See [`Place::patience`].
    patience: Duration,
}

/// One job on its way through the stages.
struct Walk {
    ctx: WorkflowContext<GenVideoWorkflow>,
    token: WorkflowCancellationToken,
    job: ValidJob,
    /// SHA-256 of the image that was approved of.
    approved: Option<String>,
}

impl Walk {
    async fn make(&mut self, seed: u64) -> Result<JobResult, End> {
        let mut prepared = self.prepare(seed).await?;
        let mut lost = 0;
        while lost < policy::MAX_DEATHS {
            match self.stages(&mut prepared).await {
                Err(End::Homeless) => lost += 1,
                // Each time there is one worker less that may have the room.
                Err(End::Cramped) => {}
                ended => return ended,
            }
            self.ctx.state_mut(|state| state.home = None);
        }
        Err(End::Failed(Ended::poison(policy::MAX_DEATHS)))
    }

    async fn stages(&mut self, prepared: &mut Prepared) -> Result<JobResult, End> {
        let mut image = self.image(prepared).await?;
        // Another device may have made another one of it.
        let differs = self.approved.as_ref().is_some_and(|it| *it != image.made.delivered.sha256);
        if differs && self.ctx.patched("approve-again") {
            self.ctx.state_mut(|state| state.review.open_again());
        }
        if self.ctx.state(|state| state.review.asks()) {
            image = self.approval(prepared, image).await?;
        }
        let mut made = Made { image: image.made, runs: Vec::new(), video: None };
        if let Some(video) = &prepared.plan.video {
            let mut start = made.image.image.clone();
            for run in 0..video.runs {
                let frames = self.frames(prepared, video, start, run).await?;
                start = frames.last_frame.clone();
                made.runs.push(frames);
            }
            made.video = Some(self.encode(prepared, video, made.runs.clone()).await?);
        }
        self.publish(prepared, made).await
    }

    async fn prepare(&self, seed: u64) -> Result<Prepared, End> {
        self.enter(Stage::Validate, Band { from: 0.0, to: 1.0 }).await?;
        let anywhere = Place { queue: self.ctx.task_queue().to_owned(), patience: None };
        let options = policy::short(anywhere, self.token.clone());
        let ask = Ask { job: self.job.clone(), seed };
        let validate = LightActivities::validate_request;
        let prepared = match self.ctx.execute_activity(validate, ask.clone(), options).await {
            Err(refused) => self.where_the_image_is(ask, refused).await,
            prepared => prepared,
        };
        let prepared = self.settle(prepared)?;
        if !self.is_movable() {
            self.settle_at(prepared.host.clone());
        }
        Ok(prepared)
    }

    async fn image(&self, prepared: &Prepared) -> Result<ImageDone, End> {
        let plan = &prepared.plan;
        let (steps, size) =
            plan.image.as_ref().map_or((1, plan.deliver), |image| (image.steps, image.size));
        let limit = policy::limit(steps, 1, size);
        let work = async |go: Go| {
            let options = self.device(prepared, limit, &go);
            let task = ImageTask { job: self.job.clone(), plan: plan.clone(), lane: go.lane };
            self.ctx.execute_activity(DeviceActivities::gen_image, task, options).await
        };
        let done = self.stage(Stage::Image, prepared, "image", work).await?;
        self.settle_at(done.host.clone());
        self.ctx.state_mut(|state| state.tracker.image_ready(done.url.clone()));
        Ok(done)
    }

    /// Waits until somebody approves of the image, or of another one given in its place.
    async fn approval(
        &mut self,
        prepared: &mut Prepared,
        mut image: ImageDone,
    ) -> Result<ImageDone, End> {
        loop {
            self.ctx.state_mut(|state| state.tracker.wait("approval", state.review.message()));
            show(&self.ctx);
            match self.verdict().await? {
                Verdict::Approved => break,
                Verdict::Replaced(replacement) => {
                    image = self.replace(prepared, image, replacement).await?;
                }
            }
        }
        self.ctx.state_mut(|state| state.review.close());
        self.approved = Some(image.made.delivered.sha256.clone());
        Ok(image)
    }

    /// The next thing to do about the image. A note on what was not taken changes the status meanwhile.
    async fn verdict(&self) -> Result<Verdict, End> {
        loop {
            if let Some(verdict) = self.ctx.state_mut(|state| state.review.verdict()) {
                return Ok(verdict);
            }
            let shown = self.ctx.state(|state| state.review.message());
            self.until(|state| state.review.is_decided() || state.review.message() != shown)
                .await?;
            self.ctx.state_mut(|state| state.tracker.wait("approval", state.review.message()));
            show(&self.ctx);
        }
    }

    /// The replacement, or `image` when it cannot be taken.
    async fn replace(
        &mut self,
        prepared: &mut Prepared,
        image: ImageDone,
        replacement: Replacement,
    ) -> Result<ImageDone, End> {
        let options = policy::short(self.light(heartbeat(prepared)), self.token.clone());
        let task = ReplaceTask {
            job: self.job.clone(),
            plan: prepared.plan.clone(),
            image: replacement.image,
        };
        let taken = self.ctx.execute_activity(LightActivities::replace_image, task, options).await;
        match self.settle(taken) {
            Ok(taken) => {
                (self.job, prepared.plan) = (taken.job, taken.plan);
                let url = taken.done.url.clone();
                self.ctx.state_mut(|state| state.tracker.image_ready(url));
                self.settle_at(taken.done.host.clone());
                Ok(taken.done)
            }
            Err(End::Homeless) => {
                self.ctx.state_mut(|state| state.review.refuse("its worker is gone"));
                Err(End::Homeless)
            }
            Err(End::Failed(ended)) => {
                let why = request::one_line(&ended.message);
                self.ctx.state_mut(|state| state.review.refuse(&why));
                Ok(image)
            }
            Err(cancelled) => Err(cancelled),
        }
    }

    async fn frames(
        &self,
        prepared: &Prepared,
        video: &VideoPlan,
        image: BlobRef,
        run: u32,
    ) -> Result<FramesMade, End> {
        let plan = &prepared.plan;
        let title = if video.runs > 1 {
            format!("video, part {} of {}", run + 1, video.runs)
        } else {
            "video".into()
        };
        let limit = policy::limit(video.steps, video.frames_per_run, video.size);
        let work = async |go: Go| {
            let options = self.device(prepared, limit, &go);
            let (job, image) = (self.job.clone(), image.clone());
            let task = VideoTask { job, plan: plan.clone(), lane: go.lane, image, run };
            self.ctx.execute_activity(DeviceActivities::gen_video, task, options).await
        };
        self.stage(Stage::Video { run, runs: video.runs }, prepared, &title, work).await
    }

    async fn encode(
        &self,
        prepared: &Prepared,
        video: &VideoPlan,
        runs: Vec<FramesMade>,
    ) -> Result<VideoMade, End> {
        let plan = &prepared.plan;
        let limit = policy::limit(1, video.delivered, plan.deliver);
        let work = async |go: Go| {
            let place = self.place(policy::processor_queue, go.patience);
            let (beat, turn) = (heartbeat(prepared), policy::turn(&self.job));
            let options = policy::long(place, go.token, limit, beat, turn);
            let (job, runs) = (self.job.clone(), runs.clone());
            let task = EncodeTask { job, plan: plan.clone(), lane: go.lane, runs };
            self.ctx.execute_activity(EncodeActivities::encode_video, task, options).await
        };
        self.stage(Stage::Encode, prepared, "encoding", work).await
    }

    /// Carries out a stage that a pause stops: again each time the job goes on, from the stage's checkpoint.
    async fn stage<T>(
        &self,
        stage: Stage,
        prepared: &Prepared,
        title: &str,
        work: impl AsyncFn(Go) -> Result<T, ActivityExecutionError>,
    ) -> Result<T, End> {
        let band = stage.band(&prepared.plan.shares);
        let mut search = Search::new(heartbeat(prepared));
        loop {
            self.enter(stage, band).await?;
            if let Some(message) = search.waits_for() {
                self.ctx.state_mut(|state| state.tracker.say(&message));
            }
            let token = self.token.child_token();
            self.ctx.state_mut(|state| state.work = Some(token.clone()));
            let ticket = self.ctx.state(|state| state.tracker.ticket());
            let lane = Lane { ticket, step: stage.step(), band, title: title.to_owned() };
            let patience = search.patience;
            let outcome = work(Go { lane, token: token.clone(), patience }).await;
            let last: Option<Beat> = match &outcome {
                Err(ActivityExecutionError::Cancelled(stop)) => stop.details().ok().flatten(),
                _ => None,
            };
            self.ctx.state_mut(|state| {
                state.work = None;
                let stopped_at = last.as_ref().map_or(0.0, |beat| beat.percent);
                state.tracker.reach(if outcome.is_ok() { band.to } else { stopped_at });
            });
            let failed = outcome.as_ref().err();
            if !token.is_cancelled()
                && let Some(error) = failed
                && self.elsewhere(error, heartbeat(prepared), &mut search).await?
            {
                continue;
            }
            // What it kept to go on from, or to be removed, is there.
            self.settle_at(last.and_then(|beat| beat.host).or(failed.and_then(Ended::host)));
            // Whatever else went wrong with a stage that was stopped goes wrong again when the job goes on.
            let is_stopped = outcome.is_err() && token.is_cancelled();
            if !is_stopped || self.token.is_cancelled() {
                return self.settle(outcome);
            }
        }
    }

    /// Asks whether somebody still works for the job's home, who then is only busy.
    async fn call(&self, heartbeat: Duration) -> Result<(), End> {
        let options = policy::short(self.light(heartbeat), self.token.clone());
        self.settle(self.ctx.execute_activity(LightActivities::answer, (), options).await)
    }

    /// From here on the job completes: a cancel that comes later is too late, so that there is one outcome.
    async fn publish(&self, prepared: &Prepared, made: Made) -> Result<JobResult, End> {
        let plan = prepared.plan.clone();
        self.enter(Stage::Publish, Stage::Publish.band(&plan.shares)).await?;
        let place = self.light(heartbeat(prepared));
        let options = policy::publish(place);
        let task = PublishTask { job: self.job.clone(), plan, made };
        match self.ctx.execute_activity(LightActivities::publish, task, options).await {
            Ok(result) => Ok(result),
            Err(error) => self.settle(Err(error)),
        }
    }

    /// Removes what was made, then ends the job.
    async fn end(&self, end: End) -> WorkflowTermination {
        let patience = policy::patience(policy::BEAT);
        // Not even a job that no other host can make waits for one that is gone.
        let has_home = self.ctx.state(|state| state.home.is_some());
        let place = self.place(str::to_owned, patience);
        let options = policy::cleanup(Place { patience: has_home.then_some(patience), ..place });
        // A sweep takes what stays behind; the job's own end does not depend on it.
        let _ = self.ctx.execute_activity(LightActivities::cleanup_resources, (), options).await;
        match end {
            End::Failed(ended) => refuse(&self.ctx, ended),
            End::Cancelled | End::Homeless | End::Cramped => {
                let progress = self.ctx.state_mut(|state| {
                    let message = state.review.rejection();
                    state.tracker.cancel(message.unwrap_or_else(|| "cancelled".into()));
                    state.tracker.progress().clone()
                });
                show(&self.ctx);
                WorkflowTermination::cancelled_with_details(progress)
            }
        }
    }

    /// Begins a stage, unless the job was cancelled. While it is paused nothing begins.
    async fn enter(&self, stage: Stage, band: Band) -> Result<(), End> {
        if self.ctx.state(|state| state.is_paused) && !self.token.is_cancelled() {
            self.ctx.state_mut(|state| state.tracker.wait("paused", "paused".into()));
            show(&self.ctx);
            self.until(|state| !state.is_paused).await?;
        }
        if self.token.is_cancelled() {
            return Err(End::Cancelled);
        }
        self.ctx.state_mut(|state| state.tracker.enter(stage, band, self.job.job_type));
        show(&self.ctx);
        Ok(())
    }

    /// Waits until `condition` holds, or the job is cancelled.
    async fn until(&self, condition: impl FnMut(&GenVideoWorkflow) -> bool) -> Result<(), End> {
        let options =
            WaitConditionOptions::builder().cancellation_token(self.token.clone()).build();
        let waited = self.ctx.wait_condition_with_options(condition, options).await;
        waited.map_err(|_| End::Cancelled)
    }

    fn device(&self, prepared: &Prepared, limit: Duration, go: &Go) -> ActivityOptions {
        let room = self.ctx.state(|state| state.room.clone().filter(|_| state.home.is_none()));
        let place = match room {
            Some(queue) => Place { queue, patience: Some(go.patience) },
            None => self.place(policy::device_queue, go.patience),
        };
        let turn = policy::turn(&self.job);
        policy::long(place, go.token.clone(), limit, heartbeat(prepared), turn)
    }

    /// Whether another host can make everything again.
    fn is_movable(&self) -> bool {
        self.job.image.is_none()
    }

    /// From now on the job's stages go where its files are, if they are in one place alone.
    fn settle_at(&self, host: Option<String>) {
        if host.is_some() {
            self.ctx.state_mut(|state| state.home = host);
        }
    }

    /// The queue that `name` makes of the job's home, or of where any worker takes any stage.
    fn place(&self, name: impl Fn(&str) -> String, patience: Duration) -> Place {
        let home = self.ctx.state(|state| state.home.clone());
        let patience = Some(patience).filter(|_| home.is_some() && self.is_movable());
        Place { queue: name(home.as_deref().unwrap_or(self.ctx.task_queue())), patience }
    }

    /// The queue of short stages; whoever works for it has always time for one.
    fn light(&self, heartbeat: Duration) -> Place {
        self.place(str::to_owned, policy::patience(heartbeat))
    }

    /// A cancel that came while a stage worked wins over whatever the stage came to.
    fn settle<T>(&self, outcome: Result<T, ActivityExecutionError>) -> Result<T, End> {
        match outcome {
            _ if self.token.is_cancelled() => Err(End::Cancelled),
            Ok(value) => Ok(value),
            Err(ActivityExecutionError::Cancelled(_)) => Err(End::Cancelled),
            Err(error) if failure::is_unclaimed(&error) => Err(End::Homeless),
            Err(error) => Err(End::Failed(Ended::of_activity(&error))),
        }
    }
}

fn heartbeat(prepared: &Prepared) -> Duration {
    Duration::from_millis(prepared.heartbeat_ms.max(1000))
}

/// Ends the job as FAILED.
fn refuse(ctx: &WorkflowContext<GenVideoWorkflow>, ended: Ended) -> WorkflowTermination {
    let percent = ctx.state_mut(|state| {
        state.tracker.fail(&ended.message);
        state.tracker.progress().percent
    });
    show(ctx);
    WorkflowTermination::failed_application(ended.into_failure(percent))
}

/// Shows the status in the Temporal UI.
fn show(ctx: &WorkflowContext<GenVideoWorkflow>) {
    let markdown = ctx.state(|state| state.tracker.markdown());
    ctx.set_current_details(markdown);
}
