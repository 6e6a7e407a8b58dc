//! The denoiser of Stable Video Diffusion: `UNetSpatioTemporalConditionModel`.
//!
//! Frames lie side by side in the batch, (b*f, c, h, w), and only the temporal halves of resnets and transformers
//! look across them. The epsilons of the norms are irregular, as published: see `eps_of`.

use candle_core::{DType, Tensor};

use crate::engine::Result;
use crate::engine::config::video::{GROUPS, VideoLevel, VideoUnetConfig};
use crate::engine::nn::conv::{Conv2d, Conv2dSpec, Downsample, HalvingPad, Upsample};
use crate::engine::nn::embedding::{Sinusoid, TimestepEmbedding};
use crate::engine::nn::norm::GroupNorm;
use crate::engine::nn::video_resnet::{Blend, Epsilons, VideoResnet, in_pieces};
use crate::engine::nn::video_transformer::{VideoTransformer, VideoTransformerSpec};
use crate::engine::weights::Weights;

/// Told the output of each part as it is made; an error stops the pass.
pub type Trace<'a> = dyn FnMut(&str, &Tensor) -> Result<()> + 'a;

/// What the denoiser is told besides the noisy frames.
#[derive(Clone, Debug)]
pub struct Condition {
    /// The embedding of the picture, one token a video: (b, 1, cross).
    pub image: Tensor,
    /// Pace (fps - 1), motion and noise strength.
    pub added: [f64; 3],
    /// Frames of a video.
    pub frames: usize,
}

/// The denoiser.
pub struct VideoUnet {
    time_proj: Sinusoid,
    time_embedding: TimestepEmbedding,
    add_time_proj: Sinusoid,
    add_embedding: TimestepEmbedding,
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    dtype: DType,
}

impl VideoUnet {
    /// Reads the denoiser; `weights` is the root of its file.
    pub fn load(weights: &Weights, config: &VideoUnetConfig) -> Result<Self> {
        let levels = &config.levels;
        let (outer, time) = (levels[0].channels, config.time_width());
        let down =
            |index: usize| DownBlock::load(&weights.pp("down_blocks").pp(index), config, index);
        // The way up is listed innermost first.
        let up = |index: usize| {
            UpBlock::load(&weights.pp("up_blocks").pp(index), config, levels.len() - 1 - index)
        };
        Ok(Self {
            time_proj: Sinusoid::new(outer),
            time_embedding: TimestepEmbedding::load(
                &weights.pp("time_embedding"),
                outer,
                time,
                time,
            )?,
            add_time_proj: Sinusoid::new(config.added_width),
            add_embedding: TimestepEmbedding::load(
                &weights.pp("add_embedding"),
                config.added_total,
                time,
                time,
            )?,
            conv_in: Conv2d::load(
                &weights.pp("conv_in"),
                Conv2dSpec::same(config.in_channels, outer),
            )?,
            down_blocks: (0..levels.len()).map(down).collect::<Result<_>>()?,
            mid_block: MidBlock::load(&weights.pp("mid_block"), config)?,
            up_blocks: (0..levels.len()).map(up).collect::<Result<_>>()?,
            conv_norm_out: GroupNorm::load(&weights.pp("conv_norm_out"), GROUPS, outer, 1e-5)?,
            conv_out: Conv2d::load(
                &weights.pp("conv_out"),
                Conv2dSpec::same(outer, config.out_channels),
            )?,
            dtype: weights.dtype(),
        })
    }

