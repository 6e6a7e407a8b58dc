//! A receipt against this machine: the job is made again, stage by stage, and the first thing that comes out otherwise
//! is named.
//!
//! The receipt's plan is what is carried out, with models found on this machine; models of other content are refused
//! before any work, and so is a stage that has no room here without tiles and had none, since tiles change results. What
//! else is not as it was (device, threads, versions) is told beside the result.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::label::GENERATOR;
use super::plan::Plan;
use super::receipt::{Receipt, StageReceipt, without_places};
use super::{Error, Hook, ModelFile, Order, Renderer, Work, gen_image, gen_video};
use crate::engine;
use crate::job::class::{ErrorClass, Fault};
use crate::store::JobKey;

/// What came of making a result again.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Verdict {
    /// The first thing that differs; `None` when all is equal.
    pub mismatch: Option<Mismatch>,
    /// What is not as it was when the receipt was written; it may explain a mismatch.
    pub differences: Vec<Difference>,
    /// Denoising steps that were equal.
    pub steps: usize,
    /// Decoded chunks that were equal.
    pub chunks: usize,
    /// Files that were equal.
    pub files: usize,
}

/// Something that shapes results, in the receipt and here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// For example `device` or `plan.image.steps`.
    pub what: String,
    /// In the receipt.
    pub receipt: String,
    /// On this machine.
    pub here: String,
}

/// The first thing that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{} differs: {} in the receipt, {} here", self.place(), or_none(.receipt), or_none(.here))]
pub struct Mismatch {
    /// `image`, `video-0` and so on, or the name of a file.
    pub stage: String,
    /// What of the stage.
    pub part: Part,
    /// Which one, from 1.
    pub number: usize,
    /// How many the receipt has.
    pub of: usize,
    /// Its hash in the receipt; `None` when there is none.
    pub receipt: Option<String>,
    /// Its hash here; `None` when there is none.
    pub here: Option<String>,
}

/// A part of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// A denoising step.
    Denoise,
    /// A decoded chunk.
    Decode,
    /// A file.
    File,
}

impl Mismatch {
    /// Whether the newest of the hashes `made` is not the receipt's.
    pub(super) fn of_last(
        stage: &str,
        (part, receipt, made): (Part, &[String], &[String]),
    ) -> Option<Box<Self>> {
        let index = made.len().checked_sub(1)?;
        Self::at(stage, part, index, (receipt, made))
    }

    fn at(
        stage: &str,
        part: Part,
        index: usize,
        (receipt, made): (&[String], &[String]),
    ) -> Option<Box<Self>> {
        let (wanted, got) = (receipt.get(index), made.get(index));
        (wanted != got).then(|| {
            Box::new(Self {
                stage: stage.to_owned(),
                part,
                number: index + 1,
                of: receipt.len(),
                receipt: wanted.cloned(),
                here: got.cloned(),
            })
        })
    }

    fn place(&self) -> String {
        let Self { stage, number, of, .. } = self;
        match self.part {
            Part::Denoise => format!("stage `{stage}`, step {number} of {of},"),
            Part::Decode => format!("stage `{stage}`, decoded chunk {number} of {of},"),
            Part::File if *of > 1 => format!("file `{stage}` {number} of {of}"),
            Part::File => format!("file `{stage}`"),
        }
    }
}

fn or_none(hash: &Option<String>) -> &str {
    hash.as_deref().unwrap_or("none")
}

impl fmt::Display for Difference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, receipt, here } = self;
        write!(formatter, "{what}: {receipt} in the receipt, {here} here")
    }
}

impl Verdict {
    fn note(&mut self, what: &str, receipt: impl fmt::Display, here: impl fmt::Display) {
        let (receipt, here) = (receipt.to_string(), here.to_string());
        let found = Difference { what: what.to_owned(), receipt, here };
        if found.receipt != found.here && !self.differences.contains(&found) {
            self.differences.push(found);
        }
    }
}

