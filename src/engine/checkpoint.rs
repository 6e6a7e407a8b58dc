//! A run put down between two steps, as bytes, and taken up again: what follows has the same bits as without a break.
//!
//! Everything else a run needs (conditions, schedule, the noise of each step) is made again from its request, so a
//! checkpoint is small. The bytes are a safetensors file; whose run it was stands in its metadata, and so do the hashes
//! of every step so far, which another run of the same request can be compared with.

use std::collections::HashMap;
use std::fmt;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::denoise::DenoiseState;
use super::{Error, Result, weights};

/// Where a run is.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// Denoised latents: of the pictures before the one at work, or of the whole clip.
    pub latents: Vec<Tensor>,
    /// The picture or clip at work; `None` between two of them.
    pub state: Option<DenoiseState>,
    /// What is decoded: pictures or frames, all of one size.
    pub frames: Vec<RgbImage>,
    /// Half precision overflowed in the decoder, so the rest is decoded in f32.
    pub widened: bool,
    /// How the frames were decoded, in the caller's words; see [`decode_as`](Self::decode_as).
    pub decoding: String,
    /// Hashes of what was made so far; see [`record`](Self::record).
    pub trace: Trace,
    /// Frames that the trace covers.
    traced: usize,
}

/// Lower-case hex SHA-256 of what a run made on its way, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Of the latents after each step, picture after picture: their numbers as little-endian f32.
    pub denoise: Vec<String>,
    /// Of each decoded chunk: its pixels, frame after frame, three bytes each.
    pub decode: Vec<String>,
}

/// Shown where a run is after every step and every decoded chunk; keeps what it likes.
pub type Keep<'a> = dyn FnMut(&mut Checkpoint) + 'a;

/// The one metadata key; several would come in any order, and the same state would have many hashes.
const ABOUT: &str = "about";

/// What the tensors do not say.
#[derive(Serialize, Deserialize)]
struct About {
    run: String,
    /// Steps done of the picture or clip at work.
    step: Option<usize>,
    widened: bool,
    decoding: String,
    trace: Trace,
}

impl Checkpoint {
    /// Whether nothing is done yet.
    pub fn is_empty(&self) -> bool {
        self.latents.is_empty() && self.state.is_none() && self.frames.is_empty()
    }

    /// From now on frames are decoded as `decoding` says; those that were decoded in another way are forgotten.
    pub fn decode_as(&mut self, decoding: String) {
        if self.decoding != decoding {
            self.frames.clear();
            (self.widened, self.decoding) = (false, decoding);
            (self.trace.decode, self.traced) = (Vec::new(), 0);
        }
    }

    /// Adds the newest step or chunk to the trace; to be called once for each.
    pub fn record(&mut self) -> Result<()> {
        match &self.state {
            Some(state) => {
                let mut hasher = Sha256::new();
                hasher.update(bytes_of(&state.latents)?);
                self.trace.denoise.push(weights::hex(hasher));
            }
            None => {
                let mut hasher = Sha256::new();
                self.frames
                    .iter()
                    .skip(self.traced)
                    .for_each(|frame| hasher.update(frame.as_raw()));
                self.traced = self.frames.len();
                self.trace.decode.push(weights::hex(hasher));
            }
        }
        Ok(())
    }

