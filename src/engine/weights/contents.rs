//! What a weights file holds, told from its header: a whole model, a LoRA, or a part of a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;

use super::single_file::SingleFile;
use super::{Store, header, lora};
use crate::engine::config::Json;
use crate::engine::{Error, Result};

/// What a weights file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// A whole model in one file.
    Checkpoint {
        /// Its family.
        family: &'static str,
        /// `epsilon` or `v_prediction`.
        prediction: &'static str,
        /// Whether the last training step is pure noise.
        zero_snr: bool,
        /// Its parts.
        parts: Vec<&'static str>,
        /// Tensors that belong to no part.
        strays: usize,
    },
    /// Deltas to the weights of a model.
    Lora {
        /// The family it was made for, as its text width tells.
        family: &'static str,
        /// `kohya`, `diffusers` or `peft`.
        layout: &'static str,
        /// Parts it changes.
        parts: Vec<&'static str>,
        /// Weights it changes.
        modules: usize,
        /// Ranks of its matrices.
        ranks: Vec<usize>,
    },
    /// One part of a model, or something else.
    Other {
        /// What it seems to be, or why it cannot be used.
        note: String,
    },
}

/// A weights file at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Contents {
    /// What it is.
    #[serde(flatten)]
    pub kind: Kind,
    /// Tensors.
    pub tensors: usize,
    /// Numbers in all of them.
    pub parameters: u64,
    /// Tensors of each number type.
    pub dtypes: BTreeMap<String, usize>,
    /// Texts of its header.
    pub metadata: BTreeMap<String, String>,
    /// Type and shape of each tensor by name.
    pub keys: BTreeMap<String, String>,
}

/// Reads the header of the weights file at `path`.
pub fn contents(path: &Path) -> Result<Contents> {
    let store = Store::open(path, vec![path.to_path_buf()])?;
    let mut dtypes = BTreeMap::new();
    for entry in store.entries.values() {
        *dtypes.entry(entry.kind.clone()).or_default() += 1;
    }
    let numbers = store
        .entries
        .values()
        .map(|entry| (entry.bytes / header::width(&entry.kind).unwrap_or(1)) as u64);
    let keys = store.entries.iter().map(|(name, entry)| {
        let shape: Vec<String> = entry.shape.iter().map(usize::to_string).collect();
        (super::shown(name), format!("{} [{}]", entry.kind, shape.join(", ")))
    });
    Ok(Contents {
        tensors: store.entries.len(),
        parameters: numbers.sum(),
        keys: keys.collect(),
        kind: kind(&store),
        metadata: store.metadata,
        dtypes,
    })
}

fn kind(store: &Store) -> Kind {
    if let Some(found) = lora::describe(store) {
        return found;
    }
    match SingleFile::of(store, false, None) {
        Ok(file) => Kind::Checkpoint {
            family: file.family.name(),
            prediction: file.prediction,
            zero_snr: file.zero_snr,
            parts: file.parts.keys().copied().collect(),
            strays: file.strays.len(),
        },
        Err(Error::WeightsUnsupported { what, .. }) => {
            Kind::Other { note: part(store).unwrap_or(what) }
        }
        Err(error) => Kind::Other { note: error.to_string() },
    }
}

/// A part of a diffusers folder, by names that only it has.
fn part(store: &Store) -> Option<String> {
    let names: BTreeSet<&str> = store.entries.keys().map(String::as_str).collect();
    let any =
        |prefix: &str| names.range(prefix..).next().is_some_and(|name| name.starts_with(prefix));
    let what = if any("down_blocks.0.temporal")
        || names.iter().any(|name| name.contains("temporal_res_block"))
    {
        "a part of a video model in the diffusers layout"
    } else if any("down_blocks.") && any("time_embedding.") {
        "a UNet in the diffusers layout"
    } else if any("encoder.down_blocks.") || any("encoder.down.") {
        "an autoencoder"
    } else if any("vision_model.") {
        "a CLIP image encoder"
    } else if any("text_model.") || any("embeddings.token_embedding.") {
        "a CLIP text encoder"
    } else {
        return None;
    };
    Some(what.to_owned())
}

/// The configs of the one-file model at `path`.
pub(in crate::engine) fn configs(path: &Path) -> Result<BTreeMap<&'static str, Json>> {
    let store = Store::open(path, vec![path.to_path_buf()])?;
    Ok(SingleFile::of(&store, false, None)?.configs)
}
