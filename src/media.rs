//! Pictures and films: bytes to images and back, frames to mp4, mp4 to facts.
//!
//! Frames are [`image::RgbImage`], so this layer needs nothing from the engine; it reads no settings and knows no
//! store. Start at [`encode::VideoWriter`] for films and at [`still::decode`] for pictures. The only module that
//! names libav (`ffmpeg_next`), and the only `unsafe` of it is in `media/libav.rs`.

mod colour;
mod doubt;
pub mod encode;
pub mod interpolate;
pub mod label;
mod libav;
pub mod probe;
pub mod still;
pub mod texts;

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Frames per second as a ratio, so that 24000/1001 stays exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRate {
    /// Frames.
    pub num: u32,
    /// In so many seconds.
    pub den: u32,
}

impl FrameRate {
    /// Frames per second.
    pub fn fps(self) -> f64 {
        f64::from(self.num) / f64::from(self.den)
    }
}

/// What a film is to be.
#[derive(Clone, Debug)]
pub struct VideoSpec {
    /// Width of the frames; an odd one is padded by one column in the file.
    pub width: u32,
    /// Height of the frames; an odd one is padded by one row in the file.
    pub height: u32,
    /// Exact rate.
    pub fps: FrameRate,
    /// Container metadata, for example `title` and `comment`; any key is kept. The key [`label::VIDEO_KEY`]
    /// replaces the AI label that is written otherwise.
    pub metadata: Vec<(String, String)>,
    /// Encoder threads. The bytes of the file depend on it, so it is fixed rather than taken from the machine.
    pub threads: u32,
    /// Quality, 1 (best) to 51.
    pub crf: u8,
}

/// What a film is, as read back from its file.
#[derive(Clone, Debug, PartialEq)]
pub struct VideoInfo {
    /// Width in the file, even.
    pub width: u32,
    /// Height in the file, even.
    pub height: u32,
    /// Frames that really decode.
    pub frames: u32,
    /// Average rate.
    pub fps: FrameRate,
    /// Seconds.
    pub duration: f64,
    /// What the encoder says about itself in the stream, where it does: name, core and revision.
    pub encoder: Option<String>,
    /// Short codec name, for example `h264`.
    pub codec: String,
    /// For example `yuv420p`.
    pub pixel_format: String,
    /// YUV matrix, for example `bt709`.
    pub matrix: String,
    /// Colour primaries, for example `bt709`.
    pub primaries: String,
    /// Transfer curve, for example `bt709`.
    pub transfer: String,
    /// Container metadata in the order of the file.
    pub metadata: Vec<(String, String)>,
}

/// Why a picture or film could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller asked to stop.
    #[error("stopped")]
    Stopped,
    /// A picture of no bytes.
    #[error("image file is empty, wanted a PNG, JPEG or WebP file")]
    Empty,
    /// A picture in a format we do not read, or something that is no picture.
    #[error("image format is {found}, wanted PNG, JPEG or WebP")]
    UnsupportedFormat {
        /// What its first bytes say.
        found: String,
    },
    /// A picture that does not decode.
    #[error("image does not decode: {detail}")]
    CorruptImage {
        /// The decoder's word.
        detail: String,
    },
    /// A picture over a limit.
    #[error("image is too large: {what} is {got}, at most {limit} allowed")]
    ImageTooLarge {
        /// Which measure.
        what: &'static str,
        /// Its value, as far as it is known.
        got: String,
        /// The limit.
        limit: String,
    },
    /// A picture under the least side.
    #[error("image is too small: {width}x{height}, each side must be at least {least}")]
    ImageTooSmall {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
        /// The least side.
        least: u32,
    },
    /// A film nobody can make: its specification or a frame is wrong.
    #[error("video {field} is {got}, wanted {wanted}")]
    Spec {
        /// Which part.
        field: &'static str,
        /// What was given.
        got: String,
        /// What is allowed.
        wanted: String,
    },
    /// No encoder opened.
    #[error("no H.264 encoder opens here: {tried}")]
    NoEncoder {
        /// Every name tried, with the reason.
        tried: String,
    },
    /// libav failed while it made or read frames.
    #[error("{stage} failed: {detail}")]
    Libav {
        /// What was being done.
        stage: &'static str,
        /// libav's word.
        detail: String,
    },
    /// A finished film that is not what it should be.
    #[error("the written video has {field} {got}, wanted {wanted}")]
    Check {
        /// Which property.
        field: &'static str,
        /// As read back.
        got: String,
        /// As asked.
        wanted: String,
    },
    /// No space left.
    #[error("no space left to write `{}`", path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// A file that could not be written or read.
    #[error("`{}` cannot be accessed: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// An error of the caller's sink, handed through [`interpolate::interpolate`].
    #[error("{0}")]
    Sink(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// The error class of the wire contract, for example `CORRUPT_IMAGE`.
    pub fn class_name(&self) -> &'static str {
        match self {
            Self::Stopped => "BUG",
            Self::Empty => "EMPTY_FILE",
            Self::UnsupportedFormat { .. } => "UNSUPPORTED_FORMAT",
            Self::CorruptImage { .. } => "CORRUPT_IMAGE",
            Self::ImageTooLarge { .. } => "IMAGE_TOO_LARGE",
            Self::ImageTooSmall { .. } => "IMAGE_TOO_SMALL",
            Self::Spec { .. }
            | Self::NoEncoder { .. }
            | Self::Libav { .. }
            | Self::Check { .. }
            | Self::Sink(_) => "ENCODE_ERROR",
            Self::DiskFull { .. } => "DISK_FULL",
            Self::File { .. } => "OUTPUT_UNWRITABLE",
        }
    }

    fn file(path: &Path, source: io::Error) -> Self {
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Self::DiskFull { path: path.to_owned() };
        }
        Self::File { path: path.to_owned(), source }
    }
}

/// Asks whether to go on; a break is [`Error::Stopped`].
fn ask(go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<(), Error> {
    match go_on() {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Stopped),
    }
}
