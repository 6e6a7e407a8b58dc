//! Half precision, unit by unit, against torch's own on a CPU: f16, and on a GPU bf16 too.
//!
//! `f16.json` and `bf16.json` hold how far torch's is from each stored float32 output, as the root mean square
//! difference (the largest one is a matter of luck in so few numbers); ours is measured in the same way on the same
//! inputs and weights. Both computed in that type end to end, so a unit's figure includes what the units before it lost.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use genvideo::engine::config::unet::UnetConfig;
use genvideo::engine::config::vae::VaeConfig;
use genvideo::engine::config::video::{VideoUnetConfig, VideoVaeConfig};
use genvideo::engine::device::Compute;
use genvideo::engine::models::unet::{Added, Condition, Unet};
use genvideo::engine::models::unet_video::{self, VideoUnet};
use genvideo::engine::models::vae::Vae;
use genvideo::engine::models::vae_video::VideoDecoder;
use genvideo::engine::weights::Weights;
use serde_json::Value;

use super::{Run, compute_in, golden, json};

/// Most that our error may be, in torch's on a CPU.
const MOST: f64 = 2.0;
/// The same on a GPU, where a product is rounded before its bias is added and sums run in another order.
const MOST_ON_GPU: f64 = 3.0;

fn weights(model: &str, component: &str, half: &Compute) -> Weights {
    Weights::open(&golden(&format!("models/{model}/{component}")), half).unwrap()
}

fn rms_difference(got: &Tensor, wanted: &Tensor) -> f64 {
    let wide = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let squares = (wide(got) - wide(wanted)).unwrap().sqr().unwrap();
    squares.mean_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

/// What was measured of a model's units.
struct Measured {
    run: Run,
    torch: Value,
    ratios: Vec<(String, f64)>,
}

impl Measured {
    fn note(&mut self, name: &str, got: &Tensor) {
        let wanted = self.run.get(name).clone();
        let got = got.reshape(wanted.shape()).unwrap();
        let torch = self.torch[name].as_f64().unwrap_or_else(|| panic!("no figure for {name}"));
        self.ratios.push((name.to_owned(), rms_difference(&got, &wanted) / torch));
    }
}

fn image_units(model: &str, half: &Compute, measured: &mut Measured) {
    let config = |part: &str| golden(&format!("models/{model}/{part}/config.json"));
    let unet = UnetConfig::read(&config("unet")).unwrap();
    let unet = Unet::load(&weights(model, "unet", half), unet).unwrap();
    let input = |name: &str| measured.run.get(name).clone();
    let rows = |x: Tensor| -> Vec<Vec<f64>> { x.to_dtype(DType::F64).unwrap().to_vec2().unwrap() };
    let added = measured.run.tensors.get("in.text_embeds").map(|pooled| Added {
        pooled: pooled.to_dtype(half.dtype()).unwrap(),
        numbers: rows(input("in.time_ids"))
            .into_iter()
            .map(|row| row.try_into().unwrap())
            .collect(),
    });
    let text = input("in.encoder_hidden_states").to_dtype(half.dtype()).unwrap();
    let timestep = input("in.timestep").to_scalar::<f64>().unwrap();
    let (sample, pixels, z) = (input("in.sample"), input("in.pixels"), input("in.z"));
    let out = unet
        .forward(&sample, timestep, &Condition { text, added }, &mut |name, x| {
            measured.note(name, x);
            ControlFlow::Continue(())
        })
        .unwrap();
    measured.note("out", &out);
    let vae = VaeConfig::read(&config("vae")).unwrap();
    let vae = Vae::load(&weights(model, "vae", half), vae).unwrap();
    let mut pulse = || ControlFlow::Continue(());
    measured.note("vae_moments", &vae.encode_moments(&pixels, &mut pulse).unwrap());
    measured.note("vae_decode", &vae.decode(&z, &mut pulse).unwrap());
}

fn video_units(half: &Compute, measured: &mut Measured) {
    let config = |part: &str| golden(&format!("models/svd/{part}/config.json"));
    let unet = VideoUnetConfig::read(&config("unet")).unwrap();
    let unet = VideoUnet::load(&weights("svd", "unet", half), &unet).unwrap();
    let input = |name: &str| measured.run.get(name).clone();
    let added = input("in.added_time_ids").to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    let told = unet_video::Condition {
        image: input("in.encoder_hidden_states").to_dtype(half.dtype()).unwrap(),
        added: added.to_vec1().unwrap().try_into().unwrap(),
        frames: 3,
    };
    let timestep = input("in.timestep").to_scalar::<f64>().unwrap();
    let (sample, z) = (input("in.sample").squeeze(0).unwrap(), input("in.z"));
    let out = unet
        .forward(&sample, timestep, &told, &mut |name, x| {
            measured.note(name, x);
            Ok(())
        })
        .unwrap();
    measured.note("out", &out);
    let vae = VideoVaeConfig::read(&config("vae")).unwrap();
    let decoder = VideoDecoder::load(&weights("svd", "vae", half), &vae).unwrap();
    let mut pulse = || ControlFlow::Continue(());
    measured.note("vae_decode_3frames", &decoder.decode(&z, &mut pulse).unwrap());
    let first = z.narrow(0, 0, 1).unwrap();
    measured.note("vae_decode_1frame", &decoder.decode(&first, &mut pulse).unwrap());
}

#[test]
fn half_precision_is_near_the_error_of_torch() {
    let cpu = compute_in("f32").device().is_cpu();
    let (dtypes, most): (&[&str], f64) =
        if cpu { (&["f16"], MOST) } else { (&["f16", "bf16"], MOST_ON_GPU) };
    let worse: Vec<String> = dtypes.iter().flat_map(|dtype| worse_units(dtype, most)).collect();
    assert!(worse.is_empty(), "more than {most} times torch's error: {worse:#?}");
}

/// The units whose error is more than `most` times that of torch.
#[expect(clippy::print_stdout, reason = "the figures of a passing test are wanted too")]
fn worse_units(dtype: &str, most: f64) -> Vec<String> {
    let record = format!("{dtype}.json");
    if !golden(&record).is_file() {
        assert!(std::env::var_os("GENVIDEO_GOLDENS").is_some(), "the shipped goldens have it");
        return Vec::new();
    }
    let (record, half) = (json(&record), compute_in(dtype));
    let mut worse = Vec::new();
    for model in ["sd1", "sd2", "xl", "svd"] {
        let torch = record["units"][model].clone();
        let mut measured = Measured { run: Run::open(model, "units"), torch, ratios: Vec::new() };
        if model == "svd" {
            video_units(&half, &mut measured);
        } else {
            image_units(model, &half, &mut measured);
        }
        for (name, ratio) in &measured.ratios {
            println!("{dtype} {model} {name}: {ratio:.2} of torch's error");
            // A NaN is no ratio, and fails as well.
            if ratio.is_nan() || *ratio > most {
                worse.push(format!("{dtype} {model} {name}: {ratio:.2}"));
            }
        }
        assert!(measured.ratios.len() > 10, "{model}: {} units", measured.ratios.len());
    }
    worse
}
