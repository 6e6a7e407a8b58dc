//! `UNet2DConditionModel` as Stable Diffusion 1, 2 and XL use it: noisy latents, time and text to a prediction.

use std::ops::ControlFlow;

use candle_core::{DType, Tensor};

use crate::engine::config::unet::{ADDED_NUMBERS, Addition, Level, UnetConfig};
use crate::engine::nn::activation::swap_axes;
use crate::engine::nn::conv::{Conv2d, Conv2dSpec, Downsample, HalvingPad, Upsample};
use crate::engine::nn::embedding::{Sinusoid, TimestepEmbedding};
use crate::engine::nn::linear::Linear;
use crate::engine::nn::norm::GroupNorm;
use crate::engine::nn::resnet::{ResnetBlock, ResnetSpec};
use crate::engine::nn::transformer::{TransformerBlock, TransformerSpec};
use crate::engine::weights::Weights;
use crate::engine::{Error, Result};

/// Epsilon of the norm before a transformer.
const TRANSFORMER_EPS: f64 = 1e-6;

/// Sees the output of each part by its name in the checkpoint; a break ends the call with [`Error::Stopped`].
pub type Probe<'a> = dyn FnMut(&str, &Tensor) -> ControlFlow<()> + 'a;

/// A text-conditioned UNet.
#[derive(Clone, Debug)]
pub struct Unet {
    conv_in: Conv2d,
    time_embedding: TimestepEmbedding,
    add_embedding: Option<TimestepEmbedding>,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    config: UnetConfig,
    dtype: DType,
}

/// What the network is told beside latents and time, one row a picture.
#[derive(Clone, Debug)]
pub struct Condition {
    /// Text embeddings: (b, n, d).
    pub text: Tensor,
    /// What is added to the time embedding, for networks that have it.
    pub added: Option<Added>,
}

/// Conditions that are added to the time embedding.
#[derive(Clone, Debug)]
pub struct Added {
    /// The text as one vector: (b, pooled).
    pub pooled: Tensor,
    /// Numbers of each row: original height and width, top and left of the crop, target height and width.
    pub numbers: Vec<[f64; ADDED_NUMBERS]>,
}

impl Condition {
    /// The rows of all `parts`, in order.
    pub fn stack(parts: &[&Self]) -> Result<Self> {
        let texts: Vec<&Tensor> = parts.iter().map(|part| &part.text).collect();
        let added: Vec<&Added> = parts.iter().filter_map(|part| part.added.as_ref()).collect();
        let pooled: Vec<&Tensor> = added.iter().map(|added| &added.pooled).collect();
        let added = match added.len() {
            0 => None,
            _ => Some(Added {
                pooled: Tensor::cat(&pooled, 0)?,
                numbers: added.iter().flat_map(|added| added.numbers.iter().copied()).collect(),
            }),
        };
        Ok(Self { text: Tensor::cat(&texts, 0)?, added })
    }
}

impl Unet {
    /// Loads the component.
    pub fn load(weights: &Weights, config: UnetConfig) -> Result<Self> {
        let (first, time) = (config.levels[0].channels, config.time_width());
        let unet = Self {
            conv_in: Conv2d::load(
                &weights.pp("conv_in"),
                Conv2dSpec::same(config.in_channels, first),
            )?,
            time_embedding: TimestepEmbedding::load(
                &weights.pp("time_embedding"),
                first,
                time,
                time,
            )?,
            add_embedding: config
                .addition
                .map(|addition| {
                    let input = addition.pooled + ADDED_NUMBERS * addition.number;
                    TimestepEmbedding::load(&weights.pp("add_embedding"), input, time, time)
                })
                .transpose()?,
            down_blocks: load_down(weights, &config)?,
            mid_block: config
                .mid
                .then(|| MidBlock::load(&weights.pp("mid_block"), &config))
                .transpose()?,
            up_blocks: load_up(weights, &config)?,
            conv_norm_out: GroupNorm::load(
                &weights.pp("conv_norm_out"),
                config.groups,
                first,
                config.eps,
            )?,
            conv_out: Conv2d::load(
                &weights.pp("conv_out"),
                Conv2dSpec::same(first, config.out_channels),
            )?,
            dtype: weights.dtype(),
            config,
        };
        weights.finish()?;
        Ok(unet)
    }

