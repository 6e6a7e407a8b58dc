//! Image to video: Stable Video Diffusion, one run from a picture to frames.
//!
//! [`VideoModel::animate`] is the run; its three parts ([`VideoModel::prepare`], [`VideoModel::denoise`],
//! [`VideoModel::decode`]) can be called one by one with noise of one's own, as the tests do. Every step is the one
//! of diffusers' `StableVideoDiffusionPipeline`, in its order: seeds give the same clip there and here.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use crate::engine::checkpoint::{Checkpoint, Keep};
use crate::engine::config::Json;
use crate::engine::config::scheduler::SchedulerConfig;
use crate::engine::config::video::{
    ClipColours, ClipVisionConfig, VideoUnetConfig, VideoVaeConfig,
};
use crate::engine::denoise::{
    DenoiseState, Moment, Pulse, Watch, check_finite, check_pulse, denoise, is_finite, is_guided,
    undrawn,
};
use crate::engine::device::Compute;
use crate::engine::models::clip_vision::ClipVision;
use crate::engine::models::unet_video::{Condition, VideoUnet};
use crate::engine::models::vae_video::{VideoDecoder, VideoEncoder};
use crate::engine::noise::{Purpose, Stream};
use crate::engine::preprocess::{clip_pixels, vae_pixels};
use crate::engine::residency::{Part, Residency};
use crate::engine::sampler::Sampler;
use crate::engine::schedule::Schedule;
use crate::engine::tiling::Tiling;
use crate::engine::weights::{Weights, check_links};
use crate::engine::{Error, Hook, Result, StepEvent, tell};

/// A clip to make.
#[derive(Clone, Debug)]
pub struct VideoRequest {
    /// The picture to set in motion; resized where it has another size.
    pub image: RgbImage,
    /// Frames to make.
    pub frames: u32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Denoising steps.
    pub steps: u32,
    /// Pace the model is told, in frames a second.
    pub fps: u32,
    /// Amount of motion the model is told.
    pub motion: u32,
    /// Noise added to the picture: more of it frees the motion and loses the likeness.
    pub noise_aug: f64,
    /// Guidance of the first frame.
    pub min_guidance: f64,
    /// Guidance of the last frame; at 1 or below there is none at all.
    pub max_guidance: f64,
    /// Frames decoded at once.
    pub decode_chunk: u32,
    /// Most pixels along a side that are decoded at once: larger frames are decoded in tiles.
    pub tiling: Option<u32>,
    /// Seed of all noise.
    pub seed: u64,
    /// Which of several chained clips this is; each draws other noise.
    pub run: u32,
}

/// A loaded image-to-video model.
pub struct VideoModel {
    compute: Compute,
    vision_config: ClipVisionConfig,
    vae_config: VideoVaeConfig,
    scheduler: SchedulerConfig,
    colours: ClipColours,
    vision: Part<ClipVision>,
    encoder: Part<VideoEncoder>,
    unet: Part<VideoUnet>,
    decoder: Part<VideoDecoder>,
    /// The encoder and decoder once more, in f32.
    wide_encoder: Part<VideoEncoder>,
    wide_decoder: Part<VideoDecoder>,
}

/// A clip, and what its user should know.
#[derive(Clone, Debug)]
pub struct VideoOutput {
    /// The frames in order.
    pub frames: Vec<RgbImage>,
    /// What differed from what was asked or expected.
    pub notes: Vec<String>,
}

/// What the picture and the request's numbers become: the condition of every step.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The CLIP embedding of the picture: (1, 1, cross).
    pub image_embedding: Tensor,
    /// The picture with its noise, as the encoder saw it: (1, 3, h, w).
    pub vae_input: Tensor,
    /// Its latents, not scaled: (1, latent, h/8, w/8).
    pub image_latents: Tensor,
    /// Pace less one, motion, noise.
    pub added: [f64; 3],
}

/// Parts of a model, for the progress of loading.
const PARTS: u32 = 4;

impl VideoModel {
    /// Loads a model in diffusers' folder layout; `hook` hears of each part.
    pub fn load(folder: &Path, compute: &Compute, hook: &mut Hook<'_>) -> Result<Self> {
        Self::load_with(folder, Residency::Together, compute, hook)
    }

