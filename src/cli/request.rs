//! The flags that describe a job, and the request they become.
//!
//! Only what was typed is sent: every default belongs to the job types and the model manifests.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::failure::{Failure, faults};
use crate::job::class::ErrorClass;
use crate::job::{self, Lora, ValidJob};
use crate::store::Store;

/// Largest input image, in bytes.
const IMAGE_BYTES: u64 = 32 << 20;

/// Where the job ends.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Job {
    Image,
    Video,
}

/// How the delivered size relates to the generated one.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum SizePolicy {
    Fit,
    Exact,
}

/// What the image model predicts.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Prediction {
    #[value(name = "epsilon")]
    Epsilon,
    #[value(name = "v_prediction")]
    VPrediction,
}

/// The job itself.
#[derive(Args, Debug)]
#[command(next_help_heading = "Job")]
pub(crate) struct JobFlags {
    /// What to show; `-` reads it from standard input
    #[arg(value_name = "PROMPT", required = true, num_args = 1.., help_heading = None)]
    prompt: Vec<String>,
    /// Where the job ends
    #[arg(long, value_enum, default_value_t = Job::Video)]
    job: Job,
    /// Style preset; `none` adds nothing [default: realistic]
    #[arg(long, value_name = "NAME")]
    style: Option<String>,
    /// What to avoid
    #[arg(long, value_name = "TEXT")]
    negative: Option<String>,
    /// Delivered size in pixels, even sides of 64 to 2048 [default: 1024x1024]
    #[arg(long, value_name = "WxH", value_parser = parse_size)]
    size: Option<(u32, u32)>,
    /// Generate near that size and deliver it, or make it exactly or refuse [default: fit]
    #[arg(long, value_enum)]
    size_policy: Option<SizePolicy>,
    /// Length of the video in seconds, 0.1 to 60 [default: 5]
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    duration: Option<f64>,
    /// Frames per second of the video [default: 24]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    fps: Option<f64>,
    /// Seed of all noise; drawn and reported when missing
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Denoise steps of the image
    #[arg(long, value_name = "N")]
    steps: Option<u32>,
    /// Guidance scale of the image
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    guidance: Option<f64>,
    /// Sampler of the image, for example euler_a or dpmpp_2m_karras
    #[arg(long, value_name = "NAME")]
    sampler: Option<String>,
    /// Start from this picture instead of making one: a PNG, JPEG or WebP file
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Redraw that much of the picture given with `--image`, above 0, up to 1
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    strength: Option<f64>,
    /// Images of an image job, 1 to 8; each has the seed of the one before plus 1 [default: 1]
    #[arg(long, value_name = "N")]
    batch: Option<u32>,
    /// A1111's "Clip skip": 2 leaves out the text encoder's last layer
    #[arg(long, value_name = "N")]
    clip_skip: Option<u32>,
    /// File whose autoencoder takes the place of the image model's
    #[arg(long, value_name = "NAME")]
    vae: Option<String>,
    /// What the image model predicts, where its files do not tell
    #[arg(long, value_enum)]
    prediction: Option<Prediction>,
    /// LoRA file to apply, with its scale [default: 1]; may be given several times
    #[arg(long, value_name = "NAME[:SCALE]", value_parser = parse_lora)]
    lora: Vec<Lora>,
    /// Keep the prompt and the settings out of the image and the video; the label that a machine made them stays
    #[arg(long)]
    no_metadata: bool,
    /// Wait after the image until somebody approves of it
    #[arg(long)]
    approve: bool,
    /// Whose turn it is when several jobs wait: 1 goes first, 5 last [default: 3]
    #[arg(long, value_name = "N")]
    priority: Option<u32>,
    /// How much the video moves, 1 to 255
    #[arg(long, value_name = "N")]
    motion: Option<u32>,
    /// Noise added to the picture the video starts from
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    noise_aug: Option<f64>,
    /// Text-to-image model: a name or a folder
    #[arg(long, value_name = "MODEL")]
    image_model: Option<String>,
    /// Image-to-video model: a name or a folder
    #[arg(long, value_name = "MODEL")]
    video_model: Option<String>,
    /// Whose job it is; a label, never written into files [default: $USER]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
}

