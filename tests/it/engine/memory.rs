//! Little memory and narrow numbers: tiles, parts in turn, overflows in half precision, estimates.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use genvideo::engine::config::Json;
use genvideo::engine::config::clip_text::ClipTextConfig;
use genvideo::engine::config::unet::UnetConfig;
use genvideo::engine::config::vae::VaeConfig;
use genvideo::engine::config::video::{ClipVisionConfig, VideoUnetConfig, VideoVaeConfig};
use genvideo::engine::device::{self, Compute};
use genvideo::engine::models::clip_text::ClipText;
use genvideo::engine::models::clip_vision::ClipVision;
use genvideo::engine::models::unet::Unet;
use genvideo::engine::models::unet_video::VideoUnet;
use genvideo::engine::models::vae::Vae;
use genvideo::engine::models::vae_video::{VideoDecoder, VideoEncoder};
use genvideo::engine::noise::Stream;
use genvideo::engine::tiling::{self, Tiling};
use genvideo::engine::weights::Weights;
use genvideo::engine::{
    Error, ImageModel, ImageOutput, ImageRequest, LoadOptions, Residency, VideoModel, VideoRequest,
    estimate,
};
use image::RgbImage;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::shipped;

use crate::support::copy_folder;

fn half() -> Compute {
    device::open("cpu", "f16").unwrap()
}

/// Largest and mean difference.
fn differences(a: &Tensor, b: &Tensor) -> (f64, f64) {
    let off = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    let number = |x: Tensor| f64::from(x.to_scalar::<f32>().unwrap());
    (number(off.max(0).unwrap()), number(off.mean_all().unwrap()))
}

#[test]
fn tiles_of_something_local_are_seamless() {
    // A stand-in for a decoder that looks no further than one cell.
    let factor = 4;
    let tiles = Cell::new(0);
    let mut enlarge = |z: &Tensor| {
        let (_, _, height, width) = z.dims4()?;
        tiles.set(tiles.get() + 1);
        Ok(z.upsample_nearest2d(factor * height, factor * width)?)
    };
    for (side, height, width, count) in
        [(8, 8, 8, 1), (8, 20, 8, 4 * 2), (8, 17, 31, 3 * 6), (6, 7, 40, 2 * 10), (1, 2, 3, 6)]
    {
        let z = Stream::torch(3).tensor((2, 3, height, width), &Device::Cpu).unwrap();
        let whole = z.upsample_nearest2d(factor * height, factor * width).unwrap();
        let tiling = Tiling { side, overlap: 0.25 };
        let tiled = tiling::decode(&z, tiling, factor, &mut enlarge).unwrap();
        assert_eq!(tiled.dims(), whole.dims());
        let (most, _) = differences(&tiled, &whole);
        assert!(most < 1e-6, "tiles of {side} over {height}x{width}: {most}");
        assert_eq!(tiles.take(), count, "tiles of {side} over {height}x{width}");
    }
}

/// The autoencoder of the shipped model, which was really trained: its pictures are smooth.
#[test]
fn seams_between_tiles_are_faint() {
    let folder = shipped("models/genvideo-tiny-t2i/vae");
    let config = VaeConfig::read(&folder.join("config.json")).unwrap();
    let vae = Vae::load(&Weights::open(&folder, &Compute::cpu()).unwrap(), config.clone()).unwrap();
    let mut pulse = || ControlFlow::Continue(());
    let picture = RgbImage::from_fn(160, 96, |x, y| {
        let inside = (x.abs_diff(70).pow(2) + y.abs_diff(50).pow(2)) < 900;
        if inside { image::Rgb([220, 60, 30]) } else { image::Rgb([90, 160, 230]) }
    });
    let pixels = genvideo::engine::preprocess::vae_pixels(&picture, 160, 96).unwrap();
    let moments = vae.encode_moments(&pixels, &mut pulse).unwrap();
    let z = moments.narrow(1, 0, config.latent_channels).unwrap().contiguous().unwrap();
    let whole = vae.decode(&z, &mut pulse).unwrap();

    let tiling = Tiling::of(config.sample_size, config.factor());
    assert_eq!((tiling.side, z.dims()[2..].to_vec()), (16, vec![12, 20]));
    let tiled = vae.decode_tiled(&z, tiling, &mut pulse).unwrap();
    assert_eq!(tiled.dims(), whole.dims());
    let (most, mean) = differences(&tiled, &whole);
    println!("tiled: off by {most} at most, {mean} in the mean");
    assert!(most > 0.0 && most < 1.0 && mean < 0.08, "off by {most} at most, {mean} in the mean");

    let one = Tiling { side: 20, overlap: 0.25 };
    assert_eq!(differences(&vae.decode_tiled(&z, one, &mut pulse).unwrap(), &whole), (0.0, 0.0));
}

