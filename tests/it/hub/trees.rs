//! Folders of ComfyUI and A1111, read in place: which names their files have.

use std::fs;
use std::path::{Path, PathBuf};

use genvideo::hub::{Error, Extras, Library, Places, Task};
use tempfile::TempDir;

/// A disk on which other programs keep their files.
struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        for path in [
            "comfy/models/checkpoints/dream.safetensors",
            "comfy/models/checkpoints/xl/photo.safetensors",
            "comfy/models/checkpoints/xl/twin.safetensors",
            "comfy/models/checkpoints/old/twin.safetensors",
            "comfy/models/loras/flat/soft.safetensors",
            "comfy/models/loras/hard.safetensors",
            "comfy/models/vae/fine.safetensors",
            "webui/models/Stable-diffusion/anime.safetensors",
            "webui/models/Lora/line.safetensors",
            "webui/models/LyCORIS/ink.safetensors",
            "webui/models/VAE/nested/round.safetensors",
            "own/plain.safetensors",
            "far/a/one.safetensors",
            "far/b/two.safetensors",
            "far/c/tint.safetensors",
        ] {
            checkpoint(&disk.at(path));
        }
        disk
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn library(&self, dirs: &[&str], yaml: &[&str]) -> Library {
        let places = Places {
            models_dirs: dirs.iter().map(|dir| self.at(dir)).collect(),
            cache_dir: self.at("cache"),
            hf_home: self.at("hf"),
        };
        let extra_model_paths = yaml.iter().map(|path| self.at(path)).collect();
        Library::open_with(places, Extras { hf_cache: None, extra_model_paths })
    }
}

/// A file whose header says Stable Diffusion 1, which is all that the library looks at.
fn checkpoint(path: &Path) {
    let tensor = r#"{"dtype":"F16","shape":[1],"data_offsets":[0,2]}"#;
    let header = format!(
        r#"{{"model.diffusion_model.input_blocks.0.0.weight":{tensor},"cond_stage_model.transformer.x":{tensor}}}"#
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0, 0]);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The file a name means, as `model`, `lora` or `vae`, or the start of the refusal.
fn found(library: &Library, kind: &str, name: &str) -> Result<PathBuf, Error> {
    match kind {
        "model" => library.find(name, Task::TextToImage).map(|model| model.folder),
        "lora" => library.find_lora(name),
        _ => library.find_vae(name),
    }
}

#[test]
fn files_go_by_their_path_and_by_their_bare_name() {
    let disk = Disk::new();
    let cases: &[(&[&str], &str, &str, &str)] = &[
        (&["comfy"], "model", "dream", "comfy/models/checkpoints/dream.safetensors"),
        (&["comfy"], "model", "dream.safetensors", "comfy/models/checkpoints/dream.safetensors"),
        (&["comfy/models"], "model", "dream", "comfy/models/checkpoints/dream.safetensors"),
        (&["comfy"], "model", "xl/photo", "comfy/models/checkpoints/xl/photo.safetensors"),
        (&["comfy"], "model", "photo", "comfy/models/checkpoints/xl/photo.safetensors"),
        (&["comfy"], "model", "photo.safetensors", "comfy/models/checkpoints/xl/photo.safetensors"),
        (&["comfy"], "model", "old/twin", "comfy/models/checkpoints/old/twin.safetensors"),
        (&["comfy"], "lora", "hard", "comfy/models/loras/hard.safetensors"),
        (&["comfy"], "lora", "soft", "comfy/models/loras/flat/soft.safetensors"),
        (&["comfy"], "lora", "flat/soft.safetensors", "comfy/models/loras/flat/soft.safetensors"),
        (&["comfy"], "vae", "fine", "comfy/models/vae/fine.safetensors"),
        (&["webui"], "model", "anime", "webui/models/Stable-diffusion/anime.safetensors"),
        (&["webui"], "lora", "line", "webui/models/Lora/line.safetensors"),
        (&["webui"], "lora", "ink", "webui/models/LyCORIS/ink.safetensors"),
        (&["webui"], "vae", "round", "webui/models/VAE/nested/round.safetensors"),
        (
            &["own", "comfy", "webui"],
            "model",
            "anime",
            "webui/models/Stable-diffusion/anime.safetensors",
        ),
        (&["own", "comfy"], "model", "plain", "own/plain.safetensors"),
    ];
    for (dirs, kind, name, wanted) in cases {
        let library = disk.library(dirs, &[]);
        assert_eq!(found(&library, kind, name).unwrap(), disk.at(wanted), "{dirs:?} {kind} {name}");
    }
    let path = disk.at("comfy/models/vae/fine.safetensors");
    let library = disk.library(&[], &[]);
    assert_eq!(library.find_vae(path.to_str().unwrap()).unwrap(), path);
}

