//! `text_encoder/config.json` of a `CLIPTextModel`.

use std::path::Path;

use serde_json::json;

use super::{COUNTS, Json, WIDTHS};
use crate::engine::Result;
use crate::engine::nn::activation::Activation;

/// Widths of a CLIP text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipTextConfig {
    /// Width of the hidden states.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Longest sequence, begin and end included.
    pub positions: usize,
    /// Entries of the embedding table.
    pub vocabulary: usize,
    /// Non-linearity of the MLP.
    pub activation: Activation,
    /// Epsilon of the layer norms.
    pub eps: f64,
    /// Width of the projected end token, where there is a projection.
    pub projection: usize,
    /// Id of the end token; without one it is the largest id of a text.
    pub end: Option<u32>,
}

/// Early files carry this id for the end token, which is no token's: the largest id is meant.
const OLD_END: usize = 2;

impl ClipTextConfig {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(&Json::read(path)?)
    }

    /// Checks an object that is in memory.
    pub fn of(json: &Json) -> Result<Self> {
        json.only("model_type", &[json!("clip_text_model"), json!("clip")])?;
        let config = Self {
            hidden: json.size("hidden_size", Some(512), WIDTHS)?,
            intermediate: json.size("intermediate_size", Some(2048), WIDTHS)?,
            layers: json.size("num_hidden_layers", Some(12), COUNTS)?,
            heads: json.size("num_attention_heads", Some(8), COUNTS)?,
            positions: json.size("max_position_embeddings", Some(77), 2..=1 << 16)?,
            vocabulary: json.size("vocab_size", Some(49408), 3..=1 << 24)?,
            activation: Activation::of_config(json, "hidden_act", "quick_gelu")?,
            eps: json.float("layer_norm_eps", Some(1e-5), 1e-12..=0.1)?,
            projection: json.size("projection_dim", Some(512), WIDTHS)?,
            end: Some(json.size("eos_token_id", Some(OLD_END), 0..=1 << 24)?)
                .filter(|id| *id != OLD_END)
                .and_then(|id| u32::try_from(id).ok()),
        };
        if !config.hidden.is_multiple_of(config.heads) {
            return Err(
                json.senseless("num_attention_heads", format!("a divisor of {}", config.hidden))
            );
        }
        Ok(config)
    }
}
