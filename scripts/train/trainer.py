"""The loop that every training stage shares: schedule by samples, running mean of weights, checkpoints, log.

A run lives in `RUNS/<name>`: `state.pt` (replaced atomically, so a kill at any moment costs minutes at most),
`log.txt`, and pictures of what the running mean can do. The random numbers of a step follow from its number, so an
interrupted run goes on as if nothing had happened.
"""

import argparse
import math
import os
import resource
import time
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image

from settings import CACHE, RUNS, SEED

SAVE_SECONDS = 240
LOOK_SECONDS = 1200
LOG_SECONDS = 60


def has_bf16_units():
    """Whether this CPU multiplies bf16 matrices in hardware; elsewhere f32 is faster."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False


BF16 = has_bf16_units()


def half():
    """Forward passes in bf16 where that is faster; weights and sums stay f32."""
    return torch.autocast("cpu", torch.bfloat16) if BF16 else nullcontext()


def wait_while_paused():
    while (CACHE / "pause").exists():
        time.sleep(5)


def rate(progress, warm=0.01, fall=0.6, last=0.03):
    """Learning rate at this share of the run: a short rise, a plateau, a cosine fall."""
    if progress < warm:
        return progress / warm
    if progress < fall:
        return 1.0
    t = min(1.0, (progress - fall) / (1 - fall))
    return last + (1 - last) * (1 + math.cos(math.pi * t)) / 2


class Run:
    """A model with its optimiser, running mean and place on disk."""

    def __init__(self, name, model, total, lr, decay=0.999, weight_decay=1e-2):
        self.model, self.total, self.lr, self.decay = model, total, lr, decay
        self.folder = RUNS / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.mean = [p.detach().clone() for p in self.parameters]
        self.seen = self.steps = 0
        self.losses, self.logged, self.saved, self.looked = {}, time.time(), time.time(), time.time()
        self.since = (0, time.time(), cpu_seconds())

    @property
    def state_path(self):
        return self.folder / "state.pt"

    def resume(self):
        """Goes on from the checkpoint; says whether there was one."""
        if not self.state_path.exists():
            return False
        state = torch.load(self.state_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.mean = state["mean"]
        self.seen, self.steps = state["seen"], state["steps"]
        self.since = (self.seen, time.time(), cpu_seconds())
        return True

    def save(self):
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "mean": self.mean}
        part = self.state_path.with_suffix(".part")
        with open(part, "wb") as file:
            torch.save(state | {"seen": self.seen, "steps": self.steps}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.state_path)
        self.saved = time.time()

    def use_mean(self):
        """Swaps weights and running mean; a second call swaps back."""
        with torch.no_grad():
            for own, mean in zip(self.parameters, self.mean):
                kept = own.clone()
                own.copy_(mean)
                mean.copy_(kept)

    def going(self):
        """Whether there is a step left; seeds it."""
        wait_while_paused()
        torch.manual_seed(SEED + self.steps)
        return self.seen < self.total

    def step(self, loss, count, **parts):
        """One optimiser step for a loss over `count` samples."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * rate(self.seen / self.total)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(norm):
            self.optimiser.step()
        self.seen += count
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, self.parameters, 1 - decay)
        for key, value in {"loss": loss, **parts}.items():
            self.losses.setdefault(key, []).append(float(torch.as_tensor(value).detach()))

    def report(self, look=None):
        """Now and then a line in the log, a checkpoint, and more seldom `look()` with the running mean in place."""
        now = time.time()
        if now - self.logged > LOG_SECONDS or self.seen >= self.total:
            seen, start, cpu = self.since
            used, done = cpu_seconds() - cpu, self.seen - seen
            means = " ".join(f"{key} {np.mean(values):.4f}" for key, values in self.losses.items())
            speed = f"{done / (now - start):.1f}/s {done / max(used, 1e-9):.1f}/cpu-s"
            self.log(f"seen {self.seen} step {self.steps} {means} {speed}")
            self.losses, self.logged, self.since = {}, now, (self.seen, now, cpu_seconds())
        if now - self.saved > SAVE_SECONDS or self.seen >= self.total:
            self.save()
        if look and (now - self.looked > LOOK_SECONDS or self.seen >= self.total):
            self.looked = now
            self.use_mean()
            self.model.eval()
            with torch.no_grad():
                look()
            self.model.train()
            self.use_mean()

    def log(self, line):
        line = f"{time.strftime('%m-%d %H:%M:%S')} {line}"
        print(line, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def load_mean(name, model):
    """The running mean of a run, in the model that made it; how many samples it has seen."""
    state = torch.load(RUNS / name / "state.pt", weights_only=True, mmap=True)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        for own, mean in zip((p for p in model.parameters() if p.requires_grad), state["mean"]):
            own.copy_(mean)
    model.eval()
    return state["seen"]


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def sheet(pictures, columns, path):
    """[n, 3, h, w] in -1..1 as one PNG."""
    pixels = ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    image = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * height, i % columns * width
        image[top : top + height, left : left + width] = picture
    Image.fromarray(image).save(path)


def psnr(a, b):
    """In dB, per picture, for values in -1..1."""
    return -10 * torch.log10(((a.clamp(-1, 1) - b) / 2).pow(2).flatten(1).mean(1) + 1e-10)


def command(train, text, samples, batch):
    """The command line of a stage: `train`, with other numbers than its own where they are given."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--batch", type=int, default=batch)
    args = parser.parse_args()
    train(args.samples, args.batch)
