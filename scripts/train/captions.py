"""Says in English or Chinese what a scene shows, in many wordings; some wordings are kept for evaluation only."""

import json
import random
from functools import lru_cache

from settings import ANNOTATIONS
from vocabulary import BACKGROUNDS, COLOURS, SCENES, THINGS

ADJECTIVES = {
    "en": ("cute", "little", "lovely", "beautiful", "adorable", "small", "big", "funny", "nice", "happy", "sweet", "single"),
    "zh": ("可爱的", "小小的", "漂亮的", "美丽的", "大大的", "好看的", "快乐的", "有趣的", "小"),
}
VERBS = {
    "en": {
        "hop": ("playing", "sitting", "running", "jumping", "resting", "walking", "dancing"),
        "swim": ("swimming", "floating"),
        "fly": ("flying", "hovering"),
        "drive": ("driving", "moving", "parked"),
        "sway": ("growing", "standing"),
        "float": ("lying", "floating", "standing"),
        "spin": ("spinning", "turning"),
        "pulse": ("standing", "glowing"),
    },
    "zh": {
        "hop": ("玩耍", "奔跑", "休息", "散步", "跑步", "跳舞", "玩", "坐着"),
        "swim": ("游泳", "游动", "漂浮"),
        "fly": ("飞行", "飞翔", "飞"),
        "drive": ("行驶", "奔驰", "停着"),
        "sway": ("生长", "摇摆"),
        "float": ("漂浮", "放着"),
        "spin": ("旋转", "转动"),
        "pulse": ("闪耀", "矗立"),
    },
}
STYLES = {  # they change nothing; the program's presets write some of them behind every prompt
    "en": ("realistic", "cartoon", "3d render", "high quality", "4k", "detailed", "anime", "photo", "illustration",
           "cinematic film still, dramatic light", "watercolor painting, soft washes", "pencil sketch", "oil painting",
           "pixel art, low resolution sprite", "fantasy illustration, magical light", "oil painting, visible brush strokes"),
    "zh": ("写实风格", "卡通风格", "高清", "高质量", "细节丰富", "插画", "动漫风格", "电影画面，戏剧光影", "水彩画", "三维渲染",
           "像素风格", "油画风格", "铅笔素描", "奇幻插画"),
}
NEGATIVES = ("blurry", "low quality", "photo", "3d render", "cartoon", "drawing", "sketch", "flat light", "watermark", "text",
             "ugly", "deformed", "modern", "colour", "smooth shading", "模糊", "低质量", "水印", "变形")
EN_FRAMES = ("{t} {p}", "{t} {p}", "{t} {p}", "{t}, {p}", "{p}, {t}", "{p}: {t}", "{t}. {p}", "there is {t} {p}", "{p} there is {t}",
             "{p} stands {t}", "{p}, one sees {t}", "this is {t} {p}")
EN_OPENINGS = ("a picture of ", "a photo of ", "an image of ", "draw ", "a drawing of ", "a video of ", "please draw ", "make ", "show ")
EN_PLAIN = ("on a {c} background", "{c} background", "against a {c} wall", "with a {c} background", "the background is {c}",
            "on {c}", "in front of a {c} background", "plain {c} background", "a {c} backdrop")
ZH_PLACE = ("{t}在{p}{v}", "{t}在{p}{v}", "{t}正在{p}{v}", "在{p}{v}的{t}", "在{p}的{t}", "{p}有{t}", "{p}的{t}", "{t}，{n}", "{n}，{t}",
            "{t}，背景是{n}", "以{n}为背景的{t}", "{n}背景，{t}", "{p}，{t}{v}", "{p}{v}着{t}", "{t}{v}，在{p}")
ZH_PLAIN = ("{t}，{c}背景", "{t}，{c}的背景", "{c}背景上的{t}", "{c}背景，{t}", "{t}，背景是{c}", "{t}，背景为{c}", "{c}底的{t}",
            "在{c}背景前的{t}", "{t}{v}，纯{c}背景", "{c}的背景，{t}", "{t}在{c}背景上", "{t}在{c}的背景前{v}", "以{c}为背景的{t}", "{c}的墙前的{t}",
            "{t}靠着{c}的墙", "{c}墙壁，{t}", "{t}，墙是{c}的", "{t}后面是{c}")
ZH_SAID = ("{t}，背景色为{c}", "{t}，背景用{c}", "{t}，背景选{c}", "{t}，背景涂成{c}", "{t}，背景全是{c}", "{t}，背景请用{c}",
           "背景{c}，{t}", "{t}，背景{c}", "{t}，背景应该是{c}", "背景是{c}，{t}", "{t}，后面的颜色是{c}", "{c}背景里有{t}",
           "来{t}，背景得是{c}", "颜色是{c}的背景，{t}", "给我画{t}，背景都是{c}")
