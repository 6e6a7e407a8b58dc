//! One run of the video model: a picture in, its frames out as one lossless work object.
//!
//! Runs are chained by the caller: each starts from the last frame of the one before, and the seed of its noise is that
//! of the job with the run's number.

use std::fmt::Debug;

use super::infer::{Request, infer};
use super::models::{Permit, Ready, Wanted};
use super::plan::VideoPlan;
use super::{Error, FramesMade, Hook, Inner, Order, Settings, Work, frames, room};
use crate::engine::{self, Checkpoint, Keep, LoadOptions, VideoModel, VideoOutput, VideoRequest};
use crate::hub::Task;
use crate::media::still;
use crate::store::BlobRef;

pub(super) fn gen_video(
    inner: &Inner,
    order: &Order,
    image: &BlobRef,
    run: u32,
    hook: &mut Hook<'_>,
) -> Result<FramesMade, Error> {
    let plan = order
        .plan
        .video
        .as_ref()
        .ok_or_else(|| Error::Order("the plan holds no video".to_owned()))?;
    if run >= plan.runs {
        return Err(Error::Order(format!("run {run} of {} was asked for", plan.runs)));
    }
    let store = &inner.settings.store;
    let bytes = store.get_work(&order.job_key, &image.sha256)?;
    let picture = still::decode(&bytes, &still::Limits::default())?.image;
    let request = VideoRequest {
        image: still::cover(&picture, plan.size.0, plan.size.1),
        frames: plan.frames_per_run,
        width: plan.size.0,
        height: plan.size.1,
        steps: plan.steps,
        fps: plan.model_fps,
        motion: plan.motion,
        noise_aug: plan.noise_aug,
        min_guidance: plan.min_guidance,
        max_guidance: plan.max_guidance,
        decode_chunk: plan.decode_chunk,
        tiling: None,
        seed: order.plan.seed,
        run,
    };
    let wanted = wanted(inner, plan, hook)?;
    let (output, work) = infer(inner, order, &wanted, request, hook)?;
    let mut work = Work { weights: Some(wanted.hashes), ..work };
    work.notes.extend(output.notes);
    let made = output.frames;
    let last = made.last().ok_or_else(|| Error::Frames("the model made no frame".to_owned()))?;
    let last_frame = store.put_work(&order.job_key, &still::png(last, &[]))?;
    let count =
        u32::try_from(made.len()).map_err(|_| Error::Frames(format!("{} frames", made.len())))?;
    let packed = frames::pack(&made)?;
    room::check_result(&inner.settings, packed.len() as u64)?;
    let frames = store.put_work(&order.job_key, &packed)?;
    Ok(FramesMade { run, frames, count, last_frame, work })
}

/// The model of the plan.
pub(super) fn wanted(
    inner: &Inner,
    plan: &VideoPlan,
    hook: &mut Hook<'_>,
) -> Result<Wanted, Error> {
    let path = inner.settings.library.find(&plan.lookup, Task::ImageToVideo)?.folder;
    let (hashes, files) = inner.hashes.model((&plan.model, &path), hook)?;
    Ok(Wanted { path, options: LoadOptions::default(), hashes, files })
}

impl Request for VideoRequest {
    type Model = VideoModel;
    type Output = VideoOutput;
    const NAME: &'static str = "video";

    fn stage(&self) -> String {
        format!("video-{}", self.run)
    }

    fn decoding(&self) -> impl Debug {
        (self.decode_chunk, self.tiling)
    }

    fn ready<'p>(
        &mut self,
        permit: &'p mut Permit<'_>,
        settings: &Settings,
        wanted: &Wanted,
        memory: &str,
        hook: &mut Hook<'_>,
    ) -> Result<(&'p VideoModel, Ready), Error> {
        permit.video(settings, wanted, (self, memory), hook)
    }

    fn run(
        &self,
        model: &VideoModel,
        at: &mut Checkpoint,
        keep: &mut Keep<'_>,
        hook: &mut engine::Hook<'_>,
    ) -> engine::Result<VideoOutput> {
        model.resume(self, at, keep, hook)
    }
}
