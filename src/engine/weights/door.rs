//! What a weights file really is, by its first bytes: the name it goes by decides nothing.
//!
//! Only safetensors passes. Pickles can run code and are never parsed; archives are never unpacked; GGUF files are
//! checked and then refused for now.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::gguf;
use crate::engine::{Error, Result};

/// First bytes of what people rename, with what it is.
const MAGICS: &[(&[u8], &str)] = &[
    (b"PK\x03\x04", "a zip archive, as PyTorch writes its pickles"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80\x02", "a pickle, which can run code"),
    (b"\x80\x03", "a pickle, which can run code"),
    (b"\x80\x04", "a pickle, which can run code"),
    (b"\x80\x05", "a pickle, which can run code"),
];

/// Endings of pickles, for those whose first bytes say nothing.
const PICKLE_ENDINGS: &[&str] = &["ckpt", "pt", "pth", "bin", "pkl", "pickle", "th"];

/// Refuses `file` unless it is safetensors, or goes by that name and is nothing else known.
pub(super) fn check(path: &Path, file: &mut File) -> Result<()> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let size = file.metadata().map_err(io)?.len();
    let mut head = Vec::new();
    (&mut *file).take(16).read_to_end(&mut head).map_err(io)?;
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    if opens_as_safetensors(&head, size) {
        return Ok(());
    }
    let refused = |what: &str| Error::WeightsUnsupported {
        path: path.to_path_buf(),
        what: format!("{what}: wanted a safetensors file"),
    };
    if head.starts_with(b"GGUF") {
        gguf::check(path, file, size)?;
        return Err(refused("a GGUF file, which is not read yet"));
    }
    if let Some((_, what)) = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(refused(what));
    }
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match ending.as_str() {
        // A damaged one: the header says how.
        "safetensors" => Ok(()),
        "gguf" => Err(Error::WeightsFormat {
            path: path.to_path_buf(),
            problem: "it has not the first bytes of a GGUF file".into(),
        }),
        ending if PICKLE_ENDINGS.contains(&ending) => Err(refused("a pickle, which can run code")),
        _ => Err(refused("no safetensors file")),
    }
}

/// A length that fits the file, then the brace of the header.
fn opens_as_safetensors(head: &[u8], size: u64) -> bool {
    let Some((length, [b'{', ..])) = head.split_first_chunk::<8>() else { return false };
    u64::from_le_bytes(*length) <= size.saturating_sub(8)
}
