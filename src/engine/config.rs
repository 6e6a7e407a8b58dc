//! Config files of a model folder: lenient about keys nobody uses, strict about every value that is used.
//!
//! [`Json`] reads one file and hands out checked values; the submodules hold one config struct each. A value that
//! names something the engine lacks is refused here, with key and value, and never replaced by a guess.

pub mod clip_text;
pub mod scheduler;
pub mod unet;
pub mod vae;
pub mod video;

use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Error, Result};

/// Largest config file that is read. Shard indices of the largest published models are below it.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Most channels of a level; the largest published value is below 10,000.
pub const WIDTHS: RangeInclusive<usize> = 1..=1 << 16;
/// Small counts: layers, heads, levels.
pub const COUNTS: RangeInclusive<usize> = 1..=1024;

/// One JSON object with the file it came from.
#[derive(Clone, Debug)]
pub struct Json {
    path: PathBuf,
    file: String,
    map: Map<String, Value>,
}

impl Json {
    /// Reads `path`: one JSON object, at most 1 MiB, nested at most 128 deep.
    pub fn read(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let syntax = |problem: String| Error::ConfigSyntax { path: path.to_path_buf(), problem };
        if !path.is_file() {
            return Err(Error::Missing { path: path.to_path_buf(), wanted: "a JSON file".into() });
        }
        let mut bytes = Vec::new();
        File::open(path)
            .map_err(io)?
            .take(MAX_CONFIG_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(io)?;
        if bytes.len() as u64 > MAX_CONFIG_BYTES {
            return Err(Error::TooLarge { path: path.to_path_buf(), limit: MAX_CONFIG_BYTES });
        }
        if bytes.is_empty() {
            return Err(Error::EmptyFile { path: path.to_path_buf() });
        }
        // serde_json stops at 128 levels by itself.
        match serde_json::from_slice(&without_infinities(&bytes)) {
            Ok(Value::Object(map)) => {
                let json = Self { path: path.to_path_buf(), file: short_name(path), map };
                // A pointer to code that somebody else would fetch and run.
                json.only("auto_map", &[])?;
                Ok(json)
            }
            Ok(_) => Err(syntax("not a JSON object".into())),
            Err(error) => Err(syntax(error.to_string())),
        }
    }

    /// An object that is in memory already; `file` names it in errors.
    pub fn from_value(file: &str, value: Value) -> Result<Self> {
        match value {
            Value::Object(map) => {
                Ok(Self { path: PathBuf::from(file), file: file.to_string(), map })
            }
            _ => Err(Error::ConfigSyntax {
                path: PathBuf::from(file),
                problem: "not a JSON object".into(),
            }),
        }
    }

    /// The value at `key`; JSON null counts as absent.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The same object with `key` set to `value`.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.map.insert(key.to_owned(), value);
        self
    }

    /// Every key with its value.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.map.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The object at `key`, which must be there.
    pub fn object(&self, key: &str) -> Result<&Map<String, Value>> {
        self.value(key).and_then(Value::as_object).ok_or_else(|| self.wrong_type(key, "an object"))
    }

