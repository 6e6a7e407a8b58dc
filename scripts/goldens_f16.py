#!/usr/bin/env python3
"""How far torch's own float16 is from the float32 goldens, unit by unit.

For each model of tests/fixtures/goldens the networks run in float16 on the CPU on the stored inputs of
runs/MODEL/units.safetensors; what is written for every stored output is the root mean square of the difference from it
(the largest one is a matter of luck in so few numbers), together with the versions that computed it. Usage: goldens_f16.py [GOLDENS] > tests/fixtures/goldens/f16.json
Needs torch, diffusers and safetensors.
"""
import json
import sys

import diffusers
import torch
from safetensors.torch import load_file

HALF = torch.float16


def hooks(model, units, errors):
    """Notes the error of every module whose name is a stored output."""

    def note(name):
        def hook(_module, _inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            wanted = units[name]
            if output.numel() == wanted.numel():
                errors[name] = difference(output.reshape(wanted.shape), wanted)

        return hook

    for name, module in model.named_modules():
        if name in units:
            module.register_forward_hook(note(name))


def difference(got, wanted):
    return (got.double() - wanted.double()).square().mean().sqrt().item()


def image_units(folder, units):
    errors = {}
    unet = diffusers.UNet2DConditionModel.from_pretrained(f"{folder}/unet", torch_dtype=HALF)
    hooks(unet, units, errors)
    added = {}
    if "in.text_embeds" in units:
        added = {"text_embeds": units["in.text_embeds"].half(), "time_ids": units["in.time_ids"].half()}
    out = unet(
        units["in.sample"].half(),
        units["in.timestep"],
        units["in.encoder_hidden_states"].half(),
        added_cond_kwargs=added,
    ).sample
    errors["out"] = difference(out, units["out"])
    vae = diffusers.AutoencoderKL.from_pretrained(f"{folder}/vae", torch_dtype=HALF)
    moments = vae.encode(units["in.pixels"].half()).latent_dist.parameters
    errors["vae_moments"] = difference(moments, units["vae_moments"])
    errors["vae_decode"] = difference(vae.decode(units["in.z"].half()).sample, units["vae_decode"])
    return errors


def video_units(folder, units):
    errors = {}
    unet = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(f"{folder}/unet", torch_dtype=HALF)
    hooks(unet, units, errors)
    out = unet(
        units["in.sample"].half(),
        units["in.timestep"],
        units["in.encoder_hidden_states"].half(),
        units["in.added_time_ids"].half(),
    ).sample
    errors["out"] = difference(out, units["out"])
    vae = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(f"{folder}/vae", torch_dtype=HALF)
    z = units["in.z"].half()
    errors["vae_decode_3frames"] = difference(vae.decode(z, num_frames=3).sample, units["vae_decode_3frames"])
    errors["vae_decode_1frame"] = difference(vae.decode(z[:1], num_frames=1).sample, units["vae_decode_1frame"])
    return errors


def main():
    goldens = sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/goldens"
    record = {
        "made_by": "scripts/goldens_f16.py",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "what": "root mean square difference of torch's float16 from the stored float32 output, on the CPU",
        "units": {},
    }
    with torch.no_grad():
        for model in ["sd1", "sd2", "xl", "svd"]:
            units = load_file(f"{goldens}/runs/{model}/units.safetensors")
            measure = video_units if model == "svd" else image_units
            errors = measure(f"{goldens}/models/{model}", units)
            record["units"][model] = {name: float(f"{errors[name]:.3e}") for name in sorted(errors)}
    json.dump(record, sys.stdout, indent=1)
    print()


main()
