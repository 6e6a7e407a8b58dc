//! `vae/config.json` of an `AutoencoderKL`.

use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::json;

use super::{COUNTS, Json, WIDTHS};
use crate::engine::{Error, Result};

/// Log variances beyond these are cut.
const LOG_VARIANCES: (f64, f64) = (-30.0, 20.0);

/// Pixels along one side of training pictures where a config does not tell.
pub(super) const SAMPLE_SIZE: usize = 512;

/// Widths and scaling of an image autoencoder.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
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
    /// Groups of the norms.
    pub groups: usize,
    /// Pixels along one side of the pictures it was trained on.
    pub sample_size: usize,
    /// Latents are multiplied by it after encoding.
    pub scaling_factor: f64,
    /// Subtracted from latents before scaling.
    pub shift_factor: f64,
    /// Whether half precision overflows in it.
    pub force_upcast: bool,
    /// Whether the middle has its attention.
    pub mid_attention: bool,
    /// Whether a 1x1 convolution follows the encoder.
    pub quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub post_quant_conv: bool,
}

impl VaeConfig {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(&Json::read(path)?)
    }

    /// Checks an object that is in memory.
    pub fn of(json: &Json) -> Result<Self> {
        json.only("_class_name", &[json!("AutoencoderKL")])?;
        json.only("act_fn", &[json!("silu"), json!("swish")])?;
        json.only("latents_mean", &[])?;
        json.only("latents_std", &[])?;
        let block_out_channels = json.sizes("block_out_channels", WIDTHS)?;
        for (key, kind) in
            [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")]
        {
            if json.value(key).is_some() {
                let types = json.texts(key)?;
                if types.len() != block_out_channels.len() || types.iter().any(|name| *name != kind)
                {
                    return Err(json
                        .unsupported(key, &format!("`{kind}` for each of `block_out_channels`")));
                }
            }
        }
        let config = Self {
            in_channels: json.size("in_channels", Some(3), 3..=3)?,
            out_channels: json.size("out_channels", Some(3), 3..=3)?,
            latent_channels: json.size("latent_channels", Some(4), COUNTS)?,
            layers_per_block: json.size("layers_per_block", Some(1), COUNTS)?,
            groups: json.size("norm_num_groups", Some(32), COUNTS)?,
            sample_size: json.size_per_level("sample_size", Some(SAMPLE_SIZE), 2, 1..=8192)?[0],
            scaling_factor: json.float("scaling_factor", Some(0.18215), 1e-6..=1e6)?,
            shift_factor: json.float("shift_factor", Some(0.0), -1e6..=1e6)?,
            force_upcast: json.flag("force_upcast", true)?,
            mid_attention: json.flag("mid_block_add_attention", true)?,
            quant_conv: json.flag("use_quant_conv", true)?,
            post_quant_conv: json.flag("use_post_quant_conv", true)?,
            block_out_channels,
        };
        if config.block_out_channels.iter().any(|channels| !channels.is_multiple_of(config.groups))
        {
            return Err(
                json.senseless("norm_num_groups", "a divisor of each of `block_out_channels`")
            );
        }
        Ok(config)
    }

    /// Pixels along one side of a latent cell.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Latents as the UNet has them, drawn from `moments` (b, 2c, h, w) with standard normal `noise` (b, c, h, w).
    pub fn sample(&self, moments: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let halves = moments.to_dtype(DType::F32)?.chunk(2, 1)?;
        let [mean, log_variance] = halves.as_slice() else {
            return Err(Error::Internal("moments without two halves".into()));
        };
        let spread = (log_variance.clamp(LOG_VARIANCES.0, LOG_VARIANCES.1)? * 0.5)?.exp()?;
        let z = (mean + (spread * noise)?)?;
        Ok(((z - self.shift_factor)? * self.scaling_factor)?)
    }

    /// Latents as the UNet has them to what the decoder takes.
    pub fn unscale(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(((latents / self.scaling_factor)? + self.shift_factor)?)
    }
}
