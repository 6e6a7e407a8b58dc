"""How a still picture moves: every kind of thing in its own way, at a pace set by `motion` and the frame rate."""

from dataclasses import dataclass

import numpy as np

from draw import Scene, background, draw_scene, place, sprite, to_bytes
from settings import FRAMES, rng
from vocabulary import THINGS

REACH = 0.33  # of `pose` at full motion: further, and a small model leaves patches behind what moves
CYCLES = 0.6  # per second at full motion; at 4 frames a second a cycle still has over six frames
SLOWEST, FASTEST = 4, 24  # frames per second


@dataclass(frozen=True)
class Clip:
    scene: Scene
    motion: int  # 0..255: distance a second, half of it by amplitude and half by pace
    fps: int


def draw_clip(words):
    r = rng("clip", *words)
    fps = int(round(np.exp(r.uniform(np.log(SLOWEST), np.log(FASTEST)))))
    return Clip(draw_scene(("of a clip", *words)), int(r.integers(1, 256)), fps)


def pose(kind, phase, reach):
    """Shift in x and y (shares of the side), tilt (degrees) and stretch at this phase (radians); at 0 all at rest."""
    s, c = np.sin(phase), np.cos(phase)
    up = (1 - np.cos(2 * phase)) / 2  # 0..1 twice a cycle
    if kind == "hop":
        squash = 0.10 * reach * (np.cos(2 * phase) - 1) / 2
        return 0.05 * reach * s, -0.19 * reach * up, 3 * reach * s, (1 + squash, 1 - squash)
    if kind == "swim":
        return 0.20 * reach * s, 0.05 * reach * np.sin(2 * phase), -7 * reach * s, (1, 1)
    if kind == "fly":
        return 0.16 * reach * s, -0.14 * reach * up, -9 * reach * s, (1, 1)
    if kind == "drive":
        return -0.24 * reach * s, -0.015 * reach * up, 2.5 * reach * s, (1, 1)
    if kind == "sway":
        return 0.05 * reach * s, 0, -24 * reach * s, (1, 1)
    if kind == "spin":
        return 0, -0.08 * reach * s, 70 * reach * s, (1, 1)
    if kind == "pulse":
        grow = 1 + 0.24 * reach * s
        return 0, -0.03 * reach * up, 7 * reach * s, (grow, grow)
    return 0.03 * reach * np.sin(2 * phase), -0.16 * reach * s, 12 * reach * s * c, (1, 1)  # float


def frames(clip, count=FRAMES):
    """The clip, uint8 [count, SIDE, SIDE, 3]."""
    scene, drive = clip.scene, np.sqrt(clip.motion / 255)
    reach = REACH * drive
    back, image = background(scene), sprite(scene.thing, scene.colour)
    out = []
    for k in range(count):
        phase = 2 * np.pi * CYCLES * drive * k / clip.fps
        dx, dy, tilt, stretch = pose(THINGS[scene.thing].kind, phase, reach)
        moved = place(back, image, scene.x + dx, scene.y + dy, scene.size, scene.tilt + tilt, stretch)
        out.append(to_bytes(moved))
    return np.stack(out)
