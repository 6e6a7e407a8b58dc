//! The steps of a run: what the network is told, and the noise before and after each step.
//!
//! A [`Schedule`] is all a sampler needs to know about a model's scheduler. Its tables (in `tables`) are computed in
//! f64 and follow diffusers 0.42.

mod tables;

use candle_core::Tensor;

use super::config::scheduler::{Multistep, Prediction, SchedulerConfig, Spacing};
use super::sampler::Sampler;
use super::{Error, Result};
pub use tables::signal_shares;
use tables::{
    index_of, interpolate, karras_sigmas, sigma_table, spread, spread_above_zero, spread_distilled,
    timestep_of,
};

/// Most steps of a run.
pub const MAX_STEPS: usize = 1000;

/// Noise round one step: by the solver, either the share of signal variance or noise over signal (sigma).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// Before the step.
    pub now: f64,
    /// After the step.
    pub next: f64,
}

/// How a step is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Solver {
    /// Denoising diffusion implicit models, over signal shares.
    Ddim {
        /// Part of the noise that is drawn anew: 0 is none, 1 as much as in training.
        eta: f64,
    },
    /// Pseudo linear multistep, over signal shares.
    Plms,
    /// Latent consistency, over signal shares.
    Lcm {
        /// Factor of the timestep in the boundary condition.
        scaling: f64,
    },
    /// Euler, over sigmas.
    Euler,
    /// Euler with fresh noise in each step, over sigmas.
    EulerAncestral,
    /// DPM-Solver++, over sigmas of latents whose variance is kept.
    Dpm(Multistep),
    /// UniPC, over sigmas of latents whose variance is kept.
    UniPc(Multistep),
}

/// The steps of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// What the network is told before each step.
    pub timesteps: Vec<f64>,
    /// Noise round each step.
    pub levels: Vec<Level>,
    /// How a step is made.
    pub solver: Solver,
    /// Standard deviation of the first latents.
    pub init_noise_sigma: f64,
    /// What the network predicts.
    pub prediction: Prediction,
    /// Limit of the clean latents (DDIM, LCM).
    pub clip: Option<f64>,
}

impl Schedule {
    /// The schedule of `steps` steps of `sampler` over the model's noise schedule.
    pub fn new(config: &SchedulerConfig, sampler: Sampler, steps: usize) -> Result<Self> {
        let most = most_steps(config, sampler);
        if !(1..=most).contains(&steps) {
            return Err(Error::Request {
                field: "steps",
                value: steps.to_string(),
                wanted: format!("1 to {most} with `{sampler}`"),
            });
        }
        let blind = matches!(
            sampler,
            Sampler::Euler | Sampler::EulerKarras | Sampler::EulerA | Sampler::Pndm
        );
        if config.prediction == Prediction::Sample && blind {
            return Err(Error::Request {
                field: "sampler",
                value: format!("`{sampler}`"),
                wanted: "`ddim` for a model that predicts the sample".into(),
            });
        }
        let dpm = |stochastic| Solver::Dpm(Multistep { stochastic, ..config.multistep });
        let unipc = Solver::UniPc(config.multistep);
        Ok(match sampler {
            Sampler::Ddim => ddim(config, steps),
            Sampler::Pndm => plms(config, steps),
            Sampler::Lcm => lcm(config, steps),
            Sampler::Euler => euler(config, steps, false),
            Sampler::EulerKarras => euler(config, steps, true),
            Sampler::EulerA => euler_ancestral(config, steps),
            Sampler::Dpmpp2m => multistep(config, steps, false, dpm(false)),
            Sampler::Dpmpp2mKarras => multistep(config, steps, true, dpm(false)),
            Sampler::Dpmpp2mSde => multistep(config, steps, false, dpm(true)),
            Sampler::Dpmpp2mSdeKarras => multistep(config, steps, true, dpm(true)),
            Sampler::UniPc => multistep(config, steps, false, unipc),
            Sampler::UniPcKarras => multistep(config, steps, true, unipc),
        })
    }

    /// The same steps of DDIM with `eta`, the part of the noise that is drawn anew.
    pub fn with_eta(mut self, eta: f64) -> Self {
        if let Solver::Ddim { eta: own } = &mut self.solver {
            *own = eta;
        }
        self
    }

