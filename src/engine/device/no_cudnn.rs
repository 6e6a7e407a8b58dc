//! `cudnn.rs` for builds without cuDNN: candle's own convolutions are taken.

use candle_core::Tensor;

use crate::engine::Result;
use crate::engine::nn::conv::Conv2dSpec;

/// The convolution of `x` (b, c, h, w) with `weight`, without bias.
pub(in crate::engine) fn conv2d(_: &Tensor, _: &Tensor, _: &Conv2dSpec) -> Result<Option<Tensor>> {
    Ok(None)
}
