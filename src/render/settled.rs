//! Results of finished stages, found again by an attempt that does not know of them.
//!
//! A worker may die, or lose the server, between the last byte of a stage and the word that it is done. The first
//! attempt that finishes settles the stage; every other one, earlier or later, returns that result.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Error, FramesMade, ImageMade, Order, VideoMade, point};
use crate::store::{self, BlobRef, Store};

/// The result of a stage.
pub(super) trait Stage: Serialize + DeserializeOwned {
    /// Its work objects and its blobs.
    fn objects(&self) -> (Vec<&BlobRef>, Vec<&BlobRef>);
}

impl Stage for ImageMade {
    fn objects(&self) -> (Vec<&BlobRef>, Vec<&BlobRef>) {
        let blobs = std::iter::once(&self.delivered).chain(&self.more);
        let work = std::iter::once(&self.image).chain(&self.work.receipt);
        (work.collect(), blobs.collect())
    }
}

impl Stage for FramesMade {
    fn objects(&self) -> (Vec<&BlobRef>, Vec<&BlobRef>) {
        let work = [&self.frames, &self.last_frame].into_iter().chain(&self.work.receipt);
        (work.collect(), Vec::new())
    }
}

impl Stage for VideoMade {
    fn objects(&self) -> (Vec<&BlobRef>, Vec<&BlobRef>) {
        (Vec::new(), vec![&self.video, &self.poster])
    }
}

/// What the store keeps of a finished stage.
#[derive(Serialize, Deserialize)]
struct Record<T> {
    /// Hash of what was asked, decided and put in: a result of other input is not taken.
    input: String,
    made: T,
}

/// The result of `stage` of `order` with `input` from the stages before: the one that stands, or else that of `work`.
pub(super) fn once<T: Stage>(
    store: &Store,
    order: &Order,
    (stage, input): (&str, &impl Serialize),
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let asked = store::sha256(&serde_json::to_vec(&(&order.job, &order.plan, input))?);
    if let Some(bytes) = store.settled_stage(&order.job_key, stage)? {
        if let Some(made) = standing(store, order, &asked, &bytes)? {
            tracing::info!(stage, "an earlier attempt finished this stage");
            forget_checkpoints(store, order, stage);
            return Ok(made);
        }
        store.unsettle_stage(&order.job_key, stage)?;
    }
    point("stage_begun")?;
    let record = Record { input: asked.clone(), made: work()? };
    point("stage_made")?;
    let bytes = store.settle_stage(&order.job_key, stage, &serde_json::to_vec(&record)?)?;
    point("stage_settled")?;
    forget_checkpoints(store, order, stage);
    Ok(standing(store, order, &asked, &bytes)?.unwrap_or(record.made))
}

/// Nobody goes on from a checkpoint of a stage that is done; an attempt that does not know of it yet makes what it has
/// begun, and removes its own here, or is stopped and keeps nothing. The clean-up of the job takes what stays.
fn forget_checkpoints(store: &Store, order: &Order, stage: &str) {
    if let Err(error) = store.drop_checkpoints(&order.job_key, stage) {
        tracing::warn!(%error, stage, "checkpoints of a finished stage stay");
    }
}

/// The result in `bytes` when it is of this order and all of it is there.
fn standing<T: Stage>(
    store: &Store,
    order: &Order,
    asked: &str,
    bytes: &[u8],
) -> Result<Option<T>, Error> {
    let Ok(record) = serde_json::from_slice::<Record<T>>(bytes) else { return Ok(None) };
    if record.input != asked {
        return Ok(None);
    }
    let (work, blobs) = record.made.objects();
    for object in work {
        if !store.has_work(&order.job_key, &object.sha256)? {
            return Ok(None);
        }
    }
    for blob in blobs {
        if !store.has_blob(&blob.sha256)? {
            return Ok(None);
        }
    }
    Ok(Some(record.made))
}
