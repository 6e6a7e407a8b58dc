//! `unet/config.json` of a `UNet2DConditionModel` as Stable Diffusion 1, 2 and XL use it.

use std::path::Path;

use serde_json::{Value, json};

use super::{COUNTS, Json, WIDTHS};
use crate::engine::Result;

/// One level of the UNet.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// Channels.
    pub channels: usize,
    /// Attention heads (which diffusers calls `attention_head_dim`).
    pub heads: usize,
    /// Transformer blocks behind each resnet on the way down; `None` where the level has no attention.
    pub down_transformers: Option<usize>,
    /// The same on the way up.
    pub up_transformers: Option<usize>,
    /// Whether its transformers leave out self-attention.
    pub only_cross_attention: bool,
}

/// Widths of a text-conditioned UNet.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Latent cells along one side that it was trained for.
    pub sample_size: (usize, usize),
    /// Levels, outermost first.
    pub levels: Vec<Level>,
    /// Transformer blocks in the middle; `None` where it has no attention, and no middle at all if `mid` is false.
    pub mid_transformers: Option<usize>,
    /// Whether there is a middle.
    pub mid: bool,
    /// Resnets in a level on the way down; one more on the way up.
    pub layers_per_block: usize,
    /// Width of the text embeddings.
    pub cross_attention: usize,
    /// Groups of the norms.
    pub groups: usize,
    /// Epsilon of the resnets' norms.
    pub eps: f64,
    /// Whether transformers are entered by a linear layer in place of a 1x1 convolution.
    pub linear_projection: bool,
    /// Whether attention scores overflow in half precision.
    pub upcast_attention: bool,
    /// Whether the sinusoid puts cosines first.
    pub flip_sin_to_cos: bool,
    /// Shift of the sinusoid's frequencies.
    pub freq_shift: f64,
    /// What is added to the time embedding, if anything.
    pub addition: Option<Addition>,
}

/// Conditions that are added to the time embedding: the pooled text and some numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addition {
    /// Width of one number's sinusoid.
    pub number: usize,
    /// Width of the pooled text.
    pub pooled: usize,
}

/// Numbers of an [`Addition`]: original size, crop and target size, two each.
pub const ADDED_NUMBERS: usize = 6;

impl UnetConfig {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(&Json::read(path)?)
    }

    /// Checks an object that is in memory.
    pub fn of(json: &Json) -> Result<Self> {
        refuse_other_networks(json)?;
        let channels = json.sizes("block_out_channels", WIDTHS)?;
        let levels = levels(json, &channels)?;
        let mid = !json.map.get("mid_block_type").is_some_and(Value::is_null);
        json.only("mid_block_type", &[json!("UNetMidBlock2DCrossAttn"), json!("UNetMidBlock2D")])?;
        let mid_crossed = json.text("mid_block_type")?.unwrap_or("UNetMidBlock2DCrossAttn")
            == "UNetMidBlock2DCrossAttn";
        let mid_blocks =
            json.size_per_level("transformer_layers_per_block", Some(1), channels.len(), COUNTS)?;
        let config = Self {
            in_channels: json.size("in_channels", Some(4), COUNTS)?,
            out_channels: json.size("out_channels", Some(4), COUNTS)?,
            sample_size: sample_size(json)?,
            mid_transformers: (mid && mid_crossed).then(|| mid_blocks[channels.len() - 1]),
            mid,
            layers_per_block: json.size("layers_per_block", Some(2), COUNTS)?,
            cross_attention: cross_attention(json, channels.len())?,
            groups: json.size("norm_num_groups", Some(32), COUNTS)?,
            eps: json.float("norm_eps", Some(1e-5), 1e-12..=0.1)?,
            linear_projection: json.flag("use_linear_projection", false)?,
            upcast_attention: json.flag("upcast_attention", false)?,
            flip_sin_to_cos: json.flag("flip_sin_to_cos", true)?,
            freq_shift: json.float("freq_shift", Some(0.0), 0.0..=1.0)?,
            addition: addition(json)?,
            levels,
        };
        if channels.iter().any(|channels| !channels.is_multiple_of(config.groups)) {
            return Err(
                json.senseless("norm_num_groups", "a divisor of each of `block_out_channels`")
            );
        }
        if !channels[0].is_multiple_of(2) || channels[0] < 4 {
            return Err(json.senseless(
                "block_out_channels",
                "an even first width from 4, for the time sinusoid",
            ));
        }
        Ok(config)
    }

    /// Width of the time embedding.
    pub fn time_width(&self) -> usize {
        4 * self.levels[0].channels
    }

    /// A latent side that divides evenly through all levels is a multiple of this.
    pub fn latent_multiple(&self) -> usize {
        1 << (self.levels.len() - 1)
    }
}

