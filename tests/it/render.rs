//! One stage after the other, without Temporal, with the default models at a few steps.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod images;
mod receipt;
mod resume;
mod room;
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use genvideo::hub::{Library, Places};
use genvideo::job::class::ErrorClass;
use genvideo::job::progress::{JobStatus, Step};
use genvideo::job::result::{Asset, JobResult};
use genvideo::job::{ValidJob, parse};
use genvideo::media::{probe, still};
use genvideo::render::{
    Error, FramesMade, ImageMade, Made, Order, Renderer, Report, Settings, class, hint,
};
use genvideo::store::{JobKey, Store};
use image::{Rgb, RgbImage};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Steps in these tests: pictures are noise then, but every stage is passed.
const STEPS: u32 = 2;
const USER: &str = "user-who-must-not-show";

/// A renderer with a store of its own.
struct Bench {
    folder: TempDir,
    renderer: Renderer,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    Bench { folder, renderer: Renderer::new(settings(store)) }
}

fn settings(store: Store) -> Settings {
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let places = Places {
        models_dirs: Vec::new(),
        cache_dir: shared.join("cache"),
        hf_home: shared.join("no-hub-cache"),
    };
    Settings {
        store,
        library: Library::open(places),
        device: "cpu".to_owned(),
        dtype: "f32".to_owned(),
        memory: "auto".to_owned(),
        checkpoint_every: std::time::Duration::ZERO,
        memory_limit: None,
        disk_quota: None,
        threads: None,
        image_model: None,
        video_model: None,
    }
}

impl Bench {
    fn store(&self) -> &Store {
        self.renderer.store()
    }

    /// Files in the store by their place in it, less its lock.
    fn files(&self) -> Vec<PathBuf> {
        let root = self.root();
        let mut found = Vec::new();
        walk(&root, &mut found);
        let mut found: Vec<PathBuf> =
            found.iter().map(|path| path.strip_prefix(&root).unwrap().to_owned()).collect();
        found.retain(|path| path != Path::new("lock"));
        found
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// Files under `part` of the store.
    fn files_of(&self, part: &str) -> Vec<PathBuf> {
        self.files().into_iter().filter(|path| path.starts_with(part)).collect()
    }

    fn order(&self, fields: Value) -> Order {
        self.try_order(fields).unwrap()
    }

    fn try_order(&self, fields: Value) -> Result<Order, Error> {
        let job = job(fields);
        let mut plan = self.renderer.plan(&job, 7)?;
        if let Some(video) = &mut plan.video {
            video.steps = STEPS;
        }
        Ok(Order::new(JobKey::of_workflow("test"), job, plan))
    }

    fn made(
        &self,
        order: &Order,
        hook: &mut dyn FnMut(Report) -> ControlFlow<()>,
    ) -> Result<Made, Error> {
        let image = self.renderer.gen_image(order, hook)?;
        let mut made = Made { image, runs: Vec::new(), video: None };
        if let Some(video) = &order.plan.video {
            for run in 0..video.runs {
                let start = made
                    .runs
                    .last()
                    .map_or(&made.image.image, |run: &FramesMade| &run.last_frame)
                    .clone();
                made.runs.push(self.renderer.gen_video(order, &start, run, hook)?);
            }
            made.video = Some(self.renderer.encode_video(order, &made.runs, hook)?);
        }
        Ok(made)
    }

    fn result(&self, order: &Order) -> JobResult {
        let made = self.made(order, &mut go_on).unwrap();
        self.renderer.publish(order, &made, &mut go_on).unwrap()
    }

    fn bytes(&self, asset: &Option<Asset>) -> Vec<u8> {
        let asset = asset.as_ref().unwrap();
        let bytes = self.store().get_blob(&asset.sha256).unwrap().to_vec();
        assert_eq!(u64::try_from(bytes.len()).unwrap(), asset.bytes);
        assert!(asset.url.starts_with("file:///"), "{}", asset.url);
        bytes
    }

    fn path(&self, asset: &Option<Asset>) -> PathBuf {
        self.blob(&asset.as_ref().unwrap().sha256)
    }

    fn blob(&self, sha256: &str) -> PathBuf {
        self.store().root().join("blobs").join(sha256)
    }
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { walk(&path, found) } else { found.push(path) }
    }
}

