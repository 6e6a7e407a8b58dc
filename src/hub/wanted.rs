//! Which files of a model's repository or folder a run needs.

use std::collections::{BTreeMap, BTreeSet};

use super::manifest::Upstream;

/// Endings of pickles, which are never fetched.
const PICKLES: &[&str] = &["bin", "ckpt", "pt", "pth"];

/// The files among `listing` that a run of the model needs: those the patterns name; of the weights of one folder
/// the wanted variant, else the plain ones, else those of half precision.
pub(super) fn select(listing: &[String], upstream: &Upstream) -> Vec<String> {
    let named = |file: &&String| upstream.files.iter().any(|pattern| fits(file, pattern));
    let named: Vec<&String> = listing.iter().filter(named).collect();
    let wanted = upstream.variant.as_deref();
    let mut variants: BTreeMap<&str, BTreeSet<Option<&str>>> = BTreeMap::new();
    for file in named.iter().filter(|file| file.ends_with(".safetensors")) {
        variants.entry(folder(file)).or_default().insert(variant(file));
    }
    let best = |has: &BTreeSet<Option<&str>>| {
        [wanted, None, Some("fp16")].into_iter().find(|variant| has.contains(variant))
    };
    let chosen: BTreeMap<&str, Option<&str>> =
        variants.iter().filter_map(|(folder, has)| Some((*folder, best(has)?))).collect();
    let keep = |file: &&&String| {
        let is_config = !file.contains(".safetensors");
        let chosen = chosen.get(folder(file));
        is_config || chosen.is_some_and(|chosen| *chosen == variant(file))
    };
    named.iter().filter(keep).map(|file| (*file).clone()).collect()
}

/// Parts among the selected files that have a config and no weights.
pub(super) fn without_weights(selected: &[String]) -> Vec<String> {
    let is_part = |part: &&str| {
        matches!(*part, "unet" | "vae" | "image_encoder") || part.starts_with("text_encoder")
    };
    let has_weights = |part: &str| {
        selected.iter().any(|file| folder(file) == part && file.ends_with(".safetensors"))
    };
    let parts = selected.iter().filter_map(|file| file.strip_suffix("/config.json"));
    parts.filter(is_part).filter(|part| !has_weights(part)).map(str::to_owned).collect()
}

/// Pickles in folders of which nothing else can be had.
pub(super) fn only_pickles(listing: &[String], selected: &[String]) -> Vec<String> {
    let with_weights: BTreeSet<&str> = selected
        .iter()
        .filter(|file| file.ends_with(".safetensors"))
        .map(|file| folder(file))
        .collect();
    let configs: BTreeSet<&str> = selected.iter().map(|file| folder(file)).collect();
    let is_pickle = |file: &&String| {
        let ending = file.rsplit('.').next().unwrap_or_default();
        let folder = folder(file);
        PICKLES.contains(&ending)
            && !folder.is_empty()
            && configs.contains(folder)
            && !with_weights.contains(folder)
    };
    listing.iter().filter(is_pickle).cloned().collect()
}

fn folder(file: &str) -> &str {
    file.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// What stands between a weights file's name and its ending, as in `model.fp16.safetensors`,
/// `model.fp16-00001-of-00002.safetensors` and `model.safetensors.index.fp16.json`.
fn variant(file: &str) -> Option<&str> {
    let name = file.rsplit('/').next()?;
    let name = match name.split_once(".safetensors") {
        Some((_, index)) if !index.is_empty() => {
            index.strip_prefix(".index")?.strip_suffix("json")?
        }
        Some((stem, _)) => stem.split_once('.').map(|(_, variant)| variant)?,
        None => return None,
    };
    let name = name.trim_matches('.');
    let name = name.split_once("-0").map_or(name, |(variant, _)| variant);
    (!name.is_empty()).then_some(name)
}

/// Whether `file` is as `pattern` says, of which one `*` stands for anything but `/`.
fn fits(file: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => file == pattern,
        Some((before, after)) => file
            .strip_prefix(before)
            .and_then(|rest| rest.strip_suffix(after))
            .is_some_and(|middle| !middle.contains('/')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_told_by_the_name() {
        for (file, wanted) in [
            ("unet/diffusion_pytorch_model.safetensors", None),
            ("unet/diffusion_pytorch_model.fp16.safetensors", Some("fp16")),
            ("unet/diffusion_pytorch_model.non_ema.safetensors", Some("non_ema")),
            ("unet/model-00001-of-00002.safetensors", None),
            ("unet/model.fp16-00001-of-00002.safetensors", Some("fp16")),
            ("unet/model.safetensors.index.json", None),
            ("unet/model.safetensors.index.fp16.json", Some("fp16")),
            ("unet/config.json", None),
        ] {
            assert_eq!(variant(file), wanted, "{file}");
        }
    }

    #[test]
    fn a_run_gets_what_it_needs_and_nothing_else() {
        let listing = [
            "README.md",
            "model_index.json",
            "v1-5-pruned.safetensors",
            "v1-5-pruned.ckpt",
            "safety_checker/model.safetensors",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "text_encoder/pytorch_model.bin",
            "tokenizer/merges.txt",
            "unet/config.json",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/deep/model.safetensors",
            "vae/diffusion_pytorch_model.bin",
        ]
        .map(str::to_owned);
        let common = [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/merges.txt",
            "unet/config.json",
        ];
        for (variant, weights) in [
            (None, "unet/diffusion_pytorch_model.safetensors"),
            (Some("fp16"), "unet/diffusion_pytorch_model.fp16.safetensors"),
        ] {
            let upstream =
                Upstream { variant: variant.map(str::to_owned), ..Upstream::unknown("org/repo") };
            let selected = select(&listing, &upstream);
            let wanted: Vec<&str> =
                common.into_iter().chain([weights, "vae/config.json"]).collect();
            assert_eq!(selected, wanted);
            assert_eq!(only_pickles(&listing, &selected), ["vae/diffusion_pytorch_model.bin"]);
            assert_eq!(without_weights(&selected), ["vae"]);
        }
    }

    #[test]
    fn a_folder_without_the_wanted_variant_gives_another() {
        let listing = [
            "text_encoder/config.json",
            "text_encoder/model.fp16.safetensors",
            "unet/config.json",
            "unet/model.non_ema.safetensors",
            "vae/config.json",
            "vae/model.fp16.safetensors",
            "vae/model.safetensors",
        ]
        .map(str::to_owned);
        for (variant, vae) in [
            (None, "vae/model.safetensors"),
            (Some("fp16"), "vae/model.fp16.safetensors"),
            (Some("bf16"), "vae/model.safetensors"),
        ] {
            let upstream =
                Upstream { variant: variant.map(str::to_owned), ..Upstream::unknown("org/repo") };
            let selected = select(&listing, &upstream);
            let weights: Vec<&String> =
                selected.iter().filter(|file| file.ends_with(".safetensors")).collect();
            assert_eq!(weights, ["text_encoder/model.fp16.safetensors", vae], "{variant:?}");
            assert_eq!(without_weights(&selected), ["unet"], "nobody here reads that variant");
        }
    }
}
