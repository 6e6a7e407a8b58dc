"""Teaches the text encoder of a trained pair more ways to ask for a plain background in Chinese, by what its UNet makes of them.

The UNet stays as it is. A new wording is to have the effect of one that is known, and a known one the effect that it had.
The encoder that results takes the place of the one in the run of `t2i`, which goes on with a new optimiser then.
"""

import copy
import random
from dataclasses import replace

import numpy as np
import torch

import encoder
from captions import ADJECTIVES, ZH_OPENINGS, ZH_PLAIN, ZH_SAID, caption, chance, plain_names
from draw import draw_scene, render
from settings import RUNS, SEED
from t2i import TextToImage, scheduler
from trainer import DEVICE, Run, command, half, load_mean, write_state
from vocabulary import BACKGROUNDS, COLOURS, THINGS

LEAST = 200  # of 1000 times: below, next to nothing is decided
NEW = 0.5  # share of new wordings


def wordings(scene, r):
    """A known wording, and a new one of the same."""
    thing, back = THINGS[scene.thing], BACKGROUNDS[scene.background]
    colour = r.choice(COLOURS[scene.colour][0]) + "的" if scene.colour else ""
    adjective = r.choice(ADJECTIVES["zh"]) if chance(r, 0.4) else ""
    noun = r.choice(thing.zh)
    known, new = (f"一{thing.measure}{words}{colour}{noun}" for words in ("", adjective))
    opening = r.choice(ZH_OPENINGS) if chance(r, 0.3) else ""
    return ZH_PLAIN[0].format(t=known, c=back.zh[0]), opening + r.choice(ZH_SAID).format(t=new, c=r.choice(plain_names(back)))


def plain_scene(number):
    """One with a plain background."""
    attempt = 0
    while not BACKGROUNDS[(scene := draw_scene(("reword", number, attempt))).background].rgb:
        attempt += 1
    return scene


def train(plan):
    torch.manual_seed(6)
    model, path = TextToImage().to(DEVICE), RUNS / "t2i" / "state.pt"
    load_mean("t2i", model)
    model.requires_grad_(False)
    teacher = copy.deepcopy(model.text)
    model.text.requires_grad_(True)
    run = Run("reword", model.text, replace(plan, graph=False), lr=3e-4, decay=0.99)
    run.resume()
    kept, new = scheduler().alphas_cumprod.to(DEVICE), int(plan.batch * NEW)

    def compute():
        r = random.Random(SEED * 13 + run.steps)
        scenes = [plain_scene(run.seen + i) if i < new else draw_scene(("reword", run.seen + i)) for i in range(plan.batch)]
        known, said = zip(*(wordings(s, r) if i < new else (caption(s, r),) * 2 for i, s in enumerate(scenes)))
        z = torch.from_numpy(encoder.encode(np.stack([render(scene) for scene in scenes]))).to(DEVICE)
        t = torch.randint(LEAST, 1000, (plan.batch,), device=DEVICE)
        signal, noise = (v.sqrt().view(-1, 1, 1, 1) for v in (kept[t], 1 - kept[t]))
        x = (signal * z + noise * torch.randn_like(z)).contiguous(memory_format=torch.channels_last)
        with half():
            got = model.unet(x, t, model.text(model.text.ids(said))).sample
            with torch.no_grad():
                right = model.unet(x, t, teacher(teacher.ids(known))).sample
        error = (got.float() - right.float()).square().mean((1, 2, 3))
        return {"loss": error.mean(), "new": error[:new].mean(), "known": error[new:].mean()}

    run.follow(compute)
    if run.progress >= 1:
        run.use_mean()
        old = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        mean = [p.detach().cpu() for p in model.parameters()]
        write_state(path, {"mean": mean, "buffers": {}, "seen": old["seen"], "steps": old["steps"]})
        run.state_path.unlink()


if __name__ == "__main__":
    command(train, __doc__, samples=20_000, batch=32, gpu_batch=128)
