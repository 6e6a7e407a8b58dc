//! LoRA and LoCon files: small matrices whose product is added to named weights while these are read.
//!
//! Three layouts are known: kohya (`lora_unet_…`, dots written as underscores, also with the block names of the
//! CompVis layout), diffusers (`unet.….lora_A`, older `….processor.to_q_lora.up`) and PEFT (`base_model.model.…`).
//! A weight W becomes W + scale · alpha/rank · up·down; with a middle matrix, as LoCon's Tucker form has, up·mid·down.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::contents::Kind;
use super::naming::{Naming, UnetBlocks};
use super::{Entry, Store, shown};
use crate::engine::config::Json;
use crate::engine::{Error, Result};

/// A LoRA with the strength it is applied at.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFile {
    /// The file.
    pub path: PathBuf,
    /// Multiplier of its deltas.
    pub scale: f64,
}

/// What one tensor of a LoRA is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Up,
    Down,
    Mid,
    Alpha,
}

/// Endings of names, longest first where one ends in another.
const ENDINGS: &[(&str, Role)] = &[
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_A.default.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_A.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_mid.weight", Role::Mid),
    (".lora.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    (".alpha", Role::Alpha),
];

/// Other kinds of deltas, which are not built in.
const OTHER_KINDS: &[(&str, &str)] = &[
    (".dora_scale", "DoRA"),
    (".hada_w1", "LoHa"),
    (".hada_w2", "LoHa"),
    (".lokr_w1", "LoKr"),
    (".lokr_w2", "LoKr"),
    (".oft_blocks", "OFT"),
    (".oft_diag", "OFT"),
    (".on_input", "IA3"),
    (".diff", "full differences"),
    (".lora_magnitude_vector", "DoRA"),
];

/// One pair of matrices, by names in their file.
#[derive(Debug, Default)]
struct Module {
    up: Option<String>,
    down: Option<String>,
    mid: Option<String>,
    alpha: Option<String>,
}

/// What is added to a weight.
#[derive(Clone, Debug)]
pub(super) struct Delta {
    file: Arc<Store>,
    up: String,
    down: String,
    mid: Option<String>,
    factor: f64,
}

impl Delta {
    /// The tensor `weight`, f32 from here on, with the delta added.
    pub(super) fn add_to(&self, weight: &Tensor) -> Result<Tensor> {
        let read = |name: &str| -> Result<Tensor> {
            let entry = &self.file.entries[name];
            Ok(self.file.tensor(name, entry)?.to_dtype(DType::F32)?)
        };
        let up = read(&self.up)?.flatten_from(1)?; // (out, a)
        let down = read(&self.down)?;
        let inner = match &self.mid {
            None => down.flatten_from(1)?, // (a, in · k)
            Some(mid) => {
                let mid = read(mid)?; // (a, b, kh, kw)
                let (a, b, height, width) = mid.dims4()?;
                let down = down.flatten_from(1)?; // (b, in)
                let input = down.dim(1)?;
                mid.permute((0, 2, 3, 1))?
                    .reshape((a * height * width, b))?
                    .matmul(&down)?
                    .reshape((a, height, width, input))?
                    .permute((0, 3, 1, 2))?
                    .contiguous()?
                    .flatten_from(1)?
            }
        };
        let delta = (up.matmul(&inner)? * self.factor)?.reshape(weight.shape())?;
        Ok((weight.to_dtype(DType::F32)? + delta)?)
    }
}

/// Adds the deltas of `file` to the parts in `stores`; says what could not be placed.
pub(super) fn attach(
    file: &LoraFile,
    stores: &mut BTreeMap<&'static str, Store>,
) -> Result<Option<String>> {
    let store = Arc::new(Store::open(&file.path, vec![file.path.clone()])?);
    let modules = modules(&store)?;
    let alphas = Alphas::of(&store)?;
    let tables: BTreeMap<&str, HashMap<String, String>> =
        stores.iter().map(|(part, store)| (*part, table(part, store))).collect();
    check_family(&store, stores)?;
    let (mut placed, mut lost) = (Vec::new(), Vec::new());
    for (name, module) in &modules {
        let (Some(up), Some(down)) = (&module.up, &module.down) else {
            return Err(unsupported(
                &store,
                format!("a LoRA whose `{}` lacks its other half", shown(name)),
            ));
        };
        let (part, key) = address(name);
        let Some(target) = tables.get(part).and_then(|table| table.get(&key)) else {
            lost.push(name);
            continue;
        };
        let rank = check_shapes(&store, module, [up, down], &stores[part], target)?;
        let alpha = match &module.alpha {
            Some(alpha) => scalar(&store, alpha)?,
            None => alphas.of_module(part, name).unwrap_or(rank),
        };
        let share = if alphas.root { alpha / rank.sqrt() } else { alpha / rank };
        let delta = Delta {
            file: store.clone(),
            up: up.clone(),
            down: down.clone(),
            mid: module.mid.clone(),
            factor: file.scale * share,
        };
        placed.push((part, target.clone(), delta));
    }
    if placed.is_empty() {
        let first =
            lost.first().map_or(String::new(), |name| format!(", the first is `{}`", shown(name)));
        return Err(unsupported(
            &store,
            format!(
                "a LoRA of another model: none of its {} weights is in this one{first}",
                lost.len()
            ),
        ));
    }
    for (part, target, delta) in placed {
        let into = stores.get_mut(part).expect("its table was made from it");
        into.deltas.entry(target).or_default().push(delta);
    }
    let name = file.path.file_name().unwrap_or_default().to_string_lossy();
    Ok((!lost.is_empty()).then(|| {
        format!(
            "{} of {} weights of the LoRA `{name}` are not in this model",
            lost.len(),
            modules.len()
        )
    }))
}

fn unsupported(store: &Store, what: String) -> Error {
    Error::WeightsUnsupported { path: store.place.clone(), what }
}

/// The modules of a LoRA by name.
fn modules(store: &Store) -> Result<BTreeMap<String, Module>> {
    let mut modules: BTreeMap<String, Module> = BTreeMap::new();
    for name in store.entries.keys() {
        if let Some((_, kind)) = OTHER_KINDS.iter().find(|(mark, _)| name.contains(mark)) {
            return Err(unsupported(
                store,
                format!("a file of {kind}, and LoRA is what can be applied"),
            ));
        }
        let Some((module, role)) = ENDINGS
            .iter()
            .find_map(|(ending, role)| name.strip_suffix(ending).map(|module| (module, *role)))
        else {
            return Err(unsupported(
                store,
                format!("no LoRA that is known: it has a `{}`", shown(name)),
            ));
        };
        let module = modules.entry(module.to_owned()).or_default();
        let slot = match role {
            Role::Up => &mut module.up,
            Role::Down => &mut module.down,
            Role::Mid => &mut module.mid,
            Role::Alpha => &mut module.alpha,
        };
        *slot = Some(name.clone());
    }
    if modules.is_empty() {
        return Err(unsupported(store, "an empty LoRA".into()));
    }
    Ok(modules)
}

/// The part a module belongs to, and its name there with dots written as underscores.
fn address(module: &str) -> (&'static str, String) {
    for (prefix, part) in [
        ("lora_unet_", "unet"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
        ("lora_te_", "text_encoder"),
    ] {
        if let Some(rest) = module.strip_prefix(prefix) {
            return (part, rest.to_owned());
        }
    }
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    let parts = [
        ("unet.", "unet"),
        ("text_encoder_2.", "text_encoder_2"),
        ("text_encoder.", "text_encoder"),
    ];
    let found = parts
        .iter()
        .find_map(|(prefix, part)| module.strip_prefix(prefix).map(|rest| (*part, rest)));
    let (part, rest) = found.unwrap_or_else(|| {
        let text = module.starts_with("text_model.") || module.starts_with("encoder.layers.");
        (if text { "text_encoder" } else { "unet" }, module)
    });
    let rest = rest.replace(".processor.", ".");
    let rest = if rest.ends_with(".to_out") { format!("{rest}.0") } else { rest };
    (part, rest.replace('.', "_"))
}

/// Every way a LoRA may call a weight of `part`, with the weight's name.
fn table(part: &str, store: &Store) -> HashMap<String, String> {
    let names: BTreeSet<&str> = store.entries.keys().map(String::as_str).collect();
    let naming = (part == "unet").then(|| Naming::unet(&UnetBlocks::of_diffusers(&names)));
    let mut table = HashMap::new();
    for name in names {
        let Some(base) = name.strip_suffix(".weight") else { continue };
        let mut insert = |key: &str| {
            table.insert(key.replace('.', "_"), name.to_owned());
        };
        insert(base);
        match &naming {
            Some(naming) => {
                let other = naming.to_compvis(name);
                if let Some(other) =
                    other.as_deref().and_then(|other| other.strip_suffix(".weight"))
                {
                    insert(other);
                }
            }
            None => match base.strip_prefix("text_model.") {
                Some(bare) => insert(bare),
                None => insert(&format!("text_model.{base}")),
            },
        }
    }
    table
}

/// Refuses a LoRA whose text width is another family's.
fn check_family(store: &Store, stores: &BTreeMap<&'static str, Store>) -> Result<()> {
    let own = text_width(&store.entries, DOWN_OF_KEYS);
    let model = stores.get("unet").and_then(|unet| text_width(&unet.entries, &["to_k.weight"]));
    match (own, model) {
        (Some(own), Some(model)) if own != model => Err(unsupported(
            store,
            format!(
                "a LoRA for {}, whose text is {own} wide: that of this model, {}, is {model} wide",
                family_of(own),
                family_of(model)
            ),
        )),
        _ => Ok(()),
    }
}

/// Width of the text that the first cross-attention found looks at.
fn text_width(entries: &HashMap<String, Entry>, endings: &[&str]) -> Option<usize> {
    let found = entries.iter().find(|(name, _)| {
        name.contains("attn2") && endings.iter().any(|ending| name.ends_with(ending))
    });
    found.and_then(|(_, entry)| entry.shape.get(1).copied())
}

/// Endings of the matrix that takes the text in.
const DOWN_OF_KEYS: &[&str] = &[
    "to_k.lora_down.weight",
    "to_k.lora_A.weight",
    "to_k.lora_A.default.weight",
    "to_k_lora.down.weight",
    "to_k.lora.down.weight",
];

fn family_of(width: usize) -> &'static str {
    match width {
        768 => "Stable Diffusion 1",
        1024 => "Stable Diffusion 2",
        2048 => "Stable Diffusion XL",
        _ => "another family",
    }
}

/// The rank, once the product of the matrices is seen to have the weight's shape.
fn check_shapes(
    store: &Store,
    module: &Module,
    [up, down]: [&String; 2],
    model: &Store,
    target: &str,
) -> Result<f64> {
    let shape = |name: &String| store.entries[name].shape.clone();
    let (up, down) = (shape(up), shape(down));
    let mid = module.mid.as_ref().map(shape);
    let wanted = &model.entries[target].shape;
    let size = |shape: &[usize]| shape.iter().product::<usize>();
    let fits = match (up.first(), down.first(), &mid) {
        (Some(out), Some(rank), None) => {
            size(&up) == out * rank
                && wanted.first() == Some(out)
                && *rank > 0
                && size(&down) / rank * out == size(wanted)
                && wanted.get(1) == down.get(1)
        }
        (Some(out), Some(rank), Some(mid)) => {
            mid.len() == 4
                && size(&up) == out * mid[0]
                && mid[1] == *rank
                && wanted.len() == 4
                && size(&down) == rank * wanted[1]
                && wanted[..] == [*out, wanted[1], mid[2], mid[3]]
        }
        _ => false,
    };
    if !fits {
        return Err(unsupported(
            store,
            format!(
                "a LoRA of another model: {up:?} and {down:?} do not give `{}` its shape {wanted:?}",
                shown(target)
            ),
        ));
    }
    #[expect(clippy::cast_precision_loss, reason = "a rank is small")]
    let rank = down[0] as f64;
    Ok(rank)
}

/// One number of the file.
fn scalar(store: &Store, name: &str) -> Result<f64> {
    let tensor = store.tensor(name, &store.entries[name])?.to_dtype(DType::F64)?.flatten_all()?;
    tensor
        .to_vec1::<f64>()?
        .first()
        .copied()
        .ok_or_else(|| Error::TensorRank { name: shown(name), got: 0 })
}

/// Alphas that are not tensors: in the header of diffusers' files, in `adapter_config.json` beside PEFT's.
#[derive(Default)]
struct Alphas {
    config: Option<Json>,
    /// Whether the share is alpha over the root of the rank.
    root: bool,
}

impl Alphas {
    fn of(store: &Store) -> Result<Self> {
        let beside = store.place.parent().unwrap_or(Path::new("")).join("adapter_config.json");
        let config = match store.metadata.get("lora_adapter_metadata") {
            Some(text) => {
                let value = serde_json::from_str(text).map_err(|error| Error::ConfigSyntax {
                    path: store.place.clone(),
                    problem: format!("`lora_adapter_metadata`: {error}"),
                })?;
                Some(Json::from_value("lora_adapter_metadata", value)?)
            }
            None if beside.is_file() => Some(Json::read(&beside)?),
            None => None,
        };
        let root = config.as_ref().is_some_and(|config| {
            ["use_rslora", "unet.use_rslora"]
                .iter()
                .any(|key| config.value(key) == Some(&Value::Bool(true)))
        });
        Ok(Self { config, root })
    }

    /// The alpha of the module `name` in `part`.
    fn of_module(&self, part: &str, name: &str) -> Option<f64> {
        let config = self.config.as_ref()?;
        for prefix in [format!("{part}."), String::new()] {
            let patterns =
                config.value(&format!("{prefix}alpha_pattern")).and_then(Value::as_object);
            for (pattern, alpha) in patterns.into_iter().flatten() {
                if name == pattern || name.ends_with(&format!(".{pattern}")) {
                    return alpha.as_f64();
                }
            }
            if let Some(alpha) = config.value(&format!("{prefix}lora_alpha")) {
                return alpha.as_f64();
            }
        }
        None
    }
}

/// What kind of LoRA `store` is; `None` when it is none.
pub(super) fn describe(store: &Store) -> Option<Kind> {
    let modules = modules(store).ok()?;
    let parts: BTreeSet<&'static str> = modules.keys().map(|name| address(name).0).collect();
    let ranks: BTreeSet<usize> = modules
        .values()
        .filter_map(|module| store.entries[module.down.as_ref()?].shape.first().copied())
        .collect();
    let first = modules.keys().next()?;
    let layout = if first.starts_with("lora_") {
        "kohya"
    } else if first.starts_with("base_model.") {
        "peft"
    } else {
        "diffusers"
    };
    let family = match text_width(&store.entries, DOWN_OF_KEYS) {
        Some(768) => "stable-diffusion-1",
        Some(1024) => "stable-diffusion-2",
        Some(2048) => "stable-diffusion-xl",
        _ => "unknown",
    };
    Some(Kind::Lora {
        family,
        layout,
        parts: parts.into_iter().collect(),
        modules: modules.len(),
        ranks: ranks.into_iter().collect(),
    })
}
