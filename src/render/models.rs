//! The device's one permit and the models that stay loaded between jobs.
//!
//! What a run needs is estimated before it starts and held against what is there: that decides whether all parts of a
//! model are in memory together, which other models may stay beside it, and whether the run is refused.
//!
//! The permit is the ownership of [`Models`]: a blocking thread takes them off the [`Desk`], its [`Permit`] lays them
//! back. So no two inferences run at once on a device, a dropped future cannot free the device while a thread still
//! computes, and waiting in line can be stopped by the hook.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::hash::ModelFile;
use super::{Error, Hook, Report, Settings, Work, report};
use crate::engine::device::{self, Compute};
use crate::engine::estimate::{self, Need};
use crate::engine::tiling::LOW_SIDE;
use crate::engine::{
    self, ImageModel, ImageRequest, LoadOptions, Residency, StepEvent, VideoModel, VideoRequest,
};

/// The level of memory that changes results.
pub(super) const TILED: &str = "tiled";
/// Asks for any level of memory but that.
pub(super) const WHOLE: &str = "whole";
/// How often a thread that waits for the device asks the hook whether to go on waiting.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Holds the models while no thread works with them.
pub(super) struct Desk {
    models: Mutex<Option<Models>>,
    laid_back: Condvar,
    /// How often weights were read from the disk.
    pub(super) reads: AtomicU64,
}

/// The device and the loaded models, the one used last at the end.
#[derive(Default)]
pub(super) struct Models {
    compute: Option<Compute>,
    loaded: Vec<Loaded>,
}

/// A model with what is known about it.
struct Loaded {
    key: Wanted,
    residency: Residency,
    /// Bytes of its weights in memory.
    bytes: u64,
    model: Model,
}

enum Model {
    Image(ImageModel),
    Video(VideoModel),
}

/// A model's folder or file, and what is changed about it; which parts stay in memory is not for the asker to say.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    /// Its folder or file.
    pub(super) path: PathBuf,
    /// What is done to it while it loads.
    pub(super) options: LoadOptions,
    /// Hashes of all its files: a file that was replaced is another model.
    pub(super) hashes: String,
    /// Those files, and its configurations.
    pub(super) files: Vec<ModelFile>,
}

/// How a run will go.
pub(super) struct Ready {
    /// Where.
    pub(super) compute: Compute,
    /// How much of the model is in memory at once: `together`, `in_turn` or `tiled`.
    pub(super) memory: &'static str,
    /// How often weights are read from the disk for it.
    pub(super) weights_read: u32,
    /// What the user should know.
    pub(super) notes: Vec<String>,
}

impl Ready {
    /// The record of a run that took `seconds`.
    pub(super) fn work(self, seconds: BTreeMap<String, f64>) -> Work {
        Work {
            device: self.compute.name(),
            dtype: self.compute.dtype_name().to_owned(),
            notes: self.notes,
            weights_read: self.weights_read,
            seconds,
            ..Work::default()
        }
    }
}

/// The right to compute. Dropped, it lets the next thread in.
pub(super) struct Permit<'a> {
    desk: &'a Desk,
    models: Models,
}

impl Default for Desk {
    fn default() -> Self {
        Self {
            models: Mutex::new(Some(Models::default())),
            laid_back: Condvar::new(),
            reads: AtomicU64::new(0),
        }
    }
}

