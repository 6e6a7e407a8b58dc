//! The engine through its border: models draw, stop, repeat themselves, and refuse what they cannot use.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod blocks;
mod configs;
mod lora;
mod memory;
mod prompts;
mod samplers;
mod weights;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use genvideo::engine::device::{self, Compute};
use genvideo::engine::{Error, ImageModel, ImageRequest, Sampler, StepEvent, Task, describe};
use image::RgbImage;

fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn tiny() -> ImageModel {
    load(&shipped("models/genvideo-tiny-t2i")).unwrap()
}

fn load(folder: &Path) -> Result<ImageModel, Error> {
    ImageModel::load(folder, &Compute::cpu(), &mut |_| ControlFlow::Continue(()))
}

fn request(steps: u32) -> ImageRequest {
    ImageRequest {
        prompt: "a cute kitten playing in a garden".into(),
        width: 64,
        height: 64,
        steps,
        guidance: 4.0,
        seed: 42,
        ..ImageRequest::default()
    }
}

fn draw(model: &ImageModel, request: &ImageRequest) -> Vec<u8> {
    model
        .generate(request, &mut |_| ControlFlow::Continue(()))
        .unwrap()
        .images
        .swap_remove(0)
        .into_raw()
}

/// Mean red, green and blue of the middle and of the border.
fn middle_and_border(image: &RgbImage) -> [[f64; 3]; 2] {
    let mut sums = [([0.0; 3], 0.0), ([0.0; 3], 0.0)];
    for (x, y, pixel) in image.enumerate_pixels() {
        let inside = (48..80).contains(&x) && (48..80).contains(&y);
        let outside = !(16..112).contains(&x) || !(16..112).contains(&y);
        for (chosen, (sum, count)) in [inside, outside].into_iter().zip(&mut sums) {
            if chosen {
                *count += 1.0;
                (0..3).for_each(|channel| sum[channel] += f64::from(pixel[channel]));
            }
        }
    }
    sums.map(|(sum, count)| sum.map(|sum| sum / count))
}

#[test]
fn the_tiny_model_draws_an_orange_kitten_in_a_green_garden() {
    let mut events = Vec::new();
    let output = tiny()
        .generate(&ImageRequest { width: 128, height: 128, ..request(20) }, &mut |event| {
            events.push(event);
            ControlFlow::Continue(())
        })
        .unwrap();
    output.image().save(Path::new(env!("CARGO_TARGET_TMPDIR")).join("kitten.png")).unwrap();
    let [[red, _, blue], [border_red, border_green, border_blue]] =
        middle_and_border(output.image());
    assert!(red > blue + 40.0, "the middle is not orange: {red} {blue}");
    assert!(border_green > border_red && border_green > border_blue, "the border is not green");
    assert_eq!((output.tokens, output.tokens_cut, output.sampler.as_str()), (7, 0, "ddim"));
    assert!(output.notes.is_empty(), "{:?}", output.notes);
    for step in 0..=20 {
        assert!(
            events.contains(&StepEvent::Denoise { step, total: 20 }),
            "step {step} was not told"
        );
    }
    assert_eq!(events.last(), Some(&StepEvent::Decode { done: 1, total: 1 }));
}

#[test]
fn a_picture_is_a_function_of_its_request() {
    let model = tiny();
    let base = request(4);
    let first = draw(&model, &base);
    assert_eq!(first, draw(&model, &base));
    for other in [
        ImageRequest { seed: 43, ..base.clone() },
        ImageRequest { prompt: "a red car in the desert".into(), ..base.clone() },
        ImageRequest { negative: Some("a garden".into()), ..base.clone() },
        ImageRequest { guidance: 1.0, ..base.clone() },
        ImageRequest { sampler: Some(Sampler::Euler), ..base.clone() },
        ImageRequest { sampler: Some(Sampler::EulerKarras), ..base.clone() },
    ] {
        assert_ne!(first, draw(&model, &other), "{other:?}");
    }
    // Without guidance there is no use for a negative prompt.
    let plain = ImageRequest { guidance: 0.0, ..base.clone() };
    assert_eq!(
        draw(&model, &plain),
        draw(&model, &ImageRequest { negative: Some("a garden".into()), ..plain.clone() })
    );
}

#[test]
fn a_picture_does_not_depend_on_the_number_of_threads() {
    let model = tiny();
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| draw(&model, &ImageRequest { width: 96, ..request(2) }))
    };
    let alone = with(1);
    for threads in [2, 3, 7] {
        assert_eq!(with(threads), alone, "{threads} threads");
    }
}

