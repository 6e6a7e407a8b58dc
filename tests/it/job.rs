//! The wire contract: hostile requests get their class, good ones their defaults; policies as tables.

mod policies;

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use genvideo::job::class::{ErrorClass, Fault};
use genvideo::job::{
    JobInput, JobType, Lora, SizePolicy, ValidJob, fields, parse, style, validate,
};
use serde_json::{Value, json};

fn corpus() -> PathBuf {
    let set = std::env::var_os("GENVIDEO_CORPUS").map(PathBuf::from);
    set.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/corpus"))
}

fn cases(category: &str) -> Vec<Value> {
    let text = fs::read(corpus().join("manifest.json")).expect("the corpus has a manifest");
    let manifest: Value = serde_json::from_slice(&text).expect("the manifest is JSON");
    let cases = manifest["cases"].as_array().expect("the manifest lists cases");
    cases.iter().filter(|case| case["category"] == category).cloned().collect()
}

fn bytes_of(case: &Value) -> Vec<u8> {
    let file = case["file"].as_str().expect("a job case has a file");
    let raw = fs::read(corpus().join(file)).expect("the file of a case is there");
    if case["encoding"] != "gzip" {
        return raw;
    }
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&raw[..]).read_to_end(&mut bytes).expect("the case unpacks");
    bytes
}

/// The fault of a case, if it is not what the manifest expects.
fn judge(case: &Value, outcome: &Result<ValidJob, Vec<Fault>>) -> Option<String> {
    let id = &case["id"];
    let faults = match (outcome, case["expect"] == "accepted") {
        (Ok(_), true) => return None,
        (Ok(_), false) => return Some(format!("{id}: accepted")),
        (Err(faults), true) => return Some(format!("{id}: {}", validate::summary(faults))),
        (Err(faults), false) => faults,
    };
    let class = validate::class(faults);
    let others = case["error_alt"].as_array().cloned().unwrap_or_default();
    let expected = case["error"] == class.name() || others.iter().any(|alt| alt == class.name());
    let same_retry = case["retryable"] == class.retryable();
    let named = faults.iter().all(|fault| !fault.message.is_empty());
    let short = validate::summary(faults).len() < 4096;
    (!(expected && same_retry && named && short))
        .then(|| format!("{id}: {class}, {}", validate::summary(faults)))
}

