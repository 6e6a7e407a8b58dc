//! NVIDIA GPUs: opening one, its memory, and the layers that candle takes in many passes over it.
//!
//! Every layer returns `None` for tensors it does not take (other devices, other number types, sizes beyond 32 bits);
//! the caller then takes candle's operations. `no_cuda.rs` is this file for builds without a GPU.

mod attention;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaView, LaunchConfig, PushKernelArg, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc;
use candle_core::cuda_backend::{CudaDevice, CudaStorage};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Shape, Tensor,
};
use half::{bf16, f16};

pub(in crate::engine) use attention::attend;

/// The kernels, as text.
const SOURCE: &str = include_str!("cuda/kernels.cu");
/// Name under which candle keeps them.
const MODULE: &str = "genvideo";
/// Threads of a block.
const BLOCK: usize = 256;
/// Most numbers of a tensor that the kernels count in 32 bits.
const MOST: usize = 1 << 31;

type Result<T> = candle_core::Result<T>;

/// The GPU `ordinal`, opened once for the process: tensors of two openings do not mix.
pub(super) fn open(ordinal: usize) -> Result<Device> {
    static OPENED: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = opened.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = start(ordinal)?;
    opened.insert(ordinal, device.clone());
    Ok(device)
}

/// Opens it with one stream for all threads, so that what one thread made is there for the next one.
fn start(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: events order several streams, and there is one.
    unsafe { cuda.disable_event_tracking() };
    // Freed memory stays with the process until `trim`: asking the driver again takes longer than most layers.
    if let Some(pool) = pool(cuda) {
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let mut most = u64::MAX;
        // SAFETY: the attribute is a number of 64 bits, which the driver reads.
        unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut most).cast()) };
    }
    // Compiled here, where a failure is one of the device; candle then knows the module by its name.
    let ptx = nvrtc::compile_ptx(SOURCE).map_err(candle_core::Error::wrap)?;
    cuda.get_or_load_custom_func("swap_float", MODULE, &ptx.to_src())?;
    Ok(device)
}

/// Bytes that a run could take on `device`: what is free, and what this process keeps of earlier work.
pub(super) fn free_memory(device: &Device) -> Option<u64> {
    let cuda = device.as_cuda_device().ok()?;
    cuda.cuda_stream().context().bind_to_thread().ok()?;
    let (free, _) = result::mem_get_info().ok()?;
    let kept = pool(cuda).map_or(0, |pool| {
        let of = |attribute| {
            let mut bytes = 0_u64;
            // SAFETY: these attributes are numbers of 64 bits, which the driver writes.
            unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()) };
            bytes
        };
        of(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)
            .saturating_sub(of(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT))
    });
    Some(free as u64 + kept)
}

/// The name of the GPU.
pub(super) fn model(device: &Device) -> Option<String> {
    device.as_cuda_device().ok()?.cuda_stream().context().name().ok()
}

/// Gives memory that is not in use back to the driver, once the work under way is done.
pub(super) fn trim(device: &Device) {
    let Some(pool) = device.as_cuda_device().ok().and_then(pool) else { return };
    // SAFETY: it releases memory that nothing uses.
    unsafe { sys::cuMemPoolTrimTo(pool, 0) };
}

/// The driver's pool that tensors come from.
fn pool(cuda: &CudaDevice) -> Option<sys::CUmemoryPool> {
    let stream = cuda.cuda_stream();
    let context = stream.context();
    context.bind_to_thread().ok()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the driver writes a handle, which lives as long as the device.
    let answer = unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) };
    (answer == sys::CUresult::CUDA_SUCCESS).then_some(pool)
}

/// Whether the kernels take `x`.
fn takes(x: &Tensor) -> bool {
    x.device().is_cuda()
        && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
        && x.elem_count() > 0
        && x.elem_count() < MOST
}

/// Runs `$body` with `$T` as the number type of `$storage`, and its name in the kernels as `$name`.
macro_rules! by_type {
    ($storage:expr, $T:ident, $name:ident, $body:expr) => {
        match $storage.dtype() {
            DType::F16 => {
                type $T = f16;
                let $name = "f16";
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                let $name = "bf16";
                $body
            }
            _ => {
                type $T = f32;
                let $name = "float";
                $body
            }
        }
    };
}

