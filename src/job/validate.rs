//! [`JobInput`] -> [`ValidJob`], or every fault with its value and what is allowed.
//!
//! Only checks that need no machine: whether a model or an image is really there is found out by `render`.
//! A [`ValidJob`] written as JSON reads and validates to itself.

use std::ops::RangeInclusive;

use serde_json::Value;

use super::class::{ErrorClass, Fault};
use super::fields::{self, shown};
use super::style;
use super::{JobInput, JobType, Lora, ValidJob};

/// Bytes of a request.
pub const MAX_REQUEST_BYTES: usize = 256 * 1024;
/// Bytes of a prompt, and of a negative prompt.
pub const MAX_PROMPT_BYTES: usize = 8 * 1024;
/// Bytes of a user id.
pub const MAX_USER_ID_BYTES: usize = 128;
/// Bytes of the metadata, written compactly.
pub const MAX_METADATA_BYTES: usize = 64 * 1024;
/// Objects and lists within each other in the metadata, itself included.
pub const MAX_METADATA_DEPTH: usize = 16;
/// Entries of `loras`.
pub const MAX_LORAS: usize = 8;
/// Bytes of the name of a model or a LoRA.
pub const MAX_NAME_BYTES: usize = 256;
/// Pixels of a side; sides are even because mp4 players expect it.
pub const SIDES: RangeInclusive<u32> = 64..=2048;
/// Seconds.
pub const DURATIONS: RangeInclusive<f64> = 0.1..=60.0;
/// Denoise steps.
pub const STEPS: RangeInclusive<u32> = 1..=150;
/// Guidance scale.
pub const GUIDANCE: RangeInclusive<f64> = 0.0..=30.0;
/// Frames per second.
pub const FPS: RangeInclusive<f64> = 1.0..=60.0;
/// Motion bucket.
pub const MOTION: RangeInclusive<u32> = 1..=255;
/// Noise augmentation.
pub const NOISE_AUG: RangeInclusive<f64> = 0.0..=1.0;
/// Images of a job.
pub const BATCH: RangeInclusive<u32> = 1..=8;
/// Layers left out at the end of the text encoder, counted as A1111 does.
pub const CLIP_SKIP: RangeInclusive<u32> = 0..=12;
/// Turns of waiting jobs.
pub const PRIORITY: RangeInclusive<u32> = 1..=5;
/// Scale of a LoRA.
pub const LORA_SCALE: RangeInclusive<f64> = -4.0..=4.0;
/// Samplers by name.
pub const SAMPLERS: &[&str] = &[
    "ddim",
    "euler",
    "euler_karras",
    "euler_a",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "unipc",
    "unipc_karras",
    "pndm",
    "lcm",
];
/// What other programs call some of them, once case, spaces and plus signs are evened out.
const SAMPLER_ALIASES: &[(&str, &str)] = &[
    ("euler_ancestral", "euler_a"),
    ("uni_pc", "unipc"),
    ("uni_pc_karras", "unipc_karras"),
    ("plms", "pndm"),
];

/// Checks a request whose types are right.
///
/// # Errors
/// Every fault, in the order of the contract.
pub fn validate(mut input: JobInput) -> Result<ValidJob, Vec<Fault>> {
    input.prompt = with_plain_newlines(input.prompt);
    input.negative_prompt = input.negative_prompt.map(with_plain_newlines);
    input.sampler = input.sampler.map(with_our_name);
    input.image = input.image.map(|id| if is_id(&id) { id.to_ascii_lowercase() } else { id });
    let mut check = Check { faults: Vec::new() };
    check.prompt("prompt", &input.prompt);
    if input.prompt.trim().is_empty() {
        check.got(ErrorClass::InvalidPrompt, "prompt", "nothing but white space");
    }
    check.style(&input.style);
    check.side("width", input.width);
    check.side("height", input.height);
    check.range("duration", Some(input.duration), &DURATIONS);
    check.user_id(&input.user_id);
    check.metadata(&input.metadata);
    check.prompt("negative_prompt", input.negative_prompt.as_deref().unwrap_or_default());
    check.range("steps", input.steps, &STEPS);
    check.range("guidance", input.guidance, &GUIDANCE);
    check.sampler(input.sampler.as_deref());
    check.model("image_model", input.image_model.as_deref());
    check.model("video_model", input.video_model.as_deref());
    check.range("fps", input.fps, &FPS);
    check.range("motion", input.motion, &MOTION);
    check.range("noise_aug", input.noise_aug, &NOISE_AUG);
    check.image(input.image.as_deref());
    check.strength(&input);
    check.batch(&input);
    check.range("clip_skip", input.clip_skip, &CLIP_SKIP);
    check.model("vae", input.vae.as_deref());
    check.loras(&input.loras);
    check.range("priority", input.priority, &PRIORITY);
    if check.faults.is_empty() { Ok(ValidJob(input)) } else { Err(check.faults) }
}

