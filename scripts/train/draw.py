"""Draws scenes: one emoji over a drawn background, and what of it a caption may say."""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from settings import FONT, SIDE, rng
from vocabulary import BACKGROUNDS, COLOURS, SCENES, THINGS

cv2.setNumThreads(1)
FINE = 2 * SIDE  # backgrounds are drawn at twice the size and averaged down
PLAIN_WEIGHTS = np.array([3, 1, 1, 1, 1, 1, 1, 1, 1, 1]) / 12  # white is asked for most


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture. Lengths are shares of the side, angles degrees."""

    thing: int
    colour: str
    background: int
    seed: int  # of the background's details
    x: float
    y: float
    size: float
    tilt: float


def draw_scene(words):
    """The scene that belongs to these words, always the same."""
    r = rng("scene", *words)
    thing = int(r.integers(len(THINGS)))
    colours = THINGS[thing].colours
    colour = str(r.choice(colours)) if colours and r.random() < 0.75 else ""
    if r.random() < 0.65:
        background = int(r.integers(len(SCENES)))
    else:
        background = len(SCENES) + int(r.choice(len(PLAIN_WEIGHTS), p=PLAIN_WEIGHTS))
        if BACKGROUNDS[background].name == colour:  # a red heart on red is not to be seen
            background = len(SCENES)
    x, y = r.uniform(0.45, 0.55), r.uniform(0.47, 0.57)
    return Scene(thing, colour, background, int(r.integers(1 << 30)), x, y, r.uniform(0.62, 0.76), r.uniform(-5, 5))


# --- the emoji ---


@lru_cache(maxsize=None)
def sprite(thing, colour):
    """Premultiplied RGBA, float32 in 0..1, SIDE x SIDE, the emoji filling it."""
    canvas = Image.new("RGBA", (200, 200))
    font = ImageFont.truetype(str(FONT), 109)  # the only size of this bitmap font
    ImageDraw.Draw(canvas).text((24, 24), THINGS[thing].emoji, font=font, embedded_color=True)
    pixels = np.array(canvas.crop(canvas.getbbox()))
    if colour:
        pixels[..., :3] = recoloured(pixels[..., :3], colour, leaf=THINGS[thing].emoji == "🍎")
    pixels = pixels.astype(np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    scale = (SIDE - 2) / max(pixels.shape[:2])
    height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    out = np.zeros((SIDE, SIDE, 4), np.float32)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    out[top : top + height, left : left + width] = pixels.clip(0, 1)
    return out


def recoloured(rgb, colour, leaf):
    """Turns the hue of every colourful pixel; an apple keeps its leaf."""
    hsv = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV).astype(np.float32)
    hue, saturation, value = np.moveaxis(hsv, 2, 0)
    mask = saturation > 60
    if leaf:
        mask &= ((hue < 20) | (hue > 165)) & (value > 100)
    hsv[..., 0][mask] = COLOURS[colour][1]
    if colour == "pink":
        hsv[..., 1][mask] *= 0.45
        hsv[..., 2][mask] = value[mask] * 0.35 + 165
    if colour in ("yellow", "orange"):
        hsv[..., 2][mask] = value[mask] * 0.5 + 127
    return cv2.cvtColor(hsv.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)


def place(background, image, x, y, size, tilt, stretch=(1.0, 1.0)):
    """The sprite over the background; x and y are where its middle goes."""
    angle = np.deg2rad(tilt)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag([size * stretch[0], size * stretch[1]])
    middle = (SIDE - 1) / 2
    shift = np.array([x * SIDE, y * SIDE]) - matrix @ [middle, middle]
    moved = cv2.warpAffine(image, np.column_stack([matrix, shift]), (SIDE, SIDE), flags=cv2.INTER_LINEAR)
    return background * (1 - moved[..., 3:]) + moved[..., :3] * 255


# --- backgrounds ---


def sweep(top, bottom):
    """A vertical run of colour."""
    t = np.linspace(0, 1, FINE, dtype=np.float32)[:, None, None]
    column = np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t
    return np.ascontiguousarray(np.broadcast_to(column, (FINE, FINE, 3)))


def ground(image, level, top, bottom):
    """Fills everything below `level` with a run of colour."""
    row = int(level * FINE)
    t = np.linspace(0, 1, FINE - row, dtype=np.float32)[:, None, None]
    image[row:] = np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t


def near(rgb, r, by=10):
    return tuple(float(c) for c in np.clip(np.asarray(rgb) + r.uniform(-by, by, 3), 0, 255))


def px(value):
    return int(round(value * FINE))


def disc(image, x, y, radius, rgb):
    cv2.circle(image, (px(x), px(y)), max(1, px(radius)), rgb, -1)


def box(image, left, top, right, bottom, rgb):
    cv2.rectangle(image, (px(left), px(top)), (px(right), px(bottom)), rgb, -1)


def polygon(image, points, rgb):
    cv2.fillPoly(image, [np.array([[px(x), px(y)] for x, y in points], np.int32)], rgb)


def garden(r):
    image, level = sweep((120, 190, 245), (205, 232, 250)), r.uniform(0.42, 0.5)
    for i in range(9):
        disc(image, i / 8 + r.uniform(-0.03, 0.03), level + 0.01, r.uniform(0.1, 0.15), near((45, 120, 50), r))
    ground(image, level, (112, 196, 82), (70, 150, 55))
    petals = ((235, 70, 90), (250, 210, 60), (240, 130, 190), (250, 250, 250), (170, 90, 210))
    for i in range(16):
        x, y = (i % 8 + r.uniform(0.1, 0.9)) / 8, level + 0.07 + (i // 8 + r.uniform(0, 0.9)) * (0.9 - level) / 2
        rgb = petals[r.integers(len(petals))]
        for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            disc(image, x + 0.024 * dx, y + 0.024 * dy, 0.022, rgb)
        disc(image, x, y, 0.017, (250, 220, 80))
    return image


def meadow(r):
    image = sweep((120, 190, 245), (205, 232, 250))
    ground(image, r.uniform(0.5, 0.62), (125, 205, 88), (70, 155, 58))
    return image


def stars(image, r, count, rgb, big):
    for _ in range(count):
        disc(image, r.random(), r.random(), r.choice((0.005, big)), rgb)


def night(r):
    image = sweep((14, 20, 60), (52, 58, 122))
    stars(image, r, 26, (250, 245, 200), 0.011)
    return image


def space(r):
    image = sweep((8, 5, 20), (30, 8, 46))
    stars(image, r, 24, (230, 230, 255), 0.007)
    x, y, radius = r.uniform(0.76, 0.9), r.uniform(0.1, 0.2), r.uniform(0.09, 0.12)
    rgb = near((215, 140, 80), r, 20)
    disc(image, x, y, radius, rgb)
    cv2.ellipse(image, (px(x), px(y)), (px(radius * 1.6), px(radius * 0.35)), -20, 0, 360, (240, 215, 170), 5)
    return image


def sea(r):
    image, level = sweep((150, 212, 246), (208, 236, 250)), r.uniform(0.3, 0.4)
    ground(image, level, (75, 165, 225), (15, 70, 160))
    across = np.arange(-4, FINE + 8, 4)
    for k in range(4):
        wave = px(level + 0.07 + k * 0.15) + 7 * np.sin(across / 19 + r.uniform(0, 6))
        cv2.polylines(image, [np.column_stack([across, wave]).astype(np.int32)], False, (188, 226, 246), 4)
    return image


def beach(r):
    image, sand = sweep((110, 196, 245), (192, 230, 250)), r.uniform(0.5, 0.57)
    ground(image, r.uniform(0.3, 0.37), (48, 150, 215), (38, 120, 190))
    ground(image, sand, (246, 226, 168), (225, 190, 126))
    box(image, 0, sand - 0.012, 1, sand + 0.012, (250, 250, 250))
    return image


def snow(r):
    image, level = sweep((150, 176, 206), (206, 221, 236)), r.uniform(0.55, 0.65)
    centre = (px(r.uniform(0.2, 0.8)), px(level) + FINE // 2)
    cv2.ellipse(image, centre, (FINE, FINE // 2), 0, 0, 360, (245, 248, 252), -1)
    for _ in range(30):
        disc(image, r.random(), r.random(), 0.013, (255, 255, 255))
    return image


def desert(r):
    image, level = sweep((250, 206, 132), (252, 229, 178)), r.uniform(0.5, 0.6)
    for k, rgb in enumerate(((231, 166, 86), (206, 136, 62))):
        centre = (px(r.uniform(0.1, 0.9)), px(level + 0.2 * k + 0.4))
        cv2.ellipse(image, centre, (px(0.86), px(0.41)), 0, 0, 360, rgb, -1)
    return image


def forest(r):
    image = sweep((168, 214, 184), (122, 178, 132))
    ground(image, 0.72, (76, 122, 56), (55, 100, 45))
    for k in r.permutation(7):
        x, top = k / 6 + r.uniform(-0.05, 0.05), r.uniform(0.03, 0.2)
        box(image, x - 0.02, 0.6, x + 0.02, 0.77, (95, 65, 40))
        polygon(image, ((x, top), (x - 0.14, 0.64), (x + 0.14, 0.64)), near((26, 88, 52), r, 12))
    return image


def city(r):
    image, x = sweep((160, 196, 226), (226, 231, 236)), 0.0
    while x < 1:
        width, top, rgb = r.uniform(0.13, 0.22), r.uniform(0.1, 0.46), near((116, 121, 137), r, 24)
        box(image, x, top, x + width, 0.83, rgb)
        for y in np.arange(top + 0.04, 0.76, 0.08):
            for left in np.arange(x + 0.03, x + width - 0.04, 0.06):
                box(image, left, y, left + 0.025, y + 0.035, (250, 235, 160))
        x += width + 0.008
    box(image, 0, 0.82, 1, 1, (76, 76, 82))
    box(image, 0, 0.9, 1, 0.915, (240, 240, 240))
    return image


def room(r):
    wall, x = near((245, 226, 196), r, 8), r.uniform(0.08, 0.17)
    image = sweep(wall, wall)
    ground(image, 0.7, (176, 121, 76), (150, 96, 56))
    box(image, 0, 0.69, 1, 0.715, (236, 236, 230))
    box(image, x, 0.08, x + 0.3, 0.42, (250, 250, 250))
    for left in (x + 0.02, x + 0.16):
        box(image, left, 0.1, left + 0.12, 0.4, (150, 206, 242))
    return image


def sunset(r):
    image = sweep((92, 52, 132), (255, 152, 72))
    disc(image, r.uniform(0.2, 0.8), 0.74, r.uniform(0.14, 0.18), (255, 232, 134))
    ground(image, 0.78, (120, 52, 62), (60, 26, 52))
    return image


def sky(r):
    image = sweep((76, 156, 236), (166, 214, 248))
    for _ in range(4):
        x, y = r.uniform(0.06, 0.94), r.uniform(0.06, 0.92)
        for _ in range(4):
            disc(image, x + r.uniform(-0.11, 0.11), y + r.uniform(-0.025, 0.025), r.uniform(0.05, 0.09), (250, 252, 255))
    return image


def mountains(r):
    image = sweep((150, 196, 240), (224, 236, 246))
    for k, rgb in enumerate(((122, 132, 166), (92, 102, 138), (106, 116, 150))):
        x, top, half = k * 0.36 + r.uniform(0.05, 0.22), r.uniform(0.06, 0.24), r.uniform(0.36, 0.48)
        polygon(image, ((x, top), (x - half, 0.8), (x + half, 0.8)), near(rgb, r))
        cap = 0.26
        snowline = ((x, top), (x - half * cap, top + (0.8 - top) * cap), (x - half * 0.06, top + (0.8 - top) * 0.19),
                    (x + half * 0.08, top + (0.8 - top) * 0.29), (x + half * cap, top + (0.8 - top) * cap))
        polygon(image, snowline, (248, 250, 253))
    ground(image, 0.76, (96, 132, 84), (66, 100, 62))
    return image


DRAWERS = {f.__name__: f for f in (garden, meadow, night, sea, beach, snow, desert, forest, city, space, room, sunset, sky, mountains)}


def background(scene):
    """The background alone, float32 RGB in 0..255."""
    r, kind = rng("background", scene.seed), BACKGROUNDS[scene.background]
    if kind.rgb:
        return np.full((SIDE, SIDE, 3), near(kind.rgb, r, 8), np.float32)
    return cv2.resize(DRAWERS[kind.name](r), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def to_bytes(image):
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def render(scene):
    """The picture, uint8 RGB."""
    return to_bytes(place(background(scene), sprite(scene.thing, scene.colour), scene.x, scene.y, scene.size, scene.tilt))