    /// Noisy frames with the image latents behind them, (b*f, in, h, w), at `timestep`: (b*f, out, h, w).
    pub fn forward(
        &self,
        x: &Tensor,
        timestep: f64,
        told: &Condition,
        trace: &mut Trace<'_>,
    ) -> Result<Tensor> {
        let videos = x.dim(0)? / told.frames;
        let time = self.embed_time(timestep, told, trace)?.repeat((videos, 1))?; // (b, t)
        let told = Told { time, image: told.image.to_dtype(self.dtype)?, frames: told.frames };
        let mut h = self.conv_in.forward(&x.to_dtype(self.dtype)?)?;
        trace("conv_in", &h)?;
        let mut skips = vec![h.clone()];
        for (index, block) in self.down_blocks.iter().enumerate() {
            h = block.forward(&h, &told, &mut skips)?;
            trace(&format!("down_blocks.{index}"), &h)?;
        }
        h = self.mid_block.forward(&h, &told)?;
        trace("mid_block", &h)?;
        for (index, block) in self.up_blocks.iter().enumerate() {
            h = block.forward(h, &told, &mut skips)?;
            trace(&format!("up_blocks.{index}"), &h)?;
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&h)?)
    }

    /// Time and the added numbers as one vector: (1, time width).
    fn embed_time(&self, timestep: f64, told: &Condition, trace: &mut Trace<'_>) -> Result<Tensor> {
        let device = told.image.device();
        let time = self.time_embedding.forward(&self.time_proj.forward(&[timestep], device)?)?;
        trace("time_embedding", &time)?;
        let added = self.add_time_proj.forward(&told.added, device)?.flatten_all()?.unsqueeze(0)?;
        let added = self.add_embedding.forward(&added)?;
        trace("add_embedding", &added)?;
        Ok((time + added)?)
    }
}

/// What every block is told.
struct Told {
    time: Tensor,  // (b, t)
    image: Tensor, // (b, 1, cross)
    frames: usize,
}

/// One level on the way down.
struct DownBlock {
    resnets: Vec<VideoResnet>,
    attentions: Vec<VideoTransformer>,
    downsample: Option<Downsample>,
}

