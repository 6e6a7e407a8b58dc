//! `AutoencoderKL`: pictures to latents and back.
//!
//! The [`Encoder`] and the single-head [`SpatialAttention`] are those of the video autoencoder too.

use candle_core::{DType, Tensor};

use crate::engine::Result;
use crate::engine::config::vae::VaeConfig;
use crate::engine::denoise::{Pulse, check_pulse};
use crate::engine::nn::activation::swap_axes;
use crate::engine::nn::attention::Attention;
use crate::engine::nn::conv::{Conv2d, Conv2dSpec, Downsample, HalvingPad, Upsample};
use crate::engine::nn::norm::GroupNorm;
use crate::engine::nn::resnet::{ResnetBlock, ResnetSpec};
use crate::engine::tiling::{self, Tiling};
use crate::engine::weights::Weights;

/// Epsilon of every norm in an autoencoder's encoder and in the image decoder.
const EPS: f64 = 1e-6;

/// An image autoencoder.
#[derive(Clone, Debug)]
pub struct Vae {
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    config: VaeConfig,
    dtype: DType,
}

impl Vae {
    /// Loads the component.
    pub fn load(weights: &Weights, config: VaeConfig) -> Result<Self> {
        let latent = config.latent_channels;
        let point = |name: &str, channels| {
            Conv2d::load(&weights.pp(name), Conv2dSpec::point(channels, channels))
        };
        let vae = Self {
            encoder: Encoder::load(&weights.pp("encoder"), &EncoderSpec::of(&config))?,
            decoder: Decoder::load(&weights.pp("decoder"), &config)?,
            quant_conv: config.quant_conv.then(|| point("quant_conv", 2 * latent)).transpose()?,
            post_quant_conv: config
                .post_quant_conv
                .then(|| point("post_quant_conv", latent))
                .transpose()?,
            dtype: weights.dtype(),
            config,
        };
        weights.finish()?;
        Ok(vae)
    }

    /// Widths and scaling.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Number type it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Pictures in -1..1 to mean and log variance of their latents, on channels: (b, 3, h, w) to (b, 2c, h/f, w/f).
    pub fn encode_moments(&self, pixels: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let moments = self.encoder.forward(&pixels.to_dtype(self.dtype)?, pulse)?;
        match &self.quant_conv {
            Some(conv) => conv.forward(&moments),
            None => Ok(moments),
        }
    }

    /// As [`VaeConfig::sample`].
    pub fn sample(&self, moments: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.config.sample(moments, noise)
    }

    /// Unscaled latents to pictures in about -1..1: (b, c, h, w) to (b, 3, fh, fw).
    pub fn decode(&self, z: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let z = z.to_dtype(self.dtype)?;
        match &self.post_quant_conv {
            Some(conv) => self.decoder.forward(&conv.forward(&z)?, pulse),
            None => self.decoder.forward(&z, pulse),
        }
    }

    /// The same one tile at a time, in f32; latents that fit into one tile come out as from [`Self::decode`].
    pub fn decode_tiled(
        &self,
        z: &Tensor,
        tiling: Tiling,
        pulse: &mut Pulse<'_>,
    ) -> Result<Tensor> {
        tiling::decode(z, tiling, self.config.factor(), &mut |tile| self.decode(tile, pulse))
    }
}

/// Widths of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderSpec {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of the latents; the encoder gives twice as many.
    pub latent_channels: usize,
    /// Channels of each level, outermost first.
    pub block_out_channels: Vec<usize>,
    /// Resnets in a level.
    pub layers_per_block: usize,
    /// Groups of the norms.
    pub groups: usize,
    /// Whether the middle has its attention.
    pub mid_attention: bool,
}

impl EncoderSpec {
    fn of(config: &VaeConfig) -> Self {
        Self {
            in_channels: config.in_channels,
            latent_channels: config.latent_channels,
            block_out_channels: config.block_out_channels.clone(),
            layers_per_block: config.layers_per_block,
            groups: config.groups,
            mid_attention: config.mid_attention,
        }
    }
}

