//! Models in the diffusers layout: found in models folders and in the Hugging Face cache, described from their configs.
//!
//! `model_index.json` names the pipeline; the configs of the UNet and the VAE give sizes; what they do not say comes
//! from the family. Weights are not opened here.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::lock::Lock;
use super::manifest::{self, Manifest, UNKNOWN, Written};
use super::{Error, Model, Source, Task, known, read_small};

/// The pipelines that can be described.
pub(super) const CLASSES: [&str; 3] =
    ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableVideoDiffusionPipeline"];

/// Where the configs of a model come from.
pub(super) trait Configs {
    /// The text of `name`, for example `unet/config.json`; `None` when there is no such file.
    fn read(&self, name: &str) -> Result<Option<String>, Error>;
}

impl Configs for Path {
    fn read(&self, name: &str) -> Result<Option<String>, Error> {
        let path = self.join(name);
        if path.is_file() { read_small(&path).map(Some) } else { Ok(None) }
    }
}

/// A manifest with its path.
pub(super) type Described = (PathBuf, Written);

/// The model in `folder`, with the manifest that lies in it, if one does.
pub(super) fn describe(folder: &Path, source: Source) -> Result<Model, Error> {
    let name = folder
        .file_name()
        .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    describe_configs(folder, folder, &name, own_manifest(folder)?, source)
}

/// As [`describe`], from configs that need not lie in `folder` yet.
pub(super) fn describe_configs(
    configs: &(impl Configs + ?Sized),
    folder: &Path,
    name: &str,
    described: Option<Described>,
    source: Source,
) -> Result<Model, Error> {
    let index = read_json(configs, folder, "model_index.json")?;
    let (class, task) = class_of(&index, folder)?;
    let unet = read_json(configs, folder, "unet/config.json")?;
    let vae = read_json(configs, folder, "vae/config.json")?;
    let defaults = defaults(name, class, &unet, &vae);
    let (path, written) =
        described.unwrap_or_else(|| (folder.join("model_index.json"), Written::default()));
    if let Some(wanted) = written.task.filter(|&written| written != task) {
        let (value, allowed) =
            (format!("`{wanted}`"), format!("`{task}`: the folder holds a {class}"));
        return Err(Error::OutOfRange { path, field: "task", value, allowed });
    }
    let name = written.name.clone().unwrap_or_else(|| name.to_owned());
    let manifest = manifest::complete(&path, written, defaults)?;
    Ok(Model { name, task, folder: folder.to_owned(), manifest, source })
}

/// The pipeline that a `model_index.json` names, and what it does.
fn class_of<'a>(index: &'a Value, folder: &Path) -> Result<(&'a str, Task), Error> {
    let class = index.get("_class_name").and_then(Value::as_str).unwrap_or_default();
    match class {
        "StableDiffusionPipeline" | "StableDiffusionXLPipeline" => Ok((class, Task::TextToImage)),
        "StableVideoDiffusionPipeline" => Ok((class, Task::ImageToVideo)),
        _ => Err(Error::Unsupported {
            folder: folder.to_owned(),
            class: class.escape_debug().to_string(),
        }),
    }
}

/// Refuses the `model_index.json` at `path`, of the repository `repo`, when nobody here can run its pipeline.
pub(super) fn check_class(path: &Path, repo: &str) -> Result<(), Error> {
    let index = serde_json::from_str(&read_small(path)?).map_err(|error| Error::Malformed {
        path: Path::new(repo).join("model_index.json"),
        message: error.to_string(),
    })?;
    class_of(&index, Path::new(repo)).map(drop)
}

/// The model called `name` in a models folder: by the name of its manifest file, of its folder, or in its manifest.
pub(super) fn named(dir: &Path, name: &str) -> Result<Option<Model>, Error> {
    let manifest = dir.join(format!("{name}.toml"));
    if manifest.is_file() && !file_beside(&manifest) {
        return of_manifest(dir, &manifest, name).map(Some);
    }
    let folder = dir.join(name);
    if folder.join("model_index.json").is_file() {
        return describe_configs(&*folder, &folder, name, own_manifest(&folder)?, Source::Folder)
            .map(Some);
    }
    let mut models = in_models_dir(dir).into_iter().filter_map(|(_, model)| model.ok());
    Ok(models.find(|model| model.name == name))
}

