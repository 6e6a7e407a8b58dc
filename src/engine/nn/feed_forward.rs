//! The gated MLP of a transformer block.

use candle_core::Tensor;

use super::activation::geglu;
use super::linear::Linear;
use crate::engine::Result;
use crate::engine::weights::Weights;

/// `net.0.proj` to twice the inner width, GEGLU, `net.2` back.
#[derive(Clone, Debug)]
pub struct FeedForward {
    enter: Linear,
    leave: Linear,
}

impl FeedForward {
    /// The inner width is four times `width`.
    pub fn load(weights: &Weights, width: usize, output: usize) -> Result<Self> {
        let inner = 4 * width;
        Ok(Self {
            enter: Linear::load(&weights.pp("net.0.proj"), width, 2 * inner)?,
            leave: Linear::load(&weights.pp("net.2"), inner, output)?,
        })
    }

    /// (.., width) to (.., output).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.leave.forward(&geglu(&self.enter.forward(x)?)?)
    }
}
