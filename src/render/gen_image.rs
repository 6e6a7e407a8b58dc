//! The image of a job: generated from its prompt, redrawn from the given one, or that one as it is; a given image is
//! decoded within limits and cut to the asked aspect.
//!
//! Leaves two objects: the native picture for the video model and the delivered one, exactly at the asked size.

use std::fmt::Debug;
use std::time::Instant;

use image::RgbImage;

use super::infer::{Request, infer};
use super::models::{Permit, Ready, Wanted};
use super::plan::ImagePlan;
use super::{Error, Hook, ImageMade, Inner, Order, Settings, Work, label, report, room, seconds};
use crate::engine::config::scheduler::Prediction;
use crate::engine::{
    self, Checkpoint, ImageModel, ImageOutput, ImageRequest, Keep, LoadOptions, LoraFile,
};
use crate::hub::Task;
use crate::job::{self, style};
use crate::media::still;
use crate::store::BlobRef;

pub(super) fn gen_image(
    inner: &Inner,
    order: &Order,
    hook: &mut Hook<'_>,
) -> Result<ImageMade, Error> {
    match (&order.plan.image, &order.job.image) {
        (Some(plan), _) => generate(inner, order, plan, hook),
        (None, Some(id)) => take_given(inner, order, id, hook),
        (None, None) => {
            Err(Error::Order("the plan holds no image and the job gives none".to_owned()))
        }
    }
}

fn take_given(
    inner: &Inner,
    order: &Order,
    id: &str,
    hook: &mut Hook<'_>,
) -> Result<ImageMade, Error> {
    report(hook, "decode", 0, 1)?;
    let (width, height) = order.plan.deliver;
    let (picture, notes) = given(inner, id, (width, height))?;
    report(hook, "decode", 1, 1)?;
    let image = inner.settings.store.put_work(&order.job_key, &still::png(&picture, &[]))?;
    // A given picture is not ours to label as made by a machine.
    let record = label::given_record(order, id);
    let file = still::png(&picture, &[("genvideo", &record)]);
    let delivered = inner.settings.store.put_blob(&order.job_key, &file)?;
    let work = Work { notes, ..Work::default() };
    Ok(ImageMade {
        image,
        delivered,
        more: Vec::new(),
        delivered_size: (width, height),
        sampler: None,
        tokens: None,
        work,
    })
}

/// The given image at `size`, and what was done to it.
fn given(
    inner: &Inner,
    id: &str,
    (width, height): (u32, u32),
) -> Result<(RgbImage, Vec<String>), Error> {
    let bytes = inner.settings.store.get_blob(id)?;
    let decoded = still::decode(&bytes, &still::Limits::default())
        .map_err(|source| Error::GivenImage { id: id.to_owned(), source })?;
    let mut notes = decoded.notes;
    if decoded.image.dimensions() != (width, height) {
        let (was_width, was_height) = decoded.image.dimensions();
        notes.push(format!(
            "the given image of {was_width}x{was_height} was cut and scaled to {width}x{height}"
        ));
    }
    Ok((still::cover(&decoded.image, width, height), notes))
}

fn generate(
    inner: &Inner,
    order: &Order,
    plan: &ImagePlan,
    hook: &mut Hook<'_>,
) -> Result<ImageMade, Error> {
    let prompts = style::apply(&order.job);
    let mut request = ImageRequest {
        prompt: prompts.prompt,
        negative: Some(label::negative(order, &prompts.negative)).filter(|text| !text.is_empty()),
        width: plan.size.0,
        height: plan.size.1,
        steps: plan.steps,
        guidance: plan.guidance,
        sampler: plan.sampler.as_deref().map(str::parse).transpose()?,
        seed: order.plan.seed,
        clip_skip: plan.clip_skip,
        batch: plan.batch.unwrap_or(1),
        ..ImageRequest::default()
    };
    let mut notes = Vec::new();
    if let (Some(strength), Some(id)) = (plan.strength, &order.job.image) {
        let picture;
        (picture, notes) = given(inner, id, plan.size)?;
        request.init = Some((picture, strength));
    }
    let (output, mut work) = draw(inner, order, plan, request.clone(), hook)?;
    let started = Instant::now();
    let native = still::png(output.image(), &[]);
    let image = inner.settings.store.put_work(&order.job_key, &native)?;
    let made = label::Made { request: &request, sampler: &output.sampler, work: &work };
    let mut delivered = deliver(inner, order, plan, &made, &output.images)?;
    work.seconds.insert("image_file".to_owned(), seconds(started.elapsed()));
    work.notes.extend(notes);
    work.notes.extend(output.notes);
    if output.tokens_cut > 0 {
        work.notes.push(format!(
            "the prompt has {} tokens; the text encoder of `{}` cut the last {}",
            output.tokens, plan.model, output.tokens_cut
        ));
    }
    Ok(ImageMade {
        image,
        delivered: delivered.remove(0),
        more: delivered,
        delivered_size: order.plan.deliver,
        sampler: Some(output.sampler),
        tokens: Some((output.tokens, output.tokens_cut)),
        work,
    })
}

