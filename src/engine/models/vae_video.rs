//! The autoencoder of Stable Video Diffusion: `AutoencoderKLTemporalDecoder`.
//!
//! Pictures are encoded one by one, as an image autoencoder does; frames are decoded a chunk at a time by resnets
//! that look across the frames of that chunk, so the size of a chunk is part of the result.

use candle_core::{DType, Tensor};

use crate::engine::Result;
use crate::engine::config::video::{GROUPS, VideoVaeConfig};
use crate::engine::denoise::{Pulse, check_pulse};
use crate::engine::models::vae::{Encoder, EncoderSpec, SpatialAttention};
use crate::engine::nn::conv::{Conv2d, Conv2dSpec, Upsample};
use crate::engine::nn::norm::GroupNorm;
use crate::engine::nn::video_resnet::{Blend, Epsilons, FrameConv, VideoResnet, in_pieces};
use crate::engine::tiling::{self, Tiling};
use crate::engine::weights::Weights;

/// Epsilon of every norm but those of the temporal halves.
const EPS: f64 = 1e-6;
/// Epsilons of the decoder's resnets.
const DECODER_EPS: Epsilons = Epsilons { spatial: EPS, temporal: 1e-5 };

/// Pictures to latents: the encoder of an image autoencoder.
pub struct VideoEncoder {
    encoder: Encoder,
    quant_conv: Conv2d,
    latent_channels: usize,
    dtype: DType,
}

impl VideoEncoder {
    /// Reads `encoder` and `quant_conv`; `weights` is the root of the autoencoder's file.
    pub fn load(weights: &Weights, config: &VideoVaeConfig) -> Result<Self> {
        let spec = EncoderSpec {
            in_channels: config.in_channels,
            latent_channels: config.latent_channels,
            block_out_channels: config.block_out_channels.clone(),
            layers_per_block: config.layers_per_block,
            groups: GROUPS,
            mid_attention: true,
        };
        let moments = 2 * config.latent_channels;
        Ok(Self {
            encoder: Encoder::load(&weights.pp("encoder"), &spec)?,
            quant_conv: Conv2d::load(
                &weights.pp("quant_conv"),
                Conv2dSpec::point(moments, moments),
            )?,
            latent_channels: config.latent_channels,
            dtype: weights.dtype(),
        })
    }

    /// Number type it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Pixels in [-1, 1], (b, 3, h, w), to the most likely latents (b, latent, h/8, w/8), not scaled.
    pub fn encode(&self, pixels: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let moments = self
            .quant_conv
            .forward(&self.encoder.forward(&pixels.to_dtype(self.dtype)?, pulse)?)?;
        Ok(moments.narrow(1, 0, self.latent_channels)?.contiguous()?)
    }
}

/// Latents to frames.
pub struct VideoDecoder {
    conv_in: Conv2d,
    mid_resnets: Vec<VideoResnet>,
    mid_attention: SpatialAttention,
    up_blocks: Vec<(Vec<VideoResnet>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    time_conv_out: FrameConv,
    factor: usize,
    dtype: DType,
}

impl VideoDecoder {
    /// Reads `decoder`; `weights` is the root of the autoencoder's file.
    pub fn load(weights: &Weights, config: &VideoVaeConfig) -> Result<Self> {
        let weights = weights.pp("decoder");
        let widths = &config.block_out_channels;
        let (outermost, innermost) = (widths[0], widths[widths.len() - 1]);
        let mid = weights.pp("mid_block");
        let mid_resnet =
            |layer: usize| video_resnet(&mid.pp("resnets").pp(layer), innermost, innermost);
        // The way up is listed innermost first.
        let block = |index: usize| {
            Self::load_level(&weights.pp("up_blocks").pp(index), config, widths.len() - 1 - index)
        };
        Ok(Self {
            conv_in: Conv2d::load(
                &weights.pp("conv_in"),
                Conv2dSpec::same(config.latent_channels, innermost),
            )?,
            mid_resnets: (0..config.layers_per_block).map(mid_resnet).collect::<Result<_>>()?,
            mid_attention: SpatialAttention::load(&mid.pp("attentions.0"), innermost, GROUPS)?,
            up_blocks: (0..widths.len()).map(block).collect::<Result<_>>()?,
            conv_norm_out: GroupNorm::load(&weights.pp("conv_norm_out"), GROUPS, outermost, EPS)?,
            conv_out: Conv2d::load(
                &weights.pp("conv_out"),
                Conv2dSpec::same(outermost, config.out_channels),
            )?,
            time_conv_out: FrameConv::load(
                &weights.pp("time_conv_out"),
                config.out_channels,
                config.out_channels,
            )?,
            factor: config.factor(),
            dtype: weights.dtype(),
        })
    }

    fn load_level(
        weights: &Weights,
        config: &VideoVaeConfig,
        level: usize,
    ) -> Result<(Vec<VideoResnet>, Option<Upsample>)> {
        let widths = &config.block_out_channels;
        let (below, channels) = (widths[(level + 1).min(widths.len() - 1)], widths[level]);
        let resnet = |layer: usize| {
            let input = if layer == 0 { below } else { channels };
            video_resnet(&weights.pp("resnets").pp(layer), input, channels)
        };
        let double = || Upsample::load(&weights.pp("upsamplers.0"), channels);
        let resnets = (0..=config.layers_per_block).map(resnet).collect::<Result<_>>()?;
        Ok((resnets, (level > 0).then(double).transpose()?))
    }

    /// Number type it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// As [`Self::decode`], one tile of all frames of the chunk at a time.
    pub fn decode_tiled(
        &self,
        latents: &Tensor,
        tiling: Tiling,
        pulse: &mut Pulse<'_>,
    ) -> Result<Tensor> {
        tiling::decode(latents, tiling, self.factor, &mut |tile| self.decode(tile, pulse))
    }

    /// Latents of the frames of one chunk, (f, latent, h, w), already divided by the scaling factor, to pixels
    /// about [-1, 1]: (f, 3, 8h, 8w) in f32. `pulse` is called between the parts; a break ends the work.
    pub fn decode(&self, latents: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let frames = latents.dim(0)?;
        let mut h = self.conv_in.forward(&latents.to_dtype(self.dtype)?)?;
        for (layer, resnet) in self.mid_resnets.iter().enumerate() {
            // There is one attention, between the first resnet and the second.
            if layer == 1 {
                h = self.mid_attention.forward(&h)?;
            }
            h = resnet.forward(&h, None, frames)?;
            check_pulse(pulse)?;
        }
        for (resnets, upsample) in &self.up_blocks {
            for resnet in resnets {
                h = resnet.forward(&h, None, frames)?;
                check_pulse(pulse)?;
            }
            if let Some(upsample) = upsample {
                h = in_pieces(&h, 4 * 9, |piece, _| upsample.double(piece))?;
                check_pulse(pulse)?;
            }
        }
        let h = in_pieces(&h, 9, |piece, _| {
            self.conv_out.forward(&self.conv_norm_out.forward_silu(piece)?)
        })?;
        let (_, channels, height, width) = h.dims4()?;
        let by_channel =
            h.reshape((1, frames, channels, height * width))?.transpose(1, 2)?.contiguous()?;
        let out = self.time_conv_out.forward(&by_channel)?.transpose(1, 2)?;
        Ok(out.reshape((frames, channels, height, width))?.to_dtype(DType::F32)?)
    }
}

fn video_resnet(weights: &Weights, input: usize, output: usize) -> Result<VideoResnet> {
    VideoResnet::load(weights, (input, output), None, DECODER_EPS, Blend::Temporal)
}
