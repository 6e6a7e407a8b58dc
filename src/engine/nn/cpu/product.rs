//! Matrix products into parts of a shared buffer, one tile a task.
//!
//! Tiles have fixed sizes: each element is summed in the same order whatever the number of threads.

use candle_core::Tensor;
use rayon::prelude::*;

use super::numbers;
use crate::engine::{Error, Result};

/// A matrix inside a slice: element (r, c) lies at `r * row_step + c * column_step`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_step: usize,
    pub(super) column_step: usize,
}

impl Matrix<'_> {
    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || (rows - 1) * self.row_step + (columns - 1) * self.column_step < self.data.len()
    }
}

/// A buffer that tasks write to at once, each its own tile.
pub(super) struct Shared {
    start: *mut f32,
    length: usize,
}

// SAFETY: it is only written through `Tile`, whose makers promise tiles that do not overlap.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Borrows `buffer` for the time that tiles are written.
    pub(super) fn new(buffer: &mut [f32]) -> Self {
        Self { start: buffer.as_mut_ptr(), length: buffer.len() }
    }

    /// The tile of `rows` x `columns` whose rows start `row_step` apart from `offset` on.
    ///
    /// # Safety
    /// No two live tiles of a buffer overlap, and the buffer outlives them.
    pub(super) unsafe fn tile(
        &self,
        offset: usize,
        rows: usize,
        columns: usize,
        row_step: usize,
    ) -> Tile {
        let inside =
            rows == 0 || columns == 0 || offset + (rows - 1) * row_step + columns <= self.length;
        assert!(inside && (rows < 2 || columns <= row_step), "tile outside its buffer");
        // SAFETY: the offset was just checked against the length.
        Tile { start: unsafe { self.start.add(offset) }, rows, columns, row_step }
    }
}

/// Rows of a shared buffer that one task owns.
pub(super) struct Tile {
    start: *mut f32,
    rows: usize,
    columns: usize,
    row_step: usize,
}

impl Tile {
    /// Row `index`.
    pub(super) fn row(&mut self, index: usize) -> &mut [f32] {
        assert!(index < self.rows);
        // SAFETY: `Shared::tile` checked that all rows lie inside, and promised that nobody else has them.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(index * self.row_step), self.columns)
        }
    }

    /// Adds `factor * left right` to what is there; `inner` is the length of the sums.
    pub(super) fn add_product(
        &mut self,
        left: Matrix<'_>,
        right: Matrix<'_>,
        inner: usize,
        factor: f32,
    ) {
        self.product(left, right, inner, factor, true);
    }

    /// Writes `factor * left right`.
    pub(super) fn set_product(
        &mut self,
        left: Matrix<'_>,
        right: Matrix<'_>,
        inner: usize,
        factor: f32,
    ) {
        self.product(left, right, inner, factor, false);
    }

    fn product(
        &mut self,
        left: Matrix<'_>,
        right: Matrix<'_>,
        inner: usize,
        factor: f32,
        keep: bool,
    ) {
        let step = |step: usize| isize::try_from(step).expect("steps are within a buffer");
        assert!(
            left.holds(self.rows, inner) && right.holds(inner, self.columns),
            "matrix outside its slice"
        );
        // SAFETY: both matrices were just checked to lie in their slices; the tile was checked when it was made.
        unsafe {
            gemm::gemm(
                self.rows,
                self.columns,
                inner,
                self.start,
                1,
                step(self.row_step),
                keep,
                left.data.as_ptr(),
                step(left.column_step),
                step(left.row_step),
                right.data.as_ptr(),
                step(right.column_step),
                step(right.row_step),
                1.0,
                factor,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

/// `x W^T + b`: x (rows, input), weight (output, input).
pub(in crate::engine::nn) fn linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let ((rows, input), (output, wanted)) = (x.dims2()?, weight.dims2()?);
    if input != wanted {
        return Err(Error::Internal(format!("linear layer of {wanted} inputs got {input}")));
    }
    let mut out = vec![0.0; rows * output];
    {
        let weight = weight.contiguous()?;
        let (data, weight) = (numbers(x)?, numbers(&weight)?);
        let (data, weight): (&[f32], &[f32]) = (&data, &weight);
        let bias = bias.map(numbers).transpose()?;
        let bias = bias.as_deref();
        // Large tiles read each operand less often, small ones keep all cores busy.
        let (high, wide) = if rows * output >= 1 << 20 { (256, 512) } else { (64, 128) };
        let (down, across) = (rows.div_ceil(high), output.div_ceil(wide));
        let shared = Shared::new(&mut out);
        (0..down * across).into_par_iter().for_each(|task| {
            let (row, column) = ((task / across) * high, (task % across) * wide);
            let (height, width) = (high.min(rows - row), wide.min(output - column));
            // SAFETY: each task has its own rectangle of `out`, which outlives the loop.
            let mut tile = unsafe { shared.tile(row * output + column, height, width, output) };
            let left = Matrix { data: &data[row * input..], row_step: input, column_step: 1 };
            let right = Matrix { data: &weight[column * input..], row_step: 1, column_step: input };
            if let Some(bias) = bias {
                for index in 0..height {
                    tile.row(index).copy_from_slice(&bias[column..column + width]);
                }
                tile.add_product(left, right, input, 1.0);
            } else {
                tile.set_product(left, right, input, 1.0);
            }
        });
    }
    Ok(Tensor::from_vec(out, (rows, output), x.device())?)
}