pub(super) fn verify(
    renderer: &Renderer,
    receipt: &Receipt,
    hook: &mut Hook<'_>,
) -> Result<Verdict, Error> {
    let mut verdict = Verdict::default();
    let plan = plan(renderer, receipt, &mut verdict)?;
    check_models(renderer, receipt, &plan, hook)?;
    note_machine(renderer, receipt, &mut verdict, hook)?;
    let key = JobKey::of_workflow(&format!("verify-{}", uuid::Uuid::now_v7()));
    let expected = Arc::new(receipt.stages.clone());
    let order = Order { expected, is_only_attempt: true, ..Order::new(key, receipt.job()?, plan) };
    let compared = compare(renderer, receipt, &order, &mut verdict, hook);
    renderer.tidy(&order.job_key);
    match compared {
        Err(Error::Differs(mismatch)) => verdict.mismatch = Some(*mismatch),
        compared => compared?,
    }
    Ok(verdict)
}

/// The receipt's plan with models found here; what this machine would decide otherwise is noted.
fn plan(renderer: &Renderer, receipt: &Receipt, verdict: &mut Verdict) -> Result<Plan, Error> {
    let mut plan = receipt.plan.clone();
    let here = renderer.plan(&receipt.pinned_job()?, receipt.seed)?;
    if let (Some(plan), Some(here)) = (&mut plan.image, &here.image) {
        plan.lookup.clone_from(&here.lookup);
    }
    if let (Some(plan), Some(here)) = (&mut plan.video, &here.video) {
        plan.lookup.clone_from(&here.lookup);
    }
    let value = |plan: &Plan| serde_json::to_value(without_places(plan));
    note_plan("plan", &value(&receipt.plan)?, &value(&here)?, verdict);
    Ok(plan)
}

/// Notes every value that differs by its path.
fn note_plan(path: &str, receipt: &Value, here: &Value, verdict: &mut Verdict) {
    match (receipt, here) {
        (Value::Object(one), Value::Object(other)) => {
            let all: std::collections::BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            // An estimate and words shape nothing.
            for key in all
                .into_iter()
                .filter(|key| !["shares", "memory_mb", "notes"].contains(&key.as_str()))
            {
                let path = format!("{path}.{key}");
                note_plan(&path, &receipt[key.as_str()], &here[key.as_str()], verdict);
            }
        }
        _ => verdict.note(path, receipt, here),
    }
}

/// Refuses models whose files are not those of the receipt.
fn check_models(
    renderer: &Renderer,
    receipt: &Receipt,
    plan: &Plan,
    hook: &mut Hook<'_>,
) -> Result<(), Error> {
    let inner = &renderer.inner;
    let mut here = Vec::new();
    if let Some(image) = &plan.image {
        here.extend(gen_image::wanted(inner, image, hook)?.2.files);
    }
    if let Some(video) = &plan.video {
        here.extend(gen_video::wanted(inner, video, hook)?.files);
    }
    let mut there: Vec<&ModelFile> = Vec::new();
    for file in receipt.stages.values().flat_map(|stage| &stage.models) {
        if !there.contains(&file) {
            there.push(file);
        }
    }
    let is_same =
        |one: &ModelFile, other: &ModelFile| (&one.model, &one.file) == (&other.model, &other.file);
    let mut faults = Vec::new();
    let mut fault = |class, message| faults.push(Fault::new(class, "", message));
    for file in &there {
        let name = format!("`{}` of model `{}`", file.file, file.model);
        match here.iter().find(|other| is_same(file, other)) {
            None => fault(ErrorClass::MissingWeights, format!("{name} is not on this machine")),
            Some(other) if other.sha256 != file.sha256 => fault(
                ErrorClass::WeightsHash,
                format!(
                    "{name} has the hash {} here, {} in the receipt",
                    other.sha256, file.sha256
                ),
            ),
            Some(_) => {}
        }
    }
    for file in here.iter().filter(|file| !there.iter().any(|other| is_same(file, other))) {
        let message = format!("`{}` of model `{}` is not in the receipt", file.file, file.model);
        fault(ErrorClass::WeightsHash, message);
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Refused(faults)) }
}

