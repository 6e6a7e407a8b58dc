//! The end of a job: its receipt and its manifest, written exactly once.
//!
//! The manifest is the [`JobResult`] the workflow returns. Wall-clock times stand only here and in the receipt; they
//! differ between attempts, so an earlier attempt's manifest of the same files counts as this one's success.

use super::receipt::Receipt;
use super::{Error, Hook, Inner, Made, Order, VideoMade, Work, report};
use crate::job::progress::{JobStatus, Progress, Step};
use crate::job::result::{Asset, Assets, Facts, JobResult};
use crate::store::{self, BlobRef, Store};

pub(super) fn publish(
    inner: &Inner,
    order: &Order,
    made: &Made,
    hook: &mut Hook<'_>,
) -> Result<JobResult, Error> {
    let store = &inner.settings.store;
    report(hook, "publish", 0, 1)?;
    let result = stand(store, order, made, hook)?;
    // The result stands, whatever the hook says now and what is left of the work.
    if let Err(error) = store.cleanup_published(&order.job_key) {
        tracing::warn!(%error, key = %order.job_key, "work objects of a finished job stay until the next sweep");
    }
    let _ = report(hook, "publish", 1, 1);
    Ok(result)
}

/// Writes receipt and manifest, unless an earlier attempt did.
fn stand(
    store: &Store,
    order: &Order,
    made: &Made,
    hook: &mut Hook<'_>,
) -> Result<JobResult, Error> {
    if let Some(result) = earlier(store, order, made)? {
        return Ok(result);
    }
    check_present(store, made)?;
    let facts = facts(order, made);
    let receipt = serde_json::to_vec_pretty(&Receipt::of(store, order, made, &facts)?)?;
    let receipt = store.put_blob(&order.job_key, &receipt)?;
    super::point("receipt_put")?;
    let result = result(store, order, made, facts, &receipt)?;
    report(hook, "publish", 0, 1)?;
    let assets = &result.assets;
    let files: Vec<&str> = [&assets.image, &assets.video, &assets.poster, &assets.receipt]
        .into_iter()
        .flatten()
        .chain(assets.images.iter().skip(1))
        .map(|asset| &*asset.sha256)
        .collect();
    match store.publish(&order.job_key, &serde_json::to_vec_pretty(&result)?, &files) {
        Ok(_) => Ok(result),
        // Another attempt was quicker since we looked.
        Err(store::Error::Conflict { .. }) => earlier(store, order, made)?
            .ok_or_else(|| Error::Order("a manifest both exists and does not".to_owned())),
        Err(error) => Err(error.into()),
    }
}

/// The result of an earlier attempt: the same files are success, other files a conflict.
fn earlier(store: &Store, order: &Order, made: &Made) -> Result<Option<JobResult>, Error> {
    let Some(manifest) = store.manifest(&order.job_key)? else {
        return Ok(None);
    };
    let result: JobResult = serde_json::from_slice(&manifest)?;
    let hash = |asset: &Option<Asset>| asset.as_ref().map(|asset| asset.sha256.clone());
    let (image, video) = (hash(&result.assets.image), hash(&result.assets.video));
    let made_video = made.video.as_ref().map(|made| made.video.sha256.clone());
    let others = result.assets.images.iter().skip(1).map(|asset| &asset.sha256);
    let same = others.eq(made.image.more.iter().map(|blob| &blob.sha256));
    if image.as_deref() == Some(&*made.image.delivered.sha256) && same && video == made_video {
        return Ok(Some(result));
    }
    Err(Error::Conflict {
        key: order.job_key.to_string(),
        published: video.or(image).unwrap_or_default(),
        made: made_video.unwrap_or_else(|| made.image.delivered.sha256.clone()),
    })
}

/// A manifest must never name what is not there.
fn check_present(store: &Store, made: &Made) -> Result<(), Error> {
    let of_video = made.video.iter().flat_map(|made| [&made.video, &made.poster]);
    for blob in images(made).chain(of_video) {
        if !store.has_blob(&blob.sha256)? {
            return Err(Error::Gone(blob.sha256.clone()));
        }
    }
    Ok(())
}

/// Every image of the job.
fn images(made: &Made) -> impl Iterator<Item = &BlobRef> {
    std::iter::once(&made.image.delivered).chain(&made.image.more)
}

