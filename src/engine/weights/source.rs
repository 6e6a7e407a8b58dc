//! Where a model comes from: a folder in the diffusers layout, or one file. Both give configs, tokenizers and weights
//! under the names of the folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::folder::check_links;
use super::lora::{self, LoraFile};
use super::single_file::{Family, SingleFile, autoencoder, beside};
use super::{Store, Weights};
use crate::engine::config::Json;
use crate::engine::config::scheduler::Prediction;
use crate::engine::device::Compute;
use crate::engine::prompt::PromptTokenizer;
use crate::engine::residency::Residency;
use crate::engine::{Error, Result};

/// Parts that a LoRA may change.
const LORA_PARTS: &[&str] = &["unet", "text_encoder", "text_encoder_2"];

/// How a model is loaded, beyond where it lies.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadOptions {
    /// A diffusers folder whose configs and tokenizers describe a one-file model, where its shapes do not say enough.
    pub config: Option<PathBuf>,
    /// A file to take the autoencoder from; a folder's own config goes on describing it.
    pub vae: Option<PathBuf>,
    /// Whether the averaged UNet of a one-file model is taken, if the file has it.
    pub ema: bool,
    /// What the network predicts, where that is known better than the file tells.
    pub prediction: Option<Prediction>,
    /// LoRAs, applied in order.
    pub loras: Vec<LoraFile>,
    /// Which parts stay in memory.
    pub residency: Residency,
}

/// An opened model: headers are checked, no tensor is read.
pub(in crate::engine) struct Source {
    folder: Option<PathBuf>,
    configs: BTreeMap<&'static str, Json>,
    stores: BTreeMap<&'static str, Arc<Store>>,
    prediction: Option<Prediction>,
    notes: Vec<String>,
}

