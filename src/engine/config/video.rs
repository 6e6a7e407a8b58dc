//! Configs of a Stable Video Diffusion folder: UNet, autoencoder, image encoder, colours of the image encoder.

use std::path::Path;

use serde_json::{Value, json};

use super::vae::SAMPLE_SIZE;
use super::{COUNTS, Json, WIDTHS};
use crate::engine::Result;
use crate::engine::nn::activation::Activation;

/// Groups of every norm in these models; no config key changes it.
pub const GROUPS: usize = 32;

/// One level of the video UNet.
#[derive(Clone, Debug, PartialEq)]
pub struct VideoLevel {
    /// Channels.
    pub channels: usize,
    /// Attention heads.
    pub heads: usize,
    /// Transformer blocks in each transformer of the level.
    pub blocks: usize,
    /// Whether there is attention on the way down.
    pub down_attention: bool,
    /// Whether there is attention on the way up.
    pub up_attention: bool,
}

/// `unet/config.json` of a `UNetSpatioTemporalConditionModel`.
#[derive(Clone, Debug, PartialEq)]
pub struct VideoUnetConfig {
    /// Channels of the input: noisy latents and image latents.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Levels, outermost first.
    pub levels: Vec<VideoLevel>,
    /// Resnets in a level on the way down; one more on the way up.
    pub layers_per_block: usize,
    /// Width of the image embedding.
    pub cross_attention: usize,
    /// Width of the sinusoid of each added number.
    pub added_width: usize,
    /// Width of all added sinusoids together.
    pub added_total: usize,
    /// Frames it was trained to make at once.
    pub frames: usize,
    /// Latent cells along one side that it was trained for.
    pub sample_size: (usize, usize),
}

impl VideoUnetConfig {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Self> {
        let json = Json::read(path)?;
        json.only("_class_name", &[json!("UNetSpatioTemporalConditionModel")])?;
        let channels = json.sizes("block_out_channels", WIDTHS)?;
        check_groups(&json, &channels)?;
        let sides = json.size_per_level("sample_size", Some(96), 2, 1..=4096)?;
        let config = Self {
            in_channels: json.size("in_channels", Some(8), COUNTS)?,
            out_channels: json.size("out_channels", Some(4), COUNTS)?,
            levels: levels(&json, &channels)?,
            layers_per_block: json.size("layers_per_block", Some(2), COUNTS)?,
            cross_attention: json.size("cross_attention_dim", Some(1024), WIDTHS)?,
            added_width: json.size("addition_time_embed_dim", Some(256), WIDTHS)?,
            added_total: json.size("projection_class_embeddings_input_dim", Some(768), WIDTHS)?,
            frames: json.size("num_frames", Some(25), COUNTS)?,
            sample_size: (sides[0], sides[1]),
        };
        if !config.added_width.is_multiple_of(2) || config.added_width < 4 {
            return Err(json.senseless("addition_time_embed_dim", "an even number from 4"));
        }
        // Pace, motion and noise: the three numbers this architecture is told.
        if config.added_total != 3 * config.added_width {
            return Err(json.unsupported(
                "projection_class_embeddings_input_dim",
                "three times `addition_time_embed_dim`",
            ));
        }
        if config.in_channels <= config.out_channels {
            return Err(json.senseless("in_channels", "more than `out_channels`"));
        }
        Ok(config)
    }

    /// Width of the time embedding.
    pub fn time_width(&self) -> usize {
        4 * self.levels[0].channels
    }
}

fn levels(json: &Json, channels: &[usize]) -> Result<Vec<VideoLevel>> {
    let count = channels.len();
    let crossed = |key: &str, way: &str| {
        let (plain, cross) =
            (format!("{way}SpatioTemporal"), format!("CrossAttn{way}SpatioTemporal"));
        json.crossed(key, &plain, &cross, count)
    };
    let (down, up) =
        (crossed("down_block_types", "DownBlock")?, crossed("up_block_types", "UpBlock")?);
    // What the class takes when the key is absent: heads of 64 channels at the published widths.
    let heads = match json.value("num_attention_heads") {
        None => channels.iter().map(|channels| (channels / 64).max(1)).collect(),
        Some(_) => json.size_per_level("num_attention_heads", None, count, COUNTS)?,
    };
    let blocks = json.size_per_level("transformer_layers_per_block", Some(1), count, COUNTS)?;
    (0..count)
        .map(|level| {
            if !channels[level].is_multiple_of(heads[level]) {
                return Err(json.senseless(
                    "num_attention_heads",
                    format!("a divisor of {}", channels[level]),
                ));
            }
            Ok(VideoLevel {
                channels: channels[level],
                heads: heads[level],
                blocks: blocks[level],
                down_attention: down[level],
                // The way up is listed innermost first.
                up_attention: up[count - 1 - level],
            })
        })
        .collect()
}

/// `vae/config.json` of an `AutoencoderKLTemporalDecoder`.
#[derive(Clone, Debug, PartialEq)]
pub struct VideoVaeConfig {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each level, outermost first.
    pub block_out_channels: Vec<usize>,
    /// Resnets in a level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Pixels along one side of the pictures it was trained on.
    pub sample_size: usize,
    /// Latents are divided by it before decoding.
    pub scaling_factor: f64,
    /// Whether half precision overflows in its encoder.
    pub force_upcast: bool,
}

