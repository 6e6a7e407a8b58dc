//! Text and pictures to pictures with Stable Diffusion 1, 2 and XL: prompt, denoising loop, decoder.

pub mod request;
pub mod text;

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{D, DType, Tensor};
use image::RgbImage;

use crate::engine::config::Json;
use crate::engine::config::scheduler::SchedulerConfig;
use crate::engine::config::unet::UnetConfig;
use crate::engine::config::vae::VaeConfig;
use crate::engine::denoise::{
    DenoiseState, Draw, Moment, Pulse, Watch, check_finite, denoise, guide, is_guided,
    rescale_guided,
};
use crate::engine::describe::{Task, pipeline_class};
use crate::engine::device::Compute;
use crate::engine::models::unet::Unet;
use crate::engine::models::vae::Vae;
use crate::engine::noise::{self, Purpose, Stream};
use crate::engine::preprocess::vae_pixels;
use crate::engine::prompt::Syntax;
use crate::engine::schedule::Schedule;
use crate::engine::weights::{LoadOptions, Source};
use crate::engine::{Error, Hook, Result, Sampler, StepEvent, tell};
pub use request::{Conditions, Guidance, ImageOutput, ImageRequest, Sizes};
use text::TowerPlan;
pub use text::{Prompts, TextEncoders};

/// Longest side of a picture in pixels.
const MAX_SIDE: u32 = 8192;
/// Most pictures of a request.
const MAX_BATCH: u32 = 256;

/// A loaded text-to-image model.
#[derive(Debug)]
pub struct ImageModel {
    text: TextEncoders,
    unet: Unet,
    vae: Vae,
    scheduler: SchedulerConfig,
    notes: Vec<String>,
    compute: Compute,
}

impl ImageModel {
    /// Loads the diffusers folder or the one-file model at `path`.
    pub fn load(path: &Path, compute: &Compute, hook: &mut Hook<'_>) -> Result<Self> {
        Self::load_with(path, &LoadOptions::default(), compute, hook)
    }

    /// As [`Self::load`], with LoRAs and what is known better than the files tell.
    pub fn load_with(
        path: &Path,
        options: &LoadOptions,
        compute: &Compute,
        hook: &mut Hook<'_>,
    ) -> Result<Self> {
        let mut source = Source::open(path, options)?;
        let index = source.json("model_index.json")?;
        if pipeline_class(&index)? != Task::TextToImage {
            let wanted = "`StableDiffusionPipeline` or `StableDiffusionXLPipeline`";
            return Err(index.unsupported("_class_name", wanted));
        }
        // All configs first: a folder that does not fit fails before the weights are read.
        let unet_json = source.json("unet/config.json")?;
        let unet = UnetConfig::of(&unet_json)?;
        let vae = VaeConfig::of(&source.json("vae/config.json")?)?;
        let scheduler = SchedulerConfig::of(&source.json("scheduler/scheduler_config.json")?)?;
        let two = unet.addition.is_some();
        let towers = TowerPlan::read(&source, two)?;
        let zeros = two && index.flag("force_zeros_for_empty_prompt", true)?;
        check_fit(&unet_json, &towers, &unet, &vae)?;
        source.attach(&options.loras)?;

        let (mut done, total) = (0, if two { 4 } else { 3 });
        let mut loaded = || -> Result<()> {
            tell(hook, StepEvent::Load { done, total })?;
            done += 1;
            Ok(())
        };
        loaded()?;
        let text = TextEncoders::load(&source, towers, zeros, compute, &mut loaded)?;
        let unet = Unet::load(&source.weights("unet", compute)?, unet)?;
        loaded()?;
        let weights = source.weights("vae", compute)?;
        // bf16 has too few digits for pixels.
        let wide = vae.force_upcast || compute.dtype() == DType::BF16;
        let weights = if wide { weights.with_dtype(DType::F32) } else { weights };
        let vae = Vae::load(&weights, vae)?;
        loaded()?;
        let notes = source.notes().to_vec();
        Ok(Self { text, unet, vae, scheduler, notes, compute: compute.clone() })
    }

