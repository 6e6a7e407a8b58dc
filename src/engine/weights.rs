//! Weights by name: of a folder with one file or shards with an index, or of one file that holds a whole model.
//!
//! [`Weights`] hands out tensors by name, in the wanted shape and number type. What a file is, its header and the links
//! that lead to it are checked when it is opened, so that a damaged download is named as such and no lying header can
//! make the process allocate what the file does not hold. Missing tensors are collected: [`Weights::finish`] names all
//! of them at once.

mod contents;
mod door;
mod folder;
mod gguf;
mod header;
mod inferred;
mod lora;
mod naming;
mod single_file;
mod source;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use super::device::Compute;
use super::{Error, Result};
use header::Entry;

pub(super) use contents::configs;
pub use contents::{Contents, Kind, contents};
pub(super) use folder::check_links;
pub use lora::LoraFile;
pub use single_file::Family;
pub(super) use source::Source;
pub use source::{LoadOptions, open_single_file, open_with_loras};

/// Tensors of one component, seen from a name prefix.
#[derive(Clone)]
pub struct Weights {
    store: Arc<Store>,
    missing: Arc<Mutex<BTreeMap<String, Vec<usize>>>>,
    prefix: String,
    dtype: DType,
    device: Device,
}

/// Files and the tensors in them.
#[derive(Debug, Default)]
struct Store {
    place: PathBuf,
    files: Vec<(PathBuf, Mutex<File>)>,
    entries: HashMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    /// What LoRAs add, by the name of the tensor.
    deltas: HashMap<String, Vec<lora::Delta>>,
}

impl Weights {
    /// Opens the component in `folder`, or the one file of that path, and checks every header; no tensor is read yet.
    pub fn open(folder: &Path, compute: &Compute) -> Result<Self> {
        Ok(Self::of_store(Arc::new(Store::open_part(folder)?), compute))
    }

    /// Weights of no file, handed out as `dtype`: a model loaded from them asks for all it wants and gets none of it,
    /// so that [`Self::missing`] lists it.
    pub fn none(dtype: DType) -> Self {
        Self { dtype, ..Self::of_store(Arc::default(), &Compute::cpu()) }
    }

