//! Checkpoints of the stage at work, so that an attempt goes on where the one before it was.
//!
//! The engine shows where it is after every step and every decoded chunk. Here the state becomes a work object when
//! more work than allowed would be lost otherwise, and when the stage is stopped. The store notes which one is the
//! newest, and its hash travels with the reports, for whoever starts the next attempt. What cannot be taken up is said,
//! and the stage starts over.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::failure::is_out_of_memory;
use super::models::report_of;
use super::verify::{Mismatch, Part};
use super::{Error, Hook, Order, Report, Settings, is_outage, point};
use crate::engine::device::Compute;
use crate::engine::{self, Checkpoint, Keep, Trace};
use crate::store;

/// How long an older checkpoint stays: another attempt may be about to read it.
const SUPERSEDED: Duration = Duration::from_secs(60);

/// One attempt at a stage of inference.
pub(super) struct Attempt<'a> {
    at: Checkpoint,
    note: Option<String>,
    keeper: Keeper<'a>,
}

impl<'a> Attempt<'a> {
    /// An attempt of `stage` with `weights` on `compute`, from the newest checkpoint there is.
    pub(super) fn new(
        settings: &'a Settings,
        order: &'a Order,
        compute: &Compute,
        (stage, weights): (String, &str),
    ) -> Result<Self, Error> {
        let asked = serde_json::to_vec(&(&order.job, &order.plan))?;
        // Which of several equal devices it was does not matter; another model of device sums in another order.
        let device = compute.name();
        let device = device.split(':').next().unwrap_or_default();
        let run = format!(
            "{stage} of {} by {} with {weights} on {device} ({}) in {}",
            store::sha256(&asked),
            env!("CARGO_PKG_VERSION"),
            compute.model().unwrap_or_default(),
            compute.dtype_name()
        );
        let marked = settings.store.stage_mark(&order.job_key, &stage)?;
        let mut found = None;
        let mut note = None;
        for sha256 in marked.iter().chain(&order.resume) {
            let read = || -> Result<Checkpoint, Error> {
                let bytes = settings.store.get_checkpoint(&order.job_key, &stage, sha256)?;
                Ok(Checkpoint::from_bytes(&bytes, &run, compute.device())?)
            };
            match read() {
                Ok(at) => {
                    tracing::info!(done = %at, "going on from a checkpoint");
                    found = Some((at, Arc::from(sha256.as_str())));
                    break;
                }
                // It may be there, or be of use, and all that was made with it.
                Err(error) if is_outage(&error) || is_out_of_memory(&error) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, sha256, "a checkpoint is of no use");
                    note = Some(format!("a part was made twice: {error}"));
                }
            }
        }
        let note = note.filter(|_| found.is_none());
        let (at, last) = found.map_or_else(Default::default, |(at, last)| (at, Some(last)));
        let keeper = Keeper {
            settings,
            order,
            stage,
            run,
            saved_at: Instant::now(),
            looked_at: Instant::now(),
            is_saved: true,
            last,
            older: VecDeque::new(),
            failed: None,
        };
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
        let mut last_report = Report::new("load", 0, 1);
        let result = work(at, &mut |at| shared.borrow_mut().look(at), &mut |event| {
            let mut keeper = shared.borrow_mut();
            last_report = report_of(event);
            if last_report.stage == "encode_prompt" {
                keeper.failed = point("text_encoded").err();
            }
            last_report.checkpoint.clone_from(&keeper.last);
            let answer = hook(last_report.clone());
            if keeper.failed.is_some() { ControlFlow::Break(()) } else { answer }
        });
        let Err(engine::Error::Stopped) = result else { return Ok(result?) };
        if let Some(error) = keeper.failed.take() {
            return Err(error);
        }
        let settled = keeper.settings.store.settled_stage(&keeper.order.job_key, &keeper.stage);
        // Another attempt may have finished the stage; nobody would remove what is kept now.
        let is_done = matches!(settled, Ok(Some(_)));
        if keeper.is_saved || keeper.order.is_only_attempt || is_done {
            return Err(Error::Stopped);
        }
        match keeper.save(at) {
            Ok(()) => {
                // Already stopped: this only says where to go on.
                last_report.checkpoint.clone_from(&keeper.last);
                let _ = hook(last_report);
            }
            // The stop itself went well; the next attempt has a little more to do.
            Err(error) => {
                tracing::warn!(%error, "a stopped stage could not keep where it was");
            }
        }
        Err(Error::Stopped)
    }

    /// Hashes of every step and chunk, those of earlier attempts too.
    pub(super) fn trace(&self) -> &Trace {
        &self.at.trace
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
    stage: String,
    /// Whose checkpoints they are; one of another run is not taken up.
    run: String,
    saved_at: Instant,
    /// When the last step or chunk was done.
    looked_at: Instant,
    /// Whether nothing was done since the last checkpoint.
    is_saved: bool,
    last: Option<Arc<str>>,
    older: VecDeque<(Instant, Arc<str>)>,
    /// Why a checkpoint could not be kept; the stage does not go on then.
    failed: Option<Error>,
}

impl Keeper<'_> {
    /// Records the newest step of `at`, and saves it when too much work would be lost otherwise.
    fn look(&mut self, at: &mut Checkpoint) {
        self.is_saved = false;
        if self.failed.is_none() {
            self.failed = self.record(at).err();
        }
    }

    fn record(&mut self, at: &mut Checkpoint) -> Result<(), Error> {
        point(if at.frames.is_empty() { "step_done" } else { "chunk_decoded" })?;
        at.record()?;
        if let Some(expected) = self.order.expected(&self.stage) {
            let newest = match at.state {
                Some(_) => (Part::Denoise, &*expected.denoise, &*at.trace.denoise),
                None => (Part::Decode, &*expected.decode, &*at.trace.decode),
            };
            Mismatch::of_last(&self.stage, newest).map_or(Ok(()), Err)?;
        }
        // The next step is taken to last as long as this one: what is not saved now is lost if it dies in it.
        let step = self.looked_at.elapsed();
        self.looked_at = Instant::now();
        let is_due = self.saved_at.elapsed() + step > self.settings.checkpoint_every;
        if is_due && !self.order.is_only_attempt { self.save(at) } else { Ok(()) }
    }

    fn save(&mut self, at: &Checkpoint) -> Result<(), Error> {
        let (store, job) = (&self.settings.store, &self.order.job_key);
        point("checkpoint_begun")?;
        let kept = store.put_checkpoint(job, &self.stage, &at.to_bytes(&self.run)?)?;
        point("checkpoint_put")?;
        store.mark_stage(job, &self.stage, &kept.sha256)?;
        point("checkpoint_marked")?;
        (self.saved_at, self.is_saved) = (Instant::now(), true);
        let before = self.last.replace(Arc::from(kept.sha256));
        if let Some(before) = before.filter(|before| Some(before) != self.last.as_ref()) {
            self.older.push_back((self.saved_at, before));
        }
        while let Some((superseded, sha256)) = self.older.front()
            && superseded.elapsed() > SUPERSEDED
        {
            // The end of the stage takes what stays.
            if let Err(error) = store.drop_checkpoint(job, &self.stage, sha256) {
                tracing::warn!(%error, "an old checkpoint stays");
            }
            self.older.pop_front();
        }
        Ok(())
    }
}
