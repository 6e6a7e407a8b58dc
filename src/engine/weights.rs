//! Safetensors folders: one file, or shards with an index, checked before use.
//!
//! [`Weights`] hands out tensors by name, in the wanted shape and number type. Headers are checked when a folder is
//! opened (size, types, offsets inside the file and without overlap), so that a damaged download is named as such
//! and no lying header can make the process allocate what the file does not hold. Missing tensors are collected:
//! [`Weights::finish`] names all of them at once.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::config::Json;
use super::device::Compute;
use super::{Error, Result};

/// Largest header that is read; published files stay far below 1 MiB.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// File names of a component, best first. `fp16` variants come last: they hold less than the plain ones.
const FILE_NAMES: &[&str] = &[
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
];

/// Tensors of one component, seen from a name prefix.
#[derive(Clone)]
pub struct Weights {
    store: Arc<Store>,
    prefix: String,
    dtype: DType,
    device: Device,
}

struct Store {
    folder: PathBuf,
    files: Vec<(PathBuf, Mutex<File>)>,
    entries: HashMap<String, Entry>,
    missing: Mutex<BTreeSet<String>>,
}

#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    kind: String,
    shape: Vec<usize>,
    start: u64,
    bytes: usize,
}

impl Weights {
    /// Opens the component in `folder` and checks every header; no tensor is read yet.
    pub fn open(folder: &Path, compute: &Compute) -> Result<Self> {
        let mut store = Store {
            folder: folder.to_path_buf(),
            files: Vec::new(),
            entries: HashMap::new(),
            missing: Mutex::new(BTreeSet::new()),
        };
        for path in component_files(folder)? {
            store.add(path)?;
        }
        Ok(Self {
            store: Arc::new(store),
            prefix: String::new(),
            dtype: compute.dtype(),
            device: compute.device().clone(),
        })
    }

    /// The same tensors, handed out as `dtype`.
    pub fn with_dtype(&self, dtype: DType) -> Self {
        Self { dtype, ..self.clone() }
    }

    /// One level down: names are looked up under `name.`.
    pub fn pp(&self, name: impl Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    /// Whether `name` is there.
    pub fn has(&self, name: &str) -> bool {
        self.store.entries.contains_key(&self.full(name))
    }

    /// Number type of the tensors handed out.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Device of the tensors handed out.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The tensor `name` of `shape`. A missing one is noted for [`Self::finish`] and stands in as zeros.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.get_one_of(name, &[shape], shape)
    }

