//! How sizes, rates and durations asked for become what is made.

use genvideo::job::SizePolicy;
use genvideo::job::class::ErrorClass;
use genvideo::job::length::{self, FrameRate, Pace};
use genvideo::job::size::{self, Native};

const TINY: Native = Native { width: 64, height: 64, multiple: 8, min: 32, max: 128 };
const SD1: Native = Native { width: 512, height: 512, multiple: 8, min: 64, max: 2048 };
const SDXL: Native = Native { width: 1024, height: 1024, multiple: 64, min: 512, max: 2048 };
const SVD: Native = Native { width: 1024, height: 576, multiple: 64, min: 256, max: 1536 };

#[test]
fn sizes_keep_the_aspect_near_the_native_area() {
    for (name, native, asked, expected) in [
        ("square on a tiny model", TINY, (1024, 1024), (64, 64)),
        ("wide on a tiny model", TINY, (1280, 720), (88, 48)),
        ("tall on a tiny model", TINY, (720, 1280), (48, 88)),
        ("as trained", SD1, (512, 512), (512, 512)),
        ("supported and near", SD1, (768, 512), (768, 512)),
        ("too small to draw well", SD1, (64, 64), (512, 512)),
        ("odd multiples", SD1, (854, 480), (680, 384)),
        ("full HD", SDXL, (1920, 1080), (1344, 768)),
        ("portrait", SDXL, (832, 1216), (832, 1216)),
        ("clip as trained", SVD, (1024, 576), (1024, 576)),
        ("clip upright", SVD, (576, 1024), (576, 1024)),
        ("banner", SD1, (2048, 64), (2048, 64)),
        ("banner the model cannot make", TINY, (2048, 64), (128, 32)),
        ("tower the model cannot make", SDXL, (64, 2048), (512, 2048)),
    ] {
        let plan = size::plan(asked, SizePolicy::Fit, native).unwrap();
        assert_eq!((plan.generate, plan.deliver), (expected, asked), "{name}");
    }
}

#[test]
fn any_size_gets_a_supported_one_of_nearly_its_aspect() {
    for native in [TINY, SD1, SDXL, SVD] {
        for width in (64..=2048).step_by(62) {
            for height in (64..=2048).step_by(62) {
                let plan = size::plan((width, height), SizePolicy::Fit, native).unwrap();
                let (wide, high) = plan.generate;
                for side in [wide, high] {
                    assert_eq!(side % native.multiple, 0);
                    assert!((native.min..=native.max).contains(&side));
                }
                let aspect = |(width, height)| f64::from(width) / f64::from(height);
                let error = (aspect((wide, high)) / aspect((width, height))).ln().abs();
                let inside = wide.min(high) > native.min && wide.max(high) < native.max;
                assert!(!inside || error < 0.1, "{width}x{height} -> {wide}x{high}");
            }
        }
    }
}

#[test]
fn exact_sizes_are_made_or_refused_with_the_nearest() {
    let plan = size::plan((1024, 512), SizePolicy::Exact, SD1).unwrap();
    assert_eq!(plan.generate, (1024, 512));
    let fault = size::plan((854, 480), SizePolicy::Exact, SD1).unwrap_err();
    assert_eq!((fault.class, fault.field.as_str()), (ErrorClass::OutOfRange, "width"));
    assert_eq!(
        fault.message,
        "got `854x480`, wanted sides that are multiples of 8 from 64 to 2048 for this model, \
         nearest is `856x480`; or leave `size_policy` at `fit`"
    );
    let fault = size::plan((64, 1024), SizePolicy::Exact, TINY).unwrap_err();
    assert_eq!(fault.field, "height");
    assert!(fault.message.contains("nearest is `64x128`"), "{}", fault.message);
}

#[test]
fn rates_mean_what_people_write() {
    for (fps, num, den) in [
        (24.0, 24, 1),
        (23.976, 24000, 1001),
        (23.98, 24000, 1001),
        (29.97, 30000, 1001),
        (59.94, 60000, 1001),
        (47.952, 48000, 1001),
        (12.5, 25, 2),
        (1.0, 1, 1),
        (7.3, 73, 10),
        (60.0, 60, 1),
    ] {
        assert_eq!(FrameRate::from_fps(fps), FrameRate { num, den }, "{fps}");
    }
}

#[test]
fn delivered_durations_are_within_half_a_frame() {
    let pace = Pace { frames_per_run: 14, native_fps: 7.0, max_runs: 64 };
    for fps in [1.0, 3.0, 6.0, 7.0, 8.0, 12.5, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 59.94, 60.0] {
        for tenth in 1..=600 {
            let duration = f64::from(tenth) / 10.0;
            let plan = length::plan(duration, FrameRate::from_fps(fps), &pace);
            let off = (plan.seconds() - duration).abs() * plan.fps.fps();
            assert!(plan.delivered >= 1 && plan.runs >= 1 && plan.kept_native >= 1);
            assert!(off <= 0.5 + 1e-9 || plan.delivered == 1, "{duration} s at {fps}: {off}");
        }
    }
}

#[test]
fn runs_are_chained_as_far_as_the_duration_needs() {
    let svd = Pace { frames_per_run: 14, native_fps: 7.0, max_runs: 8 };
    for (duration, fps, runs, kept, delivered) in [
        (0.1, 24.0, 1, 2, 2),
        (0.04, 24.0, 1, 1, 1),
        (1.0, 24.0, 1, 8, 24),
        (1.9, 24.0, 1, 14, 46),
        (5.0, 24.0, 3, 36, 120),
        (5.0, 7.0, 3, 35, 35),
        (5.0, 3.0, 3, 34, 15),
        (60.0, 24.0, 8, 105, 1440),
    ] {
        let plan = length::plan(duration, FrameRate::from_fps(fps), &svd);
        let counts = (plan.runs, plan.kept_native, plan.delivered);
        assert_eq!(counts, (runs, kept, delivered), "{duration} s at {fps}");
    }
    let slowed = length::plan(60.0, FrameRate::from_fps(24.0), &svd);
    assert_eq!(slowed.wanted_native, 421);
    let still = Pace { frames_per_run: 1, native_fps: 7.0, max_runs: 8 };
    let plan = length::plan(5.0, FrameRate::from_fps(24.0), &still);
    assert_eq!((plan.runs, plan.kept_native), (1, 1));
}