/// Every manifest and model folder of a models folder, by path, with its model or what is wrong with it.
pub(super) fn in_models_dir(dir: &Path) -> Vec<(PathBuf, Result<Model, Error>)> {
    let (mut found, mut taken) = (Vec::new(), HashSet::new());
    let paths = sorted(dir);
    let manifests = paths.iter().filter(|path| {
        path.extension().is_some_and(|ending| ending == "toml") && !file_beside(path)
    });
    for path in manifests {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let model = of_manifest(dir, path, &stem);
        taken
            .insert(model.as_ref().map_or_else(|_| dir.join(&*stem), |model| model.folder.clone()));
        found.push((path.clone(), model));
    }
    for path in paths.iter().filter(|path| path.is_dir()) {
        // `<models>/<org>/<repo>` is how download tools lay models out.
        let folders = if is_model(path) { vec![path.clone()] } else { sorted(path) };
        let folders = folders.iter().filter(|folder| is_model(folder) && !taken.contains(*folder));
        found.extend(folders.map(|folder| (folder.clone(), of_folder(dir, folder))));
    }
    found
}

/// Every supported model of the Hugging Face cache; whatever else lies there is passed over.
pub(super) fn in_hf_cache(hub: &Path) -> Vec<Model> {
    sorted(hub)
        .iter()
        .filter_map(|path| path.file_name()?.to_str()?.strip_prefix("models--"))
        .map(|repo| repo.replacen("--", "/", 1))
        .filter_map(|name| in_hf_cache_named(hub, &name).ok().flatten())
        .collect()
}

/// The model `org/repo` of the Hugging Face cache at the revision that was pulled, else at the one that `main` names;
/// one that is known goes by its name here.
pub(super) fn in_hf_cache_named(hub: &Path, name: &str) -> Result<Option<Model>, Error> {
    let known = known::named(name);
    let repo = known.as_ref().map_or(name, |known| &known.upstream.repo);
    let Some(snapshot) = snapshot(&repo_folder(hub, repo))? else { return Ok(None) };
    if let Some(known) = known {
        let described = known::described(known.name);
        let source = Source::HfCache;
        return describe_configs(&*snapshot, &snapshot, known.name, described, source).map(Some);
    }
    let model = describe(&snapshot, Source::HfCache)?;
    let mut manifest = model.manifest;
    if manifest.source == UNKNOWN {
        manifest.source = name.to_owned();
        manifest.title = name.to_owned();
    }
    Ok(Some(Model { name: name.to_owned(), manifest, ..model }))
}

/// The folder of a repository in the Hugging Face cache.
pub(super) fn repo_folder(hub: &Path, repo: &str) -> PathBuf {
    hub.join(format!("models--{}", repo.replace('/', "--")))
}

/// The snapshot that was pulled, the one `refs/main` names, or the only one there is.
pub(super) fn snapshot(repo: &Path) -> Result<Option<PathBuf>, Error> {
    let pulled = Lock::read(&Lock::of_repo(repo))?;
    let main = repo.join("refs").join("main");
    let revision = match pulled.and_then(|lock| lock.commit) {
        Some(commit) => commit,
        None if main.is_file() => read_small(&main)?.trim().to_owned(),
        None => {
            let mut snapshots = sorted(&repo.join("snapshots"));
            return Ok(if snapshots.len() == 1 { snapshots.pop() } else { None });
        }
    };
    let plain = revision
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    if !plain || !manifest::is_confined(Path::new(&revision)) {
        return Err(Error::PathEscape { path: revision.escape_debug().to_string() });
    }
    let folder = repo.join("snapshots").join(revision);
    Ok(folder.is_dir().then_some(folder))
}

/// Whether a manifest is that of the one-file model beside it.
fn file_beside(manifest: &Path) -> bool {
    manifest.with_extension("safetensors").is_file() && !manifest.with_extension("").is_dir()
}

fn of_manifest(dir: &Path, path: &Path, stem: &str) -> Result<Model, Error> {
    let written = manifest::parse(path, &read_small(path)?)?;
    let folder = dir.join(written.folder.as_deref().unwrap_or(Path::new(stem)));
    describe_configs(&*folder, &folder, stem, Some((path.to_owned(), written)), Source::Folder)
}

