"""Takes the pair in `models/` back into runs, so that training can go on from it where nothing else is left.

What is not part of the pair starts anew: optimisers, and the heads that name things while a text encoder or a vision
tower trains.
"""

import shutil
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import encoder
from draw import draw_scene, render
from export import LIVING
from i2v import ImageToVideo
from settings import RUNS, SCRIPTS, TOKENIZER
from t2i import TextToImage
from temporal import PLACES, TemporalBranches
from trainer import write_state
from vae import living_decoder
from vision import Vision

MODELS = SCRIPTS.parents[1] / "models"


def weights(folder):
    """Everything that the files of one part hold."""
    return {name: tensor.float() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def narrowed(full, own):
    """A tensor of the whole top level in the shape of the living one: `export.widened` backwards."""
    index = [LIVING if full.shape[i] != own.shape[i] else torch.arange(n) for i, n in enumerate(own.shape)]
    return full[torch.meshgrid(*index, indexing="ij")]


def same_latents(folder):
    """The encoder is found anew from drawn pictures, and must be the one that the weights were trained with."""
    pixels = np.stack([render(draw_scene(("adopt", i))) for i in range(8)])
    pictures = torch.from_numpy(encoder.signed(pixels)).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).encode(pictures).latent_dist.mean
    return (theirs - torch.from_numpy(encoder.encode(pixels))).abs().max() < 0.05


def adopt(name, model, tensors):
    """Writes a run of which the running mean is these weights, unless there is one already."""
    path = RUNS / name / "state.pt"
    if path.exists():
        print(f"{name}: {path} is there")
        return
    missing = []
    for key, tensor in model.state_dict().items():
        if key in tensors:
            tensor.copy_(tensors[key])
        elif "heads." not in key:
            missing.append(key)
    if missing:
        sys.exit(f"{name}: the weights lack {missing[:3]} and {len(missing) - 1} more")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, {"mean": [p.detach().clone() for p in model.parameters()], "buffers": {}, "seen": 0, "steps": 0})
    print(f"{name}: taken from the pair")


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@torch.no_grad()
def main():
    pictures, clips = MODELS / "genvideo-tiny-t2i", MODELS / "genvideo-tiny-i2v"
    if not same_latents(pictures / "vae"):
        sys.exit("the encoder found here is not the one of the pair: these runs would learn other latents")
    if not TOKENIZER.exists():
        shutil.copytree(pictures / "tokenizer", TOKENIZER)
    video = weights(clips / "vae")
    decoder = living_decoder()
    full = {n.removeprefix("decoder."): t for n, t in weights(pictures / "vae").items()}
    adopt("vae", decoder, {n: narrowed(full[n], own) for n, own in decoder.state_dict().items()})
    branch = {p.replace(".", "_"): f"decoder.{p}.temporal_res_block." for p in PLACES}
    learnt = {f"branches.{k}.{n.removeprefix(v)}": t for k, v in branch.items() for n, t in video.items() if n.startswith(v)}
    adopt("temporal", TemporalBranches(decoder), learnt)
    adopt("i2v", ImageToVideo(), under("unet.", weights(clips / "unet")))
    adopt("vision", Vision(), under("clip.", weights(clips / "image_encoder")))
    model, text = TextToImage(), weights(pictures / "text_encoder")
    # transformers 5 leaves the prefix out in memory.
    names = model.text.clip.state_dict()
    told = {n: text[n if n in text else f"text_model.{n}"] for n in names}
    adopt("t2i", model, under("unet.", weights(pictures / "unet")) | under("text.clip.", told))


if __name__ == "__main__":
    main()
