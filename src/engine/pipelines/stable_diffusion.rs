//! Text and pictures to pictures with Stable Diffusion 1, 2 and XL: prompt, denoising loop, decoder.

pub mod request;
pub mod text;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use image::RgbImage;

use crate::engine::checkpoint::{Checkpoint, Keep};
use crate::engine::config::Json;
use crate::engine::config::scheduler::SchedulerConfig;
use crate::engine::config::unet::UnetConfig;
use crate::engine::config::vae::VaeConfig;
use crate::engine::denoise::{
    DenoiseState, Draw, Moment, Pulse, Watch, check_finite, check_pulse, denoise, guide, is_finite,
    is_guided, rescale_guided,
};
use crate::engine::describe::{Task, pipeline_class};
use crate::engine::device::Compute;
use crate::engine::models::unet::Unet;
use crate::engine::models::vae::Vae;
use crate::engine::noise::{self, Purpose, Stream};
use crate::engine::preprocess::vae_pixels;
use crate::engine::prompt::Syntax;
use crate::engine::residency::{Part, Residency};
use crate::engine::schedule::Schedule;
use crate::engine::tiling::Tiling;
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
    text: Part<TextEncoders>,
    unet: Part<Unet>,
    vae: Part<Vae>,
    /// The autoencoder once more, in f32.
    wide_vae: Part<Vae>,
    unet_config: UnetConfig,
    vae_config: VaeConfig,
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

        let notes = source.notes().to_vec();
        let mut done = 0;
        let mut loaded = || -> Result<()> {
            tell(hook, StepEvent::Load { done, total: 3 })?;
            done += 1;
            Ok(())
        };
        loaded()?;
        let (source, residency) = (Arc::new(source), options.residency);
        let (of, on) = (source.clone(), compute.clone());
        let text =
            Part::new(residency, move || TextEncoders::load(&of, towers.clone(), zeros, &on))?;
        loaded()?;
        let (of, on, config) = (source.clone(), compute.clone(), unet.clone());
        let read = move || Unet::load(&of.weights("unet", &on)?, config.clone());
        let unet_part = Part::new(residency, read)?;
        loaded()?;
        let read_vae = |dtype: DType| {
            let (of, on, config) = (source.clone(), compute.clone(), vae.clone());
            move || Vae::load(&of.weights("vae", &on)?.with_dtype(dtype), config.clone())
        };
        let vae_part = Part::new(residency, read_vae(vae_dtype(&vae, compute)))?;
        let wide_vae = Part::new(Residency::InTurn, read_vae(DType::F32))?;
        loaded()?;
        Ok(Self {
            text,
            unet: unet_part,
            vae: vae_part,
            wide_vae,
            unet_config: unet,
            vae_config: vae,
            scheduler,
            notes,
            compute: compute.clone(),
        })
    }

    /// Draws the pictures of `request`.
    pub fn generate(&self, request: &ImageRequest, hook: &mut Hook<'_>) -> Result<ImageOutput> {
        self.resume(request, &mut Checkpoint::default(), &mut |_| (), hook)
    }

    /// As [`Self::generate`], from where an earlier run of the same request was. `at` moves on with the run and stays
    /// valid when it is stopped; `keep` is shown it after every step and picture.
    pub fn resume(
        &self,
        request: &ImageRequest,
        at: &mut Checkpoint,
        keep: &mut Keep<'_>,
        hook: &mut Hook<'_>,
    ) -> Result<ImageOutput> {
        let shape = self.check(request)?;
        let (sampler, note) = match request.sampler {
            Some(sampler) => (sampler, None),
            None => Sampler::of_config(&self.scheduler),
        };
        let schedule = Schedule::new(&self.scheduler, sampler, request.steps as usize)?;

        tell(hook, StepEvent::EncodePrompt)?;
        let mut notes = self.notes.clone();
        notes.extend(note);
        let encoded = {
            let text = self.text.get()?;
            notes.extend(text.note(&request.prompt)?);
            let prompts = Prompts {
                prompt: &request.prompt,
                prompt2: request.prompt2.as_deref(),
                negative: request.negative.as_deref(),
                negative2: None,
                clip_skip: text.left_out(request.clip_skip.unwrap_or(0))?,
                syntax: Syntax::Weighted,
            };
            text.encode(&prompts, is_guided(request.guidance))?
        };
        for row in std::iter::once(&encoded.positive).chain(&encoded.negative) {
            check_finite(&row.embeds, "the encoded prompt", self.compute.dtype())?;
        }
        let (tokens, tokens_cut) = (encoded.tokens, encoded.tokens_cut);
        let sizes = Sizes::whole(request.height, request.width);
        let conditions = Conditions::new(encoded, Some([sizes, sizes]));
        let init = match &request.init {
            Some((picture, strength)) => {
                let pixels = vae_pixels(picture, request.width, request.height)?
                    .to_device(self.compute.device())?;
                let mut pulse = || hook(StepEvent::EncodePrompt);
                let mut stage = VaeStage::start(self, "the encoded picture")?;
                let moments = stage.run(&mut |vae| vae.encode_moments(&pixels, &mut pulse))?;
                notes.extend(stage.note());
                Some((moments, schedule.start(*strength)))
            }
            None => None,
        };
        let run = Run { schedule, conditions, init, shape };
        if at.latents.len() < request.batch as usize {
            let unet = self.unet.get()?;
            for item in count(at.latents.len())..request.batch {
                let latents = self.draw(&unet, (request, &run, item), at, keep, hook)?;
                at.latents.push(latents);
                at.state = None;
            }
        }
        let mut stage = VaeStage::start(self, "the picture")?;
        if at.widened {
            stage.widen()?;
        }
        self.decode_all(&mut stage, self.tiling(request), at, keep, hook)?;
        notes.extend(stage.note());
        let sampler = sampler.name().to_string();
        Ok(ImageOutput {
            images: std::mem::take(&mut at.frames),
            tokens,
            tokens_cut,
            sampler,
            notes,
        })
    }

    /// Latents of the `item`-th picture of the run, which no other picture has a part in.
    fn draw(
        &self,
        unet: &Unet,
        (request, run, item): (&ImageRequest, &Run, u32),
        at: &mut Checkpoint,
        keep: &mut Keep<'_>,
        hook: &mut Hook<'_>,
    ) -> Result<Tensor> {
        let device = self.compute.device();
        let seed = request.seed.wrapping_add(u64::from(item));
        let mut stream = Stream::of(seed, Purpose::InitLatents, 0);
        let state = match (at.state.clone(), &run.init) {
            (Some(state), _) => state,
            (None, Some((moments, start))) => {
                // One stream for both, the encoder's first: the order of diffusers with one generator.
                let latents =
                    self.vae_config.sample(moments, &stream.tensor(run.shape, device)?)?;
                let noise = stream.tensor(run.shape, device)?;
                DenoiseState::start_at(*start, &latents, &noise, &run.schedule)?
            }
            (None, None) => DenoiseState::start(&stream.tensor(run.shape, device)?, &run.schedule)?,
        };
        let first = run.init.as_ref().map_or(0, |(_, start)| *start);
        let steps = count(run.schedule.steps() - first);
        let total = steps * request.batch;
        let told =
            |step: usize| StepEvent::Denoise { step: item * steps + count(step - first), total };
        tell(hook, told(state.step))?;
        let mut watch = |moment: Moment<'_>| match moment {
            Moment::Within(step) => hook(told(step)),
            Moment::After(state) => {
                at.state = Some(state.clone());
                keep(at);
                hook(told(state.step))
            }
        };
        let mut fresh = |step: usize| -> Result<Tensor> {
            Ok(noise::gaussian(seed, Purpose::Step, count(step), run.shape, device)?)
        };
        let guidance = Guidance { scale: request.guidance, rescale: 0.0 };
        let how = (&run.conditions, guidance);
        denoise_with(unet, state, &run.schedule, how, &mut fresh, &mut watch)
    }

    /// Decodes the pictures that are not, one after the other.
    fn decode_all(
        &self,
        stage: &mut VaeStage<'_>,
        tiling: Option<Tiling>,
        at: &mut Checkpoint,
        keep: &mut Keep<'_>,
        hook: &mut Hook<'_>,
    ) -> Result<()> {
        let total = count(at.latents.len());
        let mut decoded = |done| hook(StepEvent::Decode { done, total });
        for item in count(at.frames.len())..total {
            check_pulse(&mut || decoded(item))?;
            let z = self.vae_config.unscale(&at.latents[item as usize])?;
            let pixels = stage.run(&mut |vae| match tiling {
                Some(tiling) => vae.decode_tiled(&z, tiling, &mut || decoded(item)),
                None => vae.decode(&z, &mut || decoded(item)),
            })?;
            at.frames.push(to_images(&pixels)?.swap_remove(0));
            at.widened = stage.overflowed.is_some();
            keep(at);
            check_pulse(&mut || decoded(item + 1))?;
        }
        Ok(())
    }

    /// How `request` is decoded.
    fn tiling(&self, request: &ImageRequest) -> Option<Tiling> {
        Tiling::asked(request.tiling, self.vae_config.sample_size, self.vae_config.factor())
    }

    /// The noise schedule and scheduler preferences of the folder.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    /// The text encoders.
    pub fn text(&self) -> Result<Arc<TextEncoders>> {
        self.text.get()
    }

    /// The autoencoder.
    pub fn vae(&self) -> Result<Arc<Vae>> {
        self.vae.get()
    }

    /// Mean and log variance of the latents of pictures in -1..1: (b, 3, h, w) to (b, 2c, h/f, w/f) in f32.
    pub fn encode_moments(&self, pixels: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let mut stage = VaeStage::start(self, "the encoded picture")?;
        stage.run(&mut |vae| vae.encode_moments(pixels, pulse))
    }

    /// Latents (b, c, h, w) at the end of the run that is at `state`.
    pub fn denoise(
        &self,
        state: DenoiseState,
        schedule: &Schedule,
        how: (&Conditions, Guidance),
        draw: &mut Draw<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Tensor> {
        denoise_with(&*self.unet.get()?, state, schedule, how, draw, watch)
    }

    /// Pictures in about -1..1, (b, 3, h, w), of latents as the UNet has them.
    pub fn decode(&self, latents: &Tensor, pulse: &mut Pulse<'_>) -> Result<Tensor> {
        let z = self.vae_config.unscale(latents)?;
        Ok(self.vae.get()?.decode(&z, pulse)?.to_dtype(DType::F32)?)
    }

    /// Shape of the latents of one picture of a valid request.
    fn check(&self, request: &ImageRequest) -> Result<(usize, usize, usize, usize)> {
        let refuse = |field, value: &dyn std::fmt::Display, wanted: String| {
            Err(Error::Request { field, value: value.to_string(), wanted })
        };
        let factor = count(self.vae_config.factor());
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
        Ok((1, self.unet_config.in_channels, side(request.height), side(request.width)))
    }
}

