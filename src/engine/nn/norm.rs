//! Normalisations. Statistics are taken in f32 whatever the number type.

use candle_core::{DType, Module, Tensor};

use super::activation::silu;
use super::cpu;
use crate::engine::Result;
use crate::engine::device::cuda;
use crate::engine::weights::Weights;

/// Normalises groups of channels of (b, c, ..), over all axes after the second.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// `weight` and `bias` of `channels`, which `groups` divides.
    pub fn load(weights: &Weights, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        let weight = weights.get("weight", &[channels])?.contiguous()?;
        Ok(Self { weight, bias: weights.get("bias", &[channels])?.contiguous()?, groups, eps })
    }

    /// (b, c, ..), any number of axes.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = self.in_one_pass(x, cpu::norm::Then::Nothing)? {
            return Ok(y);
        }
        let channels = self.weight.elem_count();
        let norm = candle_nn::GroupNorm::new(
            self.weight.clone(),
            self.bias.clone(),
            channels,
            self.groups,
            self.eps,
        )?;
        Ok(norm.forward(x)?)
    }

    /// The same with SiLU behind it.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = self.in_one_pass(x, cpu::norm::Then::Silu)? {
            return Ok(y);
        }
        silu(&self.forward(x)?)
    }

    /// With what follows, where there is such an operation: in f32, rounded once.
    fn in_one_pass(&self, x: &Tensor, then: cpu::norm::Then) -> Result<Option<Tensor>> {
        if !cpu::takes(x) && !cpu::widens(x) {
            let silu = then == cpu::norm::Then::Silu;
            return cuda::group_norm(x, (&self.weight, &self.bias), self.groups, self.eps, silu);
        }
        let wide = |x: &Tensor| x.to_dtype(DType::F32)?.contiguous();
        let (weight, bias) = (wide(&self.weight)?, wide(&self.bias)?);
        let (weight, bias) = (&weight, &bias);
        let spec = cpu::norm::Spec { weight, bias, groups: self.groups, eps: self.eps, then };
        Ok(Some(cpu::norm::group_norm(&wide(x)?, &spec)?.to_dtype(x.dtype())?))
    }
}

/// Normalises the last axis.
#[derive(Clone, Debug)]
pub struct LayerNorm(candle_nn::LayerNorm);

impl LayerNorm {
    /// `weight` and `bias` of `width`.
    pub fn load(weights: &Weights, width: usize, eps: f64) -> Result<Self> {
        let weight = weights.get("weight", &[width])?.contiguous()?;
        Ok(Self(candle_nn::LayerNorm::new(
            weight,
            weights.get("bias", &[width])?.contiguous()?,
            eps,
        )))
    }

    /// (.., width).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.0.forward(&x.contiguous()?)?)
    }
}
