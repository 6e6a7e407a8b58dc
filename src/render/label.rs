//! What is written into files about their making: the A1111 `parameters` text, our `genvideo` JSON, the tags of an mp4.
//!
//! The label that a machine made them is `media`'s. Nothing here depends on the clock or on who asked: the same job
//! ends in the same bytes, and the user id stays out.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::plan::{ImagePlan, VideoPlan};
use super::{Order, Work, hash};
use crate::engine::ImageRequest;
use crate::job::style;
use crate::media::label::SOURCE_TYPE;

/// Version of the `genvideo` JSON.
pub const SCHEMA_VERSION: u32 = 1;
/// Name and version of this program, as files carry it.
pub const GENERATOR: &str = concat!("genvideo ", env!("CARGO_PKG_VERSION"));
/// Longest title of an mp4, in characters.
const TITLE: usize = 255;

/// An image's making, as far as only the stage that made it knows.
pub(super) struct Made<'a> {
    pub(super) request: &'a ImageRequest,
    pub(super) sampler: &'a str,
    pub(super) work: &'a Work,
}

/// What to avoid: the job's and its style's words, then those of the model.
pub(super) fn negative(order: &Order, of_job: &str) -> String {
    let of_model =
        order.plan.image.as_ref().and_then(|plan| plan.negative.as_deref()).unwrap_or_default();
    match (of_job.is_empty(), of_model.is_empty()) {
        (false, false) => format!("{of_job}, {of_model}"),
        (true, _) => of_model.to_owned(),
        (_, true) => of_job.to_owned(),
    }
}

/// The texts of a generated PNG, by their keys; without the prompt where the job wants that.
pub(super) fn image_texts(
    order: &Order,
    plan: &ImagePlan,
    made: &Made<'_>,
    seed: u64,
) -> Vec<(&'static str, String)> {
    if !order.job.embed_metadata {
        return vec![("genvideo", bare_record())];
    }
    vec![
        ("parameters", parameters(order, plan, made, seed)),
        ("genvideo", image_record(order, plan, made, seed)),
    ]
}

/// Our record of a work whose prompt and settings are nobody's business.
fn bare_record() -> String {
    json!({
        "schema_version": SCHEMA_VERSION,
        "generator": GENERATOR,
        "digital_source_type": SOURCE_TYPE,
    })
    .to_string()
}

/// The text other tools read back: prompt, negative prompt, and one line of `key: value`.
fn parameters(order: &Order, plan: &ImagePlan, made: &Made<'_>, seed: u64) -> String {
    let mut text = made.request.prompt.clone();
    if let Some(negative) = &made.request.negative {
        text.push_str("\nNegative prompt: ");
        text.push_str(negative);
    }
    let (width, height) = plan.size;
    let short = |sha256: &Option<String>| sha256.as_deref().map(hash::short);
    let line = [
        ("Steps", Some(plan.steps.to_string())),
        ("Sampler", Some(made.sampler.to_owned())),
        ("CFG scale", Some(plan.guidance.to_string())),
        ("Seed", Some(seed.to_string())),
        ("Size", Some(format!("{width}x{height}"))),
        ("Model hash", short(&made.work.weights)),
        ("Model", Some(plan.model.clone())),
        ("VAE hash", short(&made.work.vae)),
        ("VAE", plan.vae.clone()),
        ("Denoising strength", plan.strength.map(|strength| strength.to_string())),
        ("Clip skip", plan.clip_skip.filter(|skip| *skip > 1).map(|skip| skip.to_string())),
        ("Style", Some(order.job.style.clone())),
        ("Delivered size", Some(format!("{}x{}", order.plan.deliver.0, order.plan.deliver.1))),
        ("Version", Some(GENERATOR.to_owned())),
    ];
    let line: Vec<_> = line.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    text.push('\n');
    text.push_str(&pairs(&line));
    text
}

/// `key: value, key: value`; a value that would break the line is quoted as JSON.
fn pairs(line: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (key, value) in line {
        if !text.is_empty() {
            text.push_str(", ");
        }
        let quoted = if value.contains([',', ':', '\n']) {
            Value::from(value.as_str()).to_string()
        } else {
            value.clone()
        };
        write!(text, "{key}: {quoted}").expect("a string takes every write");
    }
    text
}