/// Numbers that a thread loads at once: 16 bytes where every one of `runs` is a multiple of that.
fn pack(dtype: DType, runs: &[usize]) -> usize {
    let most = 16 / dtype.size_in_bytes();
    if runs.iter().all(|run| run.is_multiple_of(most)) { most } else { 1 }
}

/// Blocks for `count` numbers, `pack` to a thread; threads take several in turn if there are very many.
fn blocks(count: usize, pack: usize) -> u32 {
    u32::try_from(count.div_ceil(pack * BLOCK).clamp(1, 1 << 16)).unwrap_or(1 << 16)
}

fn config(grid: (u32, u32, u32), block: (u32, u32)) -> LaunchConfig {
    LaunchConfig { grid_dim: grid, block_dim: (block.0, block.1, 1), shared_mem_bytes: 0 }
}

fn short(number: usize) -> Result<u32> {
    u32::try_from(number).map_err(candle_core::Error::wrap)
}

/// The numbers of a contiguous tensor.
pub(super) fn view<'a, T: candle_core::cuda_backend::CudaDType>(
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, T>> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::Msg("a strided tensor on the cuda path".into()))?;
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

pub(super) fn off_cpu<T>(name: &str) -> Result<T> {
    Err(candle_core::Error::Msg(format!("{name} runs on a GPU")))
}

fn offset(x: &Tensor) -> usize {
    x.layout().start_offset()
}

