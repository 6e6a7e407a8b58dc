//! What a job can ask of its image: a picture to redraw, several at once, layers, a prediction, silence about itself.

use sha2::{Digest, Sha256};

use super::*;

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn pixels(png: &[u8]) -> RgbImage {
    still::decode(png, &still::Limits::default()).unwrap().image
}

/// Mean absolute difference, 0 to 255.
fn difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let sum: f64 = a.iter().zip(b.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.len() as f64
}

#[test]
fn each_image_of_a_batch_is_the_file_its_seed_gives_alone() {
    let bench = bench();
    let alone = |seed: u64| {
        let mut order = bench.order(json!({}));
        order.plan.seed = seed;
        order.job_key = JobKey::of_workflow(&format!("alone {seed}"));
        bench.result(&order).assets.image.unwrap().sha256
    };
    let order = bench.order(json!({"batch": 3}));
    let result = bench.result(&order);
    let hashes: Vec<String> =
        result.assets.images.iter().map(|asset| asset.sha256.clone()).collect();
    assert_eq!(hashes, [alone(7), alone(8), alone(9)]);
    assert_eq!(result.assets.image.as_ref(), result.assets.images.first());
    assert_eq!(result.progress.message, "3 images ready: 96x96");
    let receipt: Value = serde_json::from_slice(&bench.bytes(&result.assets.receipt)).unwrap();
    assert_eq!(receipt["files"]["images"], json!(hashes));
    // Told apart from an attempt that made another last one.
    let mut other = bench.made(&order, &mut go_on).unwrap();
    other.image.more.pop();
    let error = bench.renderer.publish(&order, &other, &mut go_on).unwrap_err();
    assert_eq!(class(&error), ErrorClass::Conflict, "{error}");

    let one = bench.order(json!({"batch": 1}));
    assert_eq!(one.plan, bench.order(json!({})).plan);
    let mut made = bench.made(&order, &mut go_on).unwrap();
    made.image.more[1].sha256 = "0".repeat(64);
    let fresh = Order { job_key: JobKey::of_workflow("fresh"), ..order };
    let error = bench.renderer.publish(&fresh, &made, &mut go_on).unwrap_err();
    assert_eq!(class(&error), ErrorClass::OutputUnwritable, "{error}");
}

#[test]
fn a_given_image_with_a_strength_is_redrawn_by_that_much() {
    let bench = bench();
    let picture = stripes(96, 96);
    let id = bench.store().import_blob(&still::png(&picture, &[])).unwrap().sha256;
    let with = |strength: f64| {
        let mut order = bench.order(json!({"image": id, "strength": strength, "steps": 10}));
        order.job_key = JobKey::of_workflow(&format!("strength {strength}"));
        let result = bench.result(&order);
        let png = bench.bytes(&result.assets.image);
        let texts = texts(&png);
        let line = format!("Denoising strength: {strength}");
        assert!(texts["parameters"].contains(&line), "{}", texts["parameters"]);
        let record: Value = serde_json::from_str(&texts["genvideo"]).unwrap();
        assert_eq!(record["image"]["source_image"], id);
        assert!(texts["XML:com.adobe.xmp"].contains("trainedAlgorithmicMedia"));
        difference(&pixels(&png), &picture)
    };
    let (little, much) = (with(0.2), with(1.0));
    assert!(little < 0.7 * much, "{little} and {much}");

    // In a video job it is what the video starts from.
    let order = bench.order(json!({
        "job_type": "VIDEO", "duration": 0.2, "image": id, "strength": 0.5, "steps": 4,
    }));
    assert_eq!(order.plan.image.as_ref().and_then(|plan| plan.strength), Some(0.5));
    // One step at strength 0.3 would redraw nothing, or everything.
    let few = bench.order(json!({"image": id, "strength": 0.3, "steps": 1})).plan;
    assert_eq!(few.image.map(|plan| plan.steps), Some(4));
    assert!(few.notes.iter().any(|note| note.contains("4 steps instead of 1")));
    let result = bench.result(&order);
    assert!(result.done.image_model.is_some() && result.assets.video.is_some());
}