impl Desk {
    /// Waits for the device; the hook hears `load 0 of 1` while waiting and may break.
    pub(super) fn wait(&self, hook: &mut Hook<'_>) -> Result<Permit<'_>, Error> {
        loop {
            report(hook, "load", 0, 1)?;
            let models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
            let (mut models, _) = self
                .laid_back
                .wait_timeout_while(models, ASK_EVERY, |models| models.is_none())
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(models) = models.take() {
                return Ok(Permit { desk: self, models });
            }
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let models = std::mem::take(&mut self.models);
        // A panic may have left a model half-way; the next job loads it anew.
        let models = if std::thread::panicking() { Models::default() } else { models };
        *self.desk.models.lock().unwrap_or_else(PoisonError::into_inner) = Some(models);
        self.desk.laid_back.notify_one();
    }
}

impl Permit<'_> {
    /// The device.
    pub(super) fn compute(&mut self, settings: &Settings) -> Result<&Compute, Error> {
        open(&mut self.models.compute, settings)
    }

    /// Bytes that a run may take.
    pub(super) fn memory(&mut self, settings: &Settings) -> Result<Option<u64>, Error> {
        let compute = self.compute(settings)?.clone();
        Ok(self.models.memory(&compute, settings.memory_limit))
    }

    /// The image model `wanted`, and `request` cut to the memory that is there.
    pub(super) fn image(
        &mut self,
        settings: &Settings,
        wanted: &Wanted,
        (request, memory): (&mut ImageRequest, &str),
        hook: &mut Hook<'_>,
    ) -> Result<(&ImageModel, Ready), Error> {
        let compute = open(&mut self.models.compute, settings)?.clone();
        let mut options = wanted.options.clone();
        let need = estimate::image(&wanted.path, &options, &compute, request)?;
        let plan = self.models.room(&compute, wanted, &need, (memory, settings.memory_limit))?;
        request.tiling = plan.tiled().then_some(LOW_SIDE);
        options.residency = plan.residency();
        let load = |hook: &mut Hook<'_>| {
            let model = ImageModel::load_with(&wanted.path, &options, &compute, &mut bridge(hook))?;
            Ok(Model::Image(model))
        };
        let (model, ready) = self.take(&compute, wanted, &plan, &load, hook)?;
        match model {
            Model::Image(model) => Ok((model, ready)),
            Model::Video(_) => Err(Error::Order("a video model makes no image".to_owned())),
        }
    }

    /// The video model `wanted`, and `request` cut to the memory that is there.
    pub(super) fn video(
        &mut self,
        settings: &Settings,
        wanted: &Wanted,
        (request, memory): (&mut VideoRequest, &str),
        hook: &mut Hook<'_>,
    ) -> Result<(&VideoModel, Ready), Error> {
        let compute = open(&mut self.models.compute, settings)?.clone();
        let need = estimate::video(&wanted.path, &compute, request)?;
        let plan = self.models.room(&compute, wanted, &need, (memory, settings.memory_limit))?;
        let mut notes = Vec::new();
        if plan.tiled() {
            request.tiling = Some(LOW_SIDE);
            if request.decode_chunk.min(request.frames) > 1 {
                notes.push("memory is low: frames were decoded one by one".to_owned());
            }
            request.decode_chunk = 1;
        }
        let load = |hook: &mut Hook<'_>| {
            let bridge = &mut bridge(hook);
            Ok(Model::Video(VideoModel::load_with(
                &wanted.path,
                plan.residency(),
                &compute,
                bridge,
            )?))
        };
        let (model, mut ready) = self.take(&compute, wanted, &plan, &load, hook)?;
        ready.notes.extend(notes);
        match model {
            Model::Video(model) => Ok((model, ready)),
            Model::Image(_) => Err(Error::Order("an image model makes no video".to_owned())),
        }
    }

    /// Drops every loaded model, so that the memory is free for another try.
    pub(super) fn unload(&mut self) {
        self.models.loaded.clear();
        give_back(self.models.compute.as_ref());
    }

    /// The model `wanted`, loaded unless it is there. When the driver refuses memory, the others go.
    fn take(
        &mut self,
        compute: &Compute,
        wanted: &Wanted,
        plan: &MemoryPlan,
        load: &dyn Fn(&mut Hook<'_>) -> Result<Model, engine::Error>,
        hook: &mut Hook<'_>,
    ) -> Result<(&Model, Ready), Error> {
        let loaded = &mut self.models.loaded;
        let there = loaded.iter().position(|model| model.key == *wanted);
        let kept = there.map(|index| loaded.remove(index));
        let kept = kept.filter(|model| model.residency == plan.residency());
        let in_turn = plan.residency() == Residency::InTurn;
        let weights_read = u32::from(kept.is_none() || in_turn);
        if weights_read > 0 {
            let reads = self.desk.reads.fetch_add(1, Ordering::Relaxed) + 1;
            tracing::debug!(model = %wanted.path.display(), reads, in_turn, "reading weights");
        }
        let entry = match kept {
            Some(entry) => entry,
            None => {
                let model = match load(hook) {
                    Err(error) if is_out_of_memory(&error) && !loaded.is_empty() => {
                        loaded.clear();
                        give_back(Some(compute));
                        load(hook)?
                    }
                    result => result?,
                };
                let (residency, bytes) = (plan.residency(), if in_turn { 0 } else { plan.weights });
                Loaded { key: wanted.clone(), residency, bytes, model }
            }
        };
        let memory = plan.level.name();
        let ready = Ready { compute: compute.clone(), memory, weights_read, notes: plan.notes() };
        loaded.push(entry);
        let entry = loaded.last().expect("it was just put there");
        Ok((&entry.model, ready))
    }
}

