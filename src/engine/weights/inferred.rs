//! Configs of a one-file model, in the words of a diffusers folder, from the shapes of its tensors.
//!
//! What no shape tells (heads, groups of the norms, scaling, the noise schedule) is as the family was published.

use serde_json::{Value, json};

use super::naming::{Naming, UnetBlocks};
use super::single_file::{
    CLIP, Family, MOST, Marks, Names, OPEN_CLIP, UNET, XL_CLIP, XL_OPEN_CLIP, unet_context,
};
use crate::engine::Result;

/// Levels of a UNet as its names and shapes give them.
struct Levels {
    channels: Vec<usize>,
    resnets: Vec<usize>,
    transformers: Vec<usize>,
}

fn levels(names: &Names<'_>) -> Result<Levels> {
    let mut levels = Levels { channels: vec![0], resnets: vec![0], transformers: vec![0] };
    let at = |index: usize, rest: &str| format!("{UNET}input_blocks.{index}.{rest}");
    for index in 1..MOST {
        let level = levels.channels.len() - 1;
        let conv = at(index, "0.in_layers.2.weight");
        if names.has(&conv) {
            levels.channels[level] = names.side(&conv, 0)?;
            levels.resnets[level] += 1;
            let blocks = names
                .count(|block| at(index, &format!("1.transformer_blocks.{block}.norm1.weight")));
            levels.transformers[level] = levels.transformers[level].max(blocks);
        } else if names.has(&at(index, "0.op.weight")) {
            levels.channels.push(0);
            levels.resnets.push(0);
            levels.transformers.push(0);
        } else {
            break;
        }
    }
    let layers = levels.resnets[0];
    if layers == 0 || levels.resnets.iter().any(|count| *count != layers) {
        return Err(names.unsupported("a UNet whose levels are of different depth"));
    }
    Ok(levels)
}

pub(super) fn unet_config(
    names: &Names<'_>,
    family: Family,
    marks: &Marks,
) -> Result<(Value, UnetBlocks)> {
    let Levels { channels, resnets, transformers } = levels(names)?;
    let layers = resnets[0];
    let crossed = |index: usize| {
        names.has(&format!("{UNET}output_blocks.{index}.1.transformer_blocks.0.norm1.weight"))
    };
    let up_attention: Vec<bool> =
        (0..channels.len()).map(|level| crossed(level * (layers + 1))).collect();
    let linear = names.entries.iter().any(|(name, entry)| {
        name.starts_with(UNET) && name.ends_with(".1.proj_in.weight") && entry.shape.len() == 2
    });
    let heads: Vec<usize> = channels
        .iter()
        .map(|channels| match family {
            Family::StableDiffusion1 => common_divisor(*channels, 8),
            _ if channels.is_multiple_of(64) => channels / 64,
            _ => common_divisor(*channels, 8),
        })
        .collect();
    let kinds = |crossed: &[bool], plain: &str, cross: &str| -> Vec<String> {
        crossed.iter().map(|crossed| if *crossed { cross } else { plain }.to_owned()).collect()
    };
    let down: Vec<bool> = transformers.iter().map(|blocks| *blocks > 0).collect();
    let sample_size = match (family, marks.prediction) {
        (Family::StableDiffusionXl, _) => 128,
        (Family::StableDiffusion2, "v_prediction") => 96,
        _ => 64,
    };
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": names.side(&format!("{UNET}input_blocks.0.0.weight"), 1)?,
        "out_channels": names.side(&format!("{UNET}out.2.weight"), 0)?,
        "layers_per_block": layers,
        "cross_attention_dim": unet_context(names)
            .ok_or_else(|| names.unsupported("a UNet that looks at no text"))?,
        "attention_head_dim": heads,
        "norm_num_groups": groups(&channels),
        "use_linear_projection": linear,
        "upcast_attention": family == Family::StableDiffusion2,
        "down_block_types": kinds(&down, "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": kinds(&up_attention, "UpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block":
            transformers.iter().map(|blocks| (*blocks).max(1)).collect::<Vec<_>>(),
        "block_out_channels": channels,
    });
    if family == Family::StableDiffusionXl {
        let added = names.side(&format!("{UNET}label_emb.0.0.weight"), 1)?;
        let pooled = names.side(&format!("{XL_OPEN_CLIP}text_projection"), 1)?;
        config["addition_embed_type"] = json!("text_time");
        // Six numbers are told: original size, corner of the crop, size aimed at.
        config["addition_time_embed_dim"] = json!(added.saturating_sub(pooled) / 6);
        config["projection_class_embeddings_input_dim"] = json!(added);
    }
    Ok((config, UnetBlocks { layers, up_attention }))
}