#[test]
fn what_a_given_image_leaves_without_use_is_said() {
    let bench = bench();
    let id = bench.store().import_blob(&still::png(&stripes(96, 96), &[])).unwrap().sha256;
    let notes = |fields: Value| bench.order(fields).plan.notes.join("\n");
    let said = notes(json!({"image": id, "steps": 4, "guidance": 2, "sampler": "ddim"}));
    assert!(said.contains("so `steps`, `guidance`, `sampler` had no use"), "{said}");
    for fields in [
        json!({"image": id, "steps": null}),
        json!({"image": id, "steps": 4, "strength": 0.5}),
        json!({"steps": 4}),
    ] {
        let said = notes(fields.clone());
        assert!(!said.contains("no use"), "{fields}: {said}");
    }
}

#[test]
fn layers_and_predictions_can_be_chosen() {
    let bench = bench();
    let made = |fields: Value| bench.renderer.gen_image(&bench.order(fields), &mut go_on).unwrap();
    let native = |fields: Value| made(fields).image.sha256;
    let plain = native(json!({}));
    for (fields, same) in [
        (json!({"clip_skip": 0}), true),
        (json!({"clip_skip": 1}), true),
        (json!({"clip_skip": 2}), false),
    ] {
        assert_eq!(native(fields.clone()) == plain, same, "{fields}");
    }
    assert_ne!(
        native(json!({"prediction": "epsilon"})),
        native(json!({"prediction": "v_prediction"}))
    );
    let png = bench.store().get_blob(&made(json!({"clip_skip": 2})).delivered.sha256).unwrap();
    assert!(texts(&png)["parameters"].contains("Clip skip: 2"));
    let deep = bench.order(json!({"clip_skip": 12}));
    let error = bench.renderer.gen_image(&deep, &mut go_on).unwrap_err();
    assert_eq!(class(&error), ErrorClass::OutOfRange, "{error}");
}

#[test]
fn a_job_can_keep_its_prompt_out_of_its_files() {
    let bench = bench();
    let order = bench.order(json!({
        "job_type": "VIDEO", "duration": 0.2, "embed_metadata": false, "negative_prompt": "dog",
    }));
    let result = bench.result(&order);
    for asset in [&result.assets.image, &result.assets.video, &result.assets.poster] {
        let bytes = bench.bytes(asset);
        let says = |word: &str| bytes.windows(word.len()).any(|part| part == word.as_bytes());
        assert!(!says("kitten") && !says("dog") && !says("Seed"), "{asset:?}");
        assert!(says("trainedAlgorithmicMedia"), "{asset:?}");
    }
}

/// A bench whose image model is the goldens' one-file Stable Diffusion 1; gives back its models folder too.
fn one_file_bench() -> (Bench, PathBuf) {
    let bench = bench();
    let models = bench.folder.path().join("models");
    fs::create_dir(&models).unwrap();
    fs::copy(golden("single_file/sd1.safetensors"), models.join("mine.safetensors")).unwrap();
    let manifest =
        "title = \"Mine\"\nnative_width = 64\nnative_height = 64\nsteps = 1\nsampler = \"ddim\"\n";
    fs::write(models.join("mine.toml"), manifest).unwrap();
    (bench, models)
}

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens").join(path)
}

/// A new renderer over the bench's store and the models folder.
fn renderer(bench: &Bench, models: &Path) -> Renderer {
    let places = Places {
        models_dirs: vec![models.to_owned()],
        cache_dir: bench.folder.path().join("cache"),
        hf_home: models.join("none"),
    };
    Renderer::new(Settings {
        library: Library::open(places),
        image_model: Some("mine".to_owned()),
        ..settings(bench.store().clone())
    })
}

/// The `parameters` text and the receipt of a job.
fn written(bench: &Bench, renderer: &Renderer, fields: Value) -> (String, Value) {
    let mut all = json!({"steps": 1, "width": 64, "height": 64});
    all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let result = renderer.render_all(&job(all), 1, &mut go_on).unwrap();
    let receipt = serde_json::from_slice(&bench.bytes(&result.assets.receipt)).unwrap();
    (texts(&bench.bytes(&result.assets.image))["parameters"].clone(), receipt)
}

