//! Few frames to many: motion-compensated in-between frames from libavfilter's `minterpolate`.
//!
//! Output frame `k` of `m` shows source time `k (n - 1) / (m - 1)`, so both ends are exact and every source frame that
//! falls on that grid is handed on untouched. The filter runs on the grid itself: its input and output clocks are set
//! so that no rounding is left. Where its guess cannot be trusted, `media/doubt.rs` mixes the neighbours instead.

use std::ops::ControlFlow;

use ffmpeg_next as ffmpeg;
use image::RgbImage;

use super::{Error, doubt, libav};

const STAGE: &str = "motion interpolation";

/// The filter works in blocks of this many pixels; frames are padded to whole blocks and one more on each side.
const BLOCK: usize = 16;

/// What was handed to the sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interpolated {
    /// Source frames, unchanged.
    pub native: u32,
    /// Frames in between, made here.
    pub made: u32,
}

/// Hands `out_count` frames to `sink`, one at a time, evenly spread over `frames`. A break of the sink ends it early.
///
/// # Errors
/// When there is no frame, sizes differ, the filter fails, or the sink returns an error.
pub fn interpolate(
    frames: &[RgbImage],
    out_count: u32,
    sink: &mut dyn FnMut(RgbImage) -> Result<ControlFlow<()>, Error>,
) -> Result<Interpolated, Error> {
    libav::init();
    check(frames, out_count)?;
    let grid = Grid { sources: frames.len() as u64, outputs: u64::from(out_count) };
    let mut filter = None;
    let mut counts = Interpolated { native: 0, made: 0 };
    for k in 0..u64::from(out_count) {
        let place = grid.place(k);
        let earlier = &frames[place.index];
        let frame = if place.is_source() {
            earlier.clone()
        } else {
            let later = &frames[place.index + 1];
            if earlier == later {
                earlier.clone()
            } else {
                let filter = match &mut filter {
                    Some(filter) => filter,
                    none => none.insert(Filter::open(frames, &grid)?),
                };
                let guess = filter.frame(k)?;
                doubt::settle(guess, earlier, later, place.fraction())
            }
        };
        let fresh = grid.is_fresh_source(k);
        counts.native += u32::from(fresh);
        counts.made += u32::from(!fresh);
        if sink(frame)?.is_break() {
            break;
        }
    }
    Ok(counts)
}

fn check(frames: &[RgbImage], out_count: u32) -> Result<(), Error> {
    let Some(first) = frames.first() else {
        return Err(Error::Spec {
            field: "frame count",
            got: "0".to_owned(),
            wanted: "at least 1".to_owned(),
        });
    };
    if out_count > 1_000_000 || frames.len() > 100_000 || first.as_raw().is_empty() {
        return Err(Error::Spec {
            field: "frame count",
            got: format!("{out_count} from {} of {:?}", frames.len(), first.dimensions()),
            wanted: "at most 1000000 from 100000, with pixels".to_owned(),
        });
    }
    match frames.iter().find(|frame| frame.dimensions() != first.dimensions()) {
        Some(other) => Err(Error::Spec {
            field: "frame size",
            got: format!("{:?}", other.dimensions()),
            wanted: format!("{:?}", first.dimensions()),
        }),
        None => Ok(()),
    }
}

/// Where output frames fall among the sources.
struct Grid {
    sources: u64,
    outputs: u64,
}

/// A source frame and how far past it, as a ratio.
struct Place {
    index: usize,
    past: u64,
    of: u64,
}

impl Grid {
    fn place(&self, k: u64) -> Place {
        let of = self.outputs.saturating_sub(1).max(1);
        let time = k * (self.sources - 1);
        Place { index: usize::try_from(time / of).unwrap_or(usize::MAX), past: time % of, of }
    }

    /// Whether output `k` is a source frame that was not handed on before (a single source repeats itself).
    fn is_fresh_source(&self, k: u64) -> bool {
        let place = self.place(k);
        place.is_source()
            && (k == 0 || self.place(k - 1).index != place.index || self.place(k - 1).past != 0)
    }
}

impl Place {
    fn is_source(&self) -> bool {
        self.past == 0
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of frames are far below 2^24")]
    fn fraction(&self) -> f32 {
        self.past as f32 / self.of as f32
    }
}

/// A running filter graph, fed as far as it needs.
struct Filter<'a> {
    graph: ffmpeg::filter::Graph,
    frames: &'a [RgbImage],
    fed: usize,
    step: i64,
}

/// Output frames a second inside the graph; any number does, since only the ratio of its clocks counts.
const RATE: u64 = 30;

impl<'a> Filter<'a> {
    fn open(frames: &'a [RgbImage], grid: &Grid) -> Result<Self, Error> {
        let size = Padded::of(&frames[0]);
        let clock = RATE * (grid.sources - 1);
        let source = format!(
            "video_size={}x{}:pix_fmt=yuva444p:time_base=1/{clock}:pixel_aspect=1/1",
            size.width, size.height
        );
        let motion =
            format!("minterpolate=fps={RATE}:mi_mode=mci:mc_mode=obmc:me_mode=bilat:scd=none");
        let build = || -> Result<ffmpeg::filter::Graph, ffmpeg::Error> {
            let find = |name| ffmpeg::filter::find(name).ok_or(ffmpeg::Error::FilterNotFound);
            let mut graph = ffmpeg::filter::Graph::new();
            graph.add(&find("buffer")?, "in", &source)?;
            graph.add(&find("buffersink")?, "out", "")?;
            graph.output("in", 0)?.input("out", 0)?.parse(&motion)?;
            graph.validate()?;
            Ok(graph)
        };
        let graph = build().map_err(|error| libav::failed(STAGE, error))?;
        let step = i64::try_from(grid.outputs - 1).unwrap_or(i64::MAX);
        Ok(Self { graph, frames, fed: 0, step })
    }

