"""Teaches the small CLIP vision tower to name things and backgrounds; image-to-video then uses it as it is."""


import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from draw import draw_scene, render
from encoder import signed
from text import labels, naming_loss
from trainer import DEVICE, PAINT, Run, command, load_mean
from vocabulary import BACKGROUNDS, THINGS

WIDTH, PIXELS = 64, 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=PIXELS,
                patch_size=32,
                hidden_act="quick_gelu",
            )
        )
        self.heads = nn.Linear(WIDTH, len(THINGS) + len(BACKGROUNDS))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures):
        """Embeddings of pictures in -1..1, prepared as the SVD pipeline prepares them."""
        large = F.interpolate(pictures, (PIXELS, PIXELS), mode="bicubic", align_corners=True)
        return self.clip(pixel_values=((large + 1) / 2 - self.mean) / self.deviation).image_embeds

    def guesses(self, embeddings):
        return self.heads(embeddings).split((len(THINGS), len(BACKGROUNDS)), 1)


def pictures_of(scenes):
    return torch.from_numpy(signed(np.stack([render(s) for s in scenes]))).permute(0, 3, 1, 2).to(DEVICE)


def batch_of(name, numbers):
    scenes = [draw_scene((name, i)) for i in numbers]
    return pictures_of(scenes), labels(scenes)[:2]


def train(plan):
    torch.manual_seed(3)
    model = Vision()
    run = Run("vision", model, plan, lr=2e-3, decay=0.995)
    run.resume()
    held, truth = batch_of("held out", range(256))

    def look():
        right = [(g.argmax(1) == t).float().mean() for g, t in zip(model.guesses(model(held)), truth)]
        run.log(f"  held-out pictures: thing {right[0]:.3f} background {right[1]:.3f}")

    if PAINT:
        from painter import Painter

        painter = Painter()

    def drawn():
        if PAINT:
            scenes = painter.scenes(plan.batch)
            return painter.pictures(scenes), scenes.labels()[:2]
        return batch_of("vision", range(run.seen, run.seen + plan.batch))

    def compute():
        pictures, targets = drawn()
        pictures = pictures + 0.1 * torch.rand(plan.batch, 1, 1, 1, device=DEVICE) * torch.randn_like(pictures)
        guesses = model.guesses(model(pictures))
        right = (guesses[0].argmax(1) == targets[0]).float().mean()
        return {"loss": naming_loss(guesses, targets), "thing": right}

    run.follow(compute, look)


def trained_vision():
    model = Vision()
    load_mean("vision", model)
    return model.requires_grad_(False).to(DEVICE)


if __name__ == "__main__":
    command(train, __doc__, samples=100_000, batch=64, gpu_batch=256)
