//! A finished job's files, copied from the store to where the user wants them, under names that tell what they are.
//!
//! The name is the prompt's words and the first digits of the job key. A name in use is never written over: the whole
//! set takes the next free number. A file has its name when it is whole.

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::failure::Failure;
use crate::job::class::ErrorClass;
use crate::job::result::{Asset, Assets};
use crate::store::{self, JobKey, Store};

/// Longest slug in characters; four bytes each stay under the 255 bytes of a file name.
const SLUG_CHARACTERS: usize = 48;

/// Where the files of a job are.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Delivered {
    /// The image; the first of several.
    pub(crate) image: Option<PathBuf>,
    /// The others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) more_images: Vec<PathBuf>,
    /// The video.
    pub(crate) video: Option<PathBuf>,
    /// The receipt.
    pub(crate) receipt: Option<PathBuf>,
}

impl Delivered {
    /// Every path, in the order they are printed.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let rest = [&self.video, &self.receipt].into_iter().flatten();
        self.image.iter().chain(&self.more_images).chain(rest)
    }
}

/// Makes `out` if need be and checks that a file can be written there: before hours of work, not after. Returns its
/// whole path.
pub(crate) fn prepare(out: &Path) -> Result<PathBuf, Failure> {
    let check = || {
        fs::create_dir_all(out)?;
        unnamed(out)?;
        fs::canonicalize(out)
    };
    check().map_err(|error| unwritable(out, &error))
}

/// A file in `out` that has no name yet, and goes when it gets none.
fn unnamed(out: &Path) -> io::Result<NamedTempFile> {
    // As any program's files, so less the user's mask.
    let open = Permissions::from_mode(0o666);
    tempfile::Builder::new().prefix(".genvideo-").permissions(open).tempfile_in(out)
}

/// What a receipt says about the job, as far as names go.
#[derive(Deserialize)]
struct Receipt {
    job_key: JobKey,
    request: Request,
}

#[derive(Deserialize)]
struct Request {
    prompt: String,
}

/// What the files of a job are called after: its prompt, for people, and its key, which tells it from others.
fn stem(store: &Store, assets: &Assets) -> Option<String> {
    let receipt = store.get_blob(&assets.receipt.as_ref()?.sha256).ok()?;
    let receipt: Receipt = serde_json::from_slice(&receipt).ok()?;
    let key = receipt.job_key.to_string();
    Some(format!("{}-{}", slug(&receipt.request.prompt), key.get(..8).unwrap_or(&key)))
}

/// Copies the files of a job into `out`.
pub(crate) fn copy(store: &Store, out: &Path, assets: &Assets) -> Result<Delivered, Failure> {
    let out = prepare(out)?;
    // Without a receipt the copy below fails anyway, and says why.
    let stem = stem(store, assets).unwrap_or_else(|| "genvideo".to_owned());
    let named = |asset: &'_ Option<Asset>, end: &str| Some((asset.clone()?, end.to_owned()));
    let others = assets.images.iter().zip(1..).skip(1);
    let others = others.map(|(asset, number)| (asset.clone(), format!("{number}.png")));
    let wanted: Vec<(Asset, String)> = named(&assets.image, "png")
        .into_iter()
        .chain(others)
        .chain(named(&assets.video, "mp4"))
        .chain(named(&assets.receipt, "receipt.json"))
        .collect();
    let ends: Vec<&str> = wanted.iter().map(|(_, end)| end.as_str()).collect();
    let files: Result<Vec<_>, _> =
        wanted.iter().map(|(asset, _)| fetch(store, asset, &out)).collect();
    let files = files?;
    let claimed = claim(&out, &stem, &ends).map_err(|error| unwritable(&out, &error))?;
    for (file, path) in files.into_iter().zip(&claimed) {
        if let Err(refused) = file.persist(path) {
            unclaim(&claimed);
            return Err(unwritable(path, &refused.error));
        }
    }
    let path_of = |end: &str| {
        let index = ends.iter().position(|name| *name == end)?;
        Some(claimed[index].clone())
    };
    let more = 2..=assets.images.len();
    Ok(Delivered {
        image: path_of("png"),
        more_images: more.filter_map(|number| path_of(&format!("{number}.png"))).collect(),
        video: path_of("mp4"),
        receipt: path_of("receipt.json"),
    })
}

