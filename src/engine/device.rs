//! Where a run computes, and in which number type; the `cfg(feature)` of every accelerator.
//!
//! `auto` takes the best GPU this build can drive and falls back to the CPU, keeping the reason.

#[cfg(feature = "cuda")]
pub(super) mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "device/no_cuda.rs"]
pub(super) mod cuda;
#[cfg(feature = "cudnn")]
pub(super) mod cudnn;
#[cfg(not(feature = "cudnn"))]
#[path = "device/no_cudnn.rs"]
pub(super) mod cudnn;
mod memory;

use candle_core::{DType, Device};

use super::{Error, Result};

/// A device with the number type of the networks.
#[derive(Clone, Debug)]
pub struct Compute {
    device: Device,
    dtype: DType,
    name: String,
    fallback: Option<String>,
}

impl Compute {
    /// The CPU in f32: always there.
    pub fn cpu() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32, name: "cpu".into(), fallback: None }
    }

    /// `cpu`, `cuda:N` or `metal`.
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// `f32`, `f16` or `bf16`.
    pub fn dtype_name(&self) -> &'static str {
        self.dtype.as_str()
    }

    /// What the device calls itself, where it does: the processor's or the accelerator's model.
    pub fn model(&self) -> Option<String> {
        if self.device.is_cpu() { processor() } else { cuda::model(&self.device) }
    }

    /// The number type of the networks.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The candle device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes that a run could take now, where that is known.
    pub fn free_memory(&self) -> Option<u64> {
        if self.device.is_cpu() { memory::free() } else { cuda::free_memory(&self.device) }
    }

    /// Waits for what is under way, and gives freed memory back to the driver.
    pub fn settle(&self) {
        match self.device.synchronize() {
            Ok(()) => cuda::trim(&self.device),
            Err(error) => tracing::debug!(%error, "the device does not settle"),
        }
    }

    /// Why `auto` ended on the CPU.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }
}

/// Opens `device` (`auto`, `cpu`, `cuda`, `cuda:N`, `metal`) for `dtype` (`auto`, `f32`, `f16`, `bf16`).
pub fn open(device: &str, dtype: &str) -> Result<Compute> {
    let (device, name, fallback) = match device {
        "auto" => automatic(),
        "cpu" => (Device::Cpu, "cpu".to_string(), None),
        "metal" => (metal()?, "metal".to_string(), None),
        other => {
            let ordinal = cuda_ordinal(other).ok_or_else(|| Error::Request {
                field: "device",
                value: format!("`{other}`"),
                wanted: "`auto`, `cpu`, `cuda`, `cuda:N` or `metal`".into(),
            })?;
            (cuda::open(ordinal)?, format!("cuda:{ordinal}"), None)
        }
    };
    let dtype = number_type(dtype, &device)?;
    Ok(Compute { device, dtype, name, fallback })
}

/// Sets how many threads the CPU paths use; the first call of the process counts.
pub fn set_threads(threads: usize) {
    // A second call fails because the pool exists by then: nothing to do about it.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build_global();
}

/// How many threads the CPU paths use.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// The name that Linux knows the processor by, and those of its instructions that change how sums are made.
fn processor() -> Option<String> {
    let about = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let field = |name: &str| {
        let line = about.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let mut name = field("model name")?;
    let flags = field("flags").unwrap_or_default();
    for wanted in ["avx2", "fma", "avx512f"] {
        if flags.split(' ').any(|flag| flag == wanted) {
            name.push(' ');
            name.push_str(wanted);
        }
    }
    Some(name)
}

fn number_type(asked: &str, device: &Device) -> Result<DType> {
    match (asked, device.is_cpu()) {
        ("auto", true) | ("f32", _) => Ok(DType::F32),
        ("auto", false) | ("f16", _) => Ok(DType::F16),
        ("bf16", false) => Ok(DType::BF16),
        ("bf16", true) => Err(Error::Request {
            field: "dtype",
            value: "`bf16`".into(),
            wanted: "`f32` or `f16` on the cpu, which has no bf16 matrix product".into(),
        }),
        (other, _) => Err(Error::Request {
            field: "dtype",
            value: format!("`{other}`"),
            wanted: "`auto`, `f32`, `f16` or `bf16`".into(),
        }),
    }
}

fn automatic() -> (Device, String, Option<String>) {
    let mut reasons = Vec::new();
    match cuda::open(0) {
        Ok(device) => return (device, "cuda:0".into(), None),
        Err(error) => reasons.push(error.to_string()),
    }
    match metal() {
        Ok(device) => return (device, "metal".into(), None),
        Err(error) => reasons.push(error.to_string()),
    }
    let reasons = reasons.join("; ");
    if cfg!(any(feature = "cuda", feature = "metal")) {
        tracing::warn!(reasons, "no GPU answers: computing on the CPU");
    }
    (Device::Cpu, "cpu".into(), Some(reasons))
}

fn cuda_ordinal(name: &str) -> Option<usize> {
    match name.strip_prefix("cuda")? {
        "" => Some(0),
        rest => rest.strip_prefix(':')?.parse().ok(),
    }
}

fn metal() -> Result<Device> {
    if cfg!(feature = "metal") { Ok(Device::new_metal(0)?) } else { Err(not_built("metal")) }
}

fn not_built(feature: &'static str) -> Error {
    Error::NoDevice { problem: format!("this build has no {feature} (`--features {feature}`)") }
}

/// Tells the allocator to keep freed memory for the next tensors, whichever thread they belong to. Call it when the
/// process starts: a thread that has asked for memory before stays with its own.
///
/// Tensors of many megabytes come and go in every layer; by default glibc maps and unmaps each of them, and the
/// kernel zeroes every page again. A third of the time of a network goes there. Memory of its own for every thread
/// would be kept by every thread that ever ran a stage.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets limits of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// Gives freed memory back to the system, after a model was dropped.
pub fn give_back_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` releases free pages only.
    unsafe {
        libc::malloc_trim(0);
    }
}
