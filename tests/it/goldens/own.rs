//! Numbers of our own, for the shipped models: LoRAs, weighted and long prompts, a batch, torch's noise.
//! `scripts/goldens.py own` wrote them, with the versions its header names.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use genvideo::engine::config::Json;
use genvideo::engine::config::scheduler::SchedulerConfig;
use genvideo::engine::config::unet::UnetConfig;
use genvideo::engine::config::vae::VaeConfig;
use genvideo::engine::denoise::{DenoiseState, Moment};
use genvideo::engine::models::unet::{Condition, Unet};
use genvideo::engine::models::vae::Vae;
use genvideo::engine::noise::Stream;
use genvideo::engine::pipelines::stable_diffusion::text::Encoded;
use genvideo::engine::pipelines::stable_diffusion::{Conditions, Guidance, Prompts, Sizes};
use genvideo::engine::prompt::Syntax;
use genvideo::engine::schedule::Schedule;
use genvideo::engine::tiling::Tiling;
use genvideo::engine::weights::{Weights, open_with_loras};
use genvideo::engine::{ImageModel, ImageRequest, LoadOptions, LoraFile, Sampler};

use super::{Run, compute, own_golden, read_json};

const MODELS: [&str; 2] = ["sd1", "xl"];

fn shipped(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens/models").join(model)
}

fn load(model: &str, loras: Vec<LoraFile>) -> ImageModel {
    let options = LoadOptions { loras, ..LoadOptions::default() };
    let mut hook = |_| ControlFlow::Continue(());
    ImageModel::load_with(&shipped(model), &options, &compute(), &mut hook).unwrap()
}

fn own(model: &str, name: &str) -> Run {
    Run::of(&own_golden("runs"), model, name)
}

fn schedule(run: &Run) -> Schedule {
    let mut config = run.settings["scheduler_config"].clone();
    config["_class_name"] = run.settings["scheduler_class"].clone();
    let json = Json::from_value("scheduler_config.json", config).unwrap();
    let config = SchedulerConfig::of(&json).unwrap();
    let (sampler, note) = Sampler::of_config(&config);
    assert_eq!(note, None, "{}", run.name);
    Schedule::new(&config, sampler, 3).unwrap()
}

fn side(run: &Run, key: &str) -> u32 {
    u32::try_from(run.settings[key].as_u64().unwrap()).unwrap()
}

/// The run's texts, within the tolerances of their embeddings.
fn check_prompts(model: &ImageModel, run: &Run, syntax: Syntax) -> Encoded {
    let prompts = Prompts {
        prompt: run.settings["prompt"].as_str().unwrap(),
        negative: run.settings["negative_prompt"].as_str(),
        syntax,
        ..Prompts::default()
    };
    let encoded = model.text().unwrap().encode(&prompts, true).unwrap();
    let negative = encoded.negative.as_ref().unwrap();
    run.check("prompt_embeds", &encoded.positive.embeds);
    run.check("negative_prompt_embeds", &negative.embeds);
    if let (Some(pooled), Some(of_negative)) = (&encoded.positive.pooled, &negative.pooled) {
        run.check("pooled_prompt_embeds", pooled);
        run.check("negative_pooled_prompt_embeds", of_negative);
    }
    encoded
}

/// Every step of the run from its start noise.
fn check_steps(model: &ImageModel, run: &Run, conditions: &Conditions) {
    let schedule = schedule(run);
    let guidance =
        Guidance { scale: run.settings["guidance_scale"].as_f64().unwrap(), rescale: 0.0 };
    let state = DenoiseState::start(run.get("init_latents"), &schedule).unwrap();
    let mut compared = 0;
    let mut watch = |moment: Moment<'_>| {
        if let Moment::After(state) = moment {
            let name = format!("latents.{}", state.step - 1);
            if run.tensors.contains_key(&name) {
                run.check(&name, &state.latents);
            }
            compared += 1;
        }
        ControlFlow::Continue(())
    };
    let mut draw = |step: usize| panic!("step {step} draws");
    let latents =
        model.denoise(state, &schedule, (conditions, guidance), &mut draw, &mut watch).unwrap();
    assert_eq!(compared, 3, "{}", run.name);
    run.check("final_latents", &latents);
}

