//! The work object one run of the video model leaves: all its frames, lossless, in one piece.
//!
//! Layout, little-endian: the eight bytes `GVFRAME1`, width, height and count as `u32`, then count times width x height
//! RGB pixels of three bytes. It lives between two stages of one job and nobody else reads it, so plain beats small.

use image::RgbImage;

use super::Error;

const MAGIC: &[u8; 8] = b"GVFRAME1";
const HEADER: usize = MAGIC.len() + 3 * 4;

/// Frames of one size as bytes.
pub(super) fn pack(frames: &[RgbImage]) -> Result<Vec<u8>, Error> {
    let first =
        frames.first().ok_or_else(|| Error::Frames("the model made no frame".to_owned()))?;
    let (width, height) = first.dimensions();
    let count = u32::try_from(frames.len())
        .map_err(|_| Error::Frames(format!("{} frames", frames.len())))?;
    let mut bytes = Vec::with_capacity(HEADER + frames.len() * first.as_raw().len());
    bytes.extend_from_slice(MAGIC);
    for number in [width, height, count] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    for frame in frames {
        if frame.dimensions() != (width, height) {
            let (other_width, other_height) = frame.dimensions();
            return Err(Error::Frames(format!(
                "{other_width}x{other_height} among {width}x{height}"
            )));
        }
        bytes.extend_from_slice(frame.as_raw());
    }
    Ok(bytes)
}

/// The frames of [`pack`].
pub(super) fn unpack(bytes: &[u8]) -> Result<Vec<RgbImage>, Error> {
    let (header, pixels) = bytes
        .split_at_checked(HEADER)
        .ok_or_else(|| Error::Frames(format!("{} bytes are no header", bytes.len())))?;
    if !header.starts_with(MAGIC) {
        return Err(Error::Frames("wrong magic".to_owned()));
    }
    let mut numbers = header[MAGIC.len()..]
        .chunks_exact(4)
        .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]));
    let mut number = || numbers.next().expect("the header holds three numbers");
    let (width, height, count) = (number(), number(), number());
    let frame = u64::from(width) * u64::from(height) * 3;
    let wanted = frame.checked_mul(u64::from(count));
    if frame == 0 || wanted != u64::try_from(pixels.len()).ok() {
        return Err(Error::Frames(format!(
            "{} bytes for {count} frames of {width}x{height}",
            pixels.len()
        )));
    }
    let frame =
        usize::try_from(frame).map_err(|_| Error::Frames(format!("frames of {width}x{height}")))?;
    Ok(pixels
        .chunks_exact(frame)
        .map(|raw| {
            RgbImage::from_raw(width, height, raw.to_vec())
                .expect("the chunk has the frame's length")
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_went() {
        let frames: Vec<RgbImage> = (0..3u8)
            .map(|shade| {
                RgbImage::from_fn(5, 4, |x, y| image::Rgb([shade, if x > y { 9 } else { 1 }, 7]))
            })
            .collect();
        assert_eq!(unpack(&pack(&frames).unwrap()).unwrap(), frames);
    }

    #[test]
    fn a_damaged_object_is_an_error() {
        let good = pack(&[RgbImage::new(4, 4)]).unwrap();
        let mut wrong_magic = good.clone();
        wrong_magic[0] ^= 1;
        let mut huge = good.clone();
        huge[8..20].fill(0xff);
        for bad in [&good[..10], &good[..good.len() - 1], &wrong_magic, &huge, b""] {
            assert!(matches!(unpack(bad), Err(Error::Frames(_))), "{} bytes", bad.len());
        }
        assert!(matches!(pack(&[]), Err(Error::Frames(_))));
        assert!(matches!(pack(&[RgbImage::new(4, 4), RgbImage::new(4, 2)]), Err(Error::Frames(_))));
    }
}
