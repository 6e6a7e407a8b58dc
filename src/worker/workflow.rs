//! `GenVideoWorkflow`: decides what happens next, and nothing else.
//!
//! No clock but the workflow's, no randomness but the run's, no files, no paths. Inputs of every kind are read
//! leniently (`worker/request.rs`), so that nothing a client sends can make a workflow task fail. Changes go behind
//! `ctx.patched`, since recorded histories are replayed against this file.

#![expect(
    missing_docs,
    reason = "the macros make undocumented constants of the documented handlers"
)]

use std::time::Duration;

use temporalio_common::data_converters::RawValue;
use temporalio_common::error::ActivityExecutionError;
use temporalio_macros::{workflow, workflow_methods};
use temporalio_sdk::{
    ActivityOptions, SyncWorkflowContext, WorkflowCancellationToken, WorkflowContext,
    WorkflowContextView, WorkflowResult, WorkflowTermination,
};

use super::activities::{
    Ask, DeviceActivities, EncodeActivities, EncodeTask, ImageDone, ImageTask, LightActivities,
    Prepared, PublishTask, VideoTask,
};
use super::failure::Ended;
use super::heartbeat::Lane;
use super::progress::{Band, Stage, Tracker};
use super::{policy, request};
use crate::job::progress::Progress;
use crate::job::result::JobResult;
use crate::job::{QUERY_STATUS, SIGNAL_CANCEL, SIGNAL_PROGRESS, ValidJob, WORKFLOW_TYPE};
use crate::render::plan::VideoPlan;
use crate::render::{FramesMade, Made, Plan, VideoMade};
use crate::store::BlobRef;

/// One job, from its request to its result.
#[workflow]
#[derive(Default)]
pub struct GenVideoWorkflow {
    tracker: Tracker,
    /// Set by the signal, which may arrive before the run does.
    cancel_asked: bool,
    /// Follows the native cancel and the signal; every stage but the last two hangs on it.
    token: Option<WorkflowCancellationToken>,
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
        let seed = job.seed.unwrap_or_else(|| u64::from(ctx.random::<u32>()));
        let walk = Walk { ctx: ctx.clone(), token, job };
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
        if let Some(token) = &self.token {
            token.cancel();
        }
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
}

/// One job on its way through the stages.
struct Walk {
    ctx: WorkflowContext<GenVideoWorkflow>,
    token: WorkflowCancellationToken,
    job: ValidJob,
}

impl Walk {
    async fn make(&self, seed: u64) -> Result<JobResult, End> {
        let prepared = self.prepare(seed).await?;
        let image = self.image(&prepared).await?;
        let mut made = Made { image: image.made, runs: Vec::new(), video: None };
        if let Some(video) = &prepared.plan.video {
            let mut start = made.image.image.clone();
            for run in 0..video.runs {
                let frames = self.frames(&prepared, video, start, run).await?;
                start = frames.last_frame.clone();
                made.runs.push(frames);
            }
            made.video = Some(self.encode(&prepared, video, made.runs.clone()).await?);
        }
        self.publish(prepared.plan, made).await
    }

    async fn prepare(&self, seed: u64) -> Result<Prepared, End> {
        self.enter(Stage::Validate, Band { from: 0.0, to: 1.0 })?;
        let options = policy::short(self.ctx.task_queue(), self.token.clone());
        let ask = Ask { job: self.job.clone(), seed };
        self.settle(
            self.ctx.execute_activity(LightActivities::validate_request, ask, options).await,
        )
    }

    async fn image(&self, prepared: &Prepared) -> Result<ImageDone, End> {
        let plan = prepared.plan.clone();
        let lane = self.lane(Stage::Image, &plan, "image")?;
        let (steps, size) =
            plan.image.as_ref().map_or((1, plan.deliver), |image| (image.steps, image.size));
        let options = self.device(prepared, policy::limit(steps, 1, size));
        let task = ImageTask { job: self.job.clone(), plan, lane };
        let done = self
            .settle(self.ctx.execute_activity(DeviceActivities::gen_image, task, options).await)?;
        self.ctx.state_mut(|state| state.tracker.image_ready(done.url.clone()));
        Ok(done)
    }

