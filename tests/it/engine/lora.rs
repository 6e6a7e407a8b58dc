//! LoRAs: every layout and form gives the numbers of W + scale · alpha/rank · up·down.

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use genvideo::engine::device::Compute;
use genvideo::engine::weights::{Weights, open_with_loras};
use genvideo::engine::{Error, ImageModel, LoadOptions, LoraFile};
use tempfile::TempDir;

const ATTENTION: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight";
const OUT: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight";
const CONV: &str = "down_blocks.0.resnets.0.conv1.weight";

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens/models").join(path)
}

/// Numbers that differ from place to place and are the same every time.
fn numbers(seed: usize, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|index| f32::from(u8::try_from((index * 37 + seed * 101) % 23).unwrap()) / 23.0 - 0.5)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn number(value: f32) -> Tensor {
    Tensor::new(value, &Device::Cpu).unwrap()
}

fn file(tensors: &[(String, Tensor)]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    let tensors: HashMap<String, Tensor> = tensors.iter().cloned().collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    (folder, path)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn read(weights: &Weights, name: &str) -> Tensor {
    let shape = weights.names()[name].to_vec();
    weights.get(name, &shape).unwrap()
}

/// The weight `name` of `part` with `loras` applied, and without.
fn both(part: &'static str, name: &str, loras: &[LoraFile]) -> (Vec<f32>, Vec<f32>) {
    let folder = golden(&format!("sd1/{part}"));
    let with = open_with_loras(&folder, part, loras, &Compute::cpu()).unwrap();
    let without = Weights::open(&folder, &Compute::cpu()).unwrap();
    (values(&read(&with, name)), values(&read(&without, name)))
}

/// up (o, a) times down (a, n), summed in the open.
fn product(up: &Tensor, down: &Tensor) -> Vec<f32> {
    let (up, down) = (up.to_vec2::<f32>().unwrap(), down.to_vec2::<f32>().unwrap());
    let mut out = Vec::new();
    for row in &up {
        for column in 0..down[0].len() {
            out.push(row.iter().zip(&down).map(|(left, right)| left * right[column]).sum());
        }
    }
    out
}

#[track_caller]
fn near(got: &[f32], wanted: &[f32]) {
    assert_eq!(got.len(), wanted.len());
    let worst = got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "off by {worst}");
}

fn added(base: &[f32], factor: f32, delta: &[f32]) -> Vec<f32> {
    base.iter().zip(delta).map(|(base, delta)| base + factor * delta).collect()
}

#[test]
fn every_layout_of_a_linear_delta() {
    let (up, down) = (numbers(1, &[8, 3]), numbers(2, &[3, 8]));
    let delta = product(&up, &down);
    let kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
    let compvis = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q";
    let dotted = ATTENTION.trim_end_matches(".weight");
    let old = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora";
    let layouts = [
        (
            format!("{kohya}.lora_up.weight"),
            format!("{kohya}.lora_down.weight"),
            Some(format!("{kohya}.alpha")),
        ),
        (
            format!("{compvis}.lora_up.weight"),
            format!("{compvis}.lora_down.weight"),
            Some(format!("{compvis}.alpha")),
        ),
        (format!("unet.{dotted}.lora_B.weight"), format!("unet.{dotted}.lora_A.weight"), None),
        (format!("unet.{old}.up.weight"), format!("unet.{old}.down.weight"), None),
        (
            format!("base_model.model.{dotted}.lora_B.weight"),
            format!("base_model.model.{dotted}.lora_A.weight"),
            None,
        ),
    ];
    for (up_name, down_name, alpha) in layouts {
        let mut tensors = vec![(up_name.clone(), up.clone()), (down_name, down.clone())];
        // Without an alpha it is the rank.
        let share = if alpha.is_some() { 1.5 / 3.0 } else { 1.0 };
        tensors.extend(alpha.map(|name| (name, number(1.5))));
        let (_kept, path) = file(&tensors);
        let (with, base) = both("unet", ATTENTION, &[LoraFile { path, scale: 0.8 }]);
        near(&with, &added(&base, 0.8 * share, &delta));
        assert_ne!(with, base, "{up_name}");
    }
}

