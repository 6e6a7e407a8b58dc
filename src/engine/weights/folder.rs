//! The files of a model folder: which ones belong to a part, and that no link leads out of it.
//!
//! A link may point anywhere inside the model's own folder; of a Hugging Face cache the whole repository counts, since
//! its snapshots are links to its blobs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::engine::config::Json;
use crate::engine::{Error, Result};

/// File names of a component, best first. `fp16` variants come last: they hold less than the plain ones.
const FILE_NAMES: &[&str] = &[
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
];

/// Folders of a pipeline that are read.
const PARTS: &[&str] = &[
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "unet",
    "vae",
    "scheduler",
    "image_encoder",
    "feature_extractor",
];

/// The weight files of all parts of the model in `folder`.
pub(super) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let parts = ["text_encoder", "text_encoder_2", "image_encoder", "unet", "vae"];
    let parts = parts.map(|part| folder.join(part)).into_iter().filter(|part| part.is_dir());
    let files = parts.map(|part| component_files(&part)).collect::<Result<Vec<_>>>()?;
    Ok(files.into_iter().flatten().collect())
}

/// What else is read of the model in `folder`: the texts of its parts and its own index.
pub(super) fn settings_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model_index.json");
    let mut files: Vec<PathBuf> = Some(index).filter(|path| path.is_file()).into_iter().collect();
    for part in PARTS.iter().map(|part| folder.join(part)).filter(|part| part.is_dir()) {
        let unreadable = |source| Error::Io { path: part.clone(), source };
        for entry in fs::read_dir(&part).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            let kind = path.extension().and_then(|extension| extension.to_str());
            if matches!(kind, Some("json" | "txt" | "model")) && path.is_file() {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// The weight files of the component in `folder`.
pub(super) fn component_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let Some(path) = FILE_NAMES.iter().map(|name| folder.join(name)).find(|path| path.is_file())
    else {
        for name in ["diffusion_pytorch_model.bin", "pytorch_model.bin"] {
            let path = folder.join(name);
            if path.is_file() {
                let what = "a pickle, which can run code: wanted a safetensors file".into();
                return Err(Error::WeightsUnsupported { path, what });
            }
        }
        return Err(Error::Missing {
            path: folder.to_path_buf(),
            wanted: format!("`{}` or `{}`", FILE_NAMES[0], FILE_NAMES[2]),
        });
    };
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        return Ok(vec![path]);
    }
    let json = Json::read(&path)?;
    let mut names = BTreeSet::new();
    for (tensor, file) in json.object("weight_map")? {
        let Some(name) = file.as_str() else {
            return Err(Error::ConfigSyntax {
                path,
                problem: format!("`weight_map.{}` is not a file name", super::shown(tensor)),
            });
        };
        if !is_plain_name(name) {
            return Err(Error::PathEscape { path: PathBuf::from(super::shown(name)) });
        }
        if !name.ends_with(".safetensors") {
            let what = "no safetensors file".into();
            return Err(Error::WeightsUnsupported { path: folder.join(name), what });
        }
        names.insert(name.to_string());
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// A name that stays in its folder.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['/', '\\', '\0']) && !name.starts_with('.')
}

/// Refuses a model folder in which something to be read is a link to elsewhere, a device or a pipe.
pub(in crate::engine) fn check_links(folder: &Path) -> Result<()> {
    let root = resolve(folder, None)?;
    let root = repository(&root).unwrap_or(&root).to_path_buf();
    check_files(folder, &root)?;
    for part in PARTS {
        let path = folder.join(part);
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(Error::Io { path, source }),
            Ok(_) => {}
        }
        if resolve(&path, Some(&root))?.is_dir() {
            check_files(&path, &root)?;
        }
    }
    Ok(())
}

/// The repository that the snapshot `root` of a Hugging Face cache belongs to.
fn repository(root: &Path) -> Option<&Path> {
    let snapshots = root.parent().filter(|path| path.ends_with("snapshots"))?;
    let name = snapshots.parent()?.file_name()?.to_str()?;
    if name.starts_with("models--") { snapshots.parent() } else { None }
}

/// Every file in `folder` that a loader may open is a regular file below `root`.
fn check_files(folder: &Path, root: &Path) -> Result<()> {
    let io = |source| Error::Io { path: folder.to_path_buf(), source };
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let ending = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        if !["json", "txt", "safetensors"].contains(&ending.as_str()) {
            continue;
        }
        let real = resolve(&path, Some(root))?;
        let metadata = fs::metadata(&real).map_err(io)?;
        if !metadata.is_file() && !metadata.is_dir() {
            return Err(Error::PathEscape { path });
        }
    }
    Ok(())
}

/// Where `path` leads; an error unless that is below `root`.
fn resolve(path: &Path, root: Option<&Path>) -> Result<PathBuf> {
    let real = path.canonicalize().map_err(|error| Error::Missing {
        path: path.to_path_buf(),
        wanted: format!("a file or folder ({error})"),
    })?;
    match root {
        Some(root) if !real.starts_with(root) => {
            Err(Error::PathEscape { path: path.to_path_buf() })
        }
        _ => Ok(real),
    }
}
