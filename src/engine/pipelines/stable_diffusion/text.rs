//! Prompts to conditions: one text encoder, or two side by side.

use candle_core::{DType, Tensor};

use crate::engine::config::clip_text::ClipTextConfig;
use crate::engine::device::Compute;
use crate::engine::models::clip_text::{ClipText, Depth};
use crate::engine::prompt::{Chunk, Chunks, PromptTokenizer, Syntax};
use crate::engine::weights::Source;
use crate::engine::{Error, Result};

/// The texts of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prompts<'a> {
    /// The prompt.
    pub prompt: &'a str,
    /// The prompt of a second encoder, where it differs.
    pub prompt2: Option<&'a str>,
    /// What the picture should not be. None is not the same as an empty one: see [`TextEncoders::encode`].
    pub negative: Option<&'a str>,
    /// The same for a second encoder, where it differs.
    pub negative2: Option<&'a str>,
    /// Layers left out beside those that the model's family always leaves out: see [`TextEncoders::left_out`].
    pub clip_skip: usize,
    /// How the texts are read.
    pub syntax: Syntax,
}

/// What texts become.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// The prompt.
    pub positive: TextRow,
    /// The negative prompt, while guidance is on.
    pub negative: Option<TextRow>,
    /// Tokens of the prompt that are used.
    pub tokens: u32,
    /// Tokens of the prompt that had no room.
    pub tokens_cut: u32,
}

/// What one text becomes.
#[derive(Clone, Debug)]
pub struct TextRow {
    /// One vector a token, those of all encoders side by side: (1, n, d).
    pub embeds: Tensor,
    /// One vector for the text, where there is a second encoder: (1, pooled).
    pub pooled: Option<Tensor>,
}

impl TextRow {
    fn zeros_like(&self) -> Result<Self> {
        let pooled = self.pooled.as_ref().map(Tensor::zeros_like).transpose()?;
        Ok(Self { embeds: self.embeds.zeros_like()?, pooled })
    }
}

/// One encoder, read but not loaded.
#[derive(Clone)]
pub(super) struct TowerPlan {
    name: &'static str,
    tokenizer: PromptTokenizer,
    config: ClipTextConfig,
    projected: bool,
}

impl TowerPlan {
    /// The configs and tokenizers of `source`: of one encoder, or of `two`.
    pub(super) fn read(source: &Source, two: bool) -> Result<Vec<Self>> {
        let names = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")];
        let plan = |(index, (name, tokenizer)): (usize, (&'static str, &str))| {
            let config = ClipTextConfig::of(&source.json(&format!("{name}/config.json"))?)?;
            let tokenizer = source.tokenizer(tokenizer, config.positions, config.vocabulary)?;
            Ok(Self { name, tokenizer, config, projected: index == 1 })
        };
        names.into_iter().take(if two { 2 } else { 1 }).enumerate().map(plan).collect()
    }

    /// Width of all encoders side by side.
    pub(super) fn width(plans: &[Self]) -> usize {
        plans.iter().map(|plan| plan.config.hidden).sum()
    }

    /// Width of the pooled text.
    pub(super) fn pooled(plans: &[Self]) -> Option<usize> {
        plans.iter().find(|plan| plan.projected).map(|plan| plan.config.projection)
    }
}

/// The text encoders of a model with their tokenizers.
#[derive(Debug)]
pub struct TextEncoders {
    towers: Vec<Tower>,
    zeros: bool,
}

#[derive(Debug)]
struct Tower {
    tokenizer: PromptTokenizer,
    model: ClipText,
}

impl TextEncoders {
    /// Loads the encoders. With `zeros` a missing negative prompt is all zeros.
    pub(super) fn load(
        source: &Source,
        plans: Vec<TowerPlan>,
        zeros: bool,
        compute: &Compute,
    ) -> Result<Self> {
        let mut towers = Vec::new();
        for TowerPlan { name, tokenizer, config, projected } in plans {
            let weights = source.weights(name, compute)?;
            towers.push(Tower { tokenizer, model: ClipText::load(&weights, config, projected)? });
        }
        Ok(Self { towers, zeros })
    }

    /// Tokenizers in the order of the encoders.
    pub fn tokenizers(&self) -> impl Iterator<Item = &PromptTokenizer> {
        self.towers.iter().map(|tower| &tower.tokenizer)
    }

