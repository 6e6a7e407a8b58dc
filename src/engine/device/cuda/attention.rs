//! Attention without a matrix of scores, for half precision.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::{self, CompileOptions};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor};
use half::{bf16, f16};

use super::{Result, config, off_cpu, offset, short, takes, view};

/// The kernel, as text.
const SOURCE: &str = include_str!("attention.cu");
/// Widest head that the kernel is made for: its numbers stay in registers.
const WIDEST: usize = 160;
/// Queries of a block.
const QUERIES: usize = 64;

/// `softmax(q k^T / sqrt(d)) v` for each head: q (b, n, heads*d), k and v (b, m, heads*d) to (b, n, heads*d); `None`
/// for what the kernel does not take.
pub(in crate::engine) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
) -> crate::engine::Result<Option<Tensor>> {
    let width = q.dim(2)? / heads;
    let (batch, _, all) = q.dims3()?;
    let (same, keys, also) = k.dims3()?;
    if (same, also) != (batch, all) || keys == 0 || k.dims() != v.dims() {
        return Ok(None);
    }
    let half = matches!(q.dtype(), DType::F16 | DType::BF16);
    let fits = width.is_multiple_of(8) && width <= WIDEST && batch.max(heads) < 1 << 16;
    if !half || !fits || ![q, k, v].into_iter().all(takes) || !has_tensor_cores(q)? {
        return Ok(None);
    }
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    if ![&q, &k, &v].into_iter().all(|x| offset(x).is_multiple_of(8)) {
        return Ok(None);
    }
    Ok(Some(q.apply_op3_no_bwd(&k, &v, &Attention { heads, width })?))
}

/// Whether the GPU has the instructions: compute capability 8.0 or later.
fn has_tensor_cores(x: &Tensor) -> Result<bool> {
    let stream = x.device().as_cuda_device()?.cuda_stream();
    let (major, _) = stream.context().compute_capability().map_err(candle_core::Error::wrap)?;
    Ok(major >= 8)
}

struct Attention {
    heads: usize,
    width: usize,
}

impl Attention {
    fn run<T: CudaDType + DeviceRepr>(
        &self,
        (q, q_layout): (&CudaStorage, &Layout),
        (k, k_layout): (&CudaStorage, &Layout),
        (v, v_layout): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let device = q.device().clone();
        let module = load(&device, self.width, q.dtype())?;
        let kernel = device.get_or_load_custom_func("attention", &module, "")?;
        let (batch, queries) = (q_layout.dims()[0], q_layout.dims()[1]);
        let keys = k_layout.dims()[1];
        let (q, k, v) = (view::<T>(q, q_layout)?, view::<T>(k, k_layout)?, view::<T>(v, v_layout)?);
        // SAFETY: the kernel writes all of it.
        let mut y = unsafe { device.alloc::<T>(q_layout.shape().elem_count())? };
        let grid = (short(queries.div_ceil(QUERIES))?, short(self.heads)?, short(batch)?);
        let (queries, keys) = (short(queries)?, short(keys)?);
        let (heads, width) = (short(self.heads)?, short(self.width)?);
        let scale = std::f32::consts::LOG2_E / (width as f32).sqrt();
        let mut launch = kernel.builder();
        launch.arg(&q).arg(&k).arg(&v).arg(&mut y);
        launch.arg(&queries).arg(&keys).arg(&heads).arg(&width).arg(&scale);
        // SAFETY: the arguments are those of the kernel, which stays within the tensors.
        unsafe { launch.launch(config(grid, (128, 1))) }.map_err(candle_core::Error::wrap)?;
        Ok(CudaStorage::wrap_cuda_slice(y, device))
    }
}

/// The name of the module with the kernel for heads of `width`, compiled when it is first asked for.
fn load(device: &CudaDevice, width: usize, dtype: DType) -> Result<String> {
    let (width, brain) = (width.next_multiple_of(16), u8::from(dtype == DType::BF16));
    let module = format!("genvideo-attention-{width}-{brain}");
    if device.get_or_load_custom_func("attention", &module, "").is_ok() {
        return Ok(module);
    }
    let source = format!("#define WIDTH {width}\n#define BRAIN {brain}\n{SOURCE}");
    let options = vec!["--gpu-architecture=compute_80".to_owned()];
    let options = CompileOptions { options, ..CompileOptions::default() };
    let ptx = nvrtc::compile_ptx_with_opts(source, options).map_err(candle_core::Error::wrap)?;
    device.get_or_load_custom_func("attention", &module, &ptx.to_src())?;
    Ok(module)
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
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
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (q, k, v) = ((q, q_layout), (k, k_layout), (v, v_layout));
        let storage = match q.0.dtype() {
            DType::F16 => self.run::<f16>(q, k, v)?,
            _ => self.run::<bf16>(q, k, v)?,
        };
        Ok((storage, q_layout.shape().clone()))
    }
}
