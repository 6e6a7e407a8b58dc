"""Teaches the video decoder's temporal layers to hold still what is still.

The picture decoder stays as it is. Temporal branches at 16x16 and 32x32 learn, from the clips that the video model
makes, to give the features of the true ones where nothing moves; above that the layers are left as identities.
"""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import TemporalResnetBlock
from torch import nn

from arithmetic import quick
from clips import Clips
from i2v import ImageToVideo, sampled, size, still_cells
from settings import FRAMES
from trainer import DEVICE, Run, command, half, load_mean
from vae import NOISE, trained_decoder
from vision import trained_vision

POOL = 1024  # clips to learn from
FLICKER = 1.0  # weight of changes where nothing does
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


@torch.no_grad()
def made_clips(count, batch=16):
    """What the video model makes of `count` clips, and what it should have made: latents [count, FRAMES, ...]."""
    model, clips = ImageToVideo(), Clips("temporal", trained_vision())
    load_mean("i2v", model)
    model.to(DEVICE)
    made, true = [], []
    for step in range(-(-count // batch)):
        drawn = clips.batch(batch, step, dropped=0.0)
        made.append(sampled(model, drawn.told, torch.randn_like(drawn.z)))
        true.append(drawn.z)
    return torch.cat(made), torch.cat(true)


def train(plan):
    torch.manual_seed(5)
    decoder = trained_decoder().requires_grad_(False)
    model = TemporalBranches(decoder)
    run = Run("temporal", model, plan, lr=1e-3, decay=0.995)
    if run.resume() and run.progress >= 1:
        return
    pool = made_clips(POOL)
    scale = features(decoder, pool[1][:8].flatten(0, 1)).std()

    def compute():
        chosen = torch.randint(POOL, (plan.batch,), device=DEVICE)
        made, true = (clips[chosen] for clips in pool)
        noise = NOISE * torch.rand(plan.batch, 1, 1, 1, 1, device=DEVICE).square() * torch.randn_like(made)
        z = (made + noise).flatten(0, 1)
        with half():
            right = features(decoder, true.flatten(0, 1)).float()
            plain = features(decoder, z).float()
            got = features(decoder, z, model, FRAMES).float()
        still = F.interpolate(still_cells(true)[:, 0].float(), got.shape[2:])[:, None]
        # What moves stays as it was made: drawn to where it should be, it would only blur.
        right, plain, got = (x.unflatten(0, (-1, FRAMES)) / scale for x in (right, plain, got))
        error = got - torch.where(still > 0, right, plain)
        # As a sum of sizes, not of squares: the little that shakes everywhere is seen as much as the much beside what moves.
        changes, before = (size(x.diff(dim=1) * still).mean() for x in (error, plain - right))
        return {"loss": error.square().mean() + FLICKER * changes, "changes": changes, "without": before}

    run.follow(compute)


def trained_branches(decoder):
    model = TemporalBranches(decoder)
    load_mean("temporal", model)
    return model.to(DEVICE)


if __name__ == "__main__":
    command(train, __doc__, samples=8_000, batch=4, gpu_batch=32)
