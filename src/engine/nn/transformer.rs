//! One transformer block of a UNet: self-attention, attention to the context, gated MLP.

use candle_core::Tensor;

use super::attention::{Attention, AttentionSpec};
use super::feed_forward::FeedForward;
use super::norm::LayerNorm;
use crate::engine::Result;
use crate::engine::weights::Weights;

/// Epsilon of the layer norms.
const EPS: f64 = 1e-5;

/// Widths of a transformer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransformerSpec {
    /// Width of the hidden states.
    pub width: usize,
    /// Width of the context.
    pub context: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_width: usize,
    /// Whether the first attention looks at the context too.
    pub only_cross_attention: bool,
}

/// `norm1`, `attn1`, `norm2`, `attn2`, `norm3`, `ff`.
#[derive(Clone, Debug)]
pub struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
    only_cross_attention: bool,
}

impl TransformerBlock {
    /// Loads the block.
    pub fn load(weights: &Weights, spec: TransformerSpec) -> Result<Self> {
        let TransformerSpec { width, context, heads, head_width, only_cross_attention } = spec;
        let attention = |name: &str, context| {
            Attention::load(&weights.pp(name), AttentionSpec { width, context, heads, head_width })
        };
        Ok(Self {
            norm1: LayerNorm::load(&weights.pp("norm1"), width, EPS)?,
            attn1: attention("attn1", if only_cross_attention { context } else { width })?,
            norm2: LayerNorm::load(&weights.pp("norm2"), width, EPS)?,
            attn2: attention("attn2", context)?,
            norm3: LayerNorm::load(&weights.pp("norm3"), width, EPS)?,
            ff: FeedForward::load(&weights.pp("ff"), width, width)?,
            only_cross_attention,
        })
    }

    /// The same block with attention scores in f32.
    pub fn upcast(self) -> Self {
        Self { attn1: self.attn1.upcast(), attn2: self.attn2.upcast(), ..self }
    }

    /// x (b, n, width), context (b, m, context width) to (b, n, width).
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let looked = if self.only_cross_attention {
            self.attn1.forward_context(&normed, context)?
        } else {
            self.attn1.forward(&normed)?
        };
        let x = (x + looked)?;
        let x = (&x + self.attn2.forward_context(&self.norm2.forward(&x)?, context)?)?;
        Ok((&x + self.ff.forward(&self.norm3.forward(&x)?)?)?)
    }
}
