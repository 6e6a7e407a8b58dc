//! From a model's name to its files on this machine. No network: what is not here is refused, with what is.
//!
//! A name is looked up among the models folders (a manifest `<name>.toml`, else a diffusers folder of that name), the
//! pair built into the program, the Hugging Face cache (`org/repo`), and as an absolute path. Reading the weights is
//! the engine's job. Start from [`Library`].

pub mod manifest;

mod embedded;
mod file;
mod folder;
mod near;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use manifest::{Manifest, VideoManifest};

/// Why there is no such model, or why its description is unusable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing of that name here.
    #[error("no {task} model `{name}`; known: {}", listed(known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// For which task.
        task: Task,
        /// Every name that would have done.
        known: Vec<String>,
        /// Those of them that look like what was asked for.
        near: Vec<String>,
        /// Folders that were searched.
        searched: Vec<PathBuf>,
    },
    /// No LoRA of that name here.
    #[error("no LoRA `{name}`")]
    UnknownLora {
        /// What was asked for.
        name: String,
        /// Folders that were searched.
        searched: Vec<PathBuf>,
    },
    /// There is one, for the other task.
    #[error("`{name}` is a model for {found}, one for {wanted} is needed")]
    WrongTask {
        /// What was asked for.
        name: String,
        /// What it does.
        found: Task,
        /// What it should do.
        wanted: Task,
    },
    /// A name or a manifest that leads out of its folder.
    #[error("`{path}` leads out of the models folder")]
    PathEscape {
        /// The name, or the manifest's `folder`.
        path: String,
    },
    /// A folder that holds no model in the diffusers layout.
    #[error("`{}` is not a model folder: {reason}", folder.display())]
    NotAModel {
        /// The folder.
        folder: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// A pipeline that nobody here can run.
    #[error("`{}` holds a `{class}`, supported are: {}", folder.display(), folder::CLASSES.join(", "))]
    Unsupported {
        /// The folder.
        folder: PathBuf,
        /// `_class_name` of its model_index.json.
        class: String,
    },
    /// A manifest or a config that does not parse.
    #[error("cannot read `{}`: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and why.
        message: String,
    },
    /// A value outside its range.
    #[error("`{field}` in `{}` is {value}, allowed is {allowed}", path.display())]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// For example `video.frames`.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        allowed: String,
    },
    /// A file or folder that cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No room to unpack the built-in models.
    #[error("disk full while unpacking the built-in models into `{}`: {source}", path.display())]
    DiskFull {
        /// What was written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The built-in models cannot be unpacked.
    #[error("cannot unpack the built-in models into `{}`: {source}", path.display())]
    Unwritable {
        /// What was to be written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// What the user may do about it, when there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown { near, .. } if !near.is_empty() => Some(format!(
                "did you mean {}?",
                near.iter().map(quoted).collect::<Vec<_>>().join(" or ")
            )),
            Self::Unknown { searched, .. } => Some(format!(
                "put the model's diffusers folder into one of {}, or give the absolute path of its folder",
                searched
                    .iter()
                    .map(|folder| quoted(&folder.display()))
                    .collect::<Vec<_>>()
                    .join(", "),
            )),
            Self::UnknownLora { searched, .. } if searched.is_empty() => {
                Some("set a models folder, and put the file into `loras` below it".to_owned())
            }
            Self::UnknownLora { searched, .. } => Some(format!(
                "put the file into `loras` below one of {}",
                searched
                    .iter()
                    .map(|folder| quoted(&folder.display()))
                    .collect::<Vec<_>>()
                    .join(", "),
            )),
            Self::WrongTask { wanted: Task::TextToImage, .. } => {
                Some("image-to-video models go into `video_model`".to_owned())
            }
            Self::WrongTask { wanted: Task::ImageToVideo, .. } => {
                Some("text-to-image models go into `image_model`".to_owned())
            }
            Self::PathEscape { .. } => {
                Some("give a plain name, or the absolute path of the model's folder".to_owned())
            }
            Self::NotAModel { .. } => {
                Some("a model is a folder with a `model_index.json` (diffusers layout) or one whole-model file".to_owned())
            }
            Self::DiskFull { .. } | Self::Unwritable { .. } => {
                Some("free some space there, or choose another cache folder".to_owned())
            }
            _ => None,
        }
    }
}

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
}

impl Library {
    /// The library of these folders; none of them needs to exist.
    pub fn open(places: Places) -> Self {
        Self { places: Arc::new(places) }
    }

    /// Every usable model, the built-in ones last. Unpacks nothing.
    pub fn list(&self) -> Vec<Model> {
        self.scan().0
    }

    /// Every usable model, and what looks like one but is not usable.
    pub fn scan(&self) -> (Vec<Model>, Vec<Broken>) {
        let (mut models, mut broken) = (Vec::new(), Vec::new());
        for dir in &self.places.models_dirs {
            for (path, found) in folder::in_models_dir(dir) {
                match found {
                    Ok(model) => models.push(model),
                    Err(error) => broken.push(Broken { path, error }),
                }
            }
            models.extend(file::in_models_dir(dir));
        }
        models.extend(folder::in_hf_cache(&self.places.hf_home));
        models.extend(embedded::all(&self.places.cache_dir));
        // Of two models of one name the first is the one that is found.
        let mut names = HashSet::new();
        models.retain(|model: &Model| names.insert(model.name.clone()));
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

    /// The LoRA file called `name`, with or without its ending, in `loras` or at the top of a models folder.
    pub fn find_lora(&self, name: &str) -> Result<PathBuf, Error> {
        let plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        if name.contains('\0') || !plain {
            return Err(Error::PathEscape { path: shown(name) });
        }
        let dirs = &self.places.models_dirs;
        file::lora(dirs, name)
            .ok_or_else(|| Error::UnknownLora { name: shown(name), searched: dirs.clone() })
    }

    /// The built-in model for `task`, unpacked.
    pub fn default(&self, task: Task) -> Result<Model, Error> {
        self.find(embedded::default_name(task), task)
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
                file::describe(path).map(Some)
            } else {
                Ok(None)
            };
        }
        if name.contains('\0')
            || path.components().any(|part| !matches!(part, Component::Normal(_)))
        {
            return Err(Error::PathEscape { path: shown(name) });
        }
        for dir in &self.places.models_dirs {
            if let Some(model) = folder::named(dir, name)? {
                return Ok(Some(model));
            }
            if let Some(model) = file::named(dir, name)? {
                return Ok(Some(model));
            }
        }
        if let Some(model) = embedded::named(&self.places.cache_dir, name) {
            return Ok(Some(model));
        }
        folder::in_hf_cache_named(&self.places.hf_home, name)
    }

    fn unknown(&self, name: &str, task: Task) -> Error {
        let known: Vec<String> = self
            .list()
            .into_iter()
            .filter(|model| model.task == task)
            .map(|model| model.name)
            .collect();
        let near = near::matches(name, &known);
        let mut searched = self.places.models_dirs.clone();
        searched.push(folder::hf_hub(&self.places.hf_home));
        Error::Unknown { name: shown(name), task, known, near, searched }
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    names.iter().map(quoted).collect::<Vec<_>>().join(", ")
}

/// A name as an error may show it: short, without control characters.
fn shown(name: &str) -> String {
    name.chars().take(200).flat_map(char::escape_debug).collect()
}

fn quoted(name: &(impl std::fmt::Display + ?Sized)) -> String {
    format!("`{name}`")
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
