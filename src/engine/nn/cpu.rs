//! Fast CPU paths in f32, behind the building blocks.
//!
//! Work is cut into tiles of fixed size, so that a result never depends on the number of threads. Everything here
//! wants contiguous tensors; other devices and number types take candle's own operations.

pub(super) mod attention;
pub(super) mod conv;
pub(super) mod elementwise;
mod math;
pub(super) mod norm;
pub(super) mod product;

use std::cell::RefCell;
use std::ops::Deref;

use candle_core::{DType, Storage, Tensor};

use crate::engine::{Error, Result};

/// Whether the fast paths take tensors like `x`.
pub(super) fn takes(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Whether tensors like `x` are multiplied in f32 and the result is narrowed: candle's own products in f16 round more
/// than once, and take longer.
pub(super) fn widens(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F16
}

thread_local! {
    /// Scratch memory of a worker thread, kept so that its pages are touched once.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends `length` numbers of any content to `work`, which must not wait for other tasks.
fn with_scratch<T>(length: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < length {
            scratch.resize(length, 0.0);
        }
        work(&mut scratch[..length])
    })
}

/// The numbers of a contiguous f32 tensor in memory; `G` is the lock that keeps them there.
struct Numbers<G> {
    storage: G,
    start: usize,
    length: usize,
}

/// Looks at the numbers of `x`.
fn numbers(x: &Tensor) -> Result<Numbers<impl Deref<Target = Storage>>> {
    let (storage, layout) = x.storage_and_layout();
    let held = match &*storage {
        Storage::Cpu(cpu) => cpu.as_slice::<f32>()?.len(),
        _ => return Err(Error::Internal("a tensor of another device on the cpu path".into())),
    };
    let (start, length) = (layout.start_offset(), layout.shape().elem_count());
    if !layout.is_contiguous() || start + length > held {
        return Err(Error::Internal(format!(
            "a strided tensor {:?} on the cpu path",
            layout.shape()
        )));
    }
    Ok(Numbers { storage, start, length })
}

impl<G: Deref<Target = Storage>> Deref for Numbers<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(cpu) => &cpu.as_slice::<f32>().expect("checked when made")
                [self.start..self.start + self.length],
            _ => unreachable!("checked when made"),
        }
    }
}
