#!/usr/bin/env python3
"""Writes a model of published size with random weights in float16, to measure memory and time with.

    full_size.py sd15|sdxl|svd-xt FOLDER

The configs are those of Stable Diffusion 1.5, SDXL base and SVD-XT; names and shapes come from diffusers and
transformers, which build the networks without memory. Tensors are written one after the other, so that this needs
little memory itself; the tokenizer is that of the goldens. Needs torch, diffusers, transformers and numpy.
"""
import json
import math
import pathlib
import shutil
import struct
import sys

import diffusers
import numpy
import torch
import transformers

GOLDENS = pathlib.Path(__file__).parent.parent / "tests/fixtures/goldens/models"
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SCHEDULER = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, steps_offset=1,
    clip_sample=False, set_alpha_to_one=False, prediction_type="epsilon",
)


def unet(**config):
    config = dict(in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32, **config)
    return diffusers.UNet2DConditionModel, config


def vae(sample_size, scaling_factor, force_upcast):
    return diffusers.AutoencoderKL, dict(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[128, 256, 512, 512], layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=32,
        sample_size=sample_size, scaling_factor=scaling_factor, force_upcast=force_upcast,
    )


def text(cls, hidden, layers, heads, act, projection):
    return cls, dict(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        hidden_act=act, projection_dim=projection, vocab_size=49408, max_position_embeddings=77,
    )


MODELS = {
    "sd15": (
        "StableDiffusionPipeline",
        {
            "unet": unet(
                sample_size=64, block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768,
                attention_head_dim=8, down_block_types=[CROSS_DOWN] * 3 + ["DownBlock2D"],
                up_block_types=["UpBlock2D"] + [CROSS_UP] * 3,
            ),
            "vae": vae(512, 0.18215, False),
            "text_encoder": text(transformers.CLIPTextModel, 768, 12, 12, "quick_gelu", 768),
        },
        ("PNDMScheduler", dict(SCHEDULER, skip_prk_steps=True)),
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "unet": unet(
                sample_size=128, block_out_channels=[320, 640, 1280], cross_attention_dim=2048,
                attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10],
                down_block_types=["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
                up_block_types=[CROSS_UP, CROSS_UP, "UpBlock2D"], use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "vae": vae(1024, 0.13025, True),
            "text_encoder": text(transformers.CLIPTextModel, 768, 12, 12, "quick_gelu", 768),
            "text_encoder_2": text(transformers.CLIPTextModelWithProjection, 1280, 32, 20, "gelu", 1280),
        },
        ("EulerDiscreteScheduler", dict(SCHEDULER, timestep_spacing="leading")),
    ),
    "svd-xt": (
        "StableVideoDiffusionPipeline",
        {
            "unet": (
                diffusers.UNetSpatioTemporalConditionModel,
                dict(sample_size=96, num_attention_heads=[5, 10, 20, 20], num_frames=25),
            ),
            "vae": (
                diffusers.AutoencoderKLTemporalDecoder,
                dict(
                    block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=768,
                    down_block_types=["DownEncoderBlock2D"] * 4, force_upcast=True,
                ),
            ),
            "image_encoder": (
                transformers.CLIPVisionModelWithProjection,
                dict(
                    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                    patch_size=14, image_size=224, projection_dim=1024, hidden_act="gelu",
                ),
            ),
        },
        None,
    ),
}


def build(cls, config):
    """The network without memory, and its config as a folder holds it."""
    with torch.device("meta"):
        if issubclass(cls, transformers.PreTrainedModel):
            config = cls.config_class(**config)
            return cls(config), dict(config.to_dict(), architectures=[cls.__name__])
        model = cls(**config)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return model, dict(config, _class_name=cls.__name__)


def write(path, shapes):
    """A safetensors file of random float16 numbers, written piece by piece."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = numpy.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            # Norms near one, the rest small enough for signals to keep their size.
            fan = math.prod(shape[1:]) if len(shape) > 1 else 1
            scale = 1 / math.sqrt(max(fan, 1)) if len(shape) > 1 else 0.02
            offset = 1.0 if len(shape) == 1 and "norm" in name and name.endswith("weight") else 0.0
            left = math.prod(shape)
            while left > 0:
                count = min(left, 1 << 22)
                numbers = random.standard_normal(count, dtype=numpy.float32) * scale + offset
                file.write(numbers.astype(numpy.float16).tobytes())
                left -= count


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS:
        sys.exit(__doc__)
    kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    pipeline, parts, scheduler = MODELS[kind]
    index = {"_class_name": pipeline}
    for part, (cls, config) in parts.items():
        model, config = build(cls, config)
        place = folder / part
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(config, default=str))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        of_transformers = isinstance(model, transformers.PreTrainedModel)
        name = "model" if of_transformers else "diffusion_pytorch_model"
        write(place / f"{name}.safetensors", shapes)
        numbers = sum(math.prod(shape) for shape in shapes.values())
        print(f"{kind} {part}: {len(shapes)} tensors, {numbers} parameters")
        index[part] = ["transformers" if of_transformers else "diffusers", cls.__name__]
    if scheduler is None:
        shutil.copytree(GOLDENS / "svd/scheduler", folder / "scheduler", dirs_exist_ok=True)
        shutil.copytree(GOLDENS / "svd/feature_extractor", folder / "feature_extractor", dirs_exist_ok=True)
    else:
        (folder / "scheduler").mkdir(exist_ok=True)
        config = dict(scheduler[1], _class_name=scheduler[0])
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    for part in [part for part in parts if part.startswith("text_encoder")]:
        tokenizer = part.replace("text_encoder", "tokenizer")
        source = GOLDENS / ("sd1" if kind == "sd15" else "xl") / tokenizer
        shutil.copytree(source, folder / tokenizer, dirs_exist_ok=True)
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))


main()
