//! Bytes to picture and picture to bytes.
//!
//! [`decode`] takes bytes from strangers: the format is seen in the content, every size is checked before anything is
//! allocated for it, and whatever is not a plain upright RGB picture is made one, with a note. Nothing of the file but
//! its pixels goes on. Writing and sizing follow below it.

mod jpeg_end;

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fast_image_resize as fir;
use fast_image_resize::images::{TypedImage, TypedImageRef};
use image::codecs::jpeg::{JpegDecoder, JpegEncoder};
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{
    ColorType, DynamicImage, ImageBuffer, ImageDecoder, ImageError, ImageFormat, Pixel, Rgb,
    RgbImage,
};

use super::{Error, label};

/// What a picture may cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file.
    pub file_bytes: usize,
    /// Longest side.
    pub side: u32,
    /// Shortest side.
    pub least_side: u32,
    /// Width times height.
    pub pixels: u64,
    /// Bytes of the decoded picture and of what its decoder, or the plain picture, needs beside it.
    pub decode_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_bytes: 32 << 20,
            side: 8192,
            least_side: 16,
            pixels: 32 << 20,
            decode_bytes: 256 << 20,
        }
    }
}

/// A picture ready for use.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// Upright, opaque, eight bits.
    pub image: RgbImage,
    /// What was done to it or ignored, one sentence each.
    pub notes: Vec<String>,
}

/// Reads a PNG, JPEG or WebP file.
///
/// # Errors
/// When the file is empty, of another format, over or under a limit, or does not decode.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Decoded, Error> {
    if bytes.is_empty() {
        return Err(Error::Empty);
    }
    if bytes.len() > limits.file_bytes {
        return Err(too_large(
            "file size",
            format!("{} bytes", bytes.len()),
            format!("{} bytes", limits.file_bytes),
        ));
    }
    let format = image::guess_format(bytes).ok();
    // A decoder that trips over hostile bytes must cost one request, not the process.
    catch_unwind(AssertUnwindSafe(|| match format {
        Some(ImageFormat::Png) => {
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), library_limits(limits));
            let decoder = decoder.map_err(|error| refuse(error, limits))?;
            let animated = decoder.is_apng().unwrap_or(false);
            finish(decoder, limits, animated)
        }
        Some(ImageFormat::Jpeg) => {
            let decoder =
                JpegDecoder::new(Cursor::new(bytes)).map_err(|error| refuse(error, limits))?;
            let (width, height) = decoder.dimensions();
            check_size(width, height, limits)?;
            if !jpeg_end::is_complete(bytes) {
                return Err(corrupt("the JPEG data ends before its end marker"));
            }
            finish(decoder, limits, false)
        }
        Some(ImageFormat::WebP) => {
            let decoder =
                WebPDecoder::new(Cursor::new(bytes)).map_err(|error| refuse(error, limits))?;
            let animated = decoder.has_animation();
            finish(decoder, limits, animated)
        }
        other => Err(Error::UnsupportedFormat { found: describe(other, bytes) }),
    }))
    .unwrap_or_else(|_| Err(corrupt("the decoder gave up on it")))
}

/// Everything after the header: size, pixels, orientation, alpha.
fn finish(
    mut decoder: impl ImageDecoder,
    limits: &Limits,
    animated: bool,
) -> Result<Decoded, Error> {
    let (width, height) = decoder.dimensions();
    check_size(width, height, limits)?;
    // What is not plain yet lies beside the plain picture for a moment.
    let is_plain = decoder.color_type() == ColorType::Rgb8;
    let plain = if is_plain { 0 } else { 3 * u64::from(width) * u64::from(height) };
    let needed = decoder.total_bytes().saturating_add(plain);
    if needed > limits.decode_bytes {
        let (got, limit) = (format!("{needed} bytes"), format!("{} bytes", limits.decode_bytes));
        return Err(too_large("decoded size", got, limit));
    }
    decoder.set_limits(library_limits(limits)).map_err(|error| refuse(error, limits))?;
    let mut notes = Vec::new();
    if animated {
        notes.push("the image is animated, its first frame is used".to_owned());
    }
    if matches!(decoder.icc_profile(), Ok(Some(_))) {
        notes.push(
            "the colour profile of the image is ignored, its numbers are taken as sRGB".to_owned(),
        );
    }
    // Broken EXIF says nothing about the pixels.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder).map_err(|error| refuse(error, limits))?;
    let (mut image, blended) = opaque(image);
    if orientation != Orientation::NoTransforms {
        let mut turned = DynamicImage::from(image);
        turned.apply_orientation(orientation);
        image = turned.into_rgb8();
        notes.push("the image is turned upright as its EXIF orientation says".to_owned());
    }
    if blended {
        notes.push("transparent parts of the image are laid on white".to_owned());
    }
    Ok(Decoded { image, notes })
}

