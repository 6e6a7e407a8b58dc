//! Samplers against what they must do whatever the network: find a known picture, be taken up anywhere, draw right.

use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use genvideo::engine::config::Json;
use genvideo::engine::config::scheduler::SchedulerConfig;
use genvideo::engine::denoise::{DenoiseState, Moment, Pulse, denoise};
use genvideo::engine::noise::{Purpose, Stream, gaussian};
use genvideo::engine::schedule::{Schedule, Solver, signal_shares};
use genvideo::engine::{Error, Sampler, sampler};
use serde_json::json;

const STEPS: usize = 7;

fn config() -> SchedulerConfig {
    let config = json!({"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "clip_sample": false, "timestep_spacing": "leading", "steps_offset": 1});
    SchedulerConfig::of(&Json::from_value("scheduler_config.json", config).unwrap()).unwrap()
}

fn random(seed: u64) -> Tensor {
    Stream::torch(seed).tensor((1, 4, 6, 8), &Device::Cpu).unwrap()
}

fn draw(step: usize) -> Result<Tensor, Error> {
    let step = u32::try_from(step).unwrap();
    Ok(gaussian(9, Purpose::Step, step, (1, 4, 6, 8), &Device::Cpu)?)
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn check_close(got: &Tensor, wanted: &Tensor, tolerance: f32, about: &str) {
    for (got, wanted) in values(got).into_iter().zip(values(wanted)) {
        assert!((got - wanted).abs() <= tolerance, "{about}: {got}, wanted {wanted}");
    }
}

/// A network that is not linear in its input, so that a wrong order of steps shows.
fn bend(x: &Tensor, timestep: f64, _: &mut Pulse<'_>) -> Result<Tensor, Error> {
    Ok((x.sin()? + (timestep / 1000.0))?)
}

#[test]
fn a_run_can_be_taken_up_after_any_step() {
    for sampler in Sampler::ALL {
        let schedule = Schedule::new(&config(), *sampler, STEPS).unwrap();
        let mut states = Vec::new();
        let mut keep = |moment: Moment<'_>| {
            if let Moment::After(state) = moment {
                states.push(state.clone());
            }
            ControlFlow::Continue(())
        };
        let start = DenoiseState::start(&random(1), &schedule).unwrap();
        let whole = denoise(start, &schedule, &mut bend, &mut draw, &mut keep).unwrap();
        assert_eq!(states.len(), schedule.steps(), "{sampler}");
        for state in states {
            assert!(state.history.len() <= 3, "{sampler} remembers too much");
            let mut unwatched = |_: Moment<'_>| ControlFlow::Continue(());
            let end = denoise(state, &schedule, &mut bend, &mut draw, &mut unwatched).unwrap();
            assert_eq!(values(&end.latents), values(&whole.latents), "{sampler}");
        }
    }
}

/// What a perfect network says: all of the noise between `clean` and the latents it is shown.
fn perfect(
    schedule: &Schedule,
    clean: &Tensor,
    step: usize,
    scaled: &Tensor,
    timestep: f64,
) -> Result<Tensor, Error> {
    let level = schedule.levels[step].now;
    let (signal, noise) = match schedule.solver {
        Solver::Euler | Solver::EulerAncestral => (1.0, level),
        Solver::Dpm(_) | Solver::UniPc(_) => {
            ((1.0 + level * level).sqrt().recip(), level / (1.0 + level * level).sqrt())
        }
        _ => {
            // PNDM's second call is one level further than the step it makes again.
            let index = (0..1000_u16).find(|index| f64::from(*index) == timestep).unwrap();
            let share = signal_shares(&config())[usize::from(index)];
            (share.sqrt(), (1.0 - share).sqrt())
        }
    };
    let x = (scaled / schedule.input_scale(step))?;
    Ok(((x - (clean * signal)?)? / noise)?)
}

#[test]
fn every_sampler_finds_the_picture_of_a_perfect_network_from_any_start() {
    let clean = random(2);
    for sampler in Sampler::ALL {
        let schedule = Schedule::new(&config(), *sampler, STEPS).unwrap();
        for strength in [0.01, 0.3, 0.6, 1.0] {
            let start = schedule.start(strength);
            let about = format!("{sampler} from step {start}");
            let mut step = start;
            let mut model = |x: &Tensor, timestep: f64, _: &mut Pulse<'_>| {
                step += 1;
                perfect(&schedule, &clean, step - 1, x, timestep)
            };
            let state = DenoiseState::start_at(start, &clean, &random(3), &schedule).unwrap();
            let mut unwatched = |_: Moment<'_>| ControlFlow::Continue(());
            let end = denoise(state, &schedule, &mut model, &mut draw, &mut unwatched).unwrap();
            check_close(&end.latents, &clean, 2e-3, &about);
        }
    }
}

#[test]
fn strength_says_how_many_steps_are_made() {
    for (sampler, strength, start) in [
        (Sampler::Ddim, 1.0, 0),
        (Sampler::Ddim, 0.6, 3),
        (Sampler::Ddim, 0.01, 6),
        (Sampler::Pndm, 1.0, 0),
        (Sampler::Pndm, 0.6, 4),
    ] {
        let schedule = Schedule::new(&config(), sampler, STEPS).unwrap();
        assert_eq!(schedule.start(strength), start, "{sampler} {strength}");
    }
}

/// With all noise drawn anew, DDIM is the ancestral sampling of Ho et al. (2020, equations 7 and 11).
#[test]
fn ddim_with_full_noise_is_ancestral_sampling() {
    let schedule = Schedule::new(&config(), Sampler::Ddim, 1000).unwrap().with_eta(1.0);
    for step in [0, 400, 998] {
        let level = schedule.levels[step];
        let (x, eps, noise) = (random(4), random(5), random(6));
        let state = DenoiseState { step, latents: x.clone(), history: Vec::new() };
        let got = sampler::step(&schedule, &state, &eps, Some(&noise)).unwrap().latents;

        let beta = 1.0 - level.now / level.next;
        let removed = (&eps * (beta / (1.0 - level.now).sqrt())).unwrap();
        let mean = ((x - removed).unwrap() / (1.0 - beta).sqrt()).unwrap();
        let spread = (beta * (1.0 - level.next) / (1.0 - level.now)).sqrt();
        let wanted = (mean + (noise * spread).unwrap()).unwrap();
        check_close(&got, &wanted, 1e-4, &format!("step {step}"));
        assert!(sampler::step(&schedule, &state, &eps, None).is_err(), "noise was left out");
    }
}
