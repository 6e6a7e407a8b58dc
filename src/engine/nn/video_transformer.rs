//! The transformer of video models: attention within each frame, then along the frames, blended.
//!
//! The condition is one token per video (the embedding of a picture). A softmax over one key is 1, so its cross
//! attention is `to_out(to_v(token))` for every query: queries and keys of `attn2` are neither read nor computed.

use candle_core::Tensor;

use super::activation::{swap_axes, swap_middle};
use super::attention::{Attention, AttentionSpec};
use super::embedding::{Sinusoid, TimestepEmbedding};
use super::feed_forward::FeedForward;
use super::linear::Linear;
use super::norm::{GroupNorm, LayerNorm};
use super::video_resnet::{Blend, in_pieces};
use crate::engine::Result;
use crate::engine::config::video::GROUPS;
use crate::engine::device::cuda;
use crate::engine::weights::Weights;

/// Epsilon of the norm at the entrance.
const NORM_EPS: f64 = 1e-6;
/// Epsilon of the layer norms.
const LAYER_EPS: f64 = 1e-5;

/// Widths of one transformer.
#[derive(Clone, Copy, Debug)]
pub struct VideoTransformerSpec {
    /// Channels.
    pub channels: usize,
    /// Attention heads.
    pub heads: usize,
    /// Pairs of a picture block and a temporal block.
    pub blocks: usize,
    /// Width of the condition.
    pub cross: usize,
}

impl VideoTransformerSpec {
    fn self_attention(&self) -> AttentionSpec {
        let (width, heads) = (self.channels, self.heads);
        AttentionSpec { width, context: width, heads, head_width: width / heads }
    }
}

/// A transformer over pictures and frames, added to its input.
pub struct VideoTransformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<(SpatialBlock, TemporalBlock)>,
    time_pos_embed: TimestepEmbedding,
    share: f64,
    proj_out: Linear,
    channels: usize,
}

impl VideoTransformer {
    /// Reads the transformer at `weights`.
    pub fn load(weights: &Weights, spec: VideoTransformerSpec) -> Result<Self> {
        let channels = spec.channels;
        let pair = |index: usize| -> Result<_> {
            let spatial = SpatialBlock::load(&weights.pp("transformer_blocks").pp(index), spec)?;
            Ok((
                spatial,
                TemporalBlock::load(&weights.pp("temporal_transformer_blocks").pp(index), spec)?,
            ))
        };
        Ok(Self {
            norm: GroupNorm::load(&weights.pp("norm"), GROUPS, channels, NORM_EPS)?,
            proj_in: Linear::load(&weights.pp("proj_in"), channels, channels)?,
            blocks: (0..spec.blocks).map(pair).collect::<Result<_>>()?,
            time_pos_embed: TimestepEmbedding::load(
                &weights.pp("time_pos_embed"),
                channels,
                4 * channels,
                channels,
            )?,
            share: Blend::Spatial.temporal_share(weights)?,
            proj_out: Linear::load(&weights.pp("proj_out"), channels, channels)?,
            channels,
        })
    }

    /// `x` (b*f, c, h, w) with the condition of each video (b, 1, cross).
    pub fn forward(&self, x: &Tensor, condition: &Tensor, frames: usize) -> Result<Tensor> {
        let (rows, channels, height, width) = x.dims4()?;
        let cells = self.norm.forward(x)?.reshape((rows, channels, height * width))?;
        let mut h = self.proj_in.forward(&swap_axes(&cells)?)?; // (b*f, p, c)
        let places = self.frame_embedding(x, frames)?; // (f, 1, c)
        for (spatial, temporal) in &self.blocks {
            h = spatial.forward(&h, condition, frames)?;
            let by_frame = h.reshape((rows / frames, frames, height * width, channels))?;
            let placed = match cuda::add_repeated(
                &by_frame,
                &places,
                (height * width * channels, channels),
            )? {
                Some(placed) => placed,
                None => by_frame.broadcast_add(&places)?,
            };
            let placed = placed.reshape(h.shape())?;
            let mixed = temporal.forward(&placed, condition, frames)?;
            h = (((mixed - &h)? * self.share)? + &h)?;
        }
        let h = swap_axes(&self.proj_out.forward(&h)?)?.reshape((rows, channels, height, width))?;
        Ok((h + x)?)
    }

    /// Where each frame stands in the clip: (f, 1, c).
    fn frame_embedding(&self, like: &Tensor, frames: usize) -> Result<Tensor> {
        let indices: Vec<f64> = (0_u32..).take(frames).map(f64::from).collect();
        let places = Sinusoid::new(self.channels).forward(&indices, like.device())?;
        Ok(self.time_pos_embed.forward(&places)?.unsqueeze(1)?)
    }
}

