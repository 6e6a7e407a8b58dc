//! Noise against torch's own: `tests/fixtures/noise/noise.py` wrote the numbers.

use std::fs;
use std::path::Path;

use candle_core::Device;
use genvideo::engine::noise::{Purpose, Stream, gaussian};
use serde_json::Value;

/// Torch takes logarithms and cosines in single precision; the largest numbers are about 5.
const TOLERANCE: f64 = 2e-6;

#[test]
fn a_seed_draws_what_torch_draws() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/noise/noise.json");
    let written: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for case in written["cases"].as_array().unwrap() {
        let seed: u64 = case["seed"].as_str().unwrap().parse().unwrap();
        let mut stream = Stream::torch(seed);
        for draw in case["draws"].as_array().unwrap() {
            let wanted: Vec<f64> =
                draw.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            for (index, (got, wanted)) in
                stream.normal(wanted.len()).into_iter().zip(&wanted).enumerate()
            {
                let off = (f64::from(got) - wanted).abs();
                assert!(off < TOLERANCE, "seed {seed}, number {index}: {got}, torch {wanted}");
            }
        }
    }
}

#[test]
fn purposes_and_steps_draw_apart() {
    let draw = |purpose, step| {
        let noise = gaussian(5, purpose, step, (4, 8), &Device::Cpu).unwrap();
        noise.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let draws = [
        draw(Purpose::InitLatents, 0),
        draw(Purpose::InitLatents, 1),
        draw(Purpose::Step, 0),
        draw(Purpose::Step, 1),
        draw(Purpose::Segment, 1),
        draw(Purpose::Segment, 2),
    ];
    for (index, one) in draws.iter().enumerate() {
        assert!(
            draws[..index].iter().all(|other| other[0] != one[0]),
            "draw {index} repeats an earlier one"
        );
    }
    assert_eq!(draw(Purpose::Step, 1), draws[3]);
}

#[test]
fn high_bits_of_a_seed_count_outside_torchs_stream() {
    let step = |seed| Stream::of(seed, Purpose::Step, 1).normal(16);
    assert_ne!(step(5), step(5 + (1 << 32)));
    assert_eq!(Stream::torch(5).normal(16), Stream::torch(5 + (1 << 32)).normal(16));
}
