//! Frames of all runs to one mp4: joined, interpolated to the delivered rate, resized, encoded, checked, kept.
//!
//! Frames stream from the interpolation through the resize into the encoder; only the native ones are all in memory.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use image::RgbImage;

use super::plan::VideoPlan;
use super::{
    Error, FramesMade, Hook, Inner, Order, Report, VideoMade, Work, frames, label, report, room,
    seconds,
};
use crate::media::encode::{self, VideoWriter};
use crate::media::interpolate::{Interpolated, interpolate};
use crate::media::{self, VideoSpec, still};

/// Encoder threads. Fixed, since their number shapes the bytes, and the same job must end in the same file everywhere.
pub(super) const ENCODER_THREADS: u32 = 4;
/// Constant quality of the encoder, visually near lossless.
pub(super) const CRF: u8 = 17;
/// Quality of the poster.
const POSTER_QUALITY: u8 = 90;

pub(super) fn encode_video(
    inner: &Inner,
    order: &Order,
    runs: &[FramesMade],
    hook: &mut Hook<'_>,
) -> Result<VideoMade, Error> {
    let plan = order
        .plan
        .video
        .as_ref()
        .ok_or_else(|| Error::Order("the plan holds no video".to_owned()))?;
    let started = Instant::now();
    let native = join(inner, order, plan, runs, hook)?;
    let store = &inner.settings.store;
    let file = store.temp_file(Some(&order.job_key), ".mp4")?;
    let work = runs.first().map_or_else(Work::default, |made| made.work.clone());
    let mut writer = VideoWriter::create(file.path(), &spec(order, plan, &work))?;
    let (counts, poster) = stream(&native, order, plan, &mut writer, hook)?;
    let encoder = writer.encoder();
    let all = u64::from(plan.delivered);
    let info = writer.finish(&mut || hook(Report::new("encode", all, all)))?;
    let bytes = file.path().metadata().map_or(0, |data| data.len());
    room::check_result(&inner.settings, bytes)?;
    let video = store.put_blob_file(&order.job_key, file.path())?;
    let poster = store.put_blob(&order.job_key, &still::generated_jpeg(&poster, POSTER_QUALITY))?;
    Ok(VideoMade {
        video,
        poster,
        size: (info.width, info.height),
        frames: info.frames,
        native_frames: counts.native,
        interpolated_frames: counts.made,
        fps: f64::from(info.fps.num) / f64::from(info.fps.den),
        duration: info.duration,
        encoder,
        encoder_version: std::iter::once(encode::libavcodec())
            .chain(info.encoder)
            .collect::<Vec<_>>()
            .join(", "),
        seconds: BTreeMap::from([("encode".to_owned(), seconds(started.elapsed()))]),
    })
}

/// The native frames the delivered time spans. Every run but the first opens with a copy of the frame before it.
fn join(
    inner: &Inner,
    order: &Order,
    plan: &VideoPlan,
    runs: &[FramesMade],
    hook: &mut Hook<'_>,
) -> Result<Vec<RgbImage>, Error> {
    let in_order = runs.iter().zip(0..).all(|(made, run)| made.run == run);
    if !in_order || u32::try_from(runs.len()) != Ok(plan.runs) {
        return Err(Error::Order(format!(
            "{} of {} runs given, or out of order",
            runs.len(),
            plan.runs
        )));
    }
    let kept = usize::try_from(plan.kept_native)
        .map_err(|_| Error::Order(format!("{} frames", plan.kept_native)))?;
    let mut all: Vec<RgbImage> = Vec::with_capacity(kept);
    for made in runs {
        report(hook, "interpolate", 0, u64::from(plan.delivered))?;
        let bytes = inner.settings.store.get_work(&order.job_key, &made.frames.sha256)?;
        let shared = usize::from(made.run > 0);
        all.extend(frames::unpack(&bytes)?.into_iter().skip(shared));
    }
    if all.len() < kept {
        return Err(Error::Frames(format!(
            "{} native frames where the plan keeps {kept}",
            all.len()
        )));
    }
    all.truncate(kept);
    Ok(all)
}

/// Pushes every delivered frame into `writer`; gives back the counts and the first frame as delivered.
fn stream(
    native: &[RgbImage],
    order: &Order,
    plan: &VideoPlan,
    writer: &mut VideoWriter,
    hook: &mut Hook<'_>,
) -> Result<(Interpolated, RgbImage), Error> {
    let (width, height) = order.plan.deliver;
    let total = u64::from(plan.delivered);
    let mut poster = None;
    let mut done = 0;
    let mut sink = |frame: RgbImage| -> Result<ControlFlow<()>, media::Error> {
        let frame = still::cover(&frame, width, height);
        writer.push(&frame)?;
        poster.get_or_insert(frame);
        done += 1;
        match hook(Report::new("encode", done, total)) {
            ControlFlow::Break(()) => Err(media::Error::Stopped),
            go_on => Ok(go_on),
        }
    };
    let counts = interpolate(native, plan.delivered, &mut sink)?;
    let poster =
        poster.ok_or_else(|| Error::Frames("the interpolation gave no frame".to_owned()))?;
    Ok((counts, poster))
}

fn spec(order: &Order, plan: &VideoPlan, work: &Work) -> VideoSpec {
    VideoSpec {
        width: order.plan.deliver.0,
        height: order.plan.deliver.1,
        fps: media::FrameRate { num: plan.fps.num, den: plan.fps.den },
        metadata: label::video_tags(order, plan, work),
        threads: ENCODER_THREADS,
        crf: CRF,
    }
}