#[test]
fn every_job_of_the_corpus_gets_its_class() {
    let cases = cases("job");
    assert!(cases.len() > 50, "only {} cases", cases.len());
    let wrong: Vec<String> =
        cases.iter().filter_map(|case| judge(case, &parse::valid(&bytes_of(case)))).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_address_of_the_corpus_is_refused_as_an_image() {
    let wrong: Vec<String> = cases("url")
        .iter()
        .filter_map(|case| judge(case, &valid_with(json!({"image": case["value"]}))))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A small good request with some members replaced or added; `null` members stay `null`.
fn request(changes: Value) -> Vec<u8> {
    let mut request = json!({"prompt": "a fox", "job_type": "VIDEO", "user_id": "u"});
    for (key, value) in changes.as_object().expect("changes are an object") {
        request[key] = value.clone();
    }
    serde_json::to_vec(&request).expect("a JSON value can be written")
}

fn valid_with(changes: Value) -> Result<ValidJob, Vec<Fault>> {
    parse::valid(&request(changes))
}

/// The classes and fields of the faults, such as `OUT_OF_RANGE width`.
fn faults(outcome: Result<ValidJob, Vec<Fault>>) -> Vec<String> {
    let faults = outcome.err().unwrap_or_default();
    faults.iter().map(|fault| format!("{} {}", fault.class, fault.field)).collect()
}

#[track_caller]
fn check(changes: Value, expected: &[&str]) {
    let shown = changes.to_string();
    assert_eq!(faults(valid_with(changes)), expected, "{shown}");
}

#[test]
fn defaults_are_those_of_the_contract() {
    let job = valid_with(json!({})).unwrap();
    assert_eq!(*job, JobInput::new("a fox", JobType::Video, "u"));
    assert_eq!((job.style.as_str(), job.width, job.height), ("realistic", 1024, 1024));
    assert_eq!((job.duration, job.metadata.len(), job.size_policy), (5.0, 0, SizePolicy::Fit));
    assert_eq!((job.seed, job.steps, job.loras.len()), (None, None, 0));
}

#[test]
fn ranges_end_where_the_contract_says() {
    for field in ["width", "height"] {
        let fault: &[&str] = &[&format!("OUT_OF_RANGE {field}")];
        for (side, expected) in [
            (62, fault),
            (63, fault),
            (64, &[]),
            (854, &[]),
            (1023, fault),
            (2048, &[]),
            (2049, fault),
            (2050, fault),
        ] {
            check(json!({field: side}), expected);
        }
    }
    let numbers = [
        ("duration", json!(0.1), json!(60), json!(0.099), json!(60.001)),
        ("seed", json!(0), json!(u64::MAX), json!(-1), json!(-9_000_000_000_i64)),
        ("steps", json!(1), json!(150), json!(0), json!(151)),
        ("guidance", json!(0), json!(30.0), json!(-0.01), json!(30.5)),
        ("fps", json!(1), json!(60.0), json!(0.5), json!(60.1)),
        ("motion", json!(1), json!(255), json!(0), json!(256)),
        ("noise_aug", json!(0), json!(1.0), json!(-0.1), json!(1.1)),
        ("clip_skip", json!(0), json!(12), json!(-1), json!(13)),
        ("priority", json!(1), json!(5), json!(0), json!(6)),
    ];
    for (field, first, last, below, above) in numbers {
        let fault = format!("OUT_OF_RANGE {field}");
        check(json!({field: first}), &[]);
        check(json!({field: last}), &[]);
        check(json!({field: below}), &[&fault]);
        check(json!({field: above}), &[&fault]);
        check(json!({field: "7"}), &[&format!("WRONG_TYPE {field}")]);
    }
}

#[test]
fn texts_keep_their_limits() {
    let long = |count| "é".repeat(count);
    check(json!({"prompt": long(4096)}), &[]);
    check(json!({"prompt": long(4097)}), &["TOO_LARGE prompt"]);
    check(json!({"negative_prompt": ""}), &[]);
    check(json!({"negative_prompt": "a\u{7}b"}), &["INVALID_PROMPT negative_prompt"]);
    check(json!({"negative_prompt": long(4097)}), &["TOO_LARGE negative_prompt"]);
    check(json!({"user_id": long(64)}), &[]);
    check(json!({"user_id": long(65)}), &["INVALID_USER_ID user_id"]);
    for good in ["alice@example.com", "小明", "Alice B.", "a..b", "tenant:7"] {
        check(json!({"user_id": good}), &[]);
    }
    for bad in ["", "  ", ".", "...", "a\nb", "a\u{2028}b"] {
        check(json!({"user_id": bad}), &["INVALID_USER_ID user_id"]);
    }
    check(json!({"sampler": "euler_karras"}), &[]);
    check(json!({"sampler": "DPM++ 2M SDE Karras"}), &[]);
    check(json!({"sampler": "Euler b"}), &["OUT_OF_RANGE sampler"]);
    check(json!({"size_policy": "exact"}), &[]);
    check(json!({"size_policy": "crop"}), &["OUT_OF_RANGE size_policy"]);
    check(json!({"job_type": "video"}), &[]);
    check(json!({"job_type": "IMAGES"}), &["UNKNOWN_JOB_TYPE job_type"]);
}

#[test]
fn names_and_ids_are_looked_up_never_fetched() {
    for model in ["genvideo-tiny-t2i", "stabilityai/sd-turbo", "/models/sd15", "模型"] {
        check(json!({"image_model": model, "video_model": model}), &[]);
    }
    check(json!({"image_model": "https://host/x"}), &["URL_REFUSED image_model"]);
    check(json!({"video_model": " "}), &["OUT_OF_RANGE video_model"]);
    check(json!({"video_model": "a\u{0}b"}), &["OUT_OF_RANGE video_model"]);
    check(json!({"image": "ab".repeat(32)}), &[]);
    check(json!({"image": "abc"}), &["OUT_OF_RANGE image"]);
    check(json!({"image": "photo.png/../x"}), &["URL_REFUSED image"]);
    let job = valid_with(json!({"image": "AB".repeat(32)})).unwrap();
    assert_eq!(job.image, Some("ab".repeat(32)));
    let one = |name: &str, scale: f64| json!({"loras": [{"name": name, "scale": scale}]});
    check(one("detail.safetensors", -4.0), &[]);
    check(one("sub/detail", 4.0), &[]);
    check(one("detail", 4.1), &["OUT_OF_RANGE loras[0].scale"]);
    for name in ["../x", "/etc/passwd", "a\\b", "a//b"] {
        check(one(name, 1.0), &["PATH_ESCAPE loras[0].name"]);
    }
    check(json!({"loras": vec![json!({"name": "x"}); 8]}), &[]);
    check(json!({"loras": vec![json!({"name": "x"}); 9]}), &["OUT_OF_RANGE loras"]);
    check(
        json!({"loras": [{"name": "x", "weight": 1}, 7, {"scale": "1"}]}),
        &[
            "UNKNOWN_FIELD loras[0].weight",
            "WRONG_TYPE loras[1]",
            "MISSING_FIELD loras[2].name",
            "WRONG_TYPE loras[2].scale",
        ],
    );
}

#[test]
fn fields_that_need_each_other_say_so() {
    let image = "ab".repeat(32);
    for (strength, expected) in [
        (json!(0.001), &[][..]),
        (json!(1), &[]),
        (json!(0), &["OUT_OF_RANGE strength"]),
        (json!(1.01), &["OUT_OF_RANGE strength"]),
        (json!("0.5"), &["WRONG_TYPE strength"]),
    ] {
        check(json!({"image": image, "strength": strength}), expected);
    }
    check(json!({"strength": 0.5}), &["MISSING_FIELD strength"]);
    for (job_type, batch, expected) in [
        ("IMAGE", 1, &[][..]),
        ("IMAGE", 8, &[]),
        ("IMAGE", 0, &["OUT_OF_RANGE batch"]),
        ("IMAGE", 9, &["OUT_OF_RANGE batch"]),
        ("VIDEO", 1, &[]),
        ("VIDEO", 2, &["OUT_OF_RANGE batch"]),
    ] {
        check(json!({"job_type": job_type, "batch": batch}), expected);
    }
    check(json!({"vae": "sub/vae-ft-mse"}), &[]);
    check(json!({"vae": "/models/vae.safetensors"}), &[]);
    check(json!({"vae": "https://host/x"}), &["URL_REFUSED vae"]);
    check(json!({"vae": ""}), &["OUT_OF_RANGE vae"]);
    check(json!({"prediction": "epsilon"}), &[]);
    check(json!({"prediction": "sample"}), &["OUT_OF_RANGE prediction"]);
    check(json!({"embed_metadata": 1}), &["WRONG_TYPE embed_metadata"]);
    check(json!({"approve": true}), &[]);
    check(json!({"approve": "yes"}), &["WRONG_TYPE approve"]);
}

#[test]
fn a_request_without_new_fields_is_written_as_before() {
    let written = serde_json::to_string(&valid_with(json!({})).unwrap()).unwrap();
    assert_eq!(
        written,
        "{\"prompt\":\"a fox\",\"style\":\"realistic\",\"job_type\":\"VIDEO\",\"width\":1024,\"height\":1024,\
         \"duration\":5.0,\"user_id\":\"u\",\"metadata\":{},\"size_policy\":\"fit\"}"
    );
}

#[test]
fn null_is_no_value_but_means_not_given_in_extensions() {
    for field in ["prompt", "style", "job_type", "width", "duration", "user_id", "metadata"] {
        check(json!({field: null}), &[&format!("WRONG_TYPE {field}")]);
    }
    for (field, _) in &fields::FIELDS[8..] {
        check(json!({*field: null}), &[]);
    }
}

#[test]
fn all_faults_come_at_once_in_the_order_of_the_contract() {
    let request =
        br#"{"zoom": 2, "fps": "24", "width": 63, "prompt": "", "duration": 0, "seed": 1.5}"#;
    assert_eq!(
        faults(parse::valid(request)),
        [
            "INVALID_PROMPT prompt",
            "MISSING_FIELD job_type",
            "OUT_OF_RANGE width",
            "OUT_OF_RANGE duration",
            "MISSING_FIELD user_id",
            "WRONG_TYPE seed",
            "WRONG_TYPE fps",
            "UNKNOWN_FIELD zoom",
        ]
    );
}

#[test]
fn texts_that_are_not_one_json_object_are_refused() {
    for (text, class) in [
        ("", "INVALID_JSON"),
        ("  ", "INVALID_JSON"),
        ("null", "WRONG_TYPE"),
        ("\"IMAGE\"", "WRONG_TYPE"),
        ("7", "WRONG_TYPE"),
        ("{,}", "INVALID_JSON"),
        ("{\"a\":1,}", "INVALID_JSON"),
        ("{\"a\":01}", "INVALID_JSON"),
        ("{\"a\":+1}", "INVALID_JSON"),
        ("{\"a\":.5}", "INVALID_JSON"),
        ("{\"a\":1.}", "INVALID_JSON"),
        ("{\"a\":0x10}", "INVALID_JSON"),
        ("{\"a\":NaN}", "INVALID_JSON"),
        ("{\"a\":nullx}", "INVALID_JSON"),
        ("{\"a\":-1e999}", "INVALID_JSON"),
        ("{'a':1}", "INVALID_JSON"),
        ("{\"a\" 1}", "INVALID_JSON"),
        ("{\"a\":\"\t\"}", "INVALID_JSON"),
        ("{\"a\":\"\\x41\"}", "INVALID_JSON"),
        ("{\"a\":\"\\u12\"}", "INVALID_JSON"),
        ("{\"a\":\"\\udc00\\ud800\"}", "INVALID_JSON"),
        ("{\"a\":{\"b\":1,\"\\u0062\":2}}", "INVALID_JSON"),
        ("{} // ok", "INVALID_JSON"),
        ("{} {}", "INVALID_JSON"),
    ] {
        let faults = parse::valid(text.as_bytes()).unwrap_err();
        assert_eq!(validate::class(&faults).name(), class, "{text}: {faults:?}");
    }
}

#[test]
fn size_and_depth_are_limited_before_anything_is_built() {
    let deep = |depth: usize| {
        let metadata =
            format!("{}{}", "{\"a\":".repeat(depth), "1".to_owned() + &"}".repeat(depth));
        format!(
            "{{\"prompt\":\"x\",\"job_type\":\"IMAGE\",\"user_id\":\"u\",\"metadata\":{metadata}}}"
        )
    };
    assert!(parse::valid(deep(16).as_bytes()).is_ok());
    assert_eq!(faults(parse::valid(deep(17).as_bytes())), ["TOO_DEEP "]);
    let open = "[".repeat(200_000);
    assert_eq!(faults(parse::valid(open.as_bytes())), ["TOO_DEEP "]);
    let spaces = " ".repeat(validate::MAX_REQUEST_BYTES + 1);
    assert_eq!(faults(parse::valid(spaces.as_bytes())), ["TOO_LARGE "]);
    check(json!({"metadata": {"a": "x".repeat(65_536 - 8)}}), &[]);
    check(json!({"metadata": {"a": "x".repeat(65_536 - 7)}}), &["TOO_LARGE metadata"]);
    // A library caller has no reader in front, so the validator counts too.
    let mut input = JobInput::new("x", JobType::Image, "u");
    let nested = (0..16).fold(json!(1), |inner, _| json!([inner]));
    input.metadata.insert("a".to_owned(), nested);
    assert_eq!(faults(validate::validate(input)), ["TOO_DEEP metadata"]);
}

#[test]
fn cut_and_damaged_requests_are_refused_or_read_but_never_panic() {
    let request = "{\"prompt\":\"é\\ud83e\\udd8a\\n\",\"job_type\":\"IMAGE\",\"user_id\":\"u\",\
                   \"metadata\":{\"a\":[1,-2.5e3,true,null,{}]}}"
        .as_bytes();
    assert!(parse::valid(request).is_ok());
    for end in 0..request.len() {
        let faults = parse::valid(&request[..end]).unwrap_err();
        assert_eq!(validate::class(&faults), ErrorClass::InvalidJson, "cut at {end}");
    }
    for at in 0..request.len() {
        for byte in 0..=255 {
            let mut damaged = request.to_vec();
            damaged[at] = byte;
            if let Err(faults) = parse::valid(&damaged) {
                assert_ne!(validate::class(&faults), ErrorClass::Bug);
            }
        }
    }
}

#[test]
fn many_unknown_fields_make_a_short_answer() {
    let mut request = json!({"prompt": "x", "job_type": "IMAGE", "user_id": "u"});
    for index in 0..5000 {
        request[format!("field{index}")] = json!(index);
    }
    let faults = parse::valid(&serde_json::to_vec(&request).unwrap()).unwrap_err();
    let text = validate::summary(&faults);
    assert_eq!(faults.len(), 9);
    assert!(text.ends_with("and 4992 more unknown fields"), "{text}");
}

#[test]
fn metadata_is_carried_untouched_or_refused() {
    let metadata = json!({
        "big": u64::MAX, "small": i64::MIN, "float": 0.1, "tiny": 5e-324, "list": [1, 1.0, "1", null],
        "": {"\u{0}": "\u{1f98a}"},
    });
    let job = valid_with(json!({"metadata": metadata})).unwrap();
    assert_eq!(Value::Object(job.metadata.clone()), metadata);
    let request = br#"{"prompt":"x","job_type":"IMAGE","user_id":"u",
        "metadata":{"a":[{"id":123456789012345678901234567890}]}}"#;
    let faults = parse::valid(request).unwrap_err();
    assert_eq!(
        validate::summary(&faults),
        "`metadata`: holds the number `123456789012345678901234567890` at `metadata.a[0].id`, \
         wanted whole numbers of at most 64 bits; send longer ones as text"
    );
}

#[test]
fn a_valid_job_reads_and_validates_to_itself() {
    let full = json!({
        "prompt": "line one\r\nline two\rthree \u{202e}", "style": "anime", "job_type": "image", "width": 854,
        "height": 480, "duration": 7.3, "metadata": {"n": [1e15, 1e300, -0.0, 0.1]}, "negative_prompt": "\r",
        "seed": u64::MAX, "steps": 30, "guidance": 7.1, "sampler": "ddim", "image_model": "a/b",
        "video_model": "c", "fps": 29.97, "motion": 127, "noise_aug": 0.02, "image": "AB".repeat(32),
        "loras": [{"name": "x", "scale": 0.7}, {"name": "y"}], "size_policy": "exact",
        "strength": 0.6, "batch": 8, "clip_skip": 2, "vae": "v.safetensors", "prediction": "v_prediction",
        "embed_metadata": false, "approve": true, "priority": 1,
    });
    for changes in [json!({}), full] {
        let job = valid_with(changes).unwrap();
        let written = serde_json::to_vec(&job).unwrap();
        assert_eq!(parse::valid(&written).as_ref(), Ok(&job));
        assert_eq!(serde_json::from_slice::<ValidJob>(&written).unwrap(), job);
        assert_eq!(serde_json::to_vec(&parse::valid(&written).unwrap()).unwrap(), written);
    }
    assert!(serde_json::from_slice::<ValidJob>(&request(json!({"width": 7}))).is_err());
}

#[test]
fn messages_help() {
    let check = |changes: Value, expected: &str| {
        let faults = valid_with(changes).unwrap_err();
        assert_eq!(validate::summary(&faults), expected);
    };
    check(
        json!({"width": 513, "height": 8}),
        "`width`: got `513`, `512` is the nearest allowed, wanted an even whole number from 64 to 2048; \
         `height`: got `8`, wanted an even whole number from 64 to 2048",
    );
    check(
        json!({"width": 512.0}),
        "`width`: got `512.0` with a point or exponent, wanted an even whole number from 64 to 2048",
    );
    check(
        json!({"duration": "5", "style": "realistc"}),
        "`style`: got `realistc`, wanted one of `realistic`, `cinematic`, `anime`, `watercolor`, `3d`, \
         `pixel-art`, `oil-painting`, `sketch`, `fantasy`, `none`; \
         `duration`: got the text `5`, wanted a number of seconds from 0.1 to 60",
    );
    check(
        json!({"num_inference_steps": 20, "promt": "x", "num_frames": 1}),
        "`num_frames`: unknown field, did you mean `duration` and `fps`?; \
         `num_inference_steps`: unknown field, did you mean `steps`?; \
         `promt`: unknown field, did you mean `prompt`?",
    );
    check(
        json!({"prompt": "a\u{0}b", "user_id": "../x\n\u{202e}"}),
        "`prompt`: got the control character U+0000 at byte 1, wanted text of 1 to 8192 bytes; \
         `user_id`: got `../x\\n\\u{202e}`, wanted a label of 1 to 128 bytes without `/`, `\\`, `%` \
         or control characters",
    );
    check(
        json!({"image": "https://host/x.png"}),
        "`image`: got the address `https://host/x.png`, wanted the id of an image in the store, 64 hex digits",
    );
    check(
        json!({"strength": 0.6, "batch": 4, "denoising_strength": 1}),
        "`strength`: got `0.6` alone, wanted a number above 0, up to 1, beside an `image`; \
         `batch`: got `4` for a video, wanted a whole number from 1 to 8, and only 1 for a video; \
         `denoising_strength`: unknown field, did you mean `strength`?",
    );
    let faults = parse::valid(b"{\"prompt\": \"x\",\n \"prompt\": \"y\"}").unwrap_err();
    assert_eq!(
        validate::summary(&faults),
        "the request is not valid JSON: the key `prompt` is given twice, again at line 2 column 10"
    );
}

#[test]
fn classes_have_distinct_names_that_read_back() {
    let mut names = HashSet::new();
    for class in ErrorClass::ALL {
        assert!(names.insert(class.name()), "{class} twice");
        let read: ErrorClass = serde_json::from_value(json!(class.name())).unwrap();
        assert_eq!(read, *class);
        assert!((400..600).contains(&class.http_status()), "{class}");
        assert!((1..=6).contains(&class.exit_code()), "{class}");
        assert!(
            class.exit_code() != 2 || !class.retryable(),
            "{class}: bad input is never retried"
        );
    }
}

fn job(prompt: &str, style: &str, negative: Option<&str>) -> ValidJob {
    let mut input = JobInput::new(prompt, JobType::Image, "u");
    input.style = style.to_owned();
    input.negative_prompt = negative.map(str::to_owned);
    validate::validate(input).expect("the job is good")
}

#[test]
fn styles_frame_the_prompt() {
    for (prompt, style, expected) in [
        ("a cat", "realistic", "a cat, realistic"),
        ("a cat. ", "realistic", "a cat, realistic"),
        ("一只猫。", "realistic", "一只猫，写实风格"),
        ("猫のいる庭", "realistic", "猫のいる庭, realistic"),
        ("...", "anime", "..., anime"),
        ("{prompt}", "3d", "{prompt}, 3d render"),
        (" a cat. ", "none", " a cat. "),
    ] {
        assert_eq!(style::apply(&job(prompt, style, None)).prompt, expected);
    }
    let negative = |style, own| style::apply(&job("x", style, own)).negative;
    assert_eq!(negative("realistic", None), "");
    assert_eq!(negative("anime", None), "photo, 3d render");
    assert_eq!(negative("anime", Some("rain")), "rain, photo, 3d render");
    assert_eq!(negative("none", Some("rain")), "rain");
    let names: HashSet<&str> = style::all().iter().map(|style| style.name).collect();
    assert_eq!(names.len(), style::all().len());
    for style in style::all() {
        assert_eq!(style::find(style.name), Some(style));
        for template in [style.template, style.template_zh] {
            assert_eq!(template.matches("{prompt}").count(), 1, "{}", style.name);
        }
    }
}

#[test]
fn library_callers_get_faults_for_numbers_json_cannot_hold() {
    let mut input = JobInput::new("x", JobType::Video, "u");
    input.duration = f64::NAN;
    input.guidance = Some(f64::INFINITY);
    input.loras = vec![Lora { name: "x".to_owned(), scale: f64::NAN }];
    assert_eq!(
        faults(validate::validate(input)),
        ["OUT_OF_RANGE duration", "OUT_OF_RANGE guidance", "OUT_OF_RANGE loras[0].scale"]
    );
}
