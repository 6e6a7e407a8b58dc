//! Two-dimensional convolutions, and the changes of size round them.

use candle_core::{DType, Tensor};

use super::activation::shift_channels;
use super::cpu;
use crate::engine::Result;
use crate::engine::device::cudnn;
use crate::engine::weights::Weights;

/// Widths and geometry of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dSpec {
    /// Channels in.
    pub input: usize,
    /// Channels out.
    pub output: usize,
    /// Height and width of the kernel.
    pub kernel: (usize, usize),
    /// Step along both axes.
    pub stride: usize,
    /// Zeros added on both ends of each axis.
    pub padding: (usize, usize),
}

impl Conv2dSpec {
    /// 3x3 that keeps the size.
    pub fn same(input: usize, output: usize) -> Self {
        Self { input, output, kernel: (3, 3), stride: 1, padding: (1, 1) }
    }

    /// 1x1.
    pub fn point(input: usize, output: usize) -> Self {
        Self { input, output, kernel: (1, 1), stride: 1, padding: (0, 0) }
    }

    /// 3 along the first axis (frames), 1 along the second, keeping the size.
    pub fn temporal(input: usize, output: usize) -> Self {
        Self { input, output, kernel: (3, 1), stride: 1, padding: (1, 0) }
    }
}

/// Elements candle may unfold at once off the CPU paths: its kernels count them in 32 bits, and memory is short.
const MAX_COLUMNS: usize = 1 << 28;

/// A convolution with bias over (b, c, h, w).
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor, // (out, in, kh, kw)
    bias: Tensor,   // (out)
    spec: Conv2dSpec,
}

impl Conv2d {
    /// `weight` and `bias`; a trailing axis of one, as 3-D convolutions over time have it, is dropped.
    pub fn load(weights: &Weights, spec: Conv2dSpec) -> Result<Self> {
        let Conv2dSpec { input, output, kernel: (height, width), .. } = spec;
        let shape = [output, input, height, width];
        let mut stored: Vec<&[usize]> = vec![&shape];
        let (longer, flat) = ([output, input, height, width, 1], [output, input]);
        if width == 1 {
            stored.push(&longer);
        }
        if (height, width) == (1, 1) {
            stored.push(&flat);
        }
        let weight = weights.get_one_of("weight", &stored, &shape)?.contiguous()?;
        Ok(Self { weight, bias: weights.get("bias", &[output])?.contiguous()?, spec })
    }

    /// A convolution from tensors in memory.
    pub fn new(weight: Tensor, bias: Tensor, spec: Conv2dSpec) -> Self {
        Self { weight, bias, spec }
    }

    /// (b, input, h, w) to (b, output, h', w').
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if cpu::takes(x) {
            return cpu::conv::conv2d(&x.contiguous()?, &self.weight, &self.bias, &self.spec);
        }
        if cpu::widens(x) {
            let wide = |x: &Tensor| x.to_dtype(DType::F32)?.contiguous();
            let (weight, bias) = (wide(&self.weight)?, wide(&self.bias)?);
            let y = cpu::conv::conv2d(&wide(x)?, &weight, &bias, &self.spec)?;
            return Ok(y.to_dtype(x.dtype())?);
        }
        let columns = x.elem_count() * self.spec.kernel.0 * self.spec.kernel.1;
        let y = if let Some(y) = cudnn::conv2d(x, &self.weight, &self.spec)? {
            y
        } else if self.spec.stride == 1 && columns > MAX_COLUMNS {
            self.in_bands(x, MAX_COLUMNS)?
        } else {
            let (vertical, horizontal) = self.spec.padding;
            let common = vertical.min(horizontal);
            let x = pad(x, 2, vertical - common)?;
            let x = pad(&x, 3, horizontal - common)?;
            x.conv2d(&self.weight, common, self.spec.stride, 1, 1)?
        };
        let bias = self.bias.reshape((1, self.spec.output))?;
        shift_channels(&y, &bias)
    }

    /// A convolution of stride one, without bias, made a few output rows at a time so that what candle unfolds stays
    /// below `limit` elements.
    fn in_bands(&self, x: &Tensor, limit: usize) -> Result<Tensor> {
        let (height, width) = self.spec.kernel;
        let (vertical, horizontal) = self.spec.padding;
        let x = pad(&pad(x, 2, vertical)?, 3, horizontal)?;
        let (batch, channels, tall, wide) = x.dims4()?;
        let rows = (limit / (batch * channels * wide * height * width)).max(1);
        let out = tall + 1 - height;
        let band = |start: usize| -> Result<Tensor> {
            let piece = x.narrow(2, start, rows.min(out - start) + height - 1)?;
            Ok(piece.conv2d(&self.weight, 0, 1, 1, 1)?)
        };
        Ok(Tensor::cat(&(0..out).step_by(rows).map(band).collect::<Result<Vec<_>>>()?, 2)?)
    }
}