    fn of_store(store: Arc<Store>, compute: &Compute) -> Self {
        Self {
            store,
            missing: Arc::default(),
            prefix: String::new(),
            dtype: compute.dtype(),
            device: compute.device().clone(),
        }
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

    /// Every name, in order, with the shape of its tensor.
    pub fn names(&self) -> BTreeMap<&str, &[usize]> {
        let entries = self.store.entries.iter();
        entries.map(|(name, entry)| (name.as_str(), entry.shape.as_slice())).collect()
    }

    /// Bytes of all tensors below this prefix as they are handed out.
    pub fn bytes(&self) -> u64 {
        let entries = self.store.entries.iter();
        let ours = entries.filter(|(name, _)| name.starts_with(&self.prefix));
        let numbers: usize = ours.map(|(_, entry)| entry.shape.iter().product::<usize>()).sum();
        numbers as u64 * self.dtype.size_in_bytes() as u64
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
            self.missing
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(full, stored[0].to_vec());
            return Ok(Tensor::zeros((), self.dtype, &self.device)?.broadcast_as(shape)?);
        };
        if !stored.contains(&entry.shape.as_slice()) {
            return Err(Error::TensorShape {
                name: shown(&full),
                got: entry.shape.clone(),
                wanted: shape.to_vec(),
            });
        }
        let mut tensor = self.store.tensor(&full, entry)?;
        for delta in self.store.deltas.get(&full).into_iter().flatten() {
            tensor = delta.add_to(&tensor)?;
        }
        let tensor = tensor.reshape(shape)?;
        Ok(tensor.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    /// The tensors that were asked for and are not there, with the shapes they should have.
    pub fn missing(&self) -> BTreeMap<String, Vec<usize>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fails with every tensor that was asked for and is not there. Call it once the model stands.
    pub fn finish(&self) -> Result<()> {
        let names: Vec<String> = self.missing().into_keys().collect();
        if names.is_empty() {
            return Ok(());
        }
        Err(Error::TensorsMissing { path: self.store.place.clone(), names })
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl Store {
    /// The component in `folder`, or the one file of that path.
    fn open_part(folder: &Path) -> Result<Self> {
        let files = if folder.is_dir() {
            folder::component_files(folder)?
        } else {
            vec![folder.to_path_buf()]
        };
        Self::open(folder, files)
    }

    fn open(place: &Path, files: Vec<PathBuf>) -> Result<Self> {
        let mut store = Self { place: place.to_path_buf(), ..Self::default() };
        for path in files {
            store.add(path)?;
        }
        Ok(store)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        if !path.is_file() {
            return Err(Error::Missing { path, wanted: "a file of weights".into() });
        }
        let mut file =
            File::open(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        door::check(&path, &mut file)?;
        let header = header::read(&path, &mut file, self.files.len())?;
        for (name, entry) in header.entries {
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(Error::WeightsFormat {
                    path,
                    problem: format!("tensor `{}` is in another shard too", shown(&name)),
                });
            }
        }
        self.metadata.extend(header.metadata);
        self.files.push((path, Mutex::new(file)));
        Ok(())
    }

    /// The tensor on the CPU, in the file's number type.
    fn tensor(&self, name: &str, entry: &Entry) -> Result<Tensor> {
        let kind = match entry.kind.as_str() {
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            "F32" => DType::F32,
            other => {
                return Err(Error::TensorType { name: shown(name), got: other.to_string() });
            }
        };
        let bytes = self.read(entry)?;
        if !is_finite(&bytes, kind) {
            return Err(Error::WeightsNotFinite { name: shown(name) });
        }
        // On the CPU: f16 files then need no f32 copy on the device.
        match (entry.transposed, entry.shape.as_slice()) {
            (true, [rows, columns]) => {
                Ok(Tensor::from_raw_buffer(&bytes, kind, &[*columns, *rows], &Device::Cpu)?
                    .t()?
                    .contiguous()?)
            }
            (_, shape) => Ok(Tensor::from_raw_buffer(&bytes, kind, shape, &Device::Cpu)?),
        }
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

/// The files whose tensors the model at `path`, a folder or one file, is made of.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    folder::weight_files(path)
}

/// The other files that shape what the model at `path` makes: configurations and vocabularies. A model of one file has
/// none.
pub fn settings_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() { Ok(Vec::new()) } else { folder::settings_files(path) }
}

/// Fails unless the file at `path` has the hash `sha256`, 64 hexadecimal digits.
pub fn verify(path: &Path, sha256: &str) -> Result<()> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let mut file = File::open(path).map_err(io)?;
    let mut hasher = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block).map_err(io)? {
            0 => break,
            count => hasher.update(&block[..count]),
        }
    }
    let got = hex(hasher);
    if got.eq_ignore_ascii_case(sha256) {
        return Ok(());
    }
    Err(Error::WeightsHash { path: path.to_path_buf(), got, wanted: shown(sha256) })
}

/// The hash as lower-case hexadecimal digits.
pub(super) fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether no number has all bits of its exponent set, which is how infinities and NaNs look.
fn is_finite(bytes: &[u8], kind: DType) -> bool {
    const BLOCK: usize = 1 << 14;
    let exponent: u16 = if kind == DType::F16 { 0x7c00 } else { 0x7f80 };
    // In f32 the exponent lies in the upper half; folding blocks keeps the loop free of branches.
    let step = if kind == DType::F32 { 4 } else { 2 };
    bytes.chunks(BLOCK).all(|block| {
        let found = block.chunks_exact(step).fold(false, |found, number| {
            let upper = u16::from_le_bytes([number[step - 2], number[step - 1]]);
            found | (upper & exponent == exponent)
        });
        !found
    })
}

/// A name out of a file as an error may show it: short, without control characters.
fn shown(name: &str) -> String {
    const LONGEST: usize = 120;
    let mut text: String = name.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if name.chars().nth(LONGEST).is_some() {
        text.push('…');
    }
    text
}
