//! The receipt of a job: everything that shaped its result, so that the result can be checked and made again.
//!
//! It is written once, when the job is published, and read strictly: by then it may have been edited. What each stage of
//! inference has to say waits in a work object until then. The user id stays out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::hash::ModelFile;
use super::label::{self, GENERATOR};
use super::models::{Ready, Wanted};
use super::plan::Plan;
use super::{Error, Made, Order, Work, encode_video};
use crate::engine::{self, Trace};
use crate::job::class::{ErrorClass, Fault};
use crate::job::result::Facts;
use crate::job::{ValidJob, fields, parse, style};
use crate::store::{BlobRef, JobKey, Store};

/// Version of the receipt's JSON.
pub const RECEIPT_VERSION: u32 = 2;
/// Largest receipt that is read, in bytes.
pub const MAX_RECEIPT_BYTES: usize = 16 << 20;
/// Largest side, and most runs and frames, that a receipt's plan may name: above what any job has.
const MOST: u32 = 4096;

/// Everything that shaped a result, and the result's hashes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// [`RECEIPT_VERSION`].
    pub schema_version: u32,
    /// Name and version of the program.
    pub generator: String,
    /// The job in the store.
    pub job_key: JobKey,
    /// The request with its defaults, less the user id.
    pub request: Map<String, Value>,
    /// Seed of all noise.
    pub seed: u64,
    /// The prompt with the style's words.
    pub effective_prompt: String,
    /// What was to be avoided, by the job, its style and its model.
    pub effective_negative_prompt: String,
    /// What was decided; without the places of this machine.
    pub plan: Plan,
    /// Sampler of the image; `None` where an image was given.
    pub sampler: Option<String>,
    /// Hashes of the models.
    pub weights: Weights,
    /// How often weights were read from the disk.
    pub weights_read: u32,
    /// The stages of inference: `image`, `video-0`, `video-1` and so on.
    pub stages: BTreeMap<String, StageReceipt>,
    /// How the film was encoded; `None` for an image job.
    pub encode: Option<Encode>,
    /// The results.
    pub files: Files,
    /// What was really done.
    pub done: Facts,
}

/// Where and from what one stage of inference was made, and the hash of every step of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageReceipt {
    /// `cpu`, `cuda:0`, `metal`.
    pub device: String,
    /// What the device calls itself, where it does.
    pub device_model: Option<String>,
    /// `f32`, `f16`, `bf16`.
    pub dtype: String,
    /// Threads of the CPU.
    pub threads: usize,
    /// How much of the model was in memory at once: `together`, `in_turn` or, which alone changes results, `tiled`.
    pub memory: String,
    /// Every file of the models.
    pub models: Vec<ModelFile>,
    /// As [`Trace::denoise`].
    pub denoise: Vec<String>,
    /// As [`Trace::decode`].
    pub decode: Vec<String>,
}

/// SHA-256 of the models: of the one file, or of the list of weight files as `sha256sum` writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weights {
    /// Of the text-to-image model.
    pub image: Option<String>,
    /// Of the file that the autoencoder came from, where it was not the model's own.
    pub vae: Option<String>,
    /// Of the image-to-video model.
    pub video: Option<String>,
}

/// How a film was encoded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Encode {
    /// The encoder, and why not others.
    pub encoder: String,
    /// Versions of libavcodec and of the encoder.
    pub version: String,
    /// Its threads, whose number shapes the bytes.
    pub threads: u32,
    /// Constant quality.
    pub crf: u8,
}

/// SHA-256 of the results.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The image; the first of several.
    pub image: String,
    /// All images, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<String>,
    /// The film.
    pub video: Option<String>,
    /// Its first frame.
    pub poster: Option<String>,
}

impl StageReceipt {
    /// Of a run of `wanted` that went as `ready` says.
    pub(super) fn new(ready: &Ready, wanted: &Wanted, trace: &Trace) -> Self {
        Self {
            device: ready.compute.name(),
            device_model: ready.compute.model(),
            dtype: ready.compute.dtype_name().to_owned(),
            threads: engine::device::threads(),
            memory: ready.memory.to_owned(),
            models: wanted.files.clone(),
            denoise: trace.denoise.clone(),
            decode: trace.decode.clone(),
        }
    }

    /// What a stage left for the receipt; `None` where no model worked.
    pub(super) fn left_by(store: &Store, job: &JobKey, work: &Work) -> Result<Option<Self>, Error> {
        let Some(object) = &work.receipt else { return Ok(None) };
        Ok(Some(serde_json::from_slice(&store.get_work(job, &object.sha256)?)?))
    }
}

