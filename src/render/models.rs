//! The device's one permit and the models that stay loaded between jobs.
//!
//! The permit is the ownership of [`Models`]: a blocking thread takes them off the [`Desk`], its [`Permit`] lays them
//! back. So no two inferences run at once on a device, a dropped future cannot free the device while a thread still
//! computes, and waiting in line can be stopped by the hook.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Error, Hook, Report, Settings, report};
use crate::engine::device::{self, Compute};
use crate::engine::{self, ImageModel, LoadOptions, LoraFile, StepEvent, VideoModel};

/// How often a thread that waits for the device asks the hook whether to go on waiting.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Holds the models while no thread works with them.
pub(super) struct Desk {
    models: Mutex<Option<Models>>,
    laid_back: Condvar,
}

/// The device and the models last used.
#[derive(Default)]
pub(super) struct Models {
    compute: Option<Compute>,
    image: Option<(WithLoras, ImageModel)>,
    video: Option<(PathBuf, VideoModel)>,
}

/// A model's folder or file, and the LoRAs applied to it.
pub(super) type WithLoras = (PathBuf, Vec<LoraFile>);

/// The right to compute. Dropped, it lets the next thread in.
pub(super) struct Permit<'a> {
    desk: &'a Desk,
    models: Models,
}

impl Default for Desk {
    fn default() -> Self {
        Self { models: Mutex::new(Some(Models::default())), laid_back: Condvar::new() }
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
    /// The image model `wanted`, loaded unless it is the one last used.
    pub(super) fn image(
        &mut self,
        settings: &Settings,
        wanted: &WithLoras,
        hook: &mut Hook<'_>,
    ) -> Result<(&ImageModel, &Compute), Error> {
        let Models { compute, image, video } = &mut self.models;
        let compute = open(compute, settings)?;
        let options = LoadOptions { loras: wanted.1.clone(), ..LoadOptions::default() };
        keep(
            image,
            video,
            wanted,
            |hook| ImageModel::load_with(&wanted.0, &options, compute, &mut bridge(hook)),
            hook,
        )
        .map(|model| (model, compute))
    }

    /// The video model in `folder`, loaded unless it is the one last used.
    pub(super) fn video(
        &mut self,
        settings: &Settings,
        folder: &Path,
        hook: &mut Hook<'_>,
    ) -> Result<(&VideoModel, &Compute), Error> {
        let Models { compute, image, video } = &mut self.models;
        let compute = open(compute, settings)?;
        keep(
            video,
            image,
            &folder.to_path_buf(),
            |hook| VideoModel::load(folder, compute, &mut bridge(hook)),
            hook,
        )
        .map(|model| (model, compute))
    }

    /// Drops every loaded model, so that the memory is free for another try.
    pub(super) fn unload(&mut self) {
        self.models.image = None;
        self.models.video = None;
    }
}

fn open<'a>(compute: &'a mut Option<Compute>, settings: &Settings) -> Result<&'a Compute, Error> {
    let opened = match compute.take() {
        Some(open) => open,
        None => device::open(&settings.device, &settings.dtype)?,
    };
    Ok(compute.insert(opened))
}

/// Weight bytes that may stay loaded for the task that is not at work: small models stay both, large ones take turns.
const BESIDE: u64 = 1 << 30;

/// What a loaded model is told apart by.
trait Key: PartialEq + Clone {
    /// Its folder or file.
    fn path(&self) -> &Path;
}

impl Key for PathBuf {
    fn path(&self) -> &Path {
        self
    }
}

impl Key for WithLoras {
    fn path(&self) -> &Path {
        &self.0
    }
}

/// Fills `slot` with the model `wanted`. The old one goes first; when memory is short or the two are large, that of
/// the other task too.
fn keep<'a, K: Key, L: Key, M, O>(
    slot: &'a mut Option<(K, M)>,
    other: &mut Option<(L, O)>,
    wanted: &K,
    load: impl Fn(&mut Hook<'_>) -> Result<M, engine::Error>,
    hook: &mut Hook<'_>,
) -> Result<&'a M, Error> {
    let kept = slot.take().filter(|(of, _)| of == wanted);
    let entry = match kept {
        Some(entry) => entry,
        None => {
            if other.as_ref().is_some_and(|(of, _)| {
                weight_bytes(of.path()) + weight_bytes(wanted.path()) > BESIDE
            }) {
                *other = None;
            }
            let loaded = match load(hook) {
                Err(error) if is_out_of_memory(&error) && other.take().is_some() => load(hook)?,
                result => result?,
            };
            (wanted.clone(), loaded)
        }
    };
    Ok(&slot.insert(entry).1)
}

/// Bytes of the weight files below `folder`, or of the file that it is; what cannot be read counts for nothing.
fn weight_bytes(folder: &Path) -> u64 {
    if folder.is_file() {
        return folder.metadata().map_or(0, |metadata| metadata.len());
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let bytes = |entry: std::fs::DirEntry| {
        let path = entry.path();
        let is_weights = path.extension().is_some_and(|end| end == "safetensors");
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => weight_bytes(&path),
            _ if is_weights => path.metadata().map_or(0, |metadata| metadata.len()),
            _ => 0,
        }
    };
    entries.flatten().map(bytes).sum()
}

/// Whether giving memory back may help.
pub(super) fn is_out_of_memory(error: &engine::Error) -> bool {
    matches!(error, engine::Error::OutOfMemory { .. })
}

/// The engine's events as reports.
pub(super) fn bridge<'a>(hook: &'a mut Hook<'_>) -> impl FnMut(StepEvent) -> ControlFlow<()> + 'a {
    move |event| {
        let (stage, done, total) = match event {
            StepEvent::Load { done, total } => ("load", wide(done), wide(total)),
            StepEvent::EncodePrompt => ("encode_prompt", 0, 1),
            StepEvent::Denoise { step, total } => ("denoise", wide(step), wide(total)),
            StepEvent::Decode { done, total } => ("decode", wide(done), wide(total)),
        };
        hook(Report { stage, done, total })
    }
}

fn wide(count: impl TryInto<u64>) -> u64 {
    count.try_into().unwrap_or(u64::MAX)
}
