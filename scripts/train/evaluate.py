"""Scores the pair: what the pictures show, how good the VAE is, how the videos move. Writes scores.json and sheets.

By default the runs' own weights are scored with torch; with --program, the exported pair through genvideo itself.
"""

import argparse
import json
import random
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch

import encoder
import i2v
import t2i
import temporal
from captions import held_out
from draw import draw_scene, render
from judge import trained_judge
from motion import Clip, frames
from settings import CACHE, FRAMES, OUT, RUNS
from text import labels
from trainer import DEVICE, load_mean, psnr, sheet
from vae import trained_decoder
from vision import pictures_of, trained_vision
from vocabulary import BACKGROUNDS, THINGS

KITTEN = ("a cute kitten playing in a garden", "一只可爱的小猫在花园里玩耍")
MOTIONS, RATES, CLIPS = (1, 64, 127, 190, 255), (4, 7, 16), 8


def energy(clips):
    """Mean difference from frame to frame, 0..255, per clip."""
    return clips.diff(dim=1).abs().flatten(1).mean(1) * 127.5


def true_clips(clips):
    return torch.from_numpy(encoder.signed(np.stack([frames(c) for c in clips]))).permute(0, 1, 4, 2, 3)


class Torch:
    """The runs' weights."""

    def __init__(self):
        self.decoder = trained_decoder()
        self.t2i, self.seen = t2i.TextToImage(), {}
        self.seen["t2i"] = load_mean("t2i", self.t2i)
        self.t2i.to(DEVICE)
        self.branches = None
        if (RUNS / "temporal" / "state.pt").exists():
            self.branches = temporal.trained_branches(self.decoder)
        if (RUNS / "i2v" / "state.pt").exists():
            self.i2v, self.vision = i2v.ImageToVideo(), trained_vision()
            self.seen["i2v"] = load_mean("i2v", self.i2v)
            self.i2v.to(DEVICE)

    @torch.no_grad()
    def pictures(self, texts, seeds):
        out = []
        for start in range(0, len(texts), 32):  # one seed a batch, for its first prompt
            z = t2i.sample(self.t2i, texts[start : start + 32], seed=seeds[start])
            out.append(self.decoder(z).clamp(-1, 1).cpu())
        return torch.cat(out)

    @torch.no_grad()
    def decode_clips(self, z):
        x = temporal.features(self.decoder, z.flatten(0, 1).to(DEVICE), self.branches, z.shape[1])
        d = self.decoder
        for level in (2, 3):
            for layer in d.up_blocks[level].resnets:
                x = layer(x, None)
            if level == 2:
                x = d.up_blocks[level].upsamplers[0](x)
        x = d.conv_out(torch.nn.functional.silu(d.conv_norm_out(x)))
        return x.clamp(-1, 1).unflatten(0, z.shape[:2]).cpu()

    def clips(self, pictures, motions, rates, seed=0):
        return self.decode_clips(i2v.sample(self.i2v, self.vision, pictures, motions, rates, seed))


