//! The header of a safetensors file, checked before anything it says is believed.
//!
//! Type, shape and place of each tensor must agree, and the tensors must fill the data exactly: no overlap, no hole,
//! nothing behind the last one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::shown;
use crate::engine::{Error, Result};

/// Largest header that is read; published files stay far below 1 MiB.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// Where a tensor lies, and how it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Index of its file.
    pub(super) file: usize,
    /// Number type as the file calls it.
    pub(super) kind: String,
    /// Shape as it is handed out.
    pub(super) shape: Vec<usize>,
    /// First byte in the file.
    pub(super) start: u64,
    /// Bytes.
    pub(super) bytes: usize,
    /// Whether the file holds the matrix with its sides swapped.
    pub(super) transposed: bool,
}

/// What a header says.
pub(super) struct Header {
    /// Tensors with offsets made absolute.
    pub(super) entries: Vec<(String, Entry)>,
    /// Texts that came along.
    pub(super) metadata: BTreeMap<String, String>,
}

/// Header of `file`, which stands at its start and is number `index`.
pub(super) fn read(path: &Path, file: &mut File, index: usize) -> Result<Header> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let bad = |problem: String| Error::WeightsFormat { path: path.to_path_buf(), problem };
    let size = file.metadata().map_err(io)?.len();
    let mut length = [0; 8];
    if size < 8 {
        return Err(bad(format!("{size} bytes are too few")));
    }
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > size - 8 {
        return Err(bad(format!(
            "header of {length} bytes in a file of {size}: wanted at most {MAX_HEADER_BYTES}"
        )));
    }
    let mut text = vec![0; usize::try_from(length).expect("at most 16 MiB")];
    file.read_exact(&mut text).map_err(io)?;
    let parsed: UniqueMap = serde_json::from_slice(&text)
        .map_err(|error| bad(format!("header: {}", shown(&error.to_string()))))?;
    let data = 8 + length;
    let mut header = Header { entries: Vec::new(), metadata: BTreeMap::new() };
    for (name, value) in parsed.0 {
        if name == "__metadata__" {
            header.metadata = metadata(&value);
            continue;
        }
        let entry = entry(&value, index)
            .map_err(|problem| bad(format!("tensor `{}`: {problem}", shown(&name))))?;
        header.entries.push((name, entry));
    }
    check_offsets(&header.entries, size - data).map_err(bad)?;
    for (name, entry) in &mut header.entries {
        if entry.shape.len() > MAX_RANK {
            return Err(Error::TensorRank { name: shown(name), got: entry.shape.len() });
        }
        entry.start += data;
    }
    Ok(header)
}

fn metadata(value: &Value) -> BTreeMap<String, String> {
    let texts = value.as_object().into_iter().flatten();
    texts.filter_map(|(key, text)| Some((key.clone(), text.as_str()?.to_owned()))).collect()
}

/// Bytes of a number of type `kind`.
pub(super) fn width(kind: &str) -> Option<usize> {
    match kind {
        "F64" | "I64" | "U64" => Some(8),
        "F32" | "I32" | "U32" => Some(4),
        "F16" | "BF16" | "I16" | "U16" => Some(2),
        "U8" | "I8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => Some(1),
        _ => None,
    }
}

/// Type, shape and place of one tensor; the place must be as large as type and shape say.
fn entry(value: &Value, file: usize) -> std::result::Result<Entry, String> {
    let kind = value["dtype"].as_str().ok_or("no `dtype`")?.to_string();
    let shape = value["shape"]
        .as_array()
        .ok_or("no `shape`")?
        .iter()
        .map(|size| size.as_u64().and_then(|size| usize::try_from(size).ok()))
        .collect::<Option<Vec<usize>>>()
        .ok_or("a shape that is not made of sizes")?;
    let offsets = value["data_offsets"].as_array().ok_or("no `data_offsets`")?;
    let (Some(start), Some(end), 2) = (
        offsets.first().and_then(Value::as_u64),
        offsets.get(1).and_then(Value::as_u64),
        offsets.len(),
    ) else {
        return Err("`data_offsets` is not a pair".into());
    };
    let width =
        width(&kind).ok_or_else(|| format!("type `{}`: wanted F16, BF16 or F32", shown(&kind)))?;
    let bytes = if shape.contains(&0) {
        Some(0)
    } else {
        shape.iter().try_fold(width, |product: usize, size| product.checked_mul(*size))
    };
    let held = end.checked_sub(start).and_then(|held| usize::try_from(held).ok());
    match (bytes, held) {
        (Some(bytes), Some(held)) if bytes == held => {
            Ok(Entry { file, kind, shape, start, bytes, transposed: false })
        }
        _ => {
            let shape = shown(&format!("{shape:?}"));
            Err(format!("{kind} {shape} does not fit the offsets {start}..{end}"))
        }
    }
}

/// Every tensor lies inside the data, none on top of another, and nothing lies between or behind them.
fn check_offsets(entries: &[(String, Entry)], data: u64) -> std::result::Result<(), String> {
    let mut places: Vec<(u64, u64, &str)> = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let end = entry.start.checked_add(entry.bytes as u64);
        let end = end.filter(|end| *end <= data).ok_or_else(|| {
            format!(
                "tensor `{}` ends behind the data, which ends at {data}: the file is cut short",
                shown(name)
            )
        })?;
        places.push((entry.start, end, name.as_str()));
    }
    places.sort_unstable();
    let mut last = (0, "");
    for (start, end, name) in places {
        if start < last.0 {
            return Err(format!("tensors `{}` and `{}` overlap", shown(last.1), shown(name)));
        }
        if start > last.0 {
            return Err(format!(
                "{} bytes before tensor `{}` are nobody's",
                start - last.0,
                shown(name)
            ));
        }
        last = (end, name);
    }
    if last.0 != data {
        return Err(format!("{} bytes behind the last tensor are nobody's", data - last.0));
    }
    Ok(())
}

/// A JSON object that refuses a key given twice.
struct UniqueMap(Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for UniqueMap {
    fn deserialize<D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = UniqueMap;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object of tensors")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<UniqueMap, A::Error> {
                let mut seen = BTreeSet::new();
                let mut entries = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!(
                            "tensor `{}` is given twice",
                            shown(&name)
                        )));
                    }
                    entries.push((name, value));
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}