fn check_size(width: u32, height: u32, limits: &Limits) -> Result<(), Error> {
    let (size, pixels) = (format!("{width}x{height}"), u64::from(width) * u64::from(height));
    if width.max(height) > limits.side {
        return Err(too_large("size", size, format!("{0}x{0}", limits.side)));
    }
    if pixels > limits.pixels {
        return Err(too_large("pixel count", pixels.to_string(), limits.pixels.to_string()));
    }
    if width.min(height) < limits.least_side {
        return Err(Error::ImageTooSmall { width, height, least: limits.least_side });
    }
    Ok(())
}

fn library_limits(limits: &Limits) -> image::Limits {
    let mut library = image::Limits::no_limits();
    library.max_image_width = Some(limits.side);
    library.max_image_height = Some(limits.side);
    library.max_alloc = Some(limits.decode_bytes);
    library
}

/// Eight bits without alpha, and whether anything was transparent.
fn opaque(image: DynamicImage) -> (RgbImage, bool) {
    let wide = |level: u8| u16::from(level) * 257;
    match image {
        DynamicImage::ImageLumaA8(image) => on_white(&image, |pixel| {
            let [grey, alpha] = pixel.0.map(wide);
            [grey, grey, grey, alpha]
        }),
        DynamicImage::ImageLumaA16(image) => on_white(&image, |pixel| {
            let [grey, alpha] = pixel.0;
            [grey, grey, grey, alpha]
        }),
        DynamicImage::ImageRgba8(image) => on_white(&image, |pixel| pixel.0.map(wide)),
        DynamicImage::ImageRgba16(image) => on_white(&image, |pixel| pixel.0),
        other => (other.into_rgb8(), false),
    }
}

/// Lays a picture on white, in 16 bits, so that deep ones are rounded once; and whether anything was transparent.
fn on_white<P: Pixel>(
    image: &ImageBuffer<P, Vec<P::Subpixel>>,
    deep: impl Fn(&P) -> [u16; 4],
) -> (RgbImage, bool) {
    let white = u64::from(u16::MAX);
    let mut blended = false;
    let mut flat = RgbImage::new(image.width(), image.height());
    for (out, pixel) in flat.pixels_mut().zip(image.pixels()) {
        let [red, green, blue, alpha] = deep(pixel).map(u64::from);
        blended |= alpha != white;
        *out = Rgb([red, green, blue].map(|level| {
            let value = level * alpha + white * (white - alpha);
            // value / 65535 is the 16-bit level, another 257 the 8-bit one.
            let divisor = white * 257;
            u8::try_from((value + divisor / 2) / divisor).unwrap_or(u8::MAX)
        }));
    }
    (flat, blended)
}

fn too_large(what: &'static str, got: String, limit: String) -> Error {
    Error::ImageTooLarge { what, got, limit }
}

fn corrupt(detail: &str) -> Error {
    Error::CorruptImage { detail: detail.to_owned() }
}

fn refuse(error: ImageError, limits: &Limits) -> Error {
    match error {
        ImageError::Limits(kind) => {
            too_large("what it needs", kind.to_string(), format!("{limits:?}"))
        }
        ImageError::Unsupported(kind) => Error::UnsupportedFormat { found: kind.to_string() },
        other => Error::CorruptImage { detail: other.to_string() },
    }
}

/// A name for what the bytes are, for the refusal.
fn describe(format: Option<ImageFormat>, bytes: &[u8]) -> String {
    if let Some(format) = format {
        return format!("{format:?}").to_uppercase();
    }
    let inner = bytes.get(4..12).unwrap_or_default();
    match bytes {
        _ if inner.starts_with(b"ftyp") => format!("ISO media `{}`", inner[4..].escape_ascii()),
        [b'8', b'B', b'P', b'S', ..] => "PSD".to_owned(),
        _ if bytes.trim_ascii_start().starts_with(b"<") => "SVG or other markup".to_owned(),
        _ => "unknown".to_owned(),
    }
}

