//! Hostile model files: every case of the corpus gets its class, and none takes memory or time.
//!
//! The folder is `GENVIDEO_CORPUS`, else `tests/fixtures/corpus`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs;
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use genvideo::engine::config::clip_text::ClipTextConfig;
use genvideo::engine::config::scheduler::SchedulerConfig;
use genvideo::engine::config::unet::UnetConfig;
use genvideo::engine::config::vae::VaeConfig;
use genvideo::engine::device::Compute;
use genvideo::engine::prompt::PromptTokenizer;
use genvideo::engine::weights::{Weights, verify};
use genvideo::engine::{Error, ImageModel, describe};
use genvideo::job::class::ErrorClass;
use genvideo::render;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::copy_folder;

/// Longest tensor name that a model of this test asks for.
const LONGEST_NAME: usize = 256;

fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

fn corpus() -> PathBuf {
    std::env::var_os("GENVIDEO_CORPUS").map_or_else(|| shipped("corpus"), PathBuf::from)
}

fn manifest() -> Vec<Value> {
    let text = fs::read(corpus().join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&text).unwrap();
    manifest["cases"].as_array().unwrap().clone()
}

/// Bytes of a case.
fn bytes_of(case: &Value) -> Vec<u8> {
    let raw = fs::read(corpus().join(case["file"].as_str().unwrap())).unwrap();
    if case["encoding"] != "gzip" {
        return raw;
    }
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&raw[..]).read_to_end(&mut bytes).unwrap();
    bytes
}

/// File name of a case, without its folder and its packing.
fn name_of(case: &Value) -> String {
    let file = Path::new(case["file"].as_str().unwrap());
    file.file_name().unwrap().to_str().unwrap().trim_end_matches(".gz").to_owned()
}