    /// Widths.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// x (b, c, h, w) at `timestep` under `condition` to (b, c, h, w) in the network's number type.
    pub fn forward(
        &self,
        x: &Tensor,
        timestep: f64,
        condition: &Condition,
        probe: &mut Probe<'_>,
    ) -> Result<Tensor> {
        let (x, text) = (x.to_dtype(self.dtype)?, condition.text.to_dtype(self.dtype)?);
        let sinusoid = self.sinusoid(self.config.levels[0].channels);
        let time = sinusoid.forward(&vec![timestep; x.dim(0)?], x.device())?;
        let mut time = self.time_embedding.forward(&time)?; // (b, 4 * width)
        show(probe, "time_embedding", &time)?;
        if let (Some(embedding), Some(addition)) = (&self.add_embedding, self.config.addition) {
            let added = embedding.forward(&self.added(condition, addition)?)?;
            show(probe, "add_embedding", &added)?;
            time = (time + added)?;
        }
        let mut x = self.conv_in.forward(&x)?;
        show(probe, "conv_in", &x)?;
        let mut skips = vec![x.clone()];
        for (index, block) in self.down_blocks.iter().enumerate() {
            x = block.forward(&x, &time, &text, &mut skips)?;
            show(probe, &format!("down_blocks.{index}"), &x)?;
        }
        if let Some(block) = &self.mid_block {
            x = block.forward(&x, &time, &text)?;
            show(probe, "mid_block", &x)?;
        }
        for (index, block) in self.up_blocks.iter().enumerate() {
            x = block.forward(&x, &time, &text, &mut skips)?;
            show(probe, &format!("up_blocks.{index}"), &x)?;
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }

    fn sinusoid(&self, width: usize) -> Sinusoid {
        let (cosine_first, shift) = (self.config.flip_sin_to_cos, self.config.freq_shift);
        Sinusoid { width, cosine_first, shift }
    }

    /// Pooled text, then the sinusoid of each number: (b, pooled + numbers), in f32.
    fn added(&self, condition: &Condition, addition: Addition) -> Result<Tensor> {
        let added = condition
            .added
            .as_ref()
            .ok_or_else(|| Error::Internal("the unet wants the pooled text and sizes".into()))?;
        let (rows, numbers) = (added.numbers.len(), added.numbers.concat());
        let sinusoids = self.sinusoid(addition.number);
        let sinusoids = sinusoids.forward(&numbers, added.pooled.device())?;
        let sinusoids = sinusoids.reshape((rows, ADDED_NUMBERS * addition.number))?;
        Ok(Tensor::cat(&[&added.pooled.to_dtype(DType::F32)?, &sinusoids], 1)?)
    }
}

fn show(probe: &mut Probe<'_>, name: &str, x: &Tensor) -> Result<()> {
    if probe(name, x).is_break() { Err(Error::Stopped) } else { Ok(()) }
}

/// Resnets, each with its transformer where the level has attention.
type Layers = Vec<(ResnetBlock, Option<Transformer>)>;

#[derive(Clone, Debug)]
struct DownBlock {
    layers: Layers,
    downsampler: Option<Downsample>,
}

fn load_down(weights: &Weights, config: &UnetConfig) -> Result<Vec<DownBlock>> {
    let mut input = config.levels[0].channels;
    let mut blocks = Vec::new();
    for (index, level) in config.levels.iter().enumerate() {
        let at = weights.pp("down_blocks").pp(index);
        let inputs: Vec<usize> = (0..config.layers_per_block)
            .map(|layer| if layer == 0 { input } else { level.channels })
            .collect();
        let halve = || Downsample::load(&at.pp("downsamplers.0"), level.channels, HalvingPad::Even);
        blocks.push(DownBlock {
            layers: load_layers(&at, config, level, &inputs, level.down_transformers)?,
            downsampler: (index + 1 < config.levels.len()).then(halve).transpose()?,
        });
        input = level.channels;
    }
    Ok(blocks)
}

impl DownBlock {
    fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        text: &Tensor,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for (resnet, transformer) in &self.layers {
            x = resnet.forward(&x, Some(time))?;
            if let Some(transformer) = transformer {
                x = transformer.forward(&x, text)?;
            }
            skips.push(x.clone());
        }
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

#[derive(Clone, Debug)]
struct MidBlock {
    first: ResnetBlock,
    rest: Option<(Transformer, ResnetBlock)>,
}

impl MidBlock {
    fn load(weights: &Weights, config: &UnetConfig) -> Result<Self> {
        let level = &config.levels[config.levels.len() - 1];
        let resnet = |index: usize| {
            let spec = resnet_spec(config, level.channels, level.channels);
            ResnetBlock::load(&weights.pp("resnets").pp(index), spec)
        };
        let rest = match config.mid_transformers {
            Some(blocks) => Some((
                Transformer::load(&weights.pp("attentions.0"), config, level, blocks, false)?,
                resnet(1)?,
            )),
            None => None,
        };
        Ok(Self { first: resnet(0)?, rest })
    }

