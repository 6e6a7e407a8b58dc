//! All randomness of the engine: (seed, purpose, step) -> standard normal numbers, always drawn on the CPU.
//!
//! The start noise of a seed is exactly what `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`
//! gives on a CPU, so seeds carry over from diffusers and ComfyUI. Torch's generator is the Mersenne Twister
//! mt19937 seeded with the low 32 bits; sixteen numbers or more go through a Box-Muller in blocks of sixteen
//! (`normal_fill` in ATen), fewer through a scalar one in double precision. Every other purpose has a stream of its
//! own, keyed by all 64 bits of the seed, so that a resumed run draws what an undisturbed one would have drawn.

mod single;

use std::f32::consts::TAU;
use std::f64::consts::PI;

use candle_core::{Device, Result, Shape, Tensor};

/// What a draw is for; each purpose of a seed is an independent stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The noise a run starts from: torch's own stream of the seed when the step is 0.
    InitLatents,
    /// Fresh noise of an ancestral or stochastic step.
    Step,
    /// The start of the n-th video segment (image noise, then latents); segment 0 is torch's own stream.
    Segment,
}

impl Purpose {
    /// The number that keys the stream. Never change one: results of old seeds depend on it.
    const fn key(self) -> u32 {
        match self {
            Self::InitLatents => 1,
            Self::Step => 2,
            Self::Segment => 3,
        }
    }
}

/// The normal numbers of one purpose and step of a seed, as a tensor on `device`.
pub fn gaussian(
    seed: u64,
    purpose: Purpose,
    step: u32,
    shape: impl Into<Shape>,
    device: &Device,
) -> Result<Tensor> {
    Stream::of(seed, purpose, step).tensor(shape, device)
}

/// A running generator: successive draws continue where the last one ended, as with one `torch.Generator`.
#[derive(Clone, Debug)]
pub struct Stream {
    twister: Twister,
    /// The second number of the last scalar Box-Muller pair; torch keeps it for the next small draw.
    spare: Option<f64>,
}

impl Stream {
    /// `torch.Generator().manual_seed(seed)`; torch looks at the low 32 bits only.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "torch seeds its generator with the low 32 bits"
    )]
    pub fn torch(seed: u64) -> Self {
        Self { twister: Twister::seeded(seed as u32), spare: None }
    }

    /// The stream of a purpose and step.
    #[expect(clippy::cast_possible_truncation, reason = "both halves of the seed are taken")]
    pub fn of(seed: u64, purpose: Purpose, step: u32) -> Self {
        match (purpose, step) {
            (Purpose::InitLatents | Purpose::Segment, 0) => Self::torch(seed),
            _ => {
                let key = [seed as u32, (seed >> 32) as u32, purpose.key(), step];
                Self { twister: Twister::keyed(&key), spare: None }
            }
        }
    }

    /// The next `shape` of standard normal numbers, as `torch.randn(shape, generator=…)` draws them.
    pub fn tensor(&mut self, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        Tensor::from_vec(self.normal(shape.elem_count()), shape, &Device::Cpu)?.to_device(device)
    }

    /// The next `count` standard normal numbers.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        if count < BLOCK {
            return (0..count).map(|_| self.scalar()).collect();
        }
        let mut data: Vec<f32> = (0..count).map(|_| self.unit()).collect();
        data.chunks_exact_mut(BLOCK).for_each(box_muller);
        if !count.is_multiple_of(BLOCK) {
            // The last sixteen are drawn anew, over numbers that may already be finished.
            let tail = &mut data[count - BLOCK..];
            tail.iter_mut().for_each(|value| *value = self.unit());
            box_muller(tail);
        }
        data
    }

    /// A uniform number in [0, 1) with 24 bits.
    #[expect(clippy::cast_possible_truncation, reason = "24 bits are exact in f32")]
    fn unit(&mut self) -> f32 {
        (f64::from(self.twister.next() & 0x00ff_ffff) / f64::from(1_u32 << 24)) as f32
    }

    /// A uniform number in [0, 1) with 53 bits, from two words, the high one first.
    fn unit_double(&mut self) -> f64 {
        let high = u64::from(self.twister.next());
        let low = u64::from(self.twister.next());
        let bits = ((high << 32) | low) & ((1_u64 << 53) - 1);
        bits as f64 / (1_u64 << 53) as f64
    }

    /// One number of the path torch takes for fewer than sixteen.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "drawn in double precision, delivered in single"
    )]
    fn scalar(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare as f32;
        }
        let (angle, length) = (self.unit_double(), self.unit_double());
        let radius = (-2.0 * (-length).ln_1p()).sqrt();
        let theta = 2.0 * PI * angle;
        self.spare = Some(radius * theta.sin());
        (radius * theta.cos()) as f32
    }
}

