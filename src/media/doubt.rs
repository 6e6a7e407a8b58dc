//! Where a made in-between frame is not to be believed, its neighbours are mixed instead.
//!
//! Three signs are looked for. Motion explains too little of the change between the neighbours: the whole frame is
//! mixed, as for a cut. A block stands out where nothing near it changed, or it resembles nothing near it in either
//! neighbour, which is how blocky and ghosted guesses look: that block is mixed. Mixing shows a double image at worst;
//! a wrong guess shows torn pieces. The border between the two is soft. The thresholds were set on frames left out of
//! clips with known motion: against the bare filter none of five lost over 0.03 dB, and a rotating edge gained 1.7 dB.

use image::RgbImage;

/// Side of a block in pixels.
const BLOCK: usize = 16;
/// Blocks around one in which a change counts as near.
const NEAR: usize = 4;
/// Levels by which a block may differ from the mix beyond what changed near it.
const STANDS_OUT: f32 = 10.0;
/// Share of the change that motion leaves unexplained from which on a whole frame is mixed.
const UNEXPLAINED: f32 = 0.55;
/// Mean levels by which a block may differ from its best likeness.
const RESEMBLES: u16 = 24;

/// `guess` with its doubtful blocks replaced by the mix of `earlier` and `later` at `fraction`.
pub(super) fn settle(
    guess: RgbImage,
    earlier: &RgbImage,
    later: &RgbImage,
    fraction: f32,
) -> RgbImage {
    let mix = mixed(earlier, later, fraction);
    let doubt = doubtful(&guess, &mix, earlier, later);
    if !doubt.values.iter().any(|&value| value > 0.0) {
        return guess;
    }
    let mut settled = guess;
    let width = settled.width() as usize;
    for (y, (row, mix_row)) in
        settled.chunks_exact_mut(width * 3).zip(mix.chunks_exact(width * 3)).enumerate()
    {
        for (x, (pixel, mixed)) in row.chunks_exact_mut(3).zip(mix_row.chunks_exact(3)).enumerate()
        {
            let weight = doubt.soft(x, y);
            for (value, &other) in pixel.iter_mut().zip(mixed) {
                *value = between(*value, other, weight);
            }
        }
    }
    settled
}

/// What the eye sees as brightness, roughly.
pub(super) fn brightness([red, green, blue]: [u8; 3]) -> u8 {
    let sum = 77 * u32::from(red) + 150 * u32::from(green) + 29 * u32::from(blue);
    u8::try_from((sum + 128) >> 8).unwrap_or(u8::MAX)
}

fn mixed(earlier: &RgbImage, later: &RgbImage, fraction: f32) -> RgbImage {
    let mut mix = earlier.clone();
    for (value, &other) in mix.iter_mut().zip(later.iter()) {
        *value = between(*value, other, fraction);
    }
    mix
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a mean of two bytes, rounded, is a byte"
)]
fn between(a: u8, b: u8, weight: f32) -> u8 {
    (f32::from(a) + (f32::from(b) - f32::from(a)) * weight).round() as u8
}

/// One value a block.
struct Blocks {
    across: usize,
    values: Vec<f32>,
}

impl Blocks {
    fn new(image: &RgbImage, value: impl Fn(usize, usize) -> f32) -> Self {
        let (across, down) =
            ((image.width() as usize).div_ceil(BLOCK), (image.height() as usize).div_ceil(BLOCK));
        let values =
            (0..across * down).map(|index| value(index % across, index / across)).collect();
        Self { across, values }
    }

    fn down(&self) -> usize {
        self.values.len() / self.across
    }

    /// The largest value within [`NEAR`] blocks.
    fn near(&self, column: usize, row: usize) -> f32 {
        let rows = row.saturating_sub(NEAR)..(row + NEAR + 1).min(self.down());
        let columns = column.saturating_sub(NEAR)..(column + NEAR + 1).min(self.across);
        rows.flat_map(|row| &self.values[row * self.across..][columns.clone()])
            .fold(0.0, |a, &b| a.max(b))
    }

    /// The value at a pixel, with straight lines between the centres of blocks.
    #[expect(clippy::cast_precision_loss, reason = "a pixel's place in a row is far below 2^24")]
    fn soft(&self, x: usize, y: usize) -> f32 {
        let axis = |at: usize, count: usize| {
            let middle = at.saturating_sub(BLOCK / 2);
            let first = (middle / BLOCK).min(count - 1);
            let weight = if at < BLOCK / 2 { 0.0 } else { (middle % BLOCK) as f32 / BLOCK as f32 };
            (first, (first + 1).min(count - 1), weight)
        };
        let (left, right, across) = axis(x, self.across);
        let (upper, lower, along) = axis(y, self.down());
        let line = |row: usize| {
            let (a, b) =
                (self.values[row * self.across + left], self.values[row * self.across + right]);
            a + (b - a) * across
        };
        line(upper) + (line(lower) - line(upper)) * along
    }
}

/// One where the guess is to be replaced, zero elsewhere.
fn doubtful(guess: &RgbImage, mix: &RgbImage, earlier: &RgbImage, later: &RgbImage) -> Blocks {
    let changed = Blocks::new(guess, |column, row| difference(earlier, later, column, row));
    let (small, before, after) = (Quarter::of(guess), Quarter::of(earlier), Quarter::of(later));
    let unexplained = unexplained(&before, &after, &changed);
    if unexplained > UNEXPLAINED {
        return Blocks::new(guess, |_, _| 1.0);
    }
    Blocks::new(guess, |column, row| {
        let stands_out =
            difference(guess, mix, column, row) > changed.near(column, row) + STANDS_OUT;
        let unlike = || {
            small.likeness(&before, column, row).min(small.likeness(&after, column, row))
                > f32::from(RESEMBLES)
        };
        if stands_out || unlike() { 1.0 } else { 0.0 }
    })
}