    async fn frames(
        &self,
        prepared: &Prepared,
        video: &VideoPlan,
        image: BlobRef,
        run: u32,
    ) -> Result<FramesMade, End> {
        let plan = prepared.plan.clone();
        let title = if video.runs > 1 {
            format!("video, part {} of {}", run + 1, video.runs)
        } else {
            "video".into()
        };
        let lane = self.lane(Stage::Video { run, runs: video.runs }, &plan, &title)?;
        let options =
            self.device(prepared, policy::limit(video.steps, video.frames_per_run, video.size));
        let task = VideoTask { job: self.job.clone(), plan, lane, image, run };
        self.settle(self.ctx.execute_activity(DeviceActivities::gen_video, task, options).await)
    }

    async fn encode(
        &self,
        prepared: &Prepared,
        video: &VideoPlan,
        runs: Vec<FramesMade>,
    ) -> Result<VideoMade, End> {
        let plan = prepared.plan.clone();
        let lane = self.lane(Stage::Encode, &plan, "encoding")?;
        let options = policy::long(
            policy::processor_queue(self.ctx.task_queue()),
            self.token.clone(),
            policy::limit(1, video.delivered, prepared.plan.deliver),
            heartbeat(prepared),
        );
        let task = EncodeTask { job: self.job.clone(), plan, lane, runs };
        self.settle(self.ctx.execute_activity(EncodeActivities::encode_video, task, options).await)
    }

    /// From here on the job completes: a cancel that comes later is too late, so that there is one outcome.
    async fn publish(&self, plan: Plan, made: Made) -> Result<JobResult, End> {
        self.enter(Stage::Publish, Stage::Publish.band(&plan.shares))?;
        let options = policy::short(self.ctx.task_queue(), WorkflowCancellationToken::new());
        let task = PublishTask { job: self.job.clone(), plan, made };
        match self.ctx.execute_activity(LightActivities::publish, task, options).await {
            Ok(result) => Ok(result),
            Err(error) => self.settle(Err(error)),
        }
    }

    /// Removes what was made, then ends the job.
    async fn end(&self, end: End) -> WorkflowTermination {
        let options = policy::cleanup(self.ctx.task_queue());
        // A sweep takes what stays behind; the job's own end does not depend on it.
        let _ = self.ctx.execute_activity(LightActivities::cleanup_resources, (), options).await;
        match end {
            End::Failed(ended) => refuse(&self.ctx, ended),
            End::Cancelled => {
                let progress = self.ctx.state_mut(|state| {
                    state.tracker.cancel();
                    state.tracker.progress().clone()
                });
                show(&self.ctx);
                WorkflowTermination::cancelled_with_details(progress)
            }
        }
    }

    /// Begins a stage, unless the job was cancelled.
    fn enter(&self, stage: Stage, band: Band) -> Result<(), End> {
        if self.token.is_cancelled() {
            return Err(End::Cancelled);
        }
        self.ctx.state_mut(|state| state.tracker.enter(stage, band, self.job.job_type));
        show(&self.ctx);
        Ok(())
    }

    fn lane(&self, stage: Stage, plan: &Plan, title: &str) -> Result<Lane, End> {
        let band = stage.band(&plan.shares);
        self.enter(stage, band)?;
        Ok(Lane { ticket: stage.ticket(), step: stage.step(), band, title: title.to_owned() })
    }

    fn device(&self, prepared: &Prepared, limit: Duration) -> ActivityOptions {
        let queue = policy::device_queue(self.ctx.task_queue());
        policy::long(queue, self.token.clone(), limit, heartbeat(prepared))
    }

    /// A cancel that came while a stage worked wins over whatever the stage came to.
    fn settle<T>(&self, outcome: Result<T, ActivityExecutionError>) -> Result<T, End> {
        match outcome {
            _ if self.token.is_cancelled() => Err(End::Cancelled),
            Ok(value) => Ok(value),
            Err(ActivityExecutionError::Cancelled(_)) => Err(End::Cancelled),
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
