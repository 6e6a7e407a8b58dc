//! One stage of a job at a time, without Temporal: a valid job goes in, checked artifacts in the store come out.
//!
//! [`Renderer::plan`] decides everything that can be decided beforehand; `gen_image`, `gen_video`, `encode_video` and
//! `publish` carry the plan out and hand each other artifact keys, never pixels. Every stage is deterministic, goes on
//! from the checkpoint its order names and is settled once, so that an attempt after a crash loses little and ends in
//! the same bytes. All of it blocks: call it from threads that may. What to retry
//! and when is the caller's business. Start from [`Renderer`].

pub mod failure;
pub mod inspect;
pub mod label;
pub mod plan;
pub mod publish;
pub mod receipt;
pub mod verify;

mod check;
mod checkpoint;
mod encode_video;
mod frames;
mod gen_image;
mod gen_video;
mod hash;
mod infer;
mod models;
mod room;
mod settled;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::engine;
use crate::failpoint;
use crate::hub::Library;
use crate::job::class::Fault;
use crate::job::result::JobResult;
use crate::job::{JobInput, ValidJob, validate};
use crate::media;
use crate::store::{self, BlobRef, JobKey, Store};

pub(crate) use crate::engine::device::give_back_memory;
pub use check::check_encoder;
pub use failure::{class, hint, is_of_device, is_outage};
pub use hash::ModelFile;
pub(crate) use models::gib;
pub use plan::Plan;
pub use receipt::{Receipt, StageReceipt};
pub use verify::{Mismatch, Verdict};

/// What a renderer needs to know about the machine.
pub struct Settings {
    /// Where artifacts go.
    pub store: Store,
    /// Where models come from.
    pub library: Library,
    /// `auto`, `cpu`, `cuda[:N]` or `metal`.
    pub device: String,
    /// `auto`, `f32`, `f16` or `bf16`.
    pub dtype: String,
    /// `auto`, `low` (one part of a model in memory at a time) or `full` (all of them).
    pub memory: String,
    /// Compute threads; `None` takes what the machine has. Does not change results.
    pub threads: Option<usize>,
    /// Most work that a dead worker may cost: checkpoints are kept this often.
    pub checkpoint_every: Duration,
    /// Most bytes of memory that models and runs may take on the device; `None` for what is free.
    pub memory_limit: Option<u64>,
    /// Most bytes the store may hold; `None` for as many as the disk takes.
    pub disk_quota: Option<u64>,
    /// Text-to-image model of jobs that name none; `None` takes the library's default.
    pub image_model: Option<String>,
    /// Image-to-video model of jobs that name none.
    pub video_model: Option<String>,
}

/// How far a stage is: `done` of `total` units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// `load`, `encode_prompt`, `denoise`, `decode`, `interpolate`, `encode` or `publish`.
    pub stage: &'static str,
    /// Units done; in order within a stage.
    pub done: u64,
    /// Units in all.
    pub total: u64,
    /// SHA-256 of the newest checkpoint, a work object: [`Order::resume`] of the next attempt.
    pub checkpoint: Option<Arc<str>>,
}

impl Report {
    /// A report without a checkpoint.
    pub fn new(stage: &'static str, done: u64, total: u64) -> Self {
        Self { stage, done, total, checkpoint: None }
    }

    /// How far the activity is, 0..=1; each stage's share of it is a rough guess: loading is short, denoising long.
    pub fn fraction(&self) -> f64 {
        let (from, to) = match self.stage {
            "load" => (0.0, 0.1),
            "encode_prompt" => (0.1, 0.12),
            "denoise" => (0.12, 0.88),
            "decode" => (0.88, 1.0),
            "interpolate" => (0.0, 0.05),
            "encode" => (0.05, 1.0),
            _ => (0.0, 1.0),
        };
        #[expect(
            clippy::cast_precision_loss,
            reason = "counts of steps and frames are far below 2^52"
        )]
        let share = if self.total == 0 {
            0.0
        } else {
            self.done.min(self.total) as f64 / self.total as f64
        };
        from + (to - from) * share
    }
}

/// Receives every [`Report`]; a break ends the stage with [`Error::Stopped`] and leaves no temporary file.
pub type Hook<'a> = dyn FnMut(Report) -> ControlFlow<()> + 'a;