    /// As [`Self::load`], with a say in what stays in memory.
    pub fn load_with(
        folder: &Path,
        residency: Residency,
        compute: &Compute,
        hook: &mut Hook<'_>,
    ) -> Result<Self> {
        check_links(folder)?;
        let index = Json::read(&folder.join("model_index.json"))?;
        index.only("_class_name", &[serde_json::json!("StableVideoDiffusionPipeline")])?;
        let vision_config = ClipVisionConfig::read(&folder.join("image_encoder/config.json"))?;
        let unet_config = VideoUnetConfig::read(&folder.join("unet/config.json"))?;
        let vae_config = VideoVaeConfig::read(&folder.join("vae/config.json"))?;
        let scheduler = SchedulerConfig::read(&folder.join("scheduler/scheduler_config.json"))?;
        let colours =
            ClipColours::read(&folder.join("feature_extractor/preprocessor_config.json"))?;
        check_fit(&vision_config, &unet_config, &vae_config)?;

        let mut done = 0;
        let mut loaded = || {
            done += 1;
            tell(hook, StepEvent::Load { done, total: PARTS })
        };
        let files = Files { folder: folder.to_path_buf(), compute: compute.clone() };
        let (of, config) = (files.clone(), vision_config.clone());
        let read = move |weights: &Weights| ClipVision::load(weights, &config);
        let vision =
            Part::new(residency, move || of.read("image_encoder", of.compute.dtype(), &read))?;
        loaded()?;
        // The encoder overflows in half precision; diffusers runs it in single precision too. Eight bits of bf16 are
        // too few for either half.
        let (narrow_encoder, narrow_decoder) = vae_dtypes(&vae_config, compute);
        let encoder = |dtype: DType| {
            let (of, config) = (files.clone(), vae_config.clone());
            move || of.read("vae", dtype, &|weights| VideoEncoder::load(weights, &config))
        };
        let decoder = |dtype: DType| {
            let (of, config) = (files.clone(), vae_config.clone());
            move || of.read("vae", dtype, &|weights| VideoDecoder::load(weights, &config))
        };
        let (wide_encoder, wide_decoder) = (
            Part::new(Residency::InTurn, encoder(DType::F32))?,
            Part::new(Residency::InTurn, decoder(DType::F32))?,
        );
        let encoder = Part::new(residency, encoder(narrow_encoder))?;
        loaded()?;
        let decoder = Part::new(residency, decoder(narrow_decoder))?;
        loaded()?;
        let (of, config) = (files, unet_config);
        let read = move |weights: &Weights| VideoUnet::load(weights, &config);
        let unet = Part::new(residency, move || of.read("unet", of.compute.dtype(), &read))?;
        loaded()?;
        Ok(Self {
            compute: compute.clone(),
            vision_config,
            vae_config,
            scheduler,
            colours,
            vision,
            encoder,
            unet,
            decoder,
            wide_encoder,
            wide_decoder,
        })
    }

    /// Makes the frames of `request`; `hook` hears of every step and every decoded chunk.
    pub fn animate(&self, request: &VideoRequest, hook: &mut Hook<'_>) -> Result<VideoOutput> {
        self.resume(request, &mut Checkpoint::default(), &mut |_| (), hook)
    }

    /// As [`Self::animate`], from where an earlier run of the same request was. `at` moves on with the run and stays
    /// valid when it is stopped; `keep` is shown it after every step and decoded chunk.
    pub fn resume(
        &self,
        request: &VideoRequest,
        at: &mut Checkpoint,
        keep: &mut Keep<'_>,
        hook: &mut Hook<'_>,
    ) -> Result<VideoOutput> {
        self.check(request)?;
        let latents = match at.latents.first() {
            Some(latents) => latents.clone(),
            None => self.draw(request, at, keep, hook)?,
        };
        (at.latents, at.state) = (vec![latents.clone()], None);
        let (sample, factor) = (self.vae_config.sample_size, self.vae_config.factor());
        let tiling = Tiling::asked(request.tiling, sample, factor);
        let overflowed = self.decode_with(
            &latents,
            (request.decode_chunk, tiling),
            (at.frames.len(), at.widened),
            hook,
            &mut |chunk, widened| {
                for index in 0..chunk.dim(0)? {
                    at.frames.push(to_picture(&chunk.get(index)?)?);
                }
                at.widened = widened;
                keep(at);
                Ok(())
            },
        )?;
        let note =
            |dtype: DType| format!("the VAE overflowed in {}; decoded in f32", dtype.as_str());
        Ok(VideoOutput {
            frames: std::mem::take(&mut at.frames),
            notes: overflowed.map(note).into_iter().collect(),
        })
    }