/// Normalises (b, c, ..) over `groups` of channels; then SiLU, if wanted.
#[expect(clippy::cast_possible_truncation, reason = "the kernels compute in f32")]
pub(in crate::engine) fn group_norm(
    x: &Tensor,
    (weight, bias): (&Tensor, &Tensor),
    groups: usize,
    eps: f64,
    silu: bool,
) -> super::Result<Option<Tensor>> {
    if !takes(x) || x.rank() < 3 || x.dim(0)? * groups >= 1 << 16 {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let op = GroupNormOp { groups, eps: eps as f32, silu, pack: pack_of(&x, &[spatial(x.dims())]) };
    Ok(Some(x.apply_op3_no_bwd(weight, bias, &op)?))
}

fn spatial(dims: &[usize]) -> usize {
    dims[2..].iter().product()
}

fn pack_of(x: &Tensor, runs: &[usize]) -> usize {
    let mut all = runs.to_vec();
    all.push(offset(x));
    pack(x.dtype(), &all)
}

struct GroupNormOp {
    groups: usize,
    eps: f32,
    silu: bool,
    pack: usize,
}

impl CustomOp3 for GroupNormOp {
    fn name(&self) -> &'static str {
        "group-norm"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        off_cpu(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let device = x.device().clone();
        let dims = x_layout.dims();
        let (rows, spatial) = (dims[0] * self.groups, spatial(dims));
        let length = dims[1] / self.groups * spatial;
        // Parts are whole packs, at least eight for each thread, at most 64 of them.
        let part = length.div_ceil(64).max(8 * BLOCK).next_multiple_of(8);
        let parts = length.div_ceil(part);
        let grid = config((short(parts)?, short(rows)?, 1), (short(BLOCK)?, 1));
        let numbers = [length, part, spatial, self.groups].map(short);
        let [length, part, spatial, groups] = numbers;
        let (length, part, spatial, groups) = (length?, part?, spatial?, groups?);
        let silu = i32::from(self.silu);
        let storage = by_type!(x, T, name, {
            let (x, weight, bias) = (
                view::<T>(x, x_layout)?,
                view::<T>(weight, weight_layout)?,
                view::<T>(bias, bias_layout)?,
            );
            // SAFETY: both are written in full before they are read.
            let (mut sums, mut y) = unsafe {
                (
                    device.alloc::<f32>(2 * parts * rows)?,
                    device.alloc::<T>(x_layout.shape().elem_count())?,
                )
            };
            let kernel = |what: &str| {
                device.get_or_load_custom_func(&format!("{what}_{name}_{}", self.pack), MODULE, "")
            };
            let first = kernel("group_sums")?;
            let mut launch = first.builder();
            launch.arg(&x).arg(&mut sums).arg(&length).arg(&part);
            // SAFETY: the arguments are those of the kernel, which stays within `length` times the rows.
            unsafe { launch.launch(grid) }.map_err(candle_core::Error::wrap)?;
            let second = kernel("group_apply")?;
            let mut launch = second.builder();
            launch.arg(&x).arg(&weight).arg(&bias).arg(&sums).arg(&mut y);
            launch.arg(&length).arg(&part).arg(&spatial).arg(&groups).arg(&self.eps).arg(&silu);
            // SAFETY: as above.
            unsafe { launch.launch(grid) }.map_err(candle_core::Error::wrap)?;
            CudaStorage::wrap_cuda_slice(y, device.clone())
        });
        Ok((storage, x_layout.shape().clone()))
    }
}

/// `a * gelu(b)` of the halves of the last axis.
pub(in crate::engine) fn geglu(x: &Tensor) -> super::Result<Option<Tensor>> {
    if !takes(x) {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let width = x.dims().last().copied().unwrap_or(0) / 2;
    Ok(Some(x.apply_op1_no_bwd(&Op::Geglu { width, pack: pack_of(&x, &[width]) })?))
}

/// Softmax over the last axis, in f32 inside, rounded to `dtype` once.
pub(in crate::engine) fn softmax(x: &Tensor, dtype: DType) -> super::Result<Option<Tensor>> {
    let widths = x.dtype() == dtype || x.dtype() == DType::F32;
    if !takes(x) || !widths {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let width = x.dims().last().copied().unwrap_or(0);
    Ok(Some(x.apply_op1_no_bwd(&Op::Softmax { width, dtype, pack: pack_of(&x, &[width]) })?))
}

/// (b, m, n) to (b, n, m).
pub(in crate::engine) fn swap(x: &Tensor) -> super::Result<Option<Tensor>> {
    let fits = |(b, m, n): (usize, usize, usize)| b < 1 << 16 && m.max(n) < 1 << 20;
    if !takes(x) || !fits(x.dims3()?) {
        return Ok(None);
    }
    Ok(Some(x.contiguous()?.apply_op1_no_bwd(&Op::Swap)?))
}

/// (b, m, n, d) to (b, n, m, d).
pub(in crate::engine) fn swap_middle(x: &Tensor) -> super::Result<Option<Tensor>> {
    if !takes(x) {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let pack = pack_of(&x, &[x.dims4()?.3]);
    Ok(Some(x.apply_op1_no_bwd(&Op::SwapMiddle { pack })?))
}

/// An operation with one argument.
enum Op {
    Geglu { width: usize, pack: usize },
    Softmax { width: usize, dtype: DType, pack: usize },
    Swap,
    SwapMiddle { pack: usize },
}

impl Op {
    fn run<T, U>(&self, (x, layout): (&CudaStorage, &Layout), name: &str) -> Result<CudaStorage>
    where
        T: candle_core::cuda_backend::CudaDType
            + candle_core::cuda_backend::cudarc::driver::DeviceRepr,
        U: candle_core::cuda_backend::CudaDType
            + candle_core::cuda_backend::cudarc::driver::DeviceRepr,
    {
        let device = x.device().clone();
        let x = view::<T>(x, layout)?;
        let count = layout.shape().elem_count();
        let out = if matches!(self, Self::Geglu { .. }) { count / 2 } else { count };
        // SAFETY: the kernels write all of it.
        let mut y = unsafe { device.alloc::<U>(out)? };
        let kernel = device.get_or_load_custom_func(name, MODULE, "")?;
        let mut launch = kernel.builder();
        launch.arg(&x).arg(&mut y);
        let block = short(BLOCK)?;
        let dims = layout.dims();
        let mut numbers = Vec::new();
        let grid = match *self {
            Self::Geglu { width, pack } => {
                numbers.extend([short(out)?, short(width)?]);
                config((blocks(out, pack), 1, 1), (block, 1))
            }
            Self::Softmax { width, pack, .. } => {
                numbers.push(short(width)?);
                let threads = width.div_ceil(pack).next_multiple_of(32).min(BLOCK);
                config((short(count / width)?, 1, 1), (short(threads)?, 1))
            }
            Self::Swap => {
                numbers.extend([short(dims[1])?, short(dims[2])?]);
                let tiles = |axis: usize| short(dims[axis].div_ceil(32));
                config((tiles(2)?, tiles(1)?, short(dims[0])?), (32, 8))
            }
            Self::SwapMiddle { pack } => {
                numbers.extend([short(count)?, short(dims[1])?, short(dims[2])?, short(dims[3])?]);
                config((blocks(count, pack), 1, 1), (block, 1))
            }
        };
        for number in &numbers {
            launch.arg(number);
        }
        // SAFETY: the arguments are those of the kernel, which stays within the tensors.
        unsafe { launch.launch(grid) }.map_err(candle_core::Error::wrap)?;
        Ok(CudaStorage::wrap_cuda_slice(y, device))
    }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        match self {
            Self::Geglu { .. } => "geglu",
            Self::Softmax { .. } => "softmax",
            Self::Swap => "swap",
            Self::SwapMiddle { .. } => "swap-middle",
        }
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        off_cpu(self.name())
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let mut dims = layout.dims().to_vec();
        let of = (x, layout);
        let storage = by_type!(x, T, from, {
            match self {
                Self::Geglu { width, pack } => {
                    if let Some(last) = dims.last_mut() {
                        *last = *width;
                    }
                    self.run::<T, T>(of, &format!("geglu_{from}_{pack}"))?
                }
                Self::Softmax { dtype, pack, .. } => {
                    let name = |to: &str| format!("softmax_{from}_{to}_{pack}");
                    match dtype {
                        DType::F16 => self.run::<T, f16>(of, &name("f16"))?,
                        DType::BF16 => self.run::<T, bf16>(of, &name("bf16"))?,
                        _ => self.run::<T, f32>(of, &name("float"))?,
                    }
                }
                Self::Swap => {
                    dims.swap(1, 2);
                    self.run::<T, T>(of, &format!("swap_{from}"))?
                }
                Self::SwapMiddle { pack } => {
                    dims.swap(1, 2);
                    self.run::<T, T>(of, &format!("swap_middle_{from}_{pack}"))?
                }
            }
        });
        Ok((storage, Shape::from(dims)))
    }
}

/// `x` plus rows of `s`, `lanes` long: each row in turn for `inner` numbers, which are whole rows.
pub(in crate::engine) fn add_repeated(
    x: &Tensor,
    s: &Tensor,
    (inner, lanes): (usize, usize),
) -> super::Result<Option<Tensor>> {
    let (count, rows) = (x.elem_count(), s.elem_count() / lanes.max(1));
    let fits = rows * lanes == s.elem_count()
        && rows > 0
        && inner.is_multiple_of(lanes)
        && count.is_multiple_of(inner * rows);
    if !takes(x) || s.dtype() != x.dtype() || !fits {
        return Ok(None);
    }
    let (x, s) = (x.contiguous()?, s.contiguous()?);
    let runs = if lanes == 1 { [inner, 0] } else { [lanes, offset(&s)] };
    let pack = pack_of(&x, &runs);
    Ok(Some(x.apply_op2_no_bwd(&s, &AddRepeated { inner, lanes, pack })?))
}

struct AddRepeated {
    inner: usize,
    lanes: usize,
    pack: usize,
}

impl CustomOp2 for AddRepeated {
    fn name(&self) -> &'static str {
        "add-repeated"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        off_cpu(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        s: &CudaStorage,
        s_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let device = x.device().clone();
        let count = x_layout.shape().elem_count();
        let (total, inner, lanes) = (short(count)?, short(self.inner)?, short(self.lanes)?);
        let rows = short(s_layout.shape().elem_count() / self.lanes)?;
        let grid = config((blocks(count, self.pack), 1, 1), (short(BLOCK)?, 1));
        let storage = by_type!(x, T, name, {
            let (x, s) = (view::<T>(x, x_layout)?, view::<T>(s, s_layout)?);
            // SAFETY: the kernel writes all of it.
            let mut y = unsafe { device.alloc::<T>(count)? };
            let name = format!("add_repeated_{name}_{}", self.pack);
            let kernel = device.get_or_load_custom_func(&name, MODULE, "")?;
            let mut launch = kernel.builder();
            launch.arg(&x).arg(&s).arg(&mut y).arg(&total).arg(&inner).arg(&rows).arg(&lanes);
            // SAFETY: the arguments are those of the kernel, which stays within the tensors.
            unsafe { launch.launch(grid) }.map_err(candle_core::Error::wrap)?;
            CudaStorage::wrap_cuda_slice(y, device.clone())
        });
        Ok((storage, x_layout.shape().clone()))
    }
}
