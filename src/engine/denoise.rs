//! The loop: scale the latents, ask the network, step, tell the watcher.
//!
//! Which network, which guidance and which conditions are the caller's: it passes a closure. The state is explicit,
//! so that a run can be taken up at any step.

use std::ops::ControlFlow;

use candle_core::{D, DType, Tensor};

use super::schedule::Schedule;
use super::{Error, Result, sampler};

/// Where a run is.
#[derive(Clone, Debug)]
pub struct DenoiseState {
    /// Steps done.
    pub step: usize,
    /// Latents now, in f32.
    pub latents: Tensor,
    /// What the sampler must remember of earlier steps, and nothing else; one-step samplers remember nothing.
    pub history: Vec<Tensor>,
}

impl DenoiseState {
    /// The start of a run from unit normal `noise`.
    pub fn start(noise: &Tensor, schedule: &Schedule) -> Result<Self> {
        let latents = (noise.to_dtype(DType::F32)? * schedule.init_noise_sigma)?;
        Ok(Self { step: 0, latents, history: Vec::new() })
    }

    /// The start at `step` from clean `latents` with as much of `noise` as there is then.
    pub fn start_at(
        step: usize,
        latents: &Tensor,
        noise: &Tensor,
        schedule: &Schedule,
    ) -> Result<Self> {
        let latents = schedule.add_noise(
            step,
            &latents.to_dtype(DType::F32)?,
            &noise.to_dtype(DType::F32)?,
        )?;
        Ok(Self { step, latents, history: Vec::new() })
    }
}

/// What the watcher is told.
#[derive(Clone, Copy, Debug)]
pub enum Moment<'a> {
    /// Inside a step: this many are done.
    Within(usize),
    /// A step is done.
    After(&'a DenoiseState),
}

/// Told about each moment; a break ends the run.
pub type Watch<'a> = dyn FnMut(Moment<'_>) -> ControlFlow<()> + 'a;

/// Called between the parts of a network; a break ends the run.
pub type Pulse<'a> = dyn FnMut() -> ControlFlow<()> + 'a;

/// The network with its conditions and guidance: scaled latents and timestep to its prediction.
pub type Model<'a> = dyn FnMut(&Tensor, f64, &mut Pulse<'_>) -> Result<Tensor> + 'a;

/// Fresh noise for a step, of the latents' shape and in f32; asked for where [`Schedule::draws`] says so.
pub type Draw<'a> = dyn FnMut(usize) -> Result<Tensor> + 'a;

/// The [`Draw`] of samplers that draw nothing.
pub fn undrawn(step: usize) -> Result<Tensor> {
    Err(Error::Internal(format!("step {step} wants noise")))
}

/// Runs from `state` to the last step.
pub fn denoise(
    mut state: DenoiseState,
    schedule: &Schedule,
    model: &mut Model<'_>,
    draw: &mut Draw<'_>,
    watch: &mut Watch<'_>,
) -> Result<DenoiseState> {
    while state.step < schedule.steps() {
        let step = state.step;
        let scaled = (&state.latents * schedule.input_scale(step))?;
        let output = model(&scaled, schedule.timesteps[step], &mut || watch(Moment::Within(step)))?;
        let noise = schedule.draws(step).then(|| draw(step)).transpose()?;
        state = sampler::step(schedule, &state, &output.to_dtype(DType::F32)?, noise.as_ref())?;
        check_finite(&state.latents, "the latents", DType::F32)?;
        if watch(Moment::After(&state)).is_break() {
            return Err(Error::Stopped);
        }
    }
    Ok(state)
}

/// [`Error::Stopped`] when `pulse` breaks.
pub fn check_pulse(pulse: &mut Pulse<'_>) -> Result<()> {
    if pulse().is_break() { Err(Error::Stopped) } else { Ok(()) }
}

/// Guidance is off up to this scale: the network then runs without its unconditional half.
pub fn is_guided(scale: f64) -> bool {
    scale > 1.0
}

/// Classifier-free guidance (Ho and Salimans 2022): away from the unconditional prediction by `scale`.
pub fn guide(unconditional: &Tensor, conditional: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((unconditional + ((conditional - unconditional)? * scale)?)?)
}

/// Guidance that keeps part of the conditional prediction's spread (Lin et al. 2024, section 3.4).
pub fn rescale_guided(guided: &Tensor, conditional: &Tensor, part: f64) -> Result<Tensor> {
    let spread =
        |x: &Tensor| -> Result<Tensor> { Ok(x.flatten_from(1)?.var_keepdim(D::Minus1)?.sqrt()?) };
    let mut factor = spread(conditional)?.div(&spread(guided)?)?; // (b, 1)
    while factor.rank() < guided.rank() {
        factor = factor.unsqueeze(D::Minus1)?;
    }
    let rescaled = guided.broadcast_mul(&factor)?;
    Ok(((rescaled * part)? + (guided * (1.0 - part))?)?)
}

/// Whether `x` holds neither an infinity nor a NaN.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    // Zero times an infinity or a NaN is a NaN, and one NaN makes the sum one.
    Ok((x.to_dtype(DType::F32)? * 0.0)?.sum_all()?.to_scalar::<f32>()? == 0.0)
}

/// [`Error::NonFinite`] when `x`, made by a network of type `dtype`, holds an infinity or a NaN.
pub fn check_finite(x: &Tensor, stage: &'static str, dtype: DType) -> Result<()> {
    if is_finite(x)? { Ok(()) } else { Err(Error::NonFinite { stage, dtype: dtype.as_str() }) }
}
