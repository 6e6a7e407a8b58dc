"""Latents of scenes and clips, drawn once into shards that are read through memory maps.

A shard holds a fixed run of numbers, and a scene follows from its number, so no list is kept beside them: an
interrupted run goes on with the first shard that is missing.
"""

import argparse
import os

import numpy as np
import torch

from draw import draw_scene, render
from encoder import encode
from motion import draw_clip, frames
from settings import DATA

SHARD = {"scenes": 1024, "clips": 128}


def shard_path(kind, index):
    return DATA / kind / f"{index:05}.npy"


def draw_shard(kind, index):
    size = SHARD[kind]
    numbers = range(index * size, (index + 1) * size)
    if kind == "scenes":
        return np.concatenate([encode(np.stack([render(draw_scene((i,)))])) for i in numbers]).astype(np.float16)
    return np.stack([encode(frames(draw_clip((i,)))) for i in numbers]).astype(np.float16)


def build(kind, shards):
    (DATA / kind).mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        path = shard_path(kind, index)
        if path.exists():
            continue
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.save(file, draw_shard(kind, index))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        print(f"{kind} {(index + 1) * SHARD[kind]}", flush=True)


class Latents:
    """All whole shards of a kind; asks for new ones again when `refresh` is called."""

    def __init__(self, kind):
        self.kind, self.maps = kind, []
        self.refresh()

    def refresh(self):
        while shard_path(self.kind, len(self.maps)).exists():
            self.maps.append(np.load(shard_path(self.kind, len(self.maps)), mmap_mode="r"))

    def __len__(self):
        return len(self.maps) * SHARD[self.kind]

    def take(self, numbers):
        size = SHARD[self.kind]
        return torch.from_numpy(np.stack([self.maps[i // size][i % size] for i in numbers])).float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=SHARD)
    parser.add_argument("count", type=int)
    args = parser.parse_args()
    build(args.kind, args.count // SHARD[args.kind])
