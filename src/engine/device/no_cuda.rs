//! `cuda.rs` for builds without a GPU: there is no device, and no layer is taken.

use candle_core::{DType, Device, Tensor};

use super::Result;

pub(super) fn open(_: usize) -> Result<Device> {
    Err(super::not_built("cuda"))
}

pub(super) fn free_memory(_: &Device) -> Option<u64> {
    None
}

pub(super) fn model(_: &Device) -> Option<String> {
    None
}

pub(super) fn trim(_: &Device) {}

/// Normalises (b, c, ..) over groups of channels.
pub(in crate::engine) fn group_norm(
    _: &Tensor,
    _: (&Tensor, &Tensor),
    _: usize,
    _: f64,
    _: bool,
) -> Result<Option<Tensor>> {
    Ok(None)
}

/// `a * gelu(b)` of the halves of the last axis.
pub(in crate::engine) fn geglu(_: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

/// Softmax over the last axis.
pub(in crate::engine) fn softmax(_: &Tensor, _: DType) -> Result<Option<Tensor>> {
    Ok(None)
}

/// Attention of several heads, for half precision.
pub(in crate::engine) fn attend(
    _: &Tensor,
    _: &Tensor,
    _: &Tensor,
    _: usize,
) -> Result<Option<Tensor>> {
    Ok(None)
}

/// (b, m, n) to (b, n, m).
pub(in crate::engine) fn swap(_: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

/// (b, m, n, d) to (b, n, m, d).
pub(in crate::engine) fn swap_middle(_: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

/// A tensor plus the rows of another in turn.
pub(in crate::engine) fn add_repeated(
    _: &Tensor,
    _: &Tensor,
    _: (usize, usize),
) -> Result<Option<Tensor>> {
    Ok(None)
}
