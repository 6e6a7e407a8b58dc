//! Stable Video Diffusion against diffusers: every part alone, then whole runs.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by failing")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use genvideo::engine::config::video::{ClipColours, VideoUnetConfig, VideoVaeConfig};
use genvideo::engine::denoise::Moment;
use genvideo::engine::device::Compute;
use genvideo::engine::models::unet_video::{Condition, VideoUnet};
use genvideo::engine::models::vae_video::VideoDecoder;
use genvideo::engine::nn::video_resnet::{Blend, Epsilons, TemporalResnet, VideoResnet};
use genvideo::engine::nn::video_transformer::{VideoTransformer, VideoTransformerSpec};
use genvideo::engine::preprocess::clip_pixels;
use genvideo::engine::weights::Weights;
use genvideo::engine::{Error, StepEvent, VideoModel, VideoRequest};
use image::{Rgb, RgbImage};

use super::{Run, compute, compute_in, golden, json};

fn model() -> PathBuf {
    golden("models/svd")
}

fn weights(component: &str) -> Weights {
    Weights::open(&model().join(component), &compute()).unwrap()
}

fn half() -> Compute {
    compute_in("f16")
}

fn unet_config() -> VideoUnetConfig {
    VideoUnetConfig::read(&model().join("unet/config.json")).unwrap()
}

#[test]
fn the_unet_agrees_block_by_block() {
    let units = Run::open("svd", "units");
    let unet = VideoUnet::load(&weights("unet"), &unet_config()).unwrap();
    let added: Vec<f32> = units.get("in.added_time_ids").flatten_all().unwrap().to_vec1().unwrap();
    let told = Condition {
        image: units.get("in.encoder_hidden_states").clone(),
        added: [f64::from(added[0]), f64::from(added[1]), f64::from(added[2])],
        frames: frames(&units),
    };
    let timestep = units.get("in.timestep").to_scalar::<f64>().unwrap();
    let sample = units.get("in.sample").squeeze(0).unwrap();
    let mut seen = 0;
    let out = unet.forward(&sample, timestep, &told, &mut |name, tensor| {
        units.check(name, tensor);
        seen += 1;
        Ok(())
    });
    units.check("out", &out.unwrap().unsqueeze(0).unwrap());
    // The embeddings, the way in, and every block as a whole.
    let levels = 2 * unet_config().levels.len();
    assert_eq!(seen, 4 + levels);
}

/// Frames of the units.
fn frames(units: &Run) -> usize {
    units.get("in.sample").dim(1).unwrap()
}

/// The first run that keeps `tensor`.
fn run_with(tensor: &str) -> Run {
    let mut runs = run_names().into_iter().map(|name| Run::open("svd", &name));
    runs.find(|run| run.tensors.contains_key(tensor)).unwrap()
}

fn run_names() -> Vec<String> {
    let measured = json("runs/svd/measured.json");
    measured.as_object().unwrap().keys().filter(|name| *name != "units").cloned().collect()
}

#[test]
fn one_resnet_and_one_transformer_agree() {
    let units = Run::open("svd", "units");
    let (weights, config) = (weights("unet"), unet_config());
    let time = (units.get("time_embedding") + units.get("add_embedding")).unwrap();
    let block = weights.pp("down_blocks.0.resnets.0");
    let eps = Epsilons { spatial: 1e-6, temporal: 1e-6 };
    let width = config.levels[0].channels;

    let resnet =
        VideoResnet::load(&block, (width, width), Some(config.time_width()), eps, Blend::Spatial)
            .unwrap();
    units.check(
        "down_blocks.0.resnets.0",
        &resnet.forward(units.get("conv_in"), Some(&time), frames(&units)).unwrap(),
    );

    let temporal = TemporalResnet::load(
        &block.pp("temporal_res_block"),
        width,
        Some(config.time_width()),
        1e-6,
    )
    .unwrap();
    let spatial = units.get("down_blocks.0.resnets.0.spatial_res_block");
    let by_channel =
        spatial.flatten_from(2).unwrap().unsqueeze(0).unwrap().transpose(1, 2).unwrap();
    let out = temporal.forward(&by_channel.contiguous().unwrap(), Some(&time)).unwrap();
    let name = "down_blocks.0.resnets.0.temporal_res_block";
    units.check(name, &out.reshape(units.get(name).shape()).unwrap());

    let spec = VideoTransformerSpec {
        channels: width,
        heads: config.levels[0].heads,
        blocks: 1,
        cross: config.cross_attention,
    };
    let transformer =
        VideoTransformer::load(&weights.pp("down_blocks.0.attentions.0"), spec).unwrap();
    let image = units.get("in.encoder_hidden_states");
    let x = units.get("down_blocks.0.resnets.0");
    let out = transformer.forward(x, image, frames(&units)).unwrap();
    units.check("down_blocks.0.attentions.0", &out);
}