    /// Output frame `k`; asked for in rising order.
    fn frame(&mut self, k: u64) -> Result<RgbImage, Error> {
        let wanted = i64::try_from(k).unwrap_or(i64::MAX);
        let missing = || Error::Libav { stage: STAGE, detail: format!("frame {k} did not come") };
        loop {
            let mut frame = ffmpeg::frame::Video::empty();
            let mut sink = self.graph.get("out").ok_or_else(missing)?;
            match sink.sink().frame(&mut frame) {
                Ok(()) if frame.pts().is_some_and(|pts| pts < wanted) => {}
                Ok(()) if frame.pts() == Some(wanted) => return self.take(&frame),
                Ok(()) | Err(ffmpeg::Error::Eof) => return Err(missing()),
                Err(error) if libav::is_again(error) => self.feed()?,
                Err(error) => return Err(libav::failed(STAGE, error)),
            }
        }
    }

    /// Feeds the next source; the last one is repeated, since the filter looks ahead.
    fn feed(&mut self) -> Result<(), Error> {
        const LOOK_AHEAD: usize = 3;
        if self.fed >= self.frames.len() + LOOK_AHEAD {
            return Err(Error::Libav {
                stage: STAGE,
                detail: "the filter asks for more than there is".to_owned(),
            });
        }
        let mut frame = planes(&self.frames[self.fed.min(self.frames.len() - 1)]);
        frame.set_pts(i64::try_from(self.fed).ok().map(|index| index * self.step));
        self.fed += 1;
        let mut source = self
            .graph
            .get("in")
            .ok_or(Error::Libav { stage: STAGE, detail: "no input".to_owned() })?;
        source.source().add(&frame).map_err(|error| libav::failed(STAGE, error))
    }

    fn take(&self, frame: &ffmpeg::frame::Video) -> Result<RgbImage, Error> {
        let (size, first) = (Padded::of(&self.frames[0]), &self.frames[0]);
        let shape = (frame.format(), frame.width() as usize, frame.height() as usize);
        if shape != (ffmpeg::format::Pixel::YUVA444P, size.width, size.height) {
            return Err(Error::Libav {
                stage: STAGE,
                detail: format!("the filter made {shape:?}"),
            });
        }
        let mut image = RgbImage::new(first.width(), first.height());
        let width = image.width() as usize;
        for (y, row) in image.chunks_exact_mut(width * 3).enumerate() {
            for (channel, plane) in COLOURS.into_iter().enumerate() {
                let start = (y + BLOCK) * frame.stride(plane) + BLOCK;
                let line = &frame.data(plane)[start..start + width];
                for (pixel, value) in row.as_chunks_mut::<3>().0.iter_mut().zip(line) {
                    pixel[channel] = *value;
                }
            }
        }
        Ok(image)
    }
}

/// The planes that hold red, green and blue. Plane 0 holds brightness, the only one the filter searches motion in; all
/// planes are then moved alike, so colours never pass through a conversion.
const COLOURS: [usize; 3] = [3, 1, 2];

/// Size of a frame with its margin.
struct Padded {
    width: usize,
    height: usize,
}

impl Padded {
    fn of(image: &RgbImage) -> Self {
        let side =
            |length: u32| (length as usize).next_multiple_of(BLOCK).max(2 * BLOCK) + 2 * BLOCK;
        Self { width: side(image.width()), height: side(image.height()) }
    }
}

/// A source frame as the filter gets it: four planes, the edge repeated into the margin.
fn planes(image: &RgbImage) -> ffmpeg::frame::Video {
    let size = Padded::of(image);
    let mut frame = ffmpeg::frame::Video::new(
        ffmpeg::format::Pixel::YUVA444P,
        u32::try_from(size.width).unwrap_or(u32::MAX),
        u32::try_from(size.height).unwrap_or(u32::MAX),
    );
    let (width, height) = (image.width() as usize, image.height() as usize);
    let inside = |at: usize, length: usize| at.saturating_sub(BLOCK).min(length - 1);
    for plane in 0..4 {
        let stride = frame.stride(plane);
        for (y, line) in frame.data_mut(plane).chunks_mut(stride).take(size.height).enumerate() {
            let start = inside(y, height) * width * 3;
            let row = image.as_raw()[start..start + width * 3].as_chunks::<3>().0;
            for (x, out) in line[..size.width].iter_mut().enumerate() {
                let [red, green, blue] = row[inside(x, width)];
                *out = match plane {
                    0 => doubt::brightness([red, green, blue]),
                    1 => green,
                    2 => blue,
                    _ => red,
                };
            }
        }
    }
    frame
}