/// A folder goes by its path under the models folder, unless its own manifest names it.
fn of_folder(dir: &Path, folder: &Path) -> Result<Model, Error> {
    let name = folder.strip_prefix(dir).unwrap_or(folder).to_string_lossy();
    describe_configs(folder, folder, &name, own_manifest(folder)?, Source::Folder)
}

/// The manifest `genvideo.toml` that lies in the model's folder.
fn own_manifest(folder: &Path) -> Result<Option<Described>, Error> {
    let path = folder.join("genvideo.toml");
    if !path.is_file() {
        return Ok(None);
    }
    let written = manifest::parse(&path, &read_small(&path)?)?;
    Ok(Some((path, written)))
}

fn is_model(folder: &Path) -> bool {
    folder.join("model_index.json").is_file()
}

/// Paths in a folder by name but hidden ones; none when it cannot be read.
pub(super) fn sorted(folder: &Path) -> Vec<PathBuf> {
    let hidden = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
    };
    let mut paths = entries(folder);
    paths.retain(|path| !hidden(path));
    paths
}

/// As [`sorted`], those with a dot before their name among them.
pub(super) fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    paths.sort();
    paths
}

fn read_json(configs: &(impl Configs + ?Sized), folder: &Path, name: &str) -> Result<Value, Error> {
    let text = configs.read(name)?.ok_or_else(|| Error::NotAModel {
        folder: folder.to_owned(),
        reason: format!("it has no `{name}`"),
    })?;
    serde_json::from_str(&text)
        .map_err(|error| Error::Malformed { path: folder.join(name), message: error.to_string() })
}

/// What the configs and the family say.
fn defaults(name: &str, class: &str, unet: &Value, vae: &Value) -> Manifest {
    let vae_blocks = vae.get("block_out_channels").and_then(Value::as_array).map_or(4, Vec::len);
    let unet_blocks = unet.get("down_block_types").and_then(Value::as_array).map_or(4, Vec::len);
    let factor = power_of_two(vae_blocks);
    let multiple = factor * power_of_two(unet_blocks);
    let native = native_size(class, unet, factor, multiple);
    let manifest = manifest::of_family(name, family(class, unet), native, multiple);
    let frames = unet.get("num_frames").and_then(Value::as_u64);
    let frames = frames.and_then(|frames| u32::try_from(frames).ok()).unwrap_or(14);
    Manifest { video: manifest.video.map(|_| manifest::video_of(frames)), ..manifest }
}

fn family(class: &str, unet: &Value) -> &'static str {
    let width = unet.get("cross_attention_dim").and_then(Value::as_u64);
    match (class, width) {
        ("StableVideoDiffusionPipeline", _) => "stable-video-diffusion",
        ("StableDiffusionXLPipeline", _) => "stable-diffusion-xl",
        (_, Some(768)) => "stable-diffusion-1",
        (_, Some(1024)) => "stable-diffusion-2",
        _ => "stable-diffusion",
    }
}

/// Stable Video Diffusion was trained at 1024x576, while its config carries the 768 of the model it grew from.
fn native_size(class: &str, unet: &Value, factor: u32, multiple: u32) -> (u32, u32) {
    let latent = |value: &Value| value.as_u64().and_then(|side| u32::try_from(side).ok());
    let (width, height) = match unet.get("sample_size") {
        Some(Value::Array(sides)) if sides.len() == 2 => (latent(&sides[1]), latent(&sides[0])),
        Some(side) => (latent(side), latent(side)),
        None => (None, None),
    };
    let pixels = |side: Option<u32>| {
        side.unwrap_or(64).saturating_mul(factor).min(8192) / multiple * multiple
    };
    match (pixels(width).max(multiple), pixels(height).max(multiple)) {
        (768, 768) if class == "StableVideoDiffusionPipeline" => (1024, 576),
        size => size,
    }
}

/// Two to the number of halvings between `blocks` levels, within reason.
fn power_of_two(blocks: usize) -> u32 {
    1 << blocks.saturating_sub(1).min(6)
}
