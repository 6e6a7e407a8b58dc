//! Names of tensors in the CompVis layout of one-file checkpoints, and the same in the diffusers layout.
//!
//! Each part has one table of prefixes, made for its number of levels and layers; it is read in both directions.

use std::collections::BTreeSet;

/// Inside a resnet of the UNet.
const RESNET: &[(&str, &str)] = &[
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
];

/// Inside a resnet of the autoencoder.
const VAE_RESNET: &[(&str, &str)] = &[("nin_shortcut.", "conv_shortcut.")];

/// Inside the attention of the autoencoder.
const VAE_ATTENTION: &[(&str, &str)] = &[
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
];

/// Parts of the UNet that every one of them has once.
const UNET: &[(&str, &str)] = &[
    ("input_blocks.0.0.", "conv_in."),
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("middle_block.0.", "mid_block.resnets.0."),
    ("middle_block.1.", "mid_block.attentions.0."),
    ("middle_block.2.", "mid_block.resnets.1."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
];

/// Inside a layer of an OpenCLIP text encoder; the packed projection is split elsewhere.
const OPEN_CLIP_LAYER: &[(&str, &str)] = &[
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
];

/// Prefixes of one part in both layouts.
#[derive(Clone, Debug)]
pub(super) struct Naming {
    rows: Vec<Row>,
}

#[derive(Clone, Debug)]
struct Row {
    compvis: String,
    diffusers: String,
    inner: &'static [(&'static str, &'static str)],
}

/// Blocks of a UNet, as far as their numbers go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UnetBlocks {
    /// Resnets in a level on the way down.
    pub(super) layers: usize,
    /// Whether each level has attention on the way up, innermost first.
    pub(super) up_attention: Vec<bool>,
}

impl UnetBlocks {
    /// The blocks of a UNet whose diffusers names are `names`.
    pub(super) fn of_diffusers(names: &BTreeSet<&str>) -> Self {
        let any = |prefix: &str| {
            names.range(prefix..).next().is_some_and(|name| name.starts_with(prefix))
        };
        let count =
            |prefix: &str| (0..64).take_while(|index| any(&format!("{prefix}{index}."))).count();
        let levels = count("up_blocks.");
        Self {
            layers: count("down_blocks.0.resnets."),
            up_attention: (0..levels)
                .map(|level| any(&format!("up_blocks.{level}.attentions.")))
                .collect(),
        }
    }
}

impl Naming {
    /// Names of a UNet, without `model.diffusion_model.`.
    pub(super) fn unet(blocks: &UnetBlocks) -> Self {
        let mut naming = Self::fixed(UNET);
        for row in &mut naming.rows {
            if row.diffusers.contains(".resnets.") {
                row.inner = RESNET;
            }
        }
        let (levels, layers) = (blocks.up_attention.len(), blocks.layers);
        let mut index = 1;
        for level in 0..levels {
            for layer in 0..layers {
                naming.row(
                    format!("input_blocks.{index}.0."),
                    format!("down_blocks.{level}.resnets.{layer}."),
                    RESNET,
                );
                naming.row(
                    format!("input_blocks.{index}.1."),
                    format!("down_blocks.{level}.attentions.{layer}."),
                    &[],
                );
                index += 1;
            }
            if level + 1 < levels {
                naming.row(
                    format!("input_blocks.{index}.0.op."),
                    format!("down_blocks.{level}.downsamplers.0.conv."),
                    &[],
                );
                index += 1;
            }
        }
        for (level, attention) in blocks.up_attention.iter().enumerate() {
            for layer in 0..=layers {
                let index = level * (layers + 1) + layer;
                naming.row(
                    format!("output_blocks.{index}.0."),
                    format!("up_blocks.{level}.resnets.{layer}."),
                    RESNET,
                );
                if *attention {
                    naming.row(
                        format!("output_blocks.{index}.1."),
                        format!("up_blocks.{level}.attentions.{layer}."),
                        &[],
                    );
                }
                if layer == layers && level + 1 < levels {
                    naming.row(
                        format!("output_blocks.{index}.{}.conv.", 1 + usize::from(*attention)),
                        format!("up_blocks.{level}.upsamplers.0.conv."),
                        &[],
                    );
                }
            }
        }
        naming
    }

