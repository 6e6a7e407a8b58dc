"""Builds the tokenizer, in CLIP's layout: byte-level BPE with `</w>` behind a word's last letters.

English merges are learnt from captions and CLDR words. Chinese merges only join the bytes of one character, in both
the inner and the final form, so a character is one token whatever stands beside it.
"""

import json
import random
from collections import Counter

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from captions import chinese, english
from draw import draw_scene
from settings import ANNOTATIONS, TOKENIZER, TOKENS

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
ENGLISH_SIZE, CHARACTERS = 2048, 1200


def byte_letters():
    """GPT-2's letter for every byte, in the order of CLIP's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


LETTERS = byte_letters()


def pipeline(model):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def annotation_words(language):
    data = json.loads((ANNOTATIONS / language / "annotations.json").read_text(encoding="utf-8"))
    for entry in data["annotations"]["annotations"].values():
        yield from entry.get("tts", ())
        yield from entry.get("default", ())


def english_merges(r):
    texts = [english(draw_scene(("words", i)), r) for i in range(12_000)] + list(annotation_words("en")) * 3
    trainer = trainers.BpeTrainer(
        vocab_size=ENGLISH_SIZE,
        min_frequency=3,
        initial_alphabet=list(LETTERS.values()),
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        show_progress=False,
    )
    tokenizer = pipeline(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(tokenizer.to_str())["model"]["merges"]]


def chinese_merges(r):
    texts = [chinese(draw_scene(("words", i)), r) for i in range(12_000)] + list(annotation_words("zh"))
    counts = Counter(c for text in texts for c in text if ord(c) > 0x2E80)
    merges = {}  # a dict keeps the order and drops repeats
    for character, _ in counts.most_common(CHARACTERS):
        first, second, third = (LETTERS[b] for b in character.encode())
        for merge in ((first, second), (first + second, third), (first + second, third + "</w>")):
            merges[merge] = None
    return list(merges)


def build():
    r = random.Random(5)
    tokens = list(LETTERS.values()) + [letter + "</w>" for letter in LETTERS.values()]
    merges, known = [], set(tokens)
    for left, right in english_merges(r) + chinese_merges(r):
        if left in known and right in known:
            merges.append((left, right))
            if left + right not in known:
                known.add(left + right)
                tokens.append(left + right)
    tokens += [START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = pipeline(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), add_prefix_space=False, trim_offsets=False
    )
    write(tokenizer, vocabulary, merges)


def write(tokenizer, vocabulary, merges):
    TOKENIZER.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(TOKENIZER / "tokenizer.json"))
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (TOKENIZER / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    special = {
        name: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, text in (("bos_token", START), ("eos_token", END), ("unk_token", END))
    } | {"pad_token": END}
    options = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": TOKENS}
    for name, value in (
        ("vocab.json", vocabulary),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", special | options | {"tokenizer_class": "CLIPTokenizer"}),
    ):
        (TOKENIZER / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def load():
    return Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))


if __name__ == "__main__":
    if not (TOKENIZER / "tokenizer.json").exists():
        build()
    tokenizer = load()
    print(tokenizer.get_vocab_size(), "tokens;", tokenizer.encode("一只可爱的小猫在花园里玩耍").tokens[:6])
