//! The lock file beside a model that was pulled or imported: where its files came from, and what they must be.
//!
//! A pulled model's is `genvideo.lock` in its repository's folder of the Hugging Face cache, an imported one's is
//! `<name>.lock` in the models folder. It says what `verify` compares with and what `remove` may remove.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::writing;
use super::manifest::{is_commit, is_confined};
use super::{Error, digest, read_small};

/// How every lock file of ours begins; other programs call theirs `.lock` as well.
const HEAD: &str = "# Written by genvideo";

/// What a lock file says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// The repository on the hub; or the path that was imported.
    pub source: String,
    /// What was asked for: a branch, a tag or a commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The commit it was at the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Where in the models folder a symbolic link stands for it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked: Option<String>,
    /// Files by their path in the model's folder.
    pub files: Vec<Locked>,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Locked {
    /// Its path in the model's folder.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of its content.
    pub sha256: String,
    /// Whether another program had put it there before, so that a removal lets it stay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
}

impl Lock {
    /// The lock file of a repository's folder in the Hugging Face cache.
    pub(super) fn of_repo(repo: &Path) -> PathBuf {
        repo.join("genvideo.lock")
    }

    /// The lock file of an imported model.
    pub(super) fn of_import(dir: &Path, name: &str) -> PathBuf {
        dir.join(format!("{name}.lock"))
    }

    /// Whether there is a lock file of ours at `path`.
    pub(super) fn is_ours(path: &Path) -> bool {
        let mut head = [0; HEAD.len()];
        let read = |mut file: fs::File| file.read_exact(&mut head);
        fs::File::open(path).and_then(read).is_ok() && head == *HEAD.as_bytes()
    }

    /// What the lock file at `path` says; `None` when there is none of ours.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, Error> {
        if !Self::is_ours(path) {
            return Ok(None);
        }
        let lock: Self = toml::from_str(&read_small(path)?).map_err(|error| Error::Malformed {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        let paths = lock.files.iter().map(|file| &file.path).chain(&lock.linked);
        let stray = paths.filter(|path| !is_confined(Path::new(path)));
        match stray.chain(lock.commit.iter().filter(|commit| !is_commit(commit))).next() {
            Some(path) => Err(Error::PathEscape { path: path.escape_debug().to_string() }),
            None => Ok(Some(lock)),
        }
    }

    /// Writes it aside, then in one step.
    pub(super) fn write(&self, path: &Path) -> Result<(), Error> {
        let text = format!(
            "{HEAD}; `genvideo models verify` compares the files with it.\n{}",
            toml::to_string(self).expect("texts and numbers are TOML")
        );
        let folder = path.parent().unwrap_or(Path::new("."));
        let save = || {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(text.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(path).map(drop).map_err(|error| error.error)
        };
        save().map_err(|source| writing(path, source))
    }
}

impl Locked {
    /// The file at `path` below `folder`, as it is.
    pub(super) fn of(folder: &Path, path: &str) -> Result<Self, Error> {
        let file = folder.join(path);
        let unreadable = |source| Error::Unreadable { path: file.clone(), source };
        let bytes = fs::metadata(&file).map_err(unreadable)?.len();
        let sha256 = digest::sha256(&file).map_err(unreadable)?;
        Ok(Self { path: path.to_owned(), bytes, sha256, kept: false })
    }

    /// What is wrong with the file below `folder`, if anything.
    pub(super) fn fault(&self, folder: &Path) -> Option<String> {
        match Self::of(folder, &self.path) {
            Err(Error::Unreadable { source, .. }) => Some(source.to_string()),
            Err(error) => Some(error.to_string()),
            Ok(found) if found.bytes != self.bytes => {
                Some(format!("it has {} bytes, wanted {}", found.bytes, self.bytes))
            }
            Ok(found) if found.sha256 != self.sha256 => {
                Some(format!("its SHA-256 is {}, wanted {}", found.sha256, self.sha256))
            }
            Ok(_) => None,
        }
    }
}