fn draw(model: &ImageModel, request: &ImageRequest) -> Result<ImageOutput, Error> {
    model.generate(request, &mut |_| ControlFlow::Continue(()))
}

fn load(folder: &Path, residency: Residency, compute: &Compute) -> ImageModel {
    let options = LoadOptions { residency, ..LoadOptions::default() };
    ImageModel::load_with(folder, &options, compute, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn parts_in_turn_make_the_same_picture_and_clip() {
    let folder = shipped("models/genvideo-tiny-t2i");
    let [together, in_turn] = [Residency::Together, Residency::InTurn]
        .map(|residency| load(&folder, residency, &Compute::cpu()));
    let request = ImageRequest { batch: 2, ..super::request(3) };
    let first = draw(&together, &request).unwrap();
    assert_eq!(first, draw(&in_turn, &request).unwrap());
    // One tile covers this picture.
    let tiled = ImageRequest { tiling: Some(u32::MAX), ..request.clone() };
    assert_eq!(first, draw(&in_turn, &tiled).unwrap());
    let large = ImageRequest { width: 192, batch: 1, ..request };
    let tiled = ImageRequest { tiling: Some(u32::MAX), ..large.clone() };
    assert_ne!(draw(&together, &large).unwrap().images, draw(&together, &tiled).unwrap().images);

    let folder = shipped("models/genvideo-tiny-i2v");
    let [together, in_turn] = [Residency::Together, Residency::InTurn].map(|residency| {
        let go_on = &mut |_| ControlFlow::Continue(());
        VideoModel::load_with(&folder, residency, &Compute::cpu(), go_on).unwrap()
    });
    let request = clip();
    let animate = |model: &VideoModel, request: &VideoRequest| {
        model.animate(request, &mut |_| ControlFlow::Continue(())).unwrap().frames
    };
    let first = animate(&together, &request);
    assert_eq!(first, animate(&in_turn, &request));
    let tiled = VideoRequest { width: 128, tiling: Some(64), ..request };
    let frames = animate(&in_turn, &tiled);
    assert_eq!((frames.len(), frames[0].dimensions()), (3, (128, 64)));
}

fn clip() -> VideoRequest {
    VideoRequest {
        image: RgbImage::from_pixel(64, 64, image::Rgb([200, 80, 40])),
        frames: 3,
        width: 64,
        height: 64,
        steps: 2,
        fps: 7,
        motion: 40,
        noise_aug: 0.02,
        min_guidance: 1.0,
        max_guidance: 1.0,
        decode_chunk: 3,
        tiling: None,
        seed: 4,
        run: 0,
    }
}

/// A copy of a golden model in which `tensor` of `part` is multiplied by `factor`, in f32.
fn scaled(
    model: &str,
    part: &str,
    tensor: &str,
    factor: f64,
    edit: &dyn Fn(&mut Value),
) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&shipped(&format!("tests/fixtures/goldens/models/{model}")), folder.path());
    let place = folder.path().join(part);
    let file = ["diffusion_pytorch_model.safetensors", "model.safetensors"]
        .map(|name| place.join(name))
        .into_iter()
        .find(|path| path.is_file())
        .unwrap();
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let mut found = false;
    let tensors: HashMap<String, Tensor> = tensors
        .into_iter()
        .map(|(name, x)| {
            let x = x.to_dtype(DType::F32).unwrap();
            let ours = name.ends_with(tensor);
            found |= ours;
            (name, if ours { (x * factor).unwrap() } else { x })
        })
        .collect();
    assert!(found, "no tensor {tensor}");
    candle_core::safetensors::save(&tensors, file).unwrap();
    let path = folder.path().join("vae/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
    folder
}

#[test]
fn an_autoencoder_that_overflows_decodes_in_f32_and_says_so() {
    let narrow = |config: &mut Value| config["force_upcast"] = json!(false);
    let wide = |config: &mut Value| config["force_upcast"] = json!(true);
    for model in ["sd1", "xl"] {
        let request = super::request(2);
        // Finite as f16 weights, too large for f16 sums; norms behind it take the factor out again.
        let broken = |factor: f64, edit: &dyn Fn(&mut Value)| {
            scaled(model, "vae", "decoder.conv_in.weight", factor, edit)
        };
        let folder = broken(2e4, &narrow);
        let output = draw(&load(folder.path(), Residency::Together, &half()), &request).unwrap();
        let note = "the VAE overflowed in f16; decoded in f32";
        assert_eq!(output.notes.iter().filter(|found| *found == note).count(), 1, "{model}");
        assert!(output.image().iter().any(|byte| *byte > 0), "{model}: a black picture");
        let folder = broken(2e4, &wide);
        let told = draw(&load(folder.path(), Residency::InTurn, &half()), &request).unwrap();
        assert_eq!(output.images, told.images, "{model}");
        assert!(!told.notes.iter().any(|found| found == note), "{model}");

        let sound = broken(1.0, &narrow);
        let output = draw(&load(sound.path(), Residency::Together, &half()), &request).unwrap();
        assert!(!output.notes.iter().any(|found| found == note), "{model}");

        // Too large for f32 as well.
        let folder = broken(1e38, &narrow);
        let error = draw(&load(folder.path(), Residency::Together, &half()), &request).unwrap_err();
        let Error::NonFinite { stage, dtype } = error else { panic!("{model}: {error}") };
        assert_eq!((stage, dtype), ("the picture", "f32"), "{model}");
    }
}

#[test]
fn an_encoder_that_overflows_encodes_in_f32() {
    let narrow = |config: &mut Value| config["force_upcast"] = json!(false);
    let folder = scaled("sd1", "vae", "encoder.conv_in.weight", 6e4, &narrow);
    let init = Some((RgbImage::from_pixel(64, 64, image::Rgb([255, 255, 255])), 0.5));
    let request = ImageRequest { init, ..super::request(2) };
    let output = draw(&load(folder.path(), Residency::Together, &half()), &request).unwrap();
    let note = "the VAE overflowed in f16; encoded in f32";
    assert!(output.notes.iter().any(|found| found == note), "{:?}", output.notes);
}

#[test]
fn other_stages_that_overflow_are_named_with_their_number_type() {
    for (part, tensor, stage) in [
        ("unet", "conv_out.weight", "the denoiser's prediction"),
        ("text_encoder", "final_layer_norm.weight", "the encoded prompt"),
    ] {
        let folder = scaled("sd1", part, tensor, 1e7, &|_| {});
        let model = load(folder.path(), Residency::Together, &half());
        let error = draw(&model, &super::request(2)).unwrap_err();
        let Error::NonFinite { stage: named, dtype } = error else { panic!("{stage}: {error}") };
        assert_eq!((named, dtype), (stage, "f16"));
    }
}

#[test]
fn a_clip_that_overflows_is_decoded_in_f32_and_says_so() {
    let folder = scaled("svd", "vae", "decoder.conv_in.weight", 2e4, &|_| {});
    let go_on = &mut |_| ControlFlow::Continue(());
    let model = VideoModel::load(folder.path(), &half(), go_on).unwrap();
    let output = model.animate(&clip(), go_on).unwrap();
    assert_eq!(output.notes, ["the VAE overflowed in f16; decoded in f32"]);
    assert!(output.frames.iter().all(|frame| frame.iter().any(|byte| *byte > 0)));

    let folder = scaled("svd", "vae", "decoder.conv_in.weight", 1e38, &|_| {});
    let model = VideoModel::load(folder.path(), &half(), go_on).unwrap();
    let error = model.animate(&clip(), go_on).unwrap_err();
    assert!(
        matches!(error, Error::NonFinite { stage: "the decoded frames", dtype: "f32" }),
        "{error}"
    );
}

#[test]
fn memory_is_estimated_from_headers_and_sizes() {
    let folder = shipped("models/genvideo-tiny-t2i");
    let options = LoadOptions::default();
    let of = |compute: &Compute, request: &ImageRequest| {
        estimate::image(&folder, &options, compute, request).unwrap()
    };
    let small = of(&Compute::cpu(), &super::request(1));
    let files: u64 =
        ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
            .map(|name| {
                fs::metadata(folder.join(name).with_extension("safetensors")).unwrap().len()
            })
            .iter()
            .sum();
    // The files are f16; their headers are small.
    assert!(
        small.weights < 2 * files && small.weights > 2 * files - files / 4,
        "{small:?} {files}"
    );
    let (base, half) = (small, of(&half(), &super::request(1)));
    assert!(half.weights < base.weights, "{half:?}");
    assert!(base.tiled <= base.in_turn && base.in_turn < base.together);
    let large =
        of(&Compute::cpu(), &ImageRequest { width: 2048, height: 2048, ..super::request(1) });
    assert!(large.tiled < large.in_turn && large.in_turn > base.in_turn, "{large:?}");
    assert_eq!(large.weights, base.weights);

    let folder = shipped("models/genvideo-tiny-i2v");
    let of = |request: &VideoRequest| estimate::video(&folder, &Compute::cpu(), request).unwrap();
    let large = VideoRequest { frames: 25, decode_chunk: 25, width: 1024, height: 576, ..clip() };
    let one = VideoRequest { decode_chunk: 1, ..large.clone() };
    assert!(of(&one).in_turn < of(&large).in_turn);
    assert_eq!(of(&one).tiled, of(&VideoRequest { decode_chunk: 1, ..large.clone() }).tiled);
    assert!(Compute::cpu().free_memory().is_some_and(|free| free > 64 << 20));
}

/// Tensors and parameters that `load` asks for.
fn asked<T>(load: impl FnOnce(&Weights) -> Result<T, Error>) -> (usize, usize) {
    // One byte a number is enough for what is never read.
    let weights = Weights::none(DType::U8);
    if let Err(error) = load(&weights) {
        assert!(matches!(error, Error::TensorsMissing { .. }), "{error}");
    }
    let missing = weights.missing();
    (missing.len(), missing.values().map(|shape| shape.iter().product::<usize>()).sum())
}

fn config(value: Value) -> Json {
    Json::from_value("config.json", value).unwrap()
}

fn read<T>(value: &Value, read: impl FnOnce(&Path) -> Result<T, Error>) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, value.to_string()).unwrap();
    read(&path).unwrap()
}

