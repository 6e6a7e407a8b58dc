//! Stable Diffusion 1, 2 and XL against diffusers: every block alone, then whole runs.

use std::collections::HashMap;
use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use genvideo::engine::config::Json;
use genvideo::engine::config::scheduler::SchedulerConfig;
use genvideo::engine::config::unet::UnetConfig;
use genvideo::engine::config::vae::VaeConfig;
use genvideo::engine::denoise::{DenoiseState, Moment, guide, is_guided, rescale_guided};
use genvideo::engine::models::unet::{Added, Condition, Unet};
use genvideo::engine::models::vae::Vae;
use genvideo::engine::pipelines::stable_diffusion::{
    Conditions, Guidance, Prompts, Sizes, to_images,
};
use genvideo::engine::preprocess::vae_pixels;
use genvideo::engine::prompt::Syntax;
use genvideo::engine::sampler;
use genvideo::engine::schedule::{Schedule, Solver};
use genvideo::engine::weights::Weights;
use genvideo::engine::{ImageModel, Sampler};

use super::{Run, compute, golden, json, largest_difference};

const MODELS: [&str; 3] = ["sd1", "sd2", "xl"];

fn run_names(model: &str) -> Vec<String> {
    let measured = json(&format!("runs/{model}/measured.json"));
    measured.as_object().unwrap().keys().filter(|name| *name != "units").cloned().collect()
}

fn load(model: &str) -> ImageModel {
    let mut hook = |_| ControlFlow::Continue(());
    ImageModel::load(&golden(&format!("models/{model}")), &compute(), &mut hook).unwrap()
}

fn weights(model: &str, component: &str) -> Weights {
    Weights::open(&golden(&format!("models/{model}/{component}")), &compute()).unwrap()
}

#[test]
fn every_block_gives_the_numbers_of_diffusers() {
    for model in MODELS {
        let run = Run::open(model, "units");
        let config =
            UnetConfig::read(&golden(&format!("models/{model}/unet/config.json"))).unwrap();
        let unet = Unet::load(&weights(model, "unet"), config).unwrap();
        let timestep = run.get("in.timestep").to_scalar::<f64>().unwrap();
        let mut seen = 0;
        let mut probe = |name: &str, x: &Tensor| {
            run.check(name, x);
            seen += 1;
            ControlFlow::Continue(())
        };
        let condition = Condition {
            text: run.get("in.encoder_hidden_states").clone(),
            added: run.tensors.get("in.text_embeds").map(|pooled| Added {
                pooled: pooled.clone(),
                numbers: numbers(run.get("in.time_ids")),
            }),
        };
        let out = unet.forward(run.get("in.sample"), timestep, &condition, &mut probe).unwrap();
        let inner = run.tensors.keys().filter(|name| {
            ["_block", "conv_in", "_embedding"].iter().any(|part| name.contains(part))
        });
        assert_eq!(seen, inner.count(), "{model}: a block was not shown");
        run.check("out", &out);

        let config = VaeConfig::read(&golden(&format!("models/{model}/vae/config.json"))).unwrap();
        let vae = Vae::load(&weights(model, "vae"), config).unwrap();
        let mut pulse = || ControlFlow::Continue(());
        run.check("vae_moments", &vae.encode_moments(run.get("in.pixels"), &mut pulse).unwrap());
        run.check("vae_decode", &vae.decode(run.get("in.z"), &mut pulse).unwrap());
    }
}

fn numbers(rows: &Tensor) -> Vec<[f64; 6]> {
    let rows: Vec<Vec<f64>> = rows.to_dtype(DType::F64).unwrap().to_vec2().unwrap();
    rows.into_iter().map(|row| row.try_into().unwrap()).collect()
}

#[test]
fn every_run_ends_where_diffusers_ends() {
    for name in MODELS {
        let model = load(name);
        for run in run_names(name) {
            check_run(&model, name, &Run::open(name, &run));
        }
    }
}

fn scheduler(run: &Run) -> SchedulerConfig {
    let mut config = run.settings["scheduler_config"].clone();
    config["_class_name"] = run.settings["scheduler_class"].clone();
    SchedulerConfig::of(&Json::from_value("scheduler_config.json", config).unwrap()).unwrap()
}