/// One job with its plan: the argument of every stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Names the job in the store.
    pub job_key: JobKey,
    /// What was asked for.
    pub job: ValidJob,
    /// What was decided.
    pub plan: Plan,
    /// The last checkpoint of the attempt before, if there was one: see [`Report::checkpoint`].
    #[serde(default)]
    pub resume: Option<String>,
    /// What each stage has to make, by its name, where a receipt is verified: the first step that differs ends it.
    #[serde(skip)]
    pub expected: Arc<BTreeMap<String, StageReceipt>>,
    /// Nobody comes after this attempt: it keeps no checkpoints.
    #[serde(skip)]
    pub is_only_attempt: bool,
}

impl Order {
    /// The order of a new job: nothing to go on from, nothing to be compared with.
    pub fn new(job_key: JobKey, job: ValidJob, plan: Plan) -> Self {
        Self { job_key, job, plan, resume: None, expected: Arc::default(), is_only_attempt: false }
    }

    fn expected(&self, stage: &str) -> Option<&StageReceipt> {
        self.expected.get(stage)
    }
}

/// Result of `gen_image`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageMade {
    /// The picture to animate, PNG: as the model made it, or the given one at the asked size. A work object.
    pub image: BlobRef,
    /// The picture at the asked size, PNG with its label. A blob.
    pub delivered: BlobRef,
    /// The other pictures of a batch, as `delivered`; empty for one image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<BlobRef>,
    /// Size of `delivered`.
    pub delivered_size: (u32, u32),
    /// What the sampler is called; `None` when an image was given.
    pub sampler: Option<String>,
    /// Tokens the prompt took and how many of them were cut; `None` when an image was given.
    pub tokens: Option<(u32, u32)>,
    /// How it was made.
    pub work: Work,
}

/// Result of one run of `gen_video`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FramesMade {
    /// Position in the chain, from 0.
    pub run: u32,
    /// All frames of the run, lossless. A work object.
    pub frames: BlobRef,
    /// How many.
    pub count: u32,
    /// The last frame, PNG: where the next run starts. A work object.
    pub last_frame: BlobRef,
    /// How they were made.
    pub work: Work,
}

/// Result of `encode_video`; sizes, counts and times are those of the finished file, not of the plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VideoMade {
    /// The mp4. A blob.
    pub video: BlobRef,
    /// First frame, JPEG. A blob.
    pub poster: BlobRef,
    /// Width and height.
    pub size: (u32, u32),
    /// Frames in the file.
    pub frames: u32,
    /// Of them, the model's own, unchanged.
    pub native_frames: u32,
    /// Of them, made by motion interpolation.
    pub interpolated_frames: u32,
    /// Frames per second.
    pub fps: f64,
    /// Seconds.
    pub duration: f64,
    /// Which encoder, and why not others.
    pub encoder: String,
    /// Its version and that of libavcodec.
    #[serde(default)]
    pub encoder_version: String,
    /// Wall-clock seconds.
    pub seconds: BTreeMap<String, f64>,
}

/// Where and how long a stage of inference worked, and what the user should know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// `cpu`, `cuda:0`, `metal`.
    pub device: String,
    /// `f32`, `f16`, `bf16`.
    pub dtype: String,
    /// SHA-256 of the model's weights; `None` where no model worked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// SHA-256 of the file that the autoencoder came from, where it was not the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae: Option<String>,
    /// What the receipt of the job says about this stage, a work object; `None` where no model worked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<BlobRef>,
    /// One sentence each.
    pub notes: Vec<String>,
    /// How often weights were read from the disk.
    #[serde(default)]
    pub weights_read: u32,
    /// Wall-clock seconds by stage.
    pub seconds: BTreeMap<String, f64>,
}

/// Everything the stages before `publish` made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// Of `gen_image`.
    pub image: ImageMade,
    /// Of each `gen_video`, in order; empty for an image job.
    #[serde(default)]
    pub runs: Vec<FramesMade>,
    /// Of `encode_video`; `None` for an image job.
    #[serde(default)]
    pub video: Option<VideoMade>,
}