    /// Draws the pictures of `request`.
    pub fn generate(&self, request: &ImageRequest, hook: &mut Hook<'_>) -> Result<ImageOutput> {
        let shape = self.check(request)?;
        let (sampler, note) = match request.sampler {
            Some(sampler) => (sampler, None),
            None => Sampler::of_config(&self.scheduler),
        };
        let schedule = Schedule::new(&self.scheduler, sampler, request.steps as usize)?;

        tell(hook, StepEvent::EncodePrompt)?;
        let prompts = Prompts {
            prompt: &request.prompt,
            prompt2: request.prompt2.as_deref(),
            negative: request.negative.as_deref(),
            negative2: None,
            clip_skip: request.clip_skip.unwrap_or(0) as usize,
            syntax: Syntax::Weighted,
        };
        let encoded = self.text.encode(&prompts, is_guided(request.guidance))?;
        let (tokens, tokens_cut) = (encoded.tokens, encoded.tokens_cut);
        let sizes = Sizes::whole(request.height, request.width);
        let conditions = Conditions::new(encoded, Some([sizes, sizes]));
        let init = match &request.init {
            Some((picture, strength)) => {
                let pixels = vae_pixels(picture, request.width, request.height)?
                    .to_device(self.compute.device())?;
                let mut pulse = || hook(StepEvent::EncodePrompt);
                Some((self.encode_moments(&pixels, &mut pulse)?, schedule.start(*strength)))
            }
            None => None,
        };
        let run = Run { schedule, conditions, init, shape };
        let images = (0..request.batch)
            .map(|item| self.draw(request, &run, item, hook))
            .collect::<Result<_>>()?;
        let notes = self
            .notes
            .iter()
            .cloned()
            .chain(note)
            .chain(self.text.note(&request.prompt)?)
            .collect();
        Ok(ImageOutput { images, tokens, tokens_cut, sampler: sampler.name().to_string(), notes })
    }

    /// The `item`-th picture of the run, which no other picture has a part in.
    fn draw(
        &self,
        request: &ImageRequest,
        run: &Run,
        item: u32,
        hook: &mut Hook<'_>,
    ) -> Result<RgbImage> {
        let device = self.compute.device();
        let seed = request.seed.wrapping_add(u64::from(item));
        let mut stream = Stream::of(seed, Purpose::InitLatents, 0);
        let state = match &run.init {
            Some((moments, start)) => {
                // One stream for both, the encoder's first: the order of diffusers with one generator.
                let latents = self.vae.sample(moments, &stream.tensor(run.shape, device)?)?;
                let noise = stream.tensor(run.shape, device)?;
                DenoiseState::start_at(*start, &latents, &noise, &run.schedule)?
            }
            None => DenoiseState::start(&stream.tensor(run.shape, device)?, &run.schedule)?,
        };
        let (first, steps) = (state.step, count(run.schedule.steps() - state.step));
        let total = steps * request.batch;
        let told =
            |step: usize| StepEvent::Denoise { step: item * steps + count(step - first), total };
        tell(hook, told(first))?;
        let mut watch = |moment: Moment<'_>| match moment {
            Moment::Within(step) => hook(told(step)),
            Moment::After(state) => hook(told(state.step)),
        };
        let mut fresh = |step: usize| -> Result<Tensor> {
            Ok(noise::gaussian(seed, Purpose::Step, count(step), run.shape, device)?)
        };
        let guidance = Guidance { scale: request.guidance, rescale: 0.0 };
        let how = (&run.conditions, guidance);
        let latents = self.denoise(state, &run.schedule, how, &mut fresh, &mut watch)?;

