//! Parts of the networks on the CPU: the tiny models whole, and the shapes of Stable Diffusion 1.5 at 512x512.
//!
//! `stock` rows are candle's own operations on the same numbers.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use genvideo::engine::config::unet::UnetConfig;
use genvideo::engine::config::vae::VaeConfig;
use genvideo::engine::device::{Compute, keep_freed_memory};
use genvideo::engine::models::unet::{Condition, Unet};
use genvideo::engine::models::vae::Vae;
use genvideo::engine::nn::attention::{Mask, attend};
use genvideo::engine::nn::conv::{Conv2d, Conv2dSpec};
use genvideo::engine::noise::Stream;
use genvideo::engine::weights::Weights;

fn random(shape: &[usize]) -> Tensor {
    Stream::torch(7).tensor(shape, &Device::Cpu).expect("a shape that fits in memory")
}

fn weights(component: &str) -> Weights {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("models/genvideo-tiny-t2i").join(component);
    Weights::open(&folder, &Compute::cpu()).expect("the tiny model is in the repository")
}

fn config(component: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("models/genvideo-tiny-t2i")
        .join(component)
        .join("config.json")
}

fn networks(criterion: &mut Criterion) {
    let unet =
        UnetConfig::read(&config("unet")).and_then(|config| Unet::load(&weights("unet"), config));
    let unet = unet.expect("the tiny unet loads");
    let x = random(&[2, 16, 8, 8]);
    let condition = Condition { text: random(&[2, 32, 128]), added: None };
    criterion.bench_function("cpu_f32/unet_tiny", |bench| {
        bench.iter(|| {
            unet.forward(black_box(&x), 500.0, &condition, &mut |_, _| ControlFlow::Continue(()))
        });
    });
    let vae = VaeConfig::read(&config("vae")).and_then(|config| Vae::load(&weights("vae"), config));
    let vae = vae.expect("the tiny autoencoder loads");
    let z = random(&[1, 16, 8, 8]);
    criterion.bench_function("cpu_f32/vae_tiny", |bench| {
        bench.iter(|| vae.decode(black_box(&z), &mut || ControlFlow::Continue(())));
    });
}

fn convolutions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cpu_f32");
    group.sample_size(10);
    for (channels, side) in [(320, 64), (640, 32), (1280, 16), (1280, 8)] {
        let spec = Conv2dSpec::same(channels, channels);
        let (x, weight) = (random(&[2, channels, side, side]), random(&[channels, channels, 3, 3]));
        let conv = Conv2d::new(weight.clone(), random(&[channels]), spec);
        group.bench_function(format!("conv3x3_{channels}x{side}"), |bench| {
            bench.iter(|| conv.forward(black_box(&x)))
        });
        group.bench_function(format!("conv3x3_{channels}x{side}_stock"), |bench| {
            bench.iter(|| black_box(&x).conv2d(&weight, 1, 1, 1, 1));
        });
    }
    let rows = random(&[2, 4096, 320]);
    group.bench_function("attention_4096x8x40", |bench| {
        bench.iter(|| attend(black_box(&rows), &rows, &rows, 8, Mask::Open));
    });
    group.finish();
}

fn start(criterion: &mut Criterion) {
    keep_freed_memory();
    networks(criterion);
    convolutions(criterion);
}

criterion_group!(benches, start);
criterion_main!(benches);