/// Notes what is different about the program and the device.
fn note_machine(
    renderer: &Renderer,
    receipt: &Receipt,
    verdict: &mut Verdict,
    hook: &mut Hook<'_>,
) -> Result<(), Error> {
    verdict.note("version", &receipt.generator, GENERATOR);
    if receipt.stages.is_empty() {
        return Ok(());
    }
    let mut permit = renderer.inner.desk.wait(hook)?;
    let compute = permit.compute(&renderer.inner.settings)?;
    let model = |name: &Option<String>| name.clone().unwrap_or_else(|| "unknown".to_owned());
    for stage in receipt.stages.values() {
        verdict.note("device", &stage.device, compute.name());
        verdict.note("device model", model(&stage.device_model), model(&compute.model()));
        verdict.note("dtype", &stage.dtype, compute.dtype_name());
        verdict.note("threads", stage.threads, engine::device::threads());
    }
    Ok(())
}

/// Makes everything again; [`Error::Differs`] at the first thing that differs.
fn compare(
    renderer: &Renderer,
    receipt: &Receipt,
    order: &Order,
    verdict: &mut Verdict,
    hook: &mut Hook<'_>,
) -> Result<(), Error> {
    let image = renderer.gen_image(order, hook)?;
    finish(renderer, order, ("image", &image.work), verdict)?;
    let made: Vec<String> = std::iter::once(&image.delivered)
        .chain(&image.more)
        .map(|blob| blob.sha256.clone())
        .collect();
    let one = std::slice::from_ref(&receipt.files.image);
    let images = if receipt.files.images.is_empty() { one } else { &receipt.files.images };
    same_files("image", images, &made, verdict)?;
    let Some(plan) = &order.plan.video else { return Ok(()) };
    let (mut runs, mut start) = (Vec::new(), image.image);
    for run in 0..plan.runs {
        let frames = renderer.gen_video(order, &start, run, hook)?;
        finish(renderer, order, (&format!("video-{run}"), &frames.work), verdict)?;
        start = frames.last_frame.clone();
        runs.push(frames);
    }
    let made = renderer.encode_video(order, &runs, hook)?;
    if let Some(encode) = &receipt.encode {
        verdict.note("encoder", &encode.encoder, &made.encoder);
        verdict.note("encoder version", &encode.version, &made.encoder_version);
        verdict.note("encoder threads", encode.threads, super::encode_video::ENCODER_THREADS);
        verdict.note("encoder crf", encode.crf, super::encode_video::CRF);
    }
    let hashes = |hash: &Option<String>| hash.iter().cloned().collect::<Vec<_>>();
    same_files("video", &hashes(&receipt.files.video), &[made.video.sha256], verdict)?;
    same_files("poster", &hashes(&receipt.files.poster), &[made.poster.sha256], verdict)
}

/// Counts a stage that was equal step by step, unless the receipt has more of them.
fn finish(
    renderer: &Renderer,
    order: &Order,
    (stage, work): (&str, &Work),
    verdict: &mut Verdict,
) -> Result<(), Error> {
    let made = StageReceipt::left_by(renderer.store(), &order.job_key, work)?;
    let (Some(expected), Some(made)) = (order.expected(stage), made) else { return Ok(()) };
    verdict.note("memory", &expected.memory, &made.memory);
    verdict.steps += made.denoise.len();
    verdict.chunks += made.decode.len();
    for (part, receipt, made) in [
        (Part::Denoise, &expected.denoise, &made.denoise),
        (Part::Decode, &expected.decode, &made.decode),
    ] {
        if let Some(found) = Mismatch::at(stage, part, made.len(), (receipt, made)) {
            return Err(found.into());
        }
    }
    Ok(())
}

fn same_files(
    name: &str,
    receipt: &[String],
    made: &[String],
    verdict: &mut Verdict,
) -> Result<(), Error> {
    for index in 0..receipt.len().max(made.len()) {
        if let Some(found) = Mismatch::at(name, Part::File, index, (receipt, made)) {
            return Err(found.into());
        }
        verdict.files += 1;
    }
    Ok(())
}
