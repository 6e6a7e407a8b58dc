//! Which files of a model's repository or folder a run needs.

use std::collections::BTreeSet;

use super::manifest::Upstream;

/// Endings of pickles, which are never fetched.
const PICKLES: &[&str] = &["bin", "ckpt", "pt", "pth"];

/// The files among `listing` that a run of the model needs: those the patterns name; of the weights of one folder
/// either the wanted variant, where there is one, or the plain ones.
pub(super) fn select(listing: &[String], upstream: &Upstream) -> Vec<String> {
    let named = |file: &&String| upstream.files.iter().any(|pattern| fits(file, pattern));
    let named: Vec<&String> = listing.iter().filter(named).collect();
    let wanted = upstream.variant.as_deref();
    let folders: BTreeSet<&str> = named
        .iter()
        .filter(|file| wanted.is_some() && variant(file) == wanted)
        .map(|file| folder(file))
        .collect();
    let keep = |file: &&&String| {
        let is_config = !file.contains(".safetensors");
        let wanted = wanted.filter(|_| folders.contains(folder(file)));
        is_config || variant(file) == wanted
    };
    named.iter().filter(keep).map(|file| (*file).clone()).collect()
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
        }
    }
}