#[test]
fn alphas_beside_a_peft_file_and_the_old_name_of_the_last_projection() {
    let (up, down) = (numbers(3, &[8, 2]), numbers(4, &[2, 8]));
    let name = format!("base_model.model.{}", OUT.trim_end_matches(".0.weight"));
    let (folder, path) = file(&[
        (format!("{name}.lora_B.weight"), up.clone()),
        (format!("{name}.lora_A.weight"), down.clone()),
    ]);
    fs::write(folder.path().join("adapter_config.json"), r#"{"r": 2, "lora_alpha": 6}"#).unwrap();
    let (with, base) = both("unet", OUT, &[LoraFile { path, scale: 1.0 }]);
    near(&with, &added(&base, 3.0, &product(&up, &down)));
}

#[test]
fn convolutions_with_and_without_a_middle() {
    let module = "lora_unet_down_blocks_0_resnets_0_conv1";
    let (up, down) = (numbers(5, &[8, 2, 1, 1]), numbers(6, &[2, 8, 3, 3]));
    let (_kept, plain) = file(&[
        (format!("{module}.lora_up.weight"), up.clone()),
        (format!("{module}.lora_down.weight"), down.clone()),
        (format!("{module}.alpha"), number(1.0)),
    ]);
    let flat = |tensor: &Tensor| tensor.flatten_from(1).unwrap();
    let delta = product(&flat(&up), &flat(&down));
    let (with, base) = both("unet", CONV, &[LoraFile { path: plain.clone(), scale: 2.0 }]);
    near(&with, &added(&base, 1.0, &delta));

    let (mid, narrow) = (numbers(7, &[2, 2, 3, 3]), numbers(8, &[2, 8, 1, 1]));
    let (_kept, tucker) = file(&[
        (format!("{module}.lora_up.weight"), up.clone()),
        (format!("{module}.lora_mid.weight"), mid.clone()),
        (format!("{module}.lora_down.weight"), narrow.clone()),
    ]);
    let (u, m, d) = (values(&up), values(&mid), values(&narrow));
    let mut middle = Vec::new();
    for out in 0..8 {
        for input in 0..8 {
            for cell in 0..9 {
                let mut sum = 0.0;
                for a in 0..2 {
                    for b in 0..2 {
                        sum += u[out * 2 + a] * m[(a * 2 + b) * 9 + cell] * d[b * 8 + input];
                    }
                }
                middle.push(sum);
            }
        }
    }
    let (with, base) = both("unet", CONV, &[LoraFile { path: tucker.clone(), scale: 0.5 }]);
    near(&with, &added(&base, 0.5, &middle));

    // Both at once, each at its own scale.
    let files = [LoraFile { path: plain, scale: 2.0 }, LoraFile { path: tucker, scale: -0.5 }];
    let (with, base) = both("unet", CONV, &files);
    near(&with, &added(&added(&base, 1.0, &delta), -0.5, &middle));
}

#[test]
fn text_encoders_have_theirs() {
    const NAME: &str = "text_model.encoder.layers.1.self_attn.q_proj.weight";
    let (up, down) = (numbers(9, &[24, 2]), numbers(10, &[2, 24]));
    for module in [
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_",
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.",
    ] {
        let (_kept, path) = file(&[
            (format!("{module}up.weight"), up.clone()),
            (format!("{module}down.weight"), down.clone()),
        ]);
        let (with, base) = both("text_encoder", NAME, &[LoraFile { path, scale: 1.0 }]);
        near(&with, &added(&base, 1.0, &product(&up, &down)));
    }
}

#[test]
fn a_model_takes_it_and_another_models_is_refused_with_the_reason() {
    let module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
    let lora = |width: usize| {
        file(&[
            (format!("{module}.lora_up.weight"), numbers(11, &[8, 2])),
            (format!("{module}.lora_down.weight"), numbers(12, &[2, width])),
        ])
    };
    let load = |path: &Path| {
        let loras = vec![LoraFile { path: path.to_path_buf(), scale: 1.0 }];
        let options = LoadOptions { loras, ..LoadOptions::default() };
        let mut hook = |_| ControlFlow::Continue(());
        ImageModel::load_with(&golden("sd1"), &options, &Compute::cpu(), &mut hook)
    };
    let (_kept, fitting) = lora(24);
    load(&fitting).unwrap();
    let (_kept, wide) = lora(2048);
    let error = load(&wide).unwrap_err();
    assert!(matches!(error, Error::WeightsUnsupported { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("Stable Diffusion XL") && text.contains("2048"), "{text}");

    for (name, shape, word) in [
        ("lora_unet_nowhere.lora_up.weight", [8, 2], "other half"),
        ("lora_unet_nowhere.hada_w1_a", [8, 2], "LoHa"),
        ("something.else", [8, 2], "something.else"),
    ] {
        let (_kept, path) = file(&[(name.to_owned(), numbers(13, &shape))]);
        let text = load(&path).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    }
    let (_kept, elsewhere) = file(&[
        ("lora_unet_nowhere.lora_up.weight".to_owned(), numbers(1, &[8, 2])),
        ("lora_unet_nowhere.lora_down.weight".to_owned(), numbers(1, &[2, 8])),
    ]);
    let text = load(&elsewhere).unwrap_err().to_string();
    assert!(text.contains("none of its 1 weights"), "{text}");
}