fn conditions(run: &Run, encoded: Encoded) -> Conditions {
    let whole = Sizes::whole(side(run, "height"), side(run, "width"));
    Conditions::new(encoded, Some([whole, whole]))
}

/// The run's LoRAs as files that end in `ending`.
fn loras(run: &Run, ending: &str) -> Vec<LoraFile> {
    let loras = run.settings["loras"].as_array().unwrap().iter().map(|lora| LoraFile {
        path: own_golden(&format!("loras/{}{ending}", lora["name"].as_str().unwrap())),
        scale: lora["scale"].as_f64().unwrap(),
    });
    loras.collect()
}

#[test]
fn loras_of_every_layout_merge_as_with_peft() {
    for model in MODELS {
        let run = own(model, "lora_two");
        for ending in
            [".kohya.safetensors", ".diffusers.safetensors", ".peft/adapter_model.safetensors"]
        {
            let mut compared = 0;
            for name in run.tensors.keys().filter(|name| name.starts_with("merged.")) {
                let (part, weight) = name["merged.".len()..].split_once('.').unwrap();
                // PEFT's own files hold one part.
                if ending.contains("peft") && part != "unet" {
                    continue;
                }
                let part = ["unet", "text_encoder", "text_encoder_2"]
                    .into_iter()
                    .find(|known| *known == part)
                    .unwrap();
                let folder = shipped(model).join(part);
                let loras = loras(&run, ending);
                let weights = open_with_loras(&folder, part, &loras, &compute()).unwrap();
                let shape = weights.names()[weight].to_vec();
                run.check(name, &weights.get(weight, &shape).unwrap());
                compared += 1;
            }
            assert!(compared > 5, "{model} {ending}: {compared}");
        }
    }
}

#[test]
fn two_loras_at_once_draw_as_with_peft() {
    for model in MODELS {
        let run = own(model, "lora_two");
        let files = loras(&run, ".kohya.safetensors");
        let loaded = load(model, files.clone());
        let conditions = conditions(&run, check_prompts(&loaded, &run, Syntax::Literal));

        let folder = shipped(model).join("unet");
        let weights = open_with_loras(&folder, "unet", &files, &compute()).unwrap();
        let unet = Unet::load(&weights, UnetConfig::read(&folder.join("config.json")).unwrap());
        let schedule = schedule(&run);
        let start = DenoiseState::start(run.get("init_latents"), &schedule).unwrap();
        let x = (start.latents * schedule.input_scale(0)).unwrap();
        let rows = [conditions.negative.as_ref().unwrap(), &conditions.positive];
        let out = unet.unwrap().forward(
            &Tensor::cat(&[&x, &x], 0).unwrap(),
            schedule.timesteps[0],
            &Condition::stack(&rows).unwrap(),
            &mut |_, _| ControlFlow::Continue(()),
        );
        run.check("unet_out.0", &out.unwrap());
        check_steps(&loaded, &run, &conditions);
    }
}

#[test]
fn weighted_and_long_prompts_are_encoded_by_their_definition() {
    for model in MODELS {
        let loaded = load(model, Vec::new());
        let measured = read_json(&own_golden(&format!("runs/{model}/measured.json")));
        let names = measured.as_object().unwrap().keys();
        let names: Vec<&String> =
            names.filter(|name| name.starts_with("weighted") || name.starts_with("long")).collect();
        assert!(names.len() >= 5, "{model}: {names:?}");
        for name in names {
            let run = own(model, name);
            let encoded = check_prompts(&loaded, &run, Syntax::Weighted);
            assert_eq!(encoded.tokens, side(&run, "tokens"), "{}", run.name);
            assert_eq!(encoded.tokens_cut, 0, "{}", run.name);
            let chunks = side(&run, "chunks") as usize;
            assert_eq!(encoded.positive.embeds.dim(1).unwrap(), 77 * chunks, "{}", run.name);
            check_steps(&loaded, &run, &conditions(&run, encoded));
        }
    }
}

