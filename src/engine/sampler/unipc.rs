//! UniPC (Zhao et al. 2023): each prediction first corrects the step that led to it, then predicts the next.

use candle_core::Tensor;

use super::clean;
use crate::engine::Result;
use crate::engine::config::scheduler::Multistep;
use crate::engine::denoise::DenoiseState;
use crate::engine::schedule::{Level, Schedule, signal_and_noise};

/// One step. History: the corrected latents of the step before, and the clean latents of the last two, newest last.
pub(super) fn step(
    schedule: &Schedule,
    state: &DenoiseState,
    output: &Tensor,
    options: Multistep,
) -> Result<(Tensor, Vec<Tensor>)> {
    let step = state.step;
    let at = schedule.levels[step];
    let found = clean(schedule.prediction, &state.latents, output, signal_and_noise(at.now))?;
    let (corrected, mut known) = match state.history.split_first() {
        Some((before, known)) => {
            let order = order(schedule, options, step - 1, known.len());
            (correct(schedule, step, (before, known), &found, (order, options))?, known.to_vec())
        }
        None => (state.latents.clone(), Vec::new()),
    };
    known.push(found);
    let known = known.split_off(known.len().saturating_sub(options.order));
    let order = order(schedule, options, step, known.len());

    let span = Span::of(at, options);
    let newest = &known[known.len() - 1];
    let rest = match (order, known.as_slice()) {
        (2.., [.., earlier, newest]) => {
            let slope = ((earlier - newest)? / width_ratio(schedule, step))?;
            Some((slope * 0.5)?)
        }
        _ => None,
    };
    let latents = span.cross(&corrected, newest, rest.as_ref())?;
    Ok((latents, std::iter::once(corrected).chain(known).collect()))
}

/// Order of the step `step` that knows `known` predictions; a run ends as it begins, with the first.
fn order(schedule: &Schedule, options: Multistep, step: usize, known: usize) -> usize {
    let left = if options.lower_order_final { schedule.steps() - step } else { options.order };
    options.order.min(left).min(known)
}

/// The latents before `step` again, now that the network has seen them: from `before`, the latents one step earlier.
fn correct(
    schedule: &Schedule,
    step: usize,
    (before, known): (&Tensor, &[Tensor]),
    found: &Tensor,
    (order, options): (usize, Multistep),
) -> Result<Tensor> {
    let span = Span::of(schedule.levels[step - 1], options);
    let newest = &known[known.len() - 1];
    let change = (found - newest)?;
    let rest = match (order, known) {
        (2.., [.., earlier, newest]) => {
            let ratio = width_ratio(schedule, step - 1);
            let (first, second) = span.moments();
            // The two weights whose sum is `first`, and the moment of which at `ratio` and 1 is `second`.
            let old = (first - second) / (1.0 - ratio);
            let slope = ((earlier - newest)? / ratio)?;
            ((slope * old)? + (change * (first - old))?)?
        }
        _ => (change * 0.5)?,
    };
    span.cross(before, newest, Some(&rest))
}

/// Width of the step before `step` over that of `step`, counted backwards.
fn width_ratio(schedule: &Schedule, step: usize) -> f64 {
    let (before, at) = (schedule.levels[step - 1], schedule.levels[step]);
    -(before.now.ln() - at.now.ln()) / (at.now.ln() - at.next.ln())
}

/// Factors of one step.
struct Span {
    kept: f64,
    signal: f64,
    width: f64,
    growth: f64,
    base: f64,
}

impl Span {
    fn of(at: Level, options: Multistep) -> Self {
        let (_, noise) = signal_and_noise(at.now);
        let (signal, next_noise) = signal_and_noise(at.next);
        let width = at.next.ln() - at.now.ln(); // negative
        let growth = width.exp_m1();
        let base = if options.bh1 { width } else { growth };
        Self { kept: next_noise / noise, signal, width, growth, base }
    }

    /// First and second moment of the weights of a corrector of the second order.
    fn moments(&self) -> (f64, f64) {
        let first = self.growth / self.width - 1.0;
        let second = first / self.width - 0.5;
        (first / self.base, 2.0 * second / self.base)
    }

    /// The step from `x` with the prediction `found` at its start and what is to be added to that.
    fn cross(&self, x: &Tensor, found: &Tensor, rest: Option<&Tensor>) -> Result<Tensor> {
        let latents = ((x * self.kept)? - (found * (self.signal * self.growth))?)?;
        Ok(match rest {
            Some(rest) => (latents - (rest * (self.signal * self.base))?)?,
            None => latents,
        })
    }
}