fn open<'a>(compute: &'a mut Option<Compute>, settings: &Settings) -> Result<&'a Compute, Error> {
    let opened = match compute.take() {
        Some(open) => open,
        None => device::open(&settings.device, &settings.dtype)?,
    };
    Ok(compute.insert(opened))
}

/// Returns freed memory to the system, or to the driver.
fn give_back(compute: Option<&Compute>) {
    if let Some(compute) = compute {
        compute.settle();
    }
    device::give_back_memory();
}

/// What stays in memory during a run, and after it.
struct MemoryPlan {
    level: Level,
    weights: u64,
}

/// How much of a model is in memory at once, from quick to small. Only the last changes the numbers of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Together,
    InTurn,
    Tiled,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Together => "together",
            Self::InTurn => "in_turn",
            Self::Tiled => TILED,
        }
    }
}

impl MemoryPlan {
    fn residency(&self) -> Residency {
        if self.level == Level::Together { Residency::Together } else { Residency::InTurn }
    }

    fn tiled(&self) -> bool {
        self.level == Level::Tiled
    }

    fn notes(&self) -> Vec<String> {
        let note = match self.level {
            Level::Together => return Vec::new(),
            Level::InTurn => "memory is low: the parts of the model were loaded one by one",
            Level::Tiled => {
                "memory is low: the parts of the model were loaded one by one, and decoding went in tiles"
            }
        };
        vec![note.to_owned()]
    }
}

impl Models {
    /// Bytes that a run on `compute` may take, of `limit` at most: those that loaded models hold can be had again.
    fn memory(&self, compute: &Compute, limit: Option<u64>) -> Option<u64> {
        let held: u64 = self.loaded.iter().map(|model| model.bytes).sum();
        let free = compute.free_memory().map(|free| free + held);
        free.into_iter().chain(limit).min()
    }

    /// Chooses how a run of `wanted` goes, and drops the models that have been unused longest until there is room.
    fn room(
        &mut self,
        compute: &Compute,
        wanted: &Wanted,
        need: &Need,
        (memory, limit): (&str, Option<u64>),
    ) -> Result<MemoryPlan, Error> {
        // A model that keeps no part in memory only keeps files open.
        self.loaded.retain(|model| model.key == *wanted || model.residency == Residency::Together);
        let have = self.memory(compute, limit);
        let level = choose(memory, need, have)?;
        let plan = MemoryPlan { level, weights: need.weights };
        let Some(have) = have else { return Ok(plan) };
        let others = |models: &[Loaded]| -> u64 {
            models.iter().filter(|model| model.key != *wanted).map(|model| model.bytes).sum()
        };
        let most = have.saturating_sub(bytes_of(level, need)).min(have / 2);
        let mut dropped = false;
        while others(&self.loaded) > most {
            let oldest = self.loaded.iter().position(|model| model.key != *wanted);
            let Some(oldest) = oldest else { break };
            self.loaded.remove(oldest);
            dropped = true;
        }
        if dropped {
            give_back(Some(compute));
        }
        Ok(plan)
    }
}

fn bytes_of(level: Level, need: &Need) -> u64 {
    match level {
        Level::Together => need.together,
        Level::InTurn => need.in_turn,
        Level::Tiled => need.tiled,
    }
}

/// The quickest level that `memory` (`auto`, `low`, `full` or `whole`) allows and that fits into `have` bytes.
fn choose(memory: &str, need: &Need, have: Option<u64>) -> Result<Level, Error> {
    let levels: &[Level] = match memory {
        "full" => &[Level::Together],
        "low" => &[Level::Tiled],
        WHOLE => &[Level::Together, Level::InTurn],
        _ => &[Level::Together, Level::InTurn, Level::Tiled],
    };
    let Some(have) = have else { return Ok(levels[0]) };
    let fits = |level: &&Level| bytes_of(**level, need) <= have;
    levels.iter().find(fits).copied().ok_or_else(|| {
        let needs = levels.iter().map(|level| bytes_of(*level, need)).min().unwrap_or(0);
        let form = if memory == WHOLE { " without tiles, as in the receipt" } else { "" };
        Error::ShortOfMemory { needs, have, form }
    })
}

