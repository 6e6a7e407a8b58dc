//! Prompts to token ids, as the CLIP tokenizers of transformers give them.
//!
//! A folder holds `tokenizer.json`, or the older pair `vocab.json` and `merges.txt`; from the pair the same pipeline
//! is put together. A prompt longer than the text encoder takes goes on in further chunks; only a prompt that is to
//! be taken literally, as diffusers does, is cut, and how much was cut is reported.

pub mod attention;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

use super::config::Json;
use super::vocabulary::{SPECIALS, clip, read_file, read_merges, read_vocabulary};
use super::{Error, Result};
use attention::Part;

/// Where CLIP cuts a text into words.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A CLIP tokenizer with its padding.
#[derive(Clone, Debug)]
pub struct PromptTokenizer {
    tokenizer: Tokenizer,
    end: u32,
    pad: u32,
    length: usize,
}

/// A prompt as the text encoder takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Begin, tokens, end, padding: always the full length.
    pub ids: Vec<u32>,
    /// Tokens of the prompt that are used, begin and end not counted.
    pub used: u32,
    /// Tokens of the prompt that had no room.
    pub cut: u32,
}

/// How a prompt is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Syntax {
    /// With A1111's weights and `BREAK`, in as many chunks as it takes.
    #[default]
    Weighted,
    /// Every character for itself, and what has no room is cut: as diffusers does.
    Literal,
}

/// A prompt in chunks of the encoder's length.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunks {
    /// At least one.
    pub chunks: Vec<Chunk>,
    /// Tokens of the prompt that are used, begins and ends not counted.
    pub used: u32,
    /// Tokens of the prompt that had no room.
    pub cut: u32,
}

/// What the text encoder takes at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// Begin, tokens, end, padding: always the full length.
    pub ids: Vec<u32>,
    /// A weight for each id, unless all are 1.
    pub weights: Option<Vec<f32>>,
}

impl PromptTokenizer {
    /// Loads the tokenizer in `folder` for an encoder of `positions` positions and `vocabulary` entries.
    pub fn load(folder: &Path, positions: usize, vocabulary: usize) -> Result<Self> {
        let bad = |problem: String| Error::Tokenizer { path: folder.to_path_buf(), problem };
        let settings = Settings::read(folder)?;
        let (begin, end) = (
            settings.token("bos_token", "<|startoftext|>"),
            settings.token("eos_token", "<|endoftext|>"),
        );
        let pad = settings.token("pad_token", &end);
        let whole = folder.join("tokenizer.json");
        let bytes = if whole.is_file() {
            read_file(&whole)?
        } else {
            pipeline(&read_vocabulary(folder)?, &read_merges(folder)?, [&begin, &end])
                .map_err(bad)?
        };
        let length = settings.length.unwrap_or(positions).min(positions);
        Self::of_bytes(&bytes, [&begin, &end, &pad], length, vocabulary).map_err(bad)
    }

    /// CLIP's own tokenizer that pads with `pad`; an encoder of fewer entries knows the first merges only.
    pub fn clip(pad: &str, positions: usize, vocabulary: usize) -> Result<Self> {
        let bad = |problem: String| Error::Tokenizer { path: PathBuf::from("CLIP's own"), problem };
        let (tokens, merges) = clip(vocabulary).map_err(bad)?;
        let [begin, end] = SPECIALS;
        let bytes = pipeline(&tokens, &merges, [begin, end]).map_err(bad)?;
        Self::of_bytes(&bytes, [begin, end, pad], positions, vocabulary).map_err(bad)
    }

    /// A `tokenizer.json` with its special tokens begin, end and padding.
    fn of_bytes(
        bytes: &[u8],
        [begin, end, pad]: [&str; 3],
        length: usize,
        vocabulary: usize,
    ) -> std::result::Result<Self, String> {
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
        // Padding and truncation are ours; a special pad token is one even inside a prompt.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer
            .add_special_tokens([begin, end, pad].map(|token| AddedToken::from(token, true)))
            .map_err(|error| error.to_string())?;
        let id =
            |token: &str| tokenizer.token_to_id(token).ok_or_else(|| format!("no token `{token}`"));
        let (end, pad) = (id(end)?, id(pad)?);
        if let Some((token, id)) =
            tokenizer.get_vocab(true).into_iter().find(|(_, id)| *id as usize >= vocabulary)
        {
            return Err(format!(
                "token `{token}` has id {id}: the text encoder knows {vocabulary} ids"
            ));
        }
        Ok(Self { end, pad, length, tokenizer })
    }