/// Our own record of a generated image.
fn image_record(order: &Order, plan: &ImagePlan, made: &Made<'_>, seed: u64) -> String {
    let mut record = base(order);
    record.insert("seed".to_owned(), seed.into());
    let mut image = json!({
        "model": plan.model,
        "size": plan.size,
        "delivered_size": order.plan.deliver,
        "effective_prompt": made.request.prompt,
        "effective_negative_prompt": made.request.negative.as_deref().unwrap_or_default(),
        "steps": plan.steps,
        "guidance": plan.guidance,
        "sampler": made.sampler,
        "device": made.work.device,
        "dtype": made.work.dtype,
    });
    let source = order.job.image.as_ref().filter(|_| plan.strength.is_some());
    let extras = [
        ("model_sha256", json!(made.work.weights)),
        ("vae", json!(plan.vae)),
        ("vae_sha256", json!(made.work.vae)),
        ("source_image", json!(source)),
        ("strength", json!(plan.strength)),
        ("clip_skip", json!(plan.clip_skip)),
        ("prediction", json!(plan.prediction)),
        ("loras", if plan.loras.is_empty() { Value::Null } else { json!(plan.loras) }),
    ];
    for (key, value) in extras.into_iter().filter(|(_, value)| !value.is_null()) {
        image[key] = value;
    }
    record.insert("image".to_owned(), image);
    record.insert("digital_source_type".to_owned(), SOURCE_TYPE.into());
    Value::Object(record).to_string()
}

/// Our own record of a given image: where it came from, and no claim that a machine made it.
pub(super) fn given_record(order: &Order, id: &str) -> String {
    json!({
        "schema_version": SCHEMA_VERSION,
        "generator": GENERATOR,
        "source_image": id,
        "delivered_size": order.plan.deliver,
    })
    .to_string()
}

/// Tags of the mp4.
pub(super) fn video_tags(order: &Order, plan: &VideoPlan, work: &Work) -> Vec<(String, String)> {
    if !order.job.embed_metadata {
        return [("genvideo", bare_record()), ("software", GENERATOR.to_owned())]
            .map(|(key, value)| (key.to_owned(), value))
            .into();
    }
    let one_line = |letter: char| if letter.is_control() { ' ' } else { letter };
    let title: String = order.job.prompt.chars().take(TITLE).map(one_line).collect();
    [
        ("title", title),
        ("comment", video_parameters(order, plan)),
        ("genvideo", video_record(order, plan, work)),
        ("software", GENERATOR.to_owned()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn video_parameters(order: &Order, plan: &VideoPlan) -> String {
    let (width, height) = plan.size;
    let mut line = vec![
        ("Steps", plan.steps.to_string()),
        ("CFG scale", format!("{} to {}", plan.min_guidance, plan.max_guidance)),
        ("Seed", order.plan.seed.to_string()),
        ("Size", format!("{width}x{height}")),
        ("Model", plan.model.clone()),
        ("Motion", plan.motion.to_string()),
        ("Frames", plan.kept_native.to_string()),
        ("Runs", plan.runs.to_string()),
    ];
    if let Some(image) = &order.plan.image {
        line.push(("Image model", image.model.clone()));
    }
    line.push(("Version", GENERATOR.to_owned()));
    pairs(&line)
}

fn video_record(order: &Order, plan: &VideoPlan, work: &Work) -> String {
    let mut record = base(order);
    if let Some(image) = &order.plan.image {
        let prompts = style::apply(&order.job);
        record.insert("effective_prompt".to_owned(), prompts.prompt.into());
        record.insert("image_model".to_owned(), image.model.clone().into());
    }
    if let Some(id) = &order.job.image {
        record.insert("source_image".to_owned(), id.clone().into());
    }
    let mut parameters = json!(plan);
    if let Some(fields) = parameters.as_object_mut() {
        // A path of this machine is nobody's business.
        fields.remove("lookup");
    }
    let video = json!({
        "parameters": parameters,
        "encoder_threads": super::encode_video::ENCODER_THREADS,
        "model_sha256": work.weights,
        "device": work.device,
        "dtype": work.dtype,
    });
    record.insert("video".to_owned(), video);
    record.insert("digital_source_type".to_owned(), SOURCE_TYPE.into());
    Value::Object(record).to_string()
}

/// What every record opens with.
fn base(order: &Order) -> Map<String, Value> {
    [
        ("schema_version", SCHEMA_VERSION.into()),
        ("generator", GENERATOR.into()),
        ("prompt", order.job.prompt.clone().into()),
        ("negative_prompt", order.job.negative_prompt.clone().into()),
        ("style", order.job.style.clone().into()),
        ("seed", order.plan.seed.into()),
    ]
    .map(|(key, value): (&str, Value)| (key.to_owned(), value))
    .into_iter()
    .collect()
}
