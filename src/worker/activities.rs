//! The activities: each hands its argument to one stage of the renderer on a blocking thread.
//!
//! Three groups for three queues: light ones beside the workflows, those that need the device, and the encoder.
//! Names are explicit, since running jobs and clients of other languages rely on them.

use std::future::Future;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use temporalio_common::error::ApplicationFailure;
use temporalio_macros::activities;
use temporalio_sdk::activities::{ActivityContext, ActivityError};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::fleet::{self, Peer};
use super::heartbeat::{self, Lane};
use super::stage_thread::StageThread;
use super::{failure, policy};
use crate::job::ValidJob;
use crate::job::class::ErrorClass;
use crate::job::result::JobResult;
use crate::render::{self, FramesMade, ImageMade, Made, Order, Plan, Renderer, Report, VideoMade};
use crate::store::{BlobRef, JobKey};

/// Argument of `validate_request`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) job: ValidJob,
    pub(crate) seed: u64,
}

/// Result of `validate_request`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Prepared {
    pub(crate) plan: Plan,
    /// Heartbeat timeout of the stages to come, as this worker is set up.
    pub(crate) heartbeat_ms: u64,
    /// This worker's host queue, where its store is its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<String>,
}

/// Argument of `gen_image`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ImageTask {
    pub(crate) job: ValidJob,
    pub(crate) plan: Plan,
    pub(crate) lane: Lane,
}

/// Result of `gen_image`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ImageDone {
    pub(crate) made: ImageMade,
    /// Where the delivered picture can be seen while the job goes on.
    pub(crate) url: Option<String>,
    /// The host queue of the worker that has the files, where its store is its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<String>,
}

/// Argument of `replace_image`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ReplaceTask {
    pub(crate) job: ValidJob,
    pub(crate) plan: Plan,
    /// Id of the other image, unchecked.
    pub(crate) image: String,
}

/// Result of `replace_image`: the job goes on as if it had been asked for with that image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Replaced {
    pub(crate) job: ValidJob,
    pub(crate) plan: Plan,
    pub(crate) done: ImageDone,
}

/// Argument of `gen_video`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VideoTask {
    pub(crate) job: ValidJob,
    pub(crate) plan: Plan,
    pub(crate) lane: Lane,
    pub(crate) image: BlobRef,
    pub(crate) run: u32,
}

/// Argument of `encode_video`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct EncodeTask {
    pub(crate) job: ValidJob,
    pub(crate) plan: Plan,
    pub(crate) lane: Lane,
    pub(crate) runs: Vec<FramesMade>,
}

/// Argument of `publish`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PublishTask {
    pub(crate) job: ValidJob,
    pub(crate) plan: Plan,
    pub(crate) made: Made,
}

/// Activities that take moments, polled beside the workflows.
#[derive(Clone)]
pub(crate) struct LightActivities {
    pub(crate) renderer: Renderer,
    pub(crate) heartbeat_timeout: Duration,
    pub(crate) host: Option<String>,
    /// The queue of the workflows.
    pub(crate) queue: String,
}

#[activities]
impl LightActivities {
    #[activity(name = "validate_request")]
    pub(crate) async fn validate_request(
        self: Arc<Self>,
        ctx: ActivityContext,
        ask: Ask,
    ) -> Result<Prepared, ActivityError> {
        let renderer = self.renderer.clone();
        let plan = heartbeat::plain(&ctx, move || renderer.plan(&ask.job, ask.seed)).await?;
        let heartbeat_ms = u64::try_from(self.heartbeat_timeout.as_millis()).unwrap_or(u64::MAX);
        Ok(Prepared { plan, heartbeat_ms, host: self.host.clone() })
    }

    #[activity(name = "replace_image")]
    pub(crate) async fn replace_image(
        self: Arc<Self>,
        ctx: ActivityContext,
        task: ReplaceTask,
    ) -> Result<Replaced, ActivityError> {
        let renderer = self.renderer.clone();
        let order = order(&ctx, task.job, task.plan)?;
        heartbeat::plain(&ctx, move || {
            let (order, made) = renderer.replace_image(&order, &task.image, &mut go_on)?;
            let done = image_done(&renderer, made, self.host.clone());
            Ok(Replaced { job: order.job, plan: order.plan, done })
        })
        .await
    }

    #[activity(name = "publish")]
    pub(crate) async fn publish(
        self: Arc<Self>,
        ctx: ActivityContext,
        task: PublishTask,
    ) -> Result<JobResult, ActivityError> {
        let renderer = self.renderer.clone();
        let order = order(&ctx, task.job, task.plan)?;
        heartbeat::plain(&ctx, move || renderer.publish(&order, &task.made, &mut go_on)).await
    }

    /// Says that somebody works for the queue.
    #[activity(name = "answer")]
    pub(crate) async fn answer(
        self: Arc<Self>,
        _ctx: ActivityContext,
    ) -> Result<(), ActivityError> {
        Ok(())
    }

    /// Says who works for the queue, and with what.
    #[activity(name = "find_workers")]
    pub(crate) async fn find_workers(
        self: Arc<Self>,
        ctx: ActivityContext,
    ) -> Result<Vec<Peer>, ActivityError> {
        let found = fleet::peers(&ctx.client(), &self.queue).await;
        found.map_err(|status| ActivityError::application(ApplicationFailure::new(status)))
    }