    /// Names of an autoencoder of `levels` levels with `layers` resnets each, without `first_stage_model.`.
    pub(super) fn vae(levels: usize, layers: usize) -> Self {
        let mut naming = Self::fixed(&[
            ("quant_conv.", "quant_conv."),
            ("post_quant_conv.", "post_quant_conv."),
        ]);
        for side in ["encoder", "decoder"] {
            for name in ["conv_in.", "conv_out."] {
                naming.row(format!("{side}.{name}"), format!("{side}.{name}"), &[]);
            }
            naming.row(format!("{side}.norm_out."), format!("{side}.conv_norm_out."), &[]);
            let mid = format!("{side}.mid_block");
            naming.row(
                format!("{side}.mid.attn_1."),
                format!("{mid}.attentions.0."),
                VAE_ATTENTION,
            );
            for index in 0..2 {
                naming.row(
                    format!("{side}.mid.block_{}.", index + 1),
                    format!("{mid}.resnets.{index}."),
                    VAE_RESNET,
                );
            }
        }
        for level in 0..levels {
            for layer in 0..layers {
                naming.row(
                    format!("encoder.down.{level}.block.{layer}."),
                    format!("encoder.down_blocks.{level}.resnets.{layer}."),
                    VAE_RESNET,
                );
            }
            for layer in 0..=layers {
                // CompVis numbers the way up from the outside, diffusers in the order of work.
                naming.row(
                    format!("decoder.up.{level}.block.{layer}."),
                    format!("decoder.up_blocks.{}.resnets.{layer}.", levels - 1 - level),
                    VAE_RESNET,
                );
            }
            naming.row(
                format!("encoder.down.{level}.downsample."),
                format!("encoder.down_blocks.{level}.downsamplers.0."),
                &[],
            );
            naming.row(
                format!("decoder.up.{level}.upsample."),
                format!("decoder.up_blocks.{}.upsamplers.0.", levels - 1 - level),
                &[],
            );
        }
        naming
    }

    /// Names of an OpenCLIP text encoder of `layers` layers, without what comes before `ln_final`.
    pub(super) fn open_clip(layers: usize) -> Self {
        let mut naming = Self::fixed(&[
            ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
            ("token_embedding.", "text_model.embeddings.token_embedding."),
            ("ln_final.", "text_model.final_layer_norm."),
        ]);
        for layer in 0..layers {
            naming.row(
                format!("transformer.resblocks.{layer}."),
                format!("text_model.encoder.layers.{layer}."),
                OPEN_CLIP_LAYER,
            );
        }
        naming
    }

    /// A file that has the diffusers names already.
    pub(super) fn same() -> Self {
        Self::fixed(&[("", "")])
    }

    fn fixed(rows: &[(&str, &str)]) -> Self {
        let mut naming = Self { rows: Vec::new() };
        for (compvis, diffusers) in rows {
            naming.row((*compvis).to_owned(), (*diffusers).to_owned(), &[]);
        }
        naming
    }

    fn row(
        &mut self,
        compvis: String,
        diffusers: String,
        inner: &'static [(&'static str, &'static str)],
    ) {
        self.rows.push(Row { compvis, diffusers, inner });
    }

    /// The diffusers name of a CompVis name.
    pub(super) fn to_diffusers(&self, name: &str) -> Option<String> {
        self.rows.iter().find_map(|row| {
            let rest = name.strip_prefix(&row.compvis)?;
            let inner = row
                .inner
                .iter()
                .find_map(|(from, to)| rest.strip_prefix(from).map(|rest| format!("{to}{rest}")));
            Some(format!("{}{}", row.diffusers, inner.as_deref().unwrap_or(rest)))
        })
    }

    /// The CompVis name of a diffusers name.
    pub(super) fn to_compvis(&self, name: &str) -> Option<String> {
        self.rows.iter().find_map(|row| {
            let rest = name.strip_prefix(&row.diffusers)?;
            let inner = row
                .inner
                .iter()
                .find_map(|(to, from)| rest.strip_prefix(from).map(|rest| format!("{to}{rest}")));
            Some(format!("{}{}", row.compvis, inner.as_deref().unwrap_or(rest)))
        })
    }
}
