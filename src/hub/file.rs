//! Models that are one `.safetensors` file, described from the names in their header.
//!
//! Which tensors a file has tells its family, and that is all that is looked at here; reading it is the engine's job.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::manifest::{self, Manifest, Written};
use super::{Error, Model, Source, Task, read_small};

/// Largest header that is read.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Whether `path` is a file that may hold weights.
pub(super) fn is_weights(path: &Path) -> bool {
    let ending = path.extension().unwrap_or_default();
    ending.eq_ignore_ascii_case("safetensors") && path.is_file()
}

/// The one-file model at `path`, called `name` unless the manifest beside it, if there is one, says another.
pub(super) fn describe(path: &Path, name: &str) -> Result<Model, Error> {
    let manifest = path.with_extension("toml");
    let (manifest, written) = if manifest.is_file() {
        let written = manifest::parse(&manifest, &read_small(&manifest)?)?;
        (manifest, written)
    } else {
        (path.to_owned(), Written::default())
    };
    let header = header(path)?;
    let defaults = defaults(name, &header).ok_or_else(|| Error::NotAModel {
        folder: path.to_owned(),
        reason: "it is no whole model of Stable Diffusion 1, 2 or XL".to_owned(),
    })?;
    let name = written.name.clone().unwrap_or_else(|| name.to_owned());
    let manifest = manifest::complete(&manifest, written, defaults)?;
    Ok(Model {
        name,
        task: Task::TextToImage,
        folder: path.to_owned(),
        manifest,
        source: Source::Folder,
    })
}

/// The name of a file that nobody gave another.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
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
    Some(manifest::of_family(name, family, (side, side), multiple))
}