fn addition(json: &Json) -> Result<Option<Addition>> {
    json.only("addition_embed_type", &[json!("text_time")])?;
    if json.text("addition_embed_type")?.is_none() {
        return Ok(None);
    }
    let number = json.size("addition_time_embed_dim", None, WIDTHS)?;
    let input = json.size("projection_class_embeddings_input_dim", None, WIDTHS)?;
    match input.checked_sub(ADDED_NUMBERS * number) {
        Some(pooled) if pooled > 0 && number.is_multiple_of(2) => {
            Ok(Some(Addition { number, pooled }))
        }
        _ => {
            let wanted = format!("more than {ADDED_NUMBERS} numbers of an even width of {number}");
            Err(json.senseless("projection_class_embeddings_input_dim", wanted))
        }
    }
}

/// Everything other diffusion models put into this class and Stable Diffusion does not.
fn refuse_other_networks(json: &Json) -> Result<()> {
    json.only("_class_name", &[json!("UNet2DConditionModel")])?;
    json.only("act_fn", &[json!("silu"), json!("swish")])?;
    for key in [
        "class_embed_type",
        "num_class_embeds",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "cross_attention_norm",
        "time_embedding_act_fn",
        "time_embedding_dim",
        "timestep_post_act",
        "time_cond_proj_dim",
        "reverse_transformer_layers_per_block",
        "num_attention_heads",
    ] {
        json.only(key, &[])?;
    }
    for key in [
        "dual_cross_attention",
        "class_embeddings_concat",
        "resnet_skip_time_act",
        "center_input_sample",
    ] {
        json.only(key, &[json!(false)])?;
    }
    json.only("resnet_time_scale_shift", &[json!("default")])?;
    json.only("time_embedding_type", &[json!("positional")])?;
    json.only("attention_type", &[json!("default")])?;
    json.only("mid_block_only_cross_attention", &[json!(false)])?;
    json.only("conv_in_kernel", &[json!(3)])?;
    json.only("conv_out_kernel", &[json!(3)])?;
    json.only("downsample_padding", &[json!(1)])?;
    json.only("mid_block_scale_factor", &[json!(1), json!(1.0)])?;
    json.only("resnet_out_scale_factor", &[json!(1), json!(1.0)])
}

fn levels(json: &Json, channels: &[usize]) -> Result<Vec<Level>> {
    let count = channels.len();
    let down = json.crossed("down_block_types", "DownBlock2D", "CrossAttnDownBlock2D", count)?;
    let up = json.crossed("up_block_types", "UpBlock2D", "CrossAttnUpBlock2D", count)?;
    let heads = json.size_per_level("attention_head_dim", Some(8), count, COUNTS)?;
    let blocks = json.size_per_level("transformer_layers_per_block", Some(1), count, COUNTS)?;
    let only_cross = only_cross_attention(json, count)?;
    (0..count)
        .map(|level| {
            if !channels[level].is_multiple_of(heads[level]) {
                return Err(json
                    .senseless("attention_head_dim", format!("a divisor of {}", channels[level])));
            }
            Ok(Level {
                channels: channels[level],
                heads: heads[level],
                down_transformers: down[level].then_some(blocks[level]),
                // The way up is listed innermost first.
                up_transformers: up[count - 1 - level].then_some(blocks[level]),
                only_cross_attention: only_cross[level],
            })
        })
        .collect()
}

fn only_cross_attention(json: &Json, count: usize) -> Result<Vec<bool>> {
    match json.value("only_cross_attention") {
        Some(Value::Array(list)) if list.len() == count && list.iter().all(Value::is_boolean) => {
            Ok(list.iter().map(|value| value == &json!(true)).collect())
        }
        Some(Value::Array(_)) => {
            Err(json.senseless("only_cross_attention", format!("{count} switches")))
        }
        _ => Ok(vec![json.flag("only_cross_attention", false)?; count]),
    }
}

/// One width, or a list that repeats it.
fn cross_attention(json: &Json, count: usize) -> Result<usize> {
    let widths = json.size_per_level("cross_attention_dim", Some(1280), count, WIDTHS)?;
    if widths.iter().any(|width| *width != widths[0]) {
        return Err(json.unsupported("cross_attention_dim", "one width for all levels"));
    }
    Ok(widths[0])
}

/// Height and width in latent cells.
fn sample_size(json: &Json) -> Result<(usize, usize)> {
    let sides = json.size_per_level("sample_size", Some(64), 2, 1..=4096)?;
    Ok((sides[0], sides[1]))
}
