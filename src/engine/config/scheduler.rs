//! `scheduler/scheduler_config.json`: the noise schedule a model was trained on.

use std::path::Path;

use serde_json::{Value, json};

use super::Json;
use crate::engine::Result;

/// Scheduler classes of a diffusers folder that the noise schedule fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchedulerClass {
    /// `DDIMScheduler`.
    Ddim,
    /// `EulerDiscreteScheduler`.
    Euler,
    /// `EulerAncestralDiscreteScheduler`.
    EulerAncestral,
    /// `DPMSolverMultistepScheduler`.
    DpmMultistep,
    /// `UniPCMultistepScheduler`.
    UniPc,
    /// `PNDMScheduler`.
    Pndm,
    /// `LCMScheduler`.
    Lcm,
    /// A class with the same noise schedule and steps of its own, by its name.
    Other(&'static str),
}

/// Classes that are sampled as they ask, by name.
const CLASSES: &[(&str, SchedulerClass)] = &[
    ("DDIMScheduler", SchedulerClass::Ddim),
    ("EulerDiscreteScheduler", SchedulerClass::Euler),
    ("EulerAncestralDiscreteScheduler", SchedulerClass::EulerAncestral),
    ("DPMSolverMultistepScheduler", SchedulerClass::DpmMultistep),
    ("UniPCMultistepScheduler", SchedulerClass::UniPc),
    ("PNDMScheduler", SchedulerClass::Pndm),
    ("LCMScheduler", SchedulerClass::Lcm),
];

/// Classes whose models DDIM can run.
const RELATED: &[&str] = &[
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DDPMScheduler",
];

/// How beta grows over the training steps.
#[derive(Clone, Debug, PartialEq)]
pub enum Betas {
    /// Evenly from start to end.
    Linear(f64, f64),
    /// The square root evenly from start to end.
    ScaledLinear(f64, f64),
    /// From the squared cosine of the remaining signal.
    SquaredCosine,
    /// Given one by one.
    Given(Vec<f64>),
}

/// How the steps of a run are spread over the training steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// Every n-th from the first.
    Leading,
    /// Every n-th from the last.
    Trailing,
    /// Evenly, both ends included.
    Linspace,
}

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity between signal and noise.
    Velocity,
    /// The clean latents.
    Sample,
}

/// A noise schedule with the preferences of the model's own scheduler.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// The class in the file.
    pub class: SchedulerClass,
    /// Number of training steps.
    pub train_steps: usize,
    /// Betas of the training steps.
    pub betas: Betas,
    /// What the network predicts.
    pub prediction: Prediction,
    /// Spread of a run's steps; without one each sampler takes its own.
    pub spacing: Option<Spacing>,
    /// Added to each timestep of the leading spread.
    pub steps_offset: usize,
    /// Whether the step before the first counts as free of noise (DDIM, PNDM).
    pub set_alpha_to_one: bool,
    /// Limit of the clean latents (DDIM, LCM).
    pub clip: Option<f64>,
    /// Whether the last training step is pure noise.
    pub zero_snr: bool,
    /// Whether the class's own sampler takes sigmas of Karras et al.
    pub karras: bool,
    /// Smallest Karras sigma, if not the schedule's own.
    pub sigma_min: Option<f64>,
    /// Largest Karras sigma, if not the schedule's own.
    pub sigma_max: Option<f64>,
    /// Whether the network is told `ln(sigma) / 4` (Euler).
    pub continuous: bool,
    /// Whether the last sigma is zero, rather than the schedule's smallest.
    pub final_sigma_zero: bool,
    /// Preferences of the multistep solvers.
    pub multistep: Multistep,
    /// Whether PNDM starts without Runge-Kutta steps.
    pub skip_prk_steps: bool,
    /// Steps that an LCM was distilled from.
    pub original_steps: usize,
    /// Factor of the timestep in an LCM's boundary condition.
    pub timestep_scaling: f64,
}

/// Preferences of the multistep solvers DPM-Solver++ and UniPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Multistep {
    /// Whether the class's own sampler adds fresh noise (DPM-Solver++ SDE).
    pub stochastic: bool,
    /// Predictions a step looks at: 1 or 2.
    pub order: usize,
    /// Whether a short run ends with a step of the first order.
    pub lower_order_final: bool,
    /// Whether every run ends with one (DPM-Solver++).
    pub euler_at_final: bool,
    /// Whether the second order is Heun's, rather than the midpoint's (DPM-Solver++).
    pub heun: bool,
    /// Whether the step width stands in for its exponential (UniPC `bh1`).
    pub bh1: bool,
}

impl SchedulerConfig {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(&Json::read(path)?)
    }

    /// Checks an object that is in memory.
    pub fn of(json: &Json) -> Result<Self> {
        let class = class(json)?;
        json.only("thresholding", &[json!(false)])?;
        for key in
            ["use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas"]
        {
            json.only(key, &[json!(false)])?;
        }
        json.only("interpolation_type", &[json!("linear")])?;
        json.only("timestep_type", &[json!("discrete"), json!("continuous")])?;
        json.only("final_sigmas_type", &[json!("zero"), json!("sigma_min")])?;
        let train_steps = json.size("num_train_timesteps", Some(1000), 1..=100_000)?;
        let sigma =
            |key: &str| json.value(key).map(|_| json.float(key, None, 1e-6..=1e6)).transpose();
        let config = Self {
            class,
            train_steps,
            betas: betas(json, train_steps)?,
            prediction: prediction(json)?,
            spacing: spacing(json)?,
            steps_offset: json.size("steps_offset", Some(0), 0..=train_steps - 1)?,
            set_alpha_to_one: json.flag("set_alpha_to_one", class != SchedulerClass::Pndm)?,
            clip: clip(json, class)?,
            zero_snr: json.flag("rescale_betas_zero_snr", false)?,
            karras: json.flag("use_karras_sigmas", false)?,
            sigma_min: sigma("sigma_min")?,
            sigma_max: sigma("sigma_max")?,
            continuous: json.text("timestep_type")? == Some("continuous"),
            final_sigma_zero: json.text("final_sigmas_type")?.unwrap_or("zero") == "zero",
            multistep: multistep(json, class)?,
            skip_prk_steps: json.flag("skip_prk_steps", false)?,
            original_steps: json.size("original_inference_steps", Some(50), 1..=train_steps)?,
            timestep_scaling: json.float("timestep_scaling", Some(10.0), 1e-3..=1e6)?,
        };
        if let (Some(low), Some(high)) = (config.sigma_min, config.sigma_max)
            && low >= high
        {
            return Err(
                json.senseless("sigma_min", format!("less than `sigma_max`, which is {high}"))
            );
        }
        Ok(config)
    }
}