    /// Ids of `text` with begin and end, of any length.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, true);
        Ok(encoding
            .map_err(|error| Error::Internal(format!("tokenizer: {error}")))?
            .get_ids()
            .to_vec())
    }

    /// `text` in chunks, read by `syntax`.
    pub fn chunks(&self, text: &str, syntax: Syntax) -> Result<Chunks> {
        if syntax == Syntax::Literal {
            let Tokens { ids, used, cut } = self.encode(text)?;
            return Ok(Chunks { chunks: vec![Chunk { ids, weights: None }], used, cut });
        }
        let room = self.length - 2;
        let (mut rows, mut used) = (vec![Vec::new()], 0);
        for part in attention::parse(text) {
            match part {
                Part::Break => rows.push(Vec::new()),
                Part::Text(text, weight) => {
                    let ids = self.ids(&text)?;
                    for id in &ids[1..ids.len() - 1] {
                        if rows.last().is_none_or(|row| row.len() == room) {
                            rows.push(Vec::new());
                        }
                        rows.last_mut().expect("there is one").push((*id, weight));
                        used += 1;
                    }
                }
            }
        }
        let begin = self.ids("")?[0];
        let chunks = rows.iter().map(|row| self.chunk(begin, row)).collect();
        Ok(Chunks { chunks, used, cut: 0 })
    }

    #[expect(clippy::cast_possible_truncation, reason = "weights are small numbers")]
    fn chunk(&self, begin: u32, row: &[(u32, f64)]) -> Chunk {
        let tokens = row.iter().map(|(id, _)| *id);
        let mut ids: Vec<u32> = std::iter::once(begin).chain(tokens).chain([self.end]).collect();
        ids.resize(self.length, self.pad);
        let weighted = row.iter().any(|(_, weight)| *weight != 1.0);
        let weights = weighted.then(|| {
            let mut weights = vec![1.0];
            weights.extend(row.iter().map(|(_, weight)| *weight as f32));
            weights.resize(self.length, 1.0);
            weights
        });
        Chunk { ids, weights }
    }

    /// Letters of `text` outside Latin script that the vocabulary knows only as bytes, and all outside it.
    pub fn unknown_letters(&self, text: &str) -> Result<(usize, usize)> {
        let foreign = |letter: &char| letter.is_alphabetic() && !is_latin(*letter);
        let (mut unknown, mut all) = (0, 0);
        for letter in text.chars().filter(foreign) {
            all += 1;
            // Begin, one token, end.
            unknown += usize::from(self.ids(letter.encode_utf8(&mut [0; 4]))?.len() > 3);
        }
        Ok((unknown, all))
    }

    /// `text` cut and padded to the encoder's length.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let mut ids = self.ids(text)?;
        let given = ids.len();
        if given > self.length {
            ids.truncate(self.length - 1);
            ids.push(self.end);
        }
        let kept = ids.len();
        ids.resize(self.length, self.pad);
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Tokens { ids, used: count(kept.saturating_sub(2)), cut: count(given - kept) })
    }
}

/// Basic Latin to its last extensions, which share their words with English.
fn is_latin(letter: char) -> bool {
    matches!(letter, '\0'..='\u{24f}' | '\u{1e00}'..='\u{1eff}')
}

/// What `tokenizer_config.json` and `special_tokens_map.json` say.
struct Settings {
    config: Option<Json>,
    map: Option<Json>,
    length: Option<usize>,
}

impl Settings {
    fn read(folder: &Path) -> Result<Self> {
        let read = |name: &str| -> Result<Option<Json>> {
            let path = folder.join(name);
            path.is_file().then(|| Json::read(&path)).transpose()
        };
        let config = read("tokenizer_config.json")?;
        // Some files hold 1e30 for "no limit".
        let length = config
            .as_ref()
            .and_then(|config| config.value("model_max_length"))
            .and_then(Value::as_u64)
            .and_then(|length| usize::try_from(length).ok())
            .filter(|length| *length >= 2);
        Ok(Self { config, map: read("special_tokens_map.json")?, length })
    }

    /// The special token `key`. A config without `added_tokens_decoder` is an old one, and the map then wins:
    /// Stable Diffusion 2 says one pad token in its config and means the other, which is in its map.
    fn token(&self, key: &str, default: &str) -> String {
        let in_map = self.map.as_ref().and_then(|map| token_text(map.value(key)?));
        let in_config = self.config.as_ref().and_then(|config| token_text(config.value(key)?));
        let old = self
            .config
            .as_ref()
            .is_none_or(|config| config.value("added_tokens_decoder").is_none());
        let found = if old { in_map.or(in_config) } else { in_config.or(in_map) };
        found.unwrap_or_else(|| default.to_string())
    }
}

/// A token is a text, or an object that holds it.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

/// The CLIP pipeline over a vocabulary and its merges, as a `tokenizer.json`.
fn pipeline(
    vocabulary: &HashMap<String, u32>,
    merges: &[(String, String)],
    [begin, end]: [&str; 2],
) -> std::result::Result<Vec<u8>, String> {
    let id = |token: &str| {
        vocabulary.get(token).copied().ok_or_else(|| format!("no token `{token}` in `vocab.json`"))
    };
    let (begin_id, end_id) = (id(begin)?, id(end)?);
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let whole = json!({
        "version": "1.0",
        "added_tokens": [added(begin_id, begin), added(end_id, end)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": {"type": "RobertaProcessing", "sep": [end, end_id], "cls": [begin, begin_id],
                           "trim_offsets": false, "add_prefix_space": false},
        "model": {"type": "BPE", "unk_token": end, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>",
                  "fuse_unk": false, "vocab": vocabulary, "merges": merges},
    });
    serde_json::to_vec(&whole).map_err(|error| error.to_string())
}
