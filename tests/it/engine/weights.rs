//! Weight files: what is read, and what is refused with its name.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use genvideo::engine::Error;
use genvideo::engine::device::Compute;
use genvideo::engine::weights::Weights;
use tempfile::TempDir;

const FILE: &str = "model.safetensors";

/// A folder whose one file has `header` and `data` bytes of zeros.
fn folder(header: &str, data: usize) -> TempDir {
    let mut bytes = u64::try_from(header.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    folder_of(&bytes)
}

fn folder_of(bytes: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(FILE), bytes).unwrap();
    folder
}

fn open(folder: &Path) -> Result<Weights, Error> {
    Weights::open(folder, &Compute::cpu())
}

#[test]
fn damaged_files_are_refused_before_a_tensor_is_read() {
    let entry = |name: &str, kind: &str, shape: &str, offsets: &str| {
        format!(r#""{name}":{{"dtype":"{kind}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let one = |kind, shape, offsets| format!("{{{}}}", entry("a", kind, shape, offsets));
    let two = |first: &str, second: &str| {
        format!("{{{},{}}}", entry("a", "F32", "[2]", first), entry("b", "F32", "[2]", second))
    };
    let cases = [
        ("no json".to_string(), 0, "header"),
        ("[]".to_string(), 0, "header"),
        (r#"{"a":1}"#.to_string(), 0, "`a`"),
        (one("F32", "[2]", "[0,4]"), 8, "`a`"),
        (one("F32", "[2]", "[8,0]"), 8, "`a`"),
        (one("F32", "[2]", "[0,8,9]"), 8, "`a`"),
        (one("F32", "[-2]", "[0,8]"), 8, "`a`"),
        (one("F32", "[18446744073709551615,2]", "[0,8]"), 8, "`a`"),
        (one("Q4", "[2]", "[0,8]"), 8, "`Q4`"),
        (one("F32", "[2]", "[0,8]"), 7, "cut short"),
        (two("[0,8]", "[4,12]"), 12, "overlap"),
        (two("[0,8]", "[0,8]"), 8, "overlap"),
        (
            format!(
                "{{{},{}}}",
                entry("a", "F32", "[2]", "[0,8]"),
                entry("a", "F32", "[2]", "[8,16]")
            ),
            16,
            "twice",
        ),
    ];
    for (header, data, word) in cases {
        let folder = folder(&header, data);
        let error = open(folder.path()).err().unwrap_or_else(|| panic!("took {header}"));
        assert!(matches!(error, Error::WeightsFormat { .. }), "{header}: {error:?}");
        assert!(error.to_string().contains(word), "{header}: {error}");
    }
    for bytes in [
        vec![],
        vec![1, 2, 3],
        u64::MAX.to_le_bytes().to_vec(),
        (1u64 << 40).to_le_bytes().to_vec(),
    ] {
        let folder = folder_of(&bytes);
        assert!(matches!(open(folder.path()), Err(Error::WeightsFormat { .. })), "{bytes:?}");
    }
}

#[test]
fn tensors_are_cast_and_strays_are_let_be() {
    let folder = tempfile::tempdir().unwrap();
    let values = Tensor::new(&[1.5f32, -2.0], &Device::Cpu).unwrap();
    let tensors = HashMap::from([
        ("deep.half", values.to_dtype(DType::F16).unwrap()),
        ("deep.brain", values.to_dtype(DType::BF16).unwrap()),
        ("deep.whole", values.clone()),
        ("embeddings.position_ids", Tensor::new(&[0i64, 1], &Device::Cpu).unwrap()),
    ]);
    candle_core::safetensors::save(&tensors, folder.path().join(FILE)).unwrap();
    let weights = open(folder.path()).unwrap();
    for name in ["half", "brain", "whole"] {
        let got = weights.pp("deep").get(name, &[2]).unwrap();
        assert_eq!(got.to_vec1::<f32>().unwrap(), [1.5, -2.0], "{name}");
        assert_eq!(
            weights.with_dtype(DType::F16).pp("deep").get(name, &[2]).unwrap().dtype(),
            DType::F16
        );
    }
    assert!(weights.has("deep.half") && !weights.has("half"));
    let error = weights.get("embeddings.position_ids", &[2]).unwrap_err();
    assert!(matches!(&error, Error::TensorType { got, .. } if got == "I64"), "{error}");
    let error = weights.pp("deep").get("whole", &[3]).unwrap_err();
    assert_eq!(error.to_string(), "tensor `deep.whole` has shape [2]: wanted [3]");
    weights.finish().unwrap();
}

#[test]
fn missing_tensors_are_named_together() {
    let folder = folder("{}", 0);
    let weights = open(folder.path()).unwrap();
    for name in ["b", "a", "c"] {
        assert_eq!(weights.pp("block").get(name, &[2, 3]).unwrap().dims(), [2, 3]);
    }
    match weights.finish() {
        Err(Error::TensorsMissing { names, .. }) => {
            assert_eq!(names, ["block.a", "block.b", "block.c"])
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn shards_are_joined_and_stay_in_their_folder() {
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, file: &str| {
        let tensors = HashMap::from([(name, Tensor::new(&[1f32], &Device::Cpu).unwrap())]);
        candle_core::safetensors::save(&tensors, folder.path().join(file)).unwrap();
    };
    save("a", "one.safetensors");
    save("b", "two.safetensors");
    let index = |map: &str| {
        let text = format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#);
        fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
        open(folder.path())
    };
    let weights = index(r#"{"a":"one.safetensors","b":"two.safetensors"}"#).unwrap();
    assert!(weights.has("a") && weights.has("b"));
    for bad in [r#"{"a":1}"#, "[]"] {
        assert!(matches!(index(bad), Err(Error::ConfigSyntax { .. })), "{bad}");
    }
    for outside in [r#"{"a":"../one.safetensors"}"#, r#"{"a":"/etc/passwd"}"#] {
        assert!(matches!(index(outside), Err(Error::PathEscape { .. })), "{outside}");
    }
    assert!(matches!(
        index(r#"{"a":"three.safetensors"}"#),
        Err(Error::Io { .. } | Error::Missing { .. })
    ));
    save("a", "two.safetensors");
    assert!(
        index(r#"{"a":"one.safetensors","b":"two.safetensors"}"#)
            .is_err_and(|e| e.to_string().contains("another"))
    );
}

#[test]
fn a_folder_without_weights_says_what_it_wants() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("diffusion_pytorch_model.bin"), b"pickle").unwrap();
    let error = open(folder.path()).err().unwrap();
    assert!(
        error.to_string().contains("safetensors") && error.to_string().contains("pickle"),
        "{error}"
    );
}