#[test]
fn the_decoder_agrees_for_one_frame_and_for_several() {
    let units = Run::open("svd", "units");
    let config = VideoVaeConfig::read(&model().join("vae/config.json")).unwrap();
    let decoder = VideoDecoder::load(&weights("vae"), &config).unwrap();
    let latents = units.get("in.z");
    units.check(
        "vae_decode_3frames",
        &decoder.decode(latents, &mut || ControlFlow::Continue(())).unwrap(),
    );
    units.check(
        "vae_decode_1frame",
        &decoder
            .decode(&latents.narrow(0, 0, 1).unwrap(), &mut || ControlFlow::Continue(()))
            .unwrap(),
    );
}

fn picture() -> RgbImage {
    image::open(golden("runs/svd/svd_input.png")).unwrap().to_rgb8()
}

fn load() -> VideoModel {
    VideoModel::load(&model(), &compute(), &mut |_| ControlFlow::Continue(())).unwrap()
}

/// The request a run was made with.
fn request(run: &Run) -> VideoRequest {
    let settings = &run.settings;
    let whole = |key: &str| settings[key].as_u64().and_then(|number| u32::try_from(number).ok());
    let float = |key: &str| settings[key].as_f64().unwrap();
    VideoRequest {
        image: picture(),
        frames: whole("frames").unwrap(),
        width: whole("width").unwrap(),
        height: whole("height").unwrap(),
        steps: whole("num_inference_steps").unwrap(),
        fps: whole("fps").unwrap(),
        motion: whole("motion_bucket_id").unwrap(),
        noise_aug: float("noise_aug_strength"),
        min_guidance: float("min_guidance_scale"),
        max_guidance: float("max_guidance_scale"),
        decode_chunk: whole("decode_chunk_size").unwrap_or(whole("frames").unwrap()),
        tiling: None,
        seed: 0,
        run: 0,
    }
}

/// Zeros in front of `x`, where the run had guidance: diffusers keeps both rows in one tensor.
fn with_unconditional(x: &Tensor, wanted: &Tensor) -> Tensor {
    if wanted.dim(0).unwrap() == 1 {
        x.clone()
    } else {
        Tensor::cat(&[&x.zeros_like().unwrap(), x], 0).unwrap()
    }
}

#[test]
fn whole_runs_agree() {
    let model = load();
    for name in run_names() {
        let run = Run::open("svd", &name);
        let request = request(&run);
        let prepared =
            model.prepare(&request, run.get("noise.0"), &mut || ControlFlow::Continue(())).unwrap();
        for (name, got) in [
            ("image_embeddings", &prepared.image_embedding),
            ("image_latents", &prepared.image_latents),
        ] {
            run.check(name, &with_unconditional(got, run.get(name)));
        }
        let rows = run.get("added_time_ids").dim(0).unwrap();
        let added = Tensor::new(&prepared.added, &Device::Cpu).unwrap().repeat((rows, 1)).unwrap();
        run.check("added_time_ids", &added);
        if run.tensors.contains_key("vae_input") {
            run.check("vae_input", &prepared.vae_input);
        }

        let start = run.get("init_latents").squeeze(0).unwrap();
        let latents = model.denoise(&request, &prepared, &start, &mut |moment| {
            if let Moment::After(state) = moment {
                let name = format!("latents.{}", state.step - 1);
                if run.tensors.contains_key(&name) {
                    run.check(&name, &state.latents.unsqueeze(0).unwrap());
                }
            }
            ControlFlow::Continue(())
        });
        let latents = latents.unwrap();
        run.check("final_latents", &latents.unsqueeze(0).unwrap());

        let mut chunks = Vec::new();
        let decoded = model.decode(
            &latents,
            request.decode_chunk,
            &mut |_| ControlFlow::Continue(()),
            &mut |chunk| {
                chunks.push(chunk.clone());
                Ok(())
            },
        );
        decoded.unwrap();
        let frames = Tensor::cat(&chunks, 0).unwrap();
        if run.tensors.contains_key("frames_raw") {
            run.check("frames_raw", &frames);
        }
        if run.tensors.contains_key("frames_raw_ch0") {
            run.check("frames_raw_ch0", &frames.narrow(1, 0, 1).unwrap());
        }
    }
}

