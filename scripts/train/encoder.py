"""The VAE's encoder in closed form: principal components of 8x8 patches, 16 numbers each.

It is linear and is found in a minute, so the latents are fixed before anything is trained, and decoder,
text-to-image and image-to-video can learn at the same time. Two steps, because the encoder's layout wants them
(three convolutions of stride 2): 4x4 blocks to 32 numbers, then 2x2 of those to 16.
"""

import sys

import numpy as np

from draw import draw_scene, render
from settings import CHANNELS, DATA

INNER = 32  # numbers kept of a 4x4 block
FILE = DATA / "encoder.npz"


def blocks(x, k=2):
    """[n, h, w, c] to [n, h/k, w/k, k*k*c], in the order row, column, channel."""
    n, h, w, c = x.shape
    return x.reshape(n, h // k, k, w // k, k, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // k, w // k, k * k * c)


def signed(pixels):
    return pixels.astype(np.float32) / 127.5 - 1


def principal(rows, keep):
    """Mean, the first `keep` directions and their standard deviations."""
    mean = rows.mean(0)
    spread, directions = np.linalg.eigh(np.cov(rows.T.astype(np.float64)))
    order = np.argsort(spread)[::-1]
    kept = spread[order[:keep]]
    return mean, directions.T[order[:keep]], np.sqrt(kept), spread.sum() - kept.sum()


def fit(count=1500):
    pictures = signed(np.stack([render(draw_scene(("encoder", i))) for i in range(count)]))
    small = blocks(blocks(pictures))  # [n, 32, 32, 48]
    flat = small.reshape(-1, small.shape[-1])
    _, inner, _, lost4 = principal(flat[:: len(flat) // 200_000 + 1], INNER)
    wide = blocks(small @ inner.T.astype(np.float32)).reshape(-1, 4 * INNER)
    mean, outer, deviation, lost8 = principal(wide, CHANNELS)
    # Half whitened: the strong components stay stronger, all together have variance 1.
    scale = deviation**-0.5
    scale /= np.sqrt(np.mean((scale * deviation) ** 2))
    outer = outer * scale[:, None]
    error = (lost8 + 4 * lost4) / (8 * 8 * 3) / 4
    print(f"patch components alone: {-10 * np.log10(error):.2f} dB")
    tensors = {"inner": inner, "outer": outer, "bias": -outer @ mean, "deviation": scale * deviation}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    np.savez(FILE, **{name: value.astype(np.float32) for name, value in tensors.items()})


_loaded = {}


def load():
    if not _loaded:
        _loaded.update(np.load(FILE))
    return _loaded


def encode(pixels):
    """uint8, or floats in -1..1, [n, SIDE, SIDE, 3] to latents [n, CHANNELS, CELLS, CELLS]."""
    w = load()
    x = signed(pixels) if pixels.dtype == np.uint8 else pixels
    z = blocks(blocks(blocks(x)) @ w["inner"].T) @ w["outer"].T + w["bias"]
    return np.ascontiguousarray(z.transpose(0, 3, 1, 2))


if __name__ == "__main__":
    if FILE.exists() and "--again" not in sys.argv:
        print(f"{FILE} is there")
    else:
        fit()
