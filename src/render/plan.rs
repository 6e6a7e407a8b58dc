//! What can be decided before any work: models, sizes, steps, counts, and every reason why this machine must refuse.
//!
//! A plan is small, holds no prompt, and is all the later stages follow, so that they agree with each other even when
//! another worker carries them out. Start from [`Plan`].

use serde::{Deserialize, Serialize};

use super::{Error, Settings, failure};
use crate::engine;
use crate::hub::{self, Manifest, Model, Source, Task};
use crate::job::class::{ErrorClass, Fault};
use crate::job::length::{self, FrameRate, Pace};
use crate::job::size::{self, Native};
use crate::job::validate::STEPS;
use crate::job::{JobType, Lora, Prediction, ValidJob, style};
use crate::store;

/// Delivered frames per second when the job names none.
pub const DEFAULT_FPS: f64 = 24.0;

/// Everything decided about a job before it starts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Seed of all noise.
    pub seed: u64,
    /// Size of the delivered image and video.
    pub deliver: (u32, u32),
    /// How the image is made; `None` when one is given.
    pub image: Option<ImagePlan>,
    /// How the video is made; `None` for an image job.
    pub video: Option<VideoPlan>,
    /// Estimated memory in MiB of the hungrier of the two models at work; `None` when unknown.
    pub memory_mb: Option<u32>,
    /// How the work spreads over the stages.
    pub shares: Shares,
    /// Things the user should know, one sentence each.
    pub notes: Vec<String>,
}

/// How the image is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImagePlan {
    /// Name of the model.
    pub model: String,
    /// What the library finds it by: its name, or its absolute path.
    pub lookup: String,
    /// Generated size.
    pub size: (u32, u32),
    /// Denoise steps.
    pub steps: u32,
    /// Classifier-free guidance scale.
    pub guidance: f64,
    /// Sampler; `None` takes the one the model was made with.
    pub sampler: Option<String>,
    /// What every picture of this model avoids.
    pub negative: Option<String>,
    /// LoRAs, applied in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<Lora>,
    /// How much of the given image is redrawn; `None` starts from noise alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// Images, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<u32>,
    /// Layers left out at the end of the text encoder, counted as A1111 does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_skip: Option<u32>,
    /// Name of the file that the autoencoder is taken from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae: Option<String>,
    /// What the model predicts, where the job says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
}

/// How the video is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VideoPlan {
    /// Name of the model.
    pub model: String,
    /// What the library finds it by: its name, or its absolute path.
    pub lookup: String,
    /// Generated size.
    pub size: (u32, u32),
    /// Denoise steps of each run.
    pub steps: u32,
    /// Frames of each run.
    pub frames_per_run: u32,
    /// Runs in the chain; each starts from the last frame of the one before.
    pub runs: u32,
    /// Frames of the model that the delivered time spans.
    pub kept_native: u32,
    /// Frames the motion wanted; more than `kept_native` where the chain is too short and the motion is slowed.
    pub wanted_native: u32,
    /// Frames in the file.
    pub delivered: u32,
    /// Delivered frames per second.
    pub fps: FrameRate,
    /// Pace at which the model's frames play.
    pub native_fps: f64,
    /// Frames per second the model is told.
    pub model_fps: u32,
    /// Motion bucket.
    pub motion: u32,
    /// Strength of the noise on the conditioning image.
    pub noise_aug: f64,
    /// Guidance of the first frame.
    pub min_guidance: f64,
    /// Guidance of the last frame.
    pub max_guidance: f64,
    /// Frames decoded at once.
    pub decode_chunk: u32,
}

/// Estimated share of each stage in the whole work: `image + runs x run + encode` is 1, as far as rounding lets it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shares {
    /// Of `gen_image`.
    pub image: f64,
    /// Of each run of `gen_video`.
    pub run: f64,
    /// Of `encode_video`.
    pub encode: f64,
}

