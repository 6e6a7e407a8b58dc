//! The size policy: which size to generate for the size that was asked.
//!
//! Pure arithmetic over a model's limits. `fit` keeps the aspect ratio and stays near the area the model was
//! trained on, because that is where a model draws well; the resize to the asked size is `media`'s work.

use super::SizePolicy;
use super::class::{ErrorClass, Fault};

/// How much an error of the aspect ratio weighs against one of the area (both as logarithms).
const ASPECT_WEIGHT: f64 = 4.0;
/// An asked size the model supports is generated as it is when its area is within this factor of the native one.
const NEAR_AREA: f64 = 1.5;

/// The sizes a model supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Native {
    /// Width it was trained on.
    pub width: u32,
    /// Height it was trained on.
    pub height: u32,
    /// Sides are multiples of this.
    pub multiple: u32,
    /// Smallest side.
    pub min: u32,
    /// Largest side.
    pub max: u32,
}

/// Both sizes of a job, as (width, height).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizePlan {
    /// What the model makes.
    pub generate: (u32, u32),
    /// What the client gets.
    pub deliver: (u32, u32),
}

/// Plans the size for one model.
///
/// # Errors
/// Under [`SizePolicy::Exact`], when the model cannot make that size: the fault names the nearest that it can.
pub fn plan(asked: (u32, u32), policy: SizePolicy, native: Native) -> Result<SizePlan, Fault> {
    let grid = Grid::new(native);
    let generate = match policy {
        SizePolicy::Exact => grid.exact(asked)?,
        SizePolicy::Fit => grid.fit(asked),
    };
    Ok(SizePlan { generate, deliver: asked })
}

/// The sides a model supports: multiples of `step` from `first` to `last`.
struct Grid {
    step: u32,
    first: u32,
    last: u32,
    area: f64,
}

impl Grid {
    fn new(native: Native) -> Self {
        let step = native.multiple.max(1);
        let first = native.min.max(1).next_multiple_of(step);
        let last = (native.max / step * step).max(first);
        let area = f64::from(native.width.max(1)) * f64::from(native.height.max(1));
        Self { step, first, last, area }
    }

    fn holds(&self, side: u32) -> bool {
        side.is_multiple_of(self.step) && (self.first..=self.last).contains(&side)
    }

    /// The supported side next to `side`.
    fn nearest(&self, side: f64) -> u32 {
        let steps =
            (side / f64::from(self.step)).round().clamp(0.0, f64::from(u32::MAX / self.step));
        #[expect(clippy::cast_possible_truncation, reason = "clamped to u32 above")]
        let side = steps as u32 * self.step;
        side.clamp(self.first, self.last)
    }

    fn exact(&self, (width, height): (u32, u32)) -> Result<(u32, u32), Fault> {
        if self.holds(width) && self.holds(height) {
            return Ok((width, height));
        }
        let field = if self.holds(width) { "height" } else { "width" };
        let near = (self.nearest(width.into()), self.nearest(height.into()));
        let message = format!(
            "got `{width}x{height}`, wanted sides that are multiples of {} from {} to {} for this model, \
             nearest is `{}x{}`; or leave `size_policy` at `fit`",
            self.step, self.first, self.last, near.0, near.1
        );
        Err(Fault::new(ErrorClass::OutOfRange, field, message))
    }

    fn fit(&self, (width, height): (u32, u32)) -> (u32, u32) {
        let asked = f64::from(width) * f64::from(height);
        let near = (self.area / NEAR_AREA..=self.area * NEAR_AREA).contains(&asked);
        if near && self.holds(width) && self.holds(height) {
            return (width, height);
        }
        let ratio = f64::from(width.max(1)) / f64::from(height.max(1));
        let mut best = (f64::INFINITY, (self.first, self.first));
        for wide in (self.first..=self.last).step_by(self.step as usize) {
            // Both neighbours of the ideal height: rounding to the nearest is not always the better aspect.
            let ideal = f64::from(wide) / ratio;
            let half = f64::from(self.step) / 2.0;
            for high in [self.nearest(ideal - half), self.nearest(ideal + half)] {
                let size = (f64::from(wide), f64::from(high));
                let aspect = (size.0 / size.1 / ratio).ln().abs();
                let area = (size.0 * size.1 / self.area).ln().abs();
                let cost = ASPECT_WEIGHT * aspect + area;
                if cost < best.0 {
                    best = (cost, (wide, high));
                }
            }
        }
        best.1
    }
}
