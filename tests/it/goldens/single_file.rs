//! One-file checkpoints: the same weights, tensor by tensor, as the diffusers folder they were made from.

use std::ops::ControlFlow;
use std::path::PathBuf;

use candle_core::{DType, Tensor};
use genvideo::engine::device::Compute;
use genvideo::engine::weights::{LoadOptions, Weights, open_single_file};
use genvideo::engine::{Error, ImageModel, ImageRequest};
use serde_json::Value;

use super::{golden, json, largest_difference};

fn options(model: &str) -> LoadOptions {
    LoadOptions { config: Some(golden(&format!("models/{model}"))), ..LoadOptions::default() }
}

/// The tensor `name` of `weights` in its own shape.
fn tensor(weights: &Weights, name: &str) -> Tensor {
    let shape = weights.names()[name].to_vec();
    weights.get(name, &shape).unwrap()
}

/// A file's names may be those of transformers 5.
fn folder_name<'a>(folder: &Weights, name: &'a str) -> &'a str {
    if folder.has(name) { name } else { name.strip_prefix("text_model.").unwrap_or(name) }
}

#[test]
fn every_tensor_is_that_of_the_folder() {
    for model in ["sd1", "xl"] {
        let file = golden(&format!("single_file/{model}.safetensors"));
        let parts = open_single_file(&file, &options(model), &Compute::cpu()).unwrap();
        let expected = if model == "xl" { 4 } else { 3 };
        assert_eq!(parts.len(), expected, "{:?}", parts.keys());
        for (part, weights) in &parts {
            let folder = golden(&format!("models/{model}/{part}"));
            let folder = Weights::open(&folder, &Compute::cpu()).unwrap();
            assert_eq!(weights.names().len(), folder.names().len(), "{model} {part}");
            for name in weights.names().keys() {
                let (got, wanted) =
                    (tensor(weights, name), tensor(&folder, folder_name(&folder, name)));
                assert_eq!(got.dims(), wanted.dims(), "{model} {part} {name}");
                assert!(largest_difference(&got, &wanted) == 0.0, "{model} {part} {name}");
            }
        }
    }
}

#[test]
fn the_file_draws_what_the_folder_draws() {
    let request = ImageRequest {
        prompt: "a fox".into(),
        width: 64,
        height: 128,
        steps: 3,
        seed: 5,
        ..ImageRequest::default()
    };
    let draw = |path: PathBuf, options: &LoadOptions| {
        let mut hook = |_| ControlFlow::Continue(());
        let model = ImageModel::load_with(&path, options, &Compute::cpu(), &mut hook).unwrap();
        model.generate(&request, &mut hook).unwrap().images
    };
    for model in ["sd1", "xl"] {
        let folder = draw(golden(&format!("models/{model}")), &LoadOptions::default());
        let file = golden(&format!("single_file/{model}.safetensors"));
        assert_eq!(draw(file.clone(), &options(model)), folder, "{model}");
        // On its own it draws as well, with the heads and groups of the family and CLIP's first merges.
        draw(file, &LoadOptions::default());
    }
}

#[test]
fn shapes_give_the_configs() {
    for model in ["sd1", "xl"] {
        let file = golden(&format!("single_file/{model}.safetensors"));
        let inferred = genvideo::engine::inspect::configs(&file).unwrap();
        for (name, keys) in [
            (
                "unet/config.json",
                &[
                    "in_channels",
                    "out_channels",
                    "block_out_channels",
                    "layers_per_block",
                    "cross_attention_dim",
                    "down_block_types",
                    "up_block_types",
                    "use_linear_projection",
                    "addition_embed_type",
                    "addition_time_embed_dim",
                    "projection_class_embeddings_input_dim",
                ][..],
            ),
            (
                "vae/config.json",
                &["block_out_channels", "layers_per_block", "latent_channels", "scaling_factor"],
            ),
            (
                "text_encoder/config.json",
                &["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"],
            ),
            ("scheduler/scheduler_config.json", &["_class_name", "prediction_type", "beta_end"]),
        ] {
            let wanted = json(&format!("models/{model}/{name}"));
            for key in keys {
                let got = inferred[name].value(key).unwrap_or(&Value::Null);
                assert_eq!(got, &wanted[*key], "{model} {name} {key}");
            }
        }
    }
}