/// A model with what it is found by.
struct Found {
    model: Model,
    lookup: String,
}

/// Decides everything about `job`, or returns every fault at once.
pub(super) fn plan(settings: &Settings, job: &ValidJob, seed: u64) -> Result<Plan, Error> {
    let mut faults = Vec::new();
    check_files(settings, job, &mut faults);
    if let Some(id) = &job.image {
        check_given(settings, id, &mut faults)?;
    }
    let mut notes = Vec::new();
    let wants_image = job.image.is_none() || job.strength.is_some();
    let image_model = wants_image
        .then(|| find(settings, job.image_model.as_deref(), Task::TextToImage, &mut faults))
        .transpose()?
        .flatten();
    let video_model = (job.job_type == JobType::Video)
        .then(|| find(settings, job.video_model.as_deref(), Task::ImageToVideo, &mut faults))
        .transpose()?
        .flatten();
    let image = image_model.as_ref().and_then(|model| collect(image_plan(job, model), &mut faults));
    let video = video_model.as_ref().and_then(|model| collect(video_plan(job, model), &mut faults));
    if !faults.is_empty() {
        return Err(Error::Refused(faults));
    }
    let deliver = (job.width, job.height);
    note_style(job, &mut notes);
    if !wants_image {
        note_unused(job, &mut notes);
    }
    if let (Some(model), Some(image)) = (&image_model, &image) {
        note_language(job, &model.model, &mut notes);
        note_size("image", image.size, deliver, &mut notes);
        note_steps(job, model, image, &mut notes);
    }
    if let Some(video) = &video {
        note_video(video, deliver, &mut notes);
    }
    let models = [&image_model, &video_model].into_iter().flatten();
    let memory_mb = models.filter_map(|found| found.model.manifest.memory_mb).max();
    let shares = shares(image.as_ref(), video.as_ref(), deliver);
    Ok(Plan { seed, deliver, image, video, memory_mb, shares, notes })
}

/// The value, or its faults added to the others.
fn collect<T>(result: Result<T, Vec<Fault>>, faults: &mut Vec<Fault>) -> Option<T> {
    result.map_err(|more| faults.extend(more)).ok()
}

/// Every LoRA of the job is on this machine, and its autoencoder.
fn check_files(settings: &Settings, job: &ValidJob, faults: &mut Vec<Fault>) {
    if let Some(Err(error)) = job.vae.as_deref().map(|name| settings.library.find_vae(name)) {
        faults.push(fault_of("vae", &error));
    }
    for (index, lora) in job.loras.iter().enumerate() {
        if let Err(error) = settings.library.find_lora(&lora.name) {
            faults.push(fault_of(&format!("loras[{index}].name"), &error));
        }
    }
}

fn check_given(settings: &Settings, id: &str, faults: &mut Vec<Fault>) -> Result<(), Error> {
    let known = match settings.store.has_blob(id) {
        Err(store::Error::Key { .. }) => false,
        known => known?,
    };
    if !known {
        faults.push(Fault::new(
            ErrorClass::OutOfRange,
            "image",
            format!("`{id}` is not in the store"),
        ));
    }
    Ok(())
}

/// The model of `task`: the job's, else the configured, else the library's default. `None` after adding a fault.
fn find(
    settings: &Settings,
    asked: Option<&str>,
    task: Task,
    faults: &mut Vec<Fault>,
) -> Result<Option<Found>, Error> {
    let (field, configured) = match task {
        Task::TextToImage => ("image_model", &settings.image_model),
        Task::ImageToVideo => ("video_model", &settings.video_model),
    };
    let name = asked.or(configured.as_deref());
    let model = match name {
        Some(name) => settings.library.find(name, task),
        None => settings.library.default(task),
    };
    match model {
        Ok(model) => {
            let lookup = name.unwrap_or(&model.name).to_owned();
            Ok(Some(Found { model, lookup }))
        }
        Err(error @ (hub::Error::DiskFull { .. } | hub::Error::Unwritable { .. })) => {
            Err(error.into())
        }
        Err(error) => {
            faults.push(fault_of(field, &error));
            Ok(None)
        }
    }
}