    /// The text at `key`.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong_type(key, "a text")),
        }
    }

    /// The switch at `key`.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.value(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong_type(key, "true or false")),
        }
    }

    /// The whole number at `key` within `range`; an absent one is `default`, or an error without one.
    pub fn size(
        &self,
        key: &str,
        default: Option<usize>,
        range: RangeInclusive<usize>,
    ) -> Result<usize> {
        match (self.value(key), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.wrong_type(key, "a whole number")),
            (Some(value), _) => self.size_of(key, value, &range),
        }
    }

    /// The finite number at `key` within `range`; an absent one is `default`, or an error without one.
    pub fn float(
        &self,
        key: &str,
        default: Option<f64>,
        range: RangeInclusive<f64>,
    ) -> Result<f64> {
        let value = match (self.value(key), default) {
            (None, Some(default)) => return Ok(default),
            (None, None) => return Err(self.wrong_type(key, "a number")),
            (Some(value), _) => value,
        };
        let number = value.as_f64().ok_or_else(|| self.wrong_type(key, "a number"))?;
        if range.contains(&number) {
            Ok(number)
        } else {
            Err(self.out_of_range(key, value, format!("{} to {}", range.start(), range.end())))
        }
    }

    /// The list of whole numbers at `key`, which must be there and not empty.
    pub fn sizes(&self, key: &str, range: RangeInclusive<usize>) -> Result<Vec<usize>> {
        let list = self
            .value(key)
            .and_then(Value::as_array)
            .ok_or_else(|| self.wrong_type(key, "a list"))?;
        if list.is_empty() || list.len() > 16 {
            return Err(self.out_of_range(key, &self.map[key], "1 to 16 entries".into()));
        }
        list.iter().map(|value| self.size_of(key, value, &range)).collect()
    }

    /// Which of `count` levels carry attention: those of type `cross` in the list, the others being `plain`.
    pub fn crossed(&self, key: &str, plain: &str, cross: &str, count: usize) -> Result<Vec<bool>> {
        let types = self.texts(key)?;
        if types.len() != count {
            let wanted = format!("{count} entries, one for each of `block_out_channels`");
            return Err(self.senseless(key, wanted));
        }
        if types.iter().any(|name| *name != plain && *name != cross) {
            return Err(self.unsupported(key, &format!("`{plain}` or `{cross}`")));
        }
        Ok(types.iter().map(|name| *name == cross).collect())
    }

    /// One number for all of `count` levels, or a list with one for each.
    pub fn size_per_level(
        &self,
        key: &str,
        default: Option<usize>,
        count: usize,
        range: RangeInclusive<usize>,
    ) -> Result<Vec<usize>> {
        if !self.value(key).is_some_and(Value::is_array) {
            return Ok(vec![self.size(key, default, range)?; count]);
        }
        let sizes = self.sizes(key, range)?;
        if sizes.len() == count {
            Ok(sizes)
        } else {
            Err(self.out_of_range(key, &self.map[key], format!("{count} entries, one a level")))
        }
    }

    /// The list of texts at `key`, which must be there.
    pub fn texts(&self, key: &str) -> Result<Vec<&str>> {
        self.value(key)
            .and_then(Value::as_array)
            .and_then(|list| list.iter().map(Value::as_str).collect())
            .ok_or_else(|| self.wrong_type(key, "a list of texts"))
    }

    /// Refuses `key` unless it is absent, null or one of `supported`.
    pub fn only(&self, key: &str, supported: &[Value]) -> Result<()> {
        match self.value(key) {
            Some(value) if !supported.contains(value) => {
                let wanted =
                    supported.iter().map(Value::to_string).collect::<Vec<_>>().join(" or ");
                Err(self.unsupported(key, if wanted.is_empty() { "no value" } else { &wanted }))
            }
            _ => Ok(()),
        }
    }

    /// The error for a value at `key` that the engine has nothing for.
    pub fn unsupported(&self, key: &str, wanted: &str) -> Error {
        Error::ConfigUnsupported {
            file: self.file.clone(),
            key: key.to_string(),
            value: self.map.get(key).unwrap_or(&Value::Null).to_string(),
            wanted: wanted.to_string(),
        }
    }

    /// The error for the value at `key` that cannot be meant.
    pub fn senseless(&self, key: &str, wanted: impl Into<String>) -> Error {
        self.out_of_range(key, self.map.get(key).unwrap_or(&Value::Null), wanted.into())
    }

    fn size_of(&self, key: &str, value: &Value, range: &RangeInclusive<usize>) -> Result<usize> {
        // Python writes 1.0 where it means 1 in a few published files.
        let number = value
            .as_u64()
            .or_else(|| {
                value.as_f64().filter(|number| number.fract() == 0.0 && *number >= 0.0).map(to_u64)
            })
            .and_then(|number| usize::try_from(number).ok());
        match number {
            Some(number) if range.contains(&number) => Ok(number),
            Some(_) => {
                Err(self.out_of_range(key, value, format!("{} to {}", range.start(), range.end())))
            }
            None if value.is_number() => Err(self.out_of_range(
                key,
                value,
                format!("a whole number from {} to {}", range.start(), range.end()),
            )),
            None => Err(self.wrong_type(key, "a whole number")),
        }
    }

    fn out_of_range(&self, key: &str, value: &Value, wanted: String) -> Error {
        Error::ConfigOutOfRange {
            file: self.file.clone(),
            key: key.to_string(),
            value: value.to_string(),
            wanted,
        }
    }

    fn wrong_type(&self, key: &str, wanted: &str) -> Error {
        let got = self.map.get(key).map_or("absent".to_string(), Value::to_string);
        Error::ConfigSyntax {
            path: self.path.clone(),
            problem: format!("`{key}` is {got}: wanted {wanted}"),
        }
    }
}

/// Python writes infinities and NaN, which JSON does not have, and published schedulers hold some: they become null.
fn without_infinities(text: &[u8]) -> Vec<u8> {
    const WORDS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let (mut out, mut rest, mut in_text) = (Vec::with_capacity(text.len()), text, false);
    while let Some(first) = rest.first() {
        let word = WORDS.iter().find(|word| !in_text && rest.starts_with(word));
        let length = match (word, first) {
            (Some(word), _) => {
                out.extend_from_slice(b"null");
                rest = &rest[word.len()..];
                continue;
            }
            (None, b'\\') if in_text => 2.min(rest.len()),
            _ => 1,
        };
        in_text ^= *first == b'"';
        out.extend_from_slice(&rest[..length]);
        rest = &rest[length..];
    }
    out
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "whole and not negative, saturates"
)]
fn to_u64(number: f64) -> u64 {
    number as u64
}

/// `unet/config.json`: the part of the path that says which config it is.
fn short_name(path: &Path) -> String {
    let name =
        |part: Option<&std::ffi::OsStr>| part.map(|part| part.to_string_lossy().into_owned());
    let file = name(path.file_name()).unwrap_or_default();
    match name(path.parent().and_then(Path::file_name)) {
        Some(folder) => format!("{folder}/{file}"),
        None => file,
    }
}