/// The tensors of a golden file, changed by `change`, in a file of their own.
fn changed(
    model: &str,
    change: impl FnOnce(&mut std::collections::HashMap<String, Tensor>),
) -> tempfile::TempDir {
    let file = golden(&format!("single_file/{model}.safetensors"));
    let mut tensors = candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap();
    change(&mut tensors);
    let folder = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    folder
}

fn open(
    folder: &tempfile::TempDir,
    options: &LoadOptions,
) -> Result<std::collections::BTreeMap<&'static str, Weights>, Error> {
    open_single_file(&folder.path().join("model.safetensors"), options, &Compute::cpu())
}

#[test]
fn other_number_types_averaged_weights_and_markers() {
    const NAME: &str = "model.diffusion_model.input_blocks.0.0.weight";
    let folder = changed("sd1", |tensors| {
        let averaged = (&tensors[NAME] * 0.0).unwrap();
        tensors.insert("model_ema.diffusion_modelinput_blocks00weight".into(), averaged);
        tensors.insert(
            "v_pred".into(),
            Tensor::zeros(1, DType::F32, &candle_core::Device::Cpu).unwrap(),
        );
        for tensor in tensors.values_mut() {
            if tensor.dtype() == DType::F16 {
                *tensor = tensor.to_dtype(DType::F32).unwrap();
            }
        }
    });
    let sum = |options: &LoadOptions| {
        let parts = open(&folder, options).unwrap();
        let tensor = tensor(&parts["unet"], "conv_in.weight").abs().unwrap();
        tensor.sum_all().unwrap().to_scalar::<f32>().unwrap()
    };
    assert!(sum(&LoadOptions::default()) > 0.0);
    assert!(sum(&LoadOptions { ema: true, ..LoadOptions::default() }) == 0.0);
    let configs = genvideo::engine::inspect::configs(&folder.path().join("model.safetensors"));
    let scheduler = &configs.unwrap()["scheduler/scheduler_config.json"];
    assert_eq!(scheduler.value("prediction_type"), Some(&Value::from("v_prediction")));
}

#[test]
fn an_autoencoder_may_come_from_a_file_of_its_own() {
    let without = changed("sd1", |tensors| {
        tensors.retain(|name, _| !name.starts_with("first_stage_model."));
    });
    let error = open(&without, &LoadOptions::default()).err().unwrap();
    assert!(error.to_string().contains("first_stage_model."), "{error}");
    let compvis = changed("sd1", |tensors| {
        *tensors = std::mem::take(tensors)
            .into_iter()
            .filter_map(|(name, tensor)| {
                Some((name.strip_prefix("first_stage_model.")?.to_owned(), tensor))
            })
            .collect();
    });
    let whole = Weights::open(&golden("models/sd1/vae"), &Compute::cpu()).unwrap();
    for vae in [
        golden("models/sd1/vae/diffusion_pytorch_model.safetensors"),
        golden("single_file/sd1.safetensors"),
        compvis.path().join("model.safetensors"),
    ] {
        let options = LoadOptions { vae: Some(vae), ..LoadOptions::default() };
        let parts = open(&without, &options).unwrap();
        assert_eq!(parts["vae"].names().len(), whole.names().len());
        for name in whole.names().keys() {
            let (got, wanted) = (tensor(&parts["vae"], name), tensor(&whole, name));
            assert!(largest_difference(&got, &wanted) == 0.0, "{name}");
        }
    }
}

#[test]
fn what_is_missing_is_named() {
    let folder = changed("sd1", |tensors| {
        tensors.remove("model.diffusion_model.middle_block.0.in_layers.2.weight");
        tensors.remove("cond_stage_model.transformer.text_model.final_layer_norm.bias");
    });
    let path = folder.path().join("model.safetensors");
    let mut hook = |_| ControlFlow::Continue(());
    let error = ImageModel::load_with(&path, &options("sd1"), &Compute::cpu(), &mut hook);
    let error = error.err().unwrap().to_string();
    assert!(error.contains("final_layer_norm.bias"), "{error}");
}