fn fault_of(field: &str, error: &hub::Error) -> Fault {
    let hint = error.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
    Fault::new(failure::hub_class(error), field, format!("{error}{hint}"))
}

fn image_plan(job: &ValidJob, found: &Found) -> Result<ImagePlan, Vec<Fault>> {
    let manifest = &found.model.manifest;
    let mut faults = Vec::new();
    let sampler = job.sampler.clone().or_else(|| manifest.sampler.clone());
    if let Some(name) = &sampler
        && let Err(error) = name.parse::<engine::Sampler>()
    {
        faults.push(Fault::new(ErrorClass::OutOfRange, "sampler", error.to_string()));
    }
    let size = collect(generated_size(job, manifest), &mut faults);
    match size {
        Some(size) if faults.is_empty() => Ok(ImagePlan {
            model: found.model.name.clone(),
            lookup: found.lookup.clone(),
            size,
            steps: steps(job, manifest.steps),
            guidance: job.guidance.unwrap_or(manifest.guidance),
            sampler,
            negative: manifest.negative.clone(),
            loras: job.loras.clone(),
            strength: job.strength,
            batch: job.batch.filter(|batch| *batch > 1),
            clip_skip: job.clip_skip,
            vae: job.vae.clone(),
            prediction: job.prediction,
        }),
        _ => Err(faults),
    }
}

fn video_plan(job: &ValidJob, found: &Found) -> Result<VideoPlan, Vec<Fault>> {
    let manifest = &found.model.manifest;
    let size = generated_size(job, manifest)?;
    let own = found.model.video().map_err(|error| vec![fault_of("video_model", &error)])?;
    let fps = FrameRate::from_fps(job.fps.unwrap_or(DEFAULT_FPS));
    let pace =
        Pace { frames_per_run: own.frames, native_fps: own.native_fps, max_runs: own.max_runs };
    let length = length::plan(job.duration, fps, &pace);
    Ok(VideoPlan {
        model: found.model.name.clone(),
        lookup: found.lookup.clone(),
        size,
        steps: manifest.steps,
        frames_per_run: own.frames,
        runs: length.runs,
        kept_native: length.kept_native,
        wanted_native: length.wanted_native,
        delivered: length.delivered,
        fps: length.fps,
        native_fps: own.native_fps,
        model_fps: own.model_fps,
        motion: job.motion.unwrap_or(own.motion),
        noise_aug: job.noise_aug.unwrap_or(own.noise_aug),
        min_guidance: own.min_guidance,
        max_guidance: own.max_guidance,
        decode_chunk: own.decode_chunk,
    })
}

/// The size to generate at.
fn generated_size(job: &ValidJob, manifest: &Manifest) -> Result<(u32, u32), Vec<Fault>> {
    let native = Native {
        width: manifest.native_width,
        height: manifest.native_height,
        multiple: manifest.multiple,
        min: manifest.min_side,
        max: manifest.max_side,
    };
    size::plan((job.width, job.height), job.size_policy, native)
        .map(|plan| plan.generate)
        .map_err(|fault| vec![fault])
}

/// Denoise steps of the image: as asked, and so many that redrawing a part of a picture takes at least one.
fn steps(job: &ValidJob, usual: u32) -> u32 {
    let asked = job.steps.unwrap_or(usual);
    let least = job.strength.map_or(1.0, |strength| (1.0 / strength).ceil());
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float-to-integer cast saturates, and the least is positive"
    )]
    asked.max((least as u32).min(*STEPS.end()))
}

fn note_steps(job: &ValidJob, found: &Found, image: &ImagePlan, notes: &mut Vec<String>) {
    let asked = job.steps.unwrap_or(found.model.manifest.steps);
    if image.steps > asked {
        notes.push(format!(
            "{} steps instead of {asked}, since fewer redraw nothing at this strength",
            image.steps
        ));
    }
}

