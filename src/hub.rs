//! From a model's name to its files on this machine. No network but in [`mod@pull`]: what is not here is refused, with
//! what is.
//!
//! A name is looked up among the models folders (a manifest `<name>.toml`, else a diffusers folder of that name, else
//! a file, those in the trees of ComfyUI and A1111 among them), the pair built into the program, the Hugging Face
//! cache (`org/repo`), and as an absolute path. Reading the weights is the engine's job. Start from [`Library`].

pub mod import;
pub mod installed;
pub mod known;
pub mod manifest;
pub mod pull;

mod digest;
mod embedded;
mod error;
mod file;
mod folder;
mod lock;
mod near;
mod pull_error;
mod remote;
mod trees;
mod wanted;

use std::collections::HashSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use error::Error;
pub use lock::{Lock, Locked};
pub use manifest::{Manifest, Upstream, VideoManifest};
use trees::{Kind, Trees};

/// What a model does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// A prompt becomes an image.
    TextToImage,
    /// An image becomes frames.
    ImageToVideo,
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TextToImage => "text-to-image",
            Self::ImageToVideo => "image-to-video",
        })
    }
}

/// Where a model was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// Part of the program, unpacked into the cache folder on first use.
    Embedded,
    /// A folder of the user's.
    Folder,
    /// The Hugging Face cache.
    HfCache,
}

/// A model that is on this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// What it is called here.
    pub name: String,
    /// What it does.
    pub task: Task,
    /// Its diffusers folder, or its one file.
    pub folder: PathBuf,
    /// What is known about it, and its defaults.
    pub manifest: Manifest,
    /// Where it was found.
    pub source: Source,
}

impl Model {
    /// The part of the manifest that image-to-video models have.
    pub fn video(&self) -> Result<&VideoManifest, Error> {
        self.manifest.video.as_ref().ok_or_else(|| Error::WrongTask {
            name: self.name.clone(),
            found: self.task,
            wanted: Task::ImageToVideo,
        })
    }
}

/// The folders a library looks into.
#[derive(Clone, Debug)]
pub struct Places {
    /// The user's models folders, first one first.
    pub models_dirs: Vec<PathBuf>,
    /// Where the built-in pair is unpacked, under `models/`.
    pub cache_dir: PathBuf,
    /// `HF_HOME`: the Hugging Face cache is its `hub/`.
    pub hf_home: PathBuf,
}

/// What else a library reads, beside its [`Places`].
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// `HF_HUB_CACHE`, when it is not the `hub` of [`Places::hf_home`].
    pub hf_cache: Option<PathBuf>,
    /// Files in the format of ComfyUI's `extra_model_paths.yaml`; those in models folders are found anyway.
    pub extra_model_paths: Vec<PathBuf>,
}

/// A folder or manifest that looks like a model but cannot be used.
#[derive(Debug)]
pub struct Broken {
    /// Its manifest or folder.
    pub path: PathBuf,
    /// What is wrong.
    pub error: Error,
}

/// All models of this machine by name. Looks at the disk at each call, so a model put there later is found.
#[derive(Clone, Debug)]
pub struct Library {
    places: Arc<Places>,
    extras: Arc<Extras>,
}

impl Library {
    /// The library of these folders; none of them needs to exist.
    pub fn open(places: Places) -> Self {
        Self::open_with(places, Extras::default())
    }

    /// The same with more to read.
    pub fn open_with(places: Places, extras: Extras) -> Self {
        Self { places: Arc::new(places), extras: Arc::new(extras) }
    }

    /// Where what can be made again is kept.
    pub fn cache_dir(&self) -> &Path {
        &self.places.cache_dir
    }

    /// Every usable model, the built-in ones last. Unpacks nothing.
    pub fn list(&self) -> Vec<Model> {
        self.scan().0
    }

    /// Every usable model, and what looks like one but is not usable.
    pub fn scan(&self) -> (Vec<Model>, Vec<Broken>) {
        let trees = self.trees();
        let mut models = Vec::new();
        let mut broken = Vec::new();
        for dir in &trees.dirs {
            for (path, found) in folder::in_models_dir(dir) {
                match found {
                    Ok(model) => models.push(model),
                    Err(error) => broken.push(Broken { path, error }),
                }
            }
        }
        // Other weights that lie there are passed over.
        let files = trees.files(Kind::Model).into_iter();
        models.extend(files.filter_map(|(name, path)| file::describe(&path, &name).ok()));
        models.extend(folder::in_hf_cache(&self.hf_cache()));
        models.extend(embedded::all(&self.places.cache_dir));
        // Of two models of one name the first is the one that is found; one that two names lead to counts once.
        let (mut names, mut paths) = (HashSet::new(), HashSet::new());
        models.retain(|model: &Model| {
            names.insert(model.name.clone())
                && paths
                    .insert(model.folder.canonicalize().unwrap_or_else(|_| model.folder.clone()))
        });
        broken.extend(trees.broken);
        (models, broken)
    }