/// What can go wrong in a stage. [`class`] and [`hint`] say what it means.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hook asked to stop.
    #[error("stopped on request")]
    Stopped,
    /// The job does not fit this machine.
    #[error("{}", crate::job::validate::summary(.0))]
    Refused(Vec<Fault>),
    /// The run takes more memory than there is, as far as can be said before it.
    #[error("out of memory: this run needs about {}{form}, and {} are there", gib(*.needs), gib(*.have))]
    ShortOfMemory {
        /// Bytes that the run takes at least.
        needs: u64,
        /// Bytes that are there.
        have: u64,
        /// What else is wanted of the run; empty for nothing.
        form: &'static str,
    },
    /// Of the engine.
    #[error(transparent)]
    Engine(engine::Error),
    /// Of the media layer.
    #[error(transparent)]
    Media(media::Error),
    /// Of the store.
    #[error(transparent)]
    Store(store::Error),
    /// Of the model library.
    #[error(transparent)]
    Hub(#[from] crate::hub::Error),
    /// The given image does not decode within the limits.
    #[error("image `{id}`: {source}")]
    GivenImage {
        /// Its id.
        id: String,
        /// What is wrong with it.
        source: media::Error,
    },
    /// A work object that is not what an earlier stage wrote.
    #[error("frames object: {0}")]
    Frames(String),
    /// The job was already published with other files.
    #[error(
        "job {key} already has a result with other files: published {published}, now made {made}"
    )]
    Conflict {
        /// The job.
        key: String,
        /// SHA-256 of the main file of the existing result.
        published: String,
        /// SHA-256 of the main file made now.
        made: String,
    },
    /// An artifact an earlier stage made is not in the store any more.
    #[error("artifact `{0}` is not in the store")]
    Gone(String),
    /// The plan and the stage do not fit: a fault of ours or of a hand-made order.
    #[error("order: {0}")]
    Order(String),
    /// Another run than the receipt's.
    #[error(transparent)]
    Differs(#[from] Box<Mismatch>),
    /// A record that does not turn into JSON or back.
    #[error("record: {0}")]
    Record(#[from] serde_json::Error),
}

/// Carries out jobs on one device. Cheap to clone; clones share loaded models and the device's one permit.
#[derive(Clone)]
pub struct Renderer {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Settings,
    desk: models::Desk,
    hashes: hash::Hashes,
}

impl Renderer {
    /// A renderer; opens no device and loads no model before the first stage that needs them.
    pub fn new(settings: Settings) -> Self {
        engine::device::keep_freed_memory();
        if let Some(threads) = settings.threads {
            engine::device::set_threads(threads);
        }
        let hashes = hash::Hashes::new(settings.library.cache_dir());
        Self { inner: Arc::new(Inner { settings, desk: models::Desk::default(), hashes }) }
    }

    /// The store results go to.
    pub fn store(&self) -> &Store {
        &self.inner.settings.store
    }

    /// The models this renderer chooses from.
    pub fn library(&self) -> &Library {
        &self.inner.settings.library
    }

    /// The device with its number type in a few words, or why there is none, and the bytes of memory that a run may take.
    pub fn machine(&self) -> (String, Option<u64>) {
        let settings = &self.inner.settings;
        let looked_at =
            self.inner.desk.wait(&mut |_| ControlFlow::Continue(())).and_then(|mut permit| {
                let compute = permit.compute(settings)?;
                let name = format!("{} {}", compute.name(), compute.dtype_name());
                Ok((name, permit.memory(settings)?))
            });
        looked_at.unwrap_or_else(|error| (format!("without a device: {error}"), None))
    }

    /// How often weights have been read from the disk.
    pub fn weights_read(&self) -> u64 {
        self.inner.desk.reads.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Decides models, sizes, counts and parameters of `job`, or names every reason why this machine cannot do it.
    pub fn plan(&self, job: &ValidJob, seed: u64) -> Result<Plan, Error> {
        let plan = plan::plan(&self.inner.settings, job, seed)?;
        room::check(&self.inner.settings, &plan)?;
        point("planned")?;
        Ok(plan)
    }

    /// Makes the image, or takes the given one, natively and at the delivered size.
    pub fn gen_image(&self, order: &Order, hook: &mut Hook<'_>) -> Result<ImageMade, Error> {
        settled::once(self.store(), order, ("image", &()), || {
            room::check_stage(&self.inner.settings, &order.plan, "image")?;
            gen_image::gen_image(&self.inner, order, hook)
        })
    }

    /// Takes the image `id` of the store in place of the one made: the order as if it had been given with the job, and
    /// what came of it. Refuses what is no picture.
    pub fn replace_image(
        &self,
        order: &Order,
        id: &str,
        hook: &mut Hook<'_>,
    ) -> Result<(Order, ImageMade), Error> {
        let mut input = JobInput::clone(&order.job);
        (input.image, input.strength) = (Some(id.to_owned()), None);
        let job = validate::validate(input).map_err(Error::Refused)?;
        let mut plan = self.plan(&job, order.plan.seed)?;
        plan.notes.push("the image was replaced by another one before the job went on".to_owned());
        let order = Order { job, plan, ..order.clone() };
        let made = self.gen_image(&order, hook)?;
        Ok((order, made))
    }

    /// Animates `image`, the native image for run 0 and the last frame of the run before for every other.
    pub fn gen_video(
        &self,
        order: &Order,
        image: &BlobRef,
        run: u32,
        hook: &mut Hook<'_>,
    ) -> Result<FramesMade, Error> {
        settled::once(self.store(), order, (&format!("video-{run}"), image), || {
            room::check_stage(&self.inner.settings, &order.plan, "video")?;
            gen_video::gen_video(&self.inner, order, image, run, hook)
        })
    }

    /// Joins the runs, interpolates to the delivered rate and writes the mp4 and its poster.
    pub fn encode_video(
        &self,
        order: &Order,
        runs: &[FramesMade],
        hook: &mut Hook<'_>,
    ) -> Result<VideoMade, Error> {
        settled::once(self.store(), order, ("encode", &runs), || {
            room::check_stage(&self.inner.settings, &order.plan, "encode")?;
            encode_video::encode_video(&self.inner, order, runs, hook)
        })
    }

    /// Publishes the result exactly once; an earlier attempt's result of the same files is returned as it is.
    pub fn publish(
        &self,
        order: &Order,
        made: &Made,
        hook: &mut Hook<'_>,
    ) -> Result<JobResult, Error> {
        publish::publish(&self.inner, order, made, hook)
    }

    /// Removes what the job left behind: work objects, temporary files and, when it was not published, its blobs.
    pub fn cleanup(&self, key: &JobKey) -> Result<(), Error> {
        self.store().cleanup(key)?;
        Ok(())
    }

    /// All stages of a job, one after the other, under a new key of its own. Leaves nothing behind when it fails.
    pub fn render_all(
        &self,
        job: &ValidJob,
        seed: u64,
        hook: &mut Hook<'_>,
    ) -> Result<JobResult, Error> {
        let job_key = JobKey::of_workflow(&format!("render-{}", uuid::Uuid::now_v7()));
        let plan = self.plan(job, seed)?;
        let order = Order { is_only_attempt: true, ..Order::new(job_key, job.clone(), plan) };
        let result = self.stages(&order, hook);
        if result.is_err() {
            self.tidy(&order.job_key);
        }
        result
    }

    /// Makes again what `receipt` tells of, under a key of its own, and compares; leaves nothing behind.
    ///
    /// # Errors
    /// As any job; and [`Error::Refused`] for a model that is not here or is another one. That the results differ is no
    /// error.
    pub fn verify(&self, receipt: &Receipt, hook: &mut Hook<'_>) -> Result<Verdict, Error> {
        verify::verify(self, receipt, hook)
    }

    /// Removes what a job left that has no result.
    fn tidy(&self, key: &JobKey) {
        if let Err(error) = self.cleanup(key) {
            tracing::warn!(%error, %key, "leftovers of a job without a result stay until the next sweep");
        }
    }

    fn stages(&self, order: &Order, hook: &mut Hook<'_>) -> Result<JobResult, Error> {
        let image = self.gen_image(order, hook)?;
        let mut made = Made { image, runs: Vec::new(), video: None };
        if let Some(video) = &order.plan.video {
            let mut start = made.image.image.clone();
            for run in 0..video.runs {
                let frames = self.gen_video(order, &start, run, hook)?;
                start = frames.last_frame.clone();
                made.runs.push(frames);
            }
            made.video = Some(self.encode_video(order, &made.runs, hook)?);
        }
        self.publish(order, &made, hook)
    }
}

impl From<engine::Error> for Error {
    fn from(error: engine::Error) -> Self {
        match error {
            engine::Error::Stopped => Self::Stopped,
            other => Self::Engine(other),
        }
    }
}

impl From<media::Error> for Error {
    fn from(error: media::Error) -> Self {
        match error {
            media::Error::Stopped => Self::Stopped,
            other => Self::Media(other),
        }
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        Self::Store(error)
    }
}

/// Reports, and turns a break into [`Error::Stopped`].
fn report(hook: &mut Hook<'_>, stage: &'static str, done: u64, total: u64) -> Result<(), Error> {
    match hook(Report::new(stage, done, total)) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Stopped),
    }
}

/// Does what a test asked for at `name`; its error is the engine's where it is named like that, else the store's.
fn point(name: &'static str) -> Result<(), Error> {
    failpoint::hit(name).map_err(|source| match source.to_string().as_str() {
        "DEVICE_ERROR" => engine::Error::Device { problem: name.to_owned() }.into(),
        "OUT_OF_MEMORY" => engine::Error::OutOfMemory { problem: name.to_owned() }.into(),
        _ => store::writing(name.as_ref(), source).into(),
    })
}

/// Wall-clock time for a record: whole milliseconds.
fn seconds(time: std::time::Duration) -> f64 {
    (time.as_secs_f64() * 1e3).round() / 1e3
}
