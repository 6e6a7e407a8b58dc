//! The duration policy: how many frames to deliver, and how many runs of the model they need.
//!
//! Delivered frames = duration times fps, rounded, at least one: within half a frame of what was asked. The model
//! plays its frames at its own pace; a longer video chains runs, each of which starts from the last frame of the one
//! before, so every run after the first adds one frame less. What lies between is `media::interpolate`'s work.

use serde::{Deserialize, Serialize};

/// Whole rates that also exist times 1000/1001.
const NTSC_BASES: [u32; 4] = [24, 30, 48, 60];
/// How far a written rate may be from the one it means: `23.98` and `23.976` are both 24000/1001.
const NTSC_SLACK: f64 = 0.006;

/// An exact rate in frames per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameRate {
    /// Frames.
    pub num: u32,
    /// In so many seconds.
    pub den: u32,
}

impl FrameRate {
    /// The rate meant by a decimal number: whole, one of the NTSC family, or thousandths.
    pub fn from_fps(fps: f64) -> Self {
        let base = NTSC_BASES
            .into_iter()
            .find(|base| (fps - f64::from(*base) * 1000.0 / 1001.0).abs() < NTSC_SLACK);
        if let Some(base) = base {
            return Self { num: base * 1000, den: 1001 };
        }
        let num = whole(fps * 1000.0).max(1);
        let shared = gcd(num, 1000);
        Self { num: num / shared, den: 1000 / shared }
    }

    /// The rate as a number.
    pub fn fps(self) -> f64 {
        f64::from(self.num) / f64::from(self.den.max(1))
    }
}

/// How a model makes frames.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Frames of one run.
    pub frames_per_run: u32,
    /// Frames per second at which its motion looks right.
    pub native_fps: f64,
    /// Runs that may be chained; after that the motion is slowed.
    pub max_runs: u32,
}

/// Counts of a video.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthPlan {
    /// Chained runs of the model.
    pub runs: u32,
    /// Frames of theirs that are used.
    pub kept_native: u32,
    /// Frames the motion wanted; more than `kept_native` when `max_runs` slows it.
    pub wanted_native: u32,
    /// Frames of the file.
    pub delivered: u32,
    /// Rate of the file.
    pub fps: FrameRate,
}

impl LengthPlan {
    /// Seconds the file plays.
    pub fn seconds(&self) -> f64 {
        f64::from(self.delivered) / self.fps.fps()
    }
}

/// Plans a video of `duration` seconds at the rate `out`.
pub fn plan(duration: f64, out: FrameRate, pace: &Pace) -> LengthPlan {
    let delivered = whole(duration * out.fps()).max(1);
    let span = f64::from(delivered - 1) / out.fps();
    let moves = match delivered {
        1 => 0,
        _ => whole(span * pace.native_fps).max(1),
    };
    let per_run = pace.frames_per_run.saturating_sub(1).max(1);
    let runs = moves.div_ceil(per_run).clamp(1, pace.max_runs.max(1));
    let made = match pace.frames_per_run {
        0 | 1 => 1,
        _ => 1 + runs.saturating_mul(per_run),
    };
    let wanted_native = moves.saturating_add(1);
    let runs = if made == 1 { 1 } else { runs };
    LengthPlan { runs, kept_native: wanted_native.min(made), wanted_native, delivered, fps: out }
}

/// The nearest whole number.
#[expect(clippy::cast_possible_truncation, reason = "`as` saturates, which is what is wanted here")]
fn whole(value: f64) -> u32 {
    value.round() as u32
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}
