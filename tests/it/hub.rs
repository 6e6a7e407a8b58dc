//! Models by name: manifests, plain folders, the Hugging Face cache, the pair built into the program.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod offline; // nothing but a pull wants a network
mod pull; // from a hub that behaves like the real one to a picture
mod trees; // folders of ComfyUI and A1111, extra_model_paths.yaml

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;

use genvideo::hub::{Error, Library, Model, Places, Source, Task};

const IMAGE: Task = Task::TextToImage;
const VIDEO: Task = Task::ImageToVideo;

/// Folders of one test, with a library over them.
struct Bench {
    folder: tempfile::TempDir,
    library: Library,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let library = Library::open(Places {
            models_dirs: vec![at("models"), at("more models")],
            cache_dir: at("cache"),
            hf_home: at("hf"),
        });
        fs::create_dir(at("models")).unwrap();
        Self { folder, library }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A diffusers folder, as far as the hub looks at it.
    fn model(&self, folder: &str, class: &str, unet: &str) {
        let vae = r#"{"block_out_channels": [128, 256, 512, 512]}"#;
        self.write(
            &format!("{folder}/model_index.json"),
            &format!(r#"{{"_class_name": "{class}"}}"#),
        );
        self.write(&format!("{folder}/unet/config.json"), unet);
        self.write(&format!("{folder}/vae/config.json"), vae);
    }

    fn sd15(&self, folder: &str) {
        let unet = r#"{"sample_size": 64, "cross_attention_dim": 768, "down_block_types": ["a", "b", "c", "d"]}"#;
        self.model(folder, "StableDiffusionPipeline", unet);
    }

    fn find(&self, name: &str) -> Result<Model, Error> {
        self.library.find(name, IMAGE)
    }
}

/// Relative paths and contents of a folder.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(folder: &Path, root: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, root, found);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, folder, &mut found);
    found
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)
}

#[test]
fn the_built_in_pair_is_unpacked_as_it_was_shipped() {
    let bench = Bench::new();
    assert_eq!(bench.library.list().len(), 2);
    assert!(!bench.at("cache").exists(), "a list unpacks nothing");
    for (task, name) in [(IMAGE, "genvideo-tiny-t2i"), (VIDEO, "genvideo-tiny-i2v")] {
        let model = bench.library.default(task).unwrap();
        assert_eq!((model.name.as_str(), model.task, model.source), (name, task, Source::Embedded));
        assert!(model.folder.starts_with(bench.at("cache/models")));
        assert_eq!(tree(&model.folder), tree(&shipped(name)));
        assert_eq!(bench.library.find(name, task).unwrap(), model);
        assert!(bench.library.list().contains(&model));
    }
    let image = bench.library.default(IMAGE).unwrap().manifest;
    assert_eq!(
        (image.native_width, image.native_height, image.multiple, image.steps),
        (128, 128, 16, 20)
    );
    assert_eq!((image.guidance, image.sampler.as_deref()), (4.0, Some("ddim")));
    assert!(image.video.is_none());
    let model = bench.library.default(VIDEO).unwrap();
    let video = model.video().unwrap();
    assert_eq!((video.frames, video.model_fps, video.native_fps, video.motion), (14, 7, 2.5, 127));
    assert_eq!((model.manifest.steps, video.min_guidance, video.max_guidance), (3, 1.15, 1.15));
    let played = f64::from(video.frames - 1) / video.native_fps;
    assert!(f64::from(video.max_runs) * played >= 60.0, "enough runs for the longest job");
    assert!(bench.library.default(IMAGE).unwrap().video().is_err());
}

