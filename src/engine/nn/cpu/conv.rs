//! Convolution as matrix products over tiles of output pixels.
//!
//! A tile's input patches are laid out as columns by row copies straight from (c, h, w); the product is added onto
//! the bias in place. A 1x1 convolution needs no columns at all.

use candle_core::Tensor;
use rayon::prelude::*;

use super::product::{Matrix, Shared};
use super::{numbers, with_scratch};
use crate::engine::nn::conv::Conv2dSpec;
use crate::engine::{Error, Result};

/// Values of a tile's columns: one MiB.
const COLUMNS: usize = 1 << 18;
/// Bounds of a tile in output pixels.
const TILE: std::ops::RangeInclusive<usize> = 128..=1024;
/// With fewer tiles than this the output channels are cut as well, so that many cores have work.
const FEW_TILES: usize = 16;
/// Output channels of a task then.
const CHANNEL_BLOCK: usize = 256;

/// x (b, c, h, w), weight (o, c, kh, kw), bias (o) to (b, o, h', w').
pub(in crate::engine::nn) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    spec: &Conv2dSpec,
) -> Result<Tensor> {
    let geometry = Geometry::of(x, weight, spec)?;
    let Geometry { batch, channels, size, kernel, out_size, .. } = geometry;
    let (pixels, inner) = (out_size.0 * out_size.1, channels * kernel.0 * kernel.1);
    let outputs = spec.output;
    let mut out = vec![0.0; batch * outputs * pixels];
    {
        let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
        let (data, weight, bias) = (numbers(x)?, numbers(&weight)?, numbers(&bias)?);
        let (data, weight, bias): (&[f32], &[f32], &[f32]) = (&data, &weight, &bias);
        let tile = (COLUMNS / inner / 16 * 16).clamp(*TILE.start(), *TILE.end()).min(pixels);
        let tiles = pixels.div_ceil(tile);
        let block = if batch * tiles < FEW_TILES { CHANNEL_BLOCK.min(outputs) } else { outputs };
        let blocks = outputs.div_ceil(block);
        let shared = Shared::new(&mut out);
        (0..batch * tiles * blocks).into_par_iter().for_each(|task| {
            let (first, rest) = ((task % blocks) * block, task / blocks);
            let (pixel, row) = ((rest % tiles) * tile, rest / tiles);
            let (height, width) = (block.min(outputs - first), tile.min(pixels - pixel));
            // SAFETY: each task has its own pixels of its own channels in `out`, which outlives the loop.
            let mut target = unsafe {
                shared.tile((row * outputs + first) * pixels + pixel, height, width, pixels)
            };
            for index in 0..height {
                target.row(index).fill(bias[first + index]);
            }
            let image = &data[row * channels * size.0 * size.1..][..channels * size.0 * size.1];
            let left = Matrix { data: &weight[first * inner..], row_step: inner, column_step: 1 };
            if geometry.is_point() {
                let right = Matrix { data: &image[pixel..], row_step: pixels, column_step: 1 };
                return target.add_product(left, right, inner, 1.0);
            }
            with_scratch(inner * width, |columns| {
                geometry.columns(image, pixel, width, columns);
                let right = Matrix { data: columns, row_step: width, column_step: 1 };
                target.add_product(left, right, inner, 1.0);
            });
        });
    }
    Ok(Tensor::from_vec(out, (batch, outputs, out_size.0, out_size.1), x.device())?)
}

#[derive(Clone, Copy)]
struct Geometry {
    batch: usize,
    channels: usize,
    size: (usize, usize),
    kernel: (usize, usize),
    stride: usize,
    padding: (usize, usize),
    out_size: (usize, usize),
}

impl Geometry {
    fn of(x: &Tensor, weight: &Tensor, spec: &Conv2dSpec) -> Result<Self> {
        let (batch, channels, height, width) = x.dims4()?;
        let (kernel, padding, stride) = (spec.kernel, spec.padding, spec.stride);
        let fits =
            height + 2 * padding.0 >= kernel.0 && width + 2 * padding.1 >= kernel.1 && batch > 0;
        if channels != spec.input
            || weight.dims() != [spec.output, channels, kernel.0, kernel.1]
            || !fits
        {
            return Err(Error::Internal(format!(
                "convolution {spec:?} of {:?} by {:?}",
                x.dims(),
                weight.dims()
            )));
        }
        let out =
            |size: usize, padding: usize, kernel: usize| (size + 2 * padding - kernel) / stride + 1;
        let out_size = (out(height, padding.0, kernel.0), out(width, padding.1, kernel.1));
        Ok(Self { batch, channels, size: (height, width), kernel, stride, padding, out_size })
    }

    fn is_point(&self) -> bool {
        self.kernel == (1, 1) && self.stride == 1 && self.padding == (0, 0)
    }

    /// Fills `columns` (channels * kh * kw, count) with the patches of the output pixels from `pixel` on.
    fn columns(&self, image: &[f32], pixel: usize, count: usize, columns: &mut [f32]) {
        let mut rows = columns.chunks_exact_mut(count);
        for plane in image.chunks_exact(self.size.0 * self.size.1) {
            for down in 0..self.kernel.0 {
                for across in 0..self.kernel.1 {
                    let row = rows.next().expect("one row for each channel and kernel cell");
                    self.column_row(plane, (down, across), pixel, row);
                }
            }
        }
    }

    /// What kernel cell `cell` sees of `plane` for the output pixels from `pixel` on.
    fn column_row(&self, plane: &[f32], cell: (usize, usize), pixel: usize, row: &mut [f32]) {
        let (height, width) = self.size;
        let mut filled = 0;
        while filled < row.len() {
            let (y, x) = ((pixel + filled) / self.out_size.1, (pixel + filled) % self.out_size.1);
            let length = (self.out_size.1 - x).min(row.len() - filled);
            let part = &mut row[filled..filled + length];
            filled += length;
            let source =
                (y * self.stride + cell.0).checked_sub(self.padding.0).filter(|y| *y < height);
            let Some(source) = source else {
                part.fill(0.0);
                continue;
            };
            let line = &plane[source * width..(source + 1) * width];
            let start = x * self.stride + cell.1; // in the padded line
            if self.stride == 1 {
                copy_padded(part, line, start, self.padding.1);
            } else {
                for (index, value) in part.iter_mut().enumerate() {
                    let place = (start + index * self.stride).checked_sub(self.padding.1);
                    *value = place.and_then(|place| line.get(place)).copied().unwrap_or(0.0);
                }
            }
        }
    }
}

/// Copies from position `start` of `line` with `padding` zeros before it and zeros without end behind it.
fn copy_padded(part: &mut [f32], line: &[f32], start: usize, padding: usize) {
    let before = padding.saturating_sub(start).min(part.len());
    let from = (start + before).saturating_sub(padding).min(line.len());
    let copied = (part.len() - before).min(line.len() - from);
    part[..before].fill(0.0);
    part[before..before + copied].copy_from_slice(&line[from..from + copied]);
    part[before + copied..].fill(0.0);
}