fn asset(store: &Store, blob: &BlobRef, media_type: &str) -> Result<Option<Asset>, Error> {
    Ok(Some(Asset {
        url: store.blob_url(&blob.sha256)?,
        sha256: blob.sha256.clone(),
        bytes: blob.bytes,
        media_type: media_type.to_owned(),
    }))
}

fn result(
    store: &Store,
    order: &Order,
    made: &Made,
    facts: Facts,
    receipt: &BlobRef,
) -> Result<JobResult, Error> {
    let (video, poster) = match &made.video {
        Some(made) => {
            (asset(store, &made.video, "video/mp4")?, asset(store, &made.poster, "image/jpeg")?)
        }
        None => (None, None),
    };
    let image = asset(store, &made.image.delivered, "image/png")?;
    let mut all = Vec::new();
    for blob in images(made).filter(|_| !made.image.more.is_empty()) {
        all.extend(asset(store, blob, "image/png")?);
    }
    let receipt = asset(store, receipt, "application/json")?;
    let assets = Assets { image, images: all, video, poster, receipt };
    let url = |asset: &Option<Asset>| asset.as_ref().map(|asset| asset.url.clone());
    let progress = Progress {
        step: Step::Completed,
        status: JobStatus::Completed,
        percent: 100.0,
        asset_url: url(&assets.video).or_else(|| url(&assets.image)),
        image_url: url(&assets.image),
        ..Progress::pending(&message(made))
    };
    Ok(JobResult { progress, assets, done: facts, metadata: order.job.metadata.clone() })
}

fn message(made: &Made) -> String {
    match &made.video {
        Some(VideoMade { size: (width, height), duration, frames, fps, .. }) => {
            format!("video ready: {width}x{height}, {duration:.2} s, {frames} frames at {fps} fps")
        }
        None => {
            let (width, height) = made.image.delivered_size;
            match made.image.more.len() {
                0 => format!("image ready: {width}x{height}"),
                more => format!("{} images ready: {width}x{height}", more + 1),
            }
        }
    }
}

fn facts(order: &Order, made: &Made) -> Facts {
    let plan = &order.plan;
    let video = made.video.as_ref();
    let works: Vec<&Work> =
        std::iter::once(&made.image.work).chain(made.runs.iter().map(|run| &run.work)).collect();
    // A given image is not computed, so the last stage that names a device tells.
    let computed = works.iter().rev().find(|work| !work.device.is_empty());
    let mut notes = plan.notes.clone();
    let mut timings = std::collections::BTreeMap::new();
    for work in &works {
        notes.extend(work.notes.iter().filter(|note| !plan.notes.contains(note)).cloned());
    }
    if let (Some(made), Some(plan)) = (video, &plan.video)
        && made.interpolated_frames > 0
    {
        notes.push(format!(
            "{} frames of the model play at {} fps: {} of the {} frames are interpolated between them",
            plan.kept_native, made.fps, made.interpolated_frames, made.frames
        ));
    }
    let seconds = works.iter().map(|work| &work.seconds).chain(video.map(|made| &made.seconds));
    for (stage, spent) in seconds.flatten() {
        *timings.entry(stage.clone()).or_insert(0.0) += spent;
    }
    let array = |(width, height): (u32, u32)| [width, height];
    Facts {
        seed: plan.seed,
        delivered_size: array(video.map_or(made.image.delivered_size, |made| made.size)),
        image_size: plan.image.as_ref().map(|plan| array(plan.size)),
        video_size: plan.video.as_ref().map(|plan| array(plan.size)),
        native_frames: video.map_or(0, |made| made.native_frames),
        interpolated_frames: video.map_or(0, |made| made.interpolated_frames),
        fps: video.map(|made| made.fps),
        duration: video.map(|made| made.duration),
        image_model: plan.image.as_ref().map(|plan| plan.model.clone()),
        video_model: plan.video.as_ref().map(|plan| plan.model.clone()),
        device: computed.map_or_else(|| "none".to_owned(), |work| work.device.clone()),
        dtype: computed.map_or_else(|| "none".to_owned(), |work| work.dtype.clone()),
        prompt_tokens: made.image.tokens.map(|(tokens, cut)| [tokens, cut]),
        encoder: video.map(|made| made.encoder.clone()),
        notes,
        timings,
    }
}
