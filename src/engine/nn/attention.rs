//! Multi-head attention that never holds the full score matrix.
//!
//! On the CPU blocks of queries run in parallel with their scores in cache, on a GPU with their scores in registers if
//! it has the instructions for that number type; elsewhere queries go in chunks.

use candle_core::{D, DType, Tensor};

use super::activation::swap_middle;
use super::cpu;
use super::linear::Linear;
use crate::engine::Result;
use crate::engine::device::cuda;
use crate::engine::weights::Weights;

/// Most scores that are held at once off the CPU: 32 MiB in f16, which stays in the cache of a large GPU.
const MAX_SCORES: usize = 16 << 20;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All.
    Open,
    /// Those up to its own position.
    Causal,
}

/// `softmax(q k^T / sqrt(d)) v` for each head: q (b, n, heads*d), k and v (b, m, heads*d) to (b, n, heads*d).
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    attend_by(q, k, v, heads, (mask, q.dtype()))
}

/// The same with scores in a number type of their own.
fn attend_by(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    (mask, scores): (Mask, DType),
) -> Result<Tensor> {
    if cpu::takes(q) {
        return cpu::attention::attend(
            &q.contiguous()?,
            &k.contiguous()?,
            &v.contiguous()?,
            heads,
            mask,
        );
    }
    if cpu::widens(q) {
        let wide = |x: &Tensor| x.to_dtype(DType::F32);
        let y = attend_by(&wide(q)?, &wide(k)?, &wide(v)?, heads, (mask, DType::F32))?;
        return Ok(y.to_dtype(q.dtype())?);
    }
    if mask == Mask::Open
        && let Some(y) = cuda::attend(q, k, v, heads)?
    {
        return Ok(y);
    }
    let (batch, queries, width) = q.dims3()?;
    let keys = k.dim(1)?;
    let head = width / heads;
    let split = |x: &Tensor, length: usize| -> Result<Tensor> {
        let by_head = swap_middle(&x.reshape((batch, length, heads, head))?)?; // (b, heads, n, d)
        Ok(by_head.reshape((batch * heads, length, head))?)
    };
    // Scaled first: half precision then overflows later.
    let q = (split(q, queries)? * (1.0 / (head as f64).sqrt()))?.to_dtype(scores)?;
    let (k, v) = (split(k, keys)?.to_dtype(scores)?.transpose(1, 2)?, split(v, keys)?);
    // Several heads at a time, or a part of one.
    let together = (MAX_SCORES / (queries * keys).max(1)).clamp(1, batch * heads);
    let rows = (MAX_SCORES / keys.max(1)).clamp(1, queries);
    let mut parts = Vec::new();
    for first in (0..batch * heads).step_by(together) {
        let of = |x: &Tensor| x.narrow(0, first, together.min(batch * heads - first));
        let (q, k, v) = (of(&q)?, of(&k)?, of(&v)?);
        let mut chunks = Vec::new();
        for start in (0..queries).step_by(rows) {
            let length = rows.min(queries - start);
            let scores = q.narrow(1, start, length)?.contiguous()?.matmul(&k)?; // (heads, rows, m)
            let scores = match mask {
                Mask::Open => scores,
                Mask::Causal => scores.broadcast_add(&causal(start, length, keys, &scores)?)?,
            };
            chunks.push(softmax(&scores, v.dtype())?.matmul(&v)?);
        }
        parts.push(Tensor::cat(&chunks, 1)?);
    }
    let y = Tensor::cat(&parts, 0)?.reshape((batch, heads, queries, head))?;
    Ok(swap_middle(&y)?.reshape((batch, queries, width))?)
}

/// Softmax of each row, in f32 alone: f16 sums of long rows lose digits.
fn softmax(scores: &Tensor, dtype: DType) -> Result<Tensor> {
    match cuda::softmax(scores, dtype)? {
        Some(weights) => Ok(weights),
        None => {
            Ok(candle_nn::ops::softmax_last_dim(&scores.to_dtype(DType::F32)?)?.to_dtype(dtype)?)
        }
    }
}

/// 0 where a query may look, a large negative number where not: (rows, keys).
fn causal(start: usize, rows: usize, keys: usize, like: &Tensor) -> Result<Tensor> {
    let mask: Vec<f32> = (start..start + rows)
        .flat_map(|query| (0..keys).map(move |key| if key <= query { 0.0 } else { -1e4 }))
        .collect();
    Ok(Tensor::from_vec(mask, (rows, keys), like.device())?.to_dtype(like.dtype())?)
}

/// Widths of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionSpec {
    /// Width of the hidden states.
    pub width: usize,
    /// Width of what is looked at.
    pub context: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_width: usize,
}

/// Attention as diffusers names it: `to_q`, `to_k`, `to_v`, `to_out.0`.
#[derive(Clone, Debug)]
pub struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
    upcast: bool,
}

impl Attention {
    /// Projections without bias, except the last.
    pub fn load(weights: &Weights, spec: AttentionSpec) -> Result<Self> {
        let inner = spec.heads * spec.head_width;
        Ok(Self {
            to_q: Linear::load_without_bias(&weights.pp("to_q"), spec.width, inner)?,
            to_k: Linear::load_without_bias(&weights.pp("to_k"), spec.context, inner)?,
            to_v: Linear::load_without_bias(&weights.pp("to_v"), spec.context, inner)?,
            to_out: Linear::load(&weights.pp("to_out.0"), inner, spec.width)?,
            heads: spec.heads,
            upcast: false,
        })
    }

    /// One head over `width`, every projection with bias, as autoencoders have it; older files call the
    /// projections `query`, `key`, `value` and `proj_attn`.
    pub fn load_single_head(weights: &Weights, width: usize) -> Result<Self> {
        let old = weights.has("query.weight");
        let names = if old {
            ["query", "key", "value", "proj_attn"]
        } else {
            ["to_q", "to_k", "to_v", "to_out.0"]
        };
        let [to_q, to_k, to_v, to_out] =
            names.map(|name| Linear::load(&weights.pp(name), width, width));
        Ok(Self { to_q: to_q?, to_k: to_k?, to_v: to_v?, to_out: to_out?, heads: 1, upcast: false })
    }

    /// The same layer with scores in f32.
    pub fn upcast(self) -> Self {
        Self { upcast: true, ..self }
    }

    /// Looks at itself: (b, n, width).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_context(x, x)
    }

    /// Looks at `context` (b, m, context width): (b, n, width).
    pub fn forward_context(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let v = self.to_v.forward(context)?;
        if context.dim(1)? == 1 {
            // The softmax over one key is 1: every query gets the same value.
            let y = self.to_out.forward(&v)?; // (b, 1, width)
            let shape = (y.dim(0)?, x.dim(1)?, y.dim(D::Minus1)?);
            return Ok(y.broadcast_as(shape)?);
        }
        let (q, k) = (self.to_q.forward(x)?, self.to_k.forward(context)?);
        let scores = if self.upcast { DType::F32 } else { q.dtype() };
        let y = attend_by(&q, &k, &v, self.heads, (Mask::Open, scores))?;
        self.to_out.forward(&y)
    }
}