/// Runs every case of `category` in a folder of its own and compares the classes.
#[track_caller]
fn check(category: &str, attempt: impl Fn(&Value, &Path) -> Result<(), Error>) {
    let cases = manifest();
    let cases: Vec<&Value> = cases.iter().filter(|case| case["category"] == category).collect();
    assert!(!cases.is_empty(), "no case of {category}");
    let mut wrong = Vec::new();
    for case in cases {
        let folder = tempfile::tempdir().unwrap();
        wrong.extend(judge(case, attempt(case, folder.path())));
        if let Some(marker) = case["must_not_exist"].as_str() {
            assert!(!Path::new(marker).exists(), "{}: {marker} was made", case["id"]);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is wrong with the outcome of a case.
fn judge(case: &Value, outcome: Result<(), Error>) -> Option<String> {
    let id = &case["id"];
    let error = match outcome {
        Ok(()) if case["expect"] == "accepted" => return None,
        Ok(()) => return Some(format!("{id}: accepted")),
        Err(error) => error,
    };
    let text = error.to_string();
    let class = render::class(&render::Error::from(error));
    // A sound GGUF file is refused as well, until one can be read.
    let refused_for_now = case["category"] == "gguf" && class == ErrorClass::UnsupportedWeights;
    let wanted: Vec<&str> = match case["expect"].as_str() {
        Some("accepted") if refused_for_now => vec![class.name()],
        Some("accepted") => Vec::new(),
        _ => {
            let others = case["error_alt"].as_array().into_iter().flatten();
            others.chain([&case["error"]]).filter_map(Value::as_str).collect()
        }
    };
    let fits = wanted.contains(&class.name()) && !class.retryable();
    (!fits || text.len() > 2048).then(|| format!("{id}: {class}, {}", &text[..text.len().min(300)]))
}

/// Opens a weights file and asks for every tensor in it, as a model does.
fn load_all(path: &Path, case: &Value) -> Result<(), Error> {
    let weights = Weights::open(path, &Compute::cpu())?;
    let mut asked = 0;
    for (name, shape) in weights.names() {
        if name.len() > LONGEST_NAME {
            continue;
        }
        let mut wanted = shape.to_vec();
        if case["id"].as_str().unwrap().contains("transposed") {
            wanted.reverse();
        }
        weights.get(name, &wanted)?;
        asked += 1;
    }
    if asked == 0 {
        weights.get("w", &[4])?;
    }
    weights.finish()
}

#[test]
fn safetensors() {
    check("safetensors", |case, folder| {
        let name = name_of(case);
        if name.ends_with(".index.json") {
            fs::write(folder.join("model.safetensors.index.json"), bytes_of(case)).unwrap();
            let shard = fs::read(shipped("corpus/safetensors/st-valid.safetensors")).unwrap();
            fs::write(folder.join("model-00001-of-00002.safetensors"), shard).unwrap();
            return load_all(folder, case);
        }
        let path = folder.join("model.safetensors");
        fs::write(&path, bytes_of(case)).unwrap();
        if let Some(needs) = case["needs"].as_str() {
            let cases = manifest();
            let pinned = cases.iter().find(|case| needs.ends_with(case["id"].as_str().unwrap()));
            verify(&path, pinned.unwrap()["sha256"].as_str().unwrap())?;
        }
        load_all(folder, case)
    });
}

#[test]
fn pickles_archives_and_gguf() {
    for category in ["pickle", "archive", "gguf"] {
        check(category, |case, folder| {
            let path = folder.join(name_of(case));
            fs::write(&path, bytes_of(case)).unwrap();
            load_all(&path, case)?;
            // As a model of that path, too.
            ImageModel::load(&path, &Compute::cpu(), &mut |_| ControlFlow::Continue(())).map(|_| ())
        });
    }
}

/// Address space in KiB that a program may take: its own code, libraries and threads, which take less than half of it,
/// and what it allocates.
const ADDRESS_SPACE: u64 = 1 << 20;

/// The program itself looks at every weights file under a hard limit, which no allocation gets past: one that tries
/// aborts.
#[test]
fn no_weights_file_takes_a_gibibyte() {
    let folder = tempfile::tempdir().unwrap();
    let inspect = |path: &Path| {
        let limited = format!("ulimit -v {ADDRESS_SPACE} && exec \"$0\" inspect \"$1\"");
        Command::new("sh")
            .args(["-c", &limited, env!("CARGO_BIN_EXE_genvideo")])
            .arg(path)
            .env("MALLOC_ARENA_MAX", "1")
            .env("HOME", folder.path())
            .output()
            .unwrap()
    };
    let mut seen = 0;
    for category in ["safetensors", "pickle", "archive", "gguf"] {
        for case in manifest().iter().filter(|case| case["category"] == category) {
            let path = folder.path().join(name_of(case));
            fs::write(&path, bytes_of(case)).unwrap();
            let output = inspect(&path);
            // A panic ends in 101, an abort in no code at all.
            let code = output.status.code();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(code.is_some_and(|code| code < 100), "{}: {code:?} {text}", case["id"]);
            fs::remove_file(path).unwrap();
            seen += 1;
        }
    }
    assert!(seen > 50, "{seen} cases");
    let sound = shipped("goldens/single_file/sd1.safetensors");
    assert!(inspect(&sound).status.success(), "the limit is too low for a sound file");
}

#[test]
fn pickles_in_a_model_folder_are_refused_as_such() {
    for name in ["diffusion_pytorch_model.bin", "model.safetensors"] {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(shipped("corpus/pickle/pk-bin.bin"), folder.path().join(name)).unwrap();
        let error = Weights::open(folder.path(), &Compute::cpu()).err().unwrap();
        assert!(matches!(error, Error::WeightsUnsupported { .. }), "{error}");
        assert!(error.to_string().contains("pickle"), "{error}");
    }
}

#[test]
fn configs() {
    check("config", |case, folder| {
        let bytes = bytes_of(case);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let path = folder.join("config.json");
        fs::write(&path, bytes).unwrap();
        if text.contains("Scheduler\"") {
            SchedulerConfig::read(&path).map(|_| ())
        } else if text.contains("AutoencoderKL\"") {
            VaeConfig::read(&path).map(|_| ())
        } else if text.contains("CLIPText") {
            ClipTextConfig::read(&path).map(|_| ())
        } else {
            UnetConfig::read(&path).map(|_| ())
        }
    });
}

/// A copy of the goldens' Stable Diffusion 1.
fn model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&shipped("goldens/models/sd1"), folder.path());
    folder
}

fn load(folder: &Path) -> Result<(), Error> {
    describe(folder)?;
    ImageModel::load(folder, &Compute::cpu(), &mut |_| ControlFlow::Continue(())).map(|_| ())
}

#[test]
fn model_indices() {
    check("model_index", |case, _| {
        let model = model();
        fs::write(model.path().join("model_index.json"), bytes_of(case)).unwrap();
        load(model.path())
    });
}

#[test]
fn tokenizers() {
    check("tokenizer", |case, folder| {
        let own = shipped("goldens/models/sd1/tokenizer");
        let name = name_of(case);
        let merges = name.ends_with(".merges.txt");
        let [vocabulary, other] = ["vocab.json", "merges.txt"].map(|name| folder.join(name));
        if merges {
            fs::write(other, bytes_of(case)).unwrap();
            fs::write(vocabulary, fs::read(own.join("vocab.json")).unwrap()).unwrap();
        } else {
            fs::write(vocabulary, bytes_of(case)).unwrap();
            fs::write(other, "#version: 0.2\n").unwrap();
        }
        PromptTokenizer::load(folder, 77, 49_408).map(|_| ())
    });
}

#[test]
fn links() {
    check("symlink", |case, _| {
        let model = model();
        let link = model.path().join(case["setup"]["link"].as_str().unwrap());
        let target = case["setup"]["target"].as_str().unwrap();
        let inside = link.parent().unwrap().join(target);
        let was = link.is_file().then(|| fs::read(&link).unwrap());
        if link.is_dir() {
            fs::remove_dir_all(&link).unwrap();
        } else {
            fs::remove_file(&link).unwrap();
        }
        if target == "fifo:" {
            assert!(Command::new("mkfifo").arg(&link).status().unwrap().success());
            return load(model.path());
        }
        symlink(target, &link).unwrap();
        if case["expect"] == "accepted" {
            fs::create_dir_all(inside.parent().unwrap()).unwrap();
            fs::write(&inside, was.unwrap()).unwrap();
        }
        load(model.path())
    });
}

#[test]
fn the_blobs_of_a_hugging_face_cache_are_inside_and_its_neighbours_are_not() {
    let cache = tempfile::tempdir().unwrap();
    let repository = cache.path().join("models--a--b");
    let snapshot = repository.join("snapshots/1");
    copy_folder(&shipped("goldens/models/sd1"), &snapshot);
    let file = snapshot.join("unet/diffusion_pytorch_model.safetensors");
    fs::create_dir(repository.join("blobs")).unwrap();
    fs::rename(&file, repository.join("blobs/2")).unwrap();
    symlink("../../../blobs/2", &file).unwrap();
    load(&snapshot).unwrap();

    fs::rename(repository.join("blobs/2"), cache.path().join("2")).unwrap();
    fs::remove_file(&file).unwrap();
    symlink("../../../../2", &file).unwrap();
    let error = load(&snapshot).unwrap_err();
    assert!(matches!(error, Error::PathEscape { .. }), "{error}");
}