#[test]
fn each_picture_of_a_batch_is_the_one_its_seed_gives() {
    for model in MODELS {
        let run = own(model, "batch_three");
        let loaded = load(model, Vec::new());
        let seeds: Vec<u64> = serde_json::from_value(run.settings["seeds"].clone()).unwrap();
        let (width, height) = (side(&run, "width"), side(&run, "height"));
        let base = ImageRequest {
            prompt: run.settings["prompt"].as_str().unwrap().to_owned(),
            negative: run.settings["negative_prompt"].as_str().map(str::to_owned),
            width,
            height,
            steps: 3,
            guidance: run.settings["guidance_scale"].as_f64().unwrap(),
            seed: seeds[0],
            batch: 3,
            ..ImageRequest::default()
        };
        let sampler = if model == "sd1" { "ddim" } else { "euler" };
        let base = ImageRequest { sampler: Some(sampler.parse().unwrap()), ..base };
        let draw = |request: &ImageRequest| {
            loaded.generate(request, &mut |_| ControlFlow::Continue(())).unwrap().images
        };
        let images = draw(&base);
        for ((place, seed), image) in seeds.iter().enumerate().zip(&images) {
            let alone = draw(&ImageRequest { seed: *seed, batch: 1, ..base.clone() });
            assert_eq!(image, &alone[0], "{} {seed}", run.name);

            let shape = (1, 4, height as usize / 8, width as usize / 8);
            let noise = Stream::torch(*seed).tensor(shape, &Device::Cpu).unwrap();
            let wanted = run.get("init_latents").narrow(0, place, 1).unwrap();
            assert_eq!(super::largest_difference(&noise, &wanted), 0.0, "{} {seed}", run.name);

            let shape = (1, height as usize, width as usize, 3);
            let got = Tensor::from_vec(image.as_raw().clone(), shape, &Device::Cpu).unwrap();
            let wanted = run.get("image_u8").to_device(&Device::Cpu).unwrap();
            let wanted = wanted.narrow(0, place, 1).unwrap();
            assert!(super::largest_difference(&got, &wanted) <= 1.0, "{} {seed}", run.name);
            let differ = got.ne(&wanted).unwrap().to_dtype(DType::F64).unwrap();
            let differ = differ.mean_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(differ < 0.002, "{} {seed}: {differ}", run.name);
        }
    }
}

/// Not only to an ulp: to the last bit.
#[test]
fn a_seed_draws_torchs_numbers_to_the_last_bit() {
    let file = own_golden("noise.safetensors");
    let draws = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let mut seeds: Vec<u64> = draws.keys().map(|name| seed_of(name).0).collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert!(seeds.len() >= 8);
    for seed in seeds {
        let mut stream = Stream::torch(seed);
        let of_seed = (0..).map_while(|place| draws.get(&format!("{seed}.{place}")));
        for (place, wanted) in of_seed.enumerate() {
            let wanted: Vec<f32> = wanted.flatten_all().unwrap().to_vec1().unwrap();
            let got = stream.normal(wanted.len());
            for (index, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                assert_eq!(
                    got.to_bits(),
                    wanted.to_bits(),
                    "seed {seed}, draw {place}, number {index}: {got}, torch {wanted}"
                );
            }
        }
    }
}

fn seed_of(name: &str) -> (u64, usize) {
    let (seed, place) = name.split_once('.').unwrap();
    (seed.parse().unwrap(), place.parse().unwrap())
}

#[test]
fn tiles_are_cut_and_blended_as_in_diffusers() {
    let run = own("sd1", "vae_tiles");
    let folder = shipped("sd1").join("vae");
    let config = VaeConfig::read(&folder.join("config.json")).unwrap();
    let tiling = Tiling::of(config.sample_size, config.factor());
    assert_eq!(tiling.side, side(&run, "tile_latent_min_size") as usize);
    assert_eq!(Some(tiling.overlap), run.settings["tile_overlap_factor"].as_f64());
    let vae = Vae::load(&Weights::open(&folder, &compute()).unwrap(), config).unwrap();
    let mut pulse = || ControlFlow::Continue(());
    let latents = run.get("init_latents");
    let tiled = vae.decode_tiled(latents, tiling, &mut pulse).unwrap();
    run.check("decoded_tiled", &tiled);
    // Seams are as visible as those of diffusers, no more.
    let whole = vae.decode(latents, &mut pulse).unwrap();
    let seam = super::largest_difference(&tiled, &whole);
    let wanted = run.settings["seam_max_abs"].as_f64().unwrap();
    assert!((seam - wanted).abs() < 1e-3, "{seam}, diffusers {wanted}");
}
