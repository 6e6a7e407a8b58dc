"""Clips to learn from, with what the video model is told of them; drawn beforehand, or painted as they are wanted."""

import random
from dataclasses import dataclass

import torch

from dataset import Latents
from motion import draw_clip
from settings import SEED
from trainer import DEVICE, PAINT
from vision import pictures_of

AUGMENT = 0.02  # noise in the input picture that the model is told of
DROPPED = 0.08  # share of clips without a picture, for guidance


@dataclass
class Batch:
    """Latents of clips, and what goes with them: the first frame's, its embedding, (fps-1, motion, noise)."""

    z: torch.Tensor
    first: torch.Tensor
    seen: torch.Tensor
    wanted: torch.Tensor

    @property
    def told(self):
        return self.first, self.seen, self.wanted

    def parts(self):
        return self.z, *self.told

    def joined(self, other):
        return Batch(*(torch.cat(pair) for pair in zip(self.parts(), other.parts())))

    def split(self, count):
        """The first `count`, and the others."""
        return Batch(*(part[:count] for part in self.parts())), Batch(*(part[count:] for part in self.parts()))


class Clips:
    """A source of batches; `stage` keeps those of two stages apart."""

    def __init__(self, stage, vision):
        self.stage, self.vision = stage, vision
        if PAINT:
            from painter import Painter

            self.painter = Painter()
        else:
            self.data = Latents("clips")

    def drawn(self, count, step):
        """Latents, first pictures, and (fps-1, motion, noise)."""
        if PAINT:
            frames, motion, fps = self.painter.clips(count)
            wanted = torch.stack((fps - 1, motion, torch.full_like(fps, AUGMENT)), 1)
            return self.painter.encode(frames), frames[:, 0], wanted
        r = random.Random(f"{SEED} {self.stage} {step}")
        numbers = [r.randrange(len(self.data)) for _ in range(count)]
        clips = [draw_clip((i,)) for i in numbers]
        wanted = torch.tensor([[c.fps - 1.0, c.motion, AUGMENT] for c in clips])
        return self.data.take(numbers), pictures_of([c.scene for c in clips]), wanted

    def batch(self, count, step, dropped=DROPPED):
        z, pictures, wanted = self.drawn(count, step)
        told = (torch.rand(count, device=DEVICE) >= dropped).float()
        # Besides the noise told of, a little in the latents: a generated picture is never as clean as a drawn one.
        spoilt = AUGMENT + 0.1 * torch.rand(count, 1, 1, 1, device=DEVICE).square()
        first = (z[:, 0] + spoilt * torch.randn_like(z[:, 0])) * told.view(-1, 1, 1, 1)
        return Batch(z, first, self.vision(pictures) * told.view(-1, 1), wanted)
