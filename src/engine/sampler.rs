//! The samplers by name, and one step of each: a function of the state, what the network said, and fresh noise.
//!
//! A step has no state of its own: what it must know of earlier steps is in [`DenoiseState::history`], and nothing
//! else is, so that a run can be taken up between any two steps.

mod dpm;
mod single;
mod unipc;

use std::fmt;
use std::str::FromStr;

use candle_core::Tensor;

use super::config::scheduler::{Prediction, SchedulerClass, SchedulerConfig};
use super::denoise::DenoiseState;
use super::schedule::{Schedule, Solver};
use super::{Error, Result};

/// Which way the latents are stepped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampler {
    /// `ddim`.
    Ddim,
    /// `euler`.
    Euler,
    /// `euler_karras`.
    EulerKarras,
    /// `euler_a`: ancestral.
    EulerA,
    /// `dpmpp_2m`.
    Dpmpp2m,
    /// `dpmpp_2m_karras`.
    Dpmpp2mKarras,
    /// `dpmpp_2m_sde`.
    Dpmpp2mSde,
    /// `dpmpp_2m_sde_karras`.
    Dpmpp2mSdeKarras,
    /// `unipc`.
    UniPc,
    /// `unipc_karras`.
    UniPcKarras,
    /// `pndm`.
    Pndm,
    /// `lcm`.
    Lcm,
}

/// Names in requests and results.
const NAMES: &[(Sampler, &str)] = &[
    (Sampler::Ddim, "ddim"),
    (Sampler::Euler, "euler"),
    (Sampler::EulerKarras, "euler_karras"),
    (Sampler::EulerA, "euler_a"),
    (Sampler::Dpmpp2m, "dpmpp_2m"),
    (Sampler::Dpmpp2mKarras, "dpmpp_2m_karras"),
    (Sampler::Dpmpp2mSde, "dpmpp_2m_sde"),
    (Sampler::Dpmpp2mSdeKarras, "dpmpp_2m_sde_karras"),
    (Sampler::UniPc, "unipc"),
    (Sampler::UniPcKarras, "unipc_karras"),
    (Sampler::Pndm, "pndm"),
    (Sampler::Lcm, "lcm"),
];

/// What other programs call them, once case, spaces and plus signs are evened out.
const ALIASES: &[(&str, Sampler)] = &[
    ("euler_ancestral", Sampler::EulerA),
    ("uni_pc", Sampler::UniPc),
    ("uni_pc_karras", Sampler::UniPcKarras),
    ("plms", Sampler::Pndm),
];

