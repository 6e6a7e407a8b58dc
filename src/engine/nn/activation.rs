//! Non-linearities, element by element, and the change from channels to rows.

use candle_core::Tensor;
use serde_json::json;

use super::cpu;
use crate::engine::Result;
use crate::engine::config::Json;
use crate::engine::device::cuda;

/// The non-linearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// The exact GELU, by the error function.
    Gelu,
    /// The GELU by its tanh formula.
    GeluTanh,
    /// `x * sigmoid(x)`.
    Silu,
}

impl Activation {
    /// Reads the name at `key`.
    pub fn of_config(json: &Json, key: &str, default: &str) -> Result<Self> {
        json.only(
            key,
            &["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish"]
                .map(|name| json!(name)),
        )?;
        Ok(match json.text(key)?.unwrap_or(default) {
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Self::GeluTanh,
            "silu" | "swish" => Self::Silu,
            _ => Self::QuickGelu,
        })
    }

    /// Applies it to every element.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::QuickGelu => Ok((x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?),
            Self::Gelu => Ok(x.gelu_erf()?),
            Self::GeluTanh => Ok(x.gelu()?),
            Self::Silu => silu(x),
        }
    }
}

/// `x * sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if cpu::takes(x) { cpu::elementwise::silu(&x.contiguous()?) } else { Ok(x.silu()?) }
}

/// `a * gelu(b)` of the two halves of the last axis.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    if cpu::takes(x) {
        return cpu::elementwise::geglu(&x.contiguous()?);
    }
    if let Some(y) = cuda::geglu(x)? {
        return Ok(y);
    }
    let halves = x.chunk(2, candle_core::D::Minus1)?;
    Ok((&halves[0] * halves[1].gelu_erf()?)?)
}

/// (b, m, n) to (b, n, m), contiguous: channels of cells to rows and back.
pub fn swap_axes(x: &Tensor) -> Result<Tensor> {
    if cpu::takes(x) {
        return cpu::elementwise::swap(&x.contiguous()?);
    }
    match cuda::swap(x)? {
        Some(y) => Ok(y),
        None => Ok(x.transpose(1, 2)?.contiguous()?),
    }
}

/// `x` (b, c, ..) with `shift` (b, c) added to every place of a channel.
pub fn shift_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let places = x.dims()[2..].iter().product();
    if let Some(y) = cuda::add_repeated(x, shift, (places, 1))? {
        return Ok(y);
    }
    let mut shape = shift.dims().to_vec();
    shape.resize(x.rank(), 1);
    Ok(x.broadcast_add(&shift.reshape(shape)?)?)
}

/// `x` (.., n) with `shift` (n) added to every row.
pub fn shift_rows(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let width = shift.elem_count();
    match cuda::add_repeated(x, shift, (width, width))? {
        Some(y) => Ok(y),
        None => Ok(x.broadcast_add(shift)?),
    }
}

/// (b, m, n, d) to (b, n, m, d), contiguous.
pub fn swap_middle(x: &Tensor) -> Result<Tensor> {
    match cuda::swap_middle(x)? {
        Some(y) => Ok(y),
        None => Ok(x.transpose(1, 2)?.contiguous()?),
    }
}
