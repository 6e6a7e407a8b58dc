//! Tables of a noise schedule: betas, signal shares, sigmas, and which training steps a run visits.

use crate::engine::config::scheduler::{Betas, SchedulerConfig, Spacing};

/// Curvature of the Karras sigmas (Karras et al. 2022, equation 5).
const KARRAS_RHO: f64 = 7.0;

/// The share of signal variance left after each training step: the running product of `1 - beta`.
///
/// Multiplied in f64 and kept with the digits of f32, which is all that diffusers' tables have.
#[expect(clippy::cast_possible_truncation, reason = "f32 is the wanted precision")]
pub fn signal_shares(config: &SchedulerConfig) -> Vec<f64> {
    let mut share = 1.0;
    let mut shares: Vec<f64> = betas(config)
        .into_iter()
        .map(|beta| {
            share *= 1.0 - beta;
            share
        })
        .collect();
    if config.zero_snr {
        rescale_to_zero(&mut shares);
    }
    shares.into_iter().map(|share| f64::from(share as f32)).collect()
}

fn betas(config: &SchedulerConfig) -> Vec<f64> {
    let count = config.train_steps;
    match &config.betas {
        Betas::Linear(start, end) => linspace(*start, *end, count),
        Betas::ScaledLinear(start, end) => {
            linspace(start.sqrt(), end.sqrt(), count).into_iter().map(|root| root * root).collect()
        }
        Betas::SquaredCosine => {
            let left =
                |part: f64| ((part + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
            let beta = |step: usize| {
                let (now, next) = (step as f64 / count as f64, (step + 1) as f64 / count as f64);
                (1.0 - left(next) / left(now)).min(0.999)
            };
            (0..count).map(beta).collect()
        }
        Betas::Given(betas) => betas.clone(),
    }
}

/// Shifts and scales the roots so that the last share is zero and the first stays (Lin et al. 2024, algorithm 1).
fn rescale_to_zero(shares: &mut [f64]) {
    let (Some(first), Some(last)) =
        (shares.first().map(|s| s.sqrt()), shares.last().map(|s| s.sqrt()))
    else {
        return;
    };
    for share in shares.iter_mut() {
        *share = ((share.sqrt() - last) * first / (first - last)).powi(2);
    }
}

/// Noise over signal of each training step.
pub(super) fn sigma_table(config: &SchedulerConfig) -> Vec<f64> {
    let mut shares = signal_shares(config);
    if config.zero_snr
        && let Some(last) = shares.last_mut()
    {
        // Pure noise has no finite sigma: diffusers takes this instead.
        *last = 2f64.powi(-24);
    }
    shares.into_iter().map(|share| ((1.0 - share) / share).sqrt()).collect()
}

/// Timesteps of a run, most noise first.
pub(super) fn spread(config: &SchedulerConfig, spacing: Spacing, steps: usize) -> Vec<f64> {
    let (train, offset) = (config.train_steps, config.steps_offset);
    match spacing {
        Spacing::Leading => {
            let stride = train / steps;
            (0..steps).rev().map(|step| (step * stride + offset).min(train - 1) as f64).collect()
        }
        Spacing::Trailing => {
            let stride = train as f64 / steps as f64;
            (0..steps)
                .map(|step| (train as f64 - step as f64 * stride).round_ties_even() - 1.0)
                .collect()
        }
        Spacing::Linspace => linspace(0.0, (train - 1) as f64, steps).into_iter().rev().collect(),
    }
}

/// Whole timesteps of a multistep solver, which leaves out the one without noise.
pub(super) fn spread_above_zero(
    config: &SchedulerConfig,
    spacing: Spacing,
    steps: usize,
) -> Vec<f64> {
    let (train, offset) = (config.train_steps, config.steps_offset);
    match spacing {
        Spacing::Leading => {
            let stride = train / (steps + 1);
            (1..=steps).rev().map(|step| (step * stride + offset).min(train - 1) as f64).collect()
        }
        Spacing::Trailing => spread(config, spacing, steps),
        Spacing::Linspace => linspace(0.0, (train - 1) as f64, steps + 1)
            .into_iter()
            .skip(1)
            .rev()
            .map(f64::round_ties_even)
            .collect(),
    }
}

/// Timesteps of a latent consistency model: every n-th of those it was distilled from.
pub(super) fn spread_distilled(config: &SchedulerConfig, steps: usize) -> Vec<f64> {
    let originals = config.original_steps;
    let (stride, pace) = (config.train_steps / originals, originals as f64 / steps as f64);
    (0..steps)
        .map(|step| ((originals - index_of((step as f64 * pace).floor())) * stride - 1) as f64)
        .collect()
}

/// Karras et al. 2022, equation 5.
pub(super) fn karras_sigmas(low: f64, high: f64, steps: usize) -> Vec<f64> {
    let (low, high) = (low.powf(1.0 / KARRAS_RHO), high.powf(1.0 / KARRAS_RHO));
    linspace(0.0, 1.0, steps)
        .into_iter()
        .map(|part| (high + part * (low - high)).powf(KARRAS_RHO))
        .collect()
}

/// The fractional timestep whose sigma is `sigma`, by its logarithm.
pub(super) fn timestep_of(table: &[f64], sigma: f64) -> f64 {
    let wanted = sigma.max(1e-10).ln();
    let low = table
        .partition_point(|entry| entry.ln() <= wanted)
        .saturating_sub(1)
        .min(table.len().saturating_sub(2));
    let high = (low + 1).min(table.len() - 1);
    let (below, above) = (table[low].ln(), table[high].ln());
    let weight =
        if above > below { ((wanted - below) / (above - below)).clamp(0.0, 1.0) } else { 0.0 };
    low as f64 + weight
}

/// The table's value between two entries.
pub(super) fn interpolate(table: &[f64], place: f64) -> f64 {
    let low = index_of(place.floor()).min(table.len() - 1);
    let high = (low + 1).min(table.len() - 1);
    let part = place - low as f64;
    if part <= 0.0 { table[low] } else { table[low] + (table[high] - table[low]) * part }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "whole, not negative, below 100,000"
)]
pub(super) fn index_of(timestep: f64) -> usize {
    timestep.max(0.0) as usize
}

pub(super) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    let last = count.saturating_sub(1).max(1) as f64;
    (0..count).map(|index| start + (end - start) * (index as f64 / last)).collect()
}
