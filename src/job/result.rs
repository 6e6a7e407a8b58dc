//! What a finished job returns: its final progress, its files, and what was really done.

use serde::{Deserialize, Serialize};

use super::progress::Progress;

/// One published file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asset {
    /// Where to read it: `file://…` for a local store.
    pub url: String,
    /// Lower-case hex SHA-256 of the content; the file's name in the store.
    pub sha256: String,
    /// Length in bytes.
    pub bytes: u64,
    /// For example `video/mp4`.
    pub media_type: String,
}

/// The files of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assets {
    /// The image, PNG; the first of several.
    pub image: Option<Asset>,
    /// All images of a job that asked for several, in the order of their seeds; empty for one image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<Asset>,
    /// The video, mp4.
    pub video: Option<Asset>,
    /// First frame of the video as JPEG.
    pub poster: Option<Asset>,
    /// JSON record of the request and everything that shaped the result.
    pub receipt: Option<Asset>,
}

/// What was really done; sizes in pixels, times in seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Seed of all noise.
    pub seed: u64,
    /// Size asked for and delivered.
    pub delivered_size: [u32; 2],
    /// Size the image model worked at; `None` when an image was given.
    pub image_size: Option<[u32; 2]>,
    /// Size the video model worked at.
    pub video_size: Option<[u32; 2]>,
    /// Frames of the file that are the model's own, unchanged.
    pub native_frames: u32,
    /// Frames of the file made from the model's by motion interpolation.
    pub interpolated_frames: u32,
    /// Delivered frames per second.
    pub fps: Option<f64>,
    /// Delivered duration.
    pub duration: Option<f64>,
    /// Text-to-image model.
    pub image_model: Option<String>,
    /// Image-to-video model.
    pub video_model: Option<String>,
    /// `cpu`, `cuda:0`, `metal`.
    pub device: String,
    /// `f32`, `f16`, `bf16`.
    pub dtype: String,
    /// Tokens the prompt took, and how many of them the encoder had to cut.
    pub prompt_tokens: Option<[u32; 2]>,
    /// Video encoder used, and why others were not.
    pub encoder: Option<String>,
    /// Things the user should know, one sentence each.
    pub notes: Vec<String>,
    /// Wall-clock seconds by stage.
    pub timings: std::collections::BTreeMap<String, f64>,
}

/// Return value of the workflow and content of the manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobResult {
    /// The final state.
    #[serde(flatten)]
    pub progress: Progress,
    /// The files.
    pub assets: Assets,
    /// What was really done.
    pub done: Facts,
    /// The client's metadata, untouched.
    pub metadata: serde_json::Map<String, serde_json::Value>,
}