/// 32 groups as published; the largest power of two that fits where a width is no multiple.
fn groups(channels: &[usize]) -> usize {
    channels.iter().fold(32, |groups, channels| common_divisor(groups, *channels))
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

pub(super) fn vae_config(
    names: &Names<'_>,
    prefix: &str,
    family: Family,
) -> Result<(Value, Naming)> {
    let at = |name: &str| format!("{prefix}{name}");
    let diffusers = names.any(&at("encoder.down_blocks."));
    let conv = |level: usize, layer: usize| {
        if diffusers {
            at(&format!("encoder.down_blocks.{level}.resnets.{layer}.conv1.weight"))
        } else {
            at(&format!("encoder.down.{level}.block.{layer}.conv1.weight"))
        }
    };
    let levels = names.count(|level| conv(level, 0)).max(1);
    let channels =
        (0..levels).map(|level| names.side(&conv(level, 0), 0)).collect::<Result<Vec<_>>>()?;
    let layers = names.count(|layer| conv(0, layer));
    let scaling = if family == Family::StableDiffusionXl { 0.13025 } else { 0.18215 };
    let config = json!({
        "_class_name": "AutoencoderKL",
        "in_channels": names.side(&at("encoder.conv_in.weight"), 1)?,
        "out_channels": names.side(&at("decoder.conv_out.weight"), 0)?,
        "latent_channels": names.side(&at("decoder.conv_in.weight"), 1)?,
        "layers_per_block": layers,
        "norm_num_groups": groups(&channels),
        "scaling_factor": scaling,
        "force_upcast": true,
        "use_quant_conv": names.has(&at("quant_conv.weight")),
        "use_post_quant_conv": names.has(&at("post_quant_conv.weight")),
        "block_out_channels": channels,
    });
    let naming = if diffusers { Naming::same() } else { Naming::vae(levels, layers) };
    Ok((config, naming))
}

/// Part, prefix, config and layers of each text encoder.
pub(super) fn text_configs(names: &Names<'_>, family: Family) -> Result<Vec<TextPart>> {
    match family {
        Family::StableDiffusion1 => Ok(vec![clip_config(names, "text_encoder", CLIP)?]),
        Family::StableDiffusion2 => {
            // As published: the last layer is left out, and the final norm follows the one before.
            let (part, prefix, mut config, layers) =
                open_clip_config(names, "text_encoder", OPEN_CLIP)?;
            config["num_hidden_layers"] = json!(layers.saturating_sub(1).max(1));
            Ok(vec![(part, prefix, config, layers)])
        }
        Family::StableDiffusionXl => Ok(vec![
            clip_config(names, "text_encoder", XL_CLIP)?,
            open_clip_config(names, "text_encoder_2", XL_OPEN_CLIP)?,
        ]),
    }
}

/// Part, prefix, config and layers of a text encoder.
type TextPart = (&'static str, &'static str, Value, usize);

fn clip_config(names: &Names<'_>, part: &'static str, prefix: &'static str) -> Result<TextPart> {
    let root = format!("{prefix}text_model.");
    let root = if names.any(&root) { root } else { prefix.to_owned() };
    let at = |name: &str| format!("{root}{name}");
    let layers = names.count(|layer| at(&format!("encoder.layers.{layer}.layer_norm1.weight")));
    let config = text_config(
        names,
        [
            &at("embeddings.token_embedding.weight"),
            &at("embeddings.position_embedding.weight"),
            &at("encoder.layers.0.mlp.fc1.weight"),
        ],
        layers,
        "quick_gelu",
    )?;
    Ok((part, prefix, config, layers))
}

fn open_clip_config(
    names: &Names<'_>,
    part: &'static str,
    prefix: &'static str,
) -> Result<TextPart> {
    let at = |name: &str| format!("{prefix}{name}");
    let layers = names.count(|layer| at(&format!("transformer.resblocks.{layer}.ln_1.weight")));
    let mut config = text_config(
        names,
        [
            &at("token_embedding.weight"),
            &at("positional_embedding"),
            &at("transformer.resblocks.0.mlp.c_fc.weight"),
        ],
        layers,
        "gelu",
    )?;
    if let Ok(width) = names.side(&at("text_projection"), 1) {
        config["projection_dim"] = json!(width);
        config["architectures"] = json!(["CLIPTextModelWithProjection"]);
    }
    Ok((part, prefix, config, layers))
}

fn text_config(
    names: &Names<'_>,
    [tokens, positions, inner]: [&str; 3],
    layers: usize,
    activation: &str,
) -> Result<Value> {
    let hidden = names.side(tokens, 1)?;
    // Heads of 64 in every published one.
    let heads = if hidden.is_multiple_of(64) { hidden / 64 } else { common_divisor(hidden, 4) };
    Ok(json!({
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": activation,
        "hidden_size": hidden,
        "intermediate_size": names.side(inner, 0)?,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": names.side(positions, 0)?,
        "vocab_size": names.side(tokens, 0)?,
        "eos_token_id": 2,
    }))
}

pub(super) fn scheduler(family: Family, marks: &Marks) -> Value {
    let class = match family {
        Family::StableDiffusion1 => "PNDMScheduler",
        Family::StableDiffusion2 => "DDIMScheduler",
        Family::StableDiffusionXl => "EulerDiscreteScheduler",
    };
    let mut config = json!({
        "_class_name": class,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": marks.prediction,
        "timestep_spacing": if marks.zero_snr { "trailing" } else { "leading" },
        "steps_offset": 1,
        "rescale_betas_zero_snr": marks.zero_snr,
    });
    if family != Family::StableDiffusionXl {
        config["clip_sample"] = json!(false);
        config["set_alpha_to_one"] = json!(false);
    }
    if family == Family::StableDiffusion1 {
        config["skip_prk_steps"] = json!(true);
    }
    config
}

pub(super) fn model_index(family: Family) -> Value {
    let class = match family {
        Family::StableDiffusionXl => "StableDiffusionXLPipeline",
        _ => "StableDiffusionPipeline",
    };
    json!({"_class_name": class, "force_zeros_for_empty_prompt": true})
}
