//! Attention by blocks of queries: scores stay in cache and are never all in memory.

use candle_core::Tensor;
use rayon::prelude::*;

use super::math::{self, vectorised};
use super::product::{Matrix, Shared, Tile};
use super::{numbers, with_scratch};
use crate::engine::nn::attention::Mask;
use crate::engine::{Error, Result};

/// Scores of one block: one MiB.
const SCORES: usize = 1 << 18;

/// Most queries of a block.
const MAX_BLOCK: usize = 64;

/// q (b, n, heads*d), k and v (b, m, heads*d) to (b, n, heads*d), read in place without splitting heads.
pub(in crate::engine::nn) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Mask,
) -> Result<Tensor> {
    let ((batch, queries, width), (_, keys, _)) = (q.dims3()?, k.dims3()?);
    let head = width / heads;
    if k.dims() != v.dims()
        || k.dims() != [batch, keys, width]
        || head * heads != width
        || keys == 0
    {
        return Err(Error::Internal(format!(
            "attention of {:?} over {:?} and {:?}",
            q.dims(),
            k.dims(),
            v.dims()
        )));
    }
    let mut out = vec![0.0; batch * queries * width];
    {
        let (q, k, v) = (numbers(q)?, numbers(k)?, numbers(v)?);
        let (q, k, v): (&[f32], &[f32], &[f32]) = (&q, &k, &v);
        let block = (SCORES / keys).clamp(16, MAX_BLOCK);
        let blocks = queries.div_ceil(block);
        let factor = 1.0 / (head as f32).sqrt();
        let shared = Shared::new(&mut out);
        (0..batch * heads * blocks).into_par_iter().for_each(|task| {
            let (start, rest) = ((task % blocks) * block, task / blocks);
            let (column, row) = ((rest % heads) * head, rest / heads);
            let rows = block.min(queries - start);
            let seen = if mask == Mask::Causal { (start + rows).min(keys) } else { keys };
            let first = (row * queries + start) * width + column;
            let others = row * keys * width + column;
            let part = Part {
                own: Matrix { data: &q[first..], row_step: width, column_step: 1 },
                turned: Matrix { data: &k[others..], row_step: 1, column_step: width },
                values: Matrix { data: &v[others..], row_step: width, column_step: 1 },
                seen: |index: usize| {
                    if mask == Mask::Causal { (start + index + 1).min(seen) } else { seen }
                },
                factor,
                head,
            };
            // SAFETY: each task has its own rows of its own head in `out`, which outlives the loop.
            let mut tile = unsafe { shared.tile(first, rows, head, width) };
            with_scratch(rows * seen, |scores| part.write(scores, rows, &mut tile));
        });
    }
    Ok(Tensor::from_vec(out, (batch, queries, width), q.device())?)
}

/// One block of queries of one head; `seen` says how many keys a row looks at.
struct Part<'a, S> {
    own: Matrix<'a>,
    turned: Matrix<'a>,
    values: Matrix<'a>,
    seen: S,
    factor: f32,
    head: usize,
}

impl<S: Fn(usize) -> usize> Part<'_, S> {
    fn write(&self, scores: &mut [f32], rows: usize, tile: &mut Tile) {
        let keys = scores.len() / rows;
        {
            let shared = Shared::new(scores);
            // SAFETY: `scores` is borrowed by this block alone, and by one tile.
            let mut weights = unsafe { shared.tile(0, rows, keys, keys) };
            weights.set_product(self.own, self.turned, self.head, self.factor);
        }
        let mut sums = [0.0; MAX_BLOCK];
        for (index, row) in scores.chunks_exact_mut(keys).enumerate() {
            let (open, hidden) = row.split_at_mut((self.seen)(index));
            hidden.fill(0.0);
            sums[index] = exponentials(open);
        }
        tile.set_product(
            Matrix { data: scores, row_step: keys, column_step: 1 },
            self.values,
            keys,
            1.0,
        );
        for (index, sum) in sums.iter().enumerate().take(rows) {
            let scale = 1.0 / sum;
            tile.row(index).iter_mut().for_each(|value| *value *= scale);
        }
    }
}

vectorised! {
    /// Replaces scores by `exp(score - largest)` and returns the sum, taken in eight lanes.
    fn exponentials(row: &mut [f32]) -> f32 {
        let mut largest = f32::NEG_INFINITY;
        let mut lanes = [f32::NEG_INFINITY; 8];
        let (chunks, rest) = row.as_chunks::<8>();
        for chunk in chunks {
            for lane in 0..8 {
                lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
            }
        }
        for x in lanes.iter().chain(rest) {
            largest = if *x > largest { *x } else { largest };
        }
        let mut lanes = [0.0; 8];
        let (chunks, rest) = row.as_chunks_mut::<8>();
        for chunk in chunks {
            for lane in 0..8 {
                chunk[lane] = math::exp(chunk[lane] - largest);
                lanes[lane] += chunk[lane];
            }
        }
        let mut sum = lanes.iter().sum::<f32>();
        for x in rest {
            *x = math::exp(*x - largest);
            sum += *x;
        }
        sum
    }
}