    /// The latents of the clip.
    fn draw(
        &self,
        request: &VideoRequest,
        at: &mut Checkpoint,
        keep: &mut Keep<'_>,
        hook: &mut Hook<'_>,
    ) -> Result<Tensor> {
        // One stream for both draws, the picture's first: the order of diffusers with one generator.
        let mut noise = Stream::of(request.seed, Purpose::Segment, request.run);
        let device = self.compute.device();
        let image_noise =
            noise.tensor((1, 3, request.height as usize, request.width as usize), device)?;
        let start = noise.tensor(self.latent_shape(request), device)?;

        let prepared =
            self.prepare(request, &image_noise, &mut || hook(StepEvent::EncodePrompt))?;
        let total = request.steps;
        let state = at.state.clone();
        self.denoise_from(request, &prepared, (&start, state), &mut |moment| {
            let done = match moment {
                Moment::Within(step) => step,
                Moment::After(state) => {
                    at.state = Some(state.clone());
                    keep(at);
                    state.step
                }
            };
            hook(StepEvent::Denoise { step: count(done), total })
        })
    }

    /// Shape of the latents of a clip: (frames, latent, h/8, w/8).
    pub fn latent_shape(&self, request: &VideoRequest) -> (usize, usize, usize, usize) {
        let side = |pixels: u32| pixels as usize / self.vae_config.factor();
        (
            request.frames as usize,
            self.vae_config.latent_channels,
            side(request.height),
            side(request.width),
        )
    }

    /// Encodes the picture for both of its ways into the denoiser. `noise` (1, 3, h, w) is standard normal.
    pub fn prepare(
        &self,
        request: &VideoRequest,
        noise: &Tensor,
        pulse: &mut Pulse<'_>,
    ) -> Result<Prepared> {
        let device = self.compute.device();
        let pixels = clip_pixels(&request.image, self.vision_config.image_size, &self.colours)?;
        let dtype = self.compute.dtype();
        let embedding = self.vision.get()?.forward(&pixels.to_device(device)?.to_dtype(dtype)?)?;
        check_finite(&embedding, "the embedding of the picture", dtype)?;

        let pixels =
            vae_pixels(&request.image, request.width, request.height)?.to_device(device)?;
        let vae_input = (pixels + (noise * request.noise_aug)?)?;
        let encoder = self.encoder.get()?;
        let mut image_latents = encoder.encode(&vae_input, pulse)?;
        if encoder.dtype() != DType::F32 && !is_finite(&image_latents)? {
            drop(encoder);
            image_latents = self.wide_encoder.get()?.encode(&vae_input, pulse)?;
        }
        check_finite(&image_latents, "the encoded picture", image_latents.dtype())?;
        let image_latents = image_latents.to_dtype(DType::F32)?;
        // The model was trained on the pace less one.
        let pace = f64::from(request.fps) - 1.0;
        let added = [pace, f64::from(request.motion), request.noise_aug];
        Ok(Prepared { image_embedding: embedding.unsqueeze(1)?, vae_input, image_latents, added })
    }

    /// Denoises `start`, standard normal (f, latent, h, w), to the latents of the frames, in f32.
    pub fn denoise(
        &self,
        request: &VideoRequest,
        prepared: &Prepared,
        start: &Tensor,
        watch: &mut Watch<'_>,
    ) -> Result<Tensor> {
        self.denoise_from(request, prepared, (start, None), watch)
    }

