//! `models/<name>.toml`: what is known about a model, and the defaults of a job that uses it.
//!
//! A manifest may leave out whatever its family's defaults say well. Unknown keys, wrong types and values out of range
//! are refused with the file and the field.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, Task};

/// What is known about a model; every default is filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// One line for people.
    pub title: String,
    /// `stable-diffusion-1`, `stable-diffusion-2`, `stable-diffusion-xl`, `stable-diffusion`, `stable-video-diffusion`.
    pub family: String,
    /// Licence of the weights, as far as it is known.
    pub licence: String,
    /// Where the weights come from, as far as it is known.
    pub source: String,
    /// Width the model was trained at.
    pub native_width: u32,
    /// Height the model was trained at.
    pub native_height: u32,
    /// Both sides must be a multiple of this.
    pub multiple: u32,
    /// Shortest side it works at.
    pub min_side: u32,
    /// Longest side it works at.
    pub max_side: u32,
    /// Denoise steps.
    pub steps: u32,
    /// Classifier-free guidance of a text-to-image model.
    pub guidance: f64,
    /// Sampler; `None` is what the model's scheduler_config.json says.
    pub sampler: Option<String>,
    /// Negative prompt that every job gets.
    pub negative: Option<String>,
    /// Memory a run needs, as far as it is known.
    pub memory_mb: Option<u32>,
    /// What only image-to-video models have.
    pub video: Option<VideoManifest>,
    /// Where its files can be fetched from.
    pub upstream: Option<Upstream>,
}

/// A repository on the hub that a model can be fetched from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// `organisation/name`.
    pub repo: String,
    /// Branch, tag or commit; the commit that a pull finds there is written down.
    #[serde(default = "main_branch")]
    pub revision: String,
    /// `fp16` where the repository has files of half the size beside the plain ones.
    pub variant: Option<String>,
    /// Whether its page asks to log in and accept terms first.
    #[serde(default)]
    pub gated: bool,
    /// The files a run needs; `*` stands for anything but `/`.
    #[serde(default = "files_of_any")]
    pub files: Vec<String>,
}

/// Folders of a pipeline that a run needs; what else a repository has, a safety checker or other formats, stays there.
const PARTS: &[&str] = &[
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
    "image_encoder",
    "feature_extractor",
    "unet",
    "vae",
];

impl Upstream {
    /// A repository nothing is known about.
    pub fn unknown(repo: &str) -> Self {
        Self {
            repo: repo.to_owned(),
            revision: main_branch(),
            variant: None,
            gated: false,
            files: files_of_any(),
        }
    }

    /// Refuses what no hub has and what would lead out of the cache.
    pub fn check(&self) -> Result<(), Error> {
        Check(Path::new(&self.repo)).upstream(self)
    }
}

fn main_branch() -> String {
    "main".to_owned()
}

/// Configs, tokenizers and safetensors of every part that any pipeline has.
fn files_of_any() -> Vec<String> {
    let parts = PARTS
        .iter()
        .flat_map(|part| ["json", "txt", "safetensors"].map(|ending| format!("{part}/*.{ending}")));
    std::iter::once("model_index.json".to_owned()).chain(parts).collect()
}

/// Defaults of an image-to-video model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VideoManifest {
    /// Frames of one run.
    pub frames: u32,
    /// Frame rate the model is told.
    pub model_fps: u32,
    /// Pace at which its frames are played.
    pub native_fps: f64,
    /// Motion bucket, 1..=255.
    pub motion: u32,
    /// Strength of the noise on the conditioning image.
    pub noise_aug: f64,
    /// Guidance of the first frame.
    pub min_guidance: f64,
    /// Guidance of the last frame.
    pub max_guidance: f64,
    /// Frames decoded at once.
    pub decode_chunk: u32,
    /// Most runs that are chained for one job.
    pub max_runs: u32,
}

/// The file as written: everything may be left out.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Written {
    pub(super) name: Option<String>,
    pub(super) folder: Option<PathBuf>,
    pub(super) task: Option<Task>,
    title: Option<String>,
    pub(super) family: Option<String>,
    licence: Option<String>,
    source: Option<String>,
    native_width: Option<u32>,
    native_height: Option<u32>,
    multiple: Option<u32>,
    min_side: Option<u32>,
    max_side: Option<u32>,
    steps: Option<u32>,
    guidance: Option<f64>,
    sampler: Option<String>,
    negative: Option<String>,
    memory_mb: Option<u32>,
    video: Option<WrittenVideo>,
    upstream: Option<Upstream>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenVideo {
    frames: Option<u32>,
    model_fps: Option<u32>,
    native_fps: Option<f64>,
    motion: Option<u32>,
    noise_aug: Option<f64>,
    min_guidance: Option<f64>,
    max_guidance: Option<f64>,
    decode_chunk: Option<u32>,
    max_runs: Option<u32>,
}