#[test]
fn weights_are_named_by_their_hash_which_is_computed_once() {
    let (bench, models) = one_file_bench();
    let hash = hex(&fs::read(models.join("mine.safetensors")).unwrap());
    let (text, receipt) = written(&bench, &renderer(&bench, &models), json!({}));
    assert!(text.contains(&format!("Model hash: {}, Model: mine", &hash[..10])), "{text}");
    assert_eq!(receipt["weights"]["image"], hash);

    // A file that has not changed is not read again, by another process neither.
    let kept = bench.folder.path().join("cache/weight-hashes.json");
    let other = "f".repeat(64);
    fs::write(&kept, fs::read_to_string(&kept).unwrap().replace(&hash, &other)).unwrap();
    let (text, _) = written(&bench, &renderer(&bench, &models), json!({}));
    assert!(text.contains("Model hash: ffffffffff,"), "{text}");
    let file = fs::File::options().append(true).open(models.join("mine.safetensors")).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(9)).unwrap();
    let (text, _) = written(&bench, &renderer(&bench, &models), json!({}));
    assert!(text.contains(&hash[..10]), "a changed file is hashed anew: {text}");
}

#[test]
fn an_autoencoder_can_come_from_a_file_of_its_own() {
    let (bench, models) = one_file_bench();
    fs::create_dir(models.join("vae")).unwrap();
    let vae = golden("models/sd1/vae/diffusion_pytorch_model.safetensors");
    fs::copy(&vae, models.join("vae/same.safetensors")).unwrap();
    let mut tensors = candle_core::safetensors::load(&vae, &candle_core::Device::Cpu).unwrap();
    let bias = tensors.get_mut("decoder.conv_out.bias").unwrap();
    *bias = (&*bias + 0.5).unwrap();
    candle_core::safetensors::save(&tensors, models.join("vae/bright.safetensors")).unwrap();
    // The same model as a folder, described by configs.
    let folder = golden("models/sd1");
    let renderer = renderer(&bench, &models);
    let native = |vae: Option<&str>, model: &str| {
        let fields = json!({"vae": vae, "image_model": model, "sampler": "ddim"});
        let job = job(fields);
        let plan = renderer.plan(&job, 1).unwrap();
        let order = Order::new(JobKey::of_workflow("vae"), job, plan);
        let made = renderer.gen_image(&order, &mut go_on).unwrap();
        let bytes = bench.store().get_work(&order.job_key, &made.image.sha256).unwrap();
        let sum: u64 = pixels(&bytes).iter().map(|byte| u64::from(*byte)).sum();
        (made.image.sha256, sum)
    };
    for model in ["mine", folder.to_str().unwrap()] {
        let own = native(None, model);
        assert_eq!(native(Some("same"), model), own, "{model}");
        let bright = native(Some("bright.safetensors"), model);
        assert!(bright.1 > own.1, "{model}: {} and {}", bright.1, own.1);
    }
    let (text, receipt) = written(&bench, &renderer, json!({"vae": "bright"}));
    assert!(text.contains(", VAE: bright, "), "{text}");
    let hash = hex(&fs::read(models.join("vae/bright.safetensors")).unwrap());
    assert!(text.contains(&format!("VAE hash: {}", &hash[..10])), "{text}");
    assert_eq!(receipt["weights"]["vae"], hash);
    let error = renderer.plan(&job(json!({"vae": "nowhere"})), 1).unwrap_err();
    let Error::Refused(faults) = &error else { panic!("{error}") };
    assert_eq!(faults[0].field, "vae");
}

#[test]
fn a_given_image_that_does_not_decode_names_its_class() {
    let bench = bench();
    for (bytes, wanted) in [
        (&b"GIF89a and nothing else"[..], ErrorClass::UnsupportedFormat),
        (&b"\x89PNG\r\n\x1a\n broken"[..], ErrorClass::CorruptImage),
    ] {
        let id = bench.store().import_blob(bytes).unwrap().sha256;
        let order = bench.order(json!({"image": id}));
        let error = bench.renderer.gen_image(&order, &mut go_on).unwrap_err();
        assert_eq!(class(&error), wanted, "{error}");
        assert!(error.to_string().contains(&id), "{error}");
    }
}
