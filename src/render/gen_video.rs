//! One run of the video model: a picture in, its frames out as one lossless work object.
//!
//! Runs are chained by the caller: each starts from the last frame of the one before, and the seed of its noise is that
//! of the job with the run's number.

use std::collections::BTreeMap;
use std::time::Instant;

use image::RgbImage;

use super::checkpoint::Attempt;
use super::models::{self, Wanted};
use super::plan::VideoPlan;
use super::{Error, FramesMade, Hook, Inner, Order, Work, frames};
use crate::engine::{LoadOptions, VideoRequest};
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
    let (made, work) = infer(inner, order, plan, request, hook)?;
    let last = made.last().ok_or_else(|| Error::Frames("the model made no frame".to_owned()))?;
    let last_frame = store.put_work(&order.job_key, &still::png(last, &[]))?;
    let count =
        u32::try_from(made.len()).map_err(|_| Error::Frames(format!("{} frames", made.len())))?;
    let frames = store.put_work(&order.job_key, &frames::pack(&made)?)?;
    Ok(FramesMade { run, frames, count, last_frame, work })
}

/// Runs the model under the permit, from where an earlier attempt was; when memory runs out all the same, once more
/// with as little of it as possible.
fn infer(
    inner: &Inner,
    order: &Order,
    plan: &VideoPlan,
    mut request: VideoRequest,
    hook: &mut Hook<'_>,
) -> Result<(Vec<RgbImage>, Work), Error> {
    let settings = &inner.settings;
    let folder = settings.library.find(&plan.lookup, Task::ImageToVideo)?.folder;
    let hashes = inner.hashes.model(&folder, hook)?;
    let wanted = Wanted { path: folder, options: LoadOptions::default(), hashes };
    let mut permit = inner.desk.wait(hook)?;
    let mut attempt = None;
    for last_try in [false, true] {
        let started = Instant::now();
        let memory = if last_try { "low" } else { &settings.memory };
        let (model, ready) = permit.video(settings, &wanted, (&mut request, memory), hook)?;
        let loaded = Instant::now();
        let run = match &mut attempt {
            Some(run) => run,
            None => {
                let stage = (format!("video-{}", request.run), wanted.hashes.as_str());
                attempt.insert(Attempt::new(settings, order, &ready.compute, stage)?)
            }
        };
        let decoding = (request.decode_chunk, request.tiling);
        match run.go(&decoding, hook, |at, keep, hook| model.resume(&request, at, keep, hook)) {
            Err(Error::Engine(error)) if !last_try && models::is_out_of_memory(&error) => {
                permit.unload()
            }
            result => {
                let output = result?;
                let seconds = BTreeMap::from([
                    ("video_load".to_owned(), super::seconds(loaded - started)),
                    ("video".to_owned(), super::seconds(loaded.elapsed())),
                ]);
                let mut work = Work { weights: Some(wanted.hashes), ..ready.work(seconds) };
                work.notes.extend(output.notes);
                work.notes.extend(run.note());
                return Ok((output.frames, work));
            }
        }
    }
    unreachable!("the last try returns")
}
