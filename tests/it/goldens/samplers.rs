//! Scheduler settings that no model of the goldens has: `tests/fixtures/samplers/samplers.py` wrote the numbers.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use genvideo::engine::config::Json;
use genvideo::engine::config::scheduler::SchedulerConfig;
use genvideo::engine::denoise::{DenoiseState, Moment, Pulse, denoise};
use genvideo::engine::schedule::Schedule;
use genvideo::engine::{Error, Sampler};
use serde_json::Value;

use super::largest_difference;

/// Over the largest number of a run so far.
const TOLERANCE: f64 = 1e-5;

fn tensor(numbers: &Value, shape: &[usize]) -> Tensor {
    let numbers: Vec<f64> = serde_json::from_value(numbers.clone()).unwrap();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

/// The network of the script.
fn network(x: &Tensor, timestep: f64, _: &mut Pulse<'_>) -> Result<Tensor, Error> {
    Ok(((x * 1.7)?.sin()? + timestep / 1000.0)?)
}

#[test]
fn every_setting_of_a_scheduler_steps_as_in_diffusers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/samplers/samplers.json");
    let written: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let shape: Vec<usize> = serde_json::from_value(written["shape"].clone()).unwrap();
    for case in written["cases"].as_array().unwrap() {
        let mut config = case["config"].clone();
        config["_class_name"] = case["class"].clone();
        let about = format!("{config} {} steps", case["steps"]);
        let json = Json::from_value("scheduler_config.json", config).unwrap();
        let config = SchedulerConfig::of(&json).unwrap();
        let (sampler, note) = Sampler::of_config(&config);
        assert_eq!(note, None, "{about}");
        let steps = usize::try_from(case["steps"].as_u64().unwrap()).unwrap();
        let schedule = Schedule::new(&config, sampler, steps).unwrap();
        let schedule = schedule.with_eta(case["eta"].as_f64().unwrap());

        let mut seen = Vec::new();
        let mut watch = |moment: Moment<'_>| {
            if let Moment::After(state) = moment {
                seen.push(state.latents.clone());
            }
            ControlFlow::Continue(())
        };
        let mut draw = |step: usize| Ok(tensor(&case["noise"][step], &shape));
        let state = DenoiseState::start(&tensor(&case["start"], &shape), &schedule).unwrap();
        denoise(state, &schedule, &mut network, &mut draw, &mut watch).unwrap();
        let wanted = case["latents"].as_array().unwrap();
        assert_eq!(seen.len(), wanted.len(), "{about}");
        // What a step starts from is rounded too, and can be thousands of times what it ends with.
        let size = |x: &Tensor| largest_difference(x, &x.zeros_like().unwrap());
        let mut largest = schedule.init_noise_sigma.max(1.0);
        for (step, (got, wanted)) in seen.iter().zip(wanted).enumerate() {
            let wanted = tensor(wanted, &shape);
            largest = largest.max(size(&wanted));
            let off = largest_difference(got, &wanted);
            assert!(
                off <= TOLERANCE * largest,
                "{about}, step {step}: off by {off:.2e} of {largest:.2}"
            );
        }
    }
}
