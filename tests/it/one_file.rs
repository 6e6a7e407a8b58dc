//! Models and LoRAs that are one file: from a models folder to a picture, and what `inspect` says about such files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use genvideo::engine::inspect::Kind;
use genvideo::hub::{self, Library, Places, Task};
use genvideo::job::class::ErrorClass;
use genvideo::job::parse;
use genvideo::media::still;
use genvideo::render::inspect::{Inspected, generation, inspect};
use genvideo::render::{Error, Order, Renderer, Report, Settings, class};
use genvideo::store::{JobKey, Store};
use image::RgbImage;
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens").join(path)
}

/// A models folder with the goldens' one-file Stable Diffusion 1 and a LoRA for it.
fn models() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("loras")).unwrap();
    let model = fs::read(golden("single_file/sd1.safetensors")).unwrap();
    fs::write(folder.path().join("mine.safetensors"), model).unwrap();
    let manifest = "title = \"Mine\"\nnative_width = 64\nnative_height = 64\nsteps = 2\n\
                    min_side = 64\nmax_side = 128\nsampler = \"ddim\"\n";
    fs::write(folder.path().join("mine.toml"), manifest).unwrap();
    lora(&folder.path().join("loras/soft.safetensors"));
    folder
}

fn lora(path: &Path) {
    let module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
    let ones = |shape: &[usize]| Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu);
    let tensors = HashMap::from([
        (format!("{module}.lora_up.weight"), ones(&[8, 2]).unwrap()),
        (format!("{module}.lora_down.weight"), ones(&[2, 24]).unwrap()),
        (format!("{module}.alpha"), ones(&[]).unwrap()),
    ]);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

fn library(models: &Path) -> Library {
    let nowhere = models.join("nowhere");
    Library::open(Places {
        models_dirs: vec![models.to_owned()],
        cache_dir: nowhere.clone(),
        hf_home: nowhere,
    })
}

#[test]
fn the_library_finds_models_and_loras_that_are_one_file() {
    let folder = models();
    let library = library(folder.path());
    let file = folder.path().join("mine.safetensors");
    for name in ["mine", "mine.safetensors", file.to_str().unwrap()] {
        let model = library.find(name, Task::TextToImage).unwrap();
        assert_eq!(model.folder, file, "{name}");
        assert_eq!(model.manifest.family, "stable-diffusion-1");
        assert_eq!((model.manifest.native_width, model.manifest.steps), (64, 2));
    }
    let listed: Vec<String> = library.list().into_iter().map(|model| model.name).collect();
    assert!(listed.contains(&"mine".to_owned()), "{listed:?}");
    assert!(library.scan().1.is_empty());

    let soft = folder.path().join("loras/soft.safetensors");
    for name in ["soft", "soft.safetensors"] {
        assert_eq!(library.find_lora(name).unwrap(), soft);
    }
    assert!(matches!(library.find_lora("hard"), Err(hub::Error::UnknownLora { .. })));
    assert!(matches!(library.find_lora("../soft"), Err(hub::Error::PathEscape { .. })));
    // A LoRA is no model.
    assert!(library.find(soft.to_str().unwrap(), Task::TextToImage).is_err());
}

/// The picture of a job with `loras`, and its files' texts.
fn draw(renderer: &Renderer, loras: Value) -> Result<(Vec<u8>, Inspected), Error> {
    draw_with(renderer, "mine", loras)
}

fn draw_with(
    renderer: &Renderer,
    model: &str,
    loras: Value,
) -> Result<(Vec<u8>, Inspected), Error> {
    let fields = json!({
        "prompt": "a fox", "job_type": "IMAGE", "width": 64, "height": 64, "user_id": "u", "style": "none",
        "duration": 1.0, "image_model": model, "loras": loras,
    });
    let job = parse::valid(fields.to_string().as_bytes()).unwrap();
    let plan = renderer.plan(&job, 3)?;
    let order = Order::new(JobKey::of_workflow("one-file"), job, plan);
    let made = renderer.gen_image(&order, &mut |_: Report| ControlFlow::Continue(()))?;
    let path = renderer.store().root().join("blobs").join(&made.delivered.sha256);
    let picture = still::decode(&fs::read(&path).unwrap(), &still::Limits::default()).unwrap();
    let inspected = inspect(&path)?;
    renderer.cleanup(&order.job_key)?;
    Ok((picture.image.into_raw(), inspected))
}

#[test]
fn a_job_draws_with_a_one_file_model_and_with_its_loras() {
    let folder = models();
    let renderer = renderer(folder.path(), "auto");
    let (plain, _) = draw(&renderer, json!([])).unwrap();
    let (with, texts) = draw(&renderer, json!([{"name": "soft", "scale": 1.5}])).unwrap();
    let (none, _) = draw(&renderer, json!([{"name": "soft", "scale": 0.0}])).unwrap();
    assert_ne!(plain, with);
    assert_eq!(plain, none);
    let Inspected::Png { generation: Some(made), .. } = texts else { panic!("{texts:?}") };
    assert_eq!((made.tool, made.prompt.as_str()), ("genvideo", "a fox"));
    assert!(made.settings["image.loras"].contains("soft"), "{made:?}");

    let error = draw(&renderer, json!([{"name": "hard", "scale": 1.0}])).unwrap_err();
    assert_eq!(class(&error), ErrorClass::UnknownModel);
    assert!(error.to_string().contains("hard"), "{error}");
}

