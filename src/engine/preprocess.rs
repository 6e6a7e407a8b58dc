//! Pictures in: what the image encoder and the VAE of a video model are fed, exactly as diffusers prepares it.
//!
//! The CLIP side blurs, then samples bicubically with aligned corners ([`clip_pixels`]); the VAE side is a plain
//! Lanczos resize ([`vae_pixels`]). Everything is single precision on the CPU: the pictures are small and torch's
//! own rounding is part of the result.

use std::f64::consts::PI;

use candle_core::{Device, Tensor};
use image::{Rgb, RgbImage};

use super::Result;
use super::config::video::ClipColours;

/// The picture as CLIP's vision tower wants it: (1, 3, side, side), aspect ratio not kept, nothing clamped.
pub fn clip_pixels(image: &RgbImage, side: usize, colours: &ClipColours) -> Result<Tensor> {
    let mut values = Vec::with_capacity(3 * side * side);
    for channel in 0..3 {
        let plane = Plane::of(image, channel).blurred(side).sampled(side);
        let (mean, std) = (colours.mean[channel], colours.deviation[channel]);
        values.extend(plane.values.iter().map(|value| ((value + 1.0) / 2.0 - mean) / std));
    }
    Ok(Tensor::from_vec(values, (1, 3, side, side), &Device::Cpu)?)
}

/// The picture as the VAE's encoder wants it: Lanczos to width x height, then [-1, 1] as (1, 3, h, w).
pub fn vae_pixels(image: &RgbImage, width: u32, height: u32) -> Result<Tensor> {
    let resized = lanczos(image, width, height);
    let planes = (0..3).map(|channel| Plane::of(&resized, channel).values);
    let values: Vec<f32> = planes.flatten().collect();
    Ok(Tensor::from_vec(values, (1, 3, height as usize, width as usize), &Device::Cpu)?)
}

/// Pillow's Lanczos resize, bit for bit: across, then down, in fixed point, rounded to bytes after each pass.
fn lanczos(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let columns = lanczos_taps(image.width(), width);
    let across = RgbImage::from_fn(width, image.height(), |x, y| {
        let (first, weights) = &columns[x as usize];
        lanczos_pixel(weights, (*first..).map(|x| image.get_pixel(x, y)))
    });
    let rows = lanczos_taps(image.height(), height);
    RgbImage::from_fn(width, height, |x, y| {
        let (first, weights) = &rows[y as usize];
        lanczos_pixel(weights, (*first..).map(|y| across.get_pixel(x, y)))
    })
}

/// Bits behind the point of Pillow's fixed-point weights.
const LANCZOS_BITS: u32 = 22;

/// The weighted sum of `pixels`, rounded and limited to bytes.
fn lanczos_pixel<'a>(weights: &[i64], pixels: impl Iterator<Item = &'a Rgb<u8>>) -> Rgb<u8> {
    let mut sums = [1 << (LANCZOS_BITS - 1); 3];
    for (weight, pixel) in weights.iter().zip(pixels) {
        for (sum, value) in sums.iter_mut().zip(pixel.0) {
            *sum += weight * i64::from(value);
        }
    }
    Rgb(sums
        .map(|sum| u8::try_from((sum >> LANCZOS_BITS).clamp(0, 255)).expect("clamped to a byte")))
}

/// For each of `to` samples along an axis of `from` pixels: the first pixel it reads and the weights from there on.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "places in a picture; rounded weights"
)]
fn lanczos_taps(from: u32, to: u32) -> Vec<(u32, Vec<i64>)> {
    if from == to {
        return (0..to).map(|sample| (sample, vec![1 << LANCZOS_BITS])).collect();
    }
    let scale = f64::from(from) / f64::from(to);
    let stretch = scale.max(1.0);
    let support = 3.0 * stretch;
    let sinc = |x: f64| if x == 0.0 { 1.0 } else { (PI * x).sin() / (PI * x) };
    let filter = |x: f64| if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 };
    let sample = |sample: u32| {
        let centre = (f64::from(sample) + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as u32;
        let end = ((centre + support + 0.5) as u32).min(from);
        let weights: Vec<f64> =
            (first..end).map(|pixel| filter((f64::from(pixel) - centre + 0.5) / stretch)).collect();
        let fixed = f64::from(1_u32 << LANCZOS_BITS) / weights.iter().sum::<f64>();
        (first, weights.into_iter().map(|weight| (weight * fixed).round() as i64).collect())
    };
    (0..to).map(sample).collect()
}

