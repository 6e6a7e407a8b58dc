//! A fully connected layer.

use candle_core::{DType, Tensor};

use super::activation::shift_rows;
use super::cpu;
use crate::engine::Result;
use crate::engine::weights::Weights;

/// `x W^T + b` over the last axis.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor, // (out, in)
    bias: Option<Tensor>,
}

impl Linear {
    /// From tensors in memory: `weight` (output, input).
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// `weight` (output, input) and `bias` (output).
    pub fn load(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        let bias = Some(weights.get("bias", &[output])?);
        Ok(Self { bias, ..Self::load_without_bias(weights, input, output)? })
    }

    /// `weight` (output, input) alone.
    pub fn load_without_bias(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        // Older files keep attention of a VAE as 1x1 convolutions.
        let stored: [&[usize]; 2] = [&[output, input], &[output, input, 1, 1]];
        Ok(Self { weight: weights.get_one_of("weight", &stored, &[output, input])?, bias: None })
    }

    /// (.., input) to (.., output).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (output, input) = self.weight.dims2()?;
        let mut shape = x.dims().to_vec();
        let rows = x.elem_count() / input.max(1);
        if let Some(last) = shape.last_mut() {
            *last = output;
        }
        let flat = x.reshape((rows, input))?.contiguous()?;
        let y = if cpu::takes(x) {
            cpu::product::linear(&flat, &self.weight, self.bias.as_ref())?
        } else if cpu::widens(x) {
            let wide = |x: &Tensor| x.to_dtype(DType::F32);
            let bias = self.bias.as_ref().map(wide).transpose()?;
            let y = cpu::product::linear(&wide(&flat)?, &wide(&self.weight)?, bias.as_ref())?;
            y.to_dtype(x.dtype())?
        } else {
            let y = flat.matmul(&self.weight.t()?)?;
            match &self.bias {
                Some(bias) => shift_rows(&y, bias)?,
                None => y,
            }
        };
        Ok(y.reshape(shape)?)
    }
}
