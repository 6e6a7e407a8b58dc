//! Border tests of `media`: pictures in and out, films as ffprobe and ffmpeg see them, frames in between.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod encode; // films
mod interpolate; // frames in between
mod still; // pictures

use std::path::Path;
use std::process::{Command, Output, Stdio};

use genvideo::media::{FrameRate, VideoSpec};
use image::{Rgb, RgbImage};

/// Runs a program without stdin and wants success.
fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test folders have plain names")
}

fn spec(width: u32, height: u32, rate: (u32, u32)) -> VideoSpec {
    let fps = FrameRate { num: rate.0, den: rate.1 };
    VideoSpec { width, height, fps, metadata: Vec::new(), threads: 2, crf: 18 }
}

/// A bright square on a dark, softly shaded ground.
fn square(size: (u32, u32), left: u32, top: u32, side: u32) -> RgbImage {
    RgbImage::from_fn(size.0, size.1, |x, y| {
        let inside = (left..left + side).contains(&x) && (top..top + side).contains(&y);
        let shade = u8::try_from(20 + x * 30 / size.0 + y * 20 / size.1).expect("at most 70");
        if inside { Rgb([230, 200, 60]) } else { Rgb([shade, shade / 2, shade]) }
    })
}

/// Reproducible noise.
fn noise(width: u32, height: u32, seed: u64) -> RgbImage {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    RgbImage::from_fn(width, height, |_, _| {
        Rgb([0; 3].map(|_: u8| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[4]
        }))
    })
}
