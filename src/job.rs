//! The wire contract: what a client sends, what a job reports, and the names both sides rely on.
//!
//! The only module that speaks JSON to clients. `parse` reads a request strictly, `validate` turns it into a
//! [`ValidJob`] or every fault at once; after that nobody checks a width again. Start from [`JobInput`].

pub mod class;
pub mod fields;
mod json;
pub mod length;
pub mod parse;
pub mod progress;
pub mod result;
pub mod size;
pub mod style;
pub mod validate;

use serde::{Deserialize, Serialize};

/// Workflow type clients start by name.
pub const WORKFLOW_TYPE: &str = "GenVideoWorkflow";
/// Default task queue: workflows and the light activities.
pub const TASK_QUEUE: &str = "generation-queue";
/// Query that answers with a [`progress::Progress`].
pub const QUERY_STATUS: &str = "get_status";
/// Signal that cancels a job; takes no argument.
pub const SIGNAL_CANCEL: &str = "cancel_generation";
/// Signal with a Progress-like object; ignored when malformed or stale.
pub const SIGNAL_PROGRESS: &str = "update_progress";

/// Signal that lets a job with `approve` go on after its image; takes no argument.
pub const SIGNAL_APPROVE: &str = "approve";
/// Signal that ends a job with `approve`; an object may give the `reason`.
pub const SIGNAL_REJECT: &str = "reject";
/// Signal that gives a job with `approve` another image: `{"image": id, "approve": true}`, the last being optional.
pub const SIGNAL_REPLACE: &str = "replace_image";
/// Signal that stops a job where it is; takes no argument.
pub const SIGNAL_PAUSE: &str = "pause";
/// Signal that lets a paused job go on; takes no argument.
pub const SIGNAL_RESUME: &str = "resume";

/// What a client asks for. Optional fields that are `None` take the model manifest's default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobInput {
    /// What to show, 1..=8192 bytes of UTF-8.
    pub prompt: String,
    /// Name of a style preset, `none` adds nothing.
    pub style: String,
    /// Where the job ends: after the image or after the video.
    pub job_type: JobType,
    /// Delivered width in pixels.
    pub width: u32,
    /// Delivered height in pixels.
    pub height: u32,
    /// Delivered length in seconds.
    pub duration: f64,
    /// A label; never a path part, never written into files.
    pub user_id: String,
    /// Carried to the result untouched.
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// What to avoid; joined with the style's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    /// Seed of all noise; drawn once in the workflow when missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Denoise steps of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u32>,
    /// Classifier-free guidance scale of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance: Option<f64>,
    /// Sampler of the image, for example `ddim`, `euler_a`, `dpmpp_2m_karras`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler: Option<String>,
    /// Text-to-image model: a manifest name or a folder under the models folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_model: Option<String>,
    /// Image-to-video model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub video_model: Option<String>,
    /// Delivered frames per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fps: Option<f64>,
    /// SVD motion bucket, 1..=255.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub motion: Option<u32>,
    /// Strength of the noise added to the conditioning image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise_aug: Option<f64>,
    /// Id (sha256) of an image blob in the store: taken as it is, or redrawn where there is a `strength`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// How much of the given image to redraw, above 0, up to 1 for all of it (img2img).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// Images of an image job; each is the one that the seed, counted up, gives alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<u32>,
    /// A1111's "Clip skip": at 2 the text encoder's last layer is left out; 0 and 1 leave out none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_skip: Option<u32>,
    /// Name of a file whose autoencoder takes the place of the image model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae: Option<String>,
    /// What the image model predicts, where that is known better than its files tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// LoRA files to apply, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<Lora>,
    /// How the delivered size relates to the generated one.
    #[serde(default)]
    pub size_policy: SizePolicy,
    /// Whether the image and the video carry the prompt and the settings; they are labelled as made by a machine
    /// either way.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub embed_metadata: bool,
    /// Whether the job waits after its image until somebody approves of it.
    #[serde(default, skip_serializing_if = "is_no")]
    pub approve: bool,
    /// Whose turn it is when several jobs wait: 1 goes first, 5 last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
}

fn yes() -> bool {
    true
}

fn is_yes(flag: &bool) -> bool {
    *flag
}

fn is_no(flag: &bool) -> bool {
    !*flag
}

impl JobInput {
    /// A request with the required fields, everything else at its default.
    pub fn new(prompt: impl Into<String>, job_type: JobType, user_id: impl Into<String>) -> Self {
        Self {
            prompt: prompt.into(),
            style: "realistic".to_owned(),
            job_type,
            width: 1024,
            height: 1024,
            duration: 5.0,
            user_id: user_id.into(),
            metadata: serde_json::Map::new(),
            negative_prompt: None,
            seed: None,
            steps: None,
            guidance: None,
            sampler: None,
            image_model: None,
            video_model: None,
            fps: None,
            motion: None,
            noise_aug: None,
            image: None,
            strength: None,
            batch: None,
            clip_skip: None,
            vae: None,
            prediction: None,
            loras: Vec::new(),
            size_policy: SizePolicy::Fit,
            embed_metadata: true,
            approve: false,
            priority: None,
        }
    }
}

/// A LoRA by name with its scale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lora {
    /// Name of the file under the models folder.
    pub name: String,
    /// Multiplier of its deltas.
    pub scale: f64,
}

/// Where a job ends. Read in either case, written in upper case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum JobType {
    /// Stop after the image.
    Image,
    /// Go on to the video.
    Video,
}

/// What a denoising network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity between picture and noise.
    VPrediction,
}

/// How the delivered size relates to the generated one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SizePolicy {
    /// Generate at the nearest size the model supports, deliver exactly what was asked.
    #[default]
    Fit,
    /// Generate at exactly the asked size, or refuse.
    Exact,
}

/// A job that passed every check that needs no machine: made by [`validate::validate`] alone.
///
/// Reading one from JSON validates again, so there is no other way to get one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "JobInput")]
pub struct ValidJob(JobInput);

impl TryFrom<JobInput> for ValidJob {
    type Error = String;

    fn try_from(input: JobInput) -> Result<Self, String> {
        validate::validate(input).map_err(|faults| validate::summary(&faults))
    }
}

impl std::ops::Deref for ValidJob {
    type Target = JobInput;

    fn deref(&self) -> &JobInput {
        &self.0
    }
}
