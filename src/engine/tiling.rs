//! Decoding in tiles: overlapping squares of latents are decoded one by one and blended along their seams.
//!
//! Sizes, overlap and the order of blending are those of diffusers' `enable_tiling`, so that pictures compare. The
//! memory of a decode is then that of one tile, whatever the size of the picture.

use candle_core::{DType, Tensor};

use super::Result;

/// How latents are cut into tiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tiling {
    /// Latent cells along one side of a tile.
    pub side: usize,
    /// Part of a tile that the next one covers too.
    pub overlap: f64,
}

/// Pixels along one side of a tile while memory is low.
pub const LOW_SIDE: u32 = 512;

impl Tiling {
    /// The rule of diffusers: tiles as large as the pictures of `sample_size` that the autoencoder was trained on;
    /// `factor` pixels lie along one side of a latent cell.
    pub fn of(sample_size: usize, factor: usize) -> Self {
        Self { side: (sample_size / factor).max(1), overlap: 0.25 }
    }

    /// What a request asks for: tiles of at most `pixels` along a side, the rule of diffusers where it allows more.
    pub(super) fn asked(pixels: Option<u32>, sample_size: usize, factor: usize) -> Option<Self> {
        Some(Self::of(sample_size.min(pixels? as usize), factor))
    }

    /// Cells from one tile to the next.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part of a small positive number"
    )]
    fn stride(self) -> usize {
        ((self.side as f64 * (1.0 - self.overlap)) as usize).max(1)
    }
}

/// Latents (b, c, h, w) to pixels (b, 3, fh, fw) in f32, `decode` giving `factor` pixels for each side of a cell.
///
/// Latents that fit into one tile are decoded as they are.
pub fn decode(
    z: &Tensor,
    tiling: Tiling,
    factor: usize,
    decode: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, _, height, width) = z.dims4()?;
    let (side, stride) = (tiling.side, tiling.stride());
    if height <= side && width <= side {
        return Ok(decode(z)?.to_dtype(DType::F32)?);
    }
    let (blended, kept) = ((side - stride.min(side)) * factor, stride * factor);
    let mut above: Vec<Tensor> = Vec::new();
    let mut rows = Vec::new();
    for top in (0..height).step_by(stride) {
        let cut = z.narrow(2, top, side.min(height - top))?;
        let mut row: Vec<Tensor> = Vec::new();
        for (column, left) in (0..width).step_by(stride).enumerate() {
            let tile = cut.narrow(3, left, side.min(width - left))?.contiguous()?;
            let mut pixels = decode(&tile)?.to_dtype(DType::F32)?; // (b, 3, fh', fw')
            // Its neighbours are blended already, and are taken so.
            if let Some(above) = above.get(column) {
                pixels = blend(above, &pixels, 2, blended)?;
            }
            if let Some(before) = row.last() {
                pixels = blend(before, &pixels, 3, blended)?;
            }
            row.push(pixels);
        }
        let crop = |x: &Tensor| -> Result<Tensor> {
            let x = x.narrow(2, 0, kept.min(x.dim(2)?))?;
            Ok(x.narrow(3, 0, kept.min(x.dim(3)?))?)
        };
        rows.push(Tensor::cat(&row.iter().map(crop).collect::<Result<Vec<_>>>()?, 3)?);
        above = row;
    }
    Ok(Tensor::cat(&rows, 2)?)
}

/// `x` with its first `extent` lines along `axis` faded in over the last ones of `before`.
#[expect(clippy::cast_possible_truncation, reason = "a share from 0 to 1")]
fn blend(before: &Tensor, x: &Tensor, axis: usize, extent: usize) -> Result<Tensor> {
    let (old, length) = (before.dim(axis)?, x.dim(axis)?);
    let extent = extent.min(old).min(length);
    if extent == 0 {
        return Ok(x.clone());
    }
    let mut shape = [1; 4];
    shape[axis] = extent;
    let ramp = |share: &dyn Fn(f64) -> f64| {
        let shares: Vec<f32> =
            (0..extent).map(|line| share(line as f64 / extent as f64) as f32).collect();
        Tensor::from_vec(shares, &shape, x.device())
    };
    let out = before.narrow(axis, old - extent, extent)?.broadcast_mul(&ramp(&|new| 1.0 - new)?)?;
    let mixed = (out + x.narrow(axis, 0, extent)?.broadcast_mul(&ramp(&|new| new)?)?)?;
    if extent == length {
        return Ok(mixed);
    }
    Ok(Tensor::cat(&[mixed, x.narrow(axis, extent, length - extent)?], axis)?)
}
