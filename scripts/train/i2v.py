"""Trains the image-to-video UNet (SVD's architecture) on the latents of drawn clips."""

import math
from dataclasses import replace

import torch
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from torch import nn

import encoder
from clips import AUGMENT, Clips
from motion import draw_clip
from arithmetic import quick
from settings import CELLS, CHANNELS, FRAMES, RUNS
from trainer import DEVICE, Run, command, half, sheet
from vision import WIDTH, pictures_of, trained_vision
from vocabulary import THINGS

SIGMA_MIN, SIGMA_MAX = 0.15, 30.0
LEAST = 0.01  # in training
COURSE = 3.0  # above it the noise hides everything but the told first frame
STEPS, GUIDANCE = 3, 1.15  # where a thing will be follows from the first frame, so further steps only break its edges
AWAY = 0.25  # what an error counts on the path where something moves
FLICKER = 8.0  # weight of changes where nothing does, without noise
HIDDEN = 0.5  # the noise at which they count half as much
OWN = 0.5  # share of a batch that comes from the sampler's own path


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

    def forward(self, scaled, sigma, first, seen, wanted):
        """v for `scaled` latents, told what a `Batch` says."""
        told = first.unsqueeze(1).expand(-1, scaled.shape[1], -1, -1, -1)
        with half():
            out = self.unet(torch.cat([scaled, told], 2), 0.25 * sigma.log(), seen.unsqueeze(1), wanted).sample
        return out.float()

    def guided(self, scaled, sigma, first, seen, wanted):
        """The same, further away from what it would be without a picture."""
        told, untold = (self(scaled, sigma, known * first, known * seen, wanted) for known in (1, 0))
        return untold + GUIDANCE * (told - untold)


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


def draw_sigmas(count):
    """Half or so where the course of what moves is decided, half where grain and edges are."""
    course = math.log(COURSE) + torch.rand(count, device=DEVICE) * math.log(SIGMA_MAX / COURSE)
    grain = torch.randn(count, device=DEVICE) * 1.5 - 0.4
    return torch.where(torch.rand(count, device=DEVICE) < 0.45, course, grain).exp().clamp(LEAST, SIGMA_MAX)


def wide(values):
    return values.view(-1, 1, 1, 1, 1)


def noisy(z, sigma):
    return z + wide(sigma) * torch.randn_like(z)


def cleaned(predict, x, sigma, told):
    """`x` without its noise, were it all taken away at once as the model or its `guided` predicts."""
    s = wide(sigma)
    v = predict(x / (s**2 + 1).sqrt(), sigma, *told)
    return x / (s**2 + 1) - v * s / (s**2 + 1).sqrt()


def stepped(x, clean, here, there):
    """An Euler step from one sigma to the next."""
    return clean + there / here * (x - clean)


def sampler_sigmas():
    """From the largest to 0."""
    plan = scheduler()
    plan.set_timesteps(STEPS)
    return plan.sigmas.to(DEVICE)


@torch.no_grad()
def sampled(model, told, noise):
    """Latents of clips as the model is told, by Euler steps from this unit noise."""
    sigmas = sampler_sigmas()
    x = noise * (sigmas[0] ** 2 + 1).sqrt()
    for here, there in zip(sigmas, sigmas[1:]):
        clean = cleaned(model.guided, x, here.expand(len(x)), told)
        x = stepped(x, clean, here, there)
    return x


@torch.no_grad()
def sample(model, vision, pictures, motions, rates, seed=0):
    """Latents [n, FRAMES, ...] of clips that begin with these pictures."""
    r, pictures = torch.Generator().manual_seed(seed), pictures.cpu()
    spoilt = pictures + AUGMENT * torch.randn(pictures.shape, generator=r)
    first = torch.from_numpy(encoder.encode(spoilt.permute(0, 2, 3, 1).numpy())).to(DEVICE)
    noise = torch.randn(len(pictures), FRAMES, *first.shape[1:], generator=r).to(DEVICE)
    wanted = torch.tensor([[fps - 1.0, motion, AUGMENT] for motion, fps in zip(motions, rates)], device=DEVICE)
    return sampled(model, (first, vision(pictures.to(DEVICE)), wanted), noise)


