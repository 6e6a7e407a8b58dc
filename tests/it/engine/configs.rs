//! Config files: published ones are read, unknown keys let be, and values that are used must make sense.

use std::fs;
use std::path::Path;

use genvideo::engine::Error;
use genvideo::engine::config::Json;
use genvideo::engine::config::clip_text::ClipTextConfig;
use genvideo::engine::config::scheduler::{SchedulerClass, SchedulerConfig};
use genvideo::engine::config::unet::UnetConfig;
use genvideo::engine::config::vae::VaeConfig;
use serde_json::{Value, json};

use super::shipped;

/// Reads a shipped config with some values changed.
fn with<T>(
    base: &str,
    changes: &Value,
    read: impl Fn(&Path) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut config: Value = serde_json::from_slice(&fs::read(shipped(base)).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    read(&path)
}

fn unet(changes: &Value) -> Result<UnetConfig, Error> {
    with("tests/fixtures/goldens/models/sd1/unet/config.json", changes, UnetConfig::read)
}

/// The error names the key; `unsupported` tells the two kinds apart.
fn check_refused<T>(result: Result<T, Error>, key: &str, unsupported: bool) {
    match result {
        Err(Error::ConfigUnsupported { key: named, .. }) if unsupported => assert_eq!(named, key),
        Err(Error::ConfigOutOfRange { key: named, .. }) if !unsupported => assert_eq!(named, key),
        Err(other) => panic!("{key}: {other:?}"),
        Ok(_) => panic!("{key} was taken"),
    }
}

#[test]
fn published_unets_are_read() {
    let sd15 = json!({"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "layers_per_block": 2,
        "norm_num_groups": 32, "cross_attention_dim": 768, "sample_size": 64});
    let config = unet(&sd15).unwrap();
    assert_eq!(config.levels.iter().map(|level| level.heads).collect::<Vec<_>>(), [8, 8, 8, 8]);
    assert_eq!(
        config.levels.iter().map(|level| level.up_transformers).collect::<Vec<_>>(),
        [Some(1), Some(1), Some(1), None]
    );
    let sd21 = json!({"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20],
        "norm_num_groups": 32, "cross_attention_dim": 1024, "use_linear_projection": true, "sample_size": 96,
        "upcast_attention": true, "dual_cross_attention": false, "num_class_embeds": null,
        "only_cross_attention": false, "some_future_key": {"deep": [1]}});
    let config = unet(&sd21).unwrap();
    assert_eq!(config.levels.iter().map(|level| level.heads).collect::<Vec<_>>(), [5, 10, 20, 20]);
    assert!(config.linear_projection && config.upcast_attention);

    // Early files hold little: the defaults of the class stand in.
    let lists = json!({"cross_attention_dim": [24, 24, 24, 24], "transformer_layers_per_block": [1, 2, 1, 1],
        "only_cross_attention": [false, true, false, false], "mid_block_type": null});
    let config = unet(&lists).unwrap();
    assert_eq!((config.cross_attention, config.mid, config.mid_transformers), (24, false, None));
    assert_eq!(config.levels[1].down_transformers, Some(2));
    assert!(config.levels[1].only_cross_attention);
}

#[test]
fn networks_of_other_families_are_refused_by_key() {
    for (key, value) in [
        ("_class_name", json!("UNet3DConditionModel")),
        ("act_fn", json!("gelu")),
        ("addition_embed_type", json!("image")),
        ("class_embed_type", json!("timestep")),
        ("num_class_embeds", json!(1000)),
        ("time_cond_proj_dim", json!(256)),
        ("encoder_hid_dim", json!(768)),
        ("dual_cross_attention", json!(true)),
        ("resnet_time_scale_shift", json!("scale_shift")),
        ("conv_in_kernel", json!(1)),
        ("mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
        (
            "down_block_types",
            json!(["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]),
        ),
        ("cross_attention_dim", json!([24, 24, 24, 32])),
    ] {
        check_refused(unet(&json!({ key: value })), key, true);
    }
}

#[test]
fn senseless_numbers_are_refused_by_key() {
    for (key, value) in [
        ("block_out_channels", json!([])),
        ("block_out_channels", json!([0, 16, 16, 16])),
        ("block_out_channels", json!([8, 16, 16, 1e9])),
        ("attention_head_dim", json!(0)),
        ("attention_head_dim", json!(3)),
        ("attention_head_dim", json!([4, 4, 4])),
        ("norm_num_groups", json!(3)),
        ("layers_per_block", json!(-1)),
        ("layers_per_block", json!(1.5)),
        ("layers_per_block", json!(1_000_000)),
        ("in_channels", json!(0)),
        ("norm_eps", json!(-1.0)),
        ("down_block_types", json!(["DownBlock2D"])),
        ("only_cross_attention", json!([true])),
        ("sample_size", json!(1_000_000)),
    ] {
        check_refused(unet(&json!({ key: value })), key, false);
    }
    for (key, value) in
        [("in_channels", json!("four")), ("use_linear_projection", json!(1)), ("act_fn", json!([]))]
    {
        let error = unet(&json!({ key: value })).unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
    }
}

#[test]
fn autoencoders_and_text_encoders_are_checked_too() {
    let vae = |changes| {
        with("tests/fixtures/goldens/models/sd1/vae/config.json", &changes, VaeConfig::read)
    };
    check_refused(vae(json!({"_class_name": "AutoencoderTiny"})), "_class_name", true);
    check_refused(vae(json!({"latents_mean": [0.0]})), "latents_mean", true);
    check_refused(
        vae(json!({"down_block_types": ["AttnDownEncoderBlock2D"]})),
        "down_block_types",
        true,
    );
    check_refused(vae(json!({"norm_num_groups": 7})), "norm_num_groups", false);
    check_refused(vae(json!({"scaling_factor": 0.0})), "scaling_factor", false);
    let text = |changes| {
        with(
            "tests/fixtures/goldens/models/sd1/text_encoder/config.json",
            &changes,
            ClipTextConfig::read,
        )
    };
    check_refused(text(json!({"model_type": "t5"})), "model_type", true);
    check_refused(text(json!({"hidden_act": "relu6"})), "hidden_act", true);
    check_refused(text(json!({"num_attention_heads": 7})), "num_attention_heads", false);
    check_refused(text(json!({"vocab_size": 1})), "vocab_size", false);
}

#[test]
fn schedulers_are_taken_related_or_refused() {
    let read = |changes: Value| {
        let base =
            json!({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"});
        let mut config = base.as_object().unwrap().clone();
        config.extend(changes.as_object().unwrap().clone());
        SchedulerConfig::of(
            &Json::from_value("scheduler_config.json", Value::Object(config)).unwrap(),
        )
    };
    for (name, class) in [
        ("DDIMScheduler", SchedulerClass::Ddim),
        ("EulerDiscreteScheduler", SchedulerClass::Euler),
        ("PNDMScheduler", SchedulerClass::Pndm),
        ("LCMScheduler", SchedulerClass::Lcm),
        ("HeunDiscreteScheduler", SchedulerClass::Other("HeunDiscreteScheduler")),
    ] {
        assert_eq!(read(json!({ "_class_name": name })).unwrap().class, class);
    }
    for (key, value, unsupported) in [
        ("_class_name", json!("FlowMatchEulerDiscreteScheduler"), true),
        ("_class_name", json!("EDMEulerScheduler"), true),
        ("prediction_type", json!("flow"), true),
        ("beta_schedule", json!("laplace"), true),
        ("timestep_spacing", json!("random"), true),
        ("thresholding", json!(true), true),
        ("use_exponential_sigmas", json!(true), true),
        ("num_train_timesteps", json!(0), false),
        ("beta_end", json!(2.0), false),
        ("steps_offset", json!(1000), false),
        ("trained_betas", json!([0.1]), false),
        ("sigma_max", json!(-1.0), false),
    ] {
        let mut changes = json!({"_class_name": "DDIMScheduler"});
        changes[key] = value;
        check_refused(read(changes), key, unsupported);
    }
    for (key, value) in [
        ("solver_order", json!(3)),
        ("algorithm_type", json!("dpmsolver")),
        ("solver_type", json!("other")),
    ] {
        // Only the class that means it is asked.
        let of = |class: &str| read(json!({"_class_name": class, key: value}));
        check_refused(of("DPMSolverMultistepScheduler"), key, true);
        assert!(of("DDIMScheduler").is_ok(), "{key}");
    }
}

#[test]
fn infinities_of_python_are_no_value() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scheduler_config.json");
    let text = r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity,
        "sigma_max": NaN, "note \" Infinity": "-Infinity", "list": [Infinity]}"#;
    fs::write(&path, text).unwrap();
    let json = Json::read(&path).unwrap();
    assert!(json.value("lambda_min_clipped").is_none());
    assert_eq!(json.text("note \" Infinity").unwrap(), Some("-Infinity"));
    assert!(SchedulerConfig::read(&path).is_ok());
}

#[test]
fn files_that_are_no_config_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    assert!(matches!(Json::read(&path), Err(Error::Missing { .. })));
    let deep = "[".repeat(100_000);
    let large = format!("{{\"a\": \"{}\"}}", "x".repeat(2 << 20));
    for text in ["[]", "{", "null", deep.as_str()] {
        fs::write(&path, text).unwrap();
        assert!(matches!(Json::read(&path), Err(Error::ConfigSyntax { .. })), "{:.20}", text);
    }
    fs::write(&path, "").unwrap();
    assert!(matches!(Json::read(&path), Err(Error::EmptyFile { .. })));
    fs::write(&path, large).unwrap();
    assert!(matches!(Json::read(&path), Err(Error::TooLarge { .. })));
}
