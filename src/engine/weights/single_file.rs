//! One file that holds a whole model in the CompVis layout: what it is, its configs, and its parts by diffusers names.
//!
//! Nothing but names, shapes and markers of the file is used. Counts and widths come from the shapes; what no shape
//! tells (heads, groups of the norms, the noise schedule) is as the family was published.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::header::Entry;
use super::inferred::{model_index, scheduler, text_configs, unet_config, vae_config};
use super::naming::Naming;
use super::{Store, shown};
use crate::engine::config::Json;
use crate::engine::{Error, Result};

pub(super) const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
pub(super) const CLIP: &str = "cond_stage_model.transformer.";
pub(super) const OPEN_CLIP: &str = "cond_stage_model.model.";
pub(super) const XL_CLIP: &str = "conditioner.embedders.0.transformer.";
pub(super) const XL_OPEN_CLIP: &str = "conditioner.embedders.1.model.";

/// Most blocks, levels and layers that are counted.
pub(super) const MOST: usize = 128;

/// Other models that come as one file, by a name in them.
const OTHERS: &[(&str, &str)] = &[
    ("model.diffusion_model.double_blocks.", "a Flux model"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 model"),
    ("double_blocks.", "a Flux model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("model.diffusion_model.time_stack", "a video model"),
    (
        "conditioner.embedders.0.open_clip.",
        "a Stable Video Diffusion model: the diffusers folder is read",
    ),
    ("control_model.", "a ControlNet"),
    ("lora_unet_", "a LoRA, which goes with a model"),
    ("lora_te_", "a LoRA, which goes with a model"),
    ("unet.", "a LoRA or a set of diffusers weights, not a whole model"),
    ("first_stage_model.", "an autoencoder, not a whole model"),
    ("decoder.conv_in.", "an autoencoder, not a whole model"),
];

/// What a whole-model file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1.
    StableDiffusion1,
    /// Stable Diffusion 2.
    StableDiffusion2,
    /// Stable Diffusion XL.
    StableDiffusionXl,
}

impl Family {
    /// `stable-diffusion-1`, `stable-diffusion-2` or `stable-diffusion-xl`.
    pub fn name(self) -> &'static str {
        match self {
            Self::StableDiffusion1 => "stable-diffusion-1",
            Self::StableDiffusion2 => "stable-diffusion-2",
            Self::StableDiffusionXl => "stable-diffusion-xl",
        }
    }
}

/// The parts of a one-file model.
#[derive(Debug)]
pub(super) struct SingleFile {
    pub(super) family: Family,
    /// `v_prediction` or `epsilon`.
    pub(super) prediction: &'static str,
    /// Whether the last training step is pure noise.
    pub(super) zero_snr: bool,
    /// Configs by their path in a diffusers folder.
    pub(super) configs: BTreeMap<&'static str, Json>,
    /// Tensors of each part by their diffusers names.
    pub(super) parts: BTreeMap<&'static str, HashMap<String, Entry>>,
    /// Names that belong to no part.
    pub(super) strays: Vec<String>,
}

/// Where names and shapes are looked up.
pub(super) struct Names<'a> {
    path: &'a Path,
    pub(super) entries: &'a HashMap<String, Entry>,
}

impl Names<'_> {
    pub(super) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    pub(super) fn any(&self, prefix: &str) -> bool {
        self.entries.keys().any(|name| name.starts_with(prefix))
    }

    /// The side `index` of the tensor `name`, which must be there.
    pub(super) fn side(&self, name: &str, index: usize) -> Result<usize> {
        let entry = self.entries.get(name).ok_or_else(|| Error::TensorsMissing {
            path: self.path.to_path_buf(),
            names: vec![name.to_owned()],
        })?;
        entry
            .shape
            .get(index)
            .copied()
            .filter(|side| *side > 0)
            .ok_or_else(|| Error::TensorRank { name: shown(name), got: entry.shape.len() })
    }

    /// How many of `name(0)`, `name(1)`, … are there.
    pub(super) fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..MOST).take_while(|index| self.has(&name(*index))).count()
    }

    pub(super) fn unsupported(&self, what: impl Into<String>) -> Error {
        Error::WeightsUnsupported { path: self.path.to_path_buf(), what: what.into() }
    }
}

