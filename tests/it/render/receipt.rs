//! Receipts: what they hold, that they are read strictly, and what comes of making a result again.

use genvideo::render::receipt::Receipt;
use genvideo::render::verify::{Part, Verdict};

use super::*;

/// A small film of every stage: few steps, three chunks.
fn film(bench: &Bench) -> Order {
    let fields = json!({"job_type": "VIDEO", "width": 64, "height": 64, "duration": 0.5, "fps": 8, "seed": 7});
    let mut order = bench.order(fields);
    order.plan.video.as_mut().unwrap().decode_chunk = 5;
    order
}

fn receipt(bench: &Bench, result: &JobResult) -> Value {
    serde_json::from_slice(&bench.bytes(&result.assets.receipt)).unwrap()
}

/// Carries the order out, stopped after ever more reports and taken up again.
fn disturbed(bench: &Bench, order: &Order, more: usize) -> JobResult {
    for attempt in 1..1000 {
        let mut left = attempt * more;
        let made = bench.made(order, &mut |_| {
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match made {
            Ok(made) => return bench.renderer.publish(order, &made, &mut go_on).unwrap(),
            Err(Error::Stopped) => {}
            Err(other) => panic!("{other}"),
        }
    }
    panic!("it does not come to an end");
}

#[test]
fn a_receipt_has_every_step_and_a_disturbed_job_has_the_same() {
    let quiet = bench();
    let order = film(&quiet);
    let plan = order.plan.video.clone().unwrap();
    let result = quiet.result(&order);
    let wanted = receipt(&quiet, &result);
    for (stage, steps, chunks) in [
        ("image", STEPS, 1),
        ("video-0", plan.steps, plan.frames_per_run.div_ceil(plan.decode_chunk)),
    ] {
        let told = &wanted["stages"][stage];
        for (part, count) in [("denoise", steps), ("decode", chunks)] {
            let hashes = told[part].as_array().unwrap();
            assert_eq!(hashes.len(), usize::try_from(count).unwrap(), "{stage} {part}");
            let mut other = hashes.clone();
            other.dedup();
            assert_eq!(&other, hashes, "{stage} {part}");
        }
        assert_eq!((&told["device"], &told["dtype"]), (&json!("cpu"), &json!("f32")));
        assert!(told["threads"].as_u64().unwrap() > 0);
        let files: Vec<&str> = told["models"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|file| file["file"].as_str())
            .collect();
        for file in ["unet/config.json", "model_index.json"] {
            assert!(files.contains(&file), "{stage}: {files:?}");
        }
        assert!(files.iter().any(|file| file.ends_with(".safetensors")), "{files:?}");
    }
    let encode = &wanted["encode"];
    assert_eq!((&encode["threads"], &encode["crf"]), (&json!(4), &json!(17)));
    let version = encode["version"].as_str().unwrap();
    assert!(version.starts_with("libavcodec ") && version.contains("x264 core "), "{version}");
    assert_eq!(wanted["request"]["metadata"], json!({"ticket": 12}));
    assert!(wanted["request"]["user_id"].is_null());
    let text = wanted.to_string();
    for private in [USER, env!("CARGO_TARGET_TMPDIR")] {
        assert!(!text.contains(private), "{private} in {text}");
    }

    for more in [3, 7] {
        let bench = bench();
        let result = disturbed(&bench, &order, more);
        let got = receipt(&bench, &result);
        assert_eq!(got["stages"], wanted["stages"], "stopped after {more} reports and ever more");
        assert_eq!(got["files"], wanted["files"]);
    }
}

/// The receipt with the value at `pointer` replaced, or taken away by `null`.
fn edited(receipt: &Value, pointer: &str, value: Value) -> Value {
    let mut edited = receipt.clone();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match edited.pointer_mut(parent).unwrap() {
        Value::Object(fields) if value.is_null() => drop(fields.remove(key)),
        Value::Object(fields) => drop(fields.insert(key.to_owned(), value)),
        Value::Array(items) if value.is_null() => drop(items.remove(key.parse().unwrap())),
        Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
        _ => panic!("{pointer}"),
    }
    edited
}

fn read(receipt: &Value) -> Result<Receipt, Error> {
    Receipt::read(receipt.to_string().as_bytes())
}

#[test]
fn an_edited_receipt_is_refused_with_the_place() {
    let bench = bench();
    let good = receipt(&bench, &bench.result(&bench.order(json!({"seed": 7}))));
    read(&good).unwrap();
    for (pointer, value, wanted, said) in [
        (
            "/schema_version",
            json!(1),
            ErrorClass::OutOfRange,
            "`schema_version`: got `1`, wanted `2`",
        ),
        ("/schema_version", Value::Null, ErrorClass::MissingField, "schema_version"),
        ("/speed", json!(1), ErrorClass::UnknownField, "unknown field `speed`"),
        ("/seed", Value::Null, ErrorClass::MissingField, "missing field `seed`"),
        ("/seed", json!("7"), ErrorClass::WrongType, "string \"7\""),
        ("/seed", json!(8), ErrorClass::OutOfRange, "`request.seed`: got `7`, wanted the `seed` 8"),
        ("/request/steps", json!(9999), ErrorClass::OutOfRange, "`request.steps`"),
        ("/request/stepz", json!(2), ErrorClass::UnknownField, "did you mean `steps`?"),
        ("/stages/image/speed", json!(2), ErrorClass::UnknownField, "unknown field `speed`"),
        (
            "/stages/image/denoise/1",
            json!("AB"),
            ErrorClass::OutOfRange,
            "`stages.image.denoise[1]`: got `AB`",
        ),
        ("/stages/image", Value::Null, ErrorClass::MissingField, "`stages.image`"),
        (
            "/stages/video-0",
            good["stages"]["image"].clone(),
            ErrorClass::UnknownField,
            "`stages.video-0`",
        ),
        ("/files/image", json!("../x"), ErrorClass::OutOfRange, "`files.image`: got `../x`"),
        ("/job_key", json!("../x"), ErrorClass::WrongType, "is not a job key"),
    ] {
        let error = read(&edited(&good, pointer, value)).unwrap_err();
        assert_eq!(class(&error), wanted, "{pointer}: {error}");
        assert!(error.to_string().contains(said), "{pointer}: {error}");
    }
    for bytes in [&b""[..], b"{", b"[]", b"\xff", b"null"] {
        let error = Receipt::read(bytes).unwrap_err();
        assert!(
            matches!(class(&error), ErrorClass::InvalidJson | ErrorClass::WrongType),
            "{error}"
        );
    }
    let error = Receipt::read(&vec![b' '; 17 << 20]).unwrap_err();
    assert_eq!(class(&error), ErrorClass::TooLarge);
}

#[test]
fn a_result_made_again_is_equal_or_the_first_difference_is_named() {
    let bench = bench();
    let good = receipt(&bench, &bench.result(&film(&bench)));
    let before = bench.files();
    let verdict = |receipt: &Value| -> Result<Verdict, Error> {
        bench.renderer.verify(&read(receipt).unwrap(), &mut go_on)
    };
    let equal = verdict(&good).unwrap();
    assert_eq!((&equal.mismatch, equal.files), (&None, 3));
    let steps = usize::try_from(2 * STEPS).unwrap();
    assert_eq!((equal.steps, equal.chunks), (steps, 4));
    // Planned otherwise than the model's manifest says.
    let whats: Vec<&str> = equal.differences.iter().map(|found| &*found.what).collect();
    assert_eq!(whats, ["plan.video.decode_chunk", "plan.video.steps"]);

    let other = "0".repeat(64);
    for (pointer, value, stage, part, number) in [
        ("/stages/image/denoise/1", json!(other), "image", Part::Denoise, 2),
        ("/stages/image/denoise/1", Value::Null, "image", Part::Denoise, 2),
        ("/stages/image/decode", json!([other]), "image", Part::Decode, 1),
        ("/files/image", json!(other), "image", Part::File, 1),
        ("/stages/video-0/denoise/0", json!(other), "video-0", Part::Denoise, 1),
        ("/stages/video-0/decode/1", json!(other), "video-0", Part::Decode, 2),
        ("/files/video", json!(other), "video", Part::File, 1),
        ("/files/poster", json!(other), "poster", Part::File, 1),
        ("/plan/image/guidance", json!(2.5), "image", Part::Denoise, 1),
    ] {
        let found = verdict(&edited(&good, pointer, value)).unwrap().mismatch.unwrap();
        assert_eq!((&*found.stage, found.part, found.number), (stage, part, number), "{pointer}");
        assert_ne!(found.receipt, found.here);
    }
    let mut more = good.clone();
    more["stages"]["image"]["denoise"].as_array_mut().unwrap().push(json!(other));
    let found = verdict(&more).unwrap().mismatch.unwrap();
    assert_eq!((found.number, found.of, found.here.clone()), (3, 3, None));
    assert_eq!(
        found.to_string(),
        format!("stage `image`, step 3 of 3, differs: {other} in the receipt, none here")
    );

    for (pointer, value, wanted) in [
        ("/stages/image/models/0/sha256", json!(other), ErrorClass::WeightsHash),
        ("/stages/image/models/0/file", json!("unet/more.safetensors"), ErrorClass::MissingWeights),
        ("/stages/video-0/models/0", Value::Null, ErrorClass::WeightsHash),
    ] {
        let mut reports = 0;
        let edited = read(&edited(&good, pointer, value)).unwrap();
        let refused = bench.renderer.verify(&edited, &mut |report| {
            reports += u32::from(report.stage != "load");
            ControlFlow::Continue(())
        });
        let error = refused.unwrap_err();
        assert_eq!((class(&error), reports), (wanted, 0), "{pointer}: {error}");
        assert!(error.to_string().contains("of model `genvideo-tiny-"), "{error}");
    }
    assert_eq!(bench.files(), before, "nothing stays behind");
}

#[test]
fn a_receipt_of_a_run_in_tiles_is_made_again_in_tiles() {
    let bench = bench();
    let low =
        Renderer::new(Settings { memory: "low".to_owned(), ..settings(bench.store().clone()) });
    let order = bench.order(json!({"width": 640, "height": 640}));
    let image = low.gen_image(&order, &mut go_on).unwrap();
    let made = Made { image, runs: Vec::new(), video: None };
    let result = low.publish(&order, &made, &mut go_on).unwrap();
    let told = receipt(&bench, &result);
    assert_eq!(told["stages"]["image"]["memory"], "tiled");
    let verdict = bench.renderer.verify(&read(&told).unwrap(), &mut go_on).unwrap();
    assert_eq!(verdict, Verdict { steps: 2, chunks: 1, files: 1, ..Verdict::default() });
}
