//! Folders of other programs, read in place: the trees of ComfyUI and A1111, and `extra_model_paths.yaml`.
//!
//! Here it is decided which folders hold whole models, LoRAs and VAEs, and which file a name means; what a file is,
//! `file` says. Files in nested folders go by their path below such a folder, and by their bare name when only one
//! has it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use yaml_rust2::{Yaml, YamlLoader};

use super::file::is_weights;
use super::folder::sorted;
use super::{Broken, Error, read_small, shown};

/// The file by which ComfyUI users name further folders.
const EXTRA: &str = "extra_model_paths.yaml";
/// Folders within folders that are looked into.
const DEEPEST: u32 = 8;

/// What a weights file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A whole model.
    Model,
    /// Changes to the weights of a model.
    Lora,
    /// An image decoder that takes the place of a model's own.
    Vae,
}

impl Kind {
    /// Sub-folders of a models folder, by the names of ComfyUI, then of A1111.
    fn folders(self) -> &'static [&'static str] {
        match self {
            Self::Model => &["checkpoints", "Stable-diffusion", "diffusion_models", "unet"],
            Self::Lora => &["loras", "lora", "Lora", "LyCORIS"],
            Self::Vae => &["vae", "VAE"],
        }
    }

    /// The kind that a key of `extra_model_paths.yaml` stands for.
    fn of_key(key: &str) -> Option<Self> {
        let kinds = [Self::Model, Self::Lora, Self::Vae];
        kinds.into_iter().find(|kind| kind.folders().contains(&key))
    }
}

/// A folder with files of one kind.
struct Place {
    folder: PathBuf,
    /// Whether the folders in it count.
    deep: bool,
}

/// Every folder that is looked into, as the disk is now.
pub(super) struct Trees {
    /// Models folders, those of other programs among them.
    pub(super) dirs: Vec<PathBuf>,
    /// Files that name folders and cannot be read.
    pub(super) broken: Vec<Broken>,
    extra: Vec<(Kind, PathBuf)>,
}

impl Trees {
    /// The trees of `models_dirs`, and what the files of the format `extra_model_paths.yaml` name: those of that name
    /// in a models folder, and `files`.
    pub(super) fn read(models_dirs: &[PathBuf], files: &[PathBuf]) -> Self {
        let mut trees = Self { dirs: Vec::new(), broken: Vec::new(), extra: Vec::new() };
        for dir in models_dirs {
            trees.dirs.push(dir.clone());
            // The root of ComfyUI or A1111.
            let inner = dir.join("models");
            if Kind::Model.folders().iter().any(|name| inner.join(name).is_dir()) {
                trees.dirs.push(inner);
            }
        }
        let found = models_dirs.iter().map(|dir| dir.join(EXTRA)).filter(|path| path.is_file());
        for path in found.chain(files.iter().cloned()) {
            if let Err(error) = trees.take(&path) {
                trees.broken.push(Broken { path, error });
            }
        }
        trees
    }

    /// Takes the folders that one file names; sections marked `is_default` first.
    fn take(&mut self, path: &Path) -> Result<(), Error> {
        let malformed =
            |message: &str| Error::Malformed { path: path.to_owned(), message: message.to_owned() };
        let documents = YamlLoader::load_from_str(&read_small(path)?)
            .map_err(|error| malformed(&error.to_string()))?;
        let Some(document) = documents.first() else { return Ok(()) };
        let sections = document.as_hash().ok_or_else(|| malformed("no sections in it"))?;
        let (first, then): (Vec<_>, Vec<_>) = sections
            .iter()
            .filter(|(_, section)| !section.is_null())
            .partition(|(_, section)| section["is_default"].as_bool() == Some(true));
        for (name, section) in first.into_iter().chain(then) {
            let keys = section.as_hash().ok_or_else(|| {
                malformed(&format!("`{}` is no section", name.as_str().unwrap_or("?")))
            })?;
            let beside = path.parent().unwrap_or(Path::new("/"));
            let base = section["base_path"].as_str().map_or(beside.into(), |base| at(beside, base));
            for (key, value) in keys {
                let key = key.as_str().unwrap_or_default();
                let folders = listed(value).map(|folder| at(&base, folder));
                match Kind::of_key(key) {
                    Some(kind) => self.extra.extend(folders.map(|folder| (kind, folder))),
                    None if key == "diffusers" => self.dirs.extend(folders),
                    None => {}
                }
            }
        }
        Ok(())
    }

    /// Every weights file of a kind with its name, in the order in which they are found.
    pub(super) fn files(&self, kind: Kind) -> Vec<(String, PathBuf)> {
        let mut found = Vec::new();
        for place in self.places(kind) {
            walk(&place.folder, "", if place.deep { DEEPEST } else { 0 }, &mut found);
        }
        found
    }

    /// The file of a kind that `name` means, with or without its ending: at that path below a folder, else the only
    /// one of that bare name.
    pub(super) fn find(&self, kind: Kind, name: &str) -> Result<Option<PathBuf>, Error> {
        for place in self.places(kind) {
            let candidates =
                [place.folder.join(name), place.folder.join(format!("{name}.safetensors"))];
            if let Some(path) = candidates.into_iter().find(|path| is_weights(path)) {
                return Ok(Some(path));
            }
        }
        // A second file of one name is hidden by the first, and one file may be reached by two ways.
        let (mut names, mut files) = (HashSet::new(), HashSet::new());
        let bare = |(path_name, path): &(String, PathBuf)| {
            let last = path_name.rsplit('/').next();
            let file = path.file_name().and_then(|file| file.to_str());
            (last == Some(name) || file == Some(name))
                && names.insert(path_name.clone())
                && files.insert(path.canonicalize().unwrap_or_else(|_| path.clone()))
        };
        let mut found: Vec<_> = self.files(kind).into_iter().filter(bare).collect();
        match found.len() {
            0 | 1 => Ok(found.pop().map(|(_, path)| path)),
            _ => {
                let (names, paths) = found.into_iter().unzip();
                Err(Error::Ambiguous { name: shown(name), names, paths })
            }
        }
    }

    fn places(&self, kind: Kind) -> Vec<Place> {
        let mut places = Vec::new();
        for dir in &self.dirs {
            let flat = Place { folder: dir.clone(), deep: false };
            let deep =
                kind.folders().iter().map(|name| Place { folder: dir.join(name), deep: true });
            if kind == Kind::Model {
                places.push(flat);
                places.extend(deep);
            } else {
                places.extend(deep);
                places.push(flat);
            }
        }
        let extra = self.extra.iter().filter(|(of, _)| *of == kind);
        places.extend(extra.map(|(_, folder)| Place { folder: folder.clone(), deep: true }));
        places
    }
}

/// Weights files in `folder`, and in folders of it down to `depth`; folders in the diffusers layout are models of
/// their own.
fn walk(folder: &Path, above: &str, depth: u32, found: &mut Vec<(String, PathBuf)>) {
    for path in sorted(folder) {
        if is_weights(&path) {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            found.push((format!("{above}{stem}"), path));
        } else if depth > 0 && path.is_dir() && !path.join("model_index.json").is_file() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            walk(&path, &format!("{above}{name}/"), depth - 1, found);
        }
    }
}

/// One path, or several on lines of their own.
fn listed(value: &Yaml) -> impl Iterator<Item = &str> {
    value.as_str().unwrap_or_default().lines().map(str::trim).filter(|line| !line.is_empty())
}

/// `path` below `base`, unless it is absolute or starts at home.
fn at(base: &Path, path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => base.join(path),
    }
}
