"""Trains the picture decoder (latents to pixels) and writes it, with the closed-form encoder, as an AutoencoderKL."""


import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

import encoder
from draw import draw_scene, render
from arithmetic import AnchoredNorm, quick
from settings import CHANNELS, SIDE
from trainer import DEVICE, PAINT, Run, command, half, load_mean, psnr, sheet

WIDTHS = (96, 32, 64, 96)
LIVE = WIDTHS[0] // 3
ANCHOR = 2.0
NOISE = 0.25  # of a latent's standard deviation: what sampling may leave


def options():
    return dict(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=CHANNELS,
        norm_num_groups=32,
        sample_size=SIDE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def living_decoder():
    """The decoder with 32 living channels at the top and nothing that would be exported as zeros."""
    decoder = AutoencoderKL(**options() | {"block_out_channels": (LIVE, *WIDTHS[1:])}).decoder
    decoder.mid_block.resnets = nn.ModuleList([decoder.mid_block.resnets[0]])
    decoder.mid_block.attentions = nn.ModuleList([])
    first, second = decoder.up_blocks[3].resnets
    first.norm2 = AnchoredNorm(LIVE, 0.0)
    second.norm1, second.norm2 = AnchoredNorm(LIVE, ANCHOR), AnchoredNorm(LIVE, 0.0)
    decoder.conv_norm_out = AnchoredNorm(LIVE, ANCHOR)
    return quick(decoder)


def pair(numbers):
    """Pictures in -1..1 and their latents."""
    pixels = np.stack([render(draw_scene(("decoder", i))) for i in numbers])
    pictures = torch.from_numpy(encoder.signed(pixels)).permute(0, 3, 1, 2)
    latents = torch.from_numpy(encoder.encode(pixels)).contiguous(memory_format=torch.channels_last)
    return pictures.contiguous(memory_format=torch.channels_last).to(DEVICE), latents.to(DEVICE)


def painted_pairs():
    """The same from a painter."""
    from painter import Painter

    painter = Painter()

    def pairs(count):
        pictures = painter.pictures(painter.scenes(count)).contiguous(memory_format=torch.channels_last)
        return pictures, painter.encode(pictures).contiguous(memory_format=torch.channels_last)

    return pairs


def edges(a, b):
    """Mean difference of the two pictures' slopes."""
    difference = a - b
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def train(plan):
    torch.manual_seed(0)
    decoder = living_decoder()
    run = Run("vae", decoder, plan, lr=1.5e-3, decay=0.998, weight_decay=1e-3)
    if not run.resume():
        run.log(f"decoder: {sum(p.numel() for p in decoder.parameters()) / 1e6:.2f} M living parameters")
    held_pictures, held_latents = pair(range(-32, 0))

    def look():
        clean = decoder(held_latents)
        noisy = decoder(held_latents + 0.2 * torch.randn_like(held_latents))
        run.log(f"  held out: {psnr(clean, held_pictures).mean():.2f} dB, latents with noise {psnr(noisy, held_pictures).mean():.2f} dB")
        sheet(torch.cat([held_pictures[:12], clean[:12]]), 12, run.folder / "sheet.png")

    pairs = painted_pairs() if PAINT else lambda count: pair(range(run.seen, run.seen + count))

    def compute():
        pictures, latents = pairs(plan.batch)
        noise = NOISE * torch.rand(plan.batch, 1, 1, 1, device=DEVICE) * torch.randn_like(latents)
        with half():
            out = decoder(latents + noise).float()
        square = (out - pictures).square().mean()
        return {"loss": (out - pictures).abs().mean() + square + 0.5 * edges(out, pictures), "square": square}

    run.follow(compute, look)


def trained_decoder():
    decoder = living_decoder()
    load_mean("vae", decoder)
    return decoder.to(DEVICE)


if __name__ == "__main__":
    command(train, __doc__, samples=100_000, batch=8, gpu_batch=32)
