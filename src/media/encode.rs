//! Frames to an mp4 file that every player reads as meant: H.264 High, yuv420p, limited range, BT.709 throughout.
//!
//! The file is written as `NAME.part` beside its target, closed, flushed to disk, opened again and decoded frame by
//! frame; only then does it get its name. A writer that is dropped before [`VideoWriter::finish`] leaves nothing.

mod h264;

use std::fs::{self, File};
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ffmpeg_next as ffmpeg;
use ffmpeg_next::format::context::Output;
use image::RgbImage;

pub use self::h264::Choice;
use super::colour::{self, Difference, Plane};
use super::{Error, VideoInfo, VideoSpec, label, libav, probe};
use crate::failpoint;

const STAGE: &str = "encoding the video";
const MUX: &str = "writing the video file";

/// Longest side H.264 level 6.2 can hold.
const MAX_SIDE: u32 = 16384;

/// Version of the library that encodes.
pub fn libavcodec() -> String {
    let number = ffmpeg::codec::version();
    format!("libavcodec {}.{}.{}", number >> 16, (number >> 8) & 255, number & 255)
}

/// An mp4 in the making.
pub struct VideoWriter {
    encoder: ffmpeg::encoder::video::Encoder,
    /// `None` once the file is closed.
    output: Option<Output>,
    /// After `output`, so that the file is closed before it is removed.
    part: Part,
    target: PathBuf,
    spec: VideoSpec,
    pushed: u32,
    report: String,
}

impl VideoWriter {
    /// Starts a film at `target` with the software encoder (libx264, else libopenh264).
    ///
    /// # Errors
    /// When the specification is impossible, no encoder opens, or the folder cannot be written.
    pub fn create(target: &Path, spec: &VideoSpec) -> Result<Self, Error> {
        Self::create_with(target, spec, Choice::Software)
    }

    /// As [`VideoWriter::create`], with a say in which encoders are tried.
    ///
    /// # Errors
    /// As [`VideoWriter::create`].
    pub fn create_with(target: &Path, spec: &VideoSpec, choice: Choice) -> Result<Self, Error> {
        libav::init();
        check(spec)?;
        let part = Part::create(target)?;
        let (encoder, report) = h264::open(spec, choice)?;
        let output = open_output(&part.path, spec, &encoder)?;
        let output = Some(output);
        Ok(Self {
            encoder,
            output,
            part,
            target: target.to_owned(),
            spec: spec.clone(),
            pushed: 0,
            report,
        })
    }

    /// Which encoder is used, and why not the ones before it.
    pub fn encoder(&self) -> String {
        self.report.clone()
    }

    /// Adds one frame of exactly the specified size.
    ///
    /// # Errors
    /// When the size differs, the encoder fails or the disk is full.
    pub fn push(&mut self, image: &RgbImage) -> Result<(), Error> {
        let (wanted, got) = ((self.spec.width, self.spec.height), image.dimensions());
        if got != wanted {
            return Err(Error::Spec {
                field: "frame size",
                got: format!("{}x{}", got.0, got.1),
                wanted: format!("{}x{}", wanted.0, wanted.1),
            });
        }
        let mut frame = yuv420p(image);
        frame.set_pts(Some(i64::from(self.pushed)));
        self.encoder.send_frame(&frame).map_err(|error| libav::failed(STAGE, error))?;
        self.pushed += 1;
        self.fail_at("frame_encoded")?;
        self.drain()
    }