/// What a given image that is taken as it is leaves without use.
fn note_unused(job: &ValidJob, notes: &mut Vec<String>) {
    let given = [
        ("negative_prompt", job.negative_prompt.is_some()),
        ("steps", job.steps.is_some()),
        ("guidance", job.guidance.is_some()),
        ("sampler", job.sampler.is_some()),
        ("image_model", job.image_model.is_some()),
        ("batch", job.batch.is_some_and(|batch| batch > 1)),
        ("clip_skip", job.clip_skip.is_some()),
        ("vae", job.vae.is_some()),
        ("prediction", job.prediction.is_some()),
        ("loras", !job.loras.is_empty()),
    ];
    let unused: Vec<String> =
        given.iter().filter(|(_, is)| *is).map(|(name, _)| format!("`{name}`")).collect();
    if !unused.is_empty() {
        notes.push(format!(
            "the image is given and taken as it is, so {} had no use; with a `strength` it would be redrawn",
            unused.join(", ")
        ));
    }
}

fn note_style(job: &ValidJob, notes: &mut Vec<String>) {
    if style::apply(job).prompt != job.prompt {
        notes.push(format!("style `{}` adds its words to the prompt", job.style));
    }
}

/// Stable Diffusion's text encoders have seen English; the default pair was taught Chinese as well.
fn note_language(job: &ValidJob, model: &Model, notes: &mut Vec<String>) {
    let foreign = job.prompt.chars().any(|letter| letter.is_alphabetic() && letter > '\u{24f}');
    if foreign && model.source != Source::Embedded {
        notes.push(format!(
            "the prompt has letters beyond Latin script; the text encoder of `{}` may know English only",
            model.name
        ));
    }
}

fn note_size(what: &str, made: (u32, u32), deliver: (u32, u32), notes: &mut Vec<String>) {
    if made != deliver {
        notes.push(format!(
            "{what} generated at {}x{}, delivered at {}x{}",
            made.0, made.1, deliver.0, deliver.1
        ));
    }
}

fn note_video(video: &VideoPlan, deliver: (u32, u32), notes: &mut Vec<String>) {
    note_size("video", video.size, deliver, notes);
    if video.runs > 1 {
        notes.push(format!("{} runs of {} frames are chained", video.runs, video.frames_per_run));
    }
    if video.kept_native < video.wanted_native {
        notes.push(format!(
            "the motion is slowed: it wants {} frames of the model, which makes at most {}",
            video.wanted_native, video.kept_native
        ));
    }
}

/// Shares from pixels: a denoised pixel costs about as much per step as thirty encoded ones.
fn shares(image: Option<&ImagePlan>, video: Option<&VideoPlan>, deliver: (u32, u32)) -> Shares {
    const ENCODED: f64 = 1.0 / 30.0;
    let pixels = |(width, height): (u32, u32)| f64::from(width) * f64::from(height);
    // Guidance evaluates the model twice; loading and the final resize are never free.
    let image = image.map_or(0.0, |plan| {
        let steps = f64::from(plan.steps) * plan.strength.unwrap_or(1.0);
        2.0 * pixels(plan.size) * steps * f64::from(plan.batch.unwrap_or(1))
    }) + ENCODED * pixels(deliver);
    let Some(video) = video else {
        return Shares { image: 1.0, run: 0.0, encode: 0.0 };
    };
    let run = 1.5 * pixels(video.size) * f64::from(video.frames_per_run) * f64::from(video.steps);
    let encode = ENCODED * pixels(deliver) * f64::from(video.delivered);
    let whole = image + run * f64::from(video.runs) + encode;
    // Millionths, so that a share is the same number after JSON.
    let share = |part: f64| (part / whole * 1e6).round() / 1e6;
    Shares { image: share(image), run: share(run), encode: share(encode) }
}