ZH_OPENINGS = ("画", "画一下", "一张图片：", "请画", "一幅画，", "图片，", "视频：")
# Common words that share a character with a name ("印象" with "大象"): one character must not decide.
FILLERS = {
    "zh": (
        "印象 现象 对象 气象 形象 抽象 老师 老人 老家 小时 小心 小说 企业 机会 手机 司机 公司 公园 办公 火热 火山 飞快 起飞 蛋白 礼貌 "
        "物品 动物 植物 人物 事物 足够 满足 地球 全球 雨天 下雨 王国 国王 书法 书桌 笑容 玩笑 人们 人生 别人 南方 南边 城里人 心情 中心 开心 "
        "形状 天气 空气 生气 星期 明星 色彩 精彩 彩色 方向 日子 日期 掌声 手掌 独立 孤独 角度 角落 恐怕 西方 东西 香味 孩子 样子 "
        "电子 如果 结果 效果 后果 冰冷 冰块 圆圈 甜美 甜蜜 热情 热闹 大家 大小 大概 伟大 巨大 汉字 好汉 客人 客气 快乐 音乐 长大 生长 生日 "
        "生活 玉米 海报 海外 上海 树立 木头 花样 花费 玫红 白天 黄金 红包 绿化 蓝图 紫外 粉末 自行 自由 单独 单纯 飞跃 船票 车票 停车 "
        "汽水 轿子 消息 防护 巴黎 不明 明亮 电影 电脑 幽静 灵感 器材 乐器 五官 爱情 爱好 灯光 头像 头发 鱼片 七点 牛头 狮城 狐疑 虎口 青年 青春 "
        "猴年 兔年 猪年 鸡年 羊年 蛇年 马上 马路 龙井 水龙 熊市 鹅黄 龟速 鲸吞 蝶泳 蜂蜜 章节 文章 文字 帆布 升起 蒸汽 堡垒 仙境 瓜子 莓红 "
        "出现 看见 想要 希望  图片 照片 画面 画出 展示 来一张 有一天 那里 这里 旁边 后面 附近 周围 地方"
    ).split(),
    "en": (
        "nice scene, beautiful day, somewhere, I would like, for my child, lots of light, wide view, from far, close up, good morning, "
        "once upon a time, just for fun, in a story book, for a postcard, on a poster, as seen today, my favourite, from a dream, with soft light"
    ).split(", "),
}

HELD = {  # wordings and adjectives that training never sees
    "en": {
        "adjectives": ("", "", "tiny", "fluffy", "gorgeous", "pretty"),
        "scene": ("show me one {t} {p}, please", "I want {a} that is {p}", "{p} you can see {a}", "imagine {a} {p}", "could you paint {a} {p}?"),
    },
    "zh": {
        "adjectives": ("", "", "胖胖的", "神奇的", "超级可爱的"),
        "scene": ("我想看{a}在{p}", "请生成：{a}，场景是{n}", "{n}那边有{a}", "给我{p}的{a}", "想象{p}出现了{a}"),
        "plain": ("我想看{a}，背景要{c}", "请生成：{a}，{c}的墙", "{c}的背景前面有{a}", "给我{a}，背景颜色{c}"),
    },
}


def with_article(words):
    return ("an " if words[0] in "aeiou" and not words.startswith(("uni", "ufo")) else "a ") + words


@lru_cache(maxsize=None)
def other_words(language):
    """Words of the CLDR annotations that name none of our things, colours or places."""
    data = json.loads((ANNOTATIONS / language / "annotations.json").read_text(encoding="utf-8"))
    known = {w for t in THINGS for name in getattr(t, language) for w in (name.split() if language == "en" else [name])}
    known |= {w for b in BACKGROUNDS for w in (" ".join(b.en).split() if language == "en" else b.zh)}
    known |= set(COLOURS) if language == "en" else {w for names, _ in COLOURS.values() for w in names}
    known |= {b.name for b in BACKGROUNDS}
    words = {w for entry in data["annotations"]["annotations"].values() for w in entry.get("default", ())}
    if language == "en":
        return sorted(w for w in words if w.isascii() and w.isalpha() and 3 <= len(w) <= 9 and w not in known)
    characters = set("".join(known))
    return sorted(w for w in words if 1 < len(w) <= 4 and not any(c.isascii() or c in characters for c in w))


def chance(r, share):
    return r.random() < share