/// One text that names every field, its value and what is allowed.
pub fn summary(faults: &[Fault]) -> String {
    let line = |fault: &Fault| match fault.field.as_str() {
        "" => fault.message.clone(),
        field => format!("`{field}`: {}", fault.message),
    };
    faults.iter().map(line).collect::<Vec<_>>().join("; ")
}

/// The class a whole refusal goes by: that of its first fault.
pub fn class(faults: &[Fault]) -> ErrorClass {
    faults.first().map_or(ErrorClass::Bug, |fault| fault.class)
}

/// Line ends of other systems become newlines, the only ones a prompt may hold.
fn with_plain_newlines(text: String) -> String {
    if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text }
}

/// `DPM++ 2M Karras` becomes `dpmpp_2m_karras`; a name of no sampler stays as it is.
fn with_our_name(sampler: String) -> String {
    let even = sampler.trim().to_lowercase().replace("++", "pp").replace([' ', '-'], "_");
    let alias = SAMPLER_ALIASES.iter().find(|(alias, _)| *alias == even).map(|(_, name)| *name);
    let ours = alias.or_else(|| SAMPLERS.iter().copied().find(|name| *name == even));
    ours.map_or(sampler, str::to_owned)
}

/// Whether `text` has the form of an image's id: 64 hex digits.
pub fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// An address of any kind: scheme, path, share, protocol of a media library.
fn is_address(text: &str) -> bool {
    text.is_empty() || text.contains([':', '/', '\\', '|'])
}

/// Containers within each other, `value` included.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Gathers faults.
struct Check {
    faults: Vec<Fault>,
}

impl Check {
    fn got(&mut self, class: ErrorClass, field: &str, got: &str) {
        let message = format!("got {got}, wanted {}", fields::wanted(field));
        self.faults.push(Fault::new(class, field, message));
    }

    fn range<T: PartialOrd + std::fmt::Debug>(
        &mut self,
        field: &str,
        value: Option<T>,
        allowed: &RangeInclusive<T>,
    ) {
        if let Some(value) = value.filter(|value| !allowed.contains(value)) {
            self.got(ErrorClass::OutOfRange, field, &format!("`{value:?}`"));
        }
    }

    fn side(&mut self, field: &str, side: u32) {
        if SIDES.contains(&side) && side % 2 == 1 {
            let got = format!("`{side}`, `{}` is the nearest allowed", side - 1);
            self.got(ErrorClass::OutOfRange, field, &got);
        } else {
            self.range(field, Some(side), &SIDES);
        }
    }

    fn prompt(&mut self, field: &str, text: &str) {
        if text.len() > MAX_PROMPT_BYTES {
            self.got(ErrorClass::TooLarge, field, &format!("{} bytes", text.len()));
        }
        let bad = text.char_indices().find(|(_, c)| c.is_control() && !matches!(c, '\n' | '\t'));
        if let Some((at, c)) = bad {
            let got = format!("the control character U+{:04X} at byte {at}", u32::from(c));
            self.got(ErrorClass::InvalidPrompt, field, &got);
        }
    }

    fn style(&mut self, name: &str) {
        if style::find(name).is_none() {
            let known: Vec<String> =
                style::all().iter().map(|style| format!("`{}`", style.name)).collect();
            let message = format!("got {}, wanted one of {}", shown(name), known.join(", "));
            self.faults.push(Fault::new(ErrorClass::UnknownStyle, "style", message));
        }
    }

