//! Timesteps and sigmas of many scheduler configs and step counts.

use genvideo::engine::config::Json;
use genvideo::engine::config::scheduler::{SchedulerClass, SchedulerConfig};
use genvideo::engine::schedule::Schedule;
use genvideo::engine::{Error, Sampler};
use serde_json::{Value, json as value};

use super::json;

#[test]
fn tables_are_those_of_diffusers() {
    for entry in json("schedules.json").as_array().unwrap() {
        let config = config_of(&entry["config"], &entry["scheduler_class"]);
        assert!(!matches!(config.class, SchedulerClass::Other(_)), "{}", entry["name"]);
        let (sampler, note) = Sampler::of_config(&config);
        assert_eq!(note, None, "{}", entry["name"]);
        check(entry, &config, sampler);
    }
}

fn config_of(config: &Value, class: &Value) -> SchedulerConfig {
    let mut config = config.clone();
    config["_class_name"] = class.clone();
    SchedulerConfig::of(&Json::from_value("scheduler_config.json", config).unwrap()).unwrap()
}

#[test]
fn a_model_is_sampled_as_its_own_scheduler_asks() {
    for (class, settings, wanted) in [
        ("DDIMScheduler", value!({}), Sampler::Ddim),
        ("EulerDiscreteScheduler", value!({}), Sampler::Euler),
        ("EulerDiscreteScheduler", value!({"use_karras_sigmas": true}), Sampler::EulerKarras),
        ("EulerAncestralDiscreteScheduler", value!({}), Sampler::EulerA),
        ("DPMSolverMultistepScheduler", value!({}), Sampler::Dpmpp2m),
        (
            "DPMSolverMultistepScheduler",
            value!({"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++"}),
            Sampler::Dpmpp2mSdeKarras,
        ),
        ("UniPCMultistepScheduler", value!({"use_karras_sigmas": true}), Sampler::UniPcKarras),
        ("PNDMScheduler", value!({"skip_prk_steps": true}), Sampler::Pndm),
        ("LCMScheduler", value!({}), Sampler::Lcm),
    ] {
        let config = config_of(&settings, &value!(class));
        assert_eq!(Sampler::of_config(&config), (wanted, None), "{class} {settings}");
    }
    for class in ["HeunDiscreteScheduler", "PNDMScheduler"] {
        let (_, note) = Sampler::of_config(&config_of(&value!({}), &value!(class)));
        assert!(note.is_some_and(|note| note.contains(class)), "{class}");
    }
}

#[test]
fn steps_that_would_fall_together_are_refused() {
    let config = config_of(&value!({}), &value!("DDIMScheduler"));
    for (sampler, most) in [(Sampler::Ddim, 1000), (Sampler::Lcm, 50), (Sampler::Dpmpp2m, 999)] {
        assert!(Schedule::new(&config, sampler, most).is_ok(), "{sampler}");
        for steps in [0, most + 1] {
            match Schedule::new(&config, sampler, steps) {
                Err(Error::Request { field: "steps", .. }) => {}
                other => panic!("{sampler} {steps}: {other:?}"),
            }
        }
    }
}

fn check(entry: &Value, config: &SchedulerConfig, sampler: Sampler) {
    let steps = usize::try_from(entry["steps"].as_u64().unwrap()).unwrap();
    let about = format!("{} at {steps} steps", entry["name"]);
    assert!(entry["error"].is_null(), "{about}");
    let schedule = Schedule::new(config, sampler, steps).unwrap();
    let wanted = |key: &str| -> Vec<f64> {
        entry[key].as_array().into_iter().flatten().map(|number| number.as_f64().unwrap()).collect()
    };
    // Whole timesteps exactly; those between two entries come out of diffusers' f32 logarithms.
    let between = sampler == Sampler::EulerKarras && !config.continuous;
    for (got, wanted) in schedule.timesteps.iter().zip(wanted("timesteps")) {
        let tolerance = match (between, wanted.fract() == 0.0) {
            (true, _) => 5e-4,
            (false, true) => 0.0,
            (false, false) => 1e-5 * wanted.abs().max(1.0),
        };
        assert!((got - wanted).abs() <= tolerance, "{about}: timestep {got}, diffusers {wanted}");
    }
    assert_eq!(schedule.timesteps.len(), wanted("timesteps").len(), "{about}");
    let sigmas = schedule.sigmas();
    assert_eq!(sigmas.len(), wanted("sigmas").len(), "{about}");
    for (got, wanted) in sigmas.iter().zip(wanted("sigmas")) {
        assert!((got - wanted).abs() <= 1e-5 * wanted, "{about}: sigma {got}, diffusers {wanted}");
    }
    let first = entry["init_noise_sigma"].as_f64().unwrap();
    assert!((schedule.init_noise_sigma - first).abs() <= 1e-5 * first, "{about}");
}
