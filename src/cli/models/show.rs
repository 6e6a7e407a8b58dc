//! `genvideo models show`: everything that is known about one model.

use serde::Serialize;

use super::super::failure::Failure;
use super::super::output::Output;
use super::super::session;
use super::{flag, whereabouts};
use crate::config::Config;
use crate::hub::pull::size;
use crate::hub::{Lock, Manifest, Task, Upstream, VideoManifest, known};

/// Flags of `show`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The model's name
    #[arg(value_name = "NAME")]
    name: String,
}

#[derive(Serialize)]
struct Shown {
    name: String,
    state: &'static str,
    task: Task,
    #[serde(skip_serializing_if = "Option::is_none")]
    folder: Option<std::path::PathBuf>,
    manifest: Manifest,
    #[serde(skip_serializing_if = "Option::is_none")]
    lock: Option<Lock>,
}

/// Prints the model's manifest and, when it was pulled or imported, its files.
pub(super) fn show(args: &Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let library = session::library(config);
    let shown = match (library.get(&args.name)?, known::named(&args.name)) {
        (Some(model), _) => Shown {
            state: whereabouts(&model),
            task: model.task,
            lock: library.installed(&model.name).ok().flatten().and_then(|found| found.lock),
            name: model.name,
            folder: Some(model.folder),
            manifest: model.manifest,
        },
        (None, Some(known)) => Shown {
            name: known.name.to_owned(),
            state: "not pulled",
            task: known.task,
            folder: None,
            manifest: known.manifest,
            lock: None,
        },
        (None, None) => return Err(missing(&library, &args.name)),
    };
    output.object(&shown);
    output.line(&format!("{}: {}", shown.name, shown.manifest.title));
    row("state", shown.state, output);
    if let Some(folder) = &shown.folder {
        row("in", &folder.display().to_string(), output);
    }
    row("used by", &format!("{} {}", flag(shown.task), shown.name), output);
    manifest(&shown.manifest, output);
    if let Some(upstream) = &shown.manifest.upstream {
        self::upstream(upstream, output);
    }
    if let Some(lock) = &shown.lock {
        self::lock(lock, output);
    }
    if shown.folder.is_none() {
        row("to fetch it", &format!("genvideo models pull {}", shown.name), output);
    }
    Ok(())
}

/// The failure for a name that no model has; it tells which names there are.
pub(super) fn missing(library: &crate::hub::Library, name: &str) -> Failure {
    let task = known::named(name).map_or(Task::TextToImage, |known| known.task);
    match library.find(name, task) {
        Err(error) => error.into(),
        Ok(_) => Failure::usage(format!("`{name}` came while it was looked for")),
    }
}

fn manifest(manifest: &Manifest, output: &mut Output) {
    let Manifest { native_width, native_height, multiple, min_side, max_side, .. } = manifest;
    let sides = format!("sides of {min_side} to {max_side}, multiples of {multiple}");
    row("family", &manifest.family, output);
    row("licence", &manifest.licence, output);
    row("source", &manifest.source, output);
    row("size", &format!("{native_width}x{native_height}; {sides}"), output);
    row("steps", &manifest.steps.to_string(), output);
    row("sampler", manifest.sampler.as_deref().unwrap_or("the model's own"), output);
    match &manifest.video {
        None => row("guidance", &manifest.guidance.to_string(), output),
        Some(video) => self::video(video, output),
    }
    if let Some(negative) = &manifest.negative {
        row("negative", negative, output);
    }
    if let Some(memory) = manifest.memory_mb {
        row("memory", &format!("about {memory} MB in half precision"), output);
    }
}

fn video(video: &VideoManifest, output: &mut Output) {
    let VideoManifest { frames, model_fps, native_fps, min_guidance, max_guidance, .. } = video;
    row(
        "guidance",
        &format!("{min_guidance} for the first frame to {max_guidance} for the last"),
        output,
    );
    row("frames", &format!("{frames} a run, played at {native_fps} per second"), output);
    row("told rate", &format!("{model_fps} frames per second"), output);
    row("motion", &format!("{}, noise on the picture {}", video.motion, video.noise_aug), output);
    row(
        "decoded",
        &format!("{} frames at once; at most {} runs a job", video.decode_chunk, video.max_runs),
        output,
    );
}

fn upstream(upstream: &Upstream, output: &mut Output) {
    let Upstream { repo, revision, variant, gated, files } = upstream;
    let variant =
        variant.as_ref().map_or(String::new(), |variant| format!(", {variant} where there is one"));
    row("repository", &format!("{repo}, revision {revision}{variant}"), output);
    if *gated {
        row("gated", "log in there and accept its terms first, and set HF_TOKEN", output);
    }
    row("files", &files.join(" "), output);
}

fn lock(lock: &Lock, output: &mut Output) {
    if let Some(commit) = &lock.commit {
        row("commit", commit, output);
    }
    let bytes = lock.files.iter().map(|file| file.bytes).sum();
    row(
        "came from",
        &format!("{}, {} files, {}", lock.source, lock.files.len(), size(bytes)),
        output,
    );
    for file in &lock.files {
        let path = if file.path.is_empty() { "." } else { &file.path };
        output.line(&format!("    {}  {:>9}  {path}", file.sha256, size(file.bytes)));
    }
}

fn row(name: &str, value: &str, output: &mut Output) {
    output.line(&format!("  {name:<11}  {value}"));
}