    /// Number of network calls, which is that of the steps; PNDM makes one more.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// The step a run starts with that changes `strength` of a picture.
    pub fn start(&self, strength: f64) -> usize {
        let doubled = usize::from(self.solver == Solver::Plms && self.steps() > 1);
        let steps = self.steps() - doubled;
        let changed = index_of((steps as f64 * strength).floor()).clamp(1, steps);
        match steps - changed {
            0 => 0,
            // Started in the middle, PNDM has nothing to refine.
            skipped => skipped + doubled,
        }
    }

    /// Factor of the latents before the network sees them at `step`.
    pub fn input_scale(&self, step: usize) -> f64 {
        match self.solver {
            Solver::Euler | Solver::EulerAncestral => {
                let sigma = self.levels[step].now;
                1.0 / (sigma * sigma + 1.0).sqrt()
            }
            _ => 1.0,
        }
    }

    /// Whether `step` adds fresh noise.
    pub fn draws(&self, step: usize) -> bool {
        let next = self.levels[step].next;
        match self.solver {
            Solver::Ddim { eta } => eta > 0.0,
            Solver::Lcm { .. } => next < 1.0,
            Solver::EulerAncestral => next > 0.0,
            Solver::Dpm(options) => options.stochastic && next > 0.0,
            Solver::Plms | Solver::Euler | Solver::UniPc(_) => false,
        }
    }

    /// Clean `latents` with as much of `noise` as there is before `step`.
    pub fn add_noise(&self, step: usize, latents: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let level = self.levels[step].now;
        let (signal, spread) = match self.solver {
            Solver::Euler | Solver::EulerAncestral => (1.0, level),
            Solver::Dpm(_) | Solver::UniPc(_) => signal_and_noise(level),
            Solver::Ddim { .. } | Solver::Plms | Solver::Lcm { .. } => {
                (level.sqrt(), (1.0 - level).sqrt())
            }
        };
        Ok(((latents * signal)? + (noise * spread)?)?)
    }

    /// The sigmas of a run, the last one included; none where the solver goes by signal shares.
    pub fn sigmas(&self) -> Vec<f64> {
        match self.solver {
            Solver::Ddim { .. } | Solver::Plms | Solver::Lcm { .. } => Vec::new(),
            _ => {
                let first = self.levels.first().map(|level| level.now);
                first.into_iter().chain(self.levels.iter().map(|level| level.next)).collect()
            }
        }
    }
}

/// Factors of signal and noise whose squares add up to 1, at `sigma` of noise over signal.
pub fn signal_and_noise(sigma: f64) -> (f64, f64) {
    let signal = 1.0 / (sigma * sigma + 1.0).sqrt();
    (signal, sigma * signal)
}

/// Steps above this would fall together.
fn most_steps(config: &SchedulerConfig, sampler: Sampler) -> usize {
    let distinct = match sampler {
        Sampler::Lcm => config.original_steps,
        Sampler::Ddim | Sampler::Pndm => config.train_steps,
        Sampler::Euler | Sampler::EulerKarras | Sampler::EulerA => config.train_steps,
        _ => config.train_steps - 1,
    };
    MAX_STEPS.min(distinct)
}

/// Denoising diffusion implicit models (Song et al. 2021).
fn ddim(config: &SchedulerConfig, steps: usize) -> Schedule {
    let shares = Shares::of(config);
    let spacing = config.spacing.unwrap_or(Spacing::Leading);
    let mut timesteps = spread(config, spacing, steps);
    // The samplers over sigmas keep the fractions of an even spread.
    timesteps.iter_mut().for_each(|timestep| *timestep = timestep.round_ties_even());
    let stride = (config.train_steps / steps) as f64;
    let level =
        |timestep: &f64| Level { now: shares.at(*timestep), next: shares.at(*timestep - stride) };
    Schedule {
        levels: timesteps.iter().map(level).collect(),
        timesteps,
        solver: Solver::Ddim { eta: 0.0 },
        init_noise_sigma: 1.0,
        prediction: config.prediction,
        clip: config.clip,
    }
}

/// Pseudo linear multistep (Liu et al. 2022) without Runge-Kutta steps: the first step is made twice.
fn plms(config: &SchedulerConfig, steps: usize) -> Schedule {
    let shares = Shares::of(config);
    let stride = (config.train_steps / steps) as f64;
    let once = ddim(config, steps);
    let (mut timesteps, mut levels) = (once.timesteps, once.levels);
    if let Some(second) = timesteps.get(1).copied() {
        timesteps.insert(1, second);
        levels.insert(1, Level { now: shares.at(second + stride), next: shares.at(second) });
    }
    Schedule { timesteps, levels, solver: Solver::Plms, clip: None, ..once }
}

