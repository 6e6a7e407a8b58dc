"""Teaches the text encoder what a caption names, before it ever meets pictures.

Learnt through the UNet alone, the encoder knows backgrounds after an hour and things never; on captions alone it takes
minutes. The two linear heads stay in use as a small extra loss while the UNet trains.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import tokenizer
from captions import caption, held_out
from draw import draw_scene
from settings import SEED, TOKENS
from trainer import DEVICE, PAINT, Run, command
from vocabulary import BACKGROUNDS, COLOUR_NAMES, THINGS

WIDTH = 128
PARTS = (len(THINGS), len(BACKGROUNDS), len(COLOUR_NAMES) + 1)


class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokenizer = tokenizer.load()
        self.end = self.tokenizer.token_to_id(tokenizer.END)
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=self.end + 1,
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                projection_dim=WIDTH,
                bos_token_id=self.end - 1,
                eos_token_id=self.end,
                pad_token_id=self.end,
                hidden_act="quick_gelu",
            )
        )
        self.heads = nn.Linear(WIDTH, sum(PARTS))

    def ids(self, texts):
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(text).ids[: TOKENS - 1]
            rows.append(ids + [self.end] * (TOKENS - len(ids)))
        return torch.tensor(rows, device=DEVICE)

    def forward(self, ids):
        return self.clip(input_ids=ids).last_hidden_state

    def guesses(self, hidden, ids):
        """Logits for thing, background and colour, from the places that have seen the whole caption."""
        behind = (ids == self.end).float().unsqueeze(2)
        return self.heads((hidden * behind).sum(1) / behind.sum(1)).split(PARTS, 1)


def labels(scenes):
    colours = [COLOUR_NAMES.index(s.colour) + 1 if s.colour else 0 for s in scenes]
    return [torch.tensor(column, device=DEVICE) for column in ([s.thing for s in scenes], [s.background for s in scenes], colours)]


def naming_loss(guesses, targets, counted=None):
    """Over all of the batch, or those that are `counted`."""
    if counted is not None:
        targets = [target.masked_fill(~counted, -100) for target in targets]
    return sum(F.cross_entropy(guess, target) for guess, target in zip(guesses, targets))


def train(plan):
    torch.manual_seed(1)
    model = TextEncoder()
    run = Run("text", model, plan, lr=1.5e-3, decay=0.99)
    run.resume()
    held = [draw_scene(("held out", i)) for i in range(300)]

    def look():
        for language in ("en", "zh"):
            ids = model.ids([held_out(s, random.Random(i), language) for i, s in enumerate(held)])
            right = [(g.argmax(1) == t).float().mean() for g, t in zip(model.guesses(model(ids), ids), labels(held))]
            run.log(f"  held-out wordings {language}: thing {right[0]:.3f} background {right[1]:.3f} colour {right[2]:.3f}")

    if PAINT:
        from painter import Painter

        painter = Painter(pictures=False, captions=True)

    def captioned():
        if PAINT:
            scenes, ids, _ = painter.captioned(plan.batch)
            return ids, scenes.labels()
        r = random.Random(SEED * 7 + run.steps)
        scenes = [draw_scene(("text", i)) for i in range(run.seen, run.seen + plan.batch)]
        return model.ids([caption(s, r) for s in scenes]), labels(scenes)

    def compute():
        ids, targets = captioned()
        guesses = model.guesses(model(ids), ids)
        right = (guesses[0].argmax(1) == targets[0]).float().mean()
        return {"loss": naming_loss(guesses, targets), "thing": right}

    run.follow(compute, look)


if __name__ == "__main__":
    command(train, __doc__, samples=320_000, batch=64, gpu_batch=256)
