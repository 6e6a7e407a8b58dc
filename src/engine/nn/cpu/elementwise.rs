//! SiLU, gated GELU and the swap of two axes over whole tensors.

use candle_core::{D, Tensor};
use rayon::prelude::*;

use super::math::{self, vectorised};
use super::numbers;
use crate::engine::Result;

/// Elements a task takes.
const TILE: usize = 1 << 14;

/// `x * sigmoid(x)` of every element.
pub(in crate::engine::nn) fn silu(x: &Tensor) -> Result<Tensor> {
    let mut out = vec![0.0; x.elem_count()];
    {
        let data = numbers(x)?;
        out.par_chunks_mut(TILE)
            .zip(data.par_chunks(TILE))
            .for_each(|(out, data)| silu_row(out, data));
    }
    Ok(Tensor::from_vec(out, x.shape(), x.device())?)
}

/// `a * gelu(b)`, where a and b are the halves of the last axis.
pub(in crate::engine::nn) fn geglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? / 2;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    let mut out = vec![0.0; x.elem_count() / 2];
    {
        let data = numbers(x)?;
        let rows = (TILE / width.max(1)).max(1);
        out.par_chunks_mut(rows * width.max(1))
            .zip(data.par_chunks(2 * rows * width.max(1)))
            .for_each(|(out, data)| {
                for (out, data) in out.chunks_mut(width).zip(data.chunks(2 * width)) {
                    let (value, gate) = data.split_at(width);
                    geglu_row(out, value, gate);
                }
            });
    }
    Ok(Tensor::from_vec(out, shape, x.device())?)
}

/// (b, m, n) to (b, n, m).
pub(in crate::engine::nn) fn swap(x: &Tensor) -> Result<Tensor> {
    /// Output rows of a task: their part of an input row fills two cache lines.
    const ROWS: usize = 32;
    let (batch, rows, columns) = x.dims3()?;
    let mut out = vec![0.0; x.elem_count()];
    if !out.is_empty() {
        let data = numbers(x)?;
        let data: &[f32] = &data;
        let parts = out.chunks_mut(rows * columns).enumerate().flat_map(|(index, image)| {
            image
                .chunks_mut(ROWS * rows)
                .enumerate()
                .map(move |(part, out)| (index * rows * columns + part * ROWS, out))
        });
        parts.par_bridge().for_each(|(start, out)| {
            for row in 0..rows {
                let from = &data[start + row * columns..][..out.len() / rows];
                for (index, value) in from.iter().enumerate() {
                    out[index * rows + row] = *value;
                }
            }
        });
    }
    Ok(Tensor::from_vec(out, (batch, columns, rows), x.device())?)
}

vectorised! {
    /// One row of SiLU.
    fn silu_row(out: &mut [f32], data: &[f32]) {
        for (out, x) in out.iter_mut().zip(data) {
            *out = math::silu(*x);
        }
    }
}

vectorised! {
    /// One row of gated GELU.
    fn geglu_row(out: &mut [f32], value: &[f32], gate: &[f32]) {
        for ((out, value), gate) in out.iter_mut().zip(value).zip(gate) {
            *out = value * math::gelu(*gate);
        }
    }
}