fn go_on(_: Report) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A valid job: small, of few steps, with `fields` on top.
fn job(fields: Value) -> ValidJob {
    let mut job = json!({
        "prompt": "a cute kitten playing in a garden", "job_type": "IMAGE", "user_id": USER,
        "width": 96, "height": 96, "steps": STEPS, "metadata": {"ticket": 12},
    });
    job.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    parse::valid(job.to_string().as_bytes()).unwrap()
}

fn texts(png: &[u8]) -> BTreeMap<String, String> {
    let reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let info = reader.info();
    let latin = info
        .uncompressed_latin1_text
        .iter()
        .map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
    let utf8 =
        info.utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap()));
    latin.chain(utf8).collect()
}

fn size(png: &[u8]) -> (u32, u32) {
    still::decode(png, &still::Limits::default()).unwrap().image.dimensions()
}

#[test]
fn an_image_job_ends_in_a_labelled_png_of_the_asked_size() {
    let bench = bench();
    let order = bench.order(json!({"width": 320, "height": 200, "style": "realistic"}));
    let result = bench.result(&order);

    assert_eq!(
        (result.progress.step, result.progress.status),
        (Step::Completed, JobStatus::Completed)
    );
    assert_eq!(result.progress.percent, 100.0);
    assert_eq!(
        result.progress.asset_url,
        result.assets.image.as_ref().map(|asset| asset.url.clone())
    );
    assert_eq!(result.progress.error_message, None);
    assert_eq!(result.metadata["ticket"], 12);
    assert_eq!((result.done.seed, result.done.delivered_size), (7, [320, 200]));
    assert_eq!(
        result.done.image_size,
        order.plan.image.as_ref().map(|plan| [plan.size.0, plan.size.1])
    );
    assert_eq!((&*result.done.device, &*result.done.dtype), ("cpu", "f32"));
    assert!(result.done.prompt_tokens.is_some_and(|[tokens, cut]| tokens > 5 && cut <= tokens));
    assert!(result.assets.video.is_none() && result.assets.poster.is_none());
    assert!(
        result.done.notes.iter().any(|note| note.ends_with("delivered at 320x200")),
        "{:?}",
        result.done.notes
    );

    let png = bench.bytes(&result.assets.image);
    assert_eq!(size(&png), (320, 200));
    let texts = texts(&png);
    let parameters = &texts["parameters"];
    assert!(
        parameters.starts_with("a cute kitten") || parameters.contains("a cute kitten"),
        "{parameters}"
    );
    for part in
        ["Steps: 2, ", "Seed: 7", "Model: ", "Delivered size: 320x200", "Version: genvideo "]
    {
        assert!(parameters.contains(part), "{part} in {parameters}");
    }
    let record: Value = serde_json::from_str(&texts["genvideo"]).unwrap();
    assert_eq!((&record["schema_version"], &record["seed"]), (&json!(1), &json!(7)));
    assert_eq!(record["prompt"], "a cute kitten playing in a garden");
    assert!(texts["XML:com.adobe.xmp"].contains("trainedAlgorithmicMedia"));

    let receipt: Value = serde_json::from_slice(&bench.bytes(&result.assets.receipt)).unwrap();
    assert_eq!(receipt["files"]["image"], result.assets.image.as_ref().unwrap().sha256);
    assert_eq!(receipt["request"]["prompt"], "a cute kitten playing in a garden");
    for path in bench.files() {
        let content = fs::read(bench.root().join(&path)).unwrap();
        let shows = content.windows(USER.len()).any(|window| window == USER.as_bytes());
        assert!(!shows, "the user id is in {}", path.display());
    }
    assert_eq!(bench.files_of("work"), Vec::<PathBuf>::new());
}