    fn forward(&self, x: &Tensor, time: &Tensor, text: &Tensor) -> Result<Tensor> {
        let x = self.first.forward(x, Some(time))?;
        match &self.rest {
            Some((transformer, resnet)) => {
                resnet.forward(&transformer.forward(&x, text)?, Some(time))
            }
            None => Ok(x),
        }
    }
}

#[derive(Clone, Debug)]
struct UpBlock {
    layers: Layers,
    upsampler: Option<Upsample>,
}

fn load_up(weights: &Weights, config: &UnetConfig) -> Result<Vec<UpBlock>> {
    let levels = &config.levels;
    let mut before = levels[levels.len() - 1].channels;
    let mut blocks = Vec::new();
    for (index, level) in levels.iter().rev().enumerate() {
        let at = weights.pp("up_blocks").pp(index);
        // The last skip of a level was made before its first resnet changed the width.
        let outer = levels[levels.len().saturating_sub(index + 2)].channels;
        let inputs: Vec<usize> = (0..=config.layers_per_block)
            .map(|layer| {
                let hidden = if layer == 0 { before } else { level.channels };
                let skip = if layer == config.layers_per_block { outer } else { level.channels };
                hidden + skip
            })
            .collect();
        let double = || Upsample::load(&at.pp("upsamplers.0"), level.channels);
        blocks.push(UpBlock {
            layers: load_layers(&at, config, level, &inputs, level.up_transformers)?,
            upsampler: (index + 1 < levels.len()).then(double).transpose()?,
        });
        before = level.channels;
    }
    Ok(blocks)
}

impl UpBlock {
    fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        text: &Tensor,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for (resnet, transformer) in &self.layers {
            let skip =
                skips.pop().ok_or_else(|| Error::Internal("the unet ran out of skips".into()))?;
            x = resnet.forward(&Tensor::cat(&[&x, &skip], 1)?, Some(time))?;
            if let Some(transformer) = transformer {
                x = transformer.forward(&x, text)?;
            }
        }
        match (&self.upsampler, skips.last()) {
            // To the size of the next skip: an odd size was rounded up on the way down.
            (Some(upsampler), Some(skip)) => upsampler.forward(&x, skip.dim(2)?, skip.dim(3)?),
            (Some(upsampler), None) => upsampler.double(&x),
            (None, _) => Ok(x),
        }
    }
}

fn resnet_spec(config: &UnetConfig, input: usize, output: usize) -> ResnetSpec {
    ResnetSpec {
        input,
        output,
        time: Some(config.time_width()),
        groups: config.groups,
        eps: config.eps,
    }
}

fn load_layers(
    weights: &Weights,
    config: &UnetConfig,
    level: &Level,
    inputs: &[usize],
    transformers: Option<usize>,
) -> Result<Layers> {
    let transformer = |index: usize, blocks: usize| {
        let at = weights.pp("attentions").pp(index);
        Transformer::load(&at, config, level, blocks, level.only_cross_attention)
    };
    let mut layers = Vec::new();
    for (index, input) in inputs.iter().enumerate() {
        let spec = resnet_spec(config, *input, level.channels);
        let resnet = ResnetBlock::load(&weights.pp("resnets").pp(index), spec)?;
        layers.push((resnet, transformers.map(|blocks| transformer(index, blocks)).transpose()?));
    }
    Ok(layers)
}

/// Into and out of a row of transformer blocks.
#[derive(Clone, Debug)]
enum Projection {
    Point(Conv2d, Conv2d),
    Linear(Linear, Linear),
}

/// `norm`, `proj_in`, `transformer_blocks`, `proj_out`, and the residual.
#[derive(Clone, Debug)]
struct Transformer {
    norm: GroupNorm,
    projection: Projection,
    blocks: Vec<TransformerBlock>,
}

impl Transformer {
    fn load(
        weights: &Weights,
        config: &UnetConfig,
        level: &Level,
        blocks: usize,
        only_cross: bool,
    ) -> Result<Self> {
        let channels = level.channels;
        let (enter, leave) = (weights.pp("proj_in"), weights.pp("proj_out"));
        let projection = if config.linear_projection {
            Projection::Linear(
                Linear::load(&enter, channels, channels)?,
                Linear::load(&leave, channels, channels)?,
            )
        } else {
            let spec = Conv2dSpec::point(channels, channels);
            Projection::Point(Conv2d::load(&enter, spec)?, Conv2d::load(&leave, spec)?)
        };
        let spec = TransformerSpec {
            width: channels,
            context: config.cross_attention,
            heads: level.heads,
            head_width: channels / level.heads,
            only_cross_attention: only_cross,
        };
        let block = |index| -> Result<TransformerBlock> {
            let block = TransformerBlock::load(&weights.pp("transformer_blocks").pp(index), spec)?;
            Ok(if config.upcast_attention { block.upcast() } else { block })
        };
        Ok(Self {
            norm: GroupNorm::load(&weights.pp("norm"), config.groups, channels, TRANSFORMER_EPS)?,
            projection,
            blocks: (0..blocks).map(block).collect::<Result<_>>()?,
        })
    }

    /// x (b, c, h, w), text (b, n, d) to (b, c, h, w).
    fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let normed = self.norm.forward(x)?;
        let to_rows = |x: &Tensor| -> Result<Tensor> { swap_axes(&x.flatten_from(2)?) };
        let to_cells = |rows: &Tensor| -> Result<Tensor> {
            Ok(swap_axes(rows)?.reshape(x.shape())?) // (b, c, h, w)
        };
        let mut rows = match &self.projection {
            Projection::Point(enter, _) => to_rows(&enter.forward(&normed)?)?, // (b, hw, c)
            Projection::Linear(enter, _) => enter.forward(&to_rows(&normed)?)?,
        };
        for block in &self.blocks {
            rows = block.forward(&rows, text)?;
        }
        let y = match &self.projection {
            Projection::Point(_, leave) => leave.forward(&to_cells(&rows)?)?,
            Projection::Linear(_, leave) => to_cells(&leave.forward(&rows)?)?,
        };
        Ok((x + y)?)
    }
}
