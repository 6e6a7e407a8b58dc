#!/usr/bin/env python3
"""How far torch's own half precision is from the float32 goldens, unit by unit.

For each model of tests/fixtures/goldens the networks run in float16 or bfloat16 on the CPU on the stored inputs of
runs/MODEL/units.safetensors; what is written for every stored output is the root mean square of the difference from it
(the largest one is a matter of luck in so few numbers), together with the versions that computed it. Usage: goldens_f16.py f16|bf16 [GOLDENS] > tests/fixtures/goldens/f16.json
Needs torch, diffusers and safetensors.
"""
import json
import sys

import diffusers
import torch
from safetensors.torch import load_file

HALF = {"f16": torch.float16, "bf16": torch.bfloat16}[sys.argv[1]]


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
        added = {"text_embeds": units["in.text_embeds"].to(HALF), "time_ids": units["in.time_ids"].to(HALF)}
    out = unet(
        units["in.sample"].to(HALF),
        units["in.timestep"],
        units["in.encoder_hidden_states"].to(HALF),
        added_cond_kwargs=added,
    ).sample
    errors["out"] = difference(out, units["out"])
    vae = diffusers.AutoencoderKL.from_pretrained(f"{folder}/vae", torch_dtype=HALF)
    moments = vae.encode(units["in.pixels"].to(HALF)).latent_dist.parameters
    errors["vae_moments"] = difference(moments, units["vae_moments"])
    errors["vae_decode"] = difference(vae.decode(units["in.z"].to(HALF)).sample, units["vae_decode"])
    return errors


def video_units(folder, units):
    errors = {}
    unet = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(f"{folder}/unet", torch_dtype=HALF)
    hooks(unet, units, errors)
    out = unet(
        units["in.sample"].to(HALF),
        units["in.timestep"],
        units["in.encoder_hidden_states"].to(HALF),
        units["in.added_time_ids"].to(HALF),
    ).sample
    errors["out"] = difference(out, units["out"])
    vae = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(f"{folder}/vae", torch_dtype=HALF)
    z = units["in.z"].to(HALF)
    errors["vae_decode_3frames"] = difference(vae.decode(z, num_frames=3).sample, units["vae_decode_3frames"])
    errors["vae_decode_1frame"] = difference(vae.decode(z[:1], num_frames=1).sample, units["vae_decode_1frame"])
    return errors


def main():
    goldens = sys.argv[2] if len(sys.argv) > 2 else "tests/fixtures/goldens"
    record = {
        "made_by": "scripts/goldens_f16.py",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "what": f"root mean square difference of {HALF} from the stored float32 output, on the CPU",
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