    /// Encodes all texts; without guidance there is no use for the negative ones.
    ///
    /// Models of two encoders that were trained so take zeros for a missing negative prompt, and the true encoding
    /// of an empty one. All others take the encoding of the empty text for both.
    pub fn encode(&self, prompts: &Prompts<'_>, guided: bool) -> Result<Encoded> {
        self.check_skip(prompts.clip_skip)?;
        let split = |text: &str, second: Option<&str>| -> Result<Vec<Chunks>> {
            let texts = [text, second.unwrap_or(text)];
            let pairs = self.towers.iter().zip(texts);
            pairs.map(|(tower, text)| tower.tokenizer.chunks(text, prompts.syntax)).collect()
        };
        let positive = split(prompts.prompt, prompts.prompt2)?;
        let zeros = self.zeros && prompts.negative.is_none();
        let negative = (guided && !zeros)
            .then(|| split(prompts.negative.unwrap_or_default(), prompts.negative2))
            .transpose()?;
        let all = positive.iter().chain(negative.iter().flatten());
        let length = all.map(|chunks| chunks.chunks.len()).max().unwrap_or(1);

        let (tokens, tokens_cut) = (positive[0].used, positive[0].cut);
        let positive = self.row(&positive, length, prompts.clip_skip)?;
        let negative = match negative {
            Some(negative) => {
                // diffusers leaves out layers for the prompt alone, A1111 for both.
                let both = prompts.syntax == Syntax::Weighted;
                Some(self.row(&negative, length, if both { prompts.clip_skip } else { 0 })?)
            }
            None => (guided && zeros).then(|| positive.zeros_like()).transpose()?,
        };
        Ok(Encoded { positive, negative, tokens, tokens_cut })
    }

    /// A note where `text` is written in letters that the encoder was not trained on.
    pub fn note(&self, text: &str) -> Result<Option<String>> {
        let (unknown, all) = self.towers[0].tokenizer.unknown_letters(text)?;
        Ok((2 * unknown > all).then(|| {
            format!(
                "the model's text encoder knows English only: {unknown} of the prompt's {all} letters in other \
                 scripts are not in its vocabulary"
            )
        }))
    }

    /// `texts`, one for each encoder, padded to `length` chunks by empty ones.
    fn row(&self, texts: &[Chunks], length: usize, clip_skip: usize) -> Result<TextRow> {
        let depth = self.depth(clip_skip);
        let (mut sides, mut pooled) = (Vec::new(), None);
        for (tower, text) in self.towers.iter().zip(texts) {
            let mut rows = Vec::new();
            let empty = tower.tokenizer.chunks("", Syntax::Literal)?;
            let padding = std::iter::repeat(&empty.chunks[0]);
            for (index, chunk) in text.chunks.iter().chain(padding).take(length).enumerate() {
                let states = tower.model.forward(&chunk.ids, depth)?;
                rows.push(weigh(&states.tokens, chunk)?);
                if index == 0 {
                    pooled = states.pooled.or(pooled);
                }
            }
            sides.push(Tensor::cat(&rows, 1)?);
        }
        Ok(TextRow { embeds: Tensor::cat(&sides, 2)?, pooled })
    }

    /// Two encoders give what they have before the last layer, bare.
    fn depth(&self, clip_skip: usize) -> Depth {
        let two = self.towers.len() > 1;
        Depth { skipped: clip_skip + usize::from(two), normed: !two }
    }

    /// Layers to leave out beside the family's own at A1111's "Clip skip", which counts from the last layer as 1.
    pub fn left_out(&self, clip_skip: u32) -> Result<usize> {
        let own = 1 + self.depth(0).skipped;
        let left_out = (clip_skip as usize).saturating_sub(own);
        let most = self.most_skipped();
        refuse_unless(left_out <= most, clip_skip as usize, most + own)?;
        Ok(left_out)
    }

    fn check_skip(&self, clip_skip: usize) -> Result<()> {
        let most = self.most_skipped();
        refuse_unless(clip_skip <= most, clip_skip, most)
    }

    /// As many layers as leave one.
    fn most_skipped(&self) -> usize {
        let fewest = self.towers.iter().map(|tower| tower.model.config().layers).min();
        fewest.unwrap_or(0).saturating_sub(1 + self.depth(0).skipped)
    }
}

fn refuse_unless(allowed: bool, clip_skip: usize, most: usize) -> Result<()> {
    if allowed {
        return Ok(());
    }
    let wanted = format!("0 to {most} for this model");
    Err(Error::Request { field: "clip_skip", value: clip_skip.to_string(), wanted })
}

/// Weighs each token, then brings the mean back to where it was, as A1111 does.
fn weigh(states: &Tensor, chunk: &Chunk) -> Result<Tensor> {
    let Some(weights) = &chunk.weights else { return Ok(states.clone()) };
    let (dtype, states) = (states.dtype(), states.to_dtype(DType::F32)?);
    let weights = Tensor::from_slice(weights, (1, weights.len(), 1), states.device())?;
    let weighed = states.broadcast_mul(&weights)?;
    let mean = |x: &Tensor| -> Result<f64> { Ok(f64::from(x.mean_all()?.to_scalar::<f32>()?)) };
    let (before, after) = (mean(&states)?, mean(&weighed)?);
    let scale = if after == 0.0 { 1.0 } else { before / after };
    Ok((weighed * scale)?.to_dtype(dtype)?)
}
