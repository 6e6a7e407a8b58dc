"""Sizes, seeds and places that every stage shares."""

import os
from pathlib import Path

import numpy as np

SIDE = 128  # pixels of a picture
PATCH = 8  # pixels of a latent cell
CELLS = SIDE // PATCH
CHANNELS = 16  # numbers of a latent cell
FRAMES = 14
TOKENS = 32  # positions of the text encoder
SEED = 20261126

SCRIPTS = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genvideo" / "train"
SOURCES = CACHE / "dl"  # font and annotations, fetched by `fetch`
FONT = SOURCES / "noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ANNOTATIONS = SOURCES / "package/annotations"
DATA = CACHE / "data"
RUNS = CACHE / "runs"  # a folder per stage: state.pt, log, pictures
TOKENIZER = CACHE / "tokenizer"
OUT = CACHE / "out"  # the exported pair


def rng(*words):
    """A numpy generator that depends on the words only."""
    text = "/".join(map(str, (SEED, *words))).encode()
    return np.random.default_rng(list(text))