#[test]
fn the_picture_reaches_clip_as_in_diffusers() {
    let run = run_with("clip_pixel_values_ch0");
    let side = run.get("clip_pixel_values_ch0").dim(3).unwrap();
    let pixels = clip_pixels(&picture(), side, &ClipColours::CLIP).unwrap();
    run.check("clip_pixel_values_ch0", &pixels.narrow(1, 0, 1).unwrap());
}

#[test]
fn a_clip_is_a_function_of_its_request() {
    let model = load();
    let base = VideoRequest { frames: 2, steps: 2, ..request(&run_with("noise.0")) };
    let animate = |request: &VideoRequest| {
        let frames = model.animate(request, &mut |_| ControlFlow::Continue(())).unwrap().frames;
        assert_eq!(frames.len(), request.frames as usize);
        assert!(frames.iter().all(|frame| frame.dimensions() == (request.width, request.height)));
        frames
    };
    let first = animate(&base);
    assert_eq!(animate(&base), first);
    assert_ne!(animate(&VideoRequest { seed: 1, ..base.clone() }), first, "the seed counts");
    assert_ne!(animate(&VideoRequest { run: 1, ..base.clone() }), first, "the run counts");
    assert_ne!(animate(&VideoRequest { motion: 1, ..base.clone() }), first, "the motion counts");
}

#[test]
fn a_clip_stops_when_the_hook_breaks() {
    let model = load();
    let request =
        VideoRequest { frames: 2, steps: 2, decode_chunk: 1, ..request(&run_with("noise.0")) };
    let stops = [
        StepEvent::EncodePrompt,
        StepEvent::Denoise { step: 0, total: 2 },
        StepEvent::Denoise { step: 1, total: 2 },
        StepEvent::Denoise { step: 2, total: 2 },
        StepEvent::Decode { done: 1, total: 2 },
        StepEvent::Decode { done: 2, total: 2 },
    ];
    for stop in stops {
        let mut after = 0;
        let result = model.animate(&request, &mut |event| {
            after += u32::from(after > 0 || event == stop);
            if after > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(result, Err(Error::Stopped)), "{stop:?}: {result:?}");
        assert_eq!(after, 1, "{stop:?}: the hook was called again");
    }
}

#[test]
fn a_clip_refuses_what_it_cannot_make() {
    let model = load();
    let base = request(&run_with("noise.0"));
    let cases = [
        ("width", VideoRequest { width: 90, ..base.clone() }),
        ("height", VideoRequest { height: 0, ..base.clone() }),
        ("frames", VideoRequest { frames: 0, ..base.clone() }),
        ("steps", VideoRequest { steps: 0, ..base.clone() }),
        ("decode_chunk", VideoRequest { decode_chunk: 0, ..base.clone() }),
        ("noise_aug", VideoRequest { noise_aug: f64::NAN, ..base.clone() }),
        ("max_guidance", VideoRequest { max_guidance: f64::INFINITY, ..base.clone() }),
    ];
    for (wanted, request) in cases {
        match model.animate(&request, &mut |_| ControlFlow::Continue(())) {
            Err(Error::Request { field, .. }) => assert_eq!(field, wanted),
            other => panic!("{wanted}: {other:?}"),
        }
    }
}

/// Half precision takes candle's own attention and norms in place of the fast paths, as a GPU does.
#[test]
fn half_precision_stays_near() {
    let model = VideoModel::load(&model(), &half(), &mut |_| ControlFlow::Continue(())).unwrap();
    let run = run_with("frames_raw");
    let request = request(&run);
    let go_on = &mut || ControlFlow::Continue(());
    let prepared = model.prepare(&request, run.get("noise.0"), go_on).unwrap();
    run.check(
        "image_latents",
        &with_unconditional(&prepared.image_latents, run.get("image_latents")),
    );
    let start = run.get("init_latents").squeeze(0).unwrap();
    let mut after_first = None;
    let latents = model.denoise(&request, &prepared, &start, &mut |moment| {
        if let (Moment::After(state), None) = (moment, &after_first) {
            after_first = Some(state.latents.clone());
        }
        ControlFlow::Continue(())
    });
    let part = |name: &str, share: f64| share * run.measured[name]["ref_max"].as_f64().unwrap();
    let first = &after_first.unwrap().unsqueeze(0).unwrap();
    run.check_within("latents.0", first, part("latents.0", 0.011));
    let mut frames = Vec::new();
    model
        .decode(
            &latents.unwrap(),
            request.decode_chunk,
            &mut |_| ControlFlow::Continue(()),
            &mut |chunk| {
                frames.push(chunk.clone());
                Ok(())
            },
        )
        .unwrap();
    run.check_within("frames_raw", &Tensor::cat(&frames, 0).unwrap(), part("frames_raw", 0.1));
}

/// `unet/config.json` as published with SVD-XT; SVD itself says 14 frames.
#[test]
fn the_published_unet_config_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let published = r#"{
        "_class_name": "UNetSpatioTemporalConditionModel", "_diffusers_version": "0.24.0.dev0",
        "_name_or_path": "/home/diffusers/svd", "addition_time_embed_dim": 256,
        "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
        "in_channels": 8, "layers_per_block": 2, "num_attention_heads": [5, 10, 20, 20],
        "num_frames": 25, "out_channels": 4, "projection_class_embeddings_input_dim": 768,
        "sample_size": 96, "transformer_layers_per_block": 1,
        "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"]
    }"#;
    std::fs::write(&path, published).unwrap();
    let config = VideoUnetConfig::read(&path).unwrap();
    let levels = config.levels.iter();
    let levels: Vec<_> = levels
        .map(|level| (level.channels, level.heads, level.down_attention, level.up_attention))
        .collect();
    let wanted = [
        (320, 5, true, true),
        (640, 10, true, true),
        (1280, 20, true, true),
        (1280, 20, false, false),
    ];
    assert_eq!(levels, wanted);
    assert_eq!((config.frames, config.sample_size, config.time_width()), (25, (96, 96), 1280));

    for (key, other) in
        [("\"in_channels\": 8", "\"in_channels\": 4"), ("[5, 10, 20, 20]", "[5, 10, 20]")]
    {
        std::fs::write(&path, published.replace(key, other)).unwrap();
        assert!(VideoUnetConfig::read(&path).is_err(), "{other} was taken");
    }
}

