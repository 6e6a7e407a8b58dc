"""Trains the judge: which thing, background and colour a picture shows, or that the thing is not to be made out.

It learns from clean renders and must not be fooled by a coloured blob: blurred things, and silhouettes in their mean
colour, make up a class of their own, "unclear", and count as wrong whatever their colour says.
"""

from dataclasses import replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from draw import background, draw_scene, place, render, sprite, to_bytes
from encoder import signed
from settings import SIDE, rng
from text import PARTS, labels
from trainer import DEVICE, PAINT, Run, command, half, load_mean
from vocabulary import THINGS

UNCLEAR = len(THINGS)


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body, self.drop = nn.Sequential(*layers), nn.Dropout(0.2)
        self.parts = (PARTS[0] + 1, *PARTS[1:])
        self.head = nn.Linear(widths[-1] * (SIDE // 16) ** 2, sum(self.parts))

    def forward(self, pictures):
        return self.head(self.drop(self.body(pictures).flatten(1))).split(self.parts, 1)


def unclear(scene, r):
    """The scene with its thing blurred, or as a blurred silhouette in its mean colour."""
    image = sprite(scene.thing, scene.colour)
    if r.random() < 0.5:
        alpha = image[..., 3:]
        image = np.concatenate([alpha * image[..., :3].sum((0, 1)) / alpha.sum(), alpha], 2)
    image = cv2.GaussianBlur(image, (0, 0), r.uniform(7, 14))
    return to_bytes(place(background(scene), image, scene.x, scene.y, scene.size, scene.tilt))


def spoil(pixels, r):
    """What a good generated picture may have and a render has not: a little softness, grain and a shift of tone."""
    if r.random() < 0.5:
        pixels = cv2.GaussianBlur(pixels, (0, 0), r.uniform(0.3, 1.2))
    grain = r.normal(0, r.uniform(0, 10), pixels.shape)
    return np.clip(pixels + grain + r.uniform(-8, 8, 3), 0, 255).astype(np.uint8)


def batch_of(name, numbers):
    pixels, scenes, clear = [], [], []
    for i in numbers:
        scene, r = draw_scene((name, i)), rng("judge", name, i)
        scene = replace(scene, size=scene.size * r.uniform(0.9, 1.1), x=scene.x + r.uniform(-0.05, 0.05), y=scene.y + r.uniform(-0.05, 0.05))
        clear.append(r.random() >= 0.25)
        pixels.append(spoil(render(scene) if clear[-1] else unclear(scene, r), r))
        scenes.append(scene)
    targets = labels(scenes)
    clear = torch.tensor(clear, device=DEVICE)
    targets[0] = targets[0].masked_fill(~clear, UNCLEAR)
    return torch.from_numpy(signed(np.stack(pixels))).permute(0, 3, 1, 2).to(DEVICE), targets, clear


def painted_batches():
    """The same from a painter."""
    from painter import Painter, between

    painter = Painter(unclear=True)

    def batches(count):
        scenes = painter.scenes(count)
        scenes.size = scenes.size * between(0.9, 1.1, count)
        scenes.x, scenes.y = scenes.x + between(-0.05, 0.05, count), scenes.y + between(-0.05, 0.05, count)
        clear = torch.rand(count, device=DEVICE) >= 0.25
        shapes = torch.where(clear.view(-1, 1, 1, 1), painter.shapes(scenes), painter.unclear_shapes(scenes))
        pictures = soften(painter.pictures(scenes, shapes), between(0.3, 1.2, count) * (torch.rand(count, device=DEVICE) < 0.5) + 1e-3)
        grain = between(0, 10, count).view(-1, 1, 1, 1) * torch.randn_like(pictures) + 16 * torch.rand(count, 3, 1, 1, device=DEVICE) - 8
        targets = scenes.labels()
        targets[0] = targets[0].masked_fill(~clear, UNCLEAR)
        return (pictures + grain / 127.5).clamp(-1, 1), targets, clear

    return batches


def soften(pictures, sigma, reach=4):
    """Every picture under a Gaussian of its own width."""
    at = torch.arange(-reach, reach + 1, device=DEVICE)
    kernel = (-0.5 * (at / sigma.unsqueeze(1)).square()).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    x = F.pad(pictures, (reach,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    x = F.conv2d(x, kernel.view(-1, 1, 1, 2 * reach + 1), groups=len(kernel))
    return F.conv2d(x, kernel.view(-1, 1, 2 * reach + 1, 1), groups=len(kernel))[0].unflatten(0, (-1, 3))


def train(plan):
    torch.manual_seed(6)
    judge = Judge().to(memory_format=torch.channels_last)
    run = Run("judge", judge, plan, lr=1.5e-3, decay=0.98, weight_decay=2e-2)
    run.resume()

    def look():
        pictures, targets, clear = batch_of("held out", range(600))
        judge.train(False)
        thing, back, colour = (g.argmax(1) for g in judge(pictures))
        coloured = clear & (targets[2] > 0)
        right = (thing == targets[0]).float()
        run.log(
            f"  held out: thing {right[clear].mean():.3f}, unclear ones refused {right[~clear].mean():.3f}, "
            f"background {(back == targets[1]).float().mean():.3f}, colour {(colour == targets[2]).float()[coloured].mean():.3f}"
        )

    batches = painted_batches() if PAINT else lambda count: batch_of("judge", range(run.seen, run.seen + count))

    def compute():
        pictures, targets, clear = batches(plan.batch)
        with half():
            thing, back, colour = judge(pictures.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(thing.float(), targets[0]) + F.cross_entropy(back.float(), targets[1])
        loss = loss + 0.5 * F.cross_entropy(colour.float(), targets[2].masked_fill(~clear, -100))
        return {"loss": loss, "thing": (thing.argmax(1) == targets[0]).float().mean()}

    run.follow(compute, look)


def trained_judge():
    judge = Judge()
    load_mean("judge", judge)
    return judge.to(DEVICE)


if __name__ == "__main__":
    command(train, __doc__, samples=130_000, batch=64, gpu_batch=256)