impl DownBlock {
    fn load(weights: &Weights, config: &VideoUnetConfig, index: usize) -> Result<Self> {
        let level = &config.levels[index];
        let before = config.levels[index.saturating_sub(1)].channels;
        let layers = config.layers_per_block;
        let eps =
            eps_of(if level.down_attention { Place::CrossedOrUp } else { Place::PlainDownOrMid });
        let resnet = |layer: usize| {
            let input = if layer == 0 { before } else { level.channels };
            resnet(&weights.pp("resnets").pp(layer), (input, level.channels), config, eps)
        };
        let last = index + 1 == config.levels.len();
        let downsample =
            || Downsample::load(&weights.pp("downsamplers.0"), level.channels, HalvingPad::Even);
        Ok(Self {
            resnets: (0..layers).map(resnet).collect::<Result<_>>()?,
            attentions: transformers(
                weights,
                level,
                config,
                if level.down_attention { layers } else { 0 },
            )?,
            downsample: (!last).then(downsample).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, told: &Told, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut h = x.clone();
        for (layer, resnet) in self.resnets.iter().enumerate() {
            h = resnet.forward(&h, Some(&told.time), told.frames)?;
            if let Some(attention) = self.attentions.get(layer) {
                h = attention.forward(&h, &told.image, told.frames)?;
            }
            skips.push(h.clone());
        }
        if let Some(downsample) = &self.downsample {
            h = downsample.forward(&h)?;
            skips.push(h.clone());
        }
        Ok(h)
    }
}

/// The innermost part.
struct MidBlock {
    first: VideoResnet,
    attention: VideoTransformer,
    second: VideoResnet,
}

impl MidBlock {
    fn load(weights: &Weights, config: &VideoUnetConfig) -> Result<Self> {
        let level = &config.levels[config.levels.len() - 1];
        let widths = (level.channels, level.channels);
        let eps = eps_of(Place::PlainDownOrMid);
        Ok(Self {
            first: resnet(&weights.pp("resnets.0"), widths, config, eps)?,
            attention: transformer(&weights.pp("attentions.0"), level, config)?,
            second: resnet(&weights.pp("resnets.1"), widths, config, eps)?,
        })
    }

    fn forward(&self, x: &Tensor, told: &Told) -> Result<Tensor> {
        let h = self.first.forward(x, Some(&told.time), told.frames)?;
        let h = self.attention.forward(&h, &told.image, told.frames)?;
        self.second.forward(&h, Some(&told.time), told.frames)
    }
}

/// One level on the way up: each resnet takes what the way down left for it.
struct UpBlock {
    resnets: Vec<VideoResnet>,
    attentions: Vec<VideoTransformer>,
    upsample: Option<Upsample>,
}

impl UpBlock {
    fn load(weights: &Weights, config: &VideoUnetConfig, index: usize) -> Result<Self> {
        let levels = &config.levels;
        let level = &levels[index];
        let below = levels[(index + 1).min(levels.len() - 1)].channels;
        let above = levels[index.saturating_sub(1)].channels;
        let layers = config.layers_per_block + 1;
        let eps = eps_of(Place::CrossedOrUp);
        let resnet = |layer: usize| {
            let input = if layer == 0 { below } else { level.channels };
            let skip = if layer + 1 == layers { above } else { level.channels };
            resnet(&weights.pp("resnets").pp(layer), (input + skip, level.channels), config, eps)
        };
        let upsample = || Upsample::load(&weights.pp("upsamplers.0"), level.channels);
        Ok(Self {
            resnets: (0..layers).map(resnet).collect::<Result<_>>()?,
            attentions: transformers(
                weights,
                level,
                config,
                if level.up_attention { layers } else { 0 },
            )?,
            upsample: (index > 0).then(upsample).transpose()?,
        })
    }

    fn forward(&self, mut h: Tensor, told: &Told, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for (layer, resnet) in self.resnets.iter().enumerate() {
            let skip =
                skips.pop().expect("the way down leaves a skip for every resnet of the way up");
            let both = Tensor::cat(&[h, skip], 1)?;
            h = resnet.forward(&both, Some(&told.time), told.frames)?;
            if let Some(attention) = self.attentions.get(layer) {
                h = attention.forward(&h, &told.image, told.frames)?;
            }
        }
        match (&self.upsample, skips.last()) {
            // A side that was odd on the way down comes back odd.
            (Some(upsample), Some(skip)) => {
                let (height, width) = (skip.dim(2)?, skip.dim(3)?);
                in_pieces(&h, 4 * 9, |piece, _| upsample.forward(piece, height, width))
            }
            _ => Ok(h),
        }
    }
}

/// Where a resnet stands, which decides the epsilon of its norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In a level with attention, or on the way up.
    CrossedOrUp,
    /// In a level without attention on the way down, or in the middle.
    PlainDownOrMid,
}

/// diffusers hands 1e-5 to every block, but only two kinds of block pass it on.
fn eps_of(place: Place) -> Epsilons {
    let eps = if place == Place::CrossedOrUp { 1e-6 } else { 1e-5 };
    Epsilons { spatial: eps, temporal: eps }
}

fn resnet(
    weights: &Weights,
    widths: (usize, usize),
    config: &VideoUnetConfig,
    eps: Epsilons,
) -> Result<VideoResnet> {
    VideoResnet::load(weights, widths, Some(config.time_width()), eps, Blend::Spatial)
}

fn transformers(
    weights: &Weights,
    level: &VideoLevel,
    config: &VideoUnetConfig,
    count: usize,
) -> Result<Vec<VideoTransformer>> {
    (0..count)
        .map(|index| transformer(&weights.pp("attentions").pp(index), level, config))
        .collect()
}

fn transformer(
    weights: &Weights,
    level: &VideoLevel,
    config: &VideoUnetConfig,
) -> Result<VideoTransformer> {
    let VideoLevel { channels, heads, blocks, .. } = *level;
    VideoTransformer::load(
        weights,
        VideoTransformerSpec { channels, heads, blocks, cross: config.cross_attention },
    )
}