def english(scene, r):
    thing, back = THINGS[scene.thing], BACKGROUNDS[scene.background]
    noun = r.choice(thing.en) if not chance(r, 0.02) else r.choice(other_words("en"))
    words = []
    if chance(r, 0.4):
        words.append(r.choice(ADJECTIVES["en"]))
    if chance(r, 0.08):
        words.append(r.choice(other_words("en")))
    if scene.colour:
        words.append(scene.colour)
    elif not thing.colours and chance(r, 0.03):
        words.append(r.choice(list(COLOURS)))
    phrase = " ".join((*words, noun))
    style = r.random()
    phrase = with_article(phrase) if style < 0.65 else "the " + phrase if style < 0.73 else "one " + phrase if style < 0.78 else phrase
    if chance(r, 0.3):
        phrase += " " + r.choice(VERBS["en"][thing.kind])
    if chance(r, 0.12):
        text = phrase
    else:
        place = r.choice(back.en) if not back.rgb else r.choice(EN_PLAIN).format(c=back.name)
        text = r.choice(EN_FRAMES).format(t=phrase, p=place)
    if chance(r, 0.2):
        text = r.choice(EN_OPENINGS) + text
    if chance(r, 0.12):
        filler = r.choice(FILLERS["en"])
        text = r.choice((f"{filler}, {text}", f"{text}, {filler}", f"{filler} {text}", f"{text} {filler}"))
    if chance(r, 0.35):
        text += ", " + r.choice(STYLES["en"]) + (" style" if chance(r, 0.2) else "")
    if chance(r, 0.2):
        text = text[0].upper() + text[1:]
    return text + ("." if chance(r, 0.12) else "")


def chinese(scene, r):
    thing, back = THINGS[scene.thing], BACKGROUNDS[scene.background]
    noun = r.choice(thing.zh) if not chance(r, 0.02) else r.choice(other_words("zh"))
    count = r.choice(("一" + thing.measure, "一" + thing.measure, "一个", "", "这" + thing.measure))
    adjective = r.choice(ADJECTIVES["zh"]) if chance(r, 0.35) else ""
    if chance(r, 0.08):
        adjective = r.choice(other_words("zh")) + "的"
    colour = ""
    if scene.colour or (not thing.colours and chance(r, 0.03)):
        colour = r.choice(COLOURS[scene.colour or r.choice(list(COLOURS))][0])
        colour += "的" if len(colour) > 1 and chance(r, 0.8) else ""
    phrase = count + (adjective + colour if chance(r, 0.7) else colour + adjective) + noun
    verb = r.choice(VERBS["zh"][thing.kind]) if chance(r, 0.5) else ""
    if chance(r, 0.12):
        text = phrase + verb
    elif back.rgb:
        text = r.choice(ZH_PLAIN).format(t=phrase, v=verb, c=r.choice(plain_names(back)))
    else:
        name = r.choice(back.zh)
        text = r.choice(ZH_PLACE).format(t=phrase, v=verb, n=name, p=name + back.after + ("面" if back.after in "里上" and chance(r, 0.1) else ""))
    if chance(r, 0.15):
        text = r.choice(ZH_OPENINGS) + text
    for _ in range(r.choice((0, 0, 1, 2))):
        filler = r.choice(FILLERS["zh"]) if chance(r, 0.8) else r.choice(other_words("zh"))
        text = r.choice((f"{filler}，{text}", f"{text}，{filler}", f"{filler}{text}", f"{text}{filler}", f"{filler}的{text}"))
    if chance(r, 0.35):
        text += "，" + r.choice(STYLES["zh"])
    if chance(r, 0.12):
        text += "。"
    return " ".join(text) if chance(r, 0.08) else text


def plain_names(back):
    """Long and short Chinese names of a plain colour."""
    return back.zh + COLOURS[back.name][0] if back.name in COLOURS else back.zh


def caption(scene, r):
    return english(scene, r) if chance(r, 0.5) else chinese(scene, r)


def no_caption(r):
    """What guidance steers away from: nothing, or words of a negative prompt."""
    return "" if chance(r, 0.7) else ", ".join(r.sample(NEGATIVES, r.randint(1, 4)))


def held_out(scene, r, language):
    """A wording that training never uses, for the evaluation."""
    thing, back, kept = THINGS[scene.thing], BACKGROUNDS[scene.background], HELD[language]
    adjective = r.choice(kept["adjectives"])
    if language == "en":
        noun = " ".join(w for w in (adjective, scene.colour, r.choice(thing.en)) if w)
        return r.choice(kept["scene"]).format(t=noun, a=with_article(noun), p=r.choice(back.en))
    colour = r.choice(COLOURS[scene.colour][0]) if scene.colour else ""
    noun = "一" + thing.measure + adjective + (colour + "的" if colour else "") + r.choice(thing.zh)
    if back.rgb:
        return r.choice(kept["plain"]).format(a=noun, c=back.zh[0])
    name = r.choice(back.zh)
    return r.choice(kept["scene"]).format(a=noun, p=name + back.after, n=name)


if __name__ == "__main__":
    from draw import draw_scene

    r = random.Random(1)
    for i in range(12):
        s = draw_scene(("caption", i))
        print(caption(s, r), "|", held_out(s, r, "en"), "|", held_out(s, r, "zh"))