impl Receipt {
    /// The receipt of a job that `made` all of it.
    pub(super) fn of(
        store: &Store,
        order: &Order,
        made: &Made,
        facts: &Facts,
    ) -> Result<Self, Error> {
        let Value::Object(mut request) = serde_json::to_value(&order.job)? else {
            return Err(Error::Order("a request that is no object".to_owned()));
        };
        request.remove("user_id");
        let mut stages = BTreeMap::new();
        let runs = made.runs.iter().map(|run| (format!("video-{}", run.run), &run.work));
        let works: Vec<_> =
            std::iter::once(("image".to_owned(), &made.image.work)).chain(runs).collect();
        for (name, work) in &works {
            let stage = StageReceipt::left_by(store, &order.job_key, work)?;
            stages.extend(stage.map(|stage| (name.clone(), stage)));
        }
        let prompts = style::apply(&order.job);
        let images = std::iter::once(&made.image.delivered).chain(&made.image.more);
        let images = images.filter(|_| !made.image.more.is_empty());
        let video = made.video.as_ref();
        let hash = |blob: &BlobRef| blob.sha256.clone();
        Ok(Self {
            schema_version: RECEIPT_VERSION,
            generator: GENERATOR.to_owned(),
            job_key: order.job_key.clone(),
            request,
            seed: order.plan.seed,
            effective_prompt: prompts.prompt,
            effective_negative_prompt: label::negative(order, &prompts.negative),
            plan: without_places(&order.plan),
            sampler: made.image.sampler.clone(),
            weights: Weights {
                image: made.image.work.weights.clone(),
                vae: made.image.work.vae.clone(),
                video: made.runs.first().and_then(|run| run.work.weights.clone()),
            },
            weights_read: works.iter().map(|(_, work)| work.weights_read).sum(),
            stages,
            encode: video.map(|made| Encode {
                encoder: made.encoder.clone(),
                version: made.encoder_version.clone(),
                threads: encode_video::ENCODER_THREADS,
                crf: encode_video::CRF,
            }),
            files: Files {
                image: hash(&made.image.delivered),
                images: images.map(hash).collect(),
                video: video.map(|made| hash(&made.video)),
                poster: video.map(|made| hash(&made.poster)),
            },
            done: facts.clone(),
        })
    }

