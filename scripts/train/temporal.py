"""Teaches the video decoder's temporal layers to hold still what is still.

The picture decoder stays as it is. Temporal branches at 16x16 and 32x32 learn, from latents with noise that differs
from frame to frame, to give the features of the clean ones; above that the layers are left as identities.
"""

import random

import torch
import torch.nn.functional as F
from diffusers.models.resnet import TemporalResnetBlock
from torch import nn

from arithmetic import quick
from dataset import Latents
from settings import FRAMES, SEED
from trainer import DEVICE, PAINT, Run, command, half, load_mean
from vae import NOISE, trained_decoder

SHARE = 0.5  # of the branch in the blend: the sigmoid of the mix factor 0
PLACES = ("mid_block.resnets.0", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1")


class TemporalBranches(nn.Module):
    """What the temporal layers add, by place; `features` runs the lower half of the decoder with them."""

    def __init__(self, decoder):
        super().__init__()
        self.branches = nn.ModuleDict()
        for place in PLACES:
            width = decoder.get_submodule(place).conv2.out_channels
            branch = TemporalResnetBlock(width, width, temb_channels=None, eps=1e-5)
            nn.init.zeros_(branch.conv2.weight)
            nn.init.zeros_(branch.conv2.bias)
            self.branches[place.replace(".", "_")] = branch
        quick(self.branches)

    def at(self, place, x, frames):
        branch = self.branches[place.replace(".", "_")]
        clip = x.unflatten(0, (-1, frames)).transpose(1, 2)
        return x + SHARE * (branch(clip, None) - clip).transpose(1, 2).flatten(0, 1)


def features(decoder, z, branches=None, frames=1):
    """[n*frames, CHANNELS, CELLS, CELLS] to the features under the third level."""

    def through(place, x):
        x = decoder.get_submodule(place)(x, None)
        return x if branches is None else branches.at(place, x, frames)

    x = through("mid_block.resnets.0", decoder.conv_in(z))
    for level in (0, 1):
        for layer in (0, 1):
            x = through(f"up_blocks.{level}.resnets.{layer}", x)
        x = decoder.up_blocks[level].upsamplers[0](x)
    return x


def train(plan):
    torch.manual_seed(5)
    decoder = trained_decoder().requires_grad_(False)
    model = TemporalBranches(decoder)
    run = Run("temporal", model, plan, lr=1e-3, decay=0.995)
    run.resume()
    if PAINT:
        from painter import Painter

        painter = Painter()
    else:
        data = Latents("clips")

    def clips(count):
        if PAINT:
            return painter.encode(painter.clips(count)[0])
        r = random.Random(SEED * 17 + run.steps)
        return data.take([r.randrange(len(data)) for _ in range(count)])

    scale = features(decoder, clips(2).flatten(0, 1)).std()

    def compute():
        z = clips(plan.batch)
        strength = NOISE * torch.rand(plan.batch, 1, 1, 1, 1, device=DEVICE)
        noisy = z + strength * (torch.randn_like(z) + torch.randn(plan.batch, FRAMES, z.shape[2], 1, 1, device=DEVICE) * 0.2)
        with half():
            wanted = features(decoder, z.flatten(0, 1)).float()
            plain = features(decoder, noisy.flatten(0, 1)).float()
            got = features(decoder, noisy.flatten(0, 1), model, FRAMES).float()
        return {"loss": F.mse_loss(got, wanted) / scale**2, "without": F.mse_loss(plain, wanted) / scale**2}

    run.follow(compute)


def trained_branches(decoder):
    model = TemporalBranches(decoder)
    load_mean("temporal", model)
    return model.to(DEVICE)


if __name__ == "__main__":
    command(train, __doc__, samples=24_000, batch=4, gpu_batch=32)
