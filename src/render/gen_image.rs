//! The image of a job: generated from its prompt, or the given one decoded within limits and cut to the asked aspect.
//!
//! Leaves two objects: the native picture for the video model and the delivered one, exactly at the asked size.

use std::collections::BTreeMap;
use std::time::Instant;

use super::models::{self, bridge};
use super::plan::ImagePlan;
use super::{Error, Hook, ImageMade, Inner, Order, Work, label, report, seconds};
use crate::engine::{ImageOutput, ImageRequest, LoraFile};
use crate::hub::Task;
use crate::job::style;
use crate::media::still;

pub(super) fn gen_image(
    inner: &Inner,
    order: &Order,
    hook: &mut Hook<'_>,
) -> Result<ImageMade, Error> {
    match (&order.plan.image, &order.job.image) {
        (_, Some(id)) => take_given(inner, order, id, hook),
        (Some(plan), None) => generate(inner, order, plan, hook),
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
    let bytes = inner.settings.store.get_blob(id)?;
    let decoded = still::decode(&bytes, &still::Limits::default())
        .map_err(|source| Error::GivenImage { id: id.to_owned(), source })?;
    let (width, height) = order.plan.deliver;
    let picture = still::cover(&decoded.image, width, height);
    report(hook, "decode", 1, 1)?;
    let image = inner.settings.store.put_work(&order.job_key, &still::png(&picture, &[]))?;
    // A given picture is not ours to label as made by a machine.
    let record = label::given_record(order, id);
    let file = still::png(&picture, &[("genvideo", &record)]);
    let delivered = inner.settings.store.put_blob(&order.job_key, &file)?;
    let mut notes = decoded.notes;
    if decoded.image.dimensions() != (width, height) {
        let (was_width, was_height) = decoded.image.dimensions();
        notes.push(format!(
            "the given image of {was_width}x{was_height} was cut and scaled to {width}x{height}"
        ));
    }
    let work = Work { notes, ..Work::default() };
    Ok(ImageMade {
        image,
        delivered,
        delivered_size: (width, height),
        sampler: None,
        tokens: None,
        work,
    })
}

fn generate(
    inner: &Inner,
    order: &Order,
    plan: &ImagePlan,
    hook: &mut Hook<'_>,
) -> Result<ImageMade, Error> {
    let prompts = style::apply(&order.job);
    let request = ImageRequest {
        prompt: prompts.prompt,
        negative: Some(label::negative(order, &prompts.negative)).filter(|text| !text.is_empty()),
        width: plan.size.0,
        height: plan.size.1,
        steps: plan.steps,
        guidance: plan.guidance,
        sampler: plan.sampler.as_deref().map(str::parse).transpose()?,
        seed: order.plan.seed,
        ..ImageRequest::default()
    };
    let (output, mut work) = infer(inner, plan, request.clone(), hook)?;
    let (width, height) = order.plan.deliver;
    let started = Instant::now();
    let picture = still::cover(output.image(), width, height);
    let image = inner.settings.store.put_work(&order.job_key, &still::png(output.image(), &[]))?;
    let made = label::Made { request: &request, sampler: &output.sampler, work: &work };
    let parameters = label::parameters(order, plan, &made);
    let record = label::image_record(order, plan, &made);
    let file =
        still::generated_png(&picture, &[("parameters", &parameters), ("genvideo", &record)]);
    let delivered = inner.settings.store.put_blob(&order.job_key, &file)?;
    work.seconds.insert("image_file".to_owned(), seconds(started.elapsed()));
    work.notes.extend(output.notes);
    if output.tokens_cut > 0 {
        work.notes.push(format!(
            "the prompt has {} tokens; the text encoder of `{}` cut the last {}",
            output.tokens, plan.model, output.tokens_cut
        ));
    }
    Ok(ImageMade {
        image,
        delivered,
        delivered_size: (width, height),
        sampler: Some(output.sampler),
        tokens: Some((output.tokens, output.tokens_cut)),
        work,
    })
}

/// Runs the model under the permit; when memory runs out all the same, once more with as little of it as possible.
fn infer(
    inner: &Inner,
    plan: &ImagePlan,
    mut request: ImageRequest,
    hook: &mut Hook<'_>,
) -> Result<(ImageOutput, Work), Error> {
    let folder = inner.settings.library.find(&plan.lookup, Task::TextToImage)?.folder;
    let loras = plan.loras.iter().map(|lora| {
        let path = inner.settings.library.find_lora(&lora.name)?;
        Ok(LoraFile { path, scale: lora.scale })
    });
    let wanted = (folder, loras.collect::<Result<Vec<_>, Error>>()?);
    let mut permit = inner.desk.wait(hook)?;
    for last_try in [false, true] {
        let started = Instant::now();
        let memory = if last_try { "low" } else { &inner.settings.memory };
        let (model, ready) =
            permit.image(&inner.settings, &wanted, (&mut request, memory), hook)?;
        let loaded = Instant::now();
        match model.generate(&request, &mut bridge(hook)) {
            Err(error) if !last_try && models::is_out_of_memory(&error) => permit.unload(),
            result => {
                let output = result?;
                let seconds = BTreeMap::from([
                    ("image_load".to_owned(), super::seconds(loaded - started)),
                    ("image".to_owned(), super::seconds(loaded.elapsed())),
                ]);
                return Ok((output, ready.work(seconds)));
            }
        }
    }
    unreachable!("the last try returns")
}