/// What `ffprobe` says about the only stream of `path`.
fn ffprobe(path: &Path) -> Value {
    let output = Command::new("ffprobe")
        .args(["-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json"])
        .arg(path)
        .output()
        .expect("ffprobe comes with scripts/setup");
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_video_has_the_asked_size_rate_and_length() {
    let bench = bench();
    let order =
        bench.order(json!({"job_type": "VIDEO", "width": 512, "height": 512, "duration": 2.0}));
    let result = bench.result(&order);

    let seen = ffprobe(&bench.path(&result.assets.video));
    let stream = &seen["streams"][0];
    assert_eq!(seen["streams"].as_array().unwrap().len(), 1);
    for (field, wanted) in [
        ("codec_name", json!("h264")),
        ("pix_fmt", json!("yuv420p")),
        ("color_space", json!("bt709")),
        ("width", json!(512)),
        ("height", json!(512)),
        ("nb_read_frames", json!("48")),
        ("avg_frame_rate", json!("24/1")),
    ] {
        assert_eq!(stream[field], wanted, "{field}");
    }
    let duration: f64 = stream["duration"].as_str().unwrap().parse().unwrap();
    assert!((duration - 2.0).abs() < 0.5 / 24.0, "{duration}");
    let tags = &seen["format"]["tags"];
    assert_eq!(tags["title"], "a cute kitten playing in a garden");
    assert!(tags["comment"].as_str().unwrap().contains("Seed: 7"), "{tags}");
    assert!(!seen.to_string().contains(USER));

    let done = &result.done;
    assert_eq!((done.fps, done.delivered_size), (Some(24.0), [512, 512]));
    assert!((done.duration.unwrap() - duration).abs() < 1e-3);
    assert_eq!(done.native_frames + done.interpolated_frames, 48);
    assert!(done.native_frames > 1 && done.interpolated_frames > 0);
    assert!(done.notes.iter().any(|note| note.contains("interpolated")), "{:?}", done.notes);
    assert!(
        done.encoder.as_ref().is_some_and(|encoder| encoder.contains("264")),
        "{:?}",
        done.encoder
    );
    assert_eq!(
        result.progress.asset_url,
        result.assets.video.as_ref().map(|asset| asset.url.clone())
    );
    assert!(result.progress.image_url.is_some());
    assert_eq!(size(&bench.bytes(&result.assets.poster)), (512, 512));
    assert_eq!(size(&bench.bytes(&result.assets.image)), (512, 512));
    assert_eq!(bench.files_of("work"), Vec::<PathBuf>::new());
    assert_eq!(bench.files_of("tmp"), Vec::<PathBuf>::new());
}

#[test]
fn frames_and_length_follow_the_request() {
    let bench = bench();
    for (duration, fps, frames) in
        [(0.1, 24.0, 2), (1.0, 1.0, 1), (0.5, 7.0, 4), (1.0, 29.97, 30), (2.1, 12.0, 25)]
    {
        let mut order = bench.order(json!({"job_type": "VIDEO", "duration": duration, "fps": fps}));
        order.plan.video.as_mut().unwrap().steps = 1;
        let made = bench.made(&order, &mut go_on).unwrap().video.unwrap();
        let info = probe::probe(&bench.blob(&made.video.sha256)).unwrap();
        assert_eq!((made.frames, info.frames), (frames, frames), "{duration} s at {fps}");
        assert_eq!(made.native_frames + made.interpolated_frames, frames, "{duration} s at {fps}");
        assert!(
            (info.duration - duration).abs() <= 0.5 / fps + 1e-3,
            "{} for {duration} s at {fps}",
            info.duration
        );
        assert!((made.fps - fps).abs() < 1e-3);
    }
}

#[test]
fn a_long_video_chains_runs_at_their_shared_frame() {
    let bench = bench();
    // At the model's own pace nothing is interpolated, so every frame of the file is one of its own.
    let fields =
        json!({"job_type": "VIDEO", "width": 64, "height": 64, "duration": 6.0, "fps": 2.5});
    let mut order = bench.order(fields);
    let plan = order.plan.video.as_mut().unwrap();
    plan.steps = 1;
    assert_eq!((plan.runs, plan.frames_per_run, plan.kept_native, plan.delivered), (2, 14, 15, 15));
    let made = bench.made(&order, &mut go_on).unwrap();
    assert_eq!(
        made.runs.iter().map(|run| (run.run, run.count)).collect::<Vec<_>>(),
        [(0, 14), (1, 14)]
    );
    let video = made.video.as_ref().unwrap();
    assert_eq!((video.frames, video.native_frames, video.interpolated_frames), (15, 15, 0));

    let twisted: Vec<FramesMade> = made.runs.iter().rev().cloned().collect();
    for runs in [&twisted[..], &made.runs[..1], &[]] {
        let error = bench.renderer.encode_video(&order, runs, &mut go_on).unwrap_err();
        assert!(matches!(error, Error::Order(_)), "{error}");
    }
}

fn stripes(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        if x < width / 2 {
            Rgb([200, 30, 30])
        } else {
            Rgb([30, 30, if y < height / 2 { 220 } else { 90 }])
        }
    })
}