/// Numbers per block of torch's vectorised normal fill.
const BLOCK: usize = 16;

/// Box-Muller over one block in place: the first half gives the radii, the second the angles.
///
/// In single precision, operation by operation as torch does on x86, so that the numbers are its own to the last bit,
/// on every machine.
fn box_muller(block: &mut [f32]) {
    let (front, back) = block.split_at_mut(BLOCK / 2);
    for (first, second) in front.iter_mut().zip(back) {
        let radius = (-2.0 * single::ln(1.0 - *first)).sqrt();
        let (sin, cos) = single::sin_cos(TAU * *second);
        *first = radius * cos;
        *second = radius * sin;
    }
}

/// The Mersenne Twister mt19937 of Matsumoto and Nishimura (2002).
#[derive(Clone, Debug)]
struct Twister {
    state: Vec<u32>,
    next: usize,
}

impl Twister {
    const LENGTH: usize = 624;
    const SHIFT: usize = 397;

    /// `init_genrand` of the reference code.
    fn seeded(seed: u32) -> Self {
        let mut state = vec![seed; Self::LENGTH];
        for (index, place) in (1_u32..).zip(1..Self::LENGTH) {
            let last = state[place - 1];
            state[place] = 1_812_433_253_u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(index);
        }
        Self { state, next: Self::LENGTH }
    }

    /// `init_by_array` of the reference code, for keys shorter than the state.
    fn keyed(key: &[u32]) -> Self {
        let mut twister = Self::seeded(19_650_218);
        let state = &mut twister.state;
        let mut place = 1;
        for (word, index) in key.iter().zip(0_u32..).cycle().take(Self::LENGTH) {
            let last = state[place - 1];
            let mixed = state[place] ^ 1_664_525_u32.wrapping_mul(last ^ (last >> 30));
            state[place] = mixed.wrapping_add(*word).wrapping_add(index);
            place = Self::after(place, state);
        }
        for _ in 1..Self::LENGTH {
            let last = state[place - 1];
            let mixed = state[place] ^ 1_566_083_941_u32.wrapping_mul(last ^ (last >> 30));
            state[place] = mixed.wrapping_sub(u32::try_from(place).expect("a place is below 624"));
            place = Self::after(place, state);
        }
        state[0] = 0x8000_0000;
        twister
    }

    /// The place after `place`; wrapping round carries the last word to the front.
    fn after(place: usize, state: &mut [u32]) -> usize {
        if place + 1 < Self::LENGTH {
            return place + 1;
        }
        state[0] = state[Self::LENGTH - 1];
        1
    }

    /// The next 32 bits.
    fn next(&mut self) -> u32 {
        if self.next == Self::LENGTH {
            self.refill();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn refill(&mut self) {
        for place in 0..Self::LENGTH {
            let joined = (self.state[place] & 0x8000_0000)
                | (self.state[(place + 1) % Self::LENGTH] & 0x7fff_ffff);
            let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[place] =
                self.state[(place + Self::SHIFT) % Self::LENGTH] ^ (joined >> 1) ^ odd;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::Twister;

    /// First words of the reference code's own `mt19937ar.out`: `init_by_array({0x123, 0x234, 0x345, 0x456})`.
    #[test]
    fn a_keyed_twister_gives_the_published_words() {
        let mut twister = Twister::keyed(&[0x123, 0x234, 0x345, 0x456]);
        let words: Vec<u32> = (0..5).map(|_| twister.next()).collect();
        assert_eq!(words, [1_067_595_299, 955_945_823, 477_289_528, 4_107_218_783, 4_228_976_476]);
    }

    /// The C++ standard fixes the 10000th word of a default mt19937 (seed 5489).
    #[test]
    fn a_seeded_twister_gives_the_standards_word() {
        let mut twister = Twister::seeded(5489);
        assert_eq!((0..10_000).map(|_| twister.next()).last(), Some(4_123_659_995));
    }
}