/// One colour channel of a picture in [-1, 1], row by row.
struct Plane {
    values: Vec<f32>,
    width: usize,
    height: usize,
}

impl Plane {
    fn of(image: &RgbImage, channel: usize) -> Self {
        let values =
            image.pixels().map(|pixel| f32::from(pixel[channel]) / 255.0 * 2.0 - 1.0).collect();
        Self { values, width: image.width() as usize, height: image.height() as usize }
    }

    /// A Gaussian blur, horizontal then vertical, as wide as the way down to `side` needs.
    fn blurred(&self, side: usize) -> Self {
        let (across, down) = (gaussian(self.width, side), gaussian(self.height, side));
        let mut rows = Self { values: Vec::with_capacity(self.values.len()), ..*self };
        for row in self.values.chunks_exact(self.width) {
            rows.values.extend((0..self.width).map(|x| {
                weighted(&across, |tap| row[reflected(x, tap, across.len(), self.width)])
            }));
        }
        let mut both = Self { values: Vec::with_capacity(self.values.len()), ..*self };
        for y in 0..self.height {
            let sources: Vec<usize> = (0..down.len())
                .map(|tap| reflected(y, tap, down.len(), self.height) * self.width)
                .collect();
            both.values.extend(
                (0..self.width).map(|x| weighted(&down, |tap| rows.values[sources[tap] + x])),
            );
        }
        both
    }

    /// Bicubic sampling to side x side with aligned corners and clamped borders.
    fn sampled(&self, side: usize) -> Self {
        let (columns, rows) = (cubic_taps(self.width, side), cubic_taps(self.height, side));
        let mut values = Vec::with_capacity(side * side);
        for (ys, weights) in &rows {
            let lines: [&[f32]; 4] = ys.map(|y| &self.values[y * self.width..][..self.width]);
            values.extend(columns.iter().map(|(xs, across)| {
                weighted(weights, |line| weighted(across, |tap| lines[line][xs[tap]]))
            }));
        }
        Self { values, width: side, height: side }
    }
}

fn weighted(weights: &[f32], value: impl Fn(usize) -> f32) -> f32 {
    weights.iter().enumerate().map(|(tap, weight)| weight * value(tap)).sum()
}

/// The index `tap` of a kernel centred on `place` reads, mirrored at the borders without repeating them.
fn reflected(place: usize, tap: usize, taps: usize, length: usize) -> usize {
    let (place, half) = (place + tap, taps / 2);
    let index = place.abs_diff(half);
    if place >= half && index >= length {
        (2 * (length - 1)).saturating_sub(index)
    } else {
        index.min(length - 1)
    }
}

/// Kernel of the antialiasing blur from `length` to `side` pixels; sigma 0.001, that is none, on the way up.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a kernel is a few taps; sigma is single precision in torch"
)]
#[expect(clippy::cast_sign_loss, reason = "sigma is positive")]
fn gaussian(length: usize, side: usize) -> Vec<f32> {
    let sigma = ((length as f64 / side as f64 - 1.0) / 2.0).max(0.001);
    let taps = (4.0 * sigma).max(3.0) as usize | 1;
    let sigma = sigma as f32;
    let weights: Vec<f32> = (0..taps)
        .map(|tap| {
            let distance = tap.abs_diff(taps / 2) as f32;
            (-distance * distance / (2.0 * sigma * sigma)).exp()
        })
        .collect();
    let sum: f32 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// For each of `side` samples along an axis: the four pixels it reads and their weights (a = -0.75).
#[expect(clippy::cast_possible_truncation, reason = "positions are within the picture")]
#[expect(clippy::cast_sign_loss, reason = "positions are not negative")]
fn cubic_taps(length: usize, side: usize) -> Vec<([usize; 4], [f32; 4])> {
    let scale = if side > 1 { (length - 1) as f32 / (side - 1) as f32 } else { 0.0 };
    let near = |t: f32| ((-0.75 + 2.0) * t - (-0.75 + 3.0)) * t * t + 1.0;
    let far = |t: f32| ((-0.75 * t + 3.75) * t - 6.0) * t + 3.0;
    (0..side)
        .map(|sample| {
            let place = scale * sample as f32;
            let base = place.floor() as usize;
            let t = place - place.floor();
            let pixels = [base.saturating_sub(1), base, base + 1, base + 2]
                .map(|pixel| pixel.min(length - 1));
            (pixels, [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)])
        })
        .collect()
}
