"""Draws the bank that a GPU paints from: backgrounds, sprites and captions, by all cores at once.

On a GPU a picture is put together anew at every step (`painter.py`): any sprite, anywhere, on any background of its
kind, under any caption that names both. Only what takes Python or OpenCV to make is kept here.
"""

import argparse
import multiprocessing
import os
import random
from dataclasses import replace
from functools import partial

import cv2
import numpy as np

import tokenizer
from captions import caption, no_caption
from draw import background, draw_scene, sprite
from settings import DATA, SEED, SIDE, TOKENS
from vocabulary import BACKGROUNDS, COLOUR_NAMES, THINGS

BANK = DATA / "bank"
LOOKS = [(thing, c) for thing in range(len(THINGS)) for c in ("", *THINGS[thing].colours)]  # every sprite there is
BLURS = (7.0, 9.0, 11.0, 14.0)
EMPTY = 4096  # rows of ids of no caption, for guidance
CHUNK = 2048


def draw_backgrounds(count, kind):
    """[count, 3, SIDE, SIDE] of one kind."""
    scenes = (draw_scene(("bank", kind, i)) for i in range(count))
    pictures = [background(replace(scene, background=kind)) for scene in scenes]
    return np.stack(pictures).round().clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2)


def draw_sprite(look):
    """[4, SIDE, SIDE], premultiplied."""
    return sprite(*look).transpose(2, 0, 1).astype(np.float16)


def draw_unclear(look):
    """[2 * len(BLURS), 4, SIDE, SIDE]: the thing blurred, and its blurred silhouette in its mean colour."""
    image = sprite(*look)
    alpha = image[..., 3:]
    flat = np.concatenate([alpha * image[..., :3].sum((0, 1)) / alpha.sum(), alpha], 2)
    out = [cv2.GaussianBlur(shape, (0, 0), blur) for shape in (image, flat) for blur in BLURS]
    return np.stack(out).transpose(0, 3, 1, 2).astype(np.float16)


def ids_of(texts, reader, end):
    rows = np.full((len(texts), TOKENS), end, np.int16)
    for row, encoding in zip(rows, reader.encode_batch(texts)):
        kept = encoding.ids[: TOKENS - 1]
        row[: len(kept)] = kept
    return rows


def draw_captions(part):
    """Ids, and what they name: thing, background, colour."""
    reader, r = tokenizer.load(), random.Random(SEED * 19 + part)
    scenes = [draw_scene(("caption", part, i)) for i in range(CHUNK)]
    rows = ids_of([caption(s, r) for s in scenes], reader, reader.token_to_id(tokenizer.END))
    named = [(s.thing, s.background, COLOUR_NAMES.index(s.colour) + 1 if s.colour else 0) for s in scenes]
    return rows, np.array(named, np.int16)


def write(name, array):
    BANK.mkdir(parents=True, exist_ok=True)
    part = BANK / f"{name}.part"
    with open(part, "wb") as file:
        np.save(file, array)
    part.rename(BANK / f"{name}.npy")
    print(f"{name} {array.shape}", flush=True)


def draw_pictures(pool, count):
    write("sprites", np.stack(pool.map(draw_sprite, LOOKS, 4)))
    write("backgrounds", np.stack(pool.map(partial(draw_backgrounds, count), range(len(BACKGROUNDS)), 1)))
    write("unclear", np.stack(pool.map(draw_unclear, LOOKS, 4)))


def draw_texts(pool, count):
    reader, r = tokenizer.load(), random.Random(SEED * 23)
    write("empty", ids_of([no_caption(r) for _ in range(EMPTY)], reader, reader.token_to_id(tokenizer.END)))
    ids, named = zip(*pool.map(draw_captions, range(-(-count // CHUNK)), 1))
    write("named", np.concatenate(named))
    write("captions", np.concatenate(ids))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("pictures", "captions"))
    parser.add_argument("count", type=int, help="backgrounds of a kind, or captions")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    last = BANK / ("unclear.npy" if args.kind == "pictures" else "captions.npy")
    if not last.exists():
        with multiprocessing.Pool(args.jobs) as pool:
            (draw_pictures if args.kind == "pictures" else draw_texts)(pool, args.count)
