//! Steps that look at one prediction only: DDIM, Euler, Euler ancestral, latent consistency, and PNDM's transfer.

use candle_core::Tensor;

use super::clean;
use crate::engine::Result;
use crate::engine::config::scheduler::Prediction;
use crate::engine::schedule::{Level, Schedule};

/// Spread of the data in the boundary condition of consistency models.
const SIGMA_DATA: f64 = 0.5;

/// Denoising diffusion implicit models (Song et al. 2021, equations 12 and 16).
pub(super) fn ddim(
    schedule: &Schedule,
    x: &Tensor,
    output: &Tensor,
    at: Level,
    eta: f64,
    drawn: Option<&Tensor>,
) -> Result<Tensor> {
    let (signal, noise) = (at.now.sqrt(), (1.0 - at.now).sqrt());
    let found = clean(schedule.prediction, x, output, (signal, noise))?;
    let eps = match schedule.prediction {
        Prediction::Epsilon => output.clone(),
        Prediction::Velocity => ((output * signal)? + (x * noise)?)?,
        Prediction::Sample => ((x - (output * signal)?)? / noise)?,
    };
    let found = clipped(found, schedule.clip)?;
    let fresh = eta * ((1.0 - at.next) / (1.0 - at.now) * (1.0 - at.now / at.next)).sqrt();
    let kept = (1.0 - at.next - fresh * fresh).sqrt();
    let latents = ((found * at.next.sqrt())? + (eps * kept)?)?;
    add(latents, drawn, fresh)
}

/// From one signal share to another along a prediction (Liu et al. 2022, equation 9).
pub(super) fn transfer(
    prediction: Prediction,
    x: &Tensor,
    output: &Tensor,
    at: Level,
) -> Result<Tensor> {
    let eps = match prediction {
        Prediction::Velocity => ((output * at.now.sqrt())? + (x * (1.0 - at.now).sqrt())?)?,
        _ => output.clone(),
    };
    let below = at.now * (1.0 - at.next).sqrt() + (at.now * (1.0 - at.now) * at.next).sqrt();
    Ok(((x * (at.next / at.now).sqrt())? - (eps * ((at.next - at.now) / below))?)?)
}

/// Latent consistency (Luo et al. 2023): to the clean latents and back to the next level.
pub(super) fn lcm(
    schedule: &Schedule,
    x: &Tensor,
    output: &Tensor,
    at: Level,
    timestep: f64,
    drawn: Option<&Tensor>,
) -> Result<Tensor> {
    let found = clean(schedule.prediction, x, output, (at.now.sqrt(), (1.0 - at.now).sqrt()))?;
    let found = clipped(found, schedule.clip)?;
    let span = timestep * timestep + SIGMA_DATA * SIGMA_DATA;
    let (skip, out) = (SIGMA_DATA * SIGMA_DATA / span, timestep / span.sqrt());
    let denoised = ((found * out)? + (x * skip)?)?;
    add((denoised * at.next.sqrt())?, drawn, (1.0 - at.next).sqrt())
}

/// Euler step from one sigma to the next (Karras et al. 2022, algorithm 2 without churn).
pub(super) fn euler(
    x: &Tensor,
    output: &Tensor,
    at: Level,
    prediction: Prediction,
) -> Result<Tensor> {
    let sigma = at.now;
    let found = match prediction {
        Prediction::Epsilon => (x - (output * sigma)?)?,
        Prediction::Velocity => {
            let scale = sigma * sigma + 1.0;
            ((output * (-sigma / scale.sqrt()))? + (x / scale)?)?
        }
        Prediction::Sample => output.clone(),
    };
    let slope = ((x - found)? / sigma)?;
    Ok((x + (slope * (at.next - sigma))?)?)
}

/// Euler step below the next sigma, and fresh noise up to it.
pub(super) fn euler_ancestral(
    x: &Tensor,
    output: &Tensor,
    at: Level,
    prediction: Prediction,
    drawn: Option<&Tensor>,
) -> Result<Tensor> {
    let (now, next) = (at.now * at.now, at.next * at.next);
    let up = next * (now - next) / now;
    let down = Level { now: at.now, next: (next - up).sqrt() };
    add(euler(x, output, down, prediction)?, drawn, up.sqrt())
}

fn clipped(latents: Tensor, limit: Option<f64>) -> Result<Tensor> {
    Ok(match limit {
        Some(limit) => latents.clamp(-limit, limit)?,
        None => latents,
    })
}

fn add(latents: Tensor, drawn: Option<&Tensor>, factor: f64) -> Result<Tensor> {
    Ok(match drawn {
        Some(drawn) => (latents + (drawn * factor)?)?,
        None => latents,
    })
}
