//! Files of a CLIP tokenizer: vocabulary and merges, checked before they are used.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use super::{Error, Result};

/// Largest vocabulary file that is read; published ones stay below 4 MiB.
const MAX_FILE_BYTES: u64 = 32 << 20;

/// The merges of CLIP, with which every published text encoder of Stable Diffusion was trained.
const CLIP_MERGES: &[u8] = include_bytes!("../../models/clip-bpe/merges.txt.gz");

/// Begin and end of a prompt.
pub(super) const SPECIALS: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// Tokens with their ids, and pairs to merge.
type Vocabulary = (HashMap<String, u32>, Vec<(String, String)>);

/// CLIP's vocabulary of `entries` tokens: the byte symbols, the same at the end of a word, one entry a merge, begin
/// and end.
pub(super) fn clip(entries: usize) -> std::result::Result<Vocabulary, String> {
    let mut text = String::new();
    GzDecoder::new(CLIP_MERGES).read_to_string(&mut text).map_err(|error| error.to_string())?;
    let mut merges = parse_merges(&text)?;
    let fixed = 2 * 256 + SPECIALS.len();
    let count = entries
        .checked_sub(fixed)
        .filter(|count| *count <= merges.len())
        .ok_or_else(|| format!("{entries} entries: wanted {fixed} to {}", fixed + merges.len()))?;
    merges.truncate(count);
    let symbols = byte_symbols();
    let tokens = symbols
        .iter()
        .map(char::to_string)
        .chain(symbols.iter().map(|symbol| format!("{symbol}</w>")))
        .chain(merges.iter().map(|(left, right)| format!("{left}{right}")))
        .chain(SPECIALS.map(str::to_owned));
    Ok((tokens.zip(0..).collect(), merges))
}

/// A letter for each byte, in CLIP's order: printable ones stand for themselves and come first.
fn byte_symbols() -> Vec<char> {
    let printable: Vec<u32> = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).collect();
    let others = (0..256).filter(|byte| !printable.contains(byte)).zip(256..).map(|(_, code)| code);
    printable.iter().copied().chain(others).filter_map(char::from_u32).collect()
}

/// `vocab.json` of a tokenizer folder: each token with an id of its own.
pub(super) fn read_vocabulary(folder: &Path) -> Result<HashMap<String, u32>> {
    let path = folder.join("vocab.json");
    let bytes = read_file(&path)?;
    let bad = |problem: String| Error::Tokenizer { path: path.clone(), problem };
    let vocabulary: HashMap<String, u32> =
        serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
    let mut seen = HashSet::new();
    match vocabulary.iter().find(|(_, id)| !seen.insert(**id)) {
        Some((_, id)) => Err(bad(format!("two tokens have the id {id}"))),
        None => Ok(vocabulary),
    }
}

/// `merges.txt` of a tokenizer folder.
pub(super) fn read_merges(folder: &Path) -> Result<Vec<(String, String)>> {
    let path = folder.join("merges.txt");
    let bad = |problem: String| Error::Tokenizer { path: path.clone(), problem };
    let text = String::from_utf8(read_file(&path)?).map_err(|error| bad(error.to_string()))?;
    parse_merges(&text).map_err(bad)
}

/// Pairs of a merge list, whose first line may be its version.
fn parse_merges(text: &str) -> std::result::Result<Vec<(String, String)>, String> {
    let lines = text.lines().enumerate().filter(|(index, line)| {
        let is_version = *index == 0 && line.starts_with("#version");
        !is_version && !line.trim().is_empty()
    });
    lines
        .map(|(index, line)| match line.split(' ').collect::<Vec<_>>().as_slice() {
            [left, right] => Ok((left.to_string(), right.to_string())),
            _ => Err(format!("line {} is not a pair", index + 1)),
        })
        .collect()
}

/// A file of a tokenizer, whole.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>> {
    if !path.is_file() {
        return Err(Error::Missing {
            path: path.to_path_buf(),
            wanted: "a file of the tokenizer".into(),
        });
    }
    let io = |source| Error::Io { path: PathBuf::from(path), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::TooLarge { path: path.to_path_buf(), limit: MAX_FILE_BYTES });
    }
    if bytes.is_empty() {
        return Err(Error::EmptyFile { path: path.to_path_buf() });
    }
    Ok(bytes)
}