/// Bytes as people read them.
#[expect(clippy::cast_precision_loss, reason = "one decimal of a GiB is shown")]
pub(crate) fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Whether giving memory back may help.
fn is_out_of_memory(error: &engine::Error) -> bool {
    matches!(error, engine::Error::OutOfMemory { .. })
}

/// The engine's events as reports.
pub(super) fn bridge<'a>(hook: &'a mut Hook<'_>) -> impl FnMut(StepEvent) -> ControlFlow<()> + 'a {
    move |event| hook(report_of(event))
}

/// An event of the engine as a report.
pub(super) fn report_of(event: StepEvent) -> Report {
    match event {
        StepEvent::Load { done, total } => Report::new("load", wide(done), wide(total)),
        StepEvent::EncodePrompt => Report::new("encode_prompt", 0, 1),
        StepEvent::Denoise { step, total } => Report::new("denoise", wide(step), wide(total)),
        StepEvent::Decode { done, total } => Report::new("decode", wide(done), wide(total)),
    }
}

fn wide(count: impl TryInto<u64>) -> u64 {
    count.try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: Need = Need { together: 100, in_turn: 60, tiled: 20, weights: 50 };

    #[test]
    fn a_run_goes_the_quickest_way_that_fits_or_is_refused() {
        for (memory, have, wanted) in [
            ("auto", Some(100), Some(Level::Together)),
            ("auto", Some(99), Some(Level::InTurn)),
            ("auto", Some(59), Some(Level::Tiled)),
            ("auto", Some(19), None),
            ("auto", None, Some(Level::Together)),
            ("full", Some(100), Some(Level::Together)),
            ("full", Some(99), None),
            ("low", Some(100), Some(Level::Tiled)),
            ("low", Some(19), None),
            ("low", None, Some(Level::Tiled)),
            (WHOLE, Some(100), Some(Level::Together)),
            (WHOLE, Some(60), Some(Level::InTurn)),
            (WHOLE, Some(59), None),
        ] {
            assert_eq!(choose(memory, &NEED, have).ok(), wanted, "{memory} {have:?}");
        }
        let need = Need { tiled: 3 << 30, together: 9 << 30, in_turn: 5 << 30, weights: 4 << 30 };
        let error = choose("auto", &need, Some(3 << 29)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("3.0 GiB") && text.contains("1.5 GiB"), "{text}");
        let class = crate::render::class(&error);
        assert_eq!(class, crate::job::class::ErrorClass::OutOfMemory);
    }

    /// Models that hold nothing, whatever their entries say.
    fn models(bytes: &[(&str, u64)]) -> Models {
        let folder =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/genvideo-tiny-t2i");
        let options = LoadOptions { residency: Residency::InTurn, ..LoadOptions::default() };
        let mut models = Models::default();
        for (name, bytes) in bytes {
            let model = ImageModel::load_with(&folder, &options, &Compute::cpu(), &mut |_| {
                ControlFlow::Continue(())
            });
            models.loaded.push(Loaded {
                key: key(name),
                residency: Residency::Together,
                bytes: *bytes,
                model: Model::Image(model.expect("the shipped model")),
            });
        }
        models
    }

    fn key(name: &str) -> Wanted {
        Wanted {
            path: PathBuf::from(name),
            options: LoadOptions::default(),
            hashes: String::new(),
            files: Vec::new(),
        }
    }

    #[test]
    fn the_models_unused_longest_make_room() {
        const HUGE: u64 = 1 << 60;
        for (wanted, need, left) in [
            // Half of the memory may hold others.
            ("new", 0, vec!["second"]),
            ("second", 0, vec!["first", "second"]),
            // All of it is needed.
            ("new", 2 * HUGE, vec![]),
            ("second", 2 * HUGE, vec!["second"]),
        ] {
            let mut models = models(&[("first", HUGE), ("second", HUGE)]);
            let need = Need { together: need, in_turn: need, tiled: need, weights: 1 };
            let plan = models.room(&Compute::cpu(), &key(wanted), &need, ("full", None)).unwrap();
            assert_eq!((plan.residency(), plan.level), (Residency::Together, Level::Together));
            let names: Vec<&str> =
                models.loaded.iter().filter_map(|model| model.key.path.to_str()).collect();
            assert_eq!(names, left, "{wanted} {need:?}");
        }
    }
}