    /// As [`Self::denoise`], from `state` where there is one.
    fn denoise_from(
        &self,
        request: &VideoRequest,
        prepared: &Prepared,
        (start, state): (&Tensor, Option<DenoiseState>),
        watch: &mut Watch<'_>,
    ) -> Result<Tensor> {
        let rows = self.rows(request, prepared)?;
        let guidance = guidance_of_frames(request, start)?;
        let sampler = if self.scheduler.karras { Sampler::EulerKarras } else { Sampler::Euler };
        let schedule = Schedule::new(&self.scheduler, sampler, request.steps as usize)?;
        let unet = self.unet.get()?;
        let mut model = |input: &Tensor, timestep: f64, pulse: &mut Pulse<'_>| {
            velocity(&unet, (input, timestep), &rows, guidance.as_ref(), pulse)
        };
        let state = match state {
            Some(state) => state,
            None => DenoiseState::start(start, &schedule)?,
        };
        Ok(denoise(state, &schedule, &mut model, &mut undrawn, watch)?.latents)
    }

    /// Decodes latents (f, latent, h, w) `chunk` frames at a time; `sink` takes each chunk's pixels about [-1, 1],
    /// (frames, 3, h, w) in f32. Chunks do not see each other, so their size changes the frames.
    pub fn decode(
        &self,
        latents: &Tensor,
        chunk: u32,
        hook: &mut Hook<'_>,
        sink: &mut dyn FnMut(&Tensor) -> Result<()>,
    ) -> Result<()> {
        let whole = (0, false);
        self.decode_with(latents, (chunk, None), whole, hook, &mut |pixels, _| sink(pixels))
            .map(|_| ())
    }

    /// As [`Self::decode`], in tiles if asked, from the frame `first` on. Where half precision overflows (or did,
    /// `widened`), that chunk and all after it are decoded in f32, as `sink` is told; the number type that overflowed
    /// comes back.
    fn decode_with(
        &self,
        latents: &Tensor,
        (chunk, tiling): (u32, Option<Tiling>),
        (first, widened): (usize, bool),
        hook: &mut Hook<'_>,
        sink: &mut dyn FnMut(&Tensor, bool) -> Result<()>,
    ) -> Result<Option<DType>> {
        let (frames, chunk) = (latents.dim(0)?, chunk.max(1) as usize);
        let total = count(frames);
        let latents = (latents / self.vae_config.scaling_factor)?;
        let mut decoder = self.decoder.get()?;
        let mut overflowed = None;
        if widened {
            overflowed = Some(decoder.dtype());
            decoder = self.wide_decoder.get()?;
        }
        for start in (first..frames).step_by(chunk) {
            let length = chunk.min(frames - start);
            let mut pulse = || hook(StepEvent::Decode { done: count(start), total });
            let z = latents.narrow(0, start, length)?;
            let mut run = |decoder: &VideoDecoder| match tiling {
                Some(tiling) => decoder.decode_tiled(&z, tiling, &mut pulse),
                None => decoder.decode(&z, &mut pulse),
            };
            let mut pixels = run(&decoder)?;
            if decoder.dtype() != DType::F32 && !is_finite(&pixels)? {
                overflowed = Some(decoder.dtype());
                decoder = self.wide_decoder.get()?;
                pixels = run(&decoder)?;
            }
            check_finite(&pixels, "the decoded frames", decoder.dtype())?;
            sink(&pixels, overflowed.is_some())?;
            tell(hook, StepEvent::Decode { done: count(start + length), total })?;
        }
        Ok(overflowed)
    }

    /// The conditional row, and the unconditional one if there is guidance.
    fn rows(&self, request: &VideoRequest, prepared: &Prepared) -> Result<Vec<Row>> {
        let frames = request.frames as usize;
        let (_, channels, height, width) = prepared.image_latents.dims4()?;
        let row = |image: Tensor, latents: Tensor| -> Result<Row> {
            let condition = Condition { image, added: prepared.added, frames };
            Ok(Row {
                condition,
                image_latents: latents
                    .broadcast_as((frames, channels, height, width))?
                    .contiguous()?,
            })
        };
        let mut rows = vec![row(prepared.image_embedding.clone(), prepared.image_latents.clone())?];
        if is_guided(request.max_guidance) {
            rows.push(row(
                prepared.image_embedding.zeros_like()?,
                prepared.image_latents.zeros_like()?,
            )?);
        }
        Ok(rows)
    }

    fn check(&self, request: &VideoRequest) -> Result<()> {
        let factor = self.vae_config.factor();
        let refuse = |field, value: &dyn std::fmt::Display, wanted: String| {
            Err(Error::Request { field, value: value.to_string(), wanted })
        };
        for (field, value) in [("width", request.width), ("height", request.height)] {
            if value == 0 || !(value as usize).is_multiple_of(factor) {
                return refuse(field, &value, format!("a multiple of {factor}"));
            }
        }
        for (field, value) in [
            ("frames", request.frames),
            ("steps", request.steps),
            ("decode_chunk", request.decode_chunk),
        ] {
            if !(1..=1000).contains(&value) {
                return refuse(field, &value, "1 to 1000".into());
            }
        }
        for (field, value) in [
            ("noise_aug", request.noise_aug),
            ("min_guidance", request.min_guidance),
            ("max_guidance", request.max_guidance),
        ] {
            if !(0.0..=100.0).contains(&value) {
                return refuse(field, &value, "0 to 100".into());
            }
        }
        Ok(())
    }
}