/// A request that passed every check this side can make.
pub(crate) struct Request {
    /// The JSON that goes to the server.
    pub(crate) bytes: Vec<u8>,
    /// The same, parsed.
    pub(crate) job: ValidJob,
}

impl Request {
    /// The request that `fields` make.
    pub(crate) fn of(fields: &Map<String, Value>) -> Result<Self, Failure> {
        let bytes = serde_json::to_vec(fields).expect("a map of JSON values serialises");
        Ok(Self { job: job::parse::valid(&bytes).map_err(|all| faults(&all))?, bytes })
    }
}

impl JobFlags {
    /// The request; a picture is put into the store on the way.
    pub(crate) fn request(&self, store: &Store) -> Result<Request, Failure> {
        let mut fields = self.fields()?;
        // First with no picture's id, so that a typing error costs no upload.
        if self.image.is_some() {
            fields.insert("image".to_owned(), json!("0".repeat(64)));
        }
        Request::of(&fields)?;
        if let Some(path) = &self.image {
            fields.insert("image".to_owned(), json!(import(store, path)?));
        }
        Request::of(&fields)
    }

    fn fields(&self) -> Result<Map<String, Value>, Failure> {
        let mut fields = Map::new();
        let mut set = |name: &str, value: Value| {
            if !value.is_null() {
                fields.insert(name.to_owned(), value);
            }
        };
        set("prompt", json!(self.prompt_text()?));
        set(
            "job_type",
            json!(match self.job {
                Job::Image => "IMAGE",
                Job::Video => "VIDEO",
            }),
        );
        set("user_id", json!(self.user.clone().unwrap_or_else(default_user)));
        set("style", json!(self.style));
        set("negative_prompt", json!(self.negative));
        set("width", json!(self.size.map(|size| size.0)));
        set("height", json!(self.size.map(|size| size.1)));
        set(
            "size_policy",
            json!(self.size_policy.map(|policy| match policy {
                SizePolicy::Fit => "fit",
                SizePolicy::Exact => "exact",
            })),
        );
        set("duration", number("duration", self.duration)?);
        set("fps", number("fps", self.fps)?);
        set("seed", json!(self.seed));
        set("steps", json!(self.steps));
        set("guidance", number("guidance", self.guidance)?);
        set("sampler", json!(self.sampler));
        set("strength", number("strength", self.strength)?);
        set("batch", json!(self.batch));
        set("clip_skip", json!(self.clip_skip));
        set("vae", json!(self.vae));
        set(
            "prediction",
            json!(self.prediction.map(|prediction| match prediction {
                Prediction::Epsilon => "epsilon",
                Prediction::VPrediction => "v_prediction",
            })),
        );
        set("loras", if self.lora.is_empty() { Value::Null } else { json!(self.lora) });
        set("embed_metadata", if self.no_metadata { json!(false) } else { Value::Null });
        set("approve", if self.approve { json!(true) } else { Value::Null });
        set("priority", json!(self.priority));
        set("motion", json!(self.motion));
        set("noise_aug", number("noise-aug", self.noise_aug)?);
        set("image_model", json!(self.image_model.as_deref().map(model)));
        set("video_model", json!(self.video_model.as_deref().map(model)));
        Ok(fields)
    }

    fn prompt_text(&self) -> Result<String, Failure> {
        if self.prompt != ["-"] {
            return Ok(self.prompt.join(" "));
        }
        let mut text = String::new();
        // One byte over the limit is enough for the fault to be named.
        std::io::stdin().take(64 << 10).read_to_string(&mut text).map_err(|error| {
            Failure::usage(format!("the prompt on standard input is not text: {error}"))
        })?;
        Ok(text.trim_end_matches(['\n', '\r']).to_owned())
    }
}

