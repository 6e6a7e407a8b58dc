"""Faster arithmetic for training, in bf16 and channels-last above all: group norm, attention, time convolution."""

import types

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from trainer import GPU


class GroupNormFunction(torch.autograd.Function):
    """Two sums forward, two sums backward, the rest one multiply-add per element.

    A group may hold, besides its channels, `extra` constant ones whose mean is 0 and whose square is `square` each;
    they count in its statistics only.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, extra, square, eps):
        ctx.dims, ctx.groups, ctx.size = tuple(range(2, x.dim())), groups, x.shape[1] // groups + extra
        mean = x.mean(ctx.dims, dtype=torch.float32)
        power = (x * x).mean(ctx.dims, dtype=torch.float32)
        mean = over_group(mean, groups, ctx.size)
        power = over_group(power, groups, ctx.size) + extra * square / ctx.size
        inverse = (power - mean * mean + eps).rsqrt()
        gain = inverse * weight
        ctx.save_for_backward(x, weight, mean, inverse)
        return torch.addcmul(spread(bias - mean * gain, x), x, spread(gain, x))

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, inverse = ctx.saved_tensors
        count = x[0, 0].numel()
        total = grad.sum(ctx.dims, dtype=torch.float32)
        along = ((grad * x).sum(ctx.dims, dtype=torch.float32) - mean * total) * inverse  # sum of grad * normalised x
        a = over_group(weight * total, ctx.groups, ctx.size * count)
        b = over_group(weight * along, ctx.groups, ctx.size * count)
        flat = spread(inverse * (mean * inverse * b - a), x)
        out = torch.addcmul(flat, x, spread(-inverse * inverse * b, x))
        out = torch.addcmul(out, grad, spread(inverse * weight, x))
        return out, along.sum(0), total.sum(0), None, None, None, None


def over_group(values, groups, size):
    """[n, channels]: the sum over each group divided by `size`, at every channel of it."""
    n, channels = values.shape
    sums = values.view(n, groups, -1).sum(2, keepdim=True) / size
    return sums.expand(n, groups, channels // groups).reshape(n, channels)


def spread(values, x):
    return values.to(x.dtype).view(*values.shape, *(1,) * (x.dim() - 2))


class AnchoredNorm(nn.Module):
    """GroupNorm over triples (x, +k, -k), of which only x is stored.

    Diffusers fixes 32 groups. With 32 channels each is its own group and loses its mean, and with it the picture's
    colours. So the top level has 96 channels in threes: one that lives and two constants that keep the variance from
    following the mean. Only the living one is computed here; the export writes all three.
    """

    def __init__(self, channels, anchor, eps=1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.channels, self.square, self.eps = channels, anchor**2, eps

    def forward(self, x):
        return GroupNormFunction.apply(x, self.weight, self.bias, self.channels, 2, self.square, self.eps)


def quick_norm(self, x):
    return GroupNormFunction.apply(x, self.weight, self.bias, self.num_groups, 0, 0.0, self.eps)


def quick_time_convolution(self, x):
    """A (k, 1, 1) kernel on [n, channels, frames, h, w], as a flat convolution on [n, channels, frames, h*w]."""
    flat = x.flatten(3).contiguous(memory_format=torch.channels_last)
    out = F.conv2d(flat, self.weight.squeeze(4), self.bias, padding=(self.padding[0], 0))
    return out.unflatten(3, x.shape[3:])


def quick(model):
    """Puts faster arithmetic, the same to rounding, into a diffusers model; returns it."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = types.MethodType(quick_norm, module)
        if isinstance(module, nn.Conv3d) and module.kernel_size[1:] == (1, 1):
            module.forward = types.MethodType(quick_time_convolution, module)
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor2_0() if GPU else AttnProcessor())
    return model
