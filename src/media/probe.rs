//! An mp4 file to its facts: the check before a film is committed.
//!
//! Every frame is decoded, so a count here is a count of frames that really play. Only files of our own are opened:
//! bytes that users send never reach libavformat.

use std::ops::ControlFlow;
use std::path::Path;

use ffmpeg_next as ffmpeg;
use ffmpeg_next::format::context::Input;

use super::{Error, FrameRate, VideoInfo, libav};

const STAGE: &str = "reading the video";

/// Reads and fully decodes the film at `path`.
///
/// # Errors
/// When the file is not there, is no mp4 with one H.264 or other video stream, or when a frame does not decode.
pub fn probe(path: &Path) -> Result<VideoInfo, Error> {
    probe_while(path, &mut || ControlFlow::Continue(()))
}

/// As [`probe`], as long as `go_on`, asked at every packet, does not break.
///
/// # Errors
/// As [`probe`], and [`Error::Stopped`].
pub fn probe_while(
    path: &Path,
    go_on: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<VideoInfo, Error> {
    libav::init();
    std::fs::metadata(path).map_err(|error| Error::file(path, error))?;
    let mut input = open(path)?;
    let found = input.streams().best(ffmpeg::media::Type::Video).ok_or_else(|| Error::Libav {
        stage: STAGE,
        detail: format!("no video stream in `{}`", path.display()),
    })?;
    let (index, base, rate) = (found.index(), found.time_base(), found.avg_frame_rate());
    let ticks = found.duration();
    let mut decoder = decoder(found.parameters())?;
    let metadata = libav::metadata(&input);
    let broken = |error| libav::failed_on(path, STAGE, error);
    let (mut frames, mut encoder) = (0, None);
    let mut packet = ffmpeg::Packet::empty();
    loop {
        super::ask(go_on)?;
        match packet.read(&mut input) {
            Ok(()) if packet.stream() != index => {}
            Ok(()) => {
                if frames == 0 && encoder.is_none() {
                    encoder = packet.data().and_then(own_words);
                }
                decoder.send_packet(&packet).map_err(broken)?;
                frames += drain(&mut decoder).map_err(broken)?;
            }
            Err(ffmpeg::Error::Eof) => break,
            Err(error) => return Err(broken(error)),
        }
    }
    decoder.send_eof().map_err(broken)?;
    frames += drain(&mut decoder).map_err(broken)?;
    Ok(VideoInfo {
        width: decoder.width(),
        height: decoder.height(),
        frames,
        fps: FrameRate {
            num: positive(rate.numerator()),
            den: positive(rate.denominator()).max(1),
        },
        duration: seconds(ticks, base),
        encoder,
        codec: ffmpeg::decoder::find(decoder.id())
            .map_or_else(String::new, |codec| codec.name().to_owned()),
        pixel_format: pixel_name(decoder.format()),
        matrix: decoder.color_space().name().unwrap_or("unknown").to_owned(),
        primaries: decoder.color_primaries().name().unwrap_or("unknown").to_owned(),
        transfer: decoder.color_transfer_characteristic().name().unwrap_or("unknown").to_owned(),
        metadata,
    })
}

fn open(path: &Path) -> Result<Input, Error> {
    let mut options = ffmpeg::Dictionary::new();
    options.set("protocol_whitelist", "file");
    options.set("format_whitelist", "mov,mp4,m4a,3gp,3g2,mj2");
    ffmpeg::format::input_with_dictionary(&libav::address(path)?, options)
        .map_err(|error| libav::failed_on(path, STAGE, error))
}

fn decoder(parameters: ffmpeg::codec::Parameters) -> Result<ffmpeg::decoder::Video, Error> {
    let context = ffmpeg::codec::Context::from_parameters(parameters)
        .map_err(|error| libav::failed(STAGE, error))?;
    let mut decoder = context.decoder();
    // A broken frame is an error here, not something to be painted over.
    decoder.check(ffmpeg::decoder::Check::EXPLODE | ffmpeg::decoder::Check::CRC);
    decoder.set_threading(ffmpeg::threading::Config::kind(ffmpeg::threading::Type::Frame));
    decoder.video().map_err(|error| libav::failed(STAGE, error))
}

/// Takes every frame the decoder has ready.
fn drain(decoder: &mut ffmpeg::decoder::Video) -> Result<u32, ffmpeg::Error> {
    let mut frame = ffmpeg::frame::Video::empty();
    let mut frames = 0;
    loop {
        match decoder.receive_frame(&mut frame) {
            Ok(()) if frame.has_decode_errors() || frame.is_corrupt() => {
                return Err(ffmpeg::Error::InvalidData);
            }
            Ok(()) => frames += 1,
            Err(ffmpeg::Error::Eof) => return Ok(frames),
            Err(error) if libav::is_again(error) => return Ok(frames),
            Err(error) => return Err(error),
        }
    }
}

/// What x264 says about itself in the first packet of a film.
fn own_words(packet: &[u8]) -> Option<String> {
    let opening = b"x264 - core ";
    let start = packet.windows(opening.len()).position(|bytes| bytes == opening)?;
    let words = packet[start..].iter().take_while(|byte| byte.is_ascii_graphic() || **byte == b' ');
    let words: String = words.map(|byte| char::from(*byte)).take(200).collect();
    Some(words.split(" - ").take(2).collect::<Vec<_>>().join(" "))
}

fn pixel_name(format: ffmpeg::format::Pixel) -> String {
    format
        .descriptor()
        .map_or_else(|| "unknown".to_owned(), |descriptor| descriptor.name().to_owned())
}

fn positive(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

#[expect(clippy::cast_precision_loss, reason = "a film's ticks are far below 2^53")]
fn seconds(ticks: i64, base: ffmpeg::Rational) -> f64 {
    ticks.max(0) as f64 * f64::from(base.numerator()) / f64::from(base.denominator())
}