/// A model by its name, or by a folder near where the user is, which means nothing to a worker elsewhere.
fn model(name: &str) -> String {
    let folder = Path::new(name);
    let whole =
        folder.join("model_index.json").is_file().then(|| folder.canonicalize().ok()).flatten();
    whole.and_then(|whole| whole.to_str().map(str::to_owned)).unwrap_or_else(|| name.to_owned())
}

/// `inf` and `nan` are numbers to the command line but not to JSON.
fn number(flag: &str, value: Option<f64>) -> Result<Value, Failure> {
    match value {
        Some(value) if !value.is_finite() => {
            Err(Failure::usage(format!("`--{flag} {value}` is not a finite number")))
        }
        value => Ok(json!(value)),
    }
}

/// Whose jobs those are that name nobody.
pub(crate) fn default_user() -> String {
    let named = std::env::var("USER").or_else(|_| std::env::var("USERNAME"));
    let plain = |letter: char| {
        let refused = letter.is_control() || matches!(letter, '/' | '\\' | '%');
        if refused { '-' } else { letter }
    };
    let named: String = named.unwrap_or_default().chars().take(32).map(plain).collect();
    if named.trim().is_empty() { "local".to_owned() } else { named }
}

/// Puts the picture into the store. What is in it is for the worker to judge; here only what needs no decoder.
pub(super) fn import(store: &Store, path: &Path) -> Result<String, Failure> {
    let unreadable = |error: std::io::Error| {
        Failure::usage(format!("cannot read `{}`: {error}", path.display()))
            .hint("an image is a PNG, JPEG or WebP file")
    };
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > IMAGE_BYTES {
        let message =
            format!("`{}` has {length} bytes, at most {IMAGE_BYTES} are allowed", path.display());
        return Err(Failure::of(ErrorClass::ImageTooLarge, message));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    if bytes.is_empty() {
        return Err(Failure::of(ErrorClass::EmptyFile, format!("`{}` is empty", path.display())));
    }
    Ok(store.import_blob(&bytes)?.sha256)
}

/// `NAME`, or `NAME:SCALE`; a name may hold a colon where no number follows it.
fn parse_lora(text: &str) -> Result<Lora, String> {
    let scaled = text.rsplit_once(':').and_then(|(name, scale)| {
        let scale = scale.parse().ok().filter(|scale: &f64| scale.is_finite())?;
        Some((name, scale))
    });
    let (name, scale) = scaled.unwrap_or((text, 1.0));
    if name.is_empty() {
        return Err("wanted NAME or NAME:SCALE, for example `pixel-art:0.8`".to_owned());
    }
    Ok(Lora { name: name.to_owned(), scale })
}

fn parse_size(text: &str) -> Result<(u32, u32), String> {
    let sides = text.split_once(['x', 'X', '×']).and_then(|(width, height)| {
        Some((width.trim().parse().ok()?, height.trim().parse().ok()?))
    });
    sides.ok_or_else(|| "wanted WIDTHxHEIGHT, for example 1024x576".to_owned())
}

#[cfg(test)]
mod tests {
    use super::parse_lora;

    #[test]
    fn a_lora_is_a_name_with_or_without_a_scale() {
        for (text, name, scale) in [
            ("pixel-art", "pixel-art", 1.0),
            ("pixel-art:0.8", "pixel-art", 0.8),
            ("sub/a.safetensors:-1", "sub/a.safetensors", -1.0),
            ("a:b", "a:b", 1.0),
            ("a:b:2", "a:b", 2.0),
            ("a:nan", "a:nan", 1.0),
        ] {
            let lora = parse_lora(text).unwrap();
            assert_eq!((lora.name.as_str(), lora.scale), (name, scale), "{text}");
        }
        assert!(parse_lora(":2").is_err());
        assert!(parse_lora("").is_err());
    }
}