        let mut decoded = |done| hook(StepEvent::Decode { done, total: request.batch });
        check_told(decoded(item))?;
        let pixels = self.decode(&latents, &mut || decoded(item))?;
        check_finite(&pixels, "the picture")?;
        let image = to_images(&pixels)?.swap_remove(0);
        check_told(decoded(item + 1))?;
        Ok(image)
    }

    /// The noise schedule and scheduler preferences of the folder.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    /// The text encoders.
    pub fn text(&self) -> &TextEncoders {
        &self.text
    }

    /// The autoencoder.
    pub fn vae(&self) -> &Vae {
        &self.vae
    }

    /// Mean and log variance of the latents of pictures in -1..1: (b, 3, h, w) to (b, 2c, h/f, w/f) in f32.
    pub fn encode_moments(&self, pixels: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let moments = self.vae.encode_moments(pixels, pulse)?.to_dtype(DType::F32)?;
        check_finite(&moments, "the encoded picture")?;
        Ok(moments)
    }

    /// Latents (b, c, h, w) at the end of the run that is at `state`.
    pub fn denoise(
        &self,
        state: DenoiseState,
        schedule: &Schedule,
        (conditions, guidance): (&Conditions, Guidance),
        draw: &mut Draw<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Tensor> {
        let batch = state.latents.dim(0)?;
        let rows = conditions.rows(batch)?;
        let guided = conditions.negative.is_some();
        let mut model = |x: &Tensor, timestep: f64, pulse: &mut Pulse<'_>| -> Result<Tensor> {
            let x = if guided { Tensor::cat(&[x, x], 0)? } else { x.clone() };
            let output = self
                .unet
                .forward(&x, timestep, &rows, &mut |_, _| pulse())?
                .to_dtype(DType::F32)?;
            if !guided {
                return Ok(output);
            }
            let (unconditional, conditional) =
                (output.narrow(0, 0, batch)?, output.narrow(0, batch, batch)?);
            let guided = guide(&unconditional, &conditional, guidance.scale)?;
            if guidance.rescale > 0.0 {
                return rescale_guided(&guided, &conditional, guidance.rescale);
            }
            Ok(guided)
        };
        Ok(denoise(state, schedule, &mut model, draw, watch)?.latents)
    }

    /// Pictures in about -1..1, (b, 3, h, w), of latents as the UNet has them.
    pub fn decode(&self, latents: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        Ok(self.vae.decode(&self.vae.unscale(latents)?, pulse)?.to_dtype(DType::F32)?)
    }

    /// Shape of the latents of one picture of a valid request.
    fn check(&self, request: &ImageRequest) -> Result<(usize, usize, usize, usize)> {
        let refuse = |field, value: &dyn std::fmt::Display, wanted: String| {
            Err(Error::Request { field, value: value.to_string(), wanted })
        };
        let factor = count(self.vae.config().factor());
        for (field, side) in [("width", request.width), ("height", request.height)] {
            if side == 0 || side > MAX_SIDE || side % factor != 0 {
                return refuse(field, &side, format!("a multiple of {factor} up to {MAX_SIDE}"));
            }
        }
        if !request.guidance.is_finite() {
            return refuse("guidance", &request.guidance, "a finite number".into());
        }
        if !(1..=MAX_BATCH).contains(&request.batch) {
            return refuse("batch", &request.batch, format!("1 to {MAX_BATCH}"));
        }
        if let Some((picture, strength)) = &request.init {
            if !(*strength > 0.0 && *strength <= 1.0) {
                return refuse("strength", strength, "above 0, up to 1".into());
            }
            if picture.width() == 0 || picture.height() == 0 {
                return refuse("init", &"without pixels", "a picture".into());
            }
        }
        let side = |pixels: u32| (pixels / factor) as usize;
        Ok((1, self.unet.config().in_channels, side(request.height), side(request.width)))
    }
}

/// What all pictures of a request share.
struct Run {
    schedule: Schedule,
    conditions: Conditions,
    /// Moments of the picture to start from, and the first step.
    init: Option<(Tensor, usize)>,
    shape: (usize, usize, usize, usize),
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn check_told(answer: ControlFlow<()>) -> Result<()> {
    if answer.is_break() { Err(Error::Stopped) } else { Ok(()) }
}

/// The parts must fit together: refused here, not inside a matrix product.
fn check_fit(json: &Json, towers: &[TowerPlan], unet: &UnetConfig, vae: &VaeConfig) -> Result<()> {
    let width = TowerPlan::width(towers);
    if unet.cross_attention != width {
        let wanted = format!("{width}, as the text encoders give");
        return Err(json.senseless("cross_attention_dim", wanted));
    }
    let pooled = TowerPlan::pooled(towers);
    if let (Some(addition), Some(pooled)) = (unet.addition, pooled)
        && addition.pooled != pooled
    {
        let wanted = format!("{pooled} for the pooled text, and six sizes");
        return Err(json.senseless("projection_class_embeddings_input_dim", wanted));
    }
    if unet.in_channels != vae.latent_channels || unet.out_channels != vae.latent_channels {
        let wanted = format!(
            "{}, as the autoencoder has: other pipelines are not built in",
            vae.latent_channels
        );
        return Err(json.unsupported("in_channels", &wanted));
    }
    Ok(())
}

/// Pictures of (b, 3, h, w) in -1..1, rounded as numpy rounds.
pub fn to_images(pixels: &Tensor) -> Result<Vec<RgbImage>> {
    let (batch, _, height, width) = pixels.dims4()?;
    let side =
        |side: usize| u32::try_from(side).map_err(|error| Error::Internal(error.to_string()));
    let (height, width) = (side(height)?, side(width)?);
    let scaled = ((pixels.to_dtype(DType::F32)? / 2.0)? + 0.5)?.clamp(0f32, 1f32)?;
    let rows = (scaled * 255.0)?
        .permute((0, 2, 3, 1))?
        .contiguous()?
        .flatten(1, D::Minus1)?
        .to_vec2::<f32>()?;
    debug_assert_eq!(rows.len(), batch);
    rows.into_iter()
        .map(|row| {
            let bytes = row.into_iter().map(to_byte).collect();
            RgbImage::from_raw(width, height, bytes)
                .ok_or_else(|| Error::Internal("a picture without its size".into()))
        })
        .collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to 0..255 and rounded"
)]
fn to_byte(value: f32) -> u8 {
    value.round_ties_even() as u8
}

/// A watch that never stops a run.
pub fn unwatched(_: Moment<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