/// Reads manifest text; `path` is for errors only. Refuses names and folders that lead elsewhere.
pub(super) fn parse(path: &Path, text: &str) -> Result<Written, Error> {
    let written: Written = toml::from_str(text).map_err(|error| Error::Malformed {
        path: path.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })?;
    if let Some(name) = &written.name
        && !is_name(name)
    {
        return Err(Error::OutOfRange {
            path: path.to_owned(),
            field: "name",
            value: format!("`{}`", name.escape_debug()),
            allowed: "1..=128 letters, digits, `.`, `-`, `_` and `/` between them".to_owned(),
        });
    }
    if let Some(folder) = &written.folder
        && !is_confined(folder)
    {
        return Err(Error::PathEscape { path: folder.display().to_string() });
    }
    Ok(written)
}

/// Lays what is written over the defaults of the family and checks every range.
pub(super) fn complete(
    path: &Path,
    written: Written,
    defaults: Manifest,
) -> Result<Manifest, Error> {
    if written.video.is_some() && defaults.video.is_none() {
        let (value, allowed) = ("set".to_owned(), "nothing: the model makes images".to_owned());
        return Err(Error::OutOfRange { path: path.to_owned(), field: "video", value, allowed });
    }
    let video =
        defaults.video.map(|video| complete_video(written.video.unwrap_or_default(), video));
    let native = (written.native_width, written.native_height);
    let native =
        (native.0.unwrap_or(defaults.native_width), native.1.unwrap_or(defaults.native_height));
    let multiple = written.multiple.unwrap_or(defaults.multiple);
    let (min_side, max_side) = side_range(native, multiple);
    let manifest = Manifest {
        title: written.title.unwrap_or(defaults.title),
        family: written.family.unwrap_or(defaults.family),
        licence: written.licence.unwrap_or(defaults.licence),
        source: written.source.unwrap_or(defaults.source),
        native_width: native.0,
        native_height: native.1,
        multiple,
        min_side: written.min_side.unwrap_or(min_side),
        max_side: written.max_side.unwrap_or(max_side),
        steps: written.steps.unwrap_or(defaults.steps),
        guidance: written.guidance.unwrap_or(defaults.guidance),
        sampler: written.sampler.or(defaults.sampler),
        negative: written.negative.or(defaults.negative),
        memory_mb: written.memory_mb.or(defaults.memory_mb),
        video,
        upstream: written.upstream.or(defaults.upstream),
    };
    check(path, &manifest)?;
    Ok(manifest)
}

fn complete_video(written: WrittenVideo, defaults: VideoManifest) -> VideoManifest {
    let frames = written.frames.unwrap_or(defaults.frames);
    let native_fps = written.native_fps.unwrap_or(defaults.native_fps);
    VideoManifest {
        frames,
        model_fps: written.model_fps.unwrap_or(defaults.model_fps),
        native_fps,
        motion: written.motion.unwrap_or(defaults.motion),
        noise_aug: written.noise_aug.unwrap_or(defaults.noise_aug),
        min_guidance: written.min_guidance.unwrap_or(defaults.min_guidance),
        max_guidance: written.max_guidance.unwrap_or(defaults.max_guidance),
        decode_chunk: written.decode_chunk.unwrap_or(defaults.decode_chunk.min(frames)),
        max_runs: written.max_runs.unwrap_or_else(|| runs_of_a_minute(frames, native_fps)),
    }
}

/// Licence and source of a model that does not say.
pub(super) const UNKNOWN: &str = "unknown";

/// What a family says about a model of the size `native`.
pub(super) fn of_family(name: &str, family: &str, native: (u32, u32), multiple: u32) -> Manifest {
    let (min_side, max_side) = side_range(native, multiple);
    let (steps, guidance) = match family {
        "stable-video-diffusion" => (25, 1.0),
        "stable-diffusion-xl" => (30, 5.0),
        _ => (30, 7.5),
    };
    Manifest {
        title: name.to_owned(),
        family: family.to_owned(),
        licence: UNKNOWN.to_owned(),
        source: UNKNOWN.to_owned(),
        native_width: native.0,
        native_height: native.1,
        multiple,
        min_side,
        max_side,
        steps,
        guidance,
        sampler: None,
        negative: None,
        memory_mb: None,
        video: (family == "stable-video-diffusion").then(|| video_of(14)),
        upstream: None,
    }
}

/// What Stable Video Diffusion says about a model of so many frames.
pub(super) fn video_of(frames: u32) -> VideoManifest {
    VideoManifest {
        frames,
        model_fps: 7,
        native_fps: 7.0,
        motion: 127,
        noise_aug: 0.02,
        min_guidance: 1.0,
        max_guidance: 3.0,
        decode_chunk: 8.min(frames),
        max_runs: runs_of_a_minute(frames, 7.0),
    }
}

