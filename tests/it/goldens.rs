//! Numbers of diffusers, within each tensor's tolerance.
//!
//! The folder is `GENVIDEO_GOLDENS`, else `tests/fixtures/goldens`; its README tells how every file was made.
//! `GENVIDEO_DEVICE` names the device the networks run on, else the CPU.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod half;
mod noise;
mod own;
mod preprocess;
mod samplers;
mod schedules;
mod single_file;
mod stable_diffusion;
mod svd;
mod tokens;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use genvideo::engine::device::{self, Compute};
use serde_json::Value;

/// The device under test in `dtype`. Tensors of two openings of a GPU do not mix, so that it is opened once.
fn compute_in(dtype: &str) -> Compute {
    static OPENED: Mutex<BTreeMap<String, Compute>> = Mutex::new(BTreeMap::new());
    let name = std::env::var("GENVIDEO_DEVICE").unwrap_or_else(|_| "cpu".into());
    let mut opened = OPENED.lock().unwrap();
    let open = || device::open(&name, dtype).unwrap();
    opened.entry(dtype.into()).or_insert_with(open).clone()
}

/// The device under test, in f32.
fn compute() -> Compute {
    compute_in("f32")
}

/// A file or folder of the goldens.
fn golden(path: &str) -> PathBuf {
    let shipped = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens");
    std::env::var_os("GENVIDEO_GOLDENS").map_or_else(shipped, PathBuf::from).join(path)
}

fn json(path: &str) -> Value {
    read_json(&golden(path))
}

/// A file or folder of the goldens that `scripts/goldens.py` wrote, for the shipped models.
fn own_golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens_own").join(path)
}

fn read_json(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap()
}

/// The tensors of one run, its settings and its tolerances.
struct Run {
    name: String,
    settings: Value,
    tensors: HashMap<String, Tensor>,
    measured: Value,
}

impl Run {
    fn open(model: &str, name: &str) -> Self {
        Self::of(&golden("runs"), model, name)
    }

    fn of(runs: &Path, model: &str, name: &str) -> Self {
        let folder = runs.join(model);
        let settings = folder.join(format!("{name}.json"));
        let settings = if name == "units" { Value::Null } else { read_json(&settings) };
        let file = folder.join(format!("{name}.safetensors"));
        Self {
            name: format!("{model}/{name}"),
            settings,
            tensors: candle_core::safetensors::load(file, compute().device()).unwrap(),
            measured: read_json(&folder.join("measured.json"))[name].clone(),
        }
    }

    fn get(&self, tensor: &str) -> &Tensor {
        self.tensors.get(tensor).unwrap_or_else(|| panic!("{} has no `{tensor}`", self.name))
    }

    /// Fails unless `got` is within the measured tolerance of `tensor`.
    fn check(&self, tensor: &str, got: &Tensor) {
        let tolerance = self.measured[tensor]["tol"]
            .as_f64()
            .unwrap_or_else(|| panic!("no tolerance for {tensor}"));
        self.check_within(tensor, got, tolerance);
    }

    fn check_within(&self, tensor: &str, got: &Tensor, tolerance: f64) {
        let wanted = self.get(tensor);
        assert_eq!(got.dims(), wanted.dims(), "{} {tensor}", self.name);
        let off = largest_difference(got, wanted);
        show_parity(&self.name, tensor, off, tolerance);
        assert!(
            off <= tolerance,
            "{} {tensor}: off by {off:.2e}, tolerance {tolerance:.2e}",
            self.name
        );
    }
}

/// A line for `scripts/parity`; captured otherwise.
#[expect(clippy::print_stdout, reason = "the table of parity figures is made of these lines")]
fn show_parity(run: &str, tensor: &str, off: f64, tolerance: f64) {
    println!("parity: {run} {tensor} {off:e} {tolerance:e}");
}

/// NaN when either holds one, which no tolerance accepts.
fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    let flat = |x: &Tensor| {
        let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        x.flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    let pairs = flat(a).into_iter().zip(flat(b));
    pairs
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |worst, off| if off > worst || off.is_nan() { off } else { worst })
}
