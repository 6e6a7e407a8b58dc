//! How much memory a run takes, before it starts: weights from the headers of the files, the rest from the sizes.
//!
//! Each stage of a run (text, denoiser, autoencoder) holds its weights in the number type it computes in, and beside
//! them at most
//!
//! - text: a fixed `SMALL`;
//! - denoiser: `DENOISER` tensors of the outermost level, rows x cells x channels (rows are the halves of guidance, or
//!   the frames of a clip);
//! - autoencoder: `DECODER` tensors of the two outermost levels at full size, pixels x channels.
//!
//! The factors are bounds of what was measured; benches/RESULTS.md has the figures. Off the CPU, convolutions and
//! attention unfold their input, which is bounded by `UNFOLDED`.

use std::path::Path;

use candle_core::DType;

use super::config::unet::UnetConfig;
use super::config::vae::VaeConfig;
use super::config::video::{VideoUnetConfig, VideoVaeConfig};
use super::denoise::is_guided;
use super::device::Compute;
use super::pipelines::stable_diffusion::vae_dtype;
use super::pipelines::stable_video::{VideoRequest, vae_dtypes};
use super::tiling::LOW_SIDE;
use super::weights::{LoadOptions, Source, Weights};
use super::{ImageRequest, Result};

/// Beside any weights: code, tokenizers, texts, the picture itself.
const SMALL: u64 = 192 << 20;
/// Tensors of the outermost level that a denoiser holds at once.
const DENOISER: u64 = 28;
/// Tensors of the outermost levels at full size that a decoder holds at once.
const DECODER: u64 = 5;
/// Most that candle's own operations unfold at once.
const UNFOLDED: u64 = 1 << 30;

/// Bytes a run takes, by what is kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// With every part in memory at once.
    pub together: u64,
    /// With one part after the other.
    pub in_turn: u64,
    /// With one part after the other, and decoding one frame and one small tile at a time.
    pub tiled: u64,
    /// Of all weights alone.
    pub weights: u64,
}

/// One part at work.
#[derive(Clone, Copy)]
struct Stage {
    weights: u64,
    work: u64,
    tiled: u64,
}

impl Need {
    fn of(stages: &[Stage]) -> Self {
        let most = |of: &dyn Fn(&Stage) -> u64| stages.iter().map(of).max().unwrap_or(0);
        let weights = stages.iter().map(|stage| stage.weights).sum();
        Self {
            together: SMALL + weights + most(&|stage| stage.work),
            in_turn: SMALL + most(&|stage| stage.weights + stage.work),
            tiled: SMALL + most(&|stage| stage.weights + stage.tiled),
            weights,
        }
    }
}

/// What the image model at `path` takes for `request`.
pub fn image(
    path: &Path,
    options: &LoadOptions,
    compute: &Compute,
    request: &ImageRequest,
) -> Result<Need> {
    let source = Source::open(path, options)?;
    let unet = UnetConfig::of(&source.json("unet/config.json")?)?;
    let vae = VaeConfig::of(&source.json("vae/config.json")?)?;
    let mut texts = source.weights("text_encoder", compute)?.bytes();
    if unet.addition.is_some() {
        texts += source.weights("text_encoder_2", compute)?.bytes();
    }
    let size = (request.width, request.height);
    let rows = if is_guided(request.guidance) { 2 } else { 1 };
    let unet_weights = source.weights("unet", compute)?;
    let vae_weights = source.weights("vae", compute)?.with_dtype(vae_dtype(&vae, compute));
    let widths = &vae.block_out_channels;
    let mut coder = decoder(&vae_weights, widths, size, 1);
    if request.init.is_some() {
        let encoder = encoder(&vae_weights, widths, size);
        coder.work = coder.work.max(encoder.work);
        coder.tiled = coder.tiled.max(encoder.tiled);
    }
    Ok(Need::of(&[
        Stage { weights: texts, work: SMALL, tiled: SMALL },
        denoiser(&unet_weights, unet.levels[0].channels, rows * cells(size, vae.factor())),
        coder,
    ]))
}

/// What the video model in `folder` takes for `request`.
pub fn video(folder: &Path, compute: &Compute, request: &VideoRequest) -> Result<Need> {
    let unet = VideoUnetConfig::read(&folder.join("unet/config.json"))?;
    let vae = VideoVaeConfig::read(&folder.join("vae/config.json"))?;
    let vision = Weights::open(&folder.join("image_encoder"), compute)?;
    let unet_weights = Weights::open(&folder.join("unet"), compute)?;
    let vae_weights = Weights::open(&folder.join("vae"), compute)?;
    let (encoder_dtype, decoder_dtype) = vae_dtypes(&vae, compute);
    let (size, widths) = ((request.width, request.height), &vae.block_out_channels);
    let (frames, chunk) = (request.frames, request.decode_chunk.min(request.frames));
    let cells = u64::from(frames) * cells(size, vae.factor());
    let encoder_weights = vae_weights.pp("encoder").with_dtype(encoder_dtype);
    let decoder_weights = vae_weights.pp("decoder").with_dtype(decoder_dtype);
    Ok(Need::of(&[
        Stage { weights: vision.bytes(), work: SMALL, tiled: SMALL },
        encoder(&encoder_weights, widths, size),
        denoiser(&unet_weights, unet.levels[0].channels, cells),
        decoder(&decoder_weights, widths, size, chunk),
    ]))
}

/// A denoiser of `channels` at its outermost level over `cells`, all rows together.
fn denoiser(weights: &Weights, channels: usize, cells: u64) -> Stage {
    let tensor = cells * channels as u64 * weights.dtype().size_in_bytes() as u64;
    let work = DENOISER * tensor + unfolded(weights);
    Stage { weights: weights.bytes(), work, tiled: work }
}

/// A decoder of levels `widths`, outermost first, for `frames` pictures of `size` at once.
fn decoder(weights: &Weights, widths: &[usize], size: (u32, u32), frames: u32) -> Stage {
    // The second level has this many channels when it reaches full size.
    let channels = widths[1.min(widths.len() - 1)] as u64;
    let bytes = channels * weights.dtype().size_in_bytes() as u64;
    let work = |pixels: u64| DECODER * pixels * bytes + unfolded(weights);
    let whole = pixels(size);
    // The finished picture is there as numbers and as bytes.
    let finished = 32 * whole;
    let tile = whole.min(u64::from(LOW_SIDE * LOW_SIDE));
    Stage {
        weights: weights.bytes(),
        work: work(whole * u64::from(frames)) + finished,
        tiled: work(tile) + finished,
    }
}

/// The encoder of the same autoencoder, which takes one picture whole.
fn encoder(weights: &Weights, widths: &[usize], size: (u32, u32)) -> Stage {
    let bytes = widths[0] as u64 * weights.dtype().size_in_bytes() as u64;
    let work = DECODER * pixels(size) * bytes + unfolded(weights);
    Stage { weights: weights.bytes(), work, tiled: work }
}

fn unfolded(weights: &Weights) -> u64 {
    let fast = weights.device().is_cpu() && weights.dtype() == DType::F32;
    if fast { 0 } else { UNFOLDED }
}

fn pixels((width, height): (u32, u32)) -> u64 {
    u64::from(width) * u64::from(height)
}

fn cells(size: (u32, u32), factor: usize) -> u64 {
    pixels(size) / (factor * factor).max(1) as u64
}