#[test]
fn names_that_mean_nothing_or_too_much_are_refused() {
    let disk = Disk::new();
    let library = disk.library(&["comfy", "webui"], &[]);
    let cases = [
        ("model", "twin", "old/twin` or `xl/twin"),
        ("model", "fine", "absolute path"),
        ("model", "soft", "absolute path"),
        ("lora", "dream", "`loras` below"),
        ("lora", "none", "`loras` below"),
        ("vae", "none", "`vae` below"),
        ("vae", "/nowhere/none.safetensors", "`vae` below"),
        ("vae", "../vae/fine", "plain name"),
        ("vae", "a\0b", "plain name"),
    ];
    for (kind, name, hint) in cases {
        let error = found(&library, kind, name).unwrap_err();
        let said = error.hint().unwrap_or_default();
        assert!(said.contains(hint), "{kind} {name}: {error}; {said}");
    }
    let error = found(&library, "model", "twin").unwrap_err();
    assert!(matches!(&error, Error::Ambiguous { paths, .. } if paths.len() == 2), "{error}");
    for part in ["old/twin.safetensors", "xl/twin.safetensors"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn lists_name_every_checkpoint_once() {
    let disk = Disk::new();
    // The second folder is in the first one, too.
    let library = disk.library(&["comfy", "comfy/models", "webui"], &[]);
    let names: Vec<String> = library.list().into_iter().map(|model| model.name).collect();
    assert_eq!(
        names,
        [
            "dream",
            "old/twin",
            "xl/photo",
            "xl/twin",
            "anime",
            "genvideo-tiny-t2i",
            "genvideo-tiny-i2v"
        ]
    );
    assert!(library.scan().1.is_empty());
}

#[test]
fn extra_model_paths_name_further_folders() {
    let disk = Disk::new();
    let comfy = "comfyui:\n    base_path: ../far\n    checkpoints: |\n        a/\n        b/\n    \
                 loras: c\n    clip: c\nempty:\n";
    let a111 = format!(
        "a111:\n  base_path: {}\n  checkpoints: models/Stable-diffusion\n  vae: models/VAE\n  \
         loras: |\n    models/Lora\n    models/LyCORIS\nmine:\n  is_default: true\n  vae: {}\n",
        disk.at("webui").display(),
        disk.at("far/c").display(),
    );
    // In a models folder it is found; elsewhere a setting names it.
    fs::write(disk.at("own/extra_model_paths.yaml"), comfy).unwrap();
    fs::write(disk.at("second.yaml"), a111).unwrap();
    let library = disk.library(&["own"], &["second.yaml"]);
    for (kind, name, wanted) in [
        ("model", "plain", "own/plain.safetensors"),
        ("model", "one", "own/../far/a/one.safetensors"),
        ("model", "two", "own/../far/b/two.safetensors"),
        ("lora", "tint", "own/../far/c/tint.safetensors"),
        ("model", "anime", "webui/models/Stable-diffusion/anime.safetensors"),
        ("lora", "ink", "webui/models/LyCORIS/ink.safetensors"),
        ("vae", "round", "webui/models/VAE/nested/round.safetensors"),
        ("vae", "tint", "far/c/tint.safetensors"),
    ] {
        assert_eq!(found(&library, kind, name).unwrap(), disk.at(wanted), "{kind} {name}");
    }
    assert_eq!(library.list().len(), 4 + 2);
}

#[test]
fn a_yaml_file_that_makes_no_sense_is_named() {
    let disk = Disk::new();
    for text in ["a: [", "- a\n- b\n", "a: text\n"] {
        fs::write(disk.at("bad.yaml"), text).unwrap();
        let library = disk.library(&["own"], &["bad.yaml"]);
        assert!(found(&library, "model", "plain").is_ok(), "{text:?} is in nobody's way");
        let (_, broken) = library.scan();
        assert_eq!(broken.len(), 1, "{text:?}");
        let error = found(&library, "model", "one").unwrap_err();
        assert!(error.to_string().contains("bad.yaml"), "{text:?}: {error}");
    }
    let library = disk.library(&["own"], &["nowhere.yaml"]);
    assert!(library.scan().1[0].error.to_string().contains("nowhere.yaml"));
    fs::write(disk.at("empty.yaml"), "").unwrap();
    assert!(disk.library(&["own"], &["empty.yaml"]).scan().1.is_empty());
}