    /// Ends the film: trailer, close, flush to disk, decode it all once, and only then its name.
    ///
    /// A long film takes a while to read back: `go_on` is asked at every frame of it, and a break leaves nothing.
    ///
    /// # Errors
    /// When no frame was pushed, something fails on the way, the file read back is not what was asked, or `go_on`
    /// breaks.
    pub fn finish(
        mut self,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<VideoInfo, Error> {
        if self.pushed == 0 {
            return Err(Error::Spec {
                field: "frame count",
                got: "0".to_owned(),
                wanted: "at least 1".to_owned(),
            });
        }
        self.encoder.send_eof().map_err(|error| libav::failed(STAGE, error))?;
        self.drain()?;
        super::ask(go_on)?;
        self.fail_at("trailer")?;
        if let Some(mut output) = self.output.take() {
            output
                .write_trailer()
                .map_err(|error| libav::failed_on(&self.part.path, MUX, error))?;
        }
        seal(&self.part.path, &self.spec)?;
        self.fail_at("sealed")?;
        let info = probe::probe_while(&self.part.path, go_on)?;
        compare(&self.spec, self.pushed, &info)?;
        self.part.publish(&self.target)?;
        Ok(info)
    }

    fn fail_at(&self, point: &'static str) -> Result<(), Error> {
        failpoint::hit(point).map_err(|error| Error::file(&self.part.path, error))
    }

    /// Moves every packet the encoder has ready into the file.
    fn drain(&mut self) -> Result<(), Error> {
        let Some(output) = self.output.as_mut() else { return Ok(()) };
        let base = time_base(&self.spec);
        loop {
            let mut packet = ffmpeg::Packet::empty();
            match self.encoder.receive_packet(&mut packet) {
                Ok(()) => {}
                Err(ffmpeg::Error::Eof) => return Ok(()),
                Err(error) if libav::is_again(error) => return Ok(()),
                Err(error) => return Err(libav::failed(STAGE, error)),
            }
            packet.set_stream(0);
            packet.set_duration(1);
            // The muxer chose its own clock when the header was written.
            let ticks = output.stream(0).map_or(base, |stream| stream.time_base());
            packet.rescale_ts(base, ticks);
            packet
                .write_interleaved(output)
                .map_err(|error| libav::failed_on(&self.part.path, MUX, error))?;
        }
    }
}

fn time_base(spec: &VideoSpec) -> ffmpeg::Rational {
    let signed = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
    ffmpeg::Rational(signed(spec.fps.den), signed(spec.fps.num))
}

fn check(spec: &VideoSpec) -> Result<(), Error> {
    let sides = 1..=MAX_SIDE;
    if !sides.contains(&spec.width) || !sides.contains(&spec.height) {
        return Err(Error::Spec {
            field: "size",
            got: format!("{}x{}", spec.width, spec.height),
            wanted: format!("sides from 1 to {MAX_SIDE}"),
        });
    }
    let terms = 1..=10_000_000;
    let rate = spec.fps;
    if !terms.contains(&rate.num)
        || !terms.contains(&rate.den)
        || !(0.01..=1000.0).contains(&rate.fps())
    {
        return Err(Error::Spec {
            field: "rate",
            got: format!("{}/{}", rate.num, rate.den),
            wanted: "0.01 to 1000 frames per second, terms up to 10000000".to_owned(),
        });
    }
    if !(1..=51).contains(&spec.crf) {
        return Err(Error::Spec {
            field: "crf",
            got: spec.crf.to_string(),
            wanted: "1 to 51".to_owned(),
        });
    }
    Ok(())
}

fn open_output(
    path: &Path,
    spec: &VideoSpec,
    encoder: &ffmpeg::encoder::video::Encoder,
) -> Result<Output, Error> {
    let on_file = |error| libav::failed_on(path, MUX, error);
    let mut output = ffmpeg::format::output_as(&libav::address(path)?, "mp4").map_err(on_file)?;
    let mut stream = output.add_stream(ffmpeg::codec::Id::H264).map_err(on_file)?;
    stream.set_parameters(encoder);
    stream.set_time_base(time_base(spec));
    stream.set_avg_frame_rate(time_base(spec).invert());
    output.set_metadata(tags(spec));
    let mut options = ffmpeg::Dictionary::new();
    options.set("movflags", "+faststart+use_metadata_tags");
    output.write_header_with(options).map_err(on_file)?;
    Ok(output)
}

/// The container metadata: the caller's, and the AI label in words that any tag reader shows.
fn tags(spec: &VideoSpec) -> ffmpeg::Dictionary<'static> {
    let mut tags = ffmpeg::Dictionary::new();
    // A NUL would end the text inside libav.
    let clean = |text: &str| text.replace('\0', "");
    for (key, value) in spec.metadata.iter().filter(|(key, _)| key != label::VIDEO_KEY) {
        let key = clean(key);
        if !key.is_empty() {
            tags.set(&key, &clean(value));
        }
    }
    if own_label(spec).is_none() {
        tags.set("DigitalSourceType", label::SOURCE_TYPE);
    }
    tags
}