fn check_run(model: &ImageModel, name: &str, run: &Run) {
    let number = |key: &str| run.settings[key].as_f64().unwrap_or(0.0);
    let steps = usize::try_from(run.settings["num_inference_steps"].as_u64().unwrap()).unwrap();
    let config = scheduler(run);
    let (sampler, note) = Sampler::of_config(&config);
    assert_eq!(note, None, "{}", run.name);
    // `ddim_4_eta1` asked for noise that its recorded scheduler did not get: its numbers are those without.
    let schedule = Schedule::new(&config, sampler, steps).unwrap();
    let guidance =
        Guidance { scale: number("guidance_scale"), rescale: number("guidance_rescale") };
    let conditions = check_prompts(model, name, run, is_guided(guidance.scale));

    let drawn = check_arithmetic(run, &schedule, guidance);
    let mut draw = |step: usize| Ok(drawn[&step].clone());
    let state = start(model, run, &schedule);
    let first = state.step;
    let mut compared = 0;
    let mut watch = |moment: Moment<'_>| {
        if let Moment::After(state) = moment {
            run.check(&format!("latents.{}", state.step - 1 - first), &state.latents);
            compared += 1;
        }
        ControlFlow::Continue(())
    };
    let latents =
        model.denoise(state, &schedule, (&conditions, guidance), &mut draw, &mut watch).unwrap();
    assert_eq!(compared, schedule.steps() - first, "{}", run.name);
    run.check("final_latents", &latents);

    if run.tensors.contains_key("decoded_raw") {
        let raw = model.decode(&latents, &mut || ControlFlow::Continue(())).unwrap();
        run.check("decoded_raw", &raw);
        if run.tensors.contains_key("image_u8") {
            check_bytes(run, &raw);
        }
    }
}

/// From noise, or from a picture with the encoder's noise and the run's.
fn start(model: &ImageModel, run: &Run, schedule: &Schedule) -> DenoiseState {
    let Some(strength) = run.settings["strength"].as_f64() else {
        return DenoiseState::start(run.get("init_latents"), schedule).unwrap();
    };
    let name = run.settings["image"].as_str().unwrap();
    let (model_name, _) = run.name.split_once('/').unwrap();
    let picture = image::open(golden(&format!("runs/{model_name}/{name}"))).unwrap().into_rgb8();
    let pixels = vae_pixels(&picture, picture.width(), picture.height()).unwrap();
    if run.tensors.contains_key("vae_input") {
        run.check("vae_input", &pixels);
    }
    let pixels = pixels.to_device(compute().device()).unwrap();
    let moments = model.encode_moments(&pixels, &mut || ControlFlow::Continue(())).unwrap();
    run.check("vae_moments", &moments);
    let latents = model.vae().unwrap().sample(&moments, run.get("noise.0")).unwrap();
    let first = schedule.start(strength);
    DenoiseState::start_at(first, &latents, run.get("noise.1"), schedule).unwrap()
}

/// Ids exactly, embeddings within tolerance; they may be stored with another run.
fn check_prompts(model: &ImageModel, name: &str, run: &Run, guided: bool) -> Conditions {
    let text = |key: &str| run.settings[key].as_str();
    let prompts = Prompts {
        prompt: text("prompt").unwrap(),
        prompt2: text("prompt_2"),
        negative: text("negative_prompt"),
        negative2: text("negative_prompt_2"),
        clip_skip: usize::try_from(run.settings["clip_skip"].as_u64().unwrap_or(0)).unwrap(),
        syntax: Syntax::Literal,
    };
    for (index, tokenizer) in model.text().unwrap().tokenizers().enumerate() {
        let which = if index == 0 { "tokenizer" } else { "tokenizer_2" };
        for (role, text) in [
            ("prompt", [Some(prompts.prompt), prompts.prompt2.or(Some(prompts.prompt))][index]),
            // The second negative prompt's ids are not stored: its embeddings are.
            ("negative", prompts.negative),
        ] {
            let ids = format!("ids.{which}.{role}");
            if let Some(wanted) = run.tensors.get(&ids) {
                let wanted = wanted.to_device(&Device::Cpu).unwrap().to_dtype(DType::U32).unwrap();
                let wanted: Vec<u32> = wanted.to_vec1().unwrap();
                let got = tokenizer.encode(text.unwrap_or_default()).unwrap().ids;
                assert_eq!(got, wanted, "{} {ids}", run.name);
            }
        }
    }
    let encoded = model.text().unwrap().encode(&prompts, guided).unwrap();
    let check = |key: &str, got: &Tensor| match run.settings["same_as"][key].as_str() {
        Some(other) => Run::open(name, other).check(key, got),
        None if run.tensors.contains_key(key) => run.check(key, got),
        None => assert!(run.settings["image"].is_string(), "{} has no {key}", run.name),
    };
    check("prompt_embeds", &encoded.positive.embeds);
    if let Some(pooled) = &encoded.positive.pooled {
        check("pooled_prompt_embeds", pooled);
    }
    assert_eq!(encoded.negative.is_some(), guided);
    if let Some(negative) = &encoded.negative {
        check("negative_prompt_embeds", &negative.embeds);
        if let Some(pooled) = &negative.pooled {
            check("negative_pooled_prompt_embeds", pooled);
        }
    }
    Conditions::new(encoded, Some(sizes(run)))
}