    /// Reads a receipt that may have been edited.
    ///
    /// # Errors
    /// [`Error::Refused`] with what is wrong with it: its form, its version, its request, a hash that is none, or parts
    /// that contradict each other.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Version {
            schema_version: Value,
        }
        let refuse = |class, field: &str, message: String| {
            Error::Refused(vec![Fault::new(class, field, message)])
        };
        if bytes.len() > MAX_RECEIPT_BYTES {
            let message = format!(
                "got {} bytes, wanted a receipt of at most {MAX_RECEIPT_BYTES}",
                bytes.len()
            );
            return Err(refuse(ErrorClass::TooLarge, "", message));
        }
        let unread = |error: serde_json::Error| {
            refuse(class_of(&error), "", format!("this is not a receipt: {error}"))
        };
        let version: Version = serde_json::from_slice(bytes).map_err(unread)?;
        if version.schema_version != RECEIPT_VERSION {
            let got = fields::shown(&version.schema_version.to_string());
            let message = format!("got {got}, wanted `{RECEIPT_VERSION}`");
            return Err(refuse(ErrorClass::OutOfRange, "schema_version", message));
        }
        let receipt: Self = serde_json::from_slice(bytes).map_err(unread)?;
        let mut faults = receipt.faults();
        if let Err(Error::Refused(more)) = receipt.job() {
            faults.extend(more);
        }
        if faults.is_empty() { Ok(receipt) } else { Err(Error::Refused(faults)) }
    }

    /// The job as it was asked for, by nobody.
    pub fn job(&self) -> Result<ValidJob, Error> {
        read_job(self.request.clone())
    }

    /// The job with its models by name, since the defaults may be others by now.
    pub(super) fn pinned_job(&self) -> Result<ValidJob, Error> {
        read_job(self.pinned_request())
    }

    /// The request with the names of the models that made this result.
    pub fn pinned_request(&self) -> Map<String, Value> {
        let mut request = self.request.clone();
        let models = [
            ("image_model", self.plan.image.as_ref().map(|image| &image.model)),
            ("video_model", self.plan.video.as_ref().map(|video| &video.model)),
        ];
        for (field, model) in models {
            if let Some(model) = model {
                request.entry(field).or_insert_with(|| model.clone().into());
            }
        }
        request
    }

    /// What is wrong with it beside its form.
    fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        for (field, hash) in self.hashes() {
            let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            if hash.len() != 64 || !hash.bytes().all(digit) {
                let message =
                    format!("got {}, wanted 64 lower-case hex digits", fields::shown(hash));
                faults.push(Fault::new(ErrorClass::OutOfRange, field, message));
            }
        }
        let seed = Value::from(self.seed);
        let asked = self.request.get("seed").filter(|asked| **asked != seed);
        for (field, other) in [
            ("request.seed", asked.map(Value::to_string)),
            ("plan.seed", (self.plan.seed != self.seed).then(|| self.plan.seed.to_string())),
        ] {
            if let Some(other) = other {
                let message = format!("got {}, wanted the `seed` {seed}", fields::shown(&other));
                faults.push(Fault::new(ErrorClass::OutOfRange, field, message));
            }
        }
        faults.extend(self.sizes());
        let image = self.plan.image.iter().map(|_| "image".to_owned());
        let runs = self.plan.video.iter().flat_map(|plan| 0..plan.runs.min(1000));
        let wanted: Vec<String> = image.chain(runs.map(|run| format!("video-{run}"))).collect();
        let missing = wanted.iter().filter(|name| !self.stages.contains_key(*name));
        let strange = self.stages.keys().filter(|name| !wanted.contains(name));
        for (names, class, what) in [
            (missing.collect::<Vec<_>>(), ErrorClass::MissingField, "missing, the plan has it"),
            (strange.collect(), ErrorClass::UnknownField, "the plan has no such stage"),
        ] {
            for name in names {
                let field = format!("stages.{}", fields::shown(name).trim_matches('`'));
                faults.push(Fault::new(class, field, what));
            }
        }
        faults
    }

    /// Numbers of the plan that no job has.
    fn sizes(&self) -> Vec<Fault> {
        let mut numbers =
            vec![("plan.deliver", self.plan.deliver.0), ("plan.deliver", self.plan.deliver.1)];
        if let Some(image) = &self.plan.image {
            numbers.extend([("plan.image.size", image.size.0), ("plan.image.size", image.size.1)]);
            numbers.extend([("plan.image.batch", image.batch.unwrap_or(1))]);
        }
        if let Some(video) = &self.plan.video {
            numbers.extend([("plan.video.size", video.size.0), ("plan.video.size", video.size.1)]);
            numbers.extend([
                ("plan.video.runs", video.runs),
                ("plan.video.frames_per_run", video.frames_per_run),
            ]);
        }
        let wrong = numbers.into_iter().filter(|(_, number)| !(1..=MOST).contains(number));
        wrong
            .map(|(field, number)| {
                let message = format!("got {number}, wanted 1..{MOST}");
                Fault::new(ErrorClass::OutOfRange, field, message)
            })
            .collect()
    }

    /// Every hash by its field.
    fn hashes(&self) -> Vec<(String, &str)> {
        let mut all: Vec<(String, &str)> = vec![("files.image".to_owned(), &self.files.image)];
        for (index, hash) in self.files.images.iter().enumerate() {
            all.push((format!("files.images[{index}]"), hash));
        }
        for (name, hash) in [("video", &self.files.video), ("poster", &self.files.poster)] {
            all.extend(hash.as_deref().map(|hash| (format!("files.{name}"), hash)));
        }
        for (name, stage) in &self.stages {
            for (part, hashes) in [("denoise", &stage.denoise), ("decode", &stage.decode)] {
                let named = |(index, hash)| (format!("stages.{name}.{part}[{index}]"), hash);
                all.extend(hashes.iter().map(String::as_str).enumerate().map(named));
            }
            let models = stage.models.iter().map(|file| file.sha256.as_str()).enumerate();
            all.extend(
                models.map(|(index, hash)| (format!("stages.{name}.models[{index}].sha256"), hash)),
            );
        }
        all
    }
}

/// The job that `request` makes, by nobody.
fn read_job(mut request: Map<String, Value>) -> Result<ValidJob, Error> {
    request.insert("user_id".to_owned(), "receipt".into());
    parse::valid(&serde_json::to_vec(&request)?).map_err(|mut faults| {
        for fault in &mut faults {
            fault.field = format!("request.{}", fault.field).trim_end_matches('.').to_owned();
        }
        Error::Refused(faults)
    })
}

/// The plan without where models lie on this machine.
pub(super) fn without_places(plan: &Plan) -> Plan {
    let mut plan = plan.clone();
    if let Some(image) = &mut plan.image {
        image.lookup.clone_from(&image.model);
    }
    if let Some(video) = &mut plan.video {
        video.lookup.clone_from(&video.model);
    }
    plan
}

fn class_of(error: &serde_json::Error) -> ErrorClass {
    let text = error.to_string();
    match error.classify() {
        serde_json::error::Category::Data if text.starts_with("unknown field") => {
            ErrorClass::UnknownField
        }
        serde_json::error::Category::Data if text.starts_with("missing field") => {
            ErrorClass::MissingField
        }
        serde_json::error::Category::Data => ErrorClass::WrongType,
        _ => ErrorClass::InvalidJson,
    }
}
