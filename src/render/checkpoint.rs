//! Checkpoints of the stage at work, so that an attempt goes on where the one before it was.
//!
//! The engine shows where it is after every step and every decoded chunk. Here the state becomes a work object when
//! more work than allowed would be lost otherwise, and when the stage is stopped; its hash travels with the reports to
//! whoever starts the next attempt. What cannot be taken up is said, and the stage starts over.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::models::report_of;
use super::{Error, Hook, Order, Settings};
use crate::engine::device::Compute;
use crate::engine::{self, Checkpoint, Keep};
use crate::store;

/// How long an older checkpoint stays: the last heartbeat that got through may name it.
const SUPERSEDED: Duration = Duration::from_secs(60);

/// One attempt at a stage of inference.
pub(super) struct Attempt<'a> {
    at: Checkpoint,
    note: Option<String>,
    keeper: Keeper<'a>,
}

impl<'a> Attempt<'a> {
    /// An attempt of `stage` on `compute`, from the checkpoint the order names.
    pub(super) fn new(
        settings: &'a Settings,
        order: &'a Order,
        compute: &Compute,
        stage: &impl Debug,
    ) -> Result<Self, Error> {
        let asked = serde_json::to_vec(&(&order.job, &order.plan))?;
        let run = format!(
            "{stage:?} {} {} {} {}",
            store::sha256(&asked),
            env!("CARGO_PKG_VERSION"),
            compute.name(),
            compute.dtype_name()
        );
        let (mut at, mut note, mut last) = (Checkpoint::default(), None, None);
        if let Some(sha256) = &order.resume {
            let read = || -> Result<Checkpoint, Error> {
                let bytes = settings.store.get_work(&order.job_key, sha256)?;
                Ok(Checkpoint::from_bytes(&bytes, &run, compute.device())?)
            };
            match read() {
                Ok(found) => {
                    tracing::info!(done = %found, "going on from a checkpoint");
                    (at, last) = (found, Some(Arc::from(sha256.as_str())));
                }
                Err(error) => {
                    tracing::warn!(%error, sha256, "a checkpoint is of no use");
                    note = Some(format!("a part was made twice: {error}"));
                }
            }
        }
        let older = VecDeque::new();
        let keeper =
            Keeper { settings, order, run, saved_at: Instant::now(), last, older, failed: None };
        Ok(Self { at, note, keeper })
    }

    /// Runs `work` from where the stage is. Frames that an earlier attempt decoded count when they were decoded as
    /// `decoding` says.
    pub(super) fn go<T>(
        &mut self,
        decoding: &impl Debug,
        hook: &mut Hook<'_>,
        work: impl FnOnce(&mut Checkpoint, &mut Keep<'_>, &mut engine::Hook<'_>) -> engine::Result<T>,
    ) -> Result<T, Error> {
        let Self { at, keeper, .. } = self;
        at.decode_as(format!("{decoding:?}"));
        let shared = RefCell::new(&mut *keeper);
        let result = work(at, &mut |at| shared.borrow_mut().look(at), &mut |event| {
            let keeper = shared.borrow();
            let mut report = report_of(event);
            report.checkpoint.clone_from(&keeper.last);
            let answer = hook(report);
            if keeper.failed.is_some() { ControlFlow::Break(()) } else { answer }
        });
        let Err(engine::Error::Stopped) = result else { return Ok(result?) };
        if keeper.failed.is_none() && !at.is_empty() {
            keeper.failed = keeper.save(at).err();
        }
        if let Some(error) = keeper.failed.take() {
            return Err(error);
        }
        // Already stopped: this only says where to go on.
        let mut report = super::Report::new("load", 0, 1);
        report.checkpoint.clone_from(&keeper.last);
        let _ = hook(report);
        Err(Error::Stopped)
    }

    /// What the user should know.
    pub(super) fn note(&self) -> Option<String> {
        self.note.clone()
    }
}

/// Puts checkpoints into the store.
struct Keeper<'a> {
    settings: &'a Settings,
    order: &'a Order,
    /// Whose checkpoints they are; one of another run is not taken up.
    run: String,
    saved_at: Instant,
    last: Option<Arc<str>>,
    older: VecDeque<(Instant, Arc<str>)>,
    /// Why a checkpoint could not be kept; the stage does not go on then.
    failed: Option<Error>,
}

impl Keeper<'_> {
    /// Saves `at` when too much work would be lost without it.
    fn look(&mut self, at: &Checkpoint) {
        if self.failed.is_none() && self.saved_at.elapsed() >= self.settings.checkpoint_every {
            self.failed = self.save(at).err();
        }
    }

    fn save(&mut self, at: &Checkpoint) -> Result<(), Error> {
        let (store, job) = (&self.settings.store, &self.order.job_key);
        let kept = store.put_work(job, &at.to_bytes(&self.run)?)?;
        self.saved_at = Instant::now();
        let before = self.last.replace(Arc::from(kept.sha256));
        if let Some(before) = before.filter(|before| Some(before) != self.last.as_ref()) {
            self.older.push_back((self.saved_at, before));
        }
        while let Some((superseded, sha256)) = self.older.front()
            && superseded.elapsed() > SUPERSEDED
        {
            store.drop_work(job, sha256)?;
            self.older.pop_front();
        }
        Ok(())
    }
}
