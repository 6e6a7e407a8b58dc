//! Time and other numbers as vectors.

use candle_core::{DType, Device, Tensor};

use super::activation::silu;
use super::linear::Linear;
use crate::engine::Result;
use crate::engine::weights::Weights;

/// Longest period of the sinusoids.
const MAX_PERIOD: f32 = 10_000.0;

/// How a number becomes sinusoids.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sinusoid {
    /// Even width of the vector.
    pub width: usize,
    /// Whether cosines come first.
    pub cosine_first: bool,
    /// Shift of the frequencies' denominator.
    pub shift: f64,
}

impl Sinusoid {
    /// Cosines first, no shift.
    pub fn new(width: usize) -> Self {
        Self { width, cosine_first: true, shift: 0.0 }
    }

    /// (numbers, width) in f32: half precision cannot hold a timestep. The arithmetic is f32 throughout, as in
    /// diffusers.
    #[expect(clippy::cast_possible_truncation, reason = "f32 is the wanted precision")]
    pub fn forward(&self, numbers: &[f64], device: &Device) -> Result<Tensor> {
        let half = self.width / 2;
        let denominator = half as f32 - self.shift as f32;
        let frequency = |index: usize| ((-MAX_PERIOD.ln() * index as f32) / denominator).exp();
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let mut values = Vec::with_capacity(numbers.len() * self.width);
        for number in numbers {
            let angles = frequencies.iter().map(|frequency| *number as f32 * frequency);
            let (sines, cosines): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
            let (first, second) =
                if self.cosine_first { (cosines, sines) } else { (sines, cosines) };
            values.extend(first);
            values.extend(second);
            values.extend(std::iter::repeat_n(0.0, self.width % 2));
        }
        Ok(Tensor::from_vec(values, (numbers.len(), self.width), device)?)
    }
}

/// Two linear layers with SiLU between them: `linear_1`, `linear_2`.
#[derive(Clone, Debug)]
pub struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    dtype: DType,
}

impl TimestepEmbedding {
    /// From `input` to `width`, and on to `output`.
    pub fn load(weights: &Weights, input: usize, width: usize, output: usize) -> Result<Self> {
        Ok(Self {
            linear_1: Linear::load(&weights.pp("linear_1"), input, width)?,
            linear_2: Linear::load(&weights.pp("linear_2"), width, output)?,
            dtype: weights.dtype(),
        })
    }

    /// (n, input) in f32 to (n, output) in the network's number type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.linear_1.forward(&x.to_dtype(self.dtype)?)?;
        self.linear_2.forward(&silu(&x)?)
    }
}