impl SingleFile {
    /// What `store`, opened from one file, holds. `ema` prefers the averaged UNet where there is one; `vae` is another
    /// file to take the autoencoder from.
    pub(super) fn of(store: &Store, ema: bool, vae: Option<&Store>) -> Result<Self> {
        let names = Names { path: &store.place, entries: &store.entries };
        let family = family(&names)?;
        let marks = Marks::of(&names, &store.metadata, family);
        let (unet, blocks) = unet_config(&names, family, &marks)?;
        let mut file = Self {
            family,
            prediction: marks.prediction,
            zero_snr: marks.zero_snr,
            configs: BTreeMap::new(),
            parts: BTreeMap::new(),
            strays: Vec::new(),
        };
        let mut parts = vec![("unet", UNET, Naming::unet(&blocks))];
        file.config("unet/config.json", unet)?;
        let vae_names = vae.map_or(Names { path: names.path, entries: names.entries }, |vae| {
            Names { path: &vae.place, entries: &vae.entries }
        });
        if vae.is_none() {
            let (config, naming) = vae_config(&vae_names, VAE, family)?;
            file.config("vae/config.json", config)?;
            parts.push(("vae", VAE, naming));
        }
        for (part, prefix, config, layers) in text_configs(&names, family)? {
            file.config(
                if part == "text_encoder" {
                    "text_encoder/config.json"
                } else {
                    "text_encoder_2/config.json"
                },
                config,
            )?;
            parts.push((part, prefix, Naming::open_clip(layers)));
        }
        file.config("model_index.json", model_index(family))?;
        file.config("scheduler/scheduler_config.json", scheduler(family, &marks))?;
        file.share_out(&store.entries, &parts, ema);
        if let Some(vae) = vae {
            let (config, part) = autoencoder(vae, family)?;
            file.config("vae/config.json", config)?;
            file.parts.insert("vae", part);
        }
        Ok(file)
    }

    fn config(&mut self, name: &'static str, value: Value) -> Result<()> {
        self.configs.insert(name, Json::from_value(name, value)?);
        Ok(())
    }

    /// Gives each tensor to its part, under its diffusers name.
    fn share_out(
        &mut self,
        entries: &HashMap<String, Entry>,
        parts: &[(&'static str, &'static str, Naming)],
        ema: bool,
    ) {
        for (part, ..) in parts {
            self.parts.insert(part, HashMap::new());
        }
        for (name, entry) in entries {
            let found = parts.iter().find_map(|(part, prefix, naming)| {
                let rest = name.strip_prefix(prefix)?;
                Some((*part, renamed(part, prefix, rest, entry, naming)?))
            });
            let Some((part, tensors)) = found else {
                self.strays.push(name.clone());
                continue;
            };
            let averaged = (ema && part == "unet").then(|| averaged(entries, name)).flatten();
            let into = self.parts.get_mut(part).expect("every part was put in");
            for (name, entry) in tensors {
                into.insert(name, averaged.cloned().unwrap_or(entry));
            }
        }
        self.strays.sort_unstable();
    }
}

/// The autoencoder in a file of its own or of a whole model, in either layout: its config and its tensors.
pub(super) fn autoencoder(
    store: &Store,
    family: Family,
) -> Result<(Value, HashMap<String, Entry>)> {
    let names = Names { path: &store.place, entries: &store.entries };
    let prefix = if names.any(VAE) { VAE } else { "" };
    let (config, naming) = vae_config(&names, prefix, family)?;
    let mut part = HashMap::new();
    for (name, entry) in &store.entries {
        let tensors =
            name.strip_prefix(prefix).and_then(|rest| renamed("vae", prefix, rest, entry, &naming));
        part.extend(tensors.into_iter().flatten());
    }
    Ok((config, part))
}

/// The averaged twin of a UNet tensor: its name has lost the dots.
fn averaged<'a>(entries: &'a HashMap<String, Entry>, name: &str) -> Option<&'a Entry> {
    let bare = name.strip_prefix("model.")?.replace('.', "");
    entries.get(&format!("model_ema.{bare}"))
}

/// The tensors that `entry`, called `rest` behind its part's prefix, gives in the diffusers layout.
fn renamed(
    part: &str,
    prefix: &str,
    rest: &str,
    entry: &Entry,
    naming: &Naming,
) -> Option<Vec<(String, Entry)>> {
    let one = |name: String| Some(vec![(name, entry.clone())]);
    match prefix {
        CLIP | XL_CLIP if rest.ends_with("position_ids") => None,
        CLIP | XL_CLIP if rest.starts_with("text_model.") => one(rest.to_owned()),
        CLIP | XL_CLIP => one(format!("text_model.{rest}")),
        OPEN_CLIP | XL_OPEN_CLIP => open_clip(rest, entry, naming),
        _ => {
            let name = naming.to_diffusers(rest)?;
            let mut entry = entry.clone();
            // The autoencoder's attention was once made of 1x1 convolutions.
            if part == "vae" && name.contains(".attentions.") && entry.shape.len() == 4 {
                entry.shape.truncate(2);
            }
            Some(vec![(name, entry)])
        }
    }
}