    /// The tensor `name` in one of the `stored` shapes of equal size, handed out as `shape`.
    pub fn get_one_of(&self, name: &str, stored: &[&[usize]], shape: &[usize]) -> Result<Tensor> {
        let full = self.full(name);
        let Some(entry) = self.store.entries.get(&full) else {
            self.store.missing.lock().unwrap_or_else(PoisonError::into_inner).insert(full);
            return Ok(Tensor::zeros((), self.dtype, &self.device)?.broadcast_as(shape)?);
        };
        if !stored.contains(&entry.shape.as_slice()) {
            return Err(Error::TensorShape {
                name: full,
                got: entry.shape.clone(),
                wanted: shape.to_vec(),
            });
        }
        let kind = match entry.kind.as_str() {
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            "F32" => DType::F32,
            other => return Err(Error::TensorType { name: full, got: other.to_string() }),
        };
        let bytes = self.store.read(entry)?;
        // Cast on the CPU: f16 files then need no f32 copy on the device.
        let tensor = Tensor::from_raw_buffer(&bytes, kind, shape, &Device::Cpu)?;
        Ok(tensor.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    /// Fails with every tensor that was asked for and is not there. Call it once the model stands.
    pub fn finish(&self) -> Result<()> {
        let missing = self.store.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::TensorsMissing {
            path: self.store.folder.clone(),
            names: missing.iter().cloned().collect(),
        })
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl Store {
    fn add(&mut self, path: PathBuf) -> Result<()> {
        let mut file =
            File::open(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let index = self.files.len();
        for (name, entry) in read_header(&path, &mut file, index)? {
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(Error::WeightsFormat {
                    path,
                    problem: format!("tensor `{name}` is in another shard too"),
                });
            }
        }
        self.files.push((path, Mutex::new(file)));
        Ok(())
    }

    fn read(&self, entry: &Entry) -> Result<Vec<u8>> {
        let (path, file) = &self.files[entry.file];
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; entry.bytes];
        file.seek(SeekFrom::Start(entry.start))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|source| Error::Io { path: path.clone(), source })?;
        Ok(bytes)
    }
}

/// The files of the component in `folder`.
fn component_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let Some(path) = FILE_NAMES.iter().map(|name| folder.join(name)).find(|path| path.is_file())
    else {
        let pickled = folder.join("diffusion_pytorch_model.bin").is_file()
            || folder.join("pytorch_model.bin").is_file();
        let note = if pickled {
            " (the `.bin` there is a pickle, which can run code and is not read)"
        } else {
            ""
        };
        return Err(Error::Missing {
            path: folder.to_path_buf(),
            wanted: format!("`{}` or `{}`{note}", FILE_NAMES[0], FILE_NAMES[2]),
        });
    };
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        return Ok(vec![path]);
    }
    let json = Json::read(&path)?;
    let mut names = BTreeSet::new();
    for (tensor, file) in json.object("weight_map")? {
        match file.as_str() {
            Some(name) if is_plain_name(name) => names.insert(name.to_string()),
            _ => {
                return Err(Error::ConfigSyntax {
                    path,
                    problem: format!("`weight_map.{tensor}` is not a file name"),
                });
            }
        };
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// A name that stays in its folder.
fn is_plain_name(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0']) && !name.starts_with('.')
}

/// Header of one file, with offsets made absolute.
fn read_header(path: &Path, file: &mut File, index: usize) -> Result<Vec<(String, Entry)>> {
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
    let header: UniqueMap =
        serde_json::from_slice(&text).map_err(|error| bad(format!("header: {error}")))?;
    let data = 8 + length;
    let mut entries = Vec::new();
    for (name, value) in header.0 {
        if name == "__metadata__" {
            continue;
        }
        let entry = header_entry(&value, index)
            .map_err(|problem| bad(format!("tensor `{name}`: {problem}")))?;
        entries.push((name, entry));
    }
    check_offsets(&entries, size - data).map_err(bad)?;
    for (_, entry) in &mut entries {
        entry.start += data;
    }
    Ok(entries)
}

/// Type, shape and place of one tensor; the place must be as large as type and shape say.
fn header_entry(value: &serde_json::Value, file: usize) -> std::result::Result<Entry, String> {
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
        offsets.first().and_then(serde_json::Value::as_u64),
        offsets.get(1).and_then(serde_json::Value::as_u64),
        offsets.len(),
    ) else {
        return Err("`data_offsets` is not a pair".into());
    };
    let width = match kind.as_str() {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "U8" | "I8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => 1,
        other => return Err(format!("type `{other}`: wanted F16, BF16 or F32")),
    };
    let bytes = shape.iter().try_fold(width, |product: usize, size| product.checked_mul(*size));
    let held = end.checked_sub(start).and_then(|held| usize::try_from(held).ok());
    match (bytes, held) {
        (Some(bytes), Some(held)) if bytes == held => Ok(Entry { file, kind, shape, start, bytes }),
        _ => Err(format!("{kind} {shape:?} does not fit the offsets {start}..{end}")),
    }
}

/// Every tensor lies inside the data, none on top of another.
fn check_offsets(entries: &[(String, Entry)], data: u64) -> std::result::Result<(), String> {
    let mut places: Vec<(u64, u64, &str)> = entries
        .iter()
        .map(|(name, entry)| (entry.start, entry.start + entry.bytes as u64, name.as_str()))
        .collect();
    places.sort_unstable();
    let mut last = (0, "");
    for (start, end, name) in places {
        if end > data {
            return Err(format!(
                "tensor `{name}` ends at {end}, the data at {data}: the file is cut short"
            ));
        }
        if start < last.0 {
            return Err(format!("tensors `{}` and `{name}` overlap", last.1));
        }
        last = (end, name);
    }
    Ok(())
}

/// A JSON object that refuses a key given twice.
struct UniqueMap(Vec<(String, serde_json::Value)>);

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
                while let Some((name, value)) = map.next_entry::<String, serde_json::Value>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!(
                            "tensor `{name}` is given twice"
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