#[test]
fn a_given_image_is_cut_to_the_asked_aspect_and_animated() {
    let bench = bench();
    let picture = still::png(&stripes(400, 200), &[]);
    let id = bench.store().import_blob(&picture).unwrap().sha256;
    let order = bench.order(
        json!({"job_type": "VIDEO", "width": 128, "height": 128, "duration": 0.3, "image": id}),
    );
    assert!(order.plan.image.is_none());
    let result = bench.result(&order);

    let png = bench.bytes(&result.assets.image);
    let image = still::decode(&png, &still::Limits::default()).unwrap().image;
    assert_eq!(image.dimensions(), (128, 128));
    assert_eq!((image.get_pixel(4, 64).0[0], image.get_pixel(124, 10).0[2]), (200, 220));
    // Nobody's picture is called machine-made because it was sent here.
    assert!(!texts(&png).contains_key("XML:com.adobe.xmp"));
    assert_eq!((result.done.image_size, result.done.image_model.as_ref()), (None, None));
    assert_eq!(result.done.prompt_tokens, None);
    assert!(result.done.video_model.is_some());
    assert_eq!(bench.store().get_blob(&id).unwrap().as_ref(), &*picture);
}

#[test]
fn the_same_order_ends_in_the_same_bytes_on_any_number_of_threads() {
    let fields = json!({"job_type": "VIDEO", "width": 160, "height": 128, "duration": 0.5});
    let hashes = |threads: usize| {
        let bench = bench();
        let order = bench.order(fields.clone());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let made = pool.install(|| bench.made(&order, &mut go_on)).unwrap();
        let video = made.video.unwrap();
        (
            made.image.delivered.sha256,
            made.runs[0].frames.sha256.clone(),
            video.video.sha256,
            video.poster.sha256,
        )
    };
    let once = hashes(2);
    assert_eq!(once, hashes(2), "two runs alike");
    assert_eq!(once, hashes(1), "one thread and two");
}

#[test]
fn another_seed_ends_in_another_picture() {
    let bench = bench();
    let order = bench.order(json!({}));
    let mut other = order.clone();
    other.plan.seed += 1;
    let hash =
        |order: &Order| -> ImageMade { bench.renderer.gen_image(order, &mut go_on).unwrap() };
    assert_ne!(hash(&order).image.sha256, hash(&other).image.sha256);
}

#[test]
fn a_stop_in_any_stage_leaves_nothing_after_clean_up() {
    let bench = bench();
    let order = bench.order(json!({"job_type": "VIDEO", "duration": 0.5}));
    for stage in ["load", "encode_prompt", "denoise", "decode", "interpolate", "encode"] {
        let mut reached = 0;
        let mut hook = |report: Report| {
            if report.stage != stage {
                return ControlFlow::Continue(());
            }
            reached += 1;
            ControlFlow::Break(())
        };
        let error = bench.made(&order, &mut hook).unwrap_err();
        assert!(matches!(error, Error::Stopped), "{stage}: {error}");
        assert_eq!(reached, 1, "{stage}: nothing is reported after a stop");
        assert_eq!(bench.files_of("tmp"), Vec::<PathBuf>::new(), "{stage}");
        bench.renderer.cleanup(&order.job_key).unwrap();
        assert_eq!(bench.files(), Vec::<PathBuf>::new(), "{stage}");
    }
}

#[test]
fn a_stop_before_the_manifest_publishes_nothing() {
    let bench = bench();
    let order = bench.order(json!({}));
    let made = bench.made(&order, &mut go_on).unwrap();
    let error = bench.renderer.publish(&order, &made, &mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, Error::Stopped));
    assert_eq!(bench.store().manifest(&order.job_key).unwrap(), None);
    bench.renderer.cleanup(&order.job_key).unwrap();
    assert_eq!(bench.files(), Vec::<PathBuf>::new());
}

#[test]
fn publishing_again_returns_the_first_result_and_other_files_conflict() {
    let bench = bench();
    let order = bench.order(json!({}));
    let made = bench.made(&order, &mut go_on).unwrap();
    let first = bench.renderer.publish(&order, &made, &mut go_on).unwrap();
    assert_eq!(bench.renderer.publish(&order, &made, &mut go_on).unwrap(), first);

    let mut slower = made.clone();
    slower.image.work.seconds.insert("image".to_owned(), 1e6);
    assert_eq!(bench.renderer.publish(&order, &slower, &mut go_on).unwrap(), first);

    let mut other = order.clone();
    other.plan.seed += 1;
    let made = bench.made(&other, &mut go_on).unwrap();
    let error = bench.renderer.publish(&other, &made, &mut go_on).unwrap_err();
    assert_eq!(class(&error), ErrorClass::Conflict, "{error}");
    bench.renderer.cleanup(&order.job_key).unwrap();
    assert_eq!(bench.bytes(&first.assets.image).len() as u64, first.assets.image.unwrap().bytes);
}