fn class(json: &Json) -> Result<SchedulerClass> {
    let Some(name) = json.text("_class_name")? else {
        return Err(json.unsupported("_class_name", "the name of a scheduler"));
    };
    let related = RELATED.iter().map(|name| (*name, SchedulerClass::Other(name)));
    CLASSES
        .iter()
        .copied()
        .chain(related)
        .find(|(known, _)| *known == name)
        .map(|(_, class)| class)
        .ok_or_else(|| json.unsupported("_class_name", "a scheduler of Stable Diffusion"))
}

/// The two multistep classes share key names with others, which mean something else there.
fn multistep(json: &Json, class: SchedulerClass) -> Result<Multistep> {
    let plain = Multistep {
        stochastic: false,
        order: 2,
        lower_order_final: true,
        euler_at_final: false,
        heun: false,
        bh1: false,
    };
    if !matches!(class, SchedulerClass::DpmMultistep | SchedulerClass::UniPc) {
        return Ok(plain);
    }
    json.only("predict_x0", &[json!(true)])?;
    json.only("disable_corrector", &[json!([])])?;
    json.only("solver_p", &[])?;
    let algorithms = ["dpmsolver++", "sde-dpmsolver++", "deis"];
    json.only("algorithm_type", &algorithms.map(Value::from))?;
    json.only("solver_order", &[json!(1), json!(2)])?;
    // Each class takes the other's solver types for its own default.
    let solvers = ["midpoint", "heun", "bh1", "bh2", "logrho"];
    json.only("solver_type", &solvers.map(Value::from))?;
    let solver = json.text("solver_type")?;
    Ok(Multistep {
        stochastic: json.text("algorithm_type")? == Some("sde-dpmsolver++"),
        order: json.size("solver_order", Some(2), 1..=2)?,
        lower_order_final: json.flag("lower_order_final", true)?,
        euler_at_final: json.flag("euler_at_final", false)?,
        heun: solver == Some("heun") && class == SchedulerClass::DpmMultistep,
        bh1: solver == Some("bh1") && class == SchedulerClass::UniPc,
    })
}

fn betas(json: &Json, train_steps: usize) -> Result<Betas> {
    if let Some(Value::Array(list)) = json.value("trained_betas") {
        let given: Option<Vec<f64>> = list.iter().map(Value::as_f64).collect();
        return match given {
            Some(given)
                if given.len() == train_steps
                    && given.iter().all(|beta| (0.0..1.0).contains(beta)) =>
            {
                Ok(Betas::Given(given))
            }
            _ => Err(json.senseless("trained_betas", format!("{train_steps} numbers from 0 to 1"))),
        };
    }
    json.only("trained_betas", &[])?;
    let range = 0.0..=0.999_999;
    let start = json.float("beta_start", Some(0.0001), range.clone())?;
    let end = json.float("beta_end", Some(0.02), range)?;
    match json.text("beta_schedule")?.unwrap_or("linear") {
        "linear" => Ok(Betas::Linear(start, end)),
        "scaled_linear" => Ok(Betas::ScaledLinear(start, end)),
        "squaredcos_cap_v2" => Ok(Betas::SquaredCosine),
        _ => {
            Err(json
                .unsupported("beta_schedule", "`linear`, `scaled_linear` or `squaredcos_cap_v2`"))
        }
    }
}

fn prediction(json: &Json) -> Result<Prediction> {
    match json.text("prediction_type")?.unwrap_or("epsilon") {
        "epsilon" => Ok(Prediction::Epsilon),
        "v_prediction" => Ok(Prediction::Velocity),
        "sample" => Ok(Prediction::Sample),
        _ => Err(json.unsupported("prediction_type", "`epsilon`, `v_prediction` or `sample`")),
    }
}

fn spacing(json: &Json) -> Result<Option<Spacing>> {
    match json.text("timestep_spacing")? {
        Some("leading") => Ok(Some(Spacing::Leading)),
        Some("trailing") => Ok(Some(Spacing::Trailing)),
        Some("linspace") => Ok(Some(Spacing::Linspace)),
        Some(_) => Err(json.unsupported("timestep_spacing", "`leading`, `trailing` or `linspace`")),
        None => Ok(None),
    }
}

/// Only two classes clip, and they do unless told not to.
fn clip(json: &Json, class: SchedulerClass) -> Result<Option<f64>> {
    let clips = matches!(class, SchedulerClass::Ddim | SchedulerClass::Other("DDPMScheduler"));
    let range = json.float("clip_sample_range", Some(1.0), 1e-3..=1e6)?;
    Ok(json.flag("clip_sample", clips)?.then_some(range))
}