impl VideoVaeConfig {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Self> {
        let json = Json::read(path)?;
        json.only("_class_name", &[json!("AutoencoderKLTemporalDecoder")])?;
        let block_out_channels = json.sizes("block_out_channels", WIDTHS)?;
        check_groups(&json, &block_out_channels)?;
        if json.value("down_block_types").is_some() {
            let types = json.texts("down_block_types")?;
            if types.len() != block_out_channels.len()
                || types.iter().any(|name| *name != "DownEncoderBlock2D")
            {
                return Err(json.unsupported(
                    "down_block_types",
                    "`DownEncoderBlock2D` for each of `block_out_channels`",
                ));
            }
        }
        Ok(Self {
            in_channels: json.size("in_channels", Some(3), 3..=3)?,
            out_channels: json.size("out_channels", Some(3), 3..=3)?,
            latent_channels: json.size("latent_channels", Some(4), COUNTS)?,
            layers_per_block: json.size("layers_per_block", Some(1), COUNTS)?,
            sample_size: json.size_per_level("sample_size", Some(SAMPLE_SIZE), 2, 1..=8192)?[0],
            scaling_factor: json.float("scaling_factor", Some(0.18215), 1e-6..=1e6)?,
            force_upcast: json.flag("force_upcast", true)?,
            block_out_channels,
        })
    }

    /// Pixels along one side of a latent cell.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

fn check_groups(json: &Json, channels: &[usize]) -> Result<()> {
    if channels.iter().all(|channels| channels.is_multiple_of(GROUPS)) {
        return Ok(());
    }
    Err(json
        .senseless("block_out_channels", format!("multiples of {GROUPS}, the groups of the norms")))
}

/// `image_encoder/config.json` of a `CLIPVisionModelWithProjection`.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipVisionConfig {
    /// Width of the hidden states.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Pixels along one side of the square picture.
    pub image_size: usize,
    /// Pixels along one side of a patch.
    pub patch_size: usize,
    /// Width of the projected embedding.
    pub projection: usize,
    /// Non-linearity of the MLP.
    pub activation: Activation,
    /// Epsilon of the layer norms.
    pub eps: f64,
}

impl ClipVisionConfig {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Self> {
        let json = Json::read(path)?;
        json.only("model_type", &[json!("clip_vision_model"), json!("clip")])?;
        json.only("num_channels", &[json!(3)])?;
        let config = Self {
            hidden: json.size("hidden_size", Some(768), WIDTHS)?,
            intermediate: json.size("intermediate_size", Some(3072), WIDTHS)?,
            layers: json.size("num_hidden_layers", Some(12), COUNTS)?,
            heads: json.size("num_attention_heads", Some(12), COUNTS)?,
            image_size: json.size("image_size", Some(224), 1..=4096)?,
            patch_size: json.size("patch_size", Some(32), 1..=4096)?,
            projection: json.size("projection_dim", Some(512), WIDTHS)?,
            activation: Activation::of_config(&json, "hidden_act", "quick_gelu")?,
            eps: json.float("layer_norm_eps", Some(1e-5), 1e-12..=0.1)?,
        };
        if !config.hidden.is_multiple_of(config.heads) {
            return Err(
                json.senseless("num_attention_heads", format!("a divisor of {}", config.hidden))
            );
        }
        if config.patch_size > config.image_size {
            return Err(json.senseless(
                "patch_size",
                format!("at most `image_size`, which is {}", config.image_size),
            ));
        }
        Ok(config)
    }

    /// Patches along one side.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }
}

/// `feature_extractor/preprocessor_config.json`: the colour statistics CLIP was trained with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipColours {
    /// Mean of red, green and blue in 0..1.
    pub mean: [f32; 3],
    /// Standard deviation of red, green and blue.
    pub deviation: [f32; 3],
}

impl ClipColours {
    /// CLIP's own numbers.
    pub const CLIP: Self = Self {
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        deviation: [0.268_629_54, 0.261_302_6, 0.275_777_1],
    };

    /// Reads and checks the file; a folder without it means CLIP's own numbers.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Ok(Self::CLIP);
        }
        let json = Json::read(path)?;
        Ok(Self {
            mean: triple(&json, "image_mean", Self::CLIP.mean, 0.0)?,
            deviation: triple(&json, "image_std", Self::CLIP.deviation, 1e-3)?,
        })
    }
}

/// Three numbers from `least` to 1000, one a colour.
#[expect(clippy::cast_possible_truncation, reason = "pictures are single precision")]
fn triple(json: &Json, key: &str, default: [f32; 3], least: f64) -> Result<[f32; 3]> {
    let Some(value) = json.value(key) else { return Ok(default) };
    let numbers: Option<Vec<f32>> = value.as_array().and_then(|list| {
        let numbers = list.iter().map(Value::as_f64);
        numbers
            .map(|number| {
                number.filter(|number| (least..=1000.0).contains(number)).map(|n| n as f32)
            })
            .collect()
    });
    numbers
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| json.senseless(key, format!("three numbers from {least} to 1000")))
}