    /// The checkpoint as bytes; `run` says whose it is.
    pub fn to_bytes(&self, run: &str) -> Result<Vec<u8>> {
        let mut parts = Vec::new();
        for (latents, index) in self.latents.iter().zip(0..) {
            parts.push(Part::of_tensor(format!("latents.{index}"), latents)?);
        }
        let about = About {
            run: run.to_owned(),
            step: self.state.as_ref().map(|state| state.step),
            widened: self.widened,
            decoding: self.decoding.clone(),
            trace: self.trace.clone(),
        };
        let about =
            serde_json::to_string(&about).map_err(|error| Error::Checkpoint(error.to_string()))?;
        let metadata = HashMap::from([(ABOUT.to_owned(), about)]);
        if let Some(state) = &self.state {
            parts.push(Part::of_tensor("state".to_owned(), &state.latents)?);
            for (past, index) in state.history.iter().zip(0..) {
                parts.push(Part::of_tensor(format!("history.{index}"), past)?);
            }
        }
        if let Some(first) = self.frames.first() {
            let (width, height) = (first.width() as usize, first.height() as usize);
            let bytes = self.frames.iter().flat_map(|frame| frame.as_raw()).copied().collect();
            let shape = vec![self.frames.len(), height, width, 3];
            parts.push(Part { name: "frames".to_owned(), dtype: Dtype::U8, shape, bytes });
        }
        let views = parts
            .iter()
            .map(|part| {
                let view = TensorView::new(part.dtype, part.shape.clone(), &part.bytes)?;
                Ok((&part.name, view))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(safetensors::serialize(views, Some(metadata))?)
    }

    /// The checkpoint of [`to_bytes`](Self::to_bytes), on `device`.
    ///
    /// # Errors
    /// When the bytes are none, or not of this `run`.
    pub fn from_bytes(bytes: &[u8], run: &str, device: &Device) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let about = header.metadata().as_ref().and_then(|metadata| metadata.get(ABOUT));
        let about: About = about
            .and_then(|about| serde_json::from_str(about).ok())
            .ok_or_else(|| Error::Checkpoint("it does not say what it is".to_owned()))?;
        if about.run != run {
            return Err(Error::Checkpoint("it is of another run".to_owned()));
        }
        let file = SafeTensors::deserialize(bytes)?;
        let read = |name: &str| match file.tensor(name) {
            Ok(view) => tensor(&view, device).map(Some),
            Err(_) => Ok(None),
        };
        let all = |prefix: &str| -> Result<Vec<Tensor>> {
            (0..).map_while(|index| read(&format!("{prefix}.{index}")).transpose()).collect()
        };
        let state = match (read("state")?, about.step) {
            (Some(latents), Some(step)) => {
                Some(DenoiseState { step, latents, history: all("history")? })
            }
            (None, None) => None,
            _ => return Err(Error::Checkpoint("half a state".to_owned())),
        };
        let frames = file.tensor("frames").ok().map(|view| pictures(&view)).transpose()?;
        let frames = frames.unwrap_or_default();
        Ok(Self {
            latents: all("latents")?,
            state,
            traced: frames.len(),
            frames,
            widened: about.widened,
            decoding: about.decoding,
            trace: about.trace,
        })
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = self.state.as_ref().map_or(0, |state| state.step);
        let (latents, frames) = (self.latents.len(), self.frames.len());
        write!(formatter, "{latents} denoised, {step} steps of the next, {frames} decoded")
    }
}

/// One entry of the file.
struct Part {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Part {
    fn of_tensor(name: String, tensor: &Tensor) -> Result<Self> {
        let bytes = bytes_of(tensor)?;
        Ok(Self { name, dtype: Dtype::F32, shape: tensor.dims().to_vec(), bytes })
    }
}

/// The numbers of a tensor as little-endian f32.
fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let numbers = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
}

fn tensor(view: &TensorView<'_>, device: &Device) -> Result<Tensor> {
    if view.dtype() != Dtype::F32 {
        return Err(Error::Checkpoint(format!("{:?} where F32 should be", view.dtype())));
    }
    let numbers = view
        .data()
        .chunks_exact(4)
        .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
        .collect::<Vec<_>>();
    Ok(Tensor::from_vec(numbers, view.shape(), device)?)
}

fn pictures(view: &TensorView<'_>) -> Result<Vec<RgbImage>> {
    let wrong = || Error::Checkpoint(format!("frames of shape {:?}", view.shape()));
    let &[_, height, width, 3] = view.shape() else { return Err(wrong()) };
    let side = |side: usize| u32::try_from(side).ok().filter(|side| *side > 0).ok_or_else(wrong);
    let (width_pixels, height_pixels) = (side(width)?, side(height)?);
    view.data()
        .chunks_exact(height * width * 3)
        .map(|pixels| {
            RgbImage::from_raw(width_pixels, height_pixels, pixels.to_vec()).ok_or_else(wrong)
        })
        .collect()
}
