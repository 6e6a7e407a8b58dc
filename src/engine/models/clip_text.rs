//! `CLIPTextModel`, with a projection or without: token ids to one vector a token, and one for the whole text.

use candle_core::{D, Tensor};

use crate::engine::config::clip_text::ClipTextConfig;
use crate::engine::nn::activation::Activation;
use crate::engine::nn::attention::{Mask, attend};
use crate::engine::nn::linear::Linear;
use crate::engine::nn::norm::LayerNorm;
use crate::engine::weights::Weights;
use crate::engine::{Error, Result};

/// A CLIP text encoder.
#[derive(Clone, Debug)]
pub struct ClipText {
    token_embedding: Tensor,    // (vocabulary, hidden)
    position_embedding: Tensor, // (positions, hidden)
    layers: Vec<ClipLayer>,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
    config: ClipTextConfig,
}

/// Which hidden states stand for the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Layers left out at the end.
    pub skipped: usize,
    /// Whether the final norm follows.
    pub normed: bool,
}

/// What a text becomes.
#[derive(Clone, Debug)]
pub struct TextStates {
    /// One vector a token: (1, n, hidden).
    pub tokens: Tensor,
    /// One for the whole text, where the encoder has a projection: (1, projection).
    pub pooled: Option<Tensor>,
}

impl ClipText {
    /// Loads the component, `projected` with its projection; files of transformers 5 have no `text_model.` before
    /// each name.
    pub fn load(weights: &Weights, config: ClipTextConfig, projected: bool) -> Result<Self> {
        let bare = weights.has("embeddings.token_embedding.weight");
        let root = if bare { weights.clone() } else { weights.pp("text_model") };
        let embeddings = root.pp("embeddings");
        let (hidden, eps) = (config.hidden, config.eps);
        let layer = |index| {
            ClipLayer::load(&root.pp("encoder.layers").pp(index), &ClipLayerSpec::of(&config))
        };
        let model = Self {
            token_embedding: embeddings
                .get("token_embedding.weight", &[config.vocabulary, hidden])?,
            position_embedding: embeddings
                .get("position_embedding.weight", &[config.positions, hidden])?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(&root.pp("final_layer_norm"), hidden, eps)?,
            text_projection: projected
                .then(|| {
                    let at = weights.pp("text_projection");
                    Linear::load_without_bias(&at, hidden, config.projection)
                })
                .transpose()?,
            config,
        };
        weights.finish()?;
        Ok(model)
    }

    /// Widths.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// Hidden states of `ids` at `depth`.
    pub fn forward(&self, ids: &[u32], depth: Depth) -> Result<TextStates> {
        let count = self.layers.len();
        if ids.len() > self.config.positions || depth.skipped >= count {
            return Err(Error::Internal(format!(
                "{} tokens and {} layers left out in clip text",
                ids.len(),
                depth.skipped
            )));
        }
        let (wanted, pooling) = (count - depth.skipped, self.text_projection.as_ref());
        let tokens = Tensor::new(ids, self.token_embedding.device())?;
        let positions = self.position_embedding.narrow(0, 0, ids.len())?;
        let mut x = (self.token_embedding.index_select(&tokens, 0)? + positions)?.unsqueeze(0)?; // (1, n, hidden)
        let mut states = None;
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, Mask::Causal)?;
            if index + 1 == wanted {
                states = Some(x.clone());
                if pooling.is_none() {
                    break;
                }
            }
        }
        let states =
            states.ok_or_else(|| Error::Internal("a text encoder without layers".into()))?;
        let tokens = if depth.normed { self.final_layer_norm.forward(&states)? } else { states };
        let pooled = match pooling {
            Some(projection) => {
                let last = self.final_layer_norm.forward(&x)?;
                Some(projection.forward(&last.narrow(1, self.end(ids), 1)?.squeeze(1)?)?)
            }
            None => None,
        };
        Ok(TextStates { tokens, pooled })
    }

    /// Where the text ends: at the first end token.
    fn end(&self, ids: &[u32]) -> usize {
        let end = self.config.end.or_else(|| ids.iter().copied().max());
        ids.iter().position(|id| Some(*id) == end).unwrap_or(0)
    }
}

/// Widths of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipLayerSpec {
    /// Width of the hidden states.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Attention heads.
    pub heads: usize,
    /// Non-linearity of the MLP.
    pub activation: Activation,
    /// Epsilon of the layer norms.
    pub eps: f64,
}

impl ClipLayerSpec {
    fn of(config: &ClipTextConfig) -> Self {
        Self {
            hidden: config.hidden,
            intermediate: config.intermediate,
            heads: config.heads,
            activation: config.activation,
            eps: config.eps,
        }
    }
}

/// One layer of a CLIP tower, text or vision: `layer_norm1`, `self_attn`, `layer_norm2`, `mlp`.
#[derive(Clone, Debug)]
pub struct ClipLayer {
    layer_norm1: LayerNorm,
    projections: [Linear; 4],
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    spec: ClipLayerSpec,
}

impl ClipLayer {
    /// Loads the layer.
    pub fn load(weights: &Weights, spec: &ClipLayerSpec) -> Result<Self> {
        let hidden = spec.hidden;
        let project = |name: &str| Linear::load(&weights.pp("self_attn").pp(name), hidden, hidden);
        Ok(Self {
            layer_norm1: LayerNorm::load(&weights.pp("layer_norm1"), hidden, spec.eps)?,
            projections: [
                project("q_proj")?,
                project("k_proj")?,
                project("v_proj")?,
                project("out_proj")?,
            ],
            layer_norm2: LayerNorm::load(&weights.pp("layer_norm2"), hidden, spec.eps)?,
            fc1: Linear::load(&weights.pp("mlp.fc1"), hidden, spec.intermediate)?,
            fc2: Linear::load(&weights.pp("mlp.fc2"), spec.intermediate, hidden)?,
            spec: *spec,
        })
    }

    /// (b, n, hidden) to the same.
    pub fn forward(&self, x: &Tensor, mask: Mask) -> Result<Tensor> {
        let [q, k, v, out] = &self.projections;
        let normed = self.layer_norm1.forward(x)?;
        let (q, k, v) = (q.forward(&normed)?, k.forward(&normed)?, v.forward(&normed)?);
        let x = (x + out.forward(&attend(&q, &k, &v, self.spec.heads, mask)?)?)?;
        let inner =
            self.spec.activation.forward(&self.fc1.forward(&self.layer_norm2.forward(&x)?)?)?;
        debug_assert_eq!(inner.dim(D::Minus1)?, self.spec.intermediate);
        Ok((&x + self.fc2.forward(&inner)?)?)
    }
}