/// The number type of the autoencoder of a model on `compute`.
pub(in crate::engine) fn vae_dtype(config: &VaeConfig, compute: &Compute) -> DType {
    // bf16 has too few digits for pixels.
    let wide = config.force_upcast || compute.dtype() == DType::BF16;
    if wide { DType::F32 } else { compute.dtype() }
}

/// Runs from `state` to the end of `schedule`: latents (b, c, h, w).
fn denoise_with(
    unet: &Unet,
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
        let output = unet.forward(&x, timestep, &rows, &mut |_, _| pulse())?;
        check_finite(&output, "the denoiser's prediction", output.dtype())?;
        let output = output.to_dtype(DType::F32)?;
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

/// Work with the autoencoder that is done over in f32 where half precision overflows.
struct VaeStage<'a> {
    model: &'a ImageModel,
    what: &'static str,
    vae: Arc<Vae>,
    overflowed: Option<DType>,
}

impl<'a> VaeStage<'a> {
    fn start(model: &'a ImageModel, what: &'static str) -> Result<Self> {
        Ok(Self { model, what, vae: model.vae.get()?, overflowed: None })
    }

    /// The result of `work` in f32, finite; after an overflow all further work is done in f32.
    fn run(&mut self, work: &mut dyn FnMut(&Vae) -> Result<Tensor>) -> Result<Tensor> {
        let mut x = work(&self.vae)?;
        let dtype = self.vae.dtype();
        if dtype != DType::F32 && !is_finite(&x)? {
            self.widen()?;
            x = work(&self.vae)?;
        }
        check_finite(&x, self.what, self.vae.dtype())?;
        Ok(x.to_dtype(DType::F32)?)
    }

    /// Goes on in f32.
    fn widen(&mut self) -> Result<()> {
        self.overflowed = Some(self.vae.dtype());
        self.vae = self.model.wide_vae.get()?;
        Ok(())
    }

    fn note(&self) -> Option<String> {
        let dtype = self.overflowed?.as_str();
        let how = if self.what == "the picture" { "decoded" } else { "encoded" };
        Some(format!("the VAE overflowed in {dtype}; {how} in f32"))
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