def still_cells(z):
    """Where nothing ever changes: [n, 1, 1, h, w]."""
    return (z - z[:, :1]).abs().amax((1, 2), keepdim=True) < 1e-3


def channel_weights():
    """How much a change of each channel counts, 1 on average: its variance.

    A change of the strong ones is one of a block's colour and is seen; the decoder takes little of the others for noise.
    """
    return torch.from_numpy(encoder.load()["deviation"]).square().view(-1, 1, 1).to(DEVICE)


def size(x, small=0.01):
    """Absolute values, but smooth under `small`."""
    return (x.square() + small**2).sqrt() - small


class Path:
    """Clips on their way through the sampler, each at a step of its own, with the errors of all its steps before
    (the first ones begin with noise on true latents, and so do all of them when a run is taken up again). Without guidance,
    which would cost another pass.

    Noise on true latents never shows the model what its own first steps get wrong, so the last ones would not mend it.
    """

    def __init__(self, batch):
        count = len(batch.z)
        self.sigmas, self.batch = sampler_sigmas(), batch
        self.place = torch.arange(count, device=DEVICE) % STEPS
        self.turnover = -(-count // STEPS)  # of these end with every step
        self.successor = torch.arange(count, device=DEVICE) // STEPS
        self.x = noisy(batch.z, self.sigma)

    @property
    def sigma(self):
        return self.sigmas[self.place]

    def advance(self, clean, fresh):
        """An Euler step to what was made of `x`; where that was the last one, one of `fresh` (`turnover` clips) begins.

        In place, since a CUDA graph reads where it has read before.
        """
        here, there = wide(self.sigma), wide(self.sigmas[self.place + 1])
        self.x.copy_(stepped(self.x, clean, here, there))
        self.place.copy_((self.place + 1) % STEPS)
        begun = (self.sigmas[0] ** 2 + 1).sqrt() * torch.randn_like(self.x)
        for own, other in ((self.x, begun), *((own, new[self.successor]) for own, new in zip(self.batch.parts(), fresh.parts()))):
            ended = (self.place == 0).view(-1, *(1,) * (own.dim() - 1))
            own.copy_(torch.where(ended, other, own))


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
    run = Run("i2v", model, plan, lr=1e-3, muon=True)
    if not run.resume():
        run.log(f"UNet: {sum(p.numel() for p in model.unet.parameters()) / 1e6:.2f} M parameters")
    clips, own = Clips("i2v", vision), max(1, int(plan.batch * OWN))
    free = plan.batch - own
    path = Path(clips.batch(own, "path"))
    on_path = torch.arange(plan.batch, device=DEVICE) >= free
    weights = channel_weights()

    def look():
        if (RUNS / "vae" / "state.pt").exists():
            from vae import trained_decoder

            made = sample(model, vision, *look_at())
            sheet(trained_decoder()(made.flatten(0, 1)), FRAMES, run.folder / "sheet.png")

    def compute():
        drawn, fresh = clips.batch(free + path.turnover, run.steps).split(free)
        batch, sigma = drawn.joined(path.batch), torch.cat((draw_sigmas(free), path.sigma))
        x = torch.cat((noisy(drawn.z, sigma[:free]), path.x))
        clean = cleaned(model, x, sigma, batch.told)
        path.advance(clean[free:].detach(), fresh)
        error, still = (clean - batch.z).square(), still_cells(batch.z)
        # On the path what moves has gone its own way, and being drawn back to the true one would only blur it.
        counted = torch.where(wide(on_path) & ~still, AWAY, 1.0)
        square = (error * counted).mean((1, 2, 3, 4)) * (sigma**2 + 1) / (sigma**2 + on_path)
        flicker = (weights * size(clean.diff(dim=1) * still)).mean((1, 2, 3, 4))
        loss = square + FLICKER * HIDDEN / (sigma + HIDDEN) * flicker
        return {"loss": loss.mean(), "flicker": flicker.mean(), "own": error[free:].mean()}

    run.follow(compute, look)


if __name__ == "__main__":
    command(train, __doc__, samples=80_000, batch=8, gpu_batch=32)