#[test]
fn every_multiple_of_eight_is_drawn() {
    let model = tiny();
    for (width, height) in [(8, 8), (8, 64), (72, 40), (24, 104)] {
        let request = ImageRequest { width, height, ..request(1) };
        assert_eq!(draw(&model, &request).len(), (width * height * 3) as usize, "{width}x{height}");
    }
}

#[test]
fn a_break_of_the_hook_stops_at_once_wherever_it_comes() {
    let model = tiny();
    let mut total = 0;
    model
        .generate(&request(3), &mut |_| {
            total += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
    for stop_at in 0..total {
        let mut told = 0;
        let result = model.generate(&request(3), &mut |_| {
            told += 1;
            if told > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(result, Err(Error::Stopped)), "at event {stop_at}: {result:?}");
        assert_eq!(told, stop_at + 1, "an event after the break");
    }
    let folder = shipped("models/genvideo-tiny-t2i");
    let stopped = ImageModel::load(&folder, &Compute::cpu(), &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Stopped)));
}

#[test]
fn requests_that_cannot_be_served_are_refused() {
    let model = tiny();
    let base = request(2);
    for (field, request) in [
        ("width", ImageRequest { width: 0, ..base.clone() }),
        ("width", ImageRequest { width: 65, ..base.clone() }),
        ("height", ImageRequest { height: 12, ..base.clone() }),
        ("height", ImageRequest { height: 8200, ..base.clone() }),
        ("steps", ImageRequest { steps: 0, ..base.clone() }),
        ("steps", ImageRequest { steps: 1001, ..base.clone() }),
        ("guidance", ImageRequest { guidance: f64::NAN, ..base.clone() }),
        ("guidance", ImageRequest { guidance: f64::INFINITY, ..base.clone() }),
        ("batch", ImageRequest { batch: 0, ..base.clone() }),
        ("clip_skip", ImageRequest { clip_skip: Some(99), ..base.clone() }),
        ("strength", ImageRequest { init: Some((RgbImage::new(8, 8), 0.0)), ..base.clone() }),
        ("strength", ImageRequest { init: Some((RgbImage::new(8, 8), f64::NAN)), ..base.clone() }),
        ("init", ImageRequest { init: Some((RgbImage::new(0, 8), 0.5)), ..base.clone() }),
    ] {
        match model.generate(&request, &mut |_| ControlFlow::Continue(())) {
            Err(Error::Request { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}

#[test]
fn numbers_out_of_range_are_an_error_not_a_picture() {
    let result = tiny().generate(&ImageRequest { guidance: 1e38, ..request(3) }, &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(matches!(result, Err(Error::NonFinite { .. })), "{result:?}");
}

#[test]
fn every_picture_of_a_batch_is_the_one_its_seed_gives_alone() {
    let model = tiny();
    let base = ImageRequest { sampler: Some(Sampler::EulerA), ..request(3) };
    let mut events = Vec::new();
    let output = model
        .generate(&ImageRequest { batch: 3, ..base.clone() }, &mut |event| {
            events.push(event);
            ControlFlow::Continue(())
        })
        .unwrap();
    for (image, seed) in output.images.iter().zip(42..45) {
        let alone = draw(&model, &ImageRequest { seed, ..base.clone() });
        assert_eq!(image.as_raw(), &alone, "seed {seed}");
    }
    assert_eq!(output.images.len(), 3);
    assert!(events.contains(&StepEvent::Denoise { step: 9, total: 9 }));
    assert_eq!(events.last(), Some(&StepEvent::Decode { done: 3, total: 3 }));
}

#[test]
fn a_picture_is_changed_as_much_as_asked() {
    let model = tiny();
    let first = model.generate(&request(8), &mut |_| ControlFlow::Continue(())).unwrap();
    let start = first.images[0].clone();
    let changed = |strength: f64| {
        let init = Some((start.clone(), strength));
        let request = ImageRequest { init, prompt: "a red car".into(), seed: 7, ..request(8) };
        let mut steps = 0;
        let output = model
            .generate(&request, &mut |event| {
                if let StepEvent::Denoise { total, .. } = event {
                    steps = total;
                }
                ControlFlow::Continue(())
            })
            .unwrap();
        let pairs = output.image().as_raw().iter().zip(start.as_raw());
        (pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum::<u64>(), steps)
    };
    let [little, half, all] = [0.2, 0.5, 1.0].map(changed);
    assert!(little.0 < half.0 && half.0 < all.0, "{little:?} {half:?} {all:?}");
    assert_eq!([little.1, half.1, all.1], [1, 4, 8], "steps made");
}

#[test]
fn a_picture_of_any_size_can_be_started_from() {
    let model = tiny();
    for (width, height) in [(1, 1), (7, 90), (300, 33)] {
        let init = Some((RgbImage::new(width, height), 0.5));
        let request = ImageRequest { init, ..request(2) };
        assert_eq!(draw(&model, &request).len(), 64 * 64 * 3, "{width}x{height}");
    }
}

#[test]
fn long_prompts_go_on_and_every_token_is_counted() {
    let model = tiny();
    let long = ImageRequest { prompt: "a cat ".repeat(40), ..request(1) };
    let output = model.generate(&long, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((output.tokens, output.tokens_cut), (80, 0));
    let longer = ImageRequest { prompt: "a cat ".repeat(40) + "in red", ..long.clone() };
    assert_ne!(draw(&model, &long), draw(&model, &longer), "the end of the prompt has no effect");
    // A negative prompt may be longer than the prompt.
    let swapped =
        ImageRequest { prompt: "a cat".into(), negative: Some(long.prompt), ..request(1) };
    assert_eq!(draw(&model, &swapped).len(), 64 * 64 * 3);
}

#[test]
fn weights_change_the_picture_and_escapes_do_not() {
    let model = tiny();
    let with = |prompt: &str| draw(&model, &ImageRequest { prompt: prompt.into(), ..request(2) });
    let plain = with("a cute kitten playing");
    assert_eq!(plain, with("a cute (kitten:1) playing"));
    for prompt in
        ["a cute (kitten:1.5) playing", "a cute [kitten] playing", "a cute BREAK kitten playing"]
    {
        assert_ne!(plain, with(prompt), "{prompt}");
    }
    assert_ne!(with("a (kitten)"), with(r"a \(kitten\)"));
}

#[test]
fn an_english_encoder_says_so_of_a_prompt_in_another_script() {
    let model = load(&shipped("tests/fixtures/goldens/models/sd1")).unwrap();
    for (prompt, noted) in [
        ("a fox in the snow", false),
        ("un café à côté, 3 €", false),
        ("一只在雪地里奔跑的狐狸", true),
        ("лиса", true),
    ] {
        let request = ImageRequest { prompt: prompt.into(), ..request(1) };
        let output = model.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
        let found = output.notes.iter().any(|note| note.contains("English"));
        assert_eq!(found, noted, "{prompt}: {:?}", output.notes);
    }
}

#[test]
fn layers_of_the_text_encoder_can_be_left_out() {
    let model = load(&shipped("tests/fixtures/goldens/models/sd1")).unwrap();
    let with = |clip_skip| draw(&model, &ImageRequest { clip_skip, ..request(2) });
    assert_eq!(with(None), with(Some(0)));
    assert_eq!(with(None), with(Some(1)));
    assert_ne!(with(None), with(Some(2)));
    // Two encoders leave out their last layer anyway.
    let model = load(&shipped("tests/fixtures/goldens/models/xl")).unwrap();
    let with = |clip_skip| draw(&model, &ImageRequest { clip_skip, ..request(2) });
    assert_eq!(with(None), with(Some(2)));
    assert_ne!(with(None), with(Some(3)));
}

#[test]
fn a_model_is_sampled_with_its_own_scheduler() {
    let model = load(&shipped("tests/fixtures/goldens/models/sd1")).unwrap();
    let mut last = None;
    let output = model
        .generate(&request(2), &mut |event| {
            if let StepEvent::Denoise { step, total } = event {
                last = Some((step, total));
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((output.sampler.as_str(), output.notes), ("pndm", Vec::new()));
    assert_eq!(last, Some((3, 3)), "PNDM makes its first step twice");
}

#[test]
fn every_sampler_draws_the_same_picture_again() {
    let model = tiny();
    for sampler in Sampler::ALL {
        let request = ImageRequest { sampler: Some(*sampler), ..request(4) };
        let output = model.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(output.sampler, sampler.name());
        assert_eq!(output.image().as_raw(), &draw(&model, &request), "{sampler}");
    }
}

#[test]
fn folders_are_described_by_their_configs() {
    let cases = [
        ("models/genvideo-tiny-t2i", Task::TextToImage, "stable-diffusion-1", (128, 128), None),
        (
            "models/genvideo-tiny-i2v",
            Task::ImageToVideo,
            "stable-video-diffusion",
            (128, 128),
            Some(14),
        ),
        (
            "tests/fixtures/goldens/models/sd1",
            Task::TextToImage,
            "stable-diffusion-1",
            (128, 128),
            None,
        ),
        (
            "tests/fixtures/goldens/models/sd2",
            Task::TextToImage,
            "stable-diffusion-2",
            (128, 128),
            None,
        ),
        (
            "tests/fixtures/goldens/models/xl",
            Task::TextToImage,
            "stable-diffusion-xl",
            (128, 128),
            None,
        ),
    ];
    for (folder, task, family, native, frames) in cases {
        let found = describe(&shipped(folder)).unwrap();
        assert_eq!((found.task, found.family.as_str()), (task, family), "{folder}");
        assert_eq!((found.native, found.multiple, found.frames), (native, 8, frames), "{folder}");
    }
    assert!(load(&shipped("models/genvideo-tiny-i2v")).is_err());
}

#[test]
fn devices_number_types_and_samplers_are_picked_or_refused_by_name() {
    let cpu = device::open("cpu", "auto").unwrap();
    assert_eq!((cpu.name().as_str(), cpu.dtype_name(), cpu.fallback()), ("cpu", "f32", None));
    assert_eq!(device::open("cpu", "f16").unwrap().dtype_name(), "f16");
    let automatic = device::open("auto", "auto").unwrap();
    assert!(
        automatic.name() != "cpu"
            || automatic.fallback().is_some_and(|reason| reason.contains("cuda"))
    );
    if cfg!(not(feature = "cuda")) {
        let refused = device::open("cuda:0", "auto").unwrap_err();
        assert!(refused.to_string().contains("--features cuda"), "{refused}");
    }
    for (device, dtype, field) in [
        ("gpu", "auto", "device"),
        ("cuda:x", "auto", "device"),
        ("cpu", "int8", "dtype"),
        ("cpu", "bf16", "dtype"),
    ] {
        match device::open(device, dtype) {
            Err(Error::Request { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{device} {dtype}: {other:?}"),
        }
    }
    for sampler in Sampler::ALL {
        assert_eq!(sampler.name().parse::<Sampler>().unwrap(), *sampler);
    }
    for (name, sampler) in [
        ("DPM++ 2M Karras", Sampler::Dpmpp2mKarras),
        ("DPM++ 2M SDE", Sampler::Dpmpp2mSde),
        ("Euler a", Sampler::EulerA),
        ("euler_ancestral", Sampler::EulerA),
        ("UniPC", Sampler::UniPc),
        ("PLMS", Sampler::Pndm),
        ("LCM", Sampler::Lcm),
    ] {
        assert_eq!(name.parse::<Sampler>().unwrap(), sampler, "{name}");
    }
    assert!("heun".parse::<Sampler>().unwrap_err().to_string().contains("`euler_karras`"));
    assert!("".parse::<Sampler>().is_err());
}

#[test]
fn half_precision_runs_on_the_cpu() {
    let compute = device::open("cpu", "f16").unwrap();
    let folder = shipped("models/genvideo-tiny-t2i");
    let model = ImageModel::load(&folder, &compute, &mut |_| ControlFlow::Continue(())).unwrap();
    let (half, whole) = (draw(&model, &request(4)), draw(&tiny(), &request(4)));
    let off: f64 = half.iter().zip(&whole).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    assert!(
        off / (half.len() as f64) < 4.0,
        "mean difference of f16 and f32: {}",
        off / half.len() as f64
    );
}

#[test]
fn faults_of_the_driver_are_told_from_faults_of_ours() {
    use candle_core::Error as Candle;
    let cuda = |text: &str| Candle::Cuda(text.to_string().into());
    let cases = [
        (cuda("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"), "memory"),
        (cuda("CUBLAS_STATUS_ALLOC_FAILED"), "memory"),
        (cuda("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)"), "device"),
        (cuda("CUDA_ERROR_LAUNCH_FAILED").context("in conv2d"), "device"),
        (Candle::Metal("Failed to create metal resource: Buffer".to_string().into()), "memory"),
        (Candle::Msg("shape mismatch".into()), "internal"),
    ];
    for (error, kind) in cases {
        let text = error.to_string();
        let found = match Error::from(error) {
            Error::OutOfMemory { .. } => "memory",
            Error::Device { .. } => "device",
            Error::Internal(_) => "internal",
            _ => "other",
        };
        assert_eq!(found, kind, "{text}");
    }
}