/// OpenCLIP packs query, key and value into one matrix and stores the projection the other way round.
fn open_clip(rest: &str, entry: &Entry, naming: &Naming) -> Option<Vec<(String, Entry)>> {
    match rest {
        "text_projection" => {
            let mut entry = Entry { transposed: true, ..entry.clone() };
            entry.shape.reverse();
            return Some(vec![("text_projection.weight".to_owned(), entry)]);
        }
        "text_projection.weight" => return Some(vec![(rest.to_owned(), entry.clone())]),
        "logit_scale" => return None,
        _ => {}
    }
    let Some((layer, kind)) = rest.split_once(".attn.in_proj_") else {
        return Some(vec![(naming.to_diffusers(rest)?, entry.clone())]);
    };
    let layer = naming.to_diffusers(&format!("{layer}."))?;
    let mut shape = entry.shape.clone();
    let rows = shape.first().copied().filter(|rows| rows.is_multiple_of(3))?;
    shape[0] = rows / 3;
    let bytes = entry.bytes / 3;
    let split = ["q", "k", "v"].iter().zip(0u64..).map(|(letter, index)| {
        let start = entry.start + index * bytes as u64;
        let entry = Entry { shape: shape.clone(), start, bytes, ..entry.clone() };
        (format!("{layer}self_attn.{letter}_proj.{kind}"), entry)
    });
    Some(split.collect())
}

fn family(names: &Names<'_>) -> Result<Family> {
    if !names.has(&format!("{UNET}input_blocks.0.0.weight")) {
        let other = OTHERS.iter().find(|(prefix, _)| names.any(prefix));
        return Err(
            names.unsupported(other.map_or("no model in a layout that is known", |(_, what)| what))
        );
    }
    if let Some((_, what)) = OTHERS[..7].iter().find(|(prefix, _)| names.any(prefix)) {
        return Err(names.unsupported(*what));
    }
    if names.any(XL_CLIP) || names.any(XL_OPEN_CLIP) {
        return Ok(Family::StableDiffusionXl);
    }
    if names.any("conditioner.embedders.0.model.") {
        return Err(names.unsupported("a Stable Diffusion XL refiner, which is not built in"));
    }
    if names.any(OPEN_CLIP) {
        return Ok(Family::StableDiffusion2);
    }
    if names.any("cond_stage_model.") {
        return Ok(Family::StableDiffusion1);
    }
    // Without a text encoder the width of its output decides.
    match unet_context(names) {
        Some(768) => Ok(Family::StableDiffusion1),
        Some(1024) => Ok(Family::StableDiffusion2),
        Some(2048) => Ok(Family::StableDiffusionXl),
        _ => Err(names.unsupported("a model without a text encoder of a width that is not known")),
    }
}

/// Width of the text that the UNet looks at.
pub(super) fn unet_context(names: &Names<'_>) -> Option<usize> {
    let name = names.entries.keys().find(|name| {
        name.starts_with(UNET) && name.ends_with(".transformer_blocks.0.attn2.to_k.weight")
    })?;
    names.side(name, 1).ok()
}

/// What markers say about the noise.
pub(super) struct Marks {
    pub(super) prediction: &'static str,
    pub(super) zero_snr: bool,
}

impl Marks {
    fn of(names: &Names<'_>, metadata: &BTreeMap<String, String>, family: Family) -> Self {
        let said = metadata.get("modelspec.prediction_type").map(String::as_str);
        let prediction = match (said, family) {
            (Some("v" | "v_prediction"), _) => "v_prediction",
            (Some("epsilon"), _) => "epsilon",
            _ if names.has("v_pred") => "v_prediction",
            // Of version 2 only the small base model predicts noise. It was saved at this step.
            (_, Family::StableDiffusion2) if !is_base(metadata) => "v_prediction",
            _ => "epsilon",
        };
        Self { prediction, zero_snr: names.has("ztsnr") }
    }
}

fn is_base(metadata: &BTreeMap<String, String>) -> bool {
    let architecture = metadata.get("modelspec.architecture").map_or("", String::as_str);
    let resolution = metadata.get("modelspec.resolution").map_or("", String::as_str);
    architecture.contains("v2-512") || resolution.starts_with("512")
}

/// Where a file's path leads to things that lie beside it: `model.safetensors` to `model`.
pub(super) fn beside(path: &Path) -> PathBuf {
    path.with_extension("")
}