/// Writes a PNG with an sRGB chunk and `texts` in the order given: tEXt where the text is Latin-1, iTXt otherwise.
///
/// # Panics
/// When the image has no pixels.
pub fn png(image: &RgbImage, texts: &[(&str, &str)]) -> Vec<u8> {
    write_png(image, texts).expect("a picture with pixels is written to memory")
}

/// As [`png()`], with the AI label unless `texts` brings its own XMP.
///
/// # Panics
/// When the image has no pixels.
pub fn generated_png(image: &RgbImage, texts: &[(&str, &str)]) -> Vec<u8> {
    if texts.iter().any(|(key, _)| *key == label::PNG_KEY) {
        return png(image, texts);
    }
    png(image, &[texts, &[(label::PNG_KEY, label::XMP)]].concat())
}

fn write_png(image: &RgbImage, texts: &[(&str, &str)]) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_source_srgb(png::SrgbRenderingIntent::Perceptual);
    let mut writer = encoder.write_header()?;
    for (key, text) in texts {
        let keyword = keyword(key);
        // XMP is UTF-8 by its own rule, whatever it holds.
        let latin = *key != label::PNG_KEY && text.chars().all(|c| u32::from(c) < 256 && c != '\0');
        if latin {
            writer.write_text_chunk(&png::text_metadata::TEXtChunk::new(keyword, *text))?;
        } else {
            writer.write_text_chunk(&png::text_metadata::ITXtChunk::new(
                keyword,
                text.replace('\0', ""),
            ))?;
        }
    }
    writer.write_image_data(image.as_raw())?;
    writer.finish()?;
    Ok(bytes)
}

/// `key` within the rules of PNG keywords: 1 to 79 printable Latin-1 characters.
fn keyword(key: &str) -> String {
    let allowed = |c: &char| matches!(u32::from(*c), 32..=126 | 161..=255);
    let name: String = key.chars().filter(allowed).take(79).collect();
    if name.trim().is_empty() { "Comment".to_owned() } else { name.trim().to_owned() }
}

/// Writes a JPEG of the given quality, 1 to 100.
///
/// # Panics
/// When a side is zero or over 65535.
pub fn jpeg(image: &RgbImage, quality: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, quality.clamp(1, 100))
        .encode_image(image)
        .expect("a picture with pixels is written to memory");
    bytes
}

/// As [`jpeg`], with the AI label.
///
/// # Panics
/// As [`jpeg`].
pub fn generated_jpeg(image: &RgbImage, quality: u8) -> Vec<u8> {
    let mut bytes = jpeg(image, quality);
    // After the start marker and the JFIF segment, which readers expect first.
    let jfif = bytes.get(2..4) == Some(&[0xFF, 0xE0]);
    let at = if jfif { 4 + usize::from(u16::from_be_bytes([bytes[4], bytes[5]])) } else { 2 };
    if let Some(segment) = label::jpeg_segment(label::XMP) {
        bytes.splice(at..at, segment);
    }
    bytes
}

/// Scales to exactly `width` x `height` with an antialiased Lanczos filter; the aspect ratio is the caller's affair.
pub fn resize(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    scale(image, width, height, fir::ResizeOptions::new())
}

/// Scales to cover `width` x `height`, then cuts off what sticks out, equally on both sides.
pub fn cover(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    scale(image, width, height, fir::ResizeOptions::new().fit_into_destination(Some((0.5, 0.5))))
}

fn scale(image: &RgbImage, width: u32, height: u32, options: fir::ResizeOptions) -> RgbImage {
    let (width, height) = (width.max(1), height.max(1));
    if image.dimensions() == (width, height) {
        return image.clone();
    }
    if image.as_raw().is_empty() {
        return RgbImage::new(width, height);
    }
    let options = options.resize_alg(fir::ResizeAlg::Convolution(fir::FilterType::Lanczos3));
    // By its type, not by a value of `PixelType`: the latter compiles every pixel format there is.
    let from = TypedImageRef::<fir::pixels::U8x3>::from_buffer(
        image.width(),
        image.height(),
        image.as_raw(),
    )
    .expect("the buffer of an image holds its pixels");
    let mut scaled = RgbImage::new(width, height);
    let mut to = TypedImage::<fir::pixels::U8x3>::from_buffer(width, height, &mut scaled)
        .expect("the buffer was made for this size");
    fir::Resizer::new()
        .resize_typed(&from, &mut to, &options)
        .expect("the crop of the filter lies in the image");
    scaled
}
