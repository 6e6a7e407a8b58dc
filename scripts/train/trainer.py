"""The loop that every training stage shares: schedule, running mean of weights, checkpoints, log.

A run lives in `RUNS/<name>`: `state.pt` (replaced atomically, so a kill at any moment costs minutes at most),
`log.txt`, and pictures of what the running mean can do. On a CPU the random numbers of a step follow from its number, so
an interrupted run goes on as if nothing had happened (but for what a stage keeps besides, such as clips on the
sampler's path). On a GPU a whole step is one CUDA graph where that can be had.
"""

import argparse
import math
import os
import resource
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from muon import Muon, split
from settings import CACHE, RUNS, SEED

LOOK_SECONDS = 1200
WARM_STEPS = 4  # before a graph is made of one

DEVICE = torch.device(os.environ.get("TRAIN_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
GPU = DEVICE.type == "cuda"
PAINT = GPU or bool(os.environ.get("TRAIN_PAINT"))  # take pictures from `painter.py`
SAVE_SECONDS, LOG_SECONDS = (100, 15) if GPU else (240, 60)
if GPU:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True


def has_bf16_units():
    """Whether this device multiplies bf16 matrices in hardware; elsewhere f32 is faster."""
    if GPU:
        return True
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            return any(flag in ("amx_bf16", "avx512_bf16") for flag in file.read().split())
    except OSError:
        return False


BF16 = has_bf16_units()


def half():
    """Forward passes in bf16 where that is faster; weights and sums stay f32."""
    return torch.autocast(DEVICE.type, torch.bfloat16) if BF16 else nullcontext()


def wait_while_paused():
    while (CACHE / "pause").exists():
        time.sleep(5)


def rate(progress, warm=0.01, fall=0.5, last=0.01):
    """Learning rate at this share of the run: a short rise, a plateau, a cosine fall."""
    if progress < warm:
        return progress / warm
    if progress < fall:
        return 1.0
    t = min(1.0, (progress - fall) / (1 - fall))
    return last + (1 - last) * (1 + math.cos(math.pi * t)) / 2


@dataclass
class Plan:
    """How long a run is, and how big its steps: `samples`, or with `until` (seconds since 1970) whatever fits."""

    samples: int
    batch: int
    usual: int  # the batch that the learning rate was found for
    until: float = 0.0
    graph: bool = GPU
    scale: float = 1.0


class Run:
    """A model with its optimisers, running mean and place on disk."""

    def __init__(self, name, model, plan, lr, decay=0.999, weight_decay=1e-2, muon=False):
        self.model, self.plan, self.decay = model.to(DEVICE), plan, decay
        self.lr = lr * plan.scale * (plan.batch / plan.usual) ** 0.25
        self.folder = RUNS / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.rate = torch.zeros((), device=DEVICE) if plan.graph else 0.0
        self.options = {"fused": True, "capturable": True} if plan.graph else {}
        hidden, others = split(self.parameters) if muon else ([], self.parameters)
        adam = torch.optim.AdamW(others, self.rate, betas=(0.9, 0.99), weight_decay=weight_decay, **self.options)
        self.optimisers = [adam, *([Muon(hidden, self.rate, weight_decay, torch.bfloat16 if BF16 else torch.float32)] if hidden else [])]
        self.mean = [p.detach().clone() for p in self.parameters]
        self.seen = self.steps = self.logged_steps = 0
        self.sums, self.events = {}, []
        self.begun = self.logged = self.saved = self.looked = time.time()
        self.since = (0, time.time(), cpu_seconds())
        self.stopped = False
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, *_):
        self.stopped = True

    @property
    def state_path(self):
        return self.folder / "state.pt"

    @property
    def progress(self):
        if self.plan.until:
            return (time.time() - self.begun) / max(self.plan.until - self.begun, 1)
        return self.seen / self.plan.samples

    def resume(self):
        """Goes on from the checkpoint; says whether there was one."""
        if not self.state_path.exists():
            return False
        state = torch.load(self.state_path, weights_only=True, map_location=DEVICE)
        if "model" in state:
            self.model.load_state_dict(state["model"])
            for own, kept in zip(self.optimisers, state.get("optimisers", ())):
                own.load_state_dict(kept)
                for group in own.param_groups:  # it may have been another kind of device
                    group.update({"fused": None, "capturable": False, "lr": self.rate} | self.options)
            self.mean = state["mean"]
        else:
            load_mean(self.folder.name, self.model)
            self.model.train()
            self.mean = [p.detach().clone() for p in self.parameters]
        self.seen, self.steps, self.logged_steps = state["seen"], state["steps"], state["steps"]
        self.since = (self.seen, time.time(), cpu_seconds())
        return True

    def save(self):
        state = {"model": self.model.state_dict(), "optimisers": [o.state_dict() for o in self.optimisers], "mean": self.mean}
        write_state(self.state_path, state | {"seen": self.seen, "steps": self.steps})
        self.saved = time.time()

    def use_mean(self):
        """Swaps weights and running mean; a second call swaps back."""
        with torch.no_grad():
            for own, mean in zip(self.parameters, self.mean):
                kept = own.clone()
                own.copy_(mean)
                mean.copy_(kept)

    def backward(self, losses):
        """Gradients and one step of the optimisers, which a gradient that is not finite skips; `losses` without their graph."""
        self.model.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self.optimisers:
            if self.plan.graph:  # decided on the GPU, without waiting for it
                optimiser.grad_scale, optimiser.found_inf = None, (~torch.isfinite(norm)).float()
                optimiser.step()
            elif torch.isfinite(norm):
                optimiser.step()
        return {key: value.detach().float() for key, value in losses.items()}

    def captured(self, compute):
        """A step as one CUDA graph, after a few steps that warm everything up."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self.backward(compute())
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            losses = self.backward(compute())

        def advance():
            graph.replay()
            return losses

        return advance

    def follow(self, compute, look=None):
        """Trains until the plan is fulfilled. `compute()` gives the loss of a batch under "loss", and whatever else to log."""
        if GPU:
            torch.manual_seed(SEED + self.steps)
        advance = lambda: self.backward(compute())
        if self.plan.graph and self.progress < 1:
            try:
                advance = self.captured(compute)
            except Exception as error:
                self.log(f"no CUDA graph can be had, starting again without: {error}")
                os.execv(sys.executable, [sys.executable, *sys.argv, "--no-graph"])
            self.since = (self.seen, time.time(), cpu_seconds())
        while self.progress < 1 and not self.stopped:
            wait_while_paused()
            if not GPU:
                torch.manual_seed(SEED + self.steps)
            self.set_rate(self.lr * rate(self.progress))
            losses = advance()
            self.seen += self.plan.batch
            self.steps += 1
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            with torch.no_grad():
                torch._foreach_lerp_(self.mean, self.parameters, 1 - decay)
                for key, value in losses.items():
                    self.sums[key] = self.sums.get(key, 0) + value
            self.keep_pace()
            self.report(look)
        self.report(look, last=True)

    def set_rate(self, value):
        if self.plan.graph:
            self.rate.fill_(value)
        else:
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = value

    def keep_pace(self):
        """Lets the GPU fall two steps behind, not more."""
        if GPU:
            event = torch.cuda.Event(blocking=True)
            event.record()
            self.events.append(event)
            if len(self.events) > 2:
                self.events.pop(0).synchronize()

    def report(self, look=None, last=False):
        """Now and then a line in the log, a checkpoint, and more seldom `look()` with the running mean in place."""
        now = time.time()
        if now - self.logged > LOG_SECONDS or last:
            seen, start, cpu = self.since
            used, done, steps = cpu_seconds() - cpu, self.seen - seen, max(self.steps - self.logged_steps, 1)
            means = " ".join(f"{key} {float(value) / steps:.4f}" for key, value in self.sums.items())
            speed = f"{done / max(now - start, 1e-9):.1f}/s {done / max(used, 1e-9):.1f}/cpu-s"
            self.log(f"seen {self.seen} step {self.steps} {means} {speed}")
            self.sums, self.logged, self.logged_steps, self.since = {}, now, self.steps, (self.seen, now, cpu_seconds())
        if now - self.saved > SAVE_SECONDS or last:
            self.save()
        if look and (now - self.looked > LOOK_SECONDS or last):
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


def write_state(path, state):
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_mean(name, model):
    """The running mean of a run, in the model that made it; how many samples it has seen."""
    state = torch.load(RUNS / name / "state.pt", weights_only=True, mmap=True, map_location="cpu")
    if "model" in state:
        model.load_state_dict(state["model"])
    else:
        model.load_state_dict(state["buffers"], strict=False)
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
    pixels = ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
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


def command(train, text, samples, batch, gpu_batch):
    """The command line of a stage: `train`, with other numbers than its own where they are given."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--batch", type=int, default=gpu_batch if GPU else batch)
    parser.add_argument("--until", type=float, default=0.0, help="train until then (`date +%%s`), whatever the samples")
    parser.add_argument("--rate", type=float, default=1.0, help="times the usual learning rate")
    parser.add_argument("--no-graph", action="store_true", help="no CUDA graph")
    args = parser.parse_args()
    train(Plan(args.samples, args.batch, batch, args.until, GPU and not args.no_graph, args.rate))
