//! What can be asked of an image model, and what comes back.

use image::RgbImage;

use crate::engine::config::unet::ADDED_NUMBERS;
use crate::engine::models::unet::{Added, Condition};
use crate::engine::{Result, Sampler};

use super::text::{Encoded, TextRow};

/// What to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageRequest {
    /// The prompt, with A1111's weights: `(word:1.3)`, `(word)`, `[word]`, `BREAK`, and `\(` for a bracket.
    pub prompt: String,
    /// The prompt of a second text encoder, where it differs.
    pub prompt2: Option<String>,
    /// What the picture should not be; used while guidance is on. To some models none is not the same as an empty one.
    pub negative: Option<String>,
    /// Pixels across, a multiple of the model's.
    pub width: u32,
    /// Pixels down, a multiple of the model's.
    pub height: u32,
    /// Denoising steps.
    pub steps: u32,
    /// Guidance scale; at 1 and below guidance is off.
    pub guidance: f64,
    /// How to step; the model's own scheduler without one.
    pub sampler: Option<Sampler>,
    /// Seed of the start noise, torch's own.
    pub seed: u64,
    /// A picture to start from, and how much of it to change: above 0, up to 1 for all.
    pub init: Option<(RgbImage, f64)>,
    /// A1111's "Clip skip": at 2 the text encoder's last layer is left out, at 1 and 0 none. Models of two encoders
    /// always leave out one, so that 2 changes nothing there.
    pub clip_skip: Option<u32>,
    /// Most pixels along a side that are decoded at once: larger pictures are decoded in tiles, which takes less memory
    /// and leaves faint seams. A tile is never larger than what the autoencoder was trained on.
    pub tiling: Option<u32>,
    /// Number of pictures; each is the one that the seed, counted up, gives alone.
    pub batch: u32,
}

impl Default for ImageRequest {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            prompt2: None,
            negative: None,
            width: 512,
            height: 512,
            steps: 30,
            guidance: 7.5,
            sampler: None,
            seed: 0,
            init: None,
            clip_skip: None,
            tiling: None,
            batch: 1,
        }
    }
}

/// What was drawn, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageOutput {
    /// The pictures, as many as were asked for.
    pub images: Vec<RgbImage>,
    /// Tokens of the prompt that were used.
    pub tokens: u32,
    /// Tokens of the prompt that had no room.
    pub tokens_cut: u32,
    /// Name of the sampler that ran.
    pub sampler: String,
    /// What differed from what was asked or expected.
    pub notes: Vec<String>,
}

impl ImageOutput {
    /// The first picture.
    pub fn image(&self) -> &RgbImage {
        &self.images[0]
    }
}

/// Conditions of a run, one row each; without the second one guidance is off.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// The prompt.
    pub positive: Condition,
    /// The negative prompt.
    pub negative: Option<Condition>,
}

impl Conditions {
    /// Texts and sizes together, for networks that take `sizes`; the negative prompt's are the first where there is
    /// only one.
    pub fn new(encoded: Encoded, sizes: Option<[Sizes; 2]>) -> Self {
        let row = |text: TextRow, index: usize| Condition {
            text: text.embeds,
            added: text
                .pooled
                .zip(sizes)
                .map(|(pooled, sizes)| Added { pooled, numbers: vec![sizes[index].numbers()] }),
        };
        Self {
            positive: row(encoded.positive, 0),
            negative: encoded.negative.map(|text| row(text, 1)),
        }
    }

    /// The rows for `batch` pictures, those of the negative prompt first.
    pub(super) fn rows(&self, batch: usize) -> Result<Condition> {
        let negative = self.negative.iter().flat_map(|row| std::iter::repeat_n(row, batch));
        let rows: Vec<&Condition> =
            negative.chain(std::iter::repeat_n(&self.positive, batch)).collect();
        Condition::stack(&rows)
    }
}

/// Strength of guidance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// Scale of the difference between with and without the prompt.
    pub scale: f64,
    /// Part of the result whose spread is put back to that of the prompt's prediction; usually 0.
    pub rescale: f64,
}

/// Sizes that some networks are told, each in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Height and width of the picture before it was scaled.
    pub original: [u32; 2],
    /// Top and left of the part cut out.
    pub crop: [u32; 2],
    /// Height and width of the result.
    pub target: [u32; 2],
}

impl Sizes {
    /// A whole picture that was never scaled.
    pub fn whole(height: u32, width: u32) -> Self {
        Self { original: [height, width], crop: [0, 0], target: [height, width] }
    }

    fn numbers(self) -> [f64; ADDED_NUMBERS] {
        let [height, width] = self.original;
        let ([top, left], [target_height, target_width]) = (self.crop, self.target);
        [height, width, top, left, target_height, target_width].map(f64::from)
    }
}
