//! The resnet of video models: a picture resnet on every frame, then one along the frames, blended.
//!
//! Frames of a video lie side by side in the batch: (b*f, c, h, w). Only the temporal half looks across them; its
//! norm takes its statistics over all frames.

use candle_core::{DType, Tensor};

use super::activation::{shift_channels, silu, swap_middle};
use super::conv::{Conv2d, Conv2dSpec};
use super::linear::Linear;
use super::norm::GroupNorm;
use super::resnet::{ResnetBlock, ResnetSpec};
use crate::engine::Result;
use crate::engine::config::video::GROUPS;
use crate::engine::weights::Weights;

/// Most elements of a scratch tensor; larger work is done in pieces.
const SCRATCH: usize = 1 << 26;

/// Which side of a blend the learnt factor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blend {
    /// `sigmoid(factor)` is the share of the picture half (UNet).
    Spatial,
    /// `sigmoid(factor)` is the share of the temporal half (decoder).
    Temporal,
}

impl Blend {
    /// Reads `time_mixer.mix_factor` below `weights`: the share of the temporal half.
    pub fn temporal_share(self, weights: &Weights) -> Result<f64> {
        let factor = weights.with_dtype(DType::F32).get("time_mixer.mix_factor", &[1])?;
        let factor = f64::from(factor.flatten_all()?.to_vec1::<f32>()?[0]);
        let sign = if self == Self::Spatial { 1.0 } else { -1.0 };
        Ok(1.0 / (1.0 + (sign * factor).exp()))
    }
}

/// A resnet over pictures and frames.
pub struct VideoResnet {
    spatial: ResnetBlock,
    temporal: TemporalResnet,
    share: f64,
}

/// Epsilons of the two halves' norms; they differ from block to block.
#[derive(Clone, Copy, Debug)]
pub struct Epsilons {
    /// Of the picture half.
    pub spatial: f64,
    /// Of the temporal half.
    pub temporal: f64,
}

impl VideoResnet {
    /// Reads `spatial_res_block`, `temporal_res_block` and `time_mixer`; `time` is the width of the time embedding.
    pub fn load(
        weights: &Weights,
        (input, output): (usize, usize),
        time: Option<usize>,
        eps: Epsilons,
        blend: Blend,
    ) -> Result<Self> {
        let spec = ResnetSpec { input, output, time, groups: GROUPS, eps: eps.spatial };
        Ok(Self {
            spatial: ResnetBlock::load(&weights.pp("spatial_res_block"), spec)?,
            temporal: TemporalResnet::load(
                &weights.pp("temporal_res_block"),
                output,
                time,
                eps.temporal,
            )?,
            share: blend.temporal_share(weights)?,
        })
    }

    /// `x` (b*f, c, h, w) with the time embedding of each video (b, t).
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>, frames: usize) -> Result<Tensor> {
        let x = self.spatial(x, time, frames)?;
        let (_, channels, height, width) = x.dims4()?;
        let by_channel = swap_middle(&x.reshape(((), frames, channels, height * width))?)?; // (b, c, f, hw)
        let change = (self.temporal.change(&by_channel, time)? * self.share)?;
        // The temporal half starts from the picture half, so blending the two is adding a share of the change.
        Ok((&x + swap_middle(&change)?.reshape(x.shape())?)?)
    }

    /// The picture half, a few frames at a time: unfolding a convolution takes nine times its input.
    fn spatial(&self, x: &Tensor, time: Option<&Tensor>, frames: usize) -> Result<Tensor> {
        let time = time.map(|time| repeat_frames(time, frames)).transpose()?;
        in_pieces(x, 9, |piece, start| {
            let time =
                time.as_ref().map(|time| time.narrow(0, start, piece.dim(0)?)).transpose()?;
            self.spatial.forward(piece, time.as_ref())
        })
    }
}

/// Runs `work` on as many rows of `x` at a time as keep `factor` times their size within the scratch limit.
pub fn in_pieces(
    x: &Tensor,
    factor: usize,
    mut work: impl FnMut(&Tensor, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let row = x.elem_count() / rows.max(1);
    let step = (SCRATCH / (row * factor).max(1)).clamp(1, rows.max(1));
    if step == rows {
        return work(x, 0);
    }
    let mut done = Vec::new();
    for start in (0..rows).step_by(step) {
        done.push(work(&x.narrow(0, start, step.min(rows - start))?, start)?);
    }
    Ok(Tensor::cat(&done, 0)?)
}

/// Each row once per frame: (b, t) -> (b*f, t).
pub fn repeat_frames(x: &Tensor, frames: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    Ok(x.unsqueeze(1)?.broadcast_as((rows, frames, width))?.reshape((rows * frames, width))?)
}

/// The half along the frames, on (b, c, f, p) with p places of a picture.
pub struct TemporalResnet {
    norm1: GroupNorm,
    conv1: FrameConv,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: FrameConv,
}

impl TemporalResnet {
    /// Reads the block at `weights`.
    pub fn load(weights: &Weights, channels: usize, time: Option<usize>, eps: f64) -> Result<Self> {
        Ok(Self {
            norm1: GroupNorm::load(&weights.pp("norm1"), GROUPS, channels, eps)?,
            conv1: FrameConv::load(&weights.pp("conv1"), channels, channels)?,
            time_emb_proj: time
                .map(|time| Linear::load(&weights.pp("time_emb_proj"), time, channels))
                .transpose()?,
            norm2: GroupNorm::load(&weights.pp("norm2"), GROUPS, channels, eps)?,
            conv2: FrameConv::load(&weights.pp("conv2"), channels, channels)?,
        })
    }

    /// What the block adds to its input.
    fn change(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let mut h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        if let (Some(project), Some(time)) = (&self.time_emb_proj, time) {
            let shift = project.forward(&silu(time)?)?; // (b, c)
            h = shift_channels(&h, &shift)?;
        }
        self.conv2.forward(&self.norm2.forward_silu(&h)?)
    }

    /// The whole block: (b, c, f, p) and the time embedding (b, t).
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        Ok((x + self.change(x, time)?)?)
    }
}

/// A convolution over three successive frames, zeros beyond the ends: kernel (3, 1, 1).
pub struct FrameConv(Conv2d);

impl FrameConv {
    /// Reads `weight` (out, in, 3, 1, 1) and `bias` (out).
    pub fn load(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        Ok(Self(Conv2d::load(weights, Conv2dSpec::temporal(input, output))?))
    }

    /// (b, in, f, p) -> (b, out, f, p); places are independent, so many of them are done in pieces.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let places = x.dim(3)?;
        let step = (SCRATCH / (3 * x.elem_count() / places)).clamp(1, places);
        if step == places {
            return self.0.forward(x);
        }
        let piece =
            |start| self.0.forward(&x.narrow(3, start, step.min(places - start))?.contiguous()?);
        Ok(Tensor::cat(&(0..places).step_by(step).map(piece).collect::<Result<Vec<_>>>()?, 3)?)
    }
}
