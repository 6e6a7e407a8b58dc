//! The residual block that UNets and autoencoders are made of.

use candle_core::Tensor;

use super::activation::{shift_channels, silu};
use super::conv::{Conv2d, Conv2dSpec};
use super::linear::Linear;
use super::norm::GroupNorm;
use crate::engine::Result;
use crate::engine::weights::Weights;

/// Widths of a residual block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ResnetSpec {
    /// Channels in.
    pub input: usize,
    /// Channels out.
    pub output: usize,
    /// Width of the time embedding, where the block takes one.
    pub time: Option<usize>,
    /// Groups of both norms.
    pub groups: usize,
    /// Epsilon of both norms.
    pub eps: f64,
}

/// `norm1`, `conv1`, `time_emb_proj`, `norm2`, `conv2`, `conv_shortcut`.
#[derive(Clone, Debug)]
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    /// Loads the block; there is a shortcut where the width changes.
    pub fn load(weights: &Weights, spec: ResnetSpec) -> Result<Self> {
        let ResnetSpec { input, output, time, groups, eps } = spec;
        let project = |width| Linear::load(&weights.pp("time_emb_proj"), width, output);
        let shortcut = (input != output)
            .then(|| Conv2d::load(&weights.pp("conv_shortcut"), Conv2dSpec::point(input, output)))
            .transpose()?;
        Ok(Self {
            norm1: GroupNorm::load(&weights.pp("norm1"), groups, input, eps)?,
            conv1: Conv2d::load(&weights.pp("conv1"), Conv2dSpec::same(input, output))?,
            time_emb_proj: time.map(project).transpose()?,
            norm2: GroupNorm::load(&weights.pp("norm2"), groups, output, eps)?,
            conv2: Conv2d::load(&weights.pp("conv2"), Conv2dSpec::same(output, output))?,
            conv_shortcut: shortcut,
        })
    }

    /// x (b, input, h, w), time (b, width) to (b, output, h, w).
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let mut hidden = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        if let (Some(project), Some(time)) = (&self.time_emb_proj, time) {
            let shift = project.forward(&silu(time)?)?; // (b, output)
            hidden = shift_channels(&hidden, &shift)?;
        }
        let hidden = self.conv2.forward(&self.norm2.forward_silu(&hidden)?)?;
        match &self.conv_shortcut {
            Some(shortcut) => Ok((shortcut.forward(x)? + hidden)?),
            None => Ok((x + hidden)?),
        }
    }
}
