//! Why a model could not be fetched, and what the user may do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user wants no network.
    #[error("nothing is fetched: {why}")]
    Offline {
        /// Which setting says so.
        why: String,
    },
    /// The model's page has terms that this account has not accepted.
    #[error("`{repo}` is gated: its page has terms to accept first")]
    Gated {
        /// The repository.
        repo: String,
        /// Its page.
        page: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The hub does not let this account in.
    #[error("the hub does not give `{repo}` to this account")]
    Unauthorized {
        /// The repository.
        repo: String,
        /// Its page.
        page: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// No such repository, or one that is not shown.
    #[error("the hub has no repository `{repo}`")]
    NoRepo {
        /// The repository.
        repo: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// No such branch, tag or commit.
    #[error("`{repo}` has no revision `{revision}`")]
    NoRevision {
        /// The repository.
        repo: String,
        /// What was asked for.
        revision: String,
        /// The branches and tags it has, as far as the hub says.
        known: Vec<String>,
    },
    /// A file that the repository listed and does not give.
    #[error("`{repo}` has no file `{file}`")]
    NoFile {
        /// The repository.
        repo: String,
        /// The file.
        file: String,
    },
    /// A part of the model that is there as a pickle alone.
    #[error("`{repo}` has nothing but pickles, which can run code, for: {}", files.join(", "))]
    OnlyPickles {
        /// The repository.
        repo: String,
        /// The pickles.
        files: Vec<String>,
    },
    /// Parts of the model without weights.
    #[error("`{repo}` has no safetensors weights that can be used in {}", parts.join(", "))]
    NoWeights {
        /// The repository.
        repo: String,
        /// The parts.
        parts: Vec<String>,
    },
    /// A repository of something else.
    #[error("`{repo}` holds no model in the diffusers layout with safetensors weights")]
    NotAModel {
        /// The repository.
        repo: String,
        /// Its files.
        has: Vec<String>,
    },
    /// Less room than the files need, seen beforehand.
    #[error("`{}` has {} free, {} are needed", folder.display(), size(*free), size(*needed))]
    NoSpace {
        /// Where the files would go.
        folder: PathBuf,
        /// Bytes still to come.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A file that is not what the hub said, and was removed.
    #[error("`{file}` is not what the hub says: its hash is {got}, wanted {wanted}")]
    Hash {
        /// The file.
        file: String,
        /// The hub's word.
        wanted: String,
        /// What it is.
        got: String,
    },
    /// The hub has too much to do, or is out of order.
    #[error("the hub answers with status {status}")]
    Busy {
        /// The HTTP status.
        status: u16,
    },
    /// No connection, or one that broke.
    #[error("the connection to the hub failed: {0}")]
    Connection(String),
    /// An answer that makes no sense.
    #[error("the hub's answer for `{what}` makes no sense: {why}")]
    Answer {
        /// What was asked.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// Of this machine's disk.
    #[error(transparent)]
    Local(#[from] super::Error),
}

impl Error {
    /// Whether the same request may succeed in a moment.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Connection(_) | Self::Busy { .. })
    }

    pub(super) fn writing(path: &Path, source: io::Error) -> Self {
        Self::Local(super::error::writing(path, source))
    }

    /// What the user may do about it, when there is something to say.
    pub fn hint(&self) -> Option<String> {
        const TOKEN: &str = "set HF_TOKEN to an access token of yours";
        Some(match self {
            Self::Offline { .. } => {
                "unset it to fetch, or `genvideo models import PATH`".to_owned()
            }
            Self::Gated { page, has_token: false, .. } => {
                format!("accept the terms at {page}, then {TOKEN}")
            }
            Self::Gated { page, .. } => {
                format!("accept the terms at {page} with the account that HF_TOKEN belongs to")
            }
            Self::Unauthorized { has_token: false, .. } | Self::NoRepo { has_token: false, .. } => {
                format!("check the name; if it is private, {TOKEN}")
            }
            Self::Unauthorized { page, .. } => {
                format!("see whether HF_TOKEN is still valid and may read {page}")
            }
            Self::NoRepo { .. } => {
                "check the name; if it is private, see whether HF_TOKEN may read it".to_owned()
            }
            Self::NoRevision { known, .. } if !known.is_empty() => {
                format!("it has {}", known.join(", "))
            }
            Self::OnlyPickles { .. } | Self::NoWeights { .. } => {
                "look for another revision or repository of it that has safetensors".to_owned()
            }
            Self::NotAModel { has, .. } => {
                match has.iter().find(|file| !file.contains('/') && file.ends_with(".safetensors"))
                {
                    Some(file) => format!(
                        "it has `{file}`: a single file can be fetched by hand and imported with `genvideo models import`"
                    ),
                    None => "it needs a `model_index.json` and `.safetensors` files".to_owned(),
                }
            }
            Self::NoSpace { .. } => {
                "free some space, or set HF_HOME, or HF_HUB_CACHE where that is set, to a folder on another disk"
                    .to_owned()
            }
            Self::Hash { .. } => {
                "the file was removed; pull again, or choose another mirror".to_owned()
            }
            Self::Busy { .. } => "try again later: what is here stays".to_owned(),
            Self::Connection(_) => {
                "pull again: it goes on where it stopped; HF_ENDPOINT names another mirror"
                    .to_owned()
            }
            Self::Local(error) => return error.hint(),
            _ => return None,
        })
    }
}

/// Bytes for people: `1.7 GB`.
pub fn size(bytes: u64) -> String {
    let units = ["kB", "MB", "GB", "TB"];
    let mut whole = bytes;
    let mut tenths = 0;
    let mut unit = "bytes";
    for next in units {
        if whole < 1000 {
            break;
        }
        (whole, tenths, unit) = (whole / 1000, whole % 1000 / 100, next);
    }
    if unit == "bytes" { format!("{bytes} bytes") } else { format!("{whole}.{tenths} {unit}") }
}