    #[activity(name = "cleanup_resources")]
    pub(crate) async fn cleanup_resources(
        self: Arc<Self>,
        ctx: ActivityContext,
    ) -> Result<(), ActivityError> {
        let renderer = self.renderer.clone();
        let key = job_key(&ctx)?;
        heartbeat::plain(&ctx, move || renderer.cleanup(&key)).await
    }
}

/// Activities that need the device: one at a time.
#[derive(Clone)]
pub(crate) struct DeviceActivities {
    pub(crate) renderer: Renderer,
    /// Told when the device has failed: what its driver says from then on may be of no use.
    pub(crate) unfit: Arc<Notify>,
    pub(crate) host: Option<String>,
    /// The device, which has one permit for all of its queues.
    pub(crate) device: Arc<Semaphore>,
    pub(crate) thread: StageThread,
}

impl DeviceActivities {
    /// The device's turn. There is one device for several queues, so it may be taken: then what nobody else can do waits
    /// here, and everything else goes back to the server while another worker may be free.
    async fn take(
        &self,
        ctx: &ActivityContext,
    ) -> Result<impl Future<Output = OwnedSemaphorePermit> + use<>, ActivityError> {
        let device = self.device.clone();
        let free = device.clone().try_acquire_owned().ok();
        let own = self.host.as_deref().map(policy::device_queue);
        if free.is_none() && own.is_none_or(|own| own != ctx.info().task_queue) {
            heartbeat::pass_on(ctx).await?;
        }
        Ok(async move {
            match free {
                Some(permit) => permit,
                None => device.acquire_owned().await.expect("nobody closes it"),
            }
        })
    }

    fn mind<T>(unfit: &Notify, outcome: Result<T, render::Error>) -> Result<T, render::Error> {
        if outcome.as_ref().is_err_and(render::is_of_device) {
            unfit.notify_one();
        }
        outcome
    }
}

#[activities]
impl DeviceActivities {
    #[activity(name = "gen_image")]
    pub(crate) async fn gen_image(
        self: Arc<Self>,
        ctx: ActivityContext,
        task: ImageTask,
    ) -> Result<ImageDone, ActivityError> {
        let device = self.take(&ctx).await?;
        let renderer = self.renderer.clone();
        let order = order(&ctx, task.job, task.plan)?;
        let unfit = self.unfit.clone();
        let place = (self.host.as_deref(), device, &self.thread);
        let made = heartbeat::drive(&ctx, &task.lane, place, move |hook| {
            Self::mind(&unfit, renderer.gen_image(&order, hook))
        })
        .await?;
        Ok(image_done(&self.renderer, made, self.host.clone()))
    }

    #[activity(name = "gen_video")]
    pub(crate) async fn gen_video(
        self: Arc<Self>,
        ctx: ActivityContext,
        task: VideoTask,
    ) -> Result<FramesMade, ActivityError> {
        let device = self.take(&ctx).await?;
        let (renderer, unfit) = (self.renderer.clone(), self.unfit.clone());
        let order = order(&ctx, task.job, task.plan)?;
        heartbeat::drive(&ctx, &task.lane, (None, device, &self.thread), move |hook| {
            Self::mind(&unfit, renderer.gen_video(&order, &task.image, task.run, hook))
        })
        .await
    }
}

/// The encoder: no device, but much of the processor.
#[derive(Clone)]
pub(crate) struct EncodeActivities {
    pub(crate) renderer: Renderer,
    pub(crate) thread: StageThread,
}

#[activities]
impl EncodeActivities {
    #[activity(name = "encode_video")]
    pub(crate) async fn encode_video(
        self: Arc<Self>,
        ctx: ActivityContext,
        task: EncodeTask,
    ) -> Result<VideoMade, ActivityError> {
        let renderer = self.renderer.clone();
        let order = order(&ctx, task.job, task.plan)?;
        let place = (None, std::future::ready(()), &self.thread);
        heartbeat::drive(&ctx, &task.lane, place, move |hook| {
            renderer.encode_video(&order, &task.runs, hook)
        })
        .await
    }
}

/// A hook that never stops.
fn go_on(_: Report) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn image_done(renderer: &Renderer, made: ImageMade, host: Option<String>) -> ImageDone {
    let url = renderer.store().blob_url(&made.delivered.sha256).ok();
    ImageDone { made, url, host }
}

fn order(ctx: &ActivityContext, job: ValidJob, plan: Plan) -> Result<Order, ActivityError> {
    Ok(Order { resume: heartbeat::checkpoint(ctx), ..Order::new(job_key(ctx)?, job, plan) })
}

fn job_key(ctx: &ActivityContext) -> Result<JobKey, ActivityError> {
    match &ctx.info().workflow_id {
        Some(id) => Ok(JobKey::of_workflow(id)),
        None => {
            let message = "started without a workflow, so there is no job to work for".to_owned();
            Err(ActivityError::application(failure::fatal(ErrorClass::Bug, message)))
        }
    }
}
