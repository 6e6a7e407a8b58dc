//! Whether the disk has room, asked before a job, before a stage and before a result: free space, and the quota if there
//! is one. With a store in a bucket a film alone lies on the disk, until it is finished.

use std::io;

use super::{Error, Plan, Settings};
use crate::{disk, store};

/// Bytes that stay free on the disk whatever a new job wants.
const KEEP_FREE: u64 = 64 << 20;
/// Bytes of a finished film for each of its pixels, twice: being written and being kept. Noise, the worst of all films,
/// takes about as much.
const FILM_BYTES: u64 = 1;
/// Checkpoints of one stage that lie beside each other: one each ten seconds, and each for a minute.
const CHECKPOINTS: u64 = 8;

/// Refuses a job whose files do not fit.
pub(super) fn check(settings: &Settings, plan: &Plan) -> Result<(), Error> {
    fits(settings, ("the job", bytes(plan)), film(plan), KEEP_FREE)
}

/// Refuses a stage whose result does not fit: jobs that were planned at the same time may take each other's room.
pub(super) fn check_stage(settings: &Settings, plan: &Plan, stage: &str) -> Result<(), Error> {
    let (result, film) = match stage {
        "image" => (pictures(plan), 0),
        "encode" => (film(plan), film(plan)),
        _ => (run(plan), 0),
    };
    fits(settings, (&format!("stage `{stage}`"), result), film, 0)
}

/// Refuses `bytes` of a result that do not fit.
pub(super) fn check_result(settings: &Settings, bytes: u64) -> Result<(), Error> {
    fits(settings, ("a result", bytes), 0, 0)
}

fn fits(
    settings: &Settings,
    (what, wanted): (&str, u64),
    film: u64,
    keep_free: u64,
) -> Result<(), Error> {
    let root = settings.store.root();
    let full = |message: String| {
        let source = io::Error::new(io::ErrorKind::StorageFull, message);
        Error::Store(store::Error::DiskFull { path: root.to_owned(), source })
    };
    let on_disk = if settings.store.is_remote() { film } else { wanted };
    if let Some(free) = disk::free_space(root)
        && on_disk.saturating_add(keep_free) > free
    {
        return Err(full(format!(
            "{what} takes up to {} and {} are free",
            size(on_disk),
            size(free)
        )));
    }
    if let Some(quota) = settings.disk_quota {
        let used = match quota.checked_sub(wanted) {
            Some(rest) => settings.store.usage_over(rest)?,
            None => Some(settings.store.usage()?),
        };
        if let Some(used) = used {
            return Err(full(format!(
                "{what} takes up to {}, {} of the quota of {} are used",
                size(wanted),
                size(used),
                size(quota)
            )));
        }
    }
    Ok(())
}

/// Bytes that the job may have in the store at once, roughly: pictures, frames, checkpoints, the film.
fn bytes(plan: &Plan) -> u64 {
    let image = plan.image.as_ref().map_or(0, |image| {
        3 * area(image.size) * u64::from(image.batch.unwrap_or(1)) * CHECKPOINTS
    });
    let runs = plan.video.as_ref().map_or(0, |video| u64::from(video.runs) + CHECKPOINTS);
    pictures(plan) + image + run(plan) * runs + film(plan)
}

/// Bytes that the image stage leaves.
fn pictures(plan: &Plan) -> u64 {
    let picture = 3 * area(plan.deliver);
    plan.image.as_ref().map_or(2 * picture, |image| {
        picture * u64::from(image.batch.unwrap_or(1)) + 3 * area(image.size)
    })
}

/// Bytes that a run of the video model leaves.
fn run(plan: &Plan) -> u64 {
    plan.video.as_ref().map_or(0, |video| 3 * area(video.size) * u64::from(video.frames_per_run))
}

fn film(plan: &Plan) -> u64 {
    let pixels = FILM_BYTES * area(plan.deliver);
    plan.video.as_ref().map_or(0, |video| pixels * u64::from(video.delivered))
}

fn area((width, height): (u32, u32)) -> u64 {
    u64::from(width) * u64::from(height)
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