impl Source {
    /// Opens the folder or file at `path`.
    pub(in crate::engine) fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let mut source = Self {
            folder: Some(path.to_path_buf()),
            configs: BTreeMap::new(),
            stores: BTreeMap::new(),
            prediction: options.prediction,
            notes: Vec::new(),
        };
        if path.is_file() {
            source.take_file(path, options)?;
        } else {
            check_links(path)?;
            if let Some(vae) = &options.vae {
                let mut store = Store::open(vae, vec![vae.clone()])?;
                // The family tells the scaling only, and that is in the folder's config.
                (_, store.entries) = autoencoder(&store, Family::StableDiffusion1)?;
                source.stores.insert("vae", Arc::new(store));
            }
        }
        Ok(source)
    }

    fn take_file(&mut self, path: &Path, options: &LoadOptions) -> Result<()> {
        let store = Store::open(path, vec![path.to_path_buf()])?;
        let vae = options.vae.as_deref();
        let vae_store = vae.map(|vae| Store::open(vae, vec![vae.to_path_buf()])).transpose()?;
        let file = SingleFile::of(&store, options.ema, vae_store.as_ref())?;
        for (part, entries) in file.parts {
            let of = vae.filter(|_| part == "vae").unwrap_or(path);
            let mut store = Store::open(of, vec![of.to_path_buf()])?;
            store.entries = entries;
            self.stores.insert(part, Arc::new(store));
        }
        self.configs = file.configs;
        // A folder of the file's name may describe it better than its shapes do.
        let own = beside(path);
        self.folder = options.config.clone().or_else(|| own.is_dir().then_some(own));
        if file.family == Family::StableDiffusion2 && options.prediction.is_none() {
            self.notes.push(format!(
                "the file of Stable Diffusion 2 is taken for one of {}",
                file.prediction
            ));
        }
        Ok(())
    }

    /// What the user should know about how it was read.
    pub(in crate::engine) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The config at `name`, for example `unet/config.json`.
    pub(in crate::engine) fn json(&self, name: &str) -> Result<Json> {
        let path = self.folder.as_ref().map(|folder| folder.join(name));
        let json = match (self.configs.get(name), path) {
            (Some(inferred), Some(path)) if !path.is_file() => inferred.clone(),
            (Some(inferred), None) => inferred.clone(),
            (_, Some(path)) => Json::read(&path)?,
            (None, None) => {
                let wanted = "a config of the model".into();
                return Err(Error::Missing { path: PathBuf::from(name), wanted });
            }
        };
        match self.prediction {
            Some(prediction) if name.starts_with("scheduler/") => {
                Ok(json.with("prediction_type", prediction_name(prediction)))
            }
            _ => Ok(json),
        }
    }

    /// The tokenizer `part` for an encoder of `positions` positions and `vocabulary` entries.
    pub(in crate::engine) fn tokenizer(
        &self,
        part: &str,
        positions: usize,
        vocabulary: usize,
    ) -> Result<PromptTokenizer> {
        let folder = self.folder.as_ref().map(|folder| folder.join(part));
        match folder {
            Some(folder) if self.configs.is_empty() || folder.is_dir() => {
                PromptTokenizer::load(&folder, positions, vocabulary)
            }
            _ => {
                // Encoders of OpenCLIP were trained with zeros behind the end.
                let open_clip = part == "tokenizer_2" || self.is_open_clip();
                let pad = if open_clip { "!" } else { "<|endoftext|>" };
                PromptTokenizer::clip(pad, positions, vocabulary)
            }
        }
    }

    fn is_open_clip(&self) -> bool {
        let config = self.configs.get("text_encoder/config.json");
        config.is_some_and(|config| config.value("hidden_act") == Some(&json!("gelu")))
    }

    /// Applies `loras` to the weights handed out from now on.
    pub(in crate::engine) fn attach(&mut self, loras: &[LoraFile]) -> Result<()> {
        if loras.is_empty() {
            return Ok(());
        }
        for part in LORA_PARTS {
            if let (false, Some(folder)) = (self.stores.contains_key(part), &self.folder)
                && folder.join(part).is_dir()
            {
                self.stores.insert(part, Arc::new(Store::open_part(&folder.join(part))?));
            }
        }
        let mut stores: BTreeMap<&'static str, Store> = BTreeMap::new();
        for part in LORA_PARTS {
            if let Some(store) = self.stores.remove(part) {
                let store = Arc::into_inner(store).expect("no weights were handed out yet");
                stores.insert(part, store);
            }
        }
        for file in loras {
            self.notes.extend(lora::attach(file, &mut stores)?);
        }
        self.stores.extend(stores.into_iter().map(|(part, store)| (part, Arc::new(store))));
        Ok(())
    }

    /// The weights of `part`.
    pub(in crate::engine) fn weights(&self, part: &str, compute: &Compute) -> Result<Weights> {
        match (self.stores.get(part), &self.folder) {
            (Some(store), _) => Ok(Weights::of_store(store.clone(), compute)),
            (None, Some(folder)) => Weights::open(&folder.join(part), compute),
            (None, None) => {
                let wanted = "a part of the model".into();
                Err(Error::Missing { path: PathBuf::from(part), wanted })
            }
        }
    }
}

fn prediction_name(prediction: Prediction) -> Value {
    json!(match prediction {
        Prediction::Epsilon => "epsilon",
        Prediction::Velocity => "v_prediction",
        Prediction::Sample => "sample",
    })
}

/// The weights of each part of the one-file model at `path`, under their diffusers names.
pub fn open_single_file(
    path: &Path,
    options: &LoadOptions,
    compute: &Compute,
) -> Result<BTreeMap<&'static str, Weights>> {
    let source = Source::open(path, options)?;
    let stores = source.stores.iter();
    Ok(stores.map(|(part, store)| (*part, Weights::of_store(store.clone(), compute))).collect())
}

/// The weights of the component in `folder` with `loras` applied.
pub fn open_with_loras(
    folder: &Path,
    part: &'static str,
    loras: &[LoraFile],
    compute: &Compute,
) -> Result<Weights> {
    let mut stores = BTreeMap::from([(part, Store::open_part(folder)?)]);
    for file in loras {
        lora::attach(file, &mut stores)?;
    }
    let store = stores.remove(part).expect("it was put in");
    Ok(Weights::of_store(Arc::new(store), compute))
}