impl Sampler {
    /// Every sampler.
    pub const ALL: &'static [Self] = &[
        Self::Ddim,
        Self::Euler,
        Self::EulerKarras,
        Self::EulerA,
        Self::Dpmpp2m,
        Self::Dpmpp2mKarras,
        Self::Dpmpp2mSde,
        Self::Dpmpp2mSdeKarras,
        Self::UniPc,
        Self::UniPcKarras,
        Self::Pndm,
        Self::Lcm,
    ];

    /// The name in requests and results.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(sampler, _)| *sampler == self).map_or("", |(_, name)| name)
    }

    /// What the model's own scheduler stands for, and a note where something else stands in.
    pub fn of_config(config: &SchedulerConfig) -> (Self, Option<String>) {
        let karras = |plain: Self, karras: Self| if config.karras { karras } else { plain };
        let sampler = match config.class {
            SchedulerClass::Ddim => Self::Ddim,
            SchedulerClass::Euler => karras(Self::Euler, Self::EulerKarras),
            SchedulerClass::EulerAncestral => Self::EulerA,
            SchedulerClass::DpmMultistep if config.multistep.stochastic => {
                karras(Self::Dpmpp2mSde, Self::Dpmpp2mSdeKarras)
            }
            SchedulerClass::DpmMultistep => karras(Self::Dpmpp2m, Self::Dpmpp2mKarras),
            SchedulerClass::UniPc => karras(Self::UniPc, Self::UniPcKarras),
            SchedulerClass::Pndm if !config.skip_prk_steps => {
                let note = "the model's `PNDMScheduler` asks for Runge-Kutta steps, which are not built in: \
                            sampled with `pndm` without them";
                return (Self::Pndm, Some(note.into()));
            }
            SchedulerClass::Pndm => Self::Pndm,
            SchedulerClass::Lcm => Self::Lcm,
            SchedulerClass::Other(name) => {
                let note = format!("the model's `{name}` is not built in: sampled with `ddim`");
                return (Self::Ddim, Some(note));
            }
        };
        (sampler, None)
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Sampler {
    type Err = Error;

    /// Takes our names and those of A1111 and ComfyUI: `dpmpp_2m_karras`, `DPM++ 2M Karras`, `Euler a`.
    fn from_str(name: &str) -> Result<Self> {
        let even = name.trim().to_lowercase().replace("++", "pp").replace([' ', '-'], "_");
        let known = NAMES.iter().map(|(sampler, name)| (*name, *sampler));
        let mut all = known.chain(ALIASES.iter().copied());
        all.find(|(name, _)| *name == even).map(|(_, sampler)| sampler).ok_or_else(|| {
            let names: Vec<String> = NAMES.iter().map(|(_, name)| format!("`{name}`")).collect();
            Error::Request {
                field: "sampler",
                value: format!("`{name}`"),
                wanted: names.join(", "),
            }
        })
    }
}

/// The state after the next step, given what the network said; `noise` where [`Schedule::draws`] says so.
pub fn step(
    schedule: &Schedule,
    state: &DenoiseState,
    output: &Tensor,
    noise: Option<&Tensor>,
) -> Result<DenoiseState> {
    let noise = match (schedule.draws(state.step), noise) {
        (false, _) => None,
        (true, Some(noise)) => Some(noise),
        (true, None) => return Err(Error::Internal(format!("step {} has no noise", state.step))),
    };
    let (x, at) = (&state.latents, schedule.levels[state.step]);
    let (latents, history) = match schedule.solver {
        Solver::Ddim { eta } => (single::ddim(schedule, x, output, at, eta, noise)?, Vec::new()),
        Solver::Lcm { scaling } => {
            let timestep = schedule.timesteps[state.step] * scaling;
            (single::lcm(schedule, x, output, at, timestep, noise)?, Vec::new())
        }
        Solver::Euler => (single::euler(x, output, at, schedule.prediction)?, Vec::new()),
        Solver::EulerAncestral => {
            (single::euler_ancestral(x, output, at, schedule.prediction, noise)?, Vec::new())
        }
        Solver::Plms => plms(schedule, state, output)?,
        Solver::Dpm(options) => dpm::step(schedule, state, output, options, noise)?,
        Solver::UniPc(options) => unipc::step(schedule, state, output, options)?,
    };
    Ok(DenoiseState { step: state.step + 1, latents, history })
}

/// The clean latents in `x`, which holds `signal` of them and `noise` of noise.
fn clean(
    prediction: Prediction,
    x: &Tensor,
    output: &Tensor,
    (signal, noise): (f64, f64),
) -> Result<Tensor> {
    Ok(match prediction {
        Prediction::Epsilon => ((x - (output * noise)?)? / signal)?,
        Prediction::Velocity => ((x * signal)? - (output * noise)?)?,
        Prediction::Sample => output.clone(),
    })
}

/// Pseudo linear multistep (Liu et al. 2022, equation 12): Adams-Bashforth over the last four predictions.
///
/// History: the start latents and the first prediction between the two halves of the first step; after that the last
/// three predictions.
fn plms(
    schedule: &Schedule,
    state: &DenoiseState,
    output: &Tensor,
) -> Result<(Tensor, Vec<Tensor>)> {
    let at = schedule.levels[state.step];
    let move_on = |x: &Tensor, mixed: &Tensor| single::transfer(schedule.prediction, x, mixed, at);
    match (state.step, state.history.as_slice()) {
        (0, _) => {
            let latents = move_on(&state.latents, output)?;
            Ok((latents, vec![state.latents.clone(), output.clone()]))
        }
        (1, [start, first]) => {
            Ok((move_on(start, &((output + first)? / 2.0)?)?, vec![first.clone()]))
        }
        (_, known) => {
            let mut all = known.to_vec();
            all.push(output.clone());
            // Newest first.
            let weights: &[f64] = match all.len() {
                1 => &[1.0],
                2 => &[3.0 / 2.0, -1.0 / 2.0],
                3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
                _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
            };
            let mut mixed = (output * weights[0])?;
            for (weight, earlier) in weights.iter().zip(all.iter().rev()).skip(1) {
                mixed = (mixed + (earlier * *weight)?)?;
            }
            let kept = all.split_off(all.len().saturating_sub(3));
            Ok((move_on(&state.latents, &mixed)?, kept))
        }
    }
}
