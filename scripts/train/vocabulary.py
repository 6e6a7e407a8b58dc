"""What the models know: things, colours and backgrounds, with their English and Chinese names."""

from dataclasses import dataclass

from settings import SCRIPTS


@dataclass(frozen=True)
class Thing:
    emoji: str
    kind: str
    colours: tuple
    en: tuple
    zh: tuple
    measure: str


@dataclass(frozen=True)
class Background:
    name: str
    en: tuple  # whole phrases: "in the garden"
    zh: tuple  # places ("花园"), or colours ("红色") of a plain one
    after: str  # the Chinese postposition: 花园 + 里
    rgb: tuple = None  # of a plain one


COLOURS = {  # name: (Chinese names, OpenCV hue)
    "red": (("红色", "红"), 1),
    "orange": (("橙色", "橘色"), 13),
    "yellow": (("黄色", "黄"), 26),
    "green": (("绿色", "绿"), 60),
    "blue": (("蓝色", "蓝"), 108),
    "purple": (("紫色", "紫"), 138),
    "pink": (("粉色", "粉红色"), 165),
}

SCENES = (
    Background("garden", ("in a garden", "in the garden", "in a flower garden", "among flowers"), ("花园", "花丛", "院子"), "里"),
    Background("meadow", ("on grass", "on the grass", "in a meadow", "on a green field"), ("草地", "草坪", "草原"), "上"),
    Background("night", ("in the night sky", "at night", "under the stars"), ("夜空", "夜晚", "星空"), "中"),
    Background("sea", ("in the sea", "in the ocean", "on the water"), ("大海", "海洋", "水"), "里"),
    Background("beach", ("on the beach", "at the beach", "on the sand by the sea"), ("沙滩", "海滩"), "上"),
    Background("snow", ("in the snow", "on snow", "in winter"), ("雪地", "雪", "冬天"), "里"),
    Background("desert", ("in the desert", "on the sand dunes"), ("沙漠", "沙丘"), "里"),
    Background("forest", ("in the forest", "in the woods"), ("森林", "树林"), "里"),
    Background("city", ("in the city", "on the street", "in front of buildings"), ("城市", "街道", "街"), "里"),
    Background("space", ("in space", "in outer space", "in the universe"), ("太空", "宇宙"), "里"),
    Background("room", ("in a room", "indoors", "at home"), ("房间", "家", "屋子"), "里"),
    Background("sunset", ("at sunset", "in the evening", "in front of a sunset"), ("夕阳", "日落", "黄昏"), "下"),
    Background("sky", ("in the sky", "in the blue sky", "among the clouds"), ("天空", "蓝天", "云"), "中"),
    Background("mountains", ("in the mountains", "in front of mountains", "on a mountain"), ("大山", "群山", "高山"), "中"),
)

PLAIN = tuple(
    Background(name, (f"on a {name} background", f"{name} background", f"against a {name} wall"), (zh,), "", rgb)
    for name, zh, rgb in (
        ("white", "白色", (250, 250, 250)),
        ("black", "黑色", (20, 20, 22)),
        ("red", "红色", (215, 50, 45)),
        ("blue", "蓝色", (60, 110, 220)),
        ("green", "绿色", (75, 175, 80)),
        ("yellow", "黄色", (250, 215, 70)),
        ("pink", "粉色", (248, 170, 195)),
        ("purple", "紫色", (140, 80, 180)),
        ("orange", "橙色", (245, 150, 50)),
        ("gray", "灰色", (150, 150, 152)),
    )
)
BACKGROUNDS = SCENES + PLAIN


def _things():
    for line in (SCRIPTS / "things.tsv").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        emoji, kind, colours, en, zh, measure = line.split("\t")
        names = () if colours == "-" else tuple(COLOURS) if colours == "all" else tuple(colours.split(","))
        yield Thing(emoji, kind, names, tuple(en.split(",")), tuple(zh.split(",")), measure)


THINGS = tuple(_things())
COLOUR_NAMES = tuple(COLOURS)
