//! Resizing against Pillow and diffusers: `tests/fixtures/preprocess/preprocess.py` wrote the numbers.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by failing")]

use std::fs;
use std::path::Path;

use candle_core::Tensor;
use genvideo::engine::config::video::ClipColours;
use genvideo::engine::preprocess::{clip_pixels, vae_pixels};
use image::RgbImage;
use serde_json::Value;

/// One picture with what became of it, pixel by pixel.
struct Case {
    image: RgbImage,
    to: (u32, u32),
    wanted: Vec<f64>,
}

fn cases(kind: &str) -> Vec<Case> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/preprocess/preprocess.json");
    let written: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let size = |value: &Value| -> (u32, u32) {
        let side = |index: usize| u32::try_from(value[index].as_u64().unwrap()).unwrap();
        (side(0), side(1))
    };
    let case = |value: &Value| {
        let bytes = value["bytes"].as_array().unwrap().iter();
        let bytes = bytes.map(|byte| u8::try_from(byte.as_u64().unwrap()).unwrap()).collect();
        let (width, height) = size(&value["size"]);
        let image = RgbImage::from_raw(width, height, bytes).unwrap();
        Case { image, to: size(&value["to"]), wanted: numbers(&value["wanted"]) }
    };
    written[kind].as_array().unwrap().iter().map(case).collect()
}

/// (1, 3, h, w) to numbers pixel by pixel.
fn by_pixel(x: &Tensor) -> Vec<f32> {
    let x = x.squeeze(0).unwrap().permute((1, 2, 0)).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_lanczos_resize_is_pillows() {
    for Case { image, to: (width, height), wanted } in cases("lanczos") {
        let got = by_pixel(&vae_pixels(&image, width, height).unwrap());
        let got: Vec<f64> = got.iter().map(|x| ((f64::from(*x) + 1.0) * 127.5).round()).collect();
        assert_eq!(got, wanted, "{:?} to {width}x{height}", image.dimensions());
    }
}

#[test]
fn the_antialiased_resize_is_that_of_diffusers() {
    let plain = ClipColours { mean: [0.0; 3], deviation: [1.0; 3] };
    for Case { image, to: (side, _), wanted } in cases("antialiased") {
        let got = by_pixel(&clip_pixels(&image, side as usize, &plain).unwrap());
        assert_eq!(got.len(), wanted.len());
        for (index, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            let off = (f64::from(*got) - wanted).abs();
            assert!(
                off < 3e-6,
                "{:?} to {side}, {index}: {got}, wanted {wanted}",
                image.dimensions()
            );
        }
    }
}