/// The content of `asset`, in a file in `out` that has no name yet.
fn fetch(store: &Store, asset: &Asset, out: &Path) -> Result<NamedTempFile, Failure> {
    let elsewhere = |error: &dyn std::fmt::Display| {
        Failure::of(
            ErrorClass::OutputUnwritable,
            format!("the store does not hold `{}`: {error}", asset.sha256),
        )
        .hint(format!(
            "the worker that made it keeps another store; it says the file is at {}",
            asset.url
        ))
    };
    let failed = |error: io::Error| unwritable(out, &error);
    let mut file = unnamed(out).map_err(failed)?;
    match store.copy_blob(&asset.sha256, out, file.as_file_mut()) {
        Err(error @ store::Error::Missing { .. }) => return Err(elsewhere(&error)),
        Err(store::Error::DiskFull { source, .. } | store::Error::Unwritable { source, .. }) => {
            return Err(failed(source));
        }
        copied => copied?,
    }
    file.as_file().sync_all().map_err(failed)?;
    Ok(file)
}

/// Creates an empty `stem.END` for every end, or `stem-2.END`, `stem-3.END`… when one of them exists.
fn claim(out: &Path, stem: &str, ends: &[&str]) -> io::Result<Vec<PathBuf>> {
    let mut number = 1_u32;
    loop {
        let stem = if number == 1 { stem.to_owned() } else { format!("{stem}-{number}") };
        let mut claimed = Vec::new();
        let refused = ends.iter().find_map(|end| {
            let path = out.join(format!("{stem}.{end}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(_) => {
                    claimed.push(path);
                    None
                }
                Err(error) => Some(error),
            }
        });
        let Some(error) = refused else { return Ok(claimed) };
        unclaim(&claimed);
        if error.kind() != io::ErrorKind::AlreadyExists {
            return Err(error);
        }
        number += 1;
    }
}

fn unclaim(claimed: &[PathBuf]) {
    for path in claimed {
        let _ = fs::remove_file(path);
    }
}

/// The prompt as part of a file name: letters and digits of any script, all else one dash.
fn slug(prompt: &str) -> String {
    let mut slug = String::new();
    let mut length = 0;
    for letter in prompt.chars() {
        if length == SLUG_CHARACTERS {
            break;
        }
        let kept = if letter.is_alphanumeric() { letter } else { '-' };
        if kept == '-' && (slug.is_empty() || slug.ends_with('-')) {
            continue;
        }
        slug.extend(kept.to_lowercase());
        length += 1;
    }
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() { "genvideo".to_owned() } else { slug.to_owned() }
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::of(ErrorClass::OutputUnwritable, format!("cannot write `{}`: {error}", path.display()))
        .hint("choose another folder with `--out DIR`")
}

#[cfg(test)]
mod tests {
    use super::{claim, slug};

    #[test]
    fn a_prompt_becomes_a_name_one_can_read() {
        let cases = [
            ("a cute kitten playing in a garden", "a-cute-kitten-playing-in-a-garden"),
            ("一只可爱的小猫在花园里玩耍", "一只可爱的小猫在花园里玩耍"),
            ("Ünïcode, Straße & CO.", "ünïcode-straße-co"),
            ("../../etc/passwd", "etc-passwd"),
            ("🎉🎉", "genvideo"),
            ("a\u{202e}b\nc\td", "a-b-c-d"),
        ];
        for (prompt, wanted) in cases {
            assert_eq!(slug(prompt), wanted, "{prompt:?}");
        }
        assert!(slug(&"长".repeat(4000)).len() < 200);
    }

    #[test]
    fn a_taken_name_moves_the_whole_set_on() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.mp4"), "mine").unwrap();
        let names = |claimed: Vec<std::path::PathBuf>| {
            let name =
                |path: &std::path::Path| path.file_name().unwrap().to_str().unwrap().to_owned();
            claimed.iter().map(|path| name(path)).collect::<Vec<_>>()
        };
        assert_eq!(
            names(claim(folder.path(), "a", &["png", "mp4"]).unwrap()),
            ["a-2.png", "a-2.mp4"]
        );
        assert_eq!(
            names(claim(folder.path(), "a", &["png", "mp4"]).unwrap()),
            ["a-3.png", "a-3.mp4"]
        );
        assert!(!folder.path().join("a.png").exists());
        assert_eq!(std::fs::read_to_string(folder.path().join("a.mp4")).unwrap(), "mine");
    }
}
