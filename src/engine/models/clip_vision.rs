//! The image encoder of Stable Video Diffusion: `CLIPVisionModelWithProjection`.
//!
//! A picture of 224 x 224 goes in, one projected embedding comes out. Preparing the picture is
//! [`crate::engine::preprocess`]'s job.

use candle_core::Tensor;

use crate::engine::Result;
use crate::engine::config::video::ClipVisionConfig;
use crate::engine::nn::activation::Activation;
use crate::engine::nn::attention::{Mask, attend};
use crate::engine::nn::linear::Linear;
use crate::engine::nn::norm::LayerNorm;
use crate::engine::weights::Weights;

/// The vision tower with its projection.
pub struct ClipVision {
    class_embedding: Tensor,    // (1, 1, c)
    patch_embedding: Linear,    // 3 * patch * patch -> c
    position_embedding: Tensor, // (1, 1 + patches, c)
    pre_layrnorm: LayerNorm,
    layers: Vec<Layer>,
    post_layernorm: LayerNorm,
    visual_projection: Linear,
    grid: usize,
    patch: usize,
}

impl ClipVision {
    /// Reads the encoder; `weights` is the root of its file.
    pub fn load(weights: &Weights, config: &ClipVisionConfig) -> Result<Self> {
        let (hidden, patch, grid) = (config.hidden, config.patch_size, config.grid());
        let tower = weights.pp("vision_model");
        let embeddings = tower.pp("embeddings");
        let places = 1 + grid * grid;
        let kernel = embeddings.pp("patch_embedding").get("weight", &[hidden, 3, patch, patch])?;
        let positions = embeddings.pp("position_embedding").get("weight", &[places, hidden])?;
        let layer = |index: usize| Layer::load(&tower.pp("encoder.layers").pp(index), config);
        Ok(Self {
            class_embedding: embeddings
                .get("class_embedding", &[hidden])?
                .reshape((1, 1, hidden))?,
            patch_embedding: Linear::new(kernel.reshape((hidden, 3 * patch * patch))?, None),
            position_embedding: positions.unsqueeze(0)?,
            pre_layrnorm: LayerNorm::load(&tower.pp("pre_layrnorm"), hidden, config.eps)?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            post_layernorm: LayerNorm::load(&tower.pp("post_layernorm"), hidden, config.eps)?,
            visual_projection: Linear::load_without_bias(
                &weights.pp("visual_projection"),
                hidden,
                config.projection,
            )?,
            grid,
            patch,
        })
    }

    /// Prepared pixels (1, 3, side, side) -> embedding (1, projection).
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let patches = self.patch_embedding.forward(&self.patches(pixels)?)?;
        let tokens = Tensor::cat(&[&self.class_embedding, &patches], 1)?;
        let mut h = self.pre_layrnorm.forward(&(tokens + &self.position_embedding)?)?;
        for layer in &self.layers {
            h = layer.forward(&h)?;
        }
        let pooled = self.post_layernorm.forward(&h.narrow(1, 0, 1)?.contiguous()?)?; // (1, 1, c)
        Ok(self.visual_projection.forward(&pooled)?.squeeze(1)?)
    }

    /// Cuts the picture into rows of pixels: (1, 3, side, side) -> (1, patches, 3 * patch * patch).
    fn patches(&self, pixels: &Tensor) -> Result<Tensor> {
        let (grid, patch) = (self.grid, self.patch);
        // A side that is no multiple of the patch loses its last pixels, as under the strided convolution.
        let pixels = pixels.narrow(2, 0, grid * patch)?.narrow(3, 0, grid * patch)?.contiguous()?;
        let cut = pixels.reshape((3, grid, patch, grid, patch))?.permute((1, 3, 0, 2, 4))?;
        Ok(cut.reshape((1, grid * grid, 3 * patch * patch))?)
    }
}

/// One encoder layer.
struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
    heads: usize,
}

impl Layer {
    fn load(weights: &Weights, config: &ClipVisionConfig) -> Result<Self> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let attention = weights.pp("self_attn");
        Ok(Self {
            layer_norm1: LayerNorm::load(&weights.pp("layer_norm1"), hidden, config.eps)?,
            q_proj: Linear::load(&attention.pp("q_proj"), hidden, hidden)?,
            k_proj: Linear::load(&attention.pp("k_proj"), hidden, hidden)?,
            v_proj: Linear::load(&attention.pp("v_proj"), hidden, hidden)?,
            out_proj: Linear::load(&attention.pp("out_proj"), hidden, hidden)?,
            layer_norm2: LayerNorm::load(&weights.pp("layer_norm2"), hidden, config.eps)?,
            fc1: Linear::load(&weights.pp("mlp.fc1"), hidden, inner)?,
            fc2: Linear::load(&weights.pp("mlp.fc2"), inner, hidden)?,
            activation: config.activation,
            heads: config.heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.layer_norm1.forward(x)?;
        let (q, k, v) =
            (self.q_proj.forward(&h)?, self.k_proj.forward(&h)?, self.v_proj.forward(&h)?);
        let x = (x + self.out_proj.forward(&attend(&q, &k, &v, self.heads, Mask::Open)?)?)?;
        let h = self.activation.forward(&self.fc1.forward(&self.layer_norm2.forward(&x)?)?)?;
        Ok((&x + self.fc2.forward(&h)?)?)
    }
}
