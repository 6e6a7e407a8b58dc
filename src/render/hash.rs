//! Hashes of model files, so that files and receipts say which weights made them.
//!
//! A file is hashed once for each of its versions: what is known is kept, by path, length and time of change, in the
//! cache folder. A model of several files goes by the hash of their list, written as `sha256sum` would.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Error, Hook, report};
use crate::{engine, store};

/// Bytes between two looks at the hook.
const BLOCK: usize = 8 << 20;

/// What is known about a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Known {
    bytes: u64,
    /// Nanoseconds since 1970.
    changed: u128,
    sha256: String,
}

/// A file that shapes what a model makes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    /// Name of the model, the autoencoder or the LoRA.
    pub model: String,
    /// Name of the file inside the model's folder.
    pub file: String,
    /// SHA-256 of its content.
    pub sha256: String,
}

/// The known hashes, in memory and in a file.
#[derive(Debug)]
pub(super) struct Hashes {
    file: PathBuf,
    known: Mutex<Option<BTreeMap<PathBuf, Known>>>,
}

impl Hashes {
    /// Hashes kept in `cache_dir`; nothing is read yet.
    pub(super) fn new(cache_dir: &Path) -> Self {
        Self { file: cache_dir.join("weight-hashes.json"), known: Mutex::new(None) }
    }

    /// SHA-256 of the model at `path`, of its one file or of the list of its weight files, and every file that shapes
    /// what it makes, as a part of `model`.
    pub(super) fn model(
        &self,
        (model, path): (&str, &Path),
        hook: &mut Hook<'_>,
    ) -> Result<(String, Vec<ModelFile>), Error> {
        let weights = engine::weights::files(path)?;
        let mut files = self.named((model, path), &weights, hook)?;
        let sha256 = match (weights.as_slice(), files.as_slice()) {
            ([one], [file]) if one == path => file.sha256.clone(),
            _ => {
                let line = |file: &ModelFile| format!("{}  {}\n", file.sha256, file.file);
                store::sha256(files.iter().map(line).collect::<String>().as_bytes())
            }
        };
        files.extend(self.named((model, path), &engine::weights::settings_files(path)?, hook)?);
        Ok((sha256, files))
    }

    /// A file that is a model or a part of one by itself.
    pub(super) fn single(
        &self,
        (model, path): (&str, &Path),
        hook: &mut Hook<'_>,
    ) -> Result<ModelFile, Error> {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(ModelFile { model: model.to_owned(), file, sha256: self.file(path, hook)? })
    }

    /// `files` of the model at `path` with their hashes, in the order of their names.
    fn named(
        &self,
        (model, path): (&str, &Path),
        files: &[PathBuf],
        hook: &mut Hook<'_>,
    ) -> Result<Vec<ModelFile>, Error> {
        let mut named = Vec::new();
        for file in files {
            named.push(match file.strip_prefix(path) {
                Ok(inside) if file != path => ModelFile {
                    model: model.to_owned(),
                    file: inside.to_string_lossy().replace('\\', "/"),
                    sha256: self.file(file, hook)?,
                },
                _ => self.single((model, file), hook)?,
            });
        }
        named.sort_unstable_by(|one, other| one.file.cmp(&other.file));
        Ok(named)
    }

    /// SHA-256 of one file.
    pub(super) fn file(&self, path: &Path, hook: &mut Hook<'_>) -> Result<String, Error> {
        let unreadable = |source| engine::Error::Io { path: path.to_path_buf(), source };
        let state = fs::metadata(path).map_err(unreadable)?;
        let changed = state.modified().map_err(unreadable)?;
        let changed = changed.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let is_same = |known: &Known| known.bytes == state.len() && known.changed == changed;
        if let Some(known) = self.with(|all| all.get(path).filter(|known| is_same(known)).cloned())
        {
            return Ok(known.sha256);
        }
        let mut file = File::open(path).map_err(unreadable)?;
        let (mut hasher, mut block) = (Sha256::new(), vec![0; BLOCK]);
        loop {
            report(hook, "load", 0, 1)?;
            match file.read(&mut block).map_err(unreadable)? {
                0 => break,
                count => hasher.update(&block[..count]),
            }
        }
        let known = Known { bytes: state.len(), changed, sha256: store::hex(&hasher.finalize()) };
        let sha256 = known.sha256.clone();
        self.with(|all| {
            all.insert(path.to_path_buf(), known);
            // Only time is lost without it.
            if let Err(error) = self.save(all) {
                tracing::debug!(%error, file = %self.file.display(), "hashes are not kept");
            }
        });
        Ok(sha256)
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<PathBuf, Known>) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let read = || fs::read(&self.file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        act(known.get_or_insert_with(|| read().unwrap_or_default()))
    }

    fn save(&self, all: &BTreeMap<PathBuf, Known>) -> std::io::Result<()> {
        let folder = self.file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec_pretty(all)?)?;
        file.persist(&self.file)?;
        Ok(())
    }
}

/// The short form that A1111 writes: the first ten digits.
pub(super) fn short(sha256: &str) -> String {
    sha256.chars().take(10).collect()
}
