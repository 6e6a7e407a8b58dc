//! The pair of small models that is part of the program.
//!
//! Their files are unpacked once into `<cache>/models/<name>-<hash of the files>/`, aside and then by one rename, under
//! a lock that other processes respect. Before each use the files are compared with the program's own, byte by byte,
//! and unpacked again when they differ; the engine reads them like any other model.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use rust_embed::RustEmbed;
use sha2::{Digest, Sha256};

use super::error::writing;
use super::folder::{self, Configs};
use super::{Error, Model, Source, Task, digest, manifest};

#[derive(RustEmbed)]
#[folder = "models/genvideo-tiny-t2i"]
struct TextToImage;

#[derive(RustEmbed)]
#[folder = "models/genvideo-tiny-i2v"]
struct ImageToVideo;

/// One built-in model.
struct BuiltIn {
    name: &'static str,
    manifest: &'static str,
    get: fn(&str) -> Option<rust_embed::EmbeddedFile>,
    names: fn() -> Vec<Cow<'static, str>>,
}

static PAIR: [BuiltIn; 2] = [
    BuiltIn {
        name: "genvideo-tiny-t2i",
        manifest: include_str!("../../models/genvideo-tiny-t2i.toml"),
        get: TextToImage::get,
        names: || TextToImage::iter().collect(),
    },
    BuiltIn {
        name: "genvideo-tiny-i2v",
        manifest: include_str!("../../models/genvideo-tiny-i2v.toml"),
        get: ImageToVideo::get,
        names: || ImageToVideo::iter().collect(),
    },
];

/// The built-in model for `task`.
pub(super) fn default_name(task: Task) -> &'static str {
    match task {
        Task::TextToImage => PAIR[0].name,
        Task::ImageToVideo => PAIR[1].name,
    }
}

/// Both, as they are or would be once unpacked.
pub(super) fn all(cache_dir: &Path) -> Vec<Model> {
    PAIR.iter().map(|built_in| built_in.model(cache_dir)).collect()
}

/// The built-in model of that name, as it is or would be once unpacked.
pub(super) fn named(cache_dir: &Path, name: &str) -> Option<Model> {
    PAIR.iter().find(|built_in| built_in.name == name).map(|built_in| built_in.model(cache_dir))
}

/// How many files the built-in model of that name has.
pub(super) fn files_of(name: &str) -> usize {
    PAIR.iter()
        .find(|built_in| built_in.name == name)
        .map_or(0, |built_in| (built_in.names)().len())
}

/// Makes sure that the files of `name` lie in its folder, intact.
pub(super) fn unpack(cache_dir: &Path, name: &str) -> Result<(), Error> {
    let Some(built_in) = PAIR.iter().find(|built_in| built_in.name == name) else { return Ok(()) };
    let target = built_in.folder(cache_dir);
    if built_in.is_intact(&target) {
        return Ok(());
    }
    let models = cache_dir.join("models");
    fs::create_dir_all(&models).map_err(|source| writing(&models, source))?;
    let lock = models.join("unpack.lock");
    let held = File::options().create(true).truncate(false).write(true).open(&lock);
    let held = held.map_err(|source| writing(&lock, source))?;
    held.lock().map_err(|source| writing(&lock, source))?;
    if built_in.is_intact(&target) {
        return Ok(());
    }
    let aside = tempfile::Builder::new().prefix(".unpack-").tempdir_in(&models);
    let aside = aside.map_err(|source| writing(&models, source))?;
    let fresh = aside.path().join("fresh");
    for (name, content) in built_in.files() {
        write_synced(&fresh.join(&*name), &content)?;
    }
    if target.exists() {
        // Damaged. Whoever has it open keeps what it opened.
        fs::rename(&target, aside.path().join("damaged"))
            .map_err(|source| writing(&target, source))?;
    }
    fs::rename(&fresh, &target).map_err(|source| writing(&target, source))?;
    File::open(&models)
        .and_then(|folder| folder.sync_all())
        .map_err(|source| writing(&models, source))
}

impl BuiltIn {
    fn model(&self, cache_dir: &Path) -> Model {
        let path = PathBuf::from(format!("{}.toml", self.name));
        manifest::parse(&path, self.manifest)
            .and_then(|written| {
                let folder = self.folder(cache_dir);
                folder::describe_configs(
                    self,
                    &folder,
                    self.name,
                    Some((path, written)),
                    Source::Embedded,
                )
            })
            .expect("the built-in manifests and configs are part of the program, and tested")
    }

    fn files(&self) -> impl Iterator<Item = (Cow<'static, str>, Cow<'static, [u8]>)> + '_ {
        (self.names)()
            .into_iter()
            .filter_map(|name| (self.get)(&name).map(|file| (name, file.data)))
    }

    fn folder(&self, cache_dir: &Path) -> PathBuf {
        let mut hasher = Sha256::new();
        for name in (self.names)() {
            hasher.update(name.as_bytes());
            hasher.update(
                (self.get)(&name).map(|file| file.metadata.sha256_hash()).unwrap_or_default(),
            );
        }
        let hash = digest::hex(&hasher.finalize()[..6]);
        cache_dir.join("models").join(format!("{}-{hash}", self.name))
    }

    fn is_intact(&self, folder: &Path) -> bool {
        self.files().all(|(name, content)| {
            let path = folder.join(&*name);
            let same_length =
                fs::metadata(&path).is_ok_and(|data| data.len() == content.len() as u64);
            same_length && fs::read(&path).is_ok_and(|found| found == *content)
        })
    }
}

impl Configs for BuiltIn {
    fn read(&self, name: &str) -> Result<Option<String>, Error> {
        Ok((self.get)(name).map(|file| String::from_utf8_lossy(&file.data).into_owned()))
    }
}

fn write_synced(path: &Path, content: &[u8]) -> Result<(), Error> {
    let write = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        let mut file = File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|source| writing(path, source))
}
