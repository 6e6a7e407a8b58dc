//! Which H.264 encoder: each candidate is opened, not just looked up, since a hardware encoder may be compiled in
//! and yet find no hardware.

use ffmpeg_next as ffmpeg;
use ffmpeg_next::encoder::video::Encoder;
use ffmpeg_next::{Dictionary, color};

use super::time_base;
use crate::media::{Error, VideoSpec, libav};

/// Which encoders may be tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// libx264, else libopenh264: the same bytes for the same frames.
    #[default]
    Software,
    /// Hardware first, then as [`Choice::Software`].
    HardwareFirst,
}

impl Choice {
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Software => &["libx264", "libopenh264"],
            Self::HardwareFirst => &["h264_nvenc", "h264_videotoolbox", "libx264", "libopenh264"],
        }
    }
}

/// The first candidate that opens, and a line that says which and why not the ones before.
pub(super) fn open(spec: &VideoSpec, choice: Choice) -> Result<(Encoder, String), Error> {
    let mut tried = Vec::new();
    for name in choice.names() {
        let reason = match ffmpeg::encoder::find_by_name(name) {
            None => "not in this libavcodec".to_owned(),
            Some(codec) => match open_one(spec, name, codec) {
                Ok(encoder) => {
                    let skipped = if tried.is_empty() {
                        String::new()
                    } else {
                        format!(" ({})", tried.join("; "))
                    };
                    return Ok((encoder, format!("{name}{skipped}")));
                }
                Err(error) => format!("does not open: {}", libav::text(error)),
            },
        };
        tried.push(format!("{name}: {reason}"));
    }
    Err(Error::NoEncoder { tried: tried.join("; ") })
}

fn open_one(spec: &VideoSpec, name: &str, codec: ffmpeg::Codec) -> Result<Encoder, ffmpeg::Error> {
    let context = ffmpeg::codec::Context::new_with_codec(codec);
    let mut video = context.encoder().video()?;
    video.set_width(spec.width.next_multiple_of(2));
    video.set_height(spec.height.next_multiple_of(2));
    video.set_format(ffmpeg::format::Pixel::YUV420P);
    video.set_time_base(time_base(spec));
    video.set_frame_rate(Some(time_base(spec).invert()));
    video.set_aspect_ratio((1, 1));
    video.set_gop(key_interval(spec));
    video.set_color_range(color::Range::MPEG);
    video.set_colorspace(color::Space::BT709);
    video.set_color_primaries(color::Primaries::BT709);
    video.set_color_transfer_characteristic(color::TransferCharacteristic::BT709);
    // mp4 keeps the parameter sets in its header.
    video.set_flags(ffmpeg::codec::Flags::GLOBAL_HEADER);
    video.set_threading(ffmpeg::threading::Config {
        count: spec.threads.clamp(1, 64) as usize,
        ..ffmpeg::threading::Config::kind(ffmpeg::threading::Type::Frame)
    });
    if matches!(name, "libopenh264" | "h264_videotoolbox") {
        video.set_bit_rate(bit_rate(spec));
    }
    video.open_as_with(codec, options(spec, name))
}

fn options(spec: &VideoSpec, name: &str) -> Dictionary<'static> {
    let mut options = Dictionary::new();
    options.set("profile", "high");
    match name {
        "libx264" => {
            options.set("preset", "medium");
            options.set("crf", &spec.crf.to_string());
            // Without it the lookahead weighs blocks in vectors: rounded as each processor does, and with AVX-512
            // reading past a row's end, so that the film depends on what the heap held before.
            options.set("x264-params", "cpu-independent=1");
        }
        "h264_nvenc" => {
            options.set("preset", "p5");
            options.set("rc", "vbr");
            options.set("cq", &spec.crf.to_string());
        }
        _ => {}
    }
    options
}

/// A key frame every two seconds, so that seeking is quick.
fn key_interval(spec: &VideoSpec) -> u32 {
    let twice = 2 * u64::from(spec.fps.num);
    let frames = twice.div_ceil(u64::from(spec.fps.den));
    u32::try_from(frames).unwrap_or(250).max(1)
}

/// For encoders without a quality scale: a fifth of a bit per pixel, generous for short clips.
fn bit_rate(spec: &VideoSpec) -> usize {
    let pixels = u64::from(spec.width) * u64::from(spec.height) * u64::from(spec.fps.num)
        / u64::from(spec.fps.den);
    usize::try_from((pixels / 5).clamp(500_000, 100_000_000)).unwrap_or(2_000_000)
}

/// Says of a frame what the stream says too, so that no encoder has to guess.
pub(super) fn tag_frame(frame: &mut ffmpeg::frame::Video) {
    frame.set_color_range(color::Range::MPEG);
    frame.set_color_space(color::Space::BT709);
    frame.set_color_primaries(color::Primaries::BT709);
    frame.set_color_transfer_characteristic(color::TransferCharacteristic::BT709);
}
