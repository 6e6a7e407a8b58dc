//! What a model folder is, from its configs alone: no weights are read.

use std::path::Path;

use serde_json::json;

use super::config::unet::UnetConfig;
use super::config::vae::VaeConfig;
use super::config::{COUNTS, Json, WIDTHS};
use super::weights::{check_links, configs};
use super::{Error, Result};

/// What a model does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A prompt becomes a picture.
    TextToImage,
    /// A picture becomes frames.
    ImageToVideo,
}

/// What a model is and wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What it does.
    pub task: Task,
    /// `stable-diffusion-1`, `stable-diffusion-2`, `stable-diffusion-xl` or `stable-video-diffusion`.
    pub family: String,
    /// Width and height in pixels that it was trained for.
    pub native: (u32, u32),
    /// Width and height are multiples of this.
    pub multiple: u32,
    /// Frames of a run.
    pub frames: Option<u32>,
}

/// Reads `model_index.json` and the configs it leads to; for a one-file model, what its names and shapes give.
pub fn describe(path: &Path) -> Result<Description> {
    if path.is_file() {
        let configs = configs(path)?;
        let [unet, vae] = ["unet/config.json", "vae/config.json"].map(|name| &configs[name]);
        return describe_image(unet, vae);
    }
    check_links(path)?;
    let read = |name: &str| Json::read(&path.join(name));
    match pipeline_class(&read("model_index.json")?)? {
        Task::TextToImage => describe_image(&read("unet/config.json")?, &read("vae/config.json")?),
        Task::ImageToVideo => describe_video(path),
    }
}

/// The task of the pipeline class in `model_index.json`; any other class is refused.
pub(super) fn pipeline_class(index: &Json) -> Result<Task> {
    check_parts(index)?;
    match index.text("_class_name")? {
        Some("StableDiffusionPipeline" | "StableDiffusionXLPipeline") => Ok(Task::TextToImage),
        Some("StableVideoDiffusionPipeline") => Ok(Task::ImageToVideo),
        _ => Err(index.unsupported(
            "_class_name",
            "`StableDiffusionPipeline`, `StableDiffusionXLPipeline` or `StableVideoDiffusionPipeline`",
        )),
    }
}

/// Classes that each part of a pipeline may have; parts that are not listed are never loaded.
const PART_CLASSES: &[(&str, &[&str])] = &[
    ("unet", &["UNet2DConditionModel", "UNetSpatioTemporalConditionModel"]),
    ("vae", &["AutoencoderKL", "AutoencoderKLTemporalDecoder"]),
    ("text_encoder", &["CLIPTextModel", "CLIPTextModelWithProjection"]),
    ("text_encoder_2", &["CLIPTextModel", "CLIPTextModelWithProjection"]),
    ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
    ("tokenizer_2", &["CLIPTokenizer", "CLIPTokenizerFast"]),
];

/// Part names are plain names, and the parts that are loaded are of classes that are known.
fn check_parts(index: &Json) -> Result<()> {
    for (name, value) in index.entries().filter(|(_, value)| value.is_array()) {
        let plain = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        if name.is_empty() || !name.chars().all(plain) {
            let path = name.escape_debug().to_string().into();
            return Err(Error::PathEscape { path });
        }
        let Some((_, classes)) = PART_CLASSES.iter().find(|(part, _)| *part == name) else {
            continue;
        };
        let class = value[1].as_str();
        if !class.is_none_or(|class| classes.contains(&class)) {
            return Err(index.unsupported(name, &format!("`{}`", classes.join("` or `"))));
        }
    }
    Ok(())
}

fn describe_image(unet: &Json, vae: &Json) -> Result<Description> {
    let (unet, vae) = (UnetConfig::of(unet)?, VaeConfig::of(vae)?);
    let (height, width) = unet.sample_size;
    // Version 2 came with OpenCLIP's text encoder, 1024 wide, and linear projections; XL added sizes to them.
    let family = match (unet.addition, unet.linear_projection) {
        (Some(_), _) => "stable-diffusion-xl",
        (None, true) => "stable-diffusion-2",
        (None, false) => "stable-diffusion-1",
    };
    Ok(Description {
        task: Task::TextToImage,
        family: family.into(),
        native: (pixels(width * vae.factor()), pixels(height * vae.factor())),
        multiple: pixels(vae.factor()),
        frames: None,
    })
}

fn describe_video(folder: &Path) -> Result<Description> {
    let unet = Json::read(&folder.join("unet/config.json"))?;
    unet.only("_class_name", &[json!("UNetSpatioTemporalConditionModel")])?;
    let vae = Json::read(&folder.join("vae/config.json"))?;
    let factor = 1 << (vae.sizes("block_out_channels", WIDTHS)?.len() - 1);
    let side = unet.size("sample_size", Some(96), 1..=4096)? * factor;
    // The published models have a square `sample_size` and were trained at 1024 x 576.
    let native = if side == 768 { (1024, 576) } else { (pixels(side), pixels(side)) };
    Ok(Description {
        task: Task::ImageToVideo,
        family: "stable-video-diffusion".into(),
        native,
        multiple: pixels(factor),
        frames: Some(pixels(unet.size("num_frames", Some(25), COUNTS)?)),
    })
}

fn pixels(side: usize) -> u32 {
    u32::try_from(side).unwrap_or(u32::MAX)
}