/// `conv_in`, `down_blocks`, `mid_block`, `conv_norm_out`, `conv_out`.
#[derive(Clone, Debug)]
pub struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<(Vec<ResnetBlock>, Option<Downsample>)>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    /// Loads the encoder.
    pub fn load(weights: &Weights, spec: &EncoderSpec) -> Result<Self> {
        let widths = &spec.block_out_channels;
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let mut down_blocks = Vec::new();
        let mut input = first;
        for (index, output) in widths.iter().enumerate() {
            let at = weights.pp("down_blocks").pp(index);
            let resnets = resnets(&at, input, *output, spec.layers_per_block, spec.groups)?;
            let halve =
                || Downsample::load(&at.pp("downsamplers.0"), *output, HalvingPad::RightBelow);
            down_blocks.push((resnets, (index + 1 < widths.len()).then(halve).transpose()?));
            input = *output;
        }
        Ok(Self {
            conv_in: Conv2d::load(
                &weights.pp("conv_in"),
                Conv2dSpec::same(spec.in_channels, first),
            )?,
            down_blocks,
            mid_block: MidBlock::load(
                &weights.pp("mid_block"),
                last,
                spec.groups,
                spec.mid_attention,
            )?,
            conv_norm_out: GroupNorm::load(&weights.pp("conv_norm_out"), spec.groups, last, EPS)?,
            conv_out: Conv2d::load(
                &weights.pp("conv_out"),
                Conv2dSpec::same(last, 2 * spec.latent_channels),
            )?,
        })
    }

    /// (b, 3, h, w) to (b, 2c, h/f, w/f), before any `quant_conv`.
    pub fn forward(&self, pixels: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let mut x = self.conv_in.forward(pixels)?;
        for (resnets, halve) in &self.down_blocks {
            for resnet in resnets {
                check_pulse(pulse)?;
                x = resnet.forward(&x, None)?;
            }
            if let Some(halve) = halve {
                x = halve.forward(&x)?;
            }
        }
        check_pulse(pulse)?;
        let x = self.mid_block.forward(&x)?;
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

#[derive(Clone, Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<(Vec<ResnetBlock>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn load(weights: &Weights, config: &VaeConfig) -> Result<Self> {
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let mut up_blocks = Vec::new();
        let mut input = first;
        for (index, output) in widths.iter().enumerate() {
            let at = weights.pp("up_blocks").pp(index);
            let resnets = resnets(&at, input, *output, config.layers_per_block + 1, config.groups)?;
            let double = || Upsample::load(&at.pp("upsamplers.0"), *output);
            up_blocks.push((resnets, (index + 1 < widths.len()).then(double).transpose()?));
            input = *output;
        }
        Ok(Self {
            conv_in: Conv2d::load(
                &weights.pp("conv_in"),
                Conv2dSpec::same(config.latent_channels, first),
            )?,
            mid_block: MidBlock::load(
                &weights.pp("mid_block"),
                first,
                config.groups,
                config.mid_attention,
            )?,
            up_blocks,
            conv_norm_out: GroupNorm::load(&weights.pp("conv_norm_out"), config.groups, last, EPS)?,
            conv_out: Conv2d::load(
                &weights.pp("conv_out"),
                Conv2dSpec::same(last, config.out_channels),
            )?,
        })
    }

    fn forward(&self, z: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let mut x = self.mid_block.forward(&self.conv_in.forward(z)?)?;
        for (resnets, double) in &self.up_blocks {
            for resnet in resnets {
                check_pulse(pulse)?;
                x = resnet.forward(&x, None)?;
            }
            if let Some(double) = double {
                check_pulse(pulse)?;
                x = double.double(&x)?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

/// `resnets` of a level, the first of which changes the width.
fn resnets(
    weights: &Weights,
    input: usize,
    output: usize,
    count: usize,
    groups: usize,
) -> Result<Vec<ResnetBlock>> {
    (0..count)
        .map(|index| {
            let input = if index == 0 { input } else { output };
            let spec = ResnetSpec { input, output, time: None, groups, eps: EPS };
            ResnetBlock::load(&weights.pp("resnets").pp(index), spec)
        })
        .collect()
}

/// Resnet, attention, resnet at the narrowest level.
#[derive(Clone, Debug)]
struct MidBlock {
    first: ResnetBlock,
    attention: Option<SpatialAttention>,
    second: ResnetBlock,
}

impl MidBlock {
    fn load(weights: &Weights, channels: usize, groups: usize, attention: bool) -> Result<Self> {
        let spec = ResnetSpec { input: channels, output: channels, time: None, groups, eps: EPS };
        let load = || SpatialAttention::load(&weights.pp("attentions.0"), channels, groups);
        Ok(Self {
            first: ResnetBlock::load(&weights.pp("resnets.0"), spec)?,
            attention: attention.then(load).transpose()?,
            second: ResnetBlock::load(&weights.pp("resnets.1"), spec)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x, None)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x, None)
    }
}

/// Attention of one head over all cells of a picture, with its norm and residual.
#[derive(Clone, Debug)]
pub struct SpatialAttention {
    group_norm: GroupNorm,
    attention: Attention,
}

impl SpatialAttention {
    /// `group_norm` and the projections.
    pub fn load(weights: &Weights, channels: usize, groups: usize) -> Result<Self> {
        Ok(Self {
            group_norm: GroupNorm::load(&weights.pp("group_norm"), groups, channels, EPS)?,
            attention: Attention::load_single_head(weights, channels)?,
        })
    }

    /// (b, c, h, w) to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let cells = swap_axes(&self.group_norm.forward(x)?.flatten_from(2)?)?; // (b, hw, c)
        let looked = swap_axes(&self.attention.forward(&cells)?)?; // (b, c, hw)
        Ok((x + looked.reshape(x.shape())?)?)
    }
}