/// Counts of the published models; the configs are in `scripts/full_size.py` too.
#[test]
fn published_sizes_ask_for_the_published_tensors() {
    let cross = "CrossAttnDownBlock2D";
    let crossed = json!([cross, cross, cross, "DownBlock2D"]);
    let up = "CrossAttnUpBlock2D";
    let up = json!(["UpBlock2D", up, up, up]);
    let widths = json!([320, 640, 1280, 1280]);
    let unet = |value: Value| {
        let config = UnetConfig::of(&config(value)).unwrap();
        asked(|weights| Unet::load(weights, config)).1
    };
    assert_eq!(
        unet(
            json!({"block_out_channels": widths, "down_block_types": crossed, "up_block_types": up,
            "cross_attention_dim": 768, "attention_head_dim": 8})
        ),
        859_520_964
    );
    assert_eq!(
        unet(
            json!({"block_out_channels": widths, "down_block_types": crossed, "up_block_types": up,
            "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": true, "sample_size": 96})
        ),
        865_910_724
    );
    assert_eq!(
        unet(json!({"block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", cross, cross],
            "up_block_types": [up[1], up[1], "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
            "use_linear_projection": true, "sample_size": 128, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816})),
        2_567_463_684
    );
    let vae = json!({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2});
    let image = VaeConfig::of(&config(vae.clone())).unwrap();
    assert_eq!(asked(|weights| Vae::load(weights, image)).1, 83_653_863);
    let text = json!({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "vocab_size": 49408, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu"});
    let text = ClipTextConfig::of(&config(text)).unwrap();
    assert_eq!(asked(|weights| ClipText::load(weights, text, false)), (196, 123_060_480));

    let unet = read(
        &json!({"_class_name": "UNetSpatioTemporalConditionModel",
        "block_out_channels": widths, "num_attention_heads": [5, 10, 20, 20],
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"]}),
        VideoUnetConfig::read,
    );
    // A picture is one token, which every query sees alike: what would weigh it is never read. That is `norm2`, `to_q`
    // and `to_k` of the second attention of both blocks of each transformer.
    let unread = |width: usize| 2 * width + width * width + width * 1024;
    let unread = 2 * (5 * unread(320) + 5 * unread(640) + 6 * unread(1280));
    assert_eq!(
        asked(|weights| VideoUnet::load(weights, &unet)),
        (1428 - 2 * 16 * 4, 1_524_623_082 - unread)
    );
    let vae = json!({"_class_name": "AutoencoderKLTemporalDecoder",
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2});
    let vae = read(&vae, VideoVaeConfig::read);
    let both = |weights: &Weights| {
        VideoEncoder::load(weights, &vae)
            .and_then(|_| VideoDecoder::load(weights, &vae).map(|_| ()))
    };
    assert_eq!(asked(both), (374, 97_742_847));
    let vision = read(
        &json!({"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 224, "projection_dim": 1024,
        "hidden_act": "gelu"}),
        ClipVisionConfig::read,
    );
    assert_eq!(asked(|weights| ClipVision::load(weights, &vision)), (520, 632_076_800));
}
