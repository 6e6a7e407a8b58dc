"""Trains the image-to-video UNet (SVD's architecture) on the latents of drawn clips."""

import math
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from torch import nn

import encoder
from dataset import Latents
from motion import draw_clip
from arithmetic import quick
from settings import CELLS, CHANNELS, FRAMES, RUNS, SEED
from trainer import DEVICE, PAINT, Run, command, half, sheet
from vision import WIDTH, pictures_of, trained_vision
from vocabulary import THINGS

SIGMA_MIN, SIGMA_MAX = 0.01, 30.0
AUGMENT = 0.02  # noise in the input picture that the model is told of
DROPPED = 0.08
STEPS = 4  # more sharpen the grain of what moves, not its shape


class ImageToVideo(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet = quick(
            UNetSpatioTemporalConditionModel(
                sample_size=CELLS,
                in_channels=2 * CHANNELS,
                out_channels=CHANNELS,
                block_out_channels=(64, 96, 96),
                down_block_types=("DownBlockSpatioTemporal", "DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
                up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
                layers_per_block=1,
                cross_attention_dim=WIDTH,
                num_attention_heads=(2, 3, 3),
                addition_time_embed_dim=32,
                projection_class_embeddings_input_dim=96,
                num_frames=FRAMES,
            )
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, noisy, sigma, first, seen, wanted):
        """v for `noisy` (already scaled), told the first frame's latents, its embedding, and (fps-1, motion, noise)."""
        told = first.unsqueeze(1).expand(-1, noisy.shape[1], -1, -1, -1)
        with half():
            out = self.unet(torch.cat([noisy, told], 2), 0.25 * sigma.log(), seen.unsqueeze(1), wanted).sample
        return out.float()


def scheduler():
    # SVD's own, but for sigma_max: with the first frame told, 700 is spent on noise that decides nothing.
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )


@torch.no_grad()
def sample(model, vision, pictures, motions, rates, seed=0, steps=STEPS):
    """Latents [n, FRAMES, ...] of clips that begin with these pictures, without guidance."""
    plan, r, pictures = scheduler(), torch.Generator().manual_seed(seed), pictures.cpu()
    plan.set_timesteps(steps)
    noisy = pictures + AUGMENT * torch.randn(pictures.shape, generator=r)
    first = torch.from_numpy(encoder.encode(noisy.permute(0, 2, 3, 1).numpy())).to(DEVICE)
    seen = vision(pictures.to(DEVICE))
    wanted = torch.tensor([[fps - 1.0, motion, AUGMENT] for motion, fps in zip(motions, rates)], device=DEVICE)
    x = torch.randn(len(pictures), FRAMES, *first.shape[1:], generator=r).to(DEVICE) * plan.init_noise_sigma
    for t, sigma in zip(plan.timesteps, plan.sigmas):
        v = model(plan.scale_model_input(x, t), sigma.to(DEVICE).expand(len(x)), first, seen, wanted)
        x = plan.step(v, t, x).prev_sample
    return x


def draw_sigmas(count):
    """Most where grain and edges are decided, some over the whole range."""
    centre = (torch.randn(count, device=DEVICE) * 1.5 - 0.4).exp()
    anywhere = math.log(SIGMA_MIN) + torch.rand(count, device=DEVICE) * math.log(SIGMA_MAX / SIGMA_MIN)
    return torch.where(torch.rand(count, device=DEVICE) < 0.2, anywhere.exp(), centre).clamp(SIGMA_MIN, SIGMA_MAX)


def look_at():
    """A few fixed clips: pictures, motions, rates."""
    scenes, motions, rates = [], (127, 255, 20, 180, 180, 180, 127, 127), (7, 7, 7, 7, 7, 7, 16, 4)
    for i, emoji in enumerate("🐈🐈🐈🚗🌳🤖🎈🐧"):
        thing = [t.emoji for t in THINGS].index(emoji)
        scenes.append(replace(draw_clip(("look", i)).scene, thing=thing, colour=""))
    return pictures_of(scenes), motions, rates


def train(plan):
    torch.manual_seed(4)
    model, vision = ImageToVideo(), trained_vision()
    run = Run("i2v", model, plan, lr=1e-3)
    if not run.resume():
        run.log(f"UNet: {sum(p.numel() for p in model.unet.parameters()) / 1e6:.2f} M parameters")
    if PAINT:
        from painter import Painter

        painter = Painter()
    else:
        data = Latents("clips")

    def look():
        if (RUNS / "vae" / "state.pt").exists():
            from vae import trained_decoder

            clips = sample(model, vision, *look_at())
            sheet(trained_decoder()(clips.flatten(0, 1)), FRAMES, run.folder / "sheet.png")

    def drawn():
        """Latents of clips, their first pictures, and (fps-1, motion, noise)."""
        if PAINT:
            frames, motion, fps = painter.clips(plan.batch)
            return painter.encode(frames), frames[:, 0], torch.stack((fps - 1, motion, torch.full_like(fps, AUGMENT)), 1)
        r = random.Random(SEED * 13 + run.steps)
        numbers = [r.randrange(len(data)) for _ in range(plan.batch)]
        clips = [draw_clip((i,)) for i in numbers]
        wanted = torch.tensor([[c.fps - 1.0, c.motion, AUGMENT] for c in clips])
        return data.take(numbers), pictures_of([c.scene for c in clips]), wanted

    def compute():
        z, pictures, wanted = drawn()
        told = (torch.rand(plan.batch, device=DEVICE) >= DROPPED).float()
        # Besides the noise told of, a little in the latents: a generated picture is never as clean as a drawn one.
        spoilt = AUGMENT + 0.1 * torch.rand(plan.batch, 1, 1, 1, device=DEVICE).square()
        first = (z[:, 0] + spoilt * torch.randn_like(z[:, 0])) * told.view(-1, 1, 1, 1)
        seen = vision(pictures) * told.view(-1, 1)
        sigma = draw_sigmas(plan.batch)
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy = z + s * torch.randn_like(z)
        target = (noisy / (s**2 + 1) - z) * (s**2 + 1).sqrt() / s
        return {"loss": F.mse_loss(model(noisy / (s**2 + 1).sqrt(), sigma, first, seen, wanted), target)}

    run.follow(compute, look)


if __name__ == "__main__":
    command(train, __doc__, samples=80_000, batch=8, gpu_batch=32)