    /// The model called `name` that does `task`; a built-in one is unpacked, once, and checked.
    pub fn find(&self, name: &str, task: Task) -> Result<Model, Error> {
        let model = match self.look_up(name)? {
            Some(model) => model,
            None => return Err(self.unknown(name, task)),
        };
        if model.task != task {
            return Err(Error::WrongTask {
                name: name.to_owned(),
                found: model.task,
                wanted: task,
            });
        }
        if model.source == Source::Embedded {
            embedded::unpack(&self.places.cache_dir, &model.name)?;
        }
        Ok(model)
    }

    /// The model called `name`, whatever it does; a built-in one is not unpacked. `None` when it is not here.
    pub fn get(&self, name: &str) -> Result<Option<Model>, Error> {
        self.look_up(name)
    }

    /// The LoRA file called `name`, with or without its ending, in `loras` or at the top of a models folder.
    pub fn find_lora(&self, name: &str) -> Result<PathBuf, Error> {
        confine(name)?;
        let trees = self.trees();
        let found = trees.find(Kind::Lora, name)?;
        found.ok_or_else(|| Error::UnknownLora { name: shown(name), searched: trees.dirs })
    }

    /// The VAE file called `name`, with or without its ending, in `vae` or at the top of a models folder, or at that
    /// absolute path.
    pub fn find_vae(&self, name: &str) -> Result<PathBuf, Error> {
        let path = Path::new(name);
        if path.is_absolute() && file::is_weights(path) {
            return Ok(path.to_owned());
        }
        let trees = self.trees();
        let unknown = |searched| Error::UnknownVae { name: shown(name), searched };
        if path.is_absolute() {
            return Err(unknown(trees.dirs));
        }
        confine(name)?;
        let found = trees.find(Kind::Vae, name)?;
        found.ok_or_else(|| unknown(trees.dirs))
    }

    /// The built-in model for `task`, unpacked.
    pub fn default(&self, task: Task) -> Result<Model, Error> {
        self.find(embedded::default_name(task), task)
    }

    /// How many files the built-in model `name` has.
    pub fn built_in_files(&self, name: &str) -> usize {
        embedded::files_of(name)
    }

    /// The Hugging Face cache: where a pull puts models.
    pub fn hf_cache(&self) -> PathBuf {
        self.extras.hf_cache.clone().unwrap_or_else(|| self.places.hf_home.join("hub"))
    }

    /// The first models folder: where an import puts models.
    pub fn import_dir(&self) -> Option<&Path> {
        self.places.models_dirs.first().map(PathBuf::as_path)
    }

    fn trees(&self) -> Trees {
        Trees::read(&self.places.models_dirs, &self.extras.extra_model_paths)
    }

    fn look_up(&self, name: &str) -> Result<Option<Model>, Error> {
        let path = Path::new(name);
        if name.is_empty() {
            return Ok(None);
        }
        if path.is_absolute() {
            return if path.is_dir() {
                folder::describe(path, Source::Folder).map(Some)
            } else if file::is_weights(path) {
                file::describe(path, &file::stem(path)).map(Some)
            } else {
                Ok(None)
            };
        }
        confine(name)?;
        let trees = self.trees();
        for dir in &trees.dirs {
            if let Some(model) = folder::named(dir, name)? {
                return Ok(Some(model));
            }
        }
        if let Some(path) = trees.find(Kind::Model, name)? {
            let name = name.strip_suffix(".safetensors").unwrap_or(name);
            return file::describe(&path, name).map(Some);
        }
        if let Some(model) = embedded::named(&self.places.cache_dir, name) {
            return Ok(Some(model));
        }
        if let Some(model) = folder::in_hf_cache_named(&self.hf_cache(), name)? {
            return Ok(Some(model));
        }
        // Nothing of that name; perhaps for want of a file that would have named its folder.
        trees.broken.into_iter().next().map_or(Ok(None), |broken| Err(broken.error))
    }

    fn unknown(&self, name: &str, task: Task) -> Error {
        if let Some(known) = known::named(name) {
            if known.task != task {
                return Error::WrongTask { name: shown(name), found: known.task, wanted: task };
            }
            return Error::NotPulled { name: shown(name), licence: known.manifest.licence };
        }
        let known: Vec<String> = self
            .list()
            .into_iter()
            .filter(|model| model.task == task)
            .map(|model| model.name)
            .collect();
        let near = near::matches(name, &known);
        let mut searched = self.places.models_dirs.clone();
        searched.push(self.hf_cache());
        Error::Unknown { name: shown(name), task, known, near, searched }
    }
}

/// Refuses a name that leads out of the folder it is looked for in.
fn confine(name: &str) -> Result<(), Error> {
    let plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    if name.contains('\0') || !plain {
        return Err(Error::PathEscape { path: shown(name) });
    }
    Ok(())
}

/// A name as an error may show it: short, without control characters.
fn shown(name: &str) -> String {
    name.chars().take(200).flat_map(char::escape_debug).collect()
}

/// Reads a small text file: configs and manifests are at most 1 MiB.
fn read_small(path: &Path) -> Result<String, Error> {
    const LIMIT: u64 = 1 << 20;
    let unreadable = |source| Error::Unreadable { path: path.to_owned(), source };
    let length = fs::metadata(path).map_err(unreadable)?.len();
    if length > LIMIT {
        let message = format!("it has {length} bytes, at most {LIMIT} are read");
        return Err(Error::Malformed { path: path.to_owned(), message });
    }
    fs::read_to_string(path).map_err(unreadable)
}