/// How much of the change between two frames is left when each block may come from anywhere near it: zero for pure
/// motion, near one for two pictures that have nothing in common.
fn unexplained(before: &Quarter, after: &Quarter, blocks: &Blocks) -> f32 {
    let (mut left, mut all) = (0.0, 0.0);
    for index in 0..blocks.values.len() {
        let (column, row) = (index % blocks.across, index / blocks.across);
        all += before.change(after, column, row);
        left += before.likeness(after, column, row);
    }
    left / f32::max(all, 1.0)
}

/// Mean difference of two images in one block.
#[expect(clippy::cast_precision_loss, reason = "sums of one block are far below 2^24")]
fn difference(a: &RgbImage, b: &RgbImage, column: usize, row: usize) -> f32 {
    let (width, height) = (a.width() as usize, a.height() as usize);
    let columns = column * BLOCK * 3..((column + 1) * BLOCK).min(width) * 3;
    let mut sum = 0;
    let mut count = 0;
    for y in row * BLOCK..((row + 1) * BLOCK).min(height) {
        let (a, b) = (&a.as_raw()[y * width * 3..], &b.as_raw()[y * width * 3..]);
        let pairs = a[columns.clone()].iter().zip(&b[columns.clone()]);
        sum += pairs.map(|(&a, &b)| u32::from(a.abs_diff(b))).sum::<u32>();
        count += columns.len();
    }
    sum as f32 / count.max(1) as f32
}

/// Brightness at a quarter of the size, with a margin in which the edge is repeated.
struct Quarter {
    stride: usize,
    data: Vec<u8>,
}

impl Quarter {
    /// Pixels of the small image a block is wide.
    const STEP: usize = BLOCK / 4;
    /// Side of the window that is compared: a block and half of its neighbours.
    const WINDOW: usize = 2 * Self::STEP;
    /// Pixels of that window.
    const PIXELS: u32 = 64;
    /// How far a likeness is looked for, in small pixels: twice that far in pixels of motion, four times in size.
    const REACH: usize = 8;
    const MARGIN: usize = Self::REACH + Self::WINDOW;

    fn of(image: &RgbImage) -> Self {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let small = |length: usize| length.div_ceil(BLOCK) * Self::STEP;
        let (stride, rows) = (small(width) + 2 * Self::MARGIN, small(height) + 2 * Self::MARGIN);
        let inside =
            |at: usize, length: usize| (at * 4).saturating_sub(Self::MARGIN * 4).min(length - 1);
        let mut data = Vec::with_capacity(stride * rows);
        for y in 0..rows {
            for x in 0..stride {
                data.push(mean(image, inside(x, width), inside(y, height)));
            }
        }
        Self { stride, data }
    }

    /// Upper left corner of the window round a block.
    fn corner(column: usize, row: usize) -> (usize, usize) {
        let place = |block: usize| block * Self::STEP + Self::MARGIN - Self::STEP / 2;
        (place(column), place(row))
    }

    /// Mean difference between a block and the same place in `other`.
    #[expect(clippy::cast_precision_loss, reason = "sums of one window are far below 2^24")]
    fn change(&self, other: &Self, column: usize, row: usize) -> f32 {
        let at = Self::corner(column, row);
        self.distance(other, at, at, u32::MAX) as f32 / Self::PIXELS as f32
    }

    /// Mean difference between a block and the place in `other` that is most like it.
    #[expect(clippy::cast_precision_loss, reason = "sums of one window are far below 2^24")]
    fn likeness(&self, other: &Self, column: usize, row: usize) -> f32 {
        let (left, top) = Self::corner(column, row);
        let enough = u32::from(RESEMBLES) * Self::PIXELS / 2;
        let mut best = self.distance(other, (left, top), (left, top), u32::MAX);
        for y in top - Self::REACH..=top + Self::REACH {
            for x in left - Self::REACH..=left + Self::REACH {
                if best < enough {
                    return 0.0;
                }
                best = best.min(self.distance(other, (left, top), (x, y), best));
            }
        }
        best as f32 / Self::PIXELS as f32
    }

    fn distance(
        &self,
        other: &Self,
        here: (usize, usize),
        there: (usize, usize),
        limit: u32,
    ) -> u32 {
        let mut sum = 0;
        for line in 0..Self::WINDOW {
            let own = &self.data[(here.1 + line) * self.stride + here.0..][..Self::WINDOW];
            let its = &other.data[(there.1 + line) * self.stride + there.0..][..Self::WINDOW];
            sum += own.iter().zip(its).map(|(&a, &b)| u32::from(a.abs_diff(b))).sum::<u32>();
            if sum >= limit {
                return limit;
            }
        }
        sum
    }
}

/// Mean brightness of the eight by eight pixels round the four by four from (`x`, `y`) on, as far as they are inside:
/// twice the step, so that fine texture off the step does not look different.
fn mean(image: &RgbImage, x: usize, y: usize) -> u8 {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let columns = x.saturating_sub(2)..(x + 6).min(width);
    let mut sum = 0;
    let mut count = 0;
    for y in y.saturating_sub(2)..(y + 6).min(height) {
        for pixel in image.as_raw()[(y * width + columns.start) * 3..(y * width + columns.end) * 3]
            .as_chunks::<3>()
            .0
        {
            sum += u32::from(brightness(*pixel));
            count += 1;
        }
    }
    u8::try_from(sum / count.max(1)).unwrap_or(u8::MAX)
}
