//! DPM-Solver++ 2M (Lu et al. 2022) and its stochastic form.

use candle_core::Tensor;

use super::clean;
use crate::engine::Result;
use crate::engine::config::scheduler::Multistep;
use crate::engine::denoise::DenoiseState;
use crate::engine::schedule::{Schedule, signal_and_noise};

/// Runs shorter than this end with a step of the first order.
const SHORT_RUN: usize = 15;

/// One step. History: the clean latents that the step before found.
pub(super) fn step(
    schedule: &Schedule,
    state: &DenoiseState,
    output: &Tensor,
    options: Multistep,
    drawn: Option<&Tensor>,
) -> Result<(Tensor, Vec<Tensor>)> {
    let (x, at) = (&state.latents, schedule.levels[state.step]);
    let found = clean(schedule.prediction, x, output, signal_and_noise(at.now))?;
    let last = state.step + 1 == schedule.steps();
    let ends_low = options.euler_at_final
        || (options.lower_order_final && schedule.steps() < SHORT_RUN)
        || at.next == 0.0;
    let earlier = state.history.first().filter(|_| options.order > 1 && !(last && ends_low));

    let (_, noise) = signal_and_noise(at.now);
    let (next_signal, next_noise) = signal_and_noise(at.next);
    let width = at.now.ln() - at.next.ln(); // of the step, in half the log of signal over noise
    let doubled = if options.stochastic { 2.0 } else { 1.0 };
    let shrunk = 1.0 - (-doubled * width).exp();
    let kept = if options.stochastic { (-width).exp() } else { 1.0 };
    let mut latents = ((x * (next_noise / noise * kept))? + (&found * (next_signal * shrunk))?)?;
    if let Some(earlier) = earlier {
        let width_before = schedule.levels[state.step - 1].now.ln() - at.now.ln();
        let slope = ((&found - earlier)? * (width / width_before))?;
        let factor = if options.heun {
            next_signal * (1.0 - shrunk / (doubled * width))
        } else {
            0.5 * next_signal * shrunk
        };
        latents = (latents + (slope * factor)?)?;
    }
    if let Some(drawn) = drawn {
        latents = (latents + (drawn * (next_noise * (1.0 - (-2.0 * width).exp()).sqrt()))?)?;
    }
    Ok((latents, vec![found]))
}