fn own_label(spec: &VideoSpec) -> Option<&str> {
    spec.metadata.iter().find(|(key, _)| key == label::VIDEO_KEY).map(|(_, value)| value.as_str())
}

/// Appends the XMP box to the closed file and flushes it to disk.
fn seal(path: &Path, spec: &VideoSpec) -> Result<(), Error> {
    let xmp = label::xmp_box(own_label(spec).unwrap_or(label::XMP)).ok_or_else(|| Error::Spec {
        field: "xmp",
        got: "over 4 GiB".to_owned(),
        wanted: "less".to_owned(),
    })?;
    let append = || -> std::io::Result<()> {
        let mut file = File::options().append(true).open(path)?;
        file.write_all(&xmp)?;
        file.sync_all()
    };
    append().map_err(|error| Error::file(path, error))
}

/// The file read back against what was asked.
fn compare(spec: &VideoSpec, pushed: u32, info: &VideoInfo) -> Result<(), Error> {
    let size = (spec.width.next_multiple_of(2), spec.height.next_multiple_of(2));
    let seconds = f64::from(pushed) / spec.fps.fps();
    if (info.duration - seconds).abs() > 0.001 {
        let (got, wanted) = (format!("{} s", info.duration), format!("{seconds} s"));
        return Err(Error::Check { field: "duration", got, wanted });
    }
    let rows = [
        ("frame count", info.frames.to_string(), pushed.to_string()),
        ("width", info.width.to_string(), size.0.to_string()),
        ("height", info.height.to_string(), size.1.to_string()),
        ("pixel format", info.pixel_format.clone(), "yuv420p".to_owned()),
        ("matrix", info.matrix.clone(), "bt709".to_owned()),
    ];
    match rows.into_iter().find(|(_, got, wanted)| got != wanted) {
        Some((field, got, wanted)) => Err(Error::Check { field, got, wanted }),
        None => Ok(()),
    }
}

fn yuv420p(image: &RgbImage) -> ffmpeg::frame::Video {
    let (width, height) = (image.width().next_multiple_of(2), image.height().next_multiple_of(2));
    let mut frame = ffmpeg::frame::Video::new(ffmpeg::format::Pixel::YUV420P, width, height);
    h264::tag_frame(&mut frame);
    let (width, height) = (width as usize, height as usize);
    let stride = frame.stride(0);
    colour::luma(image, width, height, Plane { data: frame.data_mut(0), stride });
    for (index, which) in [(1, Difference::Blue), (2, Difference::Red)] {
        let stride = frame.stride(index);
        colour::chroma(image, width, height, which, Plane { data: frame.data_mut(index), stride });
    }
    frame
}

/// The unfinished file, removed unless it is published.
struct Part {
    path: PathBuf,
    published: bool,
}

impl Part {
    fn create(target: &Path) -> Result<Self, Error> {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let path = target.with_file_name(name);
        File::create(&path).map_err(|error| Error::file(&path, error))?;
        Ok(Self { path, published: false })
    }

    /// Gives the file its name and flushes the folder, so that the name survives a power cut.
    fn publish(mut self, target: &Path) -> Result<(), Error> {
        fs::rename(&self.path, target).map_err(|error| Error::file(target, error))?;
        self.published = true;
        let folder = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|error| Error::file(target, error))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished video could not be removed");
        }
    }
}
