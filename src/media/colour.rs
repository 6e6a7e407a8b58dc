//! RGB to BT.709 limited-range 4:2:0.
//!
//! swscale's default matrix is BT.601; a file tagged BT.709 would then be off by up to 39 of 255, so the conversion
//! is done here. Chroma is sited left (H.264's default): one, two, one across and the mean of two rows. Rows and
//! columns past the edge repeat the last one, which is also how odd sides become even.

use image::RgbImage;

/// Fraction bits of the coefficients.
const BITS: u32 = 16;
/// Luma: 219/255 of Kr, Kg, Kb.
const LUMA: [i32; 3] = [11966, 40254, 4064];
/// Cb: 224/255 of the blue difference; sums to zero, so grey has no colour.
const BLUE: [i32; 3] = [-6596, -22188, 28784];
/// Cr: 224/255 of the red difference; sums to zero.
const RED: [i32; 3] = [28784, -26145, -2639];

/// One plane to be filled: rows of `stride` bytes.
pub(super) struct Plane<'a> {
    /// Its bytes.
    pub(super) data: &'a mut [u8],
    /// Bytes from one row to the next.
    pub(super) stride: usize,
}

/// Fills luma of `width` x `height` (both even, at least the image's size) from `image`.
pub(super) fn luma(image: &RgbImage, width: usize, height: usize, plane: Plane<'_>) {
    let rows = Rows::of(image);
    for (y, line) in plane.data.chunks_mut(plane.stride).take(height).enumerate() {
        let row = rows.get(y);
        for (out, pixel) in line[..width].iter_mut().zip(row.as_chunks::<3>().0) {
            *out = level(dot(LUMA, pixel.map(i32::from)), 0, 16);
        }
        for x in rows.width..width {
            line[x] = line[x - 1];
        }
    }
}

/// Which of the two chroma planes.
#[derive(Clone, Copy)]
pub(super) enum Difference {
    /// Cb.
    Blue,
    /// Cr.
    Red,
}

/// Fills one chroma plane, half as wide and high as `width` x `height`.
pub(super) fn chroma(
    image: &RgbImage,
    width: usize,
    height: usize,
    which: Difference,
    plane: Plane<'_>,
) {
    let weights = match which {
        Difference::Blue => BLUE,
        Difference::Red => RED,
    };
    let rows = Rows::of(image);
    for (y, line) in plane.data.chunks_mut(plane.stride).take(height / 2).enumerate() {
        let (upper, lower) = (rows.get(2 * y), rows.get(2 * y + 1));
        for (x, out) in line[..width / 2].iter_mut().enumerate() {
            let sum = add(rows.left_sited(upper, 2 * x), rows.left_sited(lower, 2 * x));
            // Four weights across and two rows make a sum of eight pixels: three more bits.
            *out = level(dot(weights, sum), 3, 128);
        }
    }
}

/// Rows of an image with the last one repeated for ever.
struct Rows<'a> {
    bytes: &'a [u8],
    width: usize,
    height: usize,
}

impl<'a> Rows<'a> {
    fn of(image: &'a RgbImage) -> Self {
        Self {
            bytes: image.as_raw(),
            width: image.width() as usize,
            height: image.height() as usize,
        }
    }

    fn get(&self, y: usize) -> &'a [u8] {
        let y = y.min(self.height - 1);
        &self.bytes[y * self.width * 3..(y + 1) * self.width * 3]
    }

    /// Pixel `x` twice and its neighbours once.
    fn left_sited(&self, row: &[u8], x: usize) -> [i32; 3] {
        let last = self.width - 1;
        let (left, middle, right) = (x.saturating_sub(1).min(last), x.min(last), (x + 1).min(last));
        [0, 1, 2].map(|c| {
            i32::from(row[3 * left + c])
                + 2 * i32::from(row[3 * middle + c])
                + i32::from(row[3 * right + c])
        })
    }
}

fn add(a: [i32; 3], b: [i32; 3]) -> [i32; 3] {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

fn dot(weights: [i32; 3], pixel: [i32; 3]) -> i32 {
    weights[0] * pixel[0] + weights[1] * pixel[1] + weights[2] * pixel[2]
}

/// Rounds a weighted sum with `extra` more fraction bits and adds the zero level.
fn level(sum: i32, extra: u32, zero: i32) -> u8 {
    let shift = BITS + extra;
    let value = ((sum + (1 << (shift - 1))) >> shift) + zero;
    u8::try_from(value.clamp(0, 255)).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    /// The three planes of a flat picture.
    fn planes(colour: [u8; 3], width: u32, height: u32) -> [Vec<u8>; 3] {
        let image = RgbImage::from_pixel(width, height, Rgb(colour));
        let (w, h) = (width.next_multiple_of(2) as usize, height.next_multiple_of(2) as usize);
        let (mut y, mut u, mut v) = (vec![0; w * h], vec![0; w * h / 4], vec![0; w * h / 4]);
        luma(&image, w, h, Plane { data: &mut y, stride: w });
        chroma(&image, w, h, Difference::Blue, Plane { data: &mut u, stride: w / 2 });
        chroma(&image, w, h, Difference::Red, Plane { data: &mut v, stride: w / 2 });
        [y, u, v]
    }

    #[test]
    fn known_colours_have_the_levels_of_bt709() {
        let table = [
            ([0, 0, 0], [16, 128, 128]),
            ([255, 255, 255], [235, 128, 128]),
            ([128, 128, 128], [126, 128, 128]),
            ([255, 0, 0], [63, 102, 240]),
            ([0, 255, 0], [173, 42, 26]),
            ([0, 0, 255], [32, 240, 118]),
        ];
        for (rgb, yuv) in table {
            for (width, height) in [(2, 2), (5, 3), (1, 1)] {
                let planes = planes(rgb, width, height);
                for (plane, wanted) in planes.iter().zip(yuv) {
                    assert!(
                        plane.iter().all(|&v| v == wanted),
                        "{rgb:?} {width}x{height}: {plane:?}, not {wanted}"
                    );
                }
            }
        }
    }
}