/// The feed forward a few frames at a time: its inside is eight times as wide, before the gate and behind it.
fn feed(layer: &FeedForward, x: &Tensor) -> Result<Tensor> {
    in_pieces(x, 16, |piece, _| layer.forward(piece))
}

/// Attention within a frame, the condition, a feed forward.
struct SpatialBlock {
    norm1: LayerNorm,
    attn1: Attention,
    attn2: TokenAttention,
    norm3: LayerNorm,
    ff: FeedForward,
}

impl SpatialBlock {
    fn load(weights: &Weights, spec: VideoTransformerSpec) -> Result<Self> {
        let channels = spec.channels;
        Ok(Self {
            norm1: LayerNorm::load(&weights.pp("norm1"), channels, LAYER_EPS)?,
            attn1: Attention::load(&weights.pp("attn1"), spec.self_attention())?,
            attn2: TokenAttention::load(&weights.pp("attn2"), channels, spec.cross)?,
            norm3: LayerNorm::load(&weights.pp("norm3"), channels, LAYER_EPS)?,
            ff: FeedForward::load(&weights.pp("ff"), channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor, condition: &Tensor, frames: usize) -> Result<Tensor> {
        let x = (x + self.attn1.forward(&self.norm1.forward(x)?)?)?;
        let x = self.attn2.add_to(&x, condition, frames)?;
        Ok((&x + feed(&self.ff, &self.norm3.forward(&x)?)?)?)
    }
}

/// A feed forward, attention along the frames of each place, the condition, a feed forward.
///
/// Everything but the attention looks at one token only, so tokens stay in the order (b*f, p, c).
struct TemporalBlock {
    norm_in: LayerNorm,
    ff_in: FeedForward,
    norm1: LayerNorm,
    attn1: Attention,
    attn2: TokenAttention,
    norm3: LayerNorm,
    ff: FeedForward,
}

impl TemporalBlock {
    fn load(weights: &Weights, spec: VideoTransformerSpec) -> Result<Self> {
        let channels = spec.channels;
        Ok(Self {
            norm_in: LayerNorm::load(&weights.pp("norm_in"), channels, LAYER_EPS)?,
            ff_in: FeedForward::load(&weights.pp("ff_in"), channels, channels)?,
            norm1: LayerNorm::load(&weights.pp("norm1"), channels, LAYER_EPS)?,
            attn1: Attention::load(&weights.pp("attn1"), spec.self_attention())?,
            attn2: TokenAttention::load(&weights.pp("attn2"), channels, spec.cross)?,
            norm3: LayerNorm::load(&weights.pp("norm3"), channels, LAYER_EPS)?,
            ff: FeedForward::load(&weights.pp("ff"), channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor, condition: &Tensor, frames: usize) -> Result<Tensor> {
        let x = (x + feed(&self.ff_in, &self.norm_in.forward(x)?)?)?;
        let x = (&x + self.along_frames(&self.norm1.forward(&x)?, frames)?)?;
        let x = self.attn2.add_to(&x, condition, frames)?;
        Ok((&x + feed(&self.ff, &self.norm3.forward(&x)?)?)?)
    }

    /// Self-attention over the frames: (b*f, p, c) is turned to (b*p, f, c) and back.
    fn along_frames(&self, x: &Tensor, frames: usize) -> Result<Tensor> {
        let (rows, places, channels) = x.dims3()?;
        let videos = rows / frames;
        let turned = swap_middle(&x.reshape((videos, frames, places, channels))?)?;
        let h = self.attn1.forward(&turned.reshape((videos * places, frames, channels))?)?;
        let h = swap_middle(&h.reshape((videos, places, frames, channels))?)?;
        Ok(h.reshape((rows, places, channels))?)
    }
}

/// Cross attention to a single token.
struct TokenAttention {
    to_v: Linear,
    to_out: Linear,
}

impl TokenAttention {
    fn load(weights: &Weights, channels: usize, cross: usize) -> Result<Self> {
        Ok(Self {
            to_v: Linear::load_without_bias(&weights.pp("to_v"), cross, channels)?,
            to_out: Linear::load(&weights.pp("to_out.0"), channels, channels)?,
        })
    }

    /// Adds what the token of each video (b, 1, cross) says to all tokens (b*f, p, c) of that video.
    fn add_to(&self, x: &Tensor, condition: &Tensor, frames: usize) -> Result<Tensor> {
        let (rows, places, channels) = x.dims3()?;
        let said = self.to_out.forward(&self.to_v.forward(condition)?)?; // (b, 1, c)
        let by_video = x.reshape((rows / frames, frames * places, channels))?;
        let blocks = (frames * places * channels, channels);
        let y = match cuda::add_repeated(&by_video, &said, blocks)? {
            Some(y) => y,
            None => by_video.broadcast_add(&said)?,
        };
        Ok(y.reshape(x.shape())?)
    }
}
