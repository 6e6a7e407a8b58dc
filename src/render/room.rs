//! Whether the disk has room for a job, asked before the work: free space, and the quota if there is one.

use std::io;

use super::{Error, Plan, Settings};
use crate::{disk, store};

/// Bytes that stay free on the disk whatever a job wants.
const KEEP_FREE: u64 = 64 << 20;
/// Bytes of a finished film for each of its pixels, twice: being written and being kept. Noise, the worst of all films,
/// takes about as much.
const FILM_BYTES: u64 = 1;
/// Checkpoints of one stage that lie beside each other: one each ten seconds, and each for a minute.
const CHECKPOINTS: u64 = 8;

/// Refuses a job whose files do not fit.
pub(super) fn check(settings: &Settings, plan: &Plan) -> Result<(), Error> {
    let root = settings.store.root();
    let wanted = bytes(plan);
    let full = |message: String| {
        let source = io::Error::new(io::ErrorKind::StorageFull, message);
        Error::Store(store::Error::DiskFull { path: root.to_owned(), source })
    };
    if let Some(free) = disk::free_space(root)
        && wanted.saturating_add(KEEP_FREE) > free
    {
        return Err(full(format!(
            "the job takes up to {} and {} are free",
            size(wanted),
            size(free)
        )));
    }
    if let Some(quota) = settings.disk_quota {
        let used = settings.store.usage()?;
        if used.saturating_add(wanted) > quota {
            return Err(full(format!(
                "the job takes up to {}, {} of the quota of {} are used",
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
    let area = |(width, height): (u32, u32)| u64::from(width) * u64::from(height);
    let picture = 3 * area(plan.deliver);
    let image = plan.image.as_ref().map_or(2 * picture, |image| {
        let made = 3 * area(image.size);
        let each = u64::from(image.batch.unwrap_or(1));
        (picture + made * CHECKPOINTS) * each + made
    });
    let video = plan.video.as_ref().map_or(0, |video| {
        let run = 3 * area(video.size) * u64::from(video.frames_per_run);
        let film = FILM_BYTES * area(plan.deliver) * u64::from(video.delivered);
        run * (u64::from(video.runs) + CHECKPOINTS) + film
    });
    image + video
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