    fn user_id(&mut self, id: &str) {
        let got = if id.trim().is_empty() {
            Some("an empty one".to_owned())
        } else if id.len() > MAX_USER_ID_BYTES {
            Some(format!("{} bytes", id.len()))
        } else {
            let separates = |c: char| c.is_control() || "/\\%\u{2028}\u{2029}".contains(c);
            let dots = id.bytes().all(|byte| byte == b'.');
            (dots || id.contains(separates)).then(|| shown(id))
        };
        if let Some(got) = got {
            self.got(ErrorClass::InvalidUserId, "user_id", &got);
        }
    }

    fn metadata(&mut self, map: &serde_json::Map<String, Value>) {
        let deepest = 1 + map.values().map(depth).max().unwrap_or(0);
        if deepest > MAX_METADATA_DEPTH {
            self.got(ErrorClass::TooDeep, "metadata", &format!("{deepest} levels"));
            return;
        }
        let written = serde_json::to_vec(map).map_or(usize::MAX, |bytes| bytes.len());
        if written > MAX_METADATA_BYTES {
            self.got(ErrorClass::TooLarge, "metadata", &format!("{written} bytes"));
        }
    }

    fn sampler(&mut self, name: Option<&str>) {
        if let Some(name) = name.filter(|name| !SAMPLERS.contains(name)) {
            self.got(ErrorClass::OutOfRange, "sampler", &shown(name));
        }
    }

    /// The name of a model or LoRA file: something to look up, never something to fetch.
    fn model(&mut self, field: &str, name: Option<&str>) {
        let Some(name) = name else { return };
        if name.contains("://") || name.starts_with("data:") || name.starts_with("//") {
            self.got(ErrorClass::UrlRefused, field, &format!("the address {}", shown(name)));
        } else if name.trim().is_empty() || name.len() > MAX_NAME_BYTES {
            self.got(ErrorClass::OutOfRange, field, &format!("{} bytes", name.len()));
        } else if name.contains(char::is_control) {
            self.got(ErrorClass::OutOfRange, field, &shown(name));
        }
    }

    /// The name of a file that lies nowhere but under the models folders.
    fn file(&mut self, field: &str, name: Option<&str>) {
        let before = self.faults.len();
        self.model(field, name);
        let Some(name) = name.filter(|_| self.faults.len() == before) else { return };
        let leaves = name.split('/').any(|part| part.is_empty() || part == "..");
        if leaves || name.contains('\\') {
            self.got(ErrorClass::PathEscape, field, &shown(name));
        }
    }

    fn strength(&mut self, input: &JobInput) {
        let Some(strength) = input.strength else { return };
        if !(strength > 0.0 && strength <= 1.0) {
            self.got(ErrorClass::OutOfRange, "strength", &format!("`{strength:?}`"));
        } else if input.image.is_none() {
            self.got(ErrorClass::MissingField, "strength", &format!("`{strength:?}` alone"));
        }
    }

    fn batch(&mut self, input: &JobInput) {
        if input.job_type == JobType::Video && input.batch.is_some_and(|batch| batch > 1) {
            let got = format!("`{}` for a video", input.batch.unwrap_or_default());
            self.got(ErrorClass::OutOfRange, "batch", &got);
        } else {
            self.range("batch", input.batch, &BATCH);
        }
    }

    fn image(&mut self, id: Option<&str>) {
        let Some(id) = id.filter(|id| !is_id(id)) else { return };
        if is_address(id) {
            self.got(ErrorClass::UrlRefused, "image", &format!("the address {}", shown(id)));
        } else {
            self.got(ErrorClass::OutOfRange, "image", &shown(id));
        }
    }

    fn loras(&mut self, loras: &[Lora]) {
        if loras.len() > MAX_LORAS {
            self.got(ErrorClass::OutOfRange, "loras", &format!("{} entries", loras.len()));
            return;
        }
        for (index, lora) in loras.iter().enumerate() {
            self.file(&format!("loras[{index}].name"), Some(&lora.name));
            self.range(&format!("loras[{index}].scale"), Some(lora.scale), &LORA_SCALE);
        }
    }
}