#[test]
fn a_manifest_never_names_a_lost_file() {
    let bench = bench();
    let order = bench.order(json!({}));
    let made = bench.made(&order, &mut go_on).unwrap();
    fs::remove_file(bench.blob(&made.image.delivered.sha256)).unwrap();
    let error = bench.renderer.publish(&order, &made, &mut go_on).unwrap_err();
    assert_eq!(class(&error), ErrorClass::OutputUnwritable, "{error}");
    assert_eq!(bench.store().manifest(&order.job_key).unwrap(), None);
}

#[test]
fn what_this_machine_cannot_do_is_refused_before_any_work() {
    let bench = bench();
    let unknown = "0".repeat(64);
    for (fields, field, wanted) in [
        (json!({"image_model": "no-such-model"}), "image_model", ErrorClass::UnknownModel),
        (
            json!({"job_type": "VIDEO", "video_model": "no-such-model"}),
            "video_model",
            ErrorClass::UnknownModel,
        ),
        (json!({"image": unknown}), "image", ErrorClass::OutOfRange),
        (
            json!({"width": 1024, "height": 1024, "size_policy": "exact"}),
            "width",
            ErrorClass::OutOfRange,
        ),
        (
            json!({"loras": [{"name": "some", "scale": 1.0}]}),
            "loras[0].name",
            ErrorClass::UnknownModel,
        ),
    ] {
        let error = bench.try_order(fields.clone()).unwrap_err();
        let Error::Refused(faults) = &error else { panic!("{fields}: {error}") };
        assert!(
            faults.iter().any(|fault| fault.class == wanted && fault.field.contains(field)),
            "{fields}: {faults:?}"
        );
        assert!(!class(&error).retryable());
    }
    let two = bench
        .try_order(json!({"job_type": "VIDEO", "image_model": "one", "video_model": "two"}))
        .unwrap_err();
    let Error::Refused(faults) = &two else { panic!("{two}") };
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(hint(&two).is_some_and(|hint| hint.contains("doctor")));
    assert_eq!(bench.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_plan_survives_json_and_its_shares_are_a_whole() {
    let bench = bench();
    for fields in
        [json!({}), json!({"job_type": "VIDEO", "width": 1024, "height": 576, "duration": 5.0})]
    {
        let order = bench.order(fields);
        let back: Order = serde_json::from_str(&serde_json::to_string(&order).unwrap()).unwrap();
        assert_eq!(back, order);
        let shares = order.plan.shares;
        let runs = order.plan.video.as_ref().map_or(0, |video| video.runs);
        assert!(
            (shares.image + shares.run * f64::from(runs) + shares.encode - 1.0).abs() < 1e-4,
            "{shares:?}"
        );
    }
}

#[test]
fn waiting_for_the_device_can_be_stopped() {
    let bench = bench();
    let order = bench.order(json!({}));
    let mut inside = false;
    let renderer = bench.renderer.clone();
    bench
        .renderer
        .gen_image(&order, &mut |report| {
            if report.stage == "denoise" && !inside {
                inside = true;
                // The permit is taken here, so a second stage waits and asks its own hook.
                let mut asked = 0;
                let answer = std::thread::scope(|scope| {
                    let waiting = scope.spawn(|| {
                        renderer.gen_image(&order, &mut |report| {
                            assert_eq!(report.stage, "load");
                            asked += 1;
                            if asked < 3 {
                                ControlFlow::Continue(())
                            } else {
                                ControlFlow::Break(())
                            }
                        })
                    });
                    waiting.join().unwrap()
                });
                assert!(matches!(answer, Err(Error::Stopped)));
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(inside);
}

#[test]
fn a_whole_job_goes_through_at_once_or_leaves_nothing() {
    let bench = bench();
    let job = job(json!({}));
    let mut stages = Vec::new();
    let result = bench.renderer.render_all(&job, 3, &mut |report| {
        if stages.last() != Some(&report.stage) {
            stages.push(report.stage);
        }
        ControlFlow::Continue(())
    });
    assert_eq!(result.unwrap().done.seed, 3);
    assert_eq!(stages, ["load", "encode_prompt", "denoise", "decode", "publish"]);

    let before = bench.files();
    let stopped = bench.renderer.render_all(&job, 4, &mut |report| {
        if report.stage == "decode" { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(stopped, Err(Error::Stopped)));
    assert_eq!(bench.files(), before);
}