/// Latent consistency models (Luo et al. 2023).
fn lcm(config: &SchedulerConfig, steps: usize) -> Schedule {
    let shares = Shares::of(config);
    let timesteps = spread_distilled(config, steps);
    let level = |step: usize| Level {
        now: shares.at(timesteps[step]),
        // Behind the last step there is no noise, whatever the model's first share.
        next: timesteps.get(step + 1).map_or(1.0, |timestep| shares.at(*timestep)),
    };
    Schedule {
        levels: (0..steps).map(level).collect(),
        timesteps,
        solver: Solver::Lcm { scaling: config.timestep_scaling },
        init_noise_sigma: 1.0,
        prediction: config.prediction,
        clip: config.clip,
    }
}

/// Euler steps over sigmas (Karras et al. 2022).
fn euler(config: &SchedulerConfig, steps: usize, karras: bool) -> Schedule {
    let table = sigma_table(config);
    let spacing = config.spacing.unwrap_or(Spacing::Linspace);
    let mut timesteps = spread(config, spacing, steps);
    let mut sigmas: Vec<f64> =
        timesteps.iter().map(|timestep| interpolate(&table, *timestep)).collect();
    if karras {
        let low = config.sigma_min.unwrap_or(sigmas[steps - 1]);
        let high = config.sigma_max.unwrap_or(sigmas[0]);
        sigmas = karras_sigmas(low, high, steps);
        timesteps = sigmas.iter().map(|sigma| timestep_of(&table, *sigma)).collect();
    }
    if config.continuous && config.prediction == Prediction::Velocity {
        timesteps = sigmas.iter().map(|sigma| 0.25 * sigma.ln()).collect();
    }
    let largest = sigmas.iter().copied().fold(0.0, f64::max);
    let init_noise_sigma = match spacing {
        Spacing::Leading => (largest * largest + 1.0).sqrt(),
        Spacing::Trailing | Spacing::Linspace => largest,
    };
    sigmas.push(if config.final_sigma_zero { 0.0 } else { table[0] });
    Schedule {
        timesteps,
        levels: levels(&sigmas),
        solver: Solver::Euler,
        init_noise_sigma,
        prediction: config.prediction,
        clip: None,
    }
}

/// Euler steps that go below the next sigma and back up with fresh noise; they always end without any.
fn euler_ancestral(config: &SchedulerConfig, steps: usize) -> Schedule {
    let plain = SchedulerConfig { final_sigma_zero: true, continuous: false, ..config.clone() };
    Schedule { solver: Solver::EulerAncestral, ..euler(&plain, steps, false) }
}

/// Sigmas of the multistep solvers. Karras sigmas span the whole table here, and timesteps are whole.
fn multistep(config: &SchedulerConfig, steps: usize, karras: bool, solver: Solver) -> Schedule {
    let table = sigma_table(config);
    let (low, high) = (table[0], table[table.len() - 1]);
    let spacing = config.spacing.unwrap_or(Spacing::Linspace);
    let (timesteps, mut sigmas): (Vec<f64>, Vec<f64>) = if karras {
        let (low, high) = (config.sigma_min.unwrap_or(low), config.sigma_max.unwrap_or(high));
        let sigmas = karras_sigmas(low, high, steps);
        let whole = |sigma: &f64| timestep_of(&table, *sigma).round_ties_even();
        (sigmas.iter().map(whole).collect(), sigmas)
    } else {
        let timesteps = spread_above_zero(config, spacing, steps);
        let sigmas = timesteps.iter().map(|timestep| interpolate(&table, *timestep)).collect();
        (timesteps, sigmas)
    };
    sigmas.push(if config.final_sigma_zero { 0.0 } else { low });
    Schedule {
        timesteps,
        levels: levels(&sigmas),
        solver,
        init_noise_sigma: 1.0,
        prediction: config.prediction,
        clip: None,
    }
}

fn levels(sigmas: &[f64]) -> Vec<Level> {
    sigmas.windows(2).map(|pair| Level { now: pair[0], next: pair[1] }).collect()
}

/// Signal shares by timestep, with the one before the first.
struct Shares {
    table: Vec<f64>,
    before: f64,
}

impl Shares {
    fn of(config: &SchedulerConfig) -> Self {
        let table = signal_shares(config);
        let before = if config.set_alpha_to_one { 1.0 } else { table[0] };
        Self { table, before }
    }

    fn at(&self, timestep: f64) -> f64 {
        if timestep < 0.0 {
            self.before
        } else {
            self.table[index_of(timestep).min(self.table.len() - 1)]
        }
    }
}
