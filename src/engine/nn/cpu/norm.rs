//! Group normalisation in two passes over data that stays in cache, with SiLU in the second.

use candle_core::Tensor;
use rayon::prelude::*;

use super::math::{self, vectorised};
use super::numbers;
use crate::engine::{Error, Result};

/// What follows the normalisation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::engine::nn) enum Then {
    /// Nothing.
    Nothing,
    /// SiLU.
    Silu,
}

/// A group norm with what follows it.
pub(in crate::engine::nn) struct Spec<'a> {
    pub(in crate::engine::nn) weight: &'a Tensor,
    pub(in crate::engine::nn) bias: &'a Tensor,
    pub(in crate::engine::nn) groups: usize,
    pub(in crate::engine::nn) eps: f64,
    pub(in crate::engine::nn) then: Then,
}

/// Normalises (b, c, ..) over groups of channels.
pub(in crate::engine::nn) fn group_norm(x: &Tensor, spec: &Spec<'_>) -> Result<Tensor> {
    let (batch, channels) = (x.dim(0)?, x.dim(1)?);
    if channels != spec.weight.elem_count() || !channels.is_multiple_of(spec.groups) {
        return Err(Error::Internal(format!(
            "group norm of {} channels got {channels}",
            spec.weight.elem_count()
        )));
    }
    let mut out = vec![0.0; x.elem_count()];
    let (per_group, spatial) = (channels / spec.groups, x.elem_count() / (batch * channels).max(1));
    let length = per_group * spatial;
    if length > 0 {
        let (data, weight, bias) = (numbers(x)?, numbers(spec.weight)?, numbers(spec.bias)?);
        let (weight, bias): (&[f32], &[f32]) = (&weight, &bias);
        out.par_chunks_mut(length).zip(data.par_chunks(length)).enumerate().for_each(
            |(index, (out, data))| {
                let (mean, scale) = statistics(data, spec.eps);
                let first = (index % spec.groups) * per_group;
                let rows = out.chunks_mut(spatial).zip(data.chunks(spatial));
                for (channel, (out, data)) in rows.enumerate() {
                    let factor = scale * weight[first + channel];
                    let shift = bias[first + channel] - mean * factor;
                    match spec.then {
                        Then::Nothing => affine(out, data, factor, shift),
                        Then::Silu => affine_silu(out, data, factor, shift),
                    }
                }
            },
        );
    }
    Ok(Tensor::from_vec(out, x.shape(), x.device())?)
}

/// Mean and 1 / standard deviation.
#[expect(clippy::cast_possible_truncation, reason = "the result is wanted in f32")]
fn statistics(data: &[f32], eps: f64) -> (f32, f32) {
    /// Short enough that f32 sums keep their digits.
    const RUN: usize = 4096;
    let count = data.len() as f64;
    let mean = data.chunks(RUN).map(|run| f64::from(sum(run))).sum::<f64>() / count;
    let mean = mean as f32;
    let variance = data.chunks(RUN).map(|run| f64::from(squares(run, mean))).sum::<f64>() / count;
    (mean, (1.0 / (variance + eps).sqrt()) as f32)
}

vectorised! {
    /// Sum of a short run, in eight lanes.
    fn sum(data: &[f32]) -> f32 {
        let mut lanes = [0.0; 8];
        let (chunks, rest) = data.as_chunks::<8>();
        for chunk in chunks {
            for lane in 0..8 {
                lanes[lane] += chunk[lane];
            }
        }
        lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
    }
}

vectorised! {
    /// Sum of squared distances from the mean over a short run, in eight lanes.
    fn squares(data: &[f32], mean: f32) -> f32 {
        let mut lanes = [0.0; 8];
        let (chunks, rest) = data.as_chunks::<8>();
        for chunk in chunks {
            for lane in 0..8 {
                let distance = chunk[lane] - mean;
                lanes[lane] += distance * distance;
            }
        }
        lanes.iter().sum::<f32>() + rest.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>()
    }
}

vectorised! {
    /// `x * factor + shift`.
    fn affine(out: &mut [f32], data: &[f32], factor: f32, shift: f32) {
        for (out, x) in out.iter_mut().zip(data) {
            *out = x * factor + shift;
        }
    }
}

vectorised! {
    /// SiLU of `x * factor + shift`.
    fn affine_silu(out: &mut [f32], data: &[f32], factor: f32, shift: f32) {
        for (out, x) in out.iter_mut().zip(data) {
            *out = math::silu(x * factor + shift);
        }
    }
}