fn pad(x: &Tensor, axis: usize, zeros: usize) -> Result<Tensor> {
    if zeros == 0 { Ok(x.clone()) } else { Ok(x.pad_with_zeros(axis, zeros, zeros)?) }
}

/// How a halving convolution treats the border.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalvingPad {
    /// One zero on each side: UNets.
    Even,
    /// One zero to the right and below: autoencoders.
    RightBelow,
}

/// Halves height and width with a 3x3 convolution, `conv` in the checkpoint.
#[derive(Clone, Debug)]
pub struct Downsample {
    conv: Conv2d,
    pad: HalvingPad,
}

impl Downsample {
    /// Loads `conv`.
    pub fn load(weights: &Weights, channels: usize, pad: HalvingPad) -> Result<Self> {
        let padding = if pad == HalvingPad::Even { (1, 1) } else { (0, 0) };
        let spec = Conv2dSpec { stride: 2, padding, ..Conv2dSpec::same(channels, channels) };
        Ok(Self { conv: Conv2d::load(&weights.pp("conv"), spec)?, pad })
    }

    /// (b, c, h, w) to (b, c, h/2, w/2), rounded up for [`HalvingPad::Even`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.pad {
            HalvingPad::Even => self.conv.forward(x),
            HalvingPad::RightBelow => {
                self.conv.forward(&x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?)
            }
        }
    }
}

/// Doubles height and width by repetition, then a 3x3 convolution, `conv` in the checkpoint.
#[derive(Clone, Debug)]
pub struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    /// Loads `conv`.
    pub fn load(weights: &Weights, channels: usize) -> Result<Self> {
        Ok(Self { conv: Conv2d::load(&weights.pp("conv"), Conv2dSpec::same(channels, channels))? })
    }

    /// (b, c, h, w) to (b, c, height, width): twice the size, or the size of a skip that was odd.
    pub fn forward(&self, x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        self.conv.forward(&x.contiguous()?.upsample_nearest2d(height, width)?)
    }

    /// (b, c, h, w) to (b, c, 2h, 2w).
    pub fn double(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        self.forward(x, 2 * height, 2 * width)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::{Conv2d, Conv2dSpec};

    #[test]
    fn a_convolution_in_bands_is_the_whole_one() {
        let ramp = |count: u32, scale: f64, shape: &[usize]| {
            let ramp = Tensor::arange(0_u32, count, &Device::Cpu).unwrap();
            let ramp = ramp.to_dtype(DType::F64).unwrap().affine(scale, -0.3).unwrap();
            ramp.sin().unwrap().reshape(shape).unwrap()
        };
        let spec = Conv2dSpec::same(3, 2);
        let conv = Conv2d::new(ramp(54, 0.7, &[2, 3, 3, 3]), ramp(2, 0.5, &[2]), spec);
        let x = ramp(2 * 3 * 7 * 5, 0.11, &[2, 3, 7, 5]);
        let whole = x.conv2d(&conv.weight, 1, 1, 1, 1).unwrap();
        for limit in [1, 2 * 3 * 7 * 9, 2 * 3 * 7 * 9 * 3, usize::MAX] {
            let banded = conv.in_bands(&x, limit).unwrap();
            let difference = (&banded - &whole).unwrap().abs().unwrap();
            let worst: f64 = difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap();
            assert!(worst < 1e-12, "limit {limit}: {worst}");
        }
    }
}