class Program(Torch):
    """The exported pair through the program; videos are scored in torch, since their frames leave it interpolated."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def pictures(self, texts, seeds):
        out = []
        for text, seed in zip(texts, seeds):
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run(
                    [self.program, "render", "--job", "image", "--style", "none", "--size", "128x128", "--seed", str(seed),
                     "--steps", str(t2i.STEPS), "--guidance", str(t2i.GUIDANCE),
                     "--image-model", OUT / "genvideo-tiny-t2i", "--out", folder, "--data-dir", f"{folder}/data", "--", text],
                    check=True, capture_output=True,
                )
                pixels = cv2.cvtColor(cv2.imread(str(next(Path(folder).glob("*.png")))), cv2.COLOR_BGR2RGB)
            out.append(torch.from_numpy(encoder.signed(pixels)).permute(2, 0, 1))
        return torch.stack(out)


def prompt(language, thing, colour=""):
    """A held-out wording for a thing, in `colour` or in one of its own."""
    kind, key = THINGS[thing], (language, thing, *([colour] if colour else []))
    r = random.Random(" ".join(map(str, key)))
    scene = draw_scene(("evaluation", *key))
    own = r.choice(kind.colours) if kind.colours else ""
    scene = replace(scene, thing=thing, colour=colour or own, background=r.randrange(len(BACKGROUNDS)))
    if BACKGROUNDS[scene.background].name == scene.colour:
        scene = replace(scene, background=0)
    return scene, held_out(scene, r, language)


def mixed(pictures, count=64):
    return pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(1))[:count]]


@torch.no_grad()
def score_pictures(models, judge, scores, folder):
    shown = []
    for language in ("en", "zh"):
        each = [prompt(language, thing) for thing in range(len(THINGS))]
        # Few things have colours, so each is asked for in all of its own.
        coloured = [prompt(language, thing, colour) for thing, kind in enumerate(THINGS) for colour in kind.colours]
        scenes, texts = zip(*each, *coloured)
        pictures = models.pictures(texts, list(range(len(texts))))
        shown.append(pictures[: len(each)])
        guesses = judge(pictures.to(DEVICE))
        thing, back, colour = ((g.argmax(1) == t).float() for g, t in zip(guesses, labels(scenes)))
        rows = zip(scenes, texts, thing, back, colour)
        missed = [text for s, text, t, b, c in rows if not (t and b and (c or not s.colour))]
        scores[f"pictures {language}"] = {
            "thing": thing[: len(each)].mean().item(),
            "background": back[: len(each)].mean().item(),
            "colour": colour[len(each) :].mean().item(),
            "of coloured things": len(coloured),
            "unclear": (guesses[0].argmax(1) == len(THINGS)).float().mean().item(),
            "missed": missed,
        }
    sheet(mixed(torch.cat(shown)), 8, folder / "pictures.png")
    kitten, garden = 0, [b.name for b in BACKGROUNDS].index("garden")
    for text in KITTEN:
        pictures = models.pictures([text] * 10, list(range(10)))
        guesses = judge(pictures.to(DEVICE))
        right = (guesses[0].argmax(1) == kitten) & (guesses[1].argmax(1) == garden)
        scores[text] = right.float().mean().item()
        sheet(pictures, 10, folder / f"kitten-{'zh' if ord(text[0]) > 127 else 'en'}.png")


@torch.no_grad()
def score_vae(models, scores):
    pixels = np.stack([render(draw_scene(("held out", i))) for i in range(64)])
    pictures = torch.from_numpy(encoder.signed(pixels)).permute(0, 3, 1, 2)
    out = models.decoder(torch.from_numpy(encoder.encode(pixels)).to(DEVICE)).cpu()
    scores["VAE, dB"] = psnr(out, pictures).mean().item()


@torch.no_grad()
def score_videos(models, scores, folder):
    scenes = [draw_scene(("video", i)) for i in range(CLIPS)]
    pictures = pictures_of(scenes).cpu()
    first, made, true = [], [], []
    for motion in MOTIONS:
        clips = models.clips(pictures, [motion] * CLIPS, [7] * CLIPS)
        first.append(psnr(clips[:, 0], pictures).mean().item())
        made.append(energy(clips))
        real = true_clips([Clip(s, motion, 7) for s in scenes])
        true.append(energy(real))
        if motion == 127:
            latents = torch.from_numpy(encoder.encode(real.flatten(0, 1).permute(0, 2, 3, 1).numpy())).unflatten(0, (CLIPS, FRAMES))
            again = models.decode_clips(latents)
            still = (real.diff(dim=1).abs().amax((1, 2)) < 0.01).unsqueeze(1).unsqueeze(2).expand_as(real.diff(dim=1))
            scores["flicker of still pixels"] = (clips.diff(dim=1).abs() * 127.5)[still].mean().item()
            scores["the VAE's own"] = (again.diff(dim=1).abs() * 127.5)[still].mean().item()
            sheet(torch.cat([row for pair in zip(real, clips) for row in pair]), FRAMES, folder / "clips.png")
    made, true = torch.stack(made), torch.stack(true)
    scores["first frame, dB"] = float(np.mean(first))
    scores["motion, made"] = dict(zip(MOTIONS, made.mean(1).tolist()))
    scores["motion, true"] = dict(zip(MOTIONS, true.mean(1).tolist()))
    scores["motion rises, share of steps"] = (made.diff(dim=0) > 0).float().mean().item()
    span = lambda e: (e[-1] - e[0]).mean()
    scores["motion range, share of the true"] = (span(made) / span(true)).item()
    for name, values in (
        ("fps, made", [energy(models.clips(pictures, [160] * CLIPS, [f] * CLIPS)).mean().item() for f in RATES]),
        ("fps, true", [energy(true_clips([Clip(s, 160, f) for s in scenes])).mean().item() for f in RATES]),
    ):
        scores[name] = dict(zip(RATES, values))


def main():
    """Every score is printed as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", help="a genvideo binary to make the pictures with")
    args = parser.parse_args()
    folder = CACHE / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    models = Program(args.program) if args.program else Torch()
    scores = {"samples seen": models.seen}
    score_vae(models, scores)
    print(scores, flush=True)
    score_pictures(models, trained_judge(), scores, folder)
    print(scores, flush=True)
    if "i2v" in models.seen:
        score_videos(models, scores, folder)
    text = json.dumps(scores, indent=2, ensure_ascii=False)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