/// One velocity of the denoiser, guided frame by frame: (f, latent, h, w) in f32.
fn velocity(
    unet: &VideoUnet,
    (input, timestep): (&Tensor, f64),
    rows: &[Row],
    guidance: Option<&Tensor>,
    pulse: &mut Pulse<'_>,
) -> Result<Tensor> {
    let mut one = |row: &Row| -> Result<Tensor> {
        let input = Tensor::cat(&[input, &row.image_latents], 1)?;
        let v = unet.forward(&input, timestep, &row.condition, &mut |_, _| check_pulse(pulse))?;
        check_finite(&v, "the denoiser's prediction", v.dtype())?;
        Ok(v.to_dtype(DType::F32)?)
    };
    let conditional = one(&rows[0])?;
    let (Some(guidance), Some(row)) = (guidance, rows.get(1)) else { return Ok(conditional) };
    // Rows go one after the other: half the memory, and as fast, since a row is many frames.
    let unconditional = one(row)?;
    let pull = (conditional - &unconditional)?.broadcast_mul(guidance)?;
    Ok((unconditional + pull)?)
}

/// Number types of the encoder and of the decoder on `compute`.
pub(in crate::engine) fn vae_dtypes(config: &VideoVaeConfig, compute: &Compute) -> (DType, DType) {
    let decoder = if compute.dtype() == DType::BF16 { DType::F32 } else { compute.dtype() };
    (if config.force_upcast { DType::F32 } else { decoder }, decoder)
}

/// Where the parts lie, and where they go.
#[derive(Clone)]
struct Files {
    folder: PathBuf,
    compute: Compute,
}

impl Files {
    /// The part in `folder`, complete.
    fn read<T>(
        &self,
        folder: &str,
        dtype: DType,
        load: &dyn Fn(&Weights) -> Result<T>,
    ) -> Result<T> {
        let weights = Weights::open(&self.folder.join(folder), &self.compute)?.with_dtype(dtype);
        let part = load(&weights)?;
        weights.finish()?;
        Ok(part)
    }
}

/// One pass of the denoiser per step.
struct Row {
    condition: Condition,
    image_latents: Tensor, // (f, latent, h, w)
}

/// The parts of a folder have to fit together; a mixed-up one would only fail in the middle of a run.
fn check_fit(
    vision: &ClipVisionConfig,
    unet: &VideoUnetConfig,
    vae: &VideoVaeConfig,
) -> Result<()> {
    let refuse = |file: &str, key: &str, value: usize, wanted: String| {
        let (file, key, value) = (file.to_string(), key.to_string(), value.to_string());
        Err(Error::ConfigOutOfRange { file, key, value, wanted })
    };
    if vision.projection != unet.cross_attention {
        let wanted = format!("the unet's `cross_attention_dim`, which is {}", unet.cross_attention);
        return refuse("image_encoder/config.json", "projection_dim", vision.projection, wanted);
    }
    if unet.out_channels != vae.latent_channels {
        let wanted = format!("the vae's `latent_channels`, which is {}", vae.latent_channels);
        return refuse("unet/config.json", "out_channels", unet.out_channels, wanted);
    }
    if unet.in_channels != 2 * vae.latent_channels {
        let wanted = format!("twice the vae's `latent_channels`, which is {}", vae.latent_channels);
        return refuse("unet/config.json", "in_channels", unet.in_channels, wanted);
    }
    Ok(())
}

/// Guidance from the first frame's to the last's, evenly: (f, 1, 1, 1). `None` when it is off.
#[expect(clippy::cast_possible_truncation, reason = "latents are single precision")]
fn guidance_of_frames(request: &VideoRequest, like: &Tensor) -> Result<Option<Tensor>> {
    if !is_guided(request.max_guidance) {
        return Ok(None);
    }
    let (first, last) = (request.min_guidance, request.max_guidance);
    let way = f64::from((request.frames - 1).max(1));
    let values: Vec<f32> = (0..request.frames)
        .map(|frame| (first + (last - first) * f64::from(frame) / way) as f32)
        .collect();
    Ok(Some(Tensor::from_vec(values, (request.frames as usize, 1, 1, 1), like.device())?))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Pixels about [-1, 1], (3, h, w), to a picture.
fn to_picture(pixels: &Tensor) -> Result<RgbImage> {
    let (_, height, width) = pixels.dims3()?;
    let pixels = pixels.to_device(&Device::Cpu)?;
    let bytes =
        ((((pixels / 2.0)? + 0.5)?.clamp(0.0, 1.0)? * 255.0)?.round()?).to_dtype(DType::U8)?;
    let bytes = bytes.permute((1, 2, 0))?.flatten_all()?.to_vec1::<u8>()?;
    let wrong = || {
        Error::Internal(format!("a frame of {width}x{height} with {} bytes", 3 * width * height))
    };
    let (width, height) = (count(width), count(height));
    RgbImage::from_raw(width, height, bytes).ok_or_else(wrong)
}