#[test]
fn weights_are_read_once_for_many_jobs() {
    let folder = models();
    for ending in ["safetensors", "toml"] {
        let [from, to] =
            ["mine", "other"].map(|name| folder.path().join(name).with_extension(ending));
        fs::copy(from, to).unwrap();
    }
    let with = |memory: &str| renderer(folder.path(), memory);
    let renderer = with("auto");
    let mut first = None;
    for (model, reads) in [("mine", 1), ("mine", 1), ("mine", 1), ("other", 2), ("mine", 2)] {
        let (picture, _) = draw_with(&renderer, model, json!([])).unwrap();
        assert_eq!(renderer.weights_read(), reads, "{model}");
        assert_eq!(first.get_or_insert_with(|| picture.clone()), &picture);
    }
    // Another LoRA is another model.
    draw_with(&renderer, "mine", json!([{"name": "soft", "scale": 1.5}])).unwrap();
    assert_eq!(renderer.weights_read(), 3);
    let renderer = with("low");
    for reads in 1..=2 {
        let (picture, _) = draw_with(&renderer, "mine", json!([])).unwrap();
        assert_eq!(renderer.weights_read(), reads, "nothing stays in memory");
        assert_eq!(first.as_ref(), Some(&picture));
    }
}

fn renderer(folder: &Path, memory: &str) -> Renderer {
    Renderer::new(Settings {
        store: Store::open(&folder.join("store")).unwrap(),
        library: library(folder),
        device: "cpu".to_owned(),
        dtype: "f32".to_owned(),
        memory: memory.to_owned(),
        checkpoint_every: std::time::Duration::from_secs(10),
        memory_limit: None,
        disk_quota: None,
        threads: None,
        image_model: None,
        video_model: None,
    })
}

#[test]
fn weights_say_what_they_are() {
    let kind = |path: &Path| match inspect(path).unwrap() {
        Inspected::Weights(contents) => contents,
        other => panic!("{other:?}"),
    };
    for (name, family, parts) in
        [("sd1", "stable-diffusion-1", 3), ("xl", "stable-diffusion-xl", 4)]
    {
        let found = kind(&golden(&format!("single_file/{name}.safetensors")));
        let Kind::Checkpoint { family: got, prediction, parts: of, strays, .. } = &found.kind
        else {
            panic!("{:?}", found.kind)
        };
        assert_eq!((*got, *prediction, of.len()), (family, "epsilon", parts));
        assert!(*strays >= 4 && found.dtypes.contains_key("F16"), "{strays} {:?}", found.dtypes);
    }
    let folder = models();
    let found = kind(&folder.path().join("loras/soft.safetensors"));
    let Kind::Lora { layout, modules, ranks, .. } = &found.kind else { panic!("{found:?}") };
    assert_eq!((*layout, *modules, ranks.as_slice()), ("kohya", 1, &[2][..]));
    assert_eq!((found.tensors, found.parameters), (3, 8 * 2 + 2 * 24 + 1));
    let vae = kind(&golden("models/sd1/vae/diffusion_pytorch_model.safetensors"));
    assert_eq!(vae.kind, Kind::Other { note: "an autoencoder".to_owned() });
    assert!(inspect(&folder.path().join("none.safetensors")).is_err());
}

#[test]
fn pictures_of_other_tools_tell_how_they_were_made() {
    let graph = json!({
        "3": {"class_type": "KSampler", "inputs": {
            "seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": ["6", 0], "negative": ["7", 0], "model": ["4", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blur", "clip": ["4", 1]}},
    });
    let lines = "a fox,\nrunning (fast:1.2)\nNegative prompt: blur,\nnoise\n\
                 Steps: 20, Sampler: Euler a, Lora hashes: \"x: 1, y: 2\", Seed: 5, Size: 512x768";
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, texts: &[(&str, &str)]| {
        let path = folder.path().join(name);
        fs::write(&path, still::png(&RgbImage::new(16, 24), texts)).unwrap();
        match inspect(&path).unwrap() {
            Inspected::Png { width: 16, height: 24, generation, .. } => generation,
            other => panic!("{other:?}"),
        }
    };
    let made = write("comfy.png", &[("prompt", &graph.to_string())]).unwrap();
    assert_eq!((made.tool, &*made.prompt, &*made.negative), ("comfyui", "a fox", "blur"));
    assert_eq!((&*made.settings["seed"], &*made.settings["size"]), ("5", "512x768"));
    assert_eq!(made.settings["ckpt_name"], "a.safetensors");
    let made = write("a1111.png", &[("parameters", lines)]).unwrap();
    assert_eq!(made.tool, "a1111");
    assert_eq!(made.prompt, "a fox,\nrunning (fast:1.2)");
    assert_eq!(made.negative, "blur,\nnoise");
    assert_eq!((&*made.settings["Sampler"], &*made.settings["Seed"]), ("Euler a", "5"));
    assert_eq!(made.settings["Lora hashes"], "x: 1, y: 2");
    assert_eq!(write("bare.png", &[]), None);
    // A graph that turns in a circle, and one that is none.
    let circle = json!({"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}});
    for text in [circle.to_string(), "[]".to_owned(), "{".to_owned()] {
        generation(&BTreeMap::from([("prompt".to_owned(), text)]));
    }
}
