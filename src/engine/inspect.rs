//! What a weights file is, from its header alone.

use std::collections::BTreeMap;
use std::path::Path;

use super::Result;
use super::config::Json;
pub use super::weights::{Contents, Kind, contents};

/// The configs that the names and shapes of the one-file model at `path` give, by their path in a diffusers folder.
pub fn configs(path: &Path) -> Result<BTreeMap<&'static str, Json>> {
    super::weights::configs(path)
}