/// Sides a model is trusted with when nobody says: from half its shorter native side to twice its longer one.
pub(super) fn side_range(native: (u32, u32), multiple: u32) -> (u32, u32) {
    let multiple = multiple.max(1);
    let shortest = native.0.min(native.1) / 2;
    let longest = native.0.max(native.1).saturating_mul(2);
    (shortest.div_ceil(multiple).max(1) * multiple, longest / multiple * multiple)
}

/// Runs that the longest job needs, 60 seconds: each but the first starts with the last frame of the one before.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a ratio clamped to 1..=1000"
)]
pub(super) fn runs_of_a_minute(frames: u32, native_fps: f64) -> u32 {
    let runs = (60.0 * native_fps / f64::from(frames.max(2) - 1)).ceil();
    runs.clamp(1.0, 1000.0) as u32
}

/// Reports the first value that is out of its range.
struct Check<'a>(&'a Path);

impl Check<'_> {
    fn whole(&self, field: &'static str, value: u32, low: u32, high: u32) -> Result<(), Error> {
        if (low..=high).contains(&value) {
            return Ok(());
        }
        Err(self.fault(field, value.to_string(), format!("{low}..={high}")))
    }

    fn real(&self, field: &'static str, value: f64, low: f64, high: f64) -> Result<(), Error> {
        if (low..=high).contains(&value) {
            return Ok(());
        }
        Err(self.fault(field, value.to_string(), format!("{low}..={high}")))
    }

    fn side(&self, field: &'static str, value: u32, multiple: u32) -> Result<(), Error> {
        self.whole(field, value, 8, 8192)?;
        if value.is_multiple_of(multiple) {
            return Ok(());
        }
        Err(self.fault(field, value.to_string(), format!("a multiple of {multiple}")))
    }

    fn upstream(&self, upstream: &Upstream) -> Result<(), Error> {
        let text = |field, value: &str, fine: bool, allowed: &str| {
            if fine {
                return Ok(());
            }
            let value = format!("`{}`", value.escape_debug());
            Err(self.fault(field, value, allowed.to_owned()))
        };
        let Upstream { repo, revision, variant, files, .. } = upstream;
        text("upstream.repo", repo, is_repo(repo), "`organisation/name`")?;
        text("upstream.revision", revision, is_name(revision), "a branch, a tag or a commit")?;
        let variant = variant.as_deref().unwrap_or("fp16");
        text("upstream.variant", variant, !variant.contains('/') && is_name(variant), "a word")?;
        let stray = files.iter().find(|file| !is_confined(Path::new(file)));
        let stray = stray.map_or("", String::as_str);
        text("upstream.files", stray, stray.is_empty(), "paths inside the repository")
    }

    fn fault(&self, field: &'static str, value: String, allowed: String) -> Error {
        Error::OutOfRange { path: self.0.to_owned(), field, value, allowed }
    }
}

fn check(path: &Path, manifest: &Manifest) -> Result<(), Error> {
    let check = Check(path);
    check.whole("multiple", manifest.multiple, 1, 512)?;
    check.side("min_side", manifest.min_side, manifest.multiple)?;
    check.side("max_side", manifest.max_side, manifest.multiple)?;
    for (field, side) in
        [("native_width", manifest.native_width), ("native_height", manifest.native_height)]
    {
        check.side(field, side, manifest.multiple)?;
        check.whole(field, side, manifest.min_side, manifest.max_side)?;
    }
    check.whole("steps", manifest.steps, 1, 1000)?;
    check.real("guidance", manifest.guidance, 0.0, 100.0)?;
    if let Some(memory) = manifest.memory_mb {
        check.whole("memory_mb", memory, 1, 1 << 20)?;
    }
    if let Some(upstream) = &manifest.upstream {
        check.upstream(upstream)?;
    }
    let Some(video) = &manifest.video else { return Ok(()) };
    check.whole("video.frames", video.frames, 2, 1000)?;
    check.whole("video.model_fps", video.model_fps, 1, 120)?;
    check.real("video.native_fps", video.native_fps, 0.1, 120.0)?;
    check.whole("video.motion", video.motion, 1, 255)?;
    check.real("video.noise_aug", video.noise_aug, 0.0, 1.0)?;
    check.real("video.min_guidance", video.min_guidance, 0.0, 100.0)?;
    check.real("video.max_guidance", video.max_guidance, 0.0, 100.0)?;
    check.whole("video.decode_chunk", video.decode_chunk, 1, video.frames)?;
    check.whole("video.max_runs", video.max_runs, 1, 1000)
}

/// A relative path of plain names.
pub(super) fn is_confined(path: &Path) -> bool {
    path.components().count() > 0
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// A commit's hash, as git writes it.
pub(super) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// `organisation/name`, as repositories on the hub are called.
pub fn is_repo(name: &str) -> bool {
    name.split('/').count() == 2 && name.is_ascii() && is_name(name)
}

pub(super) fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | '/');
    (1..=128).contains(&name.len()) && name.chars().all(fits) && is_confined(Path::new(name))
}