#[test]
fn numbers_out_of_range_are_reported() {
    let model = load();
    let latents = Tensor::full(f32::NAN, (2, 4, 4, 4), compute().device()).unwrap();
    let result = model.decode(&latents, 2, &mut |_| ControlFlow::Continue(()), &mut |_| Ok(()));
    assert!(matches!(result, Err(Error::NonFinite { .. })), "{result:?}");
}

/// The embedded default: a ball on a meadow keeps its looks, and moves more when asked to.
#[test]
fn the_default_model_moves_a_picture() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/genvideo-tiny-i2v");
    let model = VideoModel::load(&folder, &compute(), &mut |_| ControlFlow::Continue(())).unwrap();
    let ball = RgbImage::from_fn(128, 128, |x, y| {
        match (x.abs_diff(64).pow(2) + y.abs_diff(68).pow(2), y) {
            (..1600, _) => Rgb([220, 40, 30]),
            (_, 90..) => Rgb([60, 170, 60]),
            _ => Rgb([120, 190, 240]),
        }
    });
    let motion_of = |motion: u32| {
        let frames = 14;
        let (guidance, size) = (1.15, 128);
        let request = VideoRequest {
            image: ball.clone(),
            frames,
            width: size,
            height: size,
            steps: 3,
            fps: 7,
            motion,
            noise_aug: 0.02,
            min_guidance: guidance,
            max_guidance: guidance,
            decode_chunk: frames,
            tiling: None,
            seed: 1,
            run: 0,
        };
        let clip = model.animate(&request, &mut |_| ControlFlow::Continue(())).unwrap().frames;
        let likeness = difference(&clip[0], &ball);
        assert!(likeness < 16.0, "the first frame is off by {likeness} of 255");
        let steps = clip.windows(2).map(|pair| difference(&pair[0], &pair[1]));
        steps.sum::<f64>() / f64::from(frames - 1)
    };
    let (little, much) = (motion_of(10), motion_of(200));
    println!("motion {little} and {much}");
    assert!(little > 0.2 && much > 1.5 * little, "motion {little} and {much} of 255");
}

/// Mean absolute difference of two pictures, 0 to 255.
fn difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let sum: f64 = a.iter().zip(b.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.len() as f64
}