/// Writes each image at the asked size, labelled as if it had been made alone.
fn deliver(
    inner: &Inner,
    order: &Order,
    plan: &ImagePlan,
    made: &label::Made<'_>,
    images: &[RgbImage],
) -> Result<Vec<BlobRef>, Error> {
    let (width, height) = order.plan.deliver;
    let blobs = images.iter().zip(0_u64..).map(|(image, item)| {
        let picture = still::cover(image, width, height);
        let seed = order.plan.seed.wrapping_add(item);
        let texts = label::image_texts(order, plan, made, seed);
        let texts: Vec<(&str, &str)> = texts.iter().map(|(key, text)| (*key, &**text)).collect();
        let file = still::generated_png(&picture, &texts);
        room::check_result(&inner.settings, file.len() as u64)?;
        Ok(inner.settings.store.put_blob(&order.job_key, &file)?)
    });
    blobs.collect()
}

impl Request for ImageRequest {
    type Model = ImageModel;
    type Output = ImageOutput;
    const NAME: &'static str = "image";

    fn stage(&self) -> String {
        "image".to_owned()
    }

    fn decoding(&self) -> impl Debug {
        self.tiling
    }

    fn ready<'p>(
        &mut self,
        permit: &'p mut Permit<'_>,
        settings: &Settings,
        wanted: &Wanted,
        memory: &str,
        hook: &mut Hook<'_>,
    ) -> Result<(&'p ImageModel, Ready), Error> {
        permit.image(settings, wanted, (self, memory), hook)
    }

    fn run(
        &self,
        model: &ImageModel,
        at: &mut Checkpoint,
        keep: &mut Keep<'_>,
        hook: &mut engine::Hook<'_>,
    ) -> engine::Result<ImageOutput> {
        model.resume(self, at, keep, hook)
    }
}

/// Draws with the model of the plan.
fn draw(
    inner: &Inner,
    order: &Order,
    plan: &ImagePlan,
    request: ImageRequest,
    hook: &mut Hook<'_>,
) -> Result<(ImageOutput, Work), Error> {
    let (weights, vae, wanted) = wanted(inner, plan, hook)?;
    let (output, work) = infer(inner, order, &wanted, request, hook)?;
    Ok((output, Work { weights: Some(weights), vae, ..work }))
}

/// The model of the plan, with the hashes of its weights and of another autoencoder.
pub(super) fn wanted(
    inner: &Inner,
    plan: &ImagePlan,
    hook: &mut Hook<'_>,
) -> Result<(String, Option<String>, Wanted), Error> {
    let path = inner.settings.library.find(&plan.lookup, Task::TextToImage)?.folder;
    let (weights, mut files) = inner.hashes.model((&plan.model, &path), hook)?;
    let options = options(inner, plan)?;
    let mut hashes = vec![weights.clone()];
    let mut vae = None;
    let names = plan.vae.iter().chain(plan.loras.iter().map(|lora| &lora.name));
    let paths = options.vae.iter().chain(options.loras.iter().map(|lora| &lora.path));
    for (name, path) in names.zip(paths) {
        let file = inner.hashes.single((name, path), hook)?;
        if options.vae.is_some() && vae.is_none() {
            vae = Some(file.sha256.clone());
        }
        hashes.push(file.sha256.clone());
        files.push(file);
    }
    Ok((weights, vae, Wanted { path, options, hashes: hashes.join(" "), files }))
}

/// What the plan changes about the model.
fn options(inner: &Inner, plan: &ImagePlan) -> Result<LoadOptions, Error> {
    let library = &inner.settings.library;
    let loras = plan.loras.iter().map(|lora| {
        let path = library.find_lora(&lora.name)?;
        Ok(LoraFile { path, scale: lora.scale })
    });
    Ok(LoadOptions {
        vae: plan.vae.as_deref().map(|name| library.find_vae(name)).transpose()?,
        prediction: plan.prediction.map(|prediction| match prediction {
            job::Prediction::Epsilon => Prediction::Epsilon,
            job::Prediction::VPrediction => Prediction::Velocity,
        }),
        loras: loras.collect::<Result<Vec<_>, Error>>()?,
        ..LoadOptions::default()
    })
}
