//! What the library cannot do, and what the user may do about it.

use std::io;
use std::path::{Path, PathBuf};

use super::Task;
use super::manifest::is_repo;

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
    /// One that can be pulled, and was not.
    #[error("the model `{name}` is not on this machine")]
    NotPulled {
        /// What was asked for.
        name: String,
        /// Under which its weights are.
        licence: String,
    },
    /// No LoRA of that name here.
    #[error("no LoRA `{name}`")]
    UnknownLora {
        /// What was asked for.
        name: String,
        /// Folders that were searched.
        searched: Vec<PathBuf>,
    },
    /// No VAE of that name here.
    #[error("no VAE `{name}`")]
    UnknownVae {
        /// What was asked for.
        name: String,
        /// Folders that were searched.
        searched: Vec<PathBuf>,
    },
    /// Several files of that bare name.
    #[error("`{name}` means several files: {}", listed(&paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>()))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// Names that mean one of them each.
        names: Vec<String>,
        /// The files.
        paths: Vec<PathBuf>,
    },
    /// An import under a name that is taken.
    #[error("the name `{name}` is taken by `{}`", path.display())]
    Taken {
        /// The name.
        name: String,
        /// What has it.
        path: PathBuf,
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
    #[error("`{}` holds a `{class}`, supported are: {}", folder.display(), super::folder::CLASSES.join(", "))]
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
    /// No room to write a file.
    #[error("disk full while writing `{}`: {source}", path.display())]
    DiskFull {
        /// What was written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that cannot be written.
    #[error("cannot write `{}`: {source}", path.display())]
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
            Self::Unknown { near, .. } if !near.is_empty() => Some(format!("did you mean {}?", either(near))),
            Self::NotPulled { name, licence } => {
                Some(format!("`genvideo models pull {name}` fetches it ({licence})"))
            }
            Self::Unknown { name, searched, .. } if is_repo(name) => Some(format!(
                "`genvideo models pull {name}` fetches it, if the hub has it; searched were {}",
                folders(searched)
            )),
            Self::Unknown { searched, .. } => Some(format!(
                "put the model's diffusers folder into one of {}, or give the absolute path of its folder",
                folders(searched),
            )),
            Self::UnknownLora { searched, .. } => Some(put_below("loras", searched)),
            Self::UnknownVae { searched, .. } => Some(put_below("vae", searched)),
            Self::Ambiguous { names, .. } => Some(format!("say which: {}", either(names))),
            Self::Taken { name, .. } => Some(format!(
                "choose another with `--name`, or `genvideo models remove {name}` first"
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

/// What it means that `path` could not be written.
pub(super) fn writing(path: &Path, source: io::Error) -> Error {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    let path = path.to_owned();
    match source.kind() {
        StorageFull | QuotaExceeded => Error::DiskFull { path, source },
        _ => Error::Unwritable { path, source },
    }
}

/// Where a file of another program's kind belongs.
fn put_below(name: &str, searched: &[PathBuf]) -> String {
    match searched {
        [] => format!("set a models folder, and put the file into `{name}` below it"),
        searched => format!("put the file into `{name}` below one of {}", folders(searched)),
    }
}

fn folders(searched: &[PathBuf]) -> String {
    searched.iter().map(|folder| quoted(&folder.display())).collect::<Vec<_>>().join(", ")
}

fn either(names: &[String]) -> String {
    names.iter().map(quoted).collect::<Vec<_>>().join(" or ")
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    names.iter().map(quoted).collect::<Vec<_>>().join(", ")
}

fn quoted(name: &(impl std::fmt::Display + ?Sized)) -> String {
    format!("`{name}`")
}
