"""Paints scenes and clips on the GPU from the bank: new ones at every step, as `draw.py` and `motion.py` draw them."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import encoder
from bank import BANK, BLURS, LOOKS
from draw import PLAIN_WEIGHTS
from motion import CYCLES, FASTEST, REACH, SLOWEST
from settings import CELLS, CHANNELS, FRAMES, PATCH, SIDE
from trainer import DEVICE
from vocabulary import BACKGROUNDS, COLOUR_NAMES, SCENES, THINGS

KINDS = ("hop", "swim", "fly", "drive", "sway", "spin", "pulse", "float")
PATIENCE = 60  # seconds that the bank may take
SCENE_SHARE, COLOURED = 0.65, 0.75  # as in `draw_scene`


@dataclass
class Scenes:
    """A tensor [n] for every field of a `Scene`; colours are 0 for none, else one more than their place in the list."""

    thing: torch.Tensor
    background: torch.Tensor
    colour: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    size: torch.Tensor
    tilt: torch.Tensor

    def labels(self):
        return [self.thing, self.background, self.colour]


def between(low, high, count):
    return low + (high - low) * torch.rand(count, device=DEVICE)


def constant(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def read(name):
    """An array of the bank, which may be in the making."""
    path = BANK / f"{name}.npy"
    for _ in range(PATIENCE * 5):
        if path.exists():
            break
        time.sleep(0.2)
    return torch.from_numpy(np.load(path)).to(DEVICE)


def signed(pixels):
    """0..255, rounded as a stored picture is, to -1..1."""
    return (pixels + 0.5).floor().clamp(0, 255) / 127.5 - 1


class Painter:
    def __init__(self, pictures=True, captions=False, unclear=False):
        if pictures:
            self.backgrounds, self.sprites = read("backgrounds"), read("sprites")
        self.unclear = read("unclear") if unclear else None
        if captions:
            self.captions, self.empty, self.named = read("captions"), read("empty"), read("named").long()
        places = {look: i for i, look in enumerate(LOOKS)}
        names = ("", *COLOUR_NAMES)
        self.look = constant([[places.get((t, c), places[t, ""]) for c in names] for t in range(len(THINGS))], torch.long)
        own = [[names.index(c) for c in t.colours] for t in THINGS]
        self.choices = constant([((c or [0]) * len(COLOUR_NAMES))[: len(COLOUR_NAMES)] for c in own], torch.long)
        weights = np.concatenate([np.full(len(SCENES), SCENE_SHARE / len(SCENES)), (1 - SCENE_SHARE) * PLAIN_WEIGHTS])
        self.steps = constant(np.cumsum(weights)[:-1].tolist())
        self.same = constant([names.index(b.name) if b.name in names else -1 for b in BACKGROUNDS], torch.long)
        self.kind = constant([KINDS.index(t.kind) for t in THINGS], torch.long)
        whole = np.eye(PATCH * PATCH * 3, dtype=np.float32).reshape(-1, PATCH, PATCH, 3)
        bias = encoder.load()["bias"]
        self.bias = constant(bias.tolist())
        self.directions = torch.from_numpy(encoder.encode(whole)[:, :, 0, 0] - bias).to(DEVICE)  # [192, CHANNELS]
        axis = torch.arange(SIDE, device=DEVICE, dtype=torch.float32)
        self.pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2)  # [SIDE, SIDE, (x, y)]

    def placed(self, thing, back, colour):
        n = len(thing)
        return Scenes(thing, back, colour, between(0.45, 0.55, n), between(0.47, 0.57, n), between(0.62, 0.76, n), between(-5, 5, n))

    def scenes(self, count):
        thing = torch.randint(len(THINGS), (count,), device=DEVICE)
        pick = torch.randint(len(COLOUR_NAMES), (count,), device=DEVICE)
        colour = self.choices[thing, pick] * (torch.rand(count, device=DEVICE) < COLOURED)
        back = torch.bucketize(torch.rand(count, device=DEVICE), self.steps, right=True)
        back = back.masked_fill((self.same[back] == colour) & (colour > 0), len(SCENES))
        return self.placed(thing, back, colour)

    def captioned(self, count, dropped=0.0):
        """Scenes with the ids of a caption, and which of them were told (the others have the ids of no caption)."""
        row = torch.randint(len(self.captions), (count,), device=DEVICE)
        nothing = self.empty[torch.randint(len(self.empty), (count,), device=DEVICE)]
        told = torch.rand(count, device=DEVICE) >= dropped
        ids = torch.where(told.unsqueeze(1), self.captions[row], nothing).long()
        return self.placed(*self.named[row].unbind(1)), ids, told

    def behind(self, scenes):
        """[n, 3, SIDE, SIDE] in 0..255: one of the backgrounds of the kind."""
        which = torch.randint(self.backgrounds.shape[1], scenes.background.shape, device=DEVICE)
        return self.backgrounds[scenes.background, which].float()

    def shapes(self, scenes):
        return self.sprites[self.look[scenes.thing, scenes.colour]].float()

    def unclear_shapes(self, scenes):
        which = torch.randint(2 * len(BLURS), scenes.thing.shape, device=DEVICE)
        return self.unclear[self.look[scenes.thing, scenes.colour], which].float()

    def place(self, behind, shapes, x, y, size, tilt, wide, high):
        """Sprites [n] over backgrounds [n] at every of f poses [n, f], as `draw.place` does: [n, f, 3, SIDE, SIDE] in -1..1."""
        n, f = x.shape
        s, c = torch.sin(tilt * (math.pi / 180)), torch.cos(tilt * (math.pi / 180))
        u = self.pixels[..., 0] - (x * SIDE)[..., None, None]
        v = self.pixels[..., 1] - (y * SIDE)[..., None, None]
        s, c = s[..., None, None], c[..., None, None]
        across = (c * u - s * v) / (size * wide)[..., None, None] + (SIDE - 1) / 2
        down = (s * u + c * v) / (size * high)[..., None, None] + (SIDE - 1) / 2
        grid = (2 * torch.stack((across, down), 4) + 1) / SIDE - 1
        moved = F.grid_sample(shapes, grid.view(n, f * SIDE, SIDE, 2), "bilinear", "zeros", align_corners=False)
        moved = moved.view(n, 4, f, SIDE, SIDE).transpose(1, 2)
        return signed(behind.unsqueeze(1) * (1 - moved[:, :, 3:]) + moved[:, :, :3] * 255)

    @torch.no_grad()
    def pictures(self, scenes, shapes=None):
        one = torch.ones_like(scenes.x).unsqueeze(1)
        shapes = self.shapes(scenes) if shapes is None else shapes
        where = (v.unsqueeze(1) for v in (scenes.x, scenes.y, scenes.size, scenes.tilt))
        return self.place(self.behind(scenes), shapes, *where, one, one)[:, 0]

    @torch.no_grad()
    def clips(self, count):
        """[n, FRAMES, 3, SIDE, SIDE] in -1..1, and motion and frame rate of each."""
        scenes = self.scenes(count)
        motion = torch.randint(1, 256, (count,), device=DEVICE).float()
        fps = between(math.log(SLOWEST), math.log(FASTEST), count).exp().round()
        drive = (motion / 255).sqrt().unsqueeze(1)
        phase = 2 * math.pi * CYCLES * drive * torch.arange(FRAMES, device=DEVICE) / fps.unsqueeze(1)
        dx, dy, tilt, wide, high = (v.gather(0, self.kind[scenes.thing].view(1, -1, 1).expand(1, -1, FRAMES))[0] for v in poses(phase, REACH * drive))
        x, y = scenes.x.unsqueeze(1) + dx, scenes.y.unsqueeze(1) + dy
        size = scenes.size.unsqueeze(1).expand_as(x)
        frames = self.place(self.behind(scenes), self.shapes(scenes), x, y, size, scenes.tilt.unsqueeze(1) + tilt, wide, high)
        return frames, motion, fps

    @torch.no_grad()
    def encode(self, pictures):
        """[..., 3, SIDE, SIDE] in -1..1 to latents [..., CHANNELS, CELLS, CELLS]."""
        flat = pictures.reshape(-1, 3, CELLS, PATCH, CELLS, PATCH).permute(0, 2, 4, 3, 5, 1)
        z = flat.reshape(-1, PATCH * PATCH * 3) @ self.directions + self.bias
        return z.view(-1, CELLS, CELLS, CHANNELS).permute(0, 3, 1, 2).reshape(*pictures.shape[:-3], CHANNELS, CELLS, CELLS)


def poses(phase, reach):
    """`motion.pose` for all KINDS at once: five tensors [KINDS, n, FRAMES], the last two the stretch."""
    s, c, twice = torch.sin(phase), torch.cos(phase), torch.sin(2 * phase)
    up = (1 - torch.cos(2 * phase)) / 2
    none, one, grow, squash = torch.zeros_like(s), torch.ones_like(s), 1 + 0.24 * reach * s, -0.10 * reach * up
    rows = (
        (0.05 * s, -0.19 * up, 3 * s, 1 + squash, 1 - squash),
        (0.20 * s, 0.05 * twice, -7 * s, one, one),
        (0.16 * s, -0.14 * up, -9 * s, one, one),
        (-0.24 * s, -0.015 * up, 2.5 * s, one, one),
        (0.05 * s, none, -24 * s, one, one),
        (none, -0.08 * s, 70 * s, one, one),
        (none, -0.03 * up, 7 * s, grow, grow),
        (0.03 * twice, -0.16 * s, 12 * s * c, one, one),
    )
    columns = [torch.stack(column) for column in zip(*rows)]
    return [reach * v for v in columns[:3]] + columns[3:]
