//! Takes a file or a diffusers folder of the user's into the first models folder, under a name.
//!
//! A file on the same disk is not copied: it gets a second name (a hard link), which stays when the first one goes.
//! What a file is and whether it is sound is the engine's to say, before this.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::writing;
use super::folder::sorted;
use super::lock::{Lock, Locked};
use super::manifest::{Upstream, is_name};
use super::{Error, Source, wanted};

/// What to import.
#[derive(Clone, Debug)]
pub struct Import {
    /// The file or folder.
    pub source: PathBuf,
    /// What it is to be called; `None` takes the name it has.
    pub name: Option<String>,
    /// A symbolic link in place of the files: it takes no room, and the files must stay where they are.
    pub link: bool,
    /// Whether it is a LoRA, which lies in a folder of its own.
    pub lora: bool,
}

/// What an import left.
#[derive(Clone, Debug)]
pub struct Imported {
    /// What it is called.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its files.
    pub files: usize,
    /// Their bytes in all.
    pub bytes: u64,
}

/// The files of a diffusers folder that a run needs, by their path in it.
///
/// # Errors
/// A folder that holds no model in the diffusers layout that is known here.
pub fn files_of(folder: &Path) -> Result<Vec<String>, Error> {
    super::folder::describe(folder, Source::Folder)?;
    let mut all = Vec::new();
    for path in sorted(folder) {
        let name = |path: &Path| {
            let relative = path.strip_prefix(folder).unwrap_or(path);
            relative.to_string_lossy().into_owned()
        };
        if path.is_dir() {
            all.extend(sorted(&path).iter().filter(|path| path.is_file()).map(|path| name(path)));
        } else {
            all.push(name(&path));
        }
    }
    let any = Upstream::unknown("");
    let variants =
        [None, Some("fp16".to_owned())].map(|variant| Upstream { variant, ..any.clone() });
    let selected: Vec<_> = variants.iter().map(|upstream| wanted::select(&all, upstream)).collect();
    let both = selected[0].iter().chain(&selected[1]).cloned();
    let files: Vec<String> = both.collect::<std::collections::BTreeSet<_>>().into_iter().collect();
    let bare = wanted::without_weights(&files);
    if bare.is_empty() {
        return Ok(files);
    }
    let reason = format!("it has no safetensors weights that can be used in {}", bare.join(", "));
    Err(Error::NotAModel { folder: folder.to_owned(), reason })
}

/// Puts the model into `dir` and writes down what its files are.
///
/// # Errors
/// A name that is taken or makes no sense, a folder that holds no model, a disk that is full or cannot be written.
pub fn import(dir: &Path, order: &Import) -> Result<Imported, Error> {
    let source = order.source.canonicalize();
    let source =
        source.map_err(|error| Error::Unreadable { path: order.source.clone(), source: error })?;
    let is_folder = source.is_dir();
    let own = if is_folder { source.file_name() } else { source.file_stem() };
    let own = own.unwrap_or_default().to_string_lossy().into_owned();
    let name = order.name.clone().unwrap_or(own);
    if !is_name(&name) || name.contains('/') {
        return Err(Error::OutOfRange {
            path: source,
            field: "name",
            value: format!("`{}`", name.escape_debug()),
            allowed: "1..=128 letters, digits, `.`, `-` and `_`".to_owned(),
        });
    }
    let target = match (is_folder, order.lora) {
        (true, _) => name.clone(),
        (false, false) => format!("{name}.safetensors"),
        (false, true) => format!("loras/{name}.safetensors"),
    };
    let lock_path = Lock::of_import(dir, &name);
    for taken in [dir.join(&target), lock_path.clone(), dir.join(format!("{name}.toml"))] {
        if taken.symlink_metadata().is_ok() {
            return Err(Error::Taken { name, path: taken });
        }
    }
    let files = if is_folder { files_of(&source)? } else { vec![String::new()] };
    place(&source, &dir.join(&target), &files, order.link)?;
    let locked: Result<Vec<Locked>, Error> = files
        .iter()
        .map(|file| {
            let path = format!("{target}/{file}");
            Locked::of(dir, path.trim_end_matches('/'))
        })
        .collect();
    let lock = Lock {
        source: source.display().to_string(),
        revision: None,
        commit: None,
        linked: order.link.then(|| target.clone()),
        files: locked?,
    };
    lock.write(&lock_path)?;
    let bytes = lock.files.iter().map(|file| file.bytes).sum();
    Ok(Imported { name, path: dir.join(target), files: files.len(), bytes })
}

/// Makes `target` of `source`: aside and then by one rename.
fn place(source: &Path, target: &Path, files: &[String], link: bool) -> Result<(), Error> {
    let failed = |source| writing(target, source);
    let parent = target.parent().unwrap_or(target);
    fs::create_dir_all(parent).map_err(failed)?;
    if link {
        return std::os::unix::fs::symlink(source, target).map_err(failed);
    }
    let aside = tempfile::Builder::new().prefix(".import-").tempdir_in(parent).map_err(failed)?;
    let fresh = aside.path().join("fresh");
    for file in files {
        // A path of no name is the file itself.
        let (from, to) = if file.is_empty() {
            (source.to_owned(), fresh.clone())
        } else {
            (source.join(file), fresh.join(file))
        };
        second_name(&from, &to).map_err(failed)?;
    }
    fs::rename(&fresh, target).map_err(failed)
}

/// A hard link, else a copy.
fn second_name(from: &Path, to: &Path) -> io::Result<()> {
    to.parent().map_or(Ok(()), fs::create_dir_all)?;
    // The link is to be one to the file, not to a link to it.
    let from = from.canonicalize()?;
    if fs::hard_link(&from, to).is_err() {
        fs::copy(&from, to)?;
        fs::File::open(to)?.sync_all()?;
    }
    Ok(())
}