#[test]
fn a_damaged_unpacked_model_is_repaired() {
    let bench = Bench::new();
    let model = bench.library.default(IMAGE).unwrap();
    let weights = model.folder.join("unet/diffusion_pytorch_model.safetensors");
    let intact = fs::read(&weights).unwrap();
    let mut flipped = intact.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damage in [&b""[..], &intact[..1000], &flipped] {
        fs::write(&weights, damage).unwrap();
        bench.library.default(IMAGE).unwrap();
        assert!(fs::read(&weights).unwrap() == intact);
    }
    fs::remove_dir_all(model.folder.join("vae")).unwrap();
    bench.library.default(IMAGE).unwrap();
    assert_eq!(tree(&model.folder), tree(&shipped("genvideo-tiny-t2i")));
    let left: Vec<_> = fs::read_dir(bench.at("cache/models"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "the model and the lock: {left:?}");
}

#[test]
fn many_at_once_unpack_one_intact_model() {
    let bench = Bench::new();
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let library = bench.library.clone();
                barrier.wait();
                let model = library.default(IMAGE).unwrap();
                assert_eq!(tree(&model.folder), tree(&shipped("genvideo-tiny-t2i")));
            });
        }
    });
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let bench = Bench::new();
    bench.write("cache", "a file in place of the folder");
    let error = bench.library.default(IMAGE).unwrap_err();
    assert!(matches!(error, Error::Unwritable { .. }), "{error}");
    assert!(error.to_string().contains("cache"), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn plain_folders_take_the_defaults_of_their_family() {
    let bench = Bench::new();
    bench.sd15("models/sd15");
    let blocks4 = r#""down_block_types": ["a", "b", "c", "d"]"#;
    let blocks3 = r#""down_block_types": ["a", "b", "c"]"#;
    let unet = |fields: &str| format!("{{{fields}}}");
    bench.model(
        "models/sd21",
        "StableDiffusionPipeline",
        &unet(&format!(r#""sample_size": 96, "cross_attention_dim": 1024, {blocks4}"#)),
    );
    bench.model(
        "more models/sdxl",
        "StableDiffusionXLPipeline",
        &unet(&format!(r#""sample_size": 128, "cross_attention_dim": 2048, {blocks3}"#)),
    );
    bench.model(
        "models/svd",
        "StableVideoDiffusionPipeline",
        &unet(&format!(r#""sample_size": 96, "num_frames": 25, {blocks4}"#)),
    );
    bench.model(
        "models/wide",
        "StableDiffusionPipeline",
        &unet(&format!(r#""sample_size": [40, 64], "cross_attention_dim": 5, {blocks4}"#)),
    );
    let cases = [
        ("sd15", IMAGE, "stable-diffusion-1", (512, 512), 64, (256, 1024)),
        ("sd21", IMAGE, "stable-diffusion-2", (768, 768), 64, (384, 1536)),
        ("sdxl", IMAGE, "stable-diffusion-xl", (1024, 1024), 32, (512, 2048)),
        ("svd", VIDEO, "stable-video-diffusion", (1024, 576), 64, (320, 2048)),
        ("wide", IMAGE, "stable-diffusion", (512, 320), 64, (192, 1024)),
    ];
    for (name, task, family, native, multiple, sides) in cases {
        let model = bench.library.find(name, task).unwrap();
        let manifest = &model.manifest;
        assert_eq!(
            (model.name.as_str(), model.source, manifest.family.as_str()),
            (name, Source::Folder, family)
        );
        assert_eq!((manifest.native_width, manifest.native_height), native, "{name}");
        assert_eq!(
            (manifest.multiple, (manifest.min_side, manifest.max_side)),
            (multiple, sides),
            "{name}"
        );
    }
    let svd = bench.library.find("svd", VIDEO).unwrap();
    let video = svd.video().unwrap();
    assert_eq!((video.frames, video.model_fps, video.motion, video.max_runs), (25, 7, 127, 18));
    assert_eq!((video.min_guidance, video.max_guidance, video.noise_aug), (1.0, 3.0, 0.02));
    let names: Vec<_> = bench.library.list().into_iter().map(|model| model.name).collect();
    assert_eq!(
        names,
        ["sd15", "sd21", "svd", "wide", "sdxl", "genvideo-tiny-t2i", "genvideo-tiny-i2v"]
    );
}

#[test]
fn manifests_lie_over_the_defaults() {
    let bench = Bench::new();
    bench.sd15("models/weights/photo-v2");
    bench.write(
        "models/photo.toml",
        "folder = \"weights/photo-v2\"\ntitle = \"Photo\"\nlicence = \"MIT\"\nnative_width = 640\nsteps = 12\nnegative = \"blurry\"\n",
    );
    bench.sd15("models/inside");
    bench.write("models/inside/genvideo.toml", "name = \"renamed\"\nsampler = \"euler\"\n");

    let photo = bench.find("photo").unwrap();
    assert_eq!(photo.folder, bench.at("models/weights/photo-v2"));
    let manifest = &photo.manifest;
    assert_eq!(
        (manifest.title.as_str(), manifest.licence.as_str(), manifest.steps),
        ("Photo", "MIT", 12)
    );
    assert_eq!(
        (manifest.native_width, manifest.native_height, manifest.max_side),
        (640, 512, 1280)
    );
    assert_eq!((manifest.guidance, manifest.negative.as_deref()), (7.5, Some("blurry")));
    assert_eq!(bench.find("renamed").unwrap().manifest.sampler.as_deref(), Some("euler"));
    let names: Vec<_> = bench.library.list().into_iter().map(|model| model.name).collect();
    assert!(
        names.contains(&"photo".to_owned()) && names.contains(&"renamed".to_owned()),
        "{names:?}"
    );
    assert!(
        !names.contains(&"weights/photo-v2".to_owned()),
        "listed once, by its manifest: {names:?}"
    );
}

#[test]
fn a_users_model_comes_before_the_built_in_one_of_that_name() {
    let bench = Bench::new();
    bench.sd15("models/genvideo-tiny-t2i");
    assert_eq!(bench.library.default(IMAGE).unwrap().source, Source::Folder);
    assert_eq!(bench.library.list().len(), 2);
}

#[test]
fn bad_manifests_are_refused_with_the_field() {
    let bench = Bench::new();
    bench.sd15("models/m");
    let unet = r#"{"sample_size": 96, "num_frames": 14, "down_block_types": ["a", "b", "c", "d"]}"#;
    bench.model("models/v", "StableVideoDiffusionPipeline", unet);
    let cases = [
        ("m", "stepz = 3", "stepz"),
        ("m", "steps = \"3\"", "steps"),
        ("m", "steps = 0", "`steps`"),
        ("m", "steps = -1", "steps"),
        ("m", "steps = 1001", "1..=1000"),
        ("m", "guidance = nan", "`guidance`"),
        ("m", "guidance = inf", "`guidance`"),
        ("m", "native_width = 500", "a multiple of 64"),
        ("m", "native_width = 9216", "`max_side`"),
        ("m", "multiple = 0", "`multiple`"),
        ("m", "max_side = 256", "`native_width`"),
        ("m", "memory_mb = 0", "`memory_mb`"),
        ("m", "task = \"image-to-video\"", "`task`"),
        ("m", "task = \"video\"", "task"),
        ("m", "name = \"../m\"", "`name`"),
        ("m", "name = \"\"", "`name`"),
        ("m", "[video]\nframes = 3", "`video`"),
        ("m", "title = 1\ntitle = 2", "title"),
        ("m", "= = =", "m.toml"),
        ("v", "[video]\nframes = 1", "`video.frames`"),
        ("v", "[video]\nmotion = 256", "`video.motion`"),
        ("v", "[video]\nnative_fps = 0.0", "`video.native_fps`"),
        ("v", "[video]\nnoise_aug = -0.1", "`video.noise_aug`"),
        ("v", "[video]\ndecode_chunk = 15", "`video.decode_chunk`"),
        ("v", "[video]\nmax_runs = 0", "`video.max_runs`"),
        ("v", "[video]\nframez = 3", "framez"),
    ];
    for (name, text, wanted) in cases {
        let path = format!("models/{name}.toml");
        bench.write(&path, text);
        let error = bench.library.find(name, if name == "v" { VIDEO } else { IMAGE }).unwrap_err();
        assert!(error.to_string().contains(wanted), "{text}: {error}");
        let (models, broken) = bench.library.scan();
        assert!(models.iter().all(|model| model.name != name), "{text}");
        assert_eq!(broken.len(), 1, "{text}");
        assert_eq!(broken[0].path, bench.at(&path));
        fs::remove_file(bench.at(&path)).unwrap();
    }
    bench.write("models/m.toml", &format!("title = \"{}\"", "x".repeat(2 << 20)));
    assert!(matches!(bench.find("m").unwrap_err(), Error::Malformed { .. }));
}

#[test]
fn names_and_manifests_stay_in_their_folder() {
    let bench = Bench::new();
    bench.sd15("outside");
    for name in ["../outside", "a/../../outside", "..", "./m", "a\0b"] {
        let error = bench.find(name).unwrap_err();
        assert!(matches!(error, Error::PathEscape { .. }), "{name:?}: {error}");
        assert!(error.hint().is_some());
    }
    for folder in ["../outside", "/etc", "a/../../outside", ""] {
        bench.write("models/m.toml", &format!("folder = \"{folder}\""));
        let error = bench.find("m").unwrap_err();
        assert!(matches!(error, Error::PathEscape { .. }), "{folder:?}: {error}");
    }
    fs::create_dir_all(bench.at("hf/hub/models--org--repo/refs")).unwrap();
    bench.write("hf/hub/models--org--repo/refs/main", "../../../../outside");
    assert!(matches!(bench.find("org/repo").unwrap_err(), Error::PathEscape { .. }));
}

#[test]
fn absolute_paths_name_any_model_folder() {
    let bench = Bench::new();
    bench.sd15("elsewhere/my model");
    let path = bench.at("elsewhere/my model");
    let model = bench.find(path.to_str().unwrap()).unwrap();
    assert_eq!((model.folder, model.name.as_str()), (path, "my model"));
    let missing = bench.find(bench.at("nowhere").to_str().unwrap()).unwrap_err();
    assert!(matches!(missing, Error::Unknown { .. }), "{missing}");
    assert!(matches!(bench.find("/etc/passwd").unwrap_err(), Error::Unknown { .. }));
    let empty = bench.find(bench.at("models").to_str().unwrap()).unwrap_err();
    assert!(matches!(empty, Error::NotAModel { .. }), "{empty}");
    assert!(empty.to_string().contains("model_index.json"), "{empty}");
}

#[test]
fn the_hugging_face_cache_is_read_at_main() {
    let bench = Bench::new();
    bench.sd15("hf/hub/models--org--some-repo/snapshots/abc123");
    bench.sd15("hf/hub/models--org--some-repo/snapshots/old");
    assert!(
        matches!(bench.find("org/some-repo").unwrap_err(), Error::Unknown { .. }),
        "which of the two?"
    );
    bench.write("hf/hub/models--org--some-repo/refs/main", "abc123\n");
    let model = bench.find("org/some-repo").unwrap();
    assert_eq!((model.name.as_str(), model.source), ("org/some-repo", Source::HfCache));
    assert!(model.folder.ends_with("snapshots/abc123"));
    assert_eq!(model.manifest.source, "org/some-repo");
    assert!(bench.library.list().contains(&model));

    // Files there are links into `blobs`, and most repositories hold something else.
    bench.sd15("hf/hub/models--solo/blobs/x");
    fs::create_dir_all(bench.at("hf/hub/models--solo/snapshots")).unwrap();
    symlink("../blobs/x", bench.at("hf/hub/models--solo/snapshots/only")).unwrap();
    bench.write("hf/hub/models--org--llm/refs/main", "1");
    bench.write("hf/hub/models--org--llm/snapshots/1/config.json", "{}");
    assert_eq!(bench.find("solo").unwrap().source, Source::HfCache);
    assert!(matches!(bench.find("org/llm").unwrap_err(), Error::NotAModel { .. }));
    let (models, broken) = bench.library.scan();
    assert_eq!((models.len(), broken.len()), (4, 0));
}

#[test]
fn unknown_names_are_answered_with_what_is_known() {
    let bench = Bench::new();
    bench.sd15("models/stable-diffusion-v1-5");
    let error = bench.find("stable-difusion-v1-5").unwrap_err();
    assert_eq!(
        error.to_string(),
        "no text-to-image model `stable-difusion-v1-5`; known: `stable-diffusion-v1-5`, `genvideo-tiny-t2i`"
    );
    assert_eq!(error.hint().unwrap(), "did you mean `stable-diffusion-v1-5`?");
    assert_eq!(
        bench.find("tiny").unwrap_err().hint().unwrap(),
        "did you mean `genvideo-tiny-t2i`?"
    );
    let hint = bench.find("nothing-like-it").unwrap_err().hint().unwrap();
    assert!(hint.contains("more models") && hint.contains("absolute path"), "{hint}");
    for name in ["", "x\u{1b}[31m", &"y".repeat(10_000)] {
        assert!(bench.find(name).is_err(), "{name:?}");
    }
}

#[test]
fn a_model_for_the_other_task_is_refused() {
    let bench = Bench::new();
    let error = bench.library.find("genvideo-tiny-i2v", IMAGE).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`genvideo-tiny-i2v` is a model for image-to-video, one for text-to-image is needed"
    );
    assert!(error.hint().unwrap().contains("video_model"));
    assert!(matches!(
        bench.library.find("genvideo-tiny-t2i", VIDEO).unwrap_err(),
        Error::WrongTask { .. }
    ));
    assert!(!bench.at("cache").exists(), "nothing was unpacked for it");
}

#[test]
fn broken_folders_are_listed_apart() {
    let bench = Bench::new();
    bench.sd15("models/good");
    bench.model("models/flux", "FluxPipeline", "{}");
    bench.write("models/cut/model_index.json", r#"{"_class_name": "#);
    bench.sd15("models/no-vae");
    fs::remove_dir_all(bench.at("models/no-vae/vae")).unwrap();
    bench.write("models/not-here.toml", "title = \"weights were never fetched\"");
    bench.write("models/notes/README.md", "no model");
    let (models, broken) = bench.library.scan();
    assert_eq!(models.len(), 3);
    let broken: Vec<_> = broken.iter().map(|broken| broken.error.to_string()).collect();
    assert_eq!(broken.len(), 4, "{broken:?}");
    for (at, wanted) in
        ["model_index.json", "cut", "FluxPipeline", "vae/config.json"].iter().enumerate()
    {
        assert!(broken[at].contains(wanted), "{at}: {broken:?}");
    }
}

#[test]
fn the_documented_manifest_is_accepted() {
    let readme = fs::read_to_string(shipped("README.md")).unwrap();
    let example = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let (image, video) = example.split_at(example.find("[video]").unwrap());
    let bench = Bench::new();
    bench.sd15("models/photo-v2");
    bench.write("models/first.toml", image);
    let photo = bench.find("photo").unwrap();
    assert_eq!((photo.folder, photo.manifest.memory_mb), (bench.at("models/photo-v2"), Some(4000)));
    let unet = r#"{"sample_size": 96, "num_frames": 14, "down_block_types": ["a", "b", "c", "d"]}"#;
    bench.model("models/svd", "StableVideoDiffusionPipeline", unet);
    let plain = bench.library.find("svd", VIDEO).unwrap();
    bench.write("models/svd.toml", video);
    assert_eq!(bench.library.find("svd", VIDEO).unwrap(), plain, "the example shows the defaults");
}

#[test]
fn known_models_are_told_from_unknown_ones() {
    let bench = Bench::new();
    let hint = "`genvideo models pull sd-turbo` fetches it (Stability AI Community License: https://stability.ai/license)";
    let error = bench.find("sd-turbo").unwrap_err();
    assert!(matches!(error, Error::NotPulled { .. }), "{error}");
    assert_eq!(error.hint().unwrap(), hint);
    let repo = bench.find("stabilityai/sd-turbo").unwrap_err();
    assert!(repo.hint().unwrap().contains("pull stabilityai/sd-turbo"), "{repo}");
    let other = bench.find("someone/thing").unwrap_err();
    assert!(matches!(other, Error::Unknown { .. }), "{other}");
    assert!(other.hint().unwrap().starts_with("`genvideo models pull someone/thing` fetches it"));
    assert!(matches!(bench.find("svd").unwrap_err(), Error::WrongTask { .. }));
    assert!(matches!(bench.library.find("svd", VIDEO).unwrap_err(), Error::NotPulled { .. }));
    // What is here counts.
    bench.sd15("models/sd-turbo");
    assert_eq!(bench.find("sd-turbo").unwrap().manifest.guidance, 7.5);
}

#[test]
fn every_manifest_of_the_models_folder_is_part_of_the_program() {
    let files = fs::read_dir(shipped("")).unwrap().map(|entry| entry.unwrap().path());
    let mut names: Vec<String> = files
        .filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .filter(|name| !name.starts_with("genvideo-tiny"))
        .collect();
    names.sort();
    let mut known = genvideo::hub::known::all();
    known.sort_by_key(|known| known.name);
    assert_eq!(known.iter().map(|known| known.name).collect::<Vec<_>>(), names);
    for known in known {
        let manifest = &known.manifest;
        assert_eq!(manifest.video.is_some(), known.task == VIDEO, "{}", known.name);
        assert!(manifest.memory_mb.is_some() && manifest.licence != "unknown", "{}", known.name);
        assert_eq!(manifest.source, known.upstream.repo, "{}", known.name);
        assert!(known.upstream.files.iter().all(|file| !file.ends_with(".bin")), "{}", known.name);
    }
    let bench = Bench::new();
    bench.sd15("models/m");
    for (text, wanted) in [
        ("repo = \"one\"", "`upstream.repo`"),
        ("repo = \"a/b\"\nrevision = \"../x\"", "`upstream.revision`"),
        ("repo = \"a/b\"\nvariant = \"a/b\"", "`upstream.variant`"),
        ("repo = \"a/b\"\nfiles = [\"../x\"]", "`upstream.files`"),
        ("repo = \"a/b\"\nfile = \"x\"", "file"),
    ] {
        bench.write("models/m.toml", &format!("[upstream]\n{text}\n"));
        let error = bench.find("m").unwrap_err();
        assert!(error.to_string().contains(wanted), "{text}: {error}");
    }
}
