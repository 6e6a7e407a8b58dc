//! Convolutions by cuDNN: sums in f32 whatever the number type, and no TF32 in f32.
//!
//! candle's own call sums f16 in f16, and lets f32 be rounded to the ten bits of TF32.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cudnn::{ConvForward, Cudnn, CudnnDataType, sys};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage, DeviceId};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Shape, Tensor, WithDType};
use half::{bf16, f16};

use super::cuda::off_cpu;
use crate::engine::nn::conv::Conv2dSpec;

type Result<T> = candle_core::Result<T>;
type Algorithm = sys::cudnnConvolutionFwdAlgo_t;

/// What an algorithm was chosen for: number type, dimensions of input and kernel, stride, padding.
type Key = (DType, Vec<usize>, Vec<usize>, usize, (usize, usize));

/// A handle and what is known of earlier convolutions.
#[derive(Default)]
struct Known {
    handles: HashMap<DeviceId, Arc<Cudnn>>,
    algorithms: HashMap<Key, (Algorithm, usize)>,
}

thread_local! {
    // Handles belong to the thread that made them.
    static KNOWN: RefCell<Known> = RefCell::default();
}

/// The convolution of `x` (b, c, h, w) with `weight`, without bias; `None` where cuDNN is not for it.
pub(in crate::engine) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    spec: &Conv2dSpec,
) -> crate::engine::Result<Option<Tensor>> {
    if !x.device().is_cuda() || !matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Ok(None);
    }
    let op = Convolution { stride: spec.stride, padding: spec.padding };
    Ok(Some(x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &op)?))
}

struct Convolution {
    stride: usize,
    padding: (usize, usize),
}

fn int(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(candle_core::Error::wrap)
}

fn ints(dims: &[usize]) -> Result<[i32; 4]> {
    let ints = dims.iter().map(|dim| int(*dim)).collect::<Result<Vec<_>>>()?;
    ints.try_into().map_err(|_| candle_core::Error::Msg("a convolution of four axes".into()))
}

fn handle(device: &CudaDevice) -> Result<Arc<Cudnn>> {
    KNOWN.with_borrow_mut(|known| {
        if let Some(handle) = known.handles.get(&device.id()) {
            return Ok(handle.clone());
        }
        let handle = Cudnn::new(device.cuda_stream()).map_err(candle_core::Error::wrap)?;
        known.handles.insert(device.id(), handle.clone());
        Ok(handle)
    })
}

impl Convolution {
    fn run<T>(
        &self,
        (x, x_layout): (&CudaStorage, &Layout),
        (weight, weight_layout): (&CudaStorage, &Layout),
        dims: &[usize],
    ) -> Result<CudaStorage>
    where
        T: CudaDType + CudnnDataType + DeviceRepr + WithDType,
    {
        let wrap = candle_core::Error::wrap;
        let device = x.device().clone();
        let dtype = x.dtype();
        let cudnn = handle(&device)?;
        let (vertical, horizontal) = self.padding;
        let stride = int(self.stride)?;
        let mut conv = cudnn
            .create_conv2d::<f32>(
                [int(vertical)?, int(horizontal)?],
                [stride, stride],
                [1, 1],
                sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
            )
            .map_err(wrap)?;
        conv.set_math_type(if dtype == DType::F32 {
            sys::cudnnMathType_t::CUDNN_FMA_MATH
        } else {
            sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH
        })
        .map_err(wrap)?;
        let rows = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW;
        let from = cudnn.create_4d_tensor::<T>(rows, ints(x_layout.dims())?).map_err(wrap)?;
        let filter =
            cudnn.create_4d_filter::<T>(rows, ints(weight_layout.dims())?).map_err(wrap)?;
        let to = cudnn.create_4d_tensor::<T>(rows, ints(dims)?).map_err(wrap)?;
        let forward = ConvForward { conv: &conv, x: &from, w: &filter, y: &to };
        let key = (
            dtype,
            x_layout.dims().to_vec(),
            weight_layout.dims().to_vec(),
            self.stride,
            self.padding,
        );
        let known = KNOWN.with_borrow(|known| known.algorithms.get(&key).copied());
        let (algorithm, scratch) = match known {
            Some(known) => known,
            None => {
                let algorithm = forward.pick_algorithm().map_err(wrap)?;
                let scratch = forward.get_workspace_size(algorithm).map_err(wrap)?;
                KNOWN.with_borrow_mut(|known| {
                    known.algorithms.insert(key, (algorithm, scratch));
                });
                (algorithm, scratch)
            }
        };
        let x = super::cuda::view::<T>(x, x_layout)?;
        let weight = super::cuda::view::<T>(weight, weight_layout)?;
        // SAFETY: cuDNN writes all of the output, and what it reads of its scratch memory.
        let (mut y, mut scratch) = unsafe {
            (device.alloc::<T>(dims.iter().product())?, device.alloc::<u8>(scratch.max(1))?)
        };
        // SAFETY: the descriptors are of these tensors.
        unsafe {
            forward
                .launch(
                    algorithm,
                    Some(&mut scratch),
                    (T::from_f64(1.0), T::from_f64(0.0)),
                    &x,
                    &weight,
                    &mut y,
                )
                .map_err(wrap)?;
        }
        Ok(CudaStorage::wrap_cuda_slice(y, device))
    }
}

impl CustomOp2 for Convolution {
    fn name(&self) -> &'static str {
        "convolution"
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
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (input, kernel) = (x_layout.dims(), weight_layout.dims());
        let side = |axis: usize, padding: usize| {
            (input[axis] + 2 * padding - kernel[axis]) / self.stride + 1
        };
        let dims = [input[0], kernel[0], side(2, self.padding.0), side(3, self.padding.1)];
        let (of, with) = ((x, x_layout), (weight, weight_layout));
        let storage = match x.dtype() {
            DType::F16 => self.run::<f16>(of, with, &dims)?,
            DType::BF16 => self.run::<bf16>(of, with, &dims)?,
            _ => self.run::<f32>(of, with, &dims)?,
        };
        Ok((storage, Shape::from(dims.to_vec())))
    }
}