/// Sizes of the prompt's row and of the negative prompt's.
fn sizes(run: &Run) -> [Sizes; 2] {
    let pair =
        |key: &str| -> Option<[u32; 2]> { serde_json::from_value(run.settings[key].clone()).ok() };
    let (model, _) = run.name.split_once('/').unwrap();
    let vae = golden(&format!("models/{model}/vae/config.json"));
    let factor = VaeConfig::read(&vae).unwrap().factor();
    let pixels = |axis: usize| {
        let latents = run.get("final_latents").dim(axis).unwrap();
        u32::try_from(latents * factor).unwrap()
    };
    let whole = Sizes::whole(pixels(2), pixels(3));
    let given = |prefix: &str| {
        Some(Sizes {
            original: pair(&format!("{prefix}original_size"))?,
            crop: pair(&format!("{prefix}crops_coords_top_left"))?,
            target: pair(&format!("{prefix}target_size"))?,
        })
    };
    let positive = given("").unwrap_or(whole);
    [positive, given("negative_").unwrap_or(positive)]
}

/// The scheduler alone, fed with what diffusers' network said; the noise that the run drew, by step.
///
/// Only the first and last outputs are stored, so a multistep sampler is fed as long as they go without a gap.
fn check_arithmetic(run: &Run, schedule: &Schedule, guidance: Guidance) -> HashMap<usize, Tensor> {
    if run.settings["image"].is_string() {
        return HashMap::new();
    }
    let wanted: Vec<f64> = run.get("timesteps").to_vec1().unwrap();
    assert_eq!(schedule.timesteps.len(), wanted.len(), "{}", run.name);
    for (got, wanted) in schedule.timesteps.iter().zip(&wanted) {
        assert!((got - wanted).abs() <= 1e-3, "{}: timestep {got}, diffusers {wanted}", run.name);
    }
    let mut drawn = HashMap::new();
    let mut history = Vec::new();
    for step in 0..schedule.steps() {
        if let Some(noise) = run.tensors.get(&format!("noise.{step}")) {
            drawn.insert(step, noise.clone());
        }
        let Some(output) = run.tensors.get(&format!("unet_out.{step}")) else { continue };
        let one_step = matches!(
            schedule.solver,
            Solver::Ddim { .. } | Solver::Lcm { .. } | Solver::Euler | Solver::EulerAncestral
        );
        if step > 2 && !one_step {
            continue;
        }
        let latents = match step {
            0 => (run.get("init_latents") * schedule.init_noise_sigma).unwrap(),
            _ => run.get(&format!("latents.{}", step - 1)).clone(),
        };
        let output = guided(output, latents.dim(0).unwrap(), guidance);
        let state = DenoiseState { step, latents, history };
        let next = sampler::step(schedule, &state, &output, drawn.get(&step)).unwrap();
        let name = format!("latents.{step}");
        let largest = run.measured[&name]["ref_max"].as_f64().unwrap();
        run.check_within(&name, &next.latents, 1e-5 * largest);
        history = next.history;
    }
    drawn
}

fn guided(output: &Tensor, batch: usize, guidance: Guidance) -> Tensor {
    if !is_guided(guidance.scale) {
        return output.clone();
    }
    let (without, with) =
        (output.narrow(0, 0, batch).unwrap(), output.narrow(0, batch, batch).unwrap());
    let guided = guide(&without, &with, guidance.scale).unwrap();
    if guidance.rescale > 0.0 {
        rescale_guided(&guided, &with, guidance.rescale).unwrap()
    } else {
        guided
    }
}

/// Bytes may differ by one where a float lies on the border between two.
fn check_bytes(run: &Run, raw: &Tensor) {
    let image = to_images(raw).unwrap().swap_remove(0);
    let wanted = &run.get("image_u8").to_device(&Device::Cpu).unwrap();
    let shape = wanted.dims().to_vec();
    let got = Tensor::from_vec(image.into_raw(), shape, &Device::Cpu).unwrap();
    assert!(largest_difference(&got, wanted) <= 1.0, "{}", run.name);
    let differ = got.ne(wanted).unwrap().to_dtype(DType::F64).unwrap().mean_all().unwrap();
    assert!(differ.to_scalar::<f64>().unwrap() < 0.002, "{}", run.name);
}
