//! Models that are one `.safetensors` file, and LoRA files: found by name, described from the names in their header.
//!
//! Which tensors a file has tells its family, and that is all that is looked at here; reading it is the engine's job.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::folder::{Described, UNKNOWN, sorted};
use super::manifest::{self, Manifest, Written};
use super::{Error, Model, Source, Task, read_small};

/// Largest header that is read.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Sub-folders of a models folder in which other programs keep whole models.
const MODEL_FOLDERS: &[&str] = &["", "checkpoints", "Stable-diffusion"];
/// The same for LoRAs.
const LORA_FOLDERS: &[&str] = &["loras", "lora", "Lora", ""];

/// Whether `path` is a file that may hold weights.
pub(super) fn is_weights(path: &Path) -> bool {
    let ending = path.extension().unwrap_or_default();
    ending.eq_ignore_ascii_case("safetensors") && path.is_file()
}

/// The one-file model at `path`, with the manifest beside it, if there is one.
pub(super) fn describe(path: &Path) -> Result<Model, Error> {
    let manifest = path.with_extension("toml");
    let described = if manifest.is_file() {
        let written = manifest::parse(&manifest, &read_small(&manifest)?)?;
        Some((manifest, written))
    } else {
        None
    };
    describe_with(path, described)
}

fn describe_with(path: &Path, described: Option<Described>) -> Result<Model, Error> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let header = header(path)?;
    let defaults = defaults(&name, &header).ok_or_else(|| Error::NotAModel {
        folder: path.to_owned(),
        reason: "it is no whole model of Stable Diffusion 1, 2 or XL".to_owned(),
    })?;
    let (manifest, written) = described.unwrap_or_else(|| (path.to_owned(), Written::default()));
    let name = written.name.clone().unwrap_or(name);
    let manifest = manifest::complete(&manifest, written, defaults)?;
    Ok(Model {
        name,
        task: Task::TextToImage,
        folder: path.to_owned(),
        manifest,
        source: Source::Folder,
    })
}

/// The one-file model called `name` in a models folder, with or without its ending.
pub(super) fn named(dir: &Path, name: &str) -> Result<Option<Model>, Error> {
    match find(dir, MODEL_FOLDERS, name) {
        Some(path) => describe(&path).map(Some),
        None => Ok(None),
    }
}

/// Every one-file model of a models folder; other weights that lie there are passed over.
pub(super) fn in_models_dir(dir: &Path) -> Vec<Model> {
    let folders = MODEL_FOLDERS.iter().map(|folder| dir.join(folder));
    let files = folders.flat_map(|folder| sorted(&folder)).filter(|path| is_weights(path));
    files.filter_map(|path| describe(&path).ok()).collect()
}

/// The LoRA called `name` in one of the models folders.
pub(super) fn lora(dirs: &[PathBuf], name: &str) -> Option<PathBuf> {
    dirs.iter().find_map(|dir| find(dir, LORA_FOLDERS, name))
}

fn find(dir: &Path, folders: &[&str], name: &str) -> Option<PathBuf> {
    folders.iter().find_map(|folder| {
        let folder = dir.join(folder);
        let candidates = [folder.join(name), folder.join(format!("{name}.safetensors"))];
        candidates.into_iter().find(|path| is_weights(path))
    })
}

/// Names and shapes of the file's tensors.
fn header(path: &Path) -> Result<Map<String, Value>, Error> {
    let unreadable = |source| Error::Unreadable { path: path.to_owned(), source };
    let malformed = |message: String| Error::Malformed { path: path.to_owned(), message };
    let mut file = File::open(path).map_err(unreadable)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(unreadable)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(malformed("no header of a safetensors file".to_owned()));
    }
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes).map_err(unreadable)?;
    serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))
}

/// What the family says; `None` for a file that is no whole model.
fn defaults(name: &str, header: &Map<String, Value>) -> Option<Manifest> {
    if !header.contains_key("model.diffusion_model.input_blocks.0.0.weight") {
        return None;
    }
    let any = |prefix: &str| header.keys().any(|name| name.starts_with(prefix));
    let (family, side, multiple) = if any("conditioner.embedders.1.model.") {
        ("stable-diffusion-xl", 1024, 32)
    } else if any("cond_stage_model.model.") {
        ("stable-diffusion-2", 768, 64)
    } else if any("cond_stage_model.") {
        ("stable-diffusion-1", 512, 64)
    } else {
        return None;
    };
    let (min_side, max_side) = manifest::side_range((side, side), multiple);
    Some(Manifest {
        title: name.to_owned(),
        family: family.to_owned(),
        licence: UNKNOWN.to_owned(),
        source: UNKNOWN.to_owned(),
        native_width: side,
        native_height: side,
        multiple,
        min_side,
        max_side,
        steps: 30,
        guidance: if side == 1024 { 5.0 } else { 7.5 },
        sampler: None,
        negative: None,
        memory_mb: None,
        video: None,
    })
}
