"""Writes the pair in the ordinary diffusers layout, f16, from whatever the runs hold; says how big it is."""

import json
import shutil

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from safetensors.torch import load_file, save_file

import encoder
from draw import draw_scene, render
from i2v import ImageToVideo
from i2v import scheduler as video_scheduler
from settings import CHANNELS, OUT, RUNS, TOKENIZER
from t2i import TextToImage
from t2i import scheduler as picture_scheduler
from temporal import PLACES, TemporalBranches
from trainer import load_mean
from vae import ANCHOR, LIVE, WIDTHS, living_decoder, options
from vision import DEVIATION, MEAN, PIXELS, Vision

CONSTANT = 192.0  # beside a latent in the encoder's last norm; far above it, so that its gain hardly moves
LIVING = torch.arange(LIVE) * 3  # the places of living channels among all at the top level


def zero(*layers):
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()


def write_encoder(vae):
    """The patch components as the encoder's convolutions; its residual branches and attention do nothing."""
    e, w = vae.encoder, {name: torch.from_numpy(value) for name, value in encoder.load().items()}
    for block in (*(b.resnets[0] for b in e.down_blocks), *e.mid_block.resnets):
        zero(block.conv1, block.conv2)
    attention = e.mid_block.attentions[0]
    zero(attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    down = [b.downsamplers[0].conv for b in e.down_blocks[:3]]
    shortcuts = [b.resnets[0].conv_shortcut for b in e.down_blocks[1:]]
    zero(e.conv_in, *down, *shortcuts)
    e.conv_in.weight[:3, :3, 1, 1] = torch.eye(3)
    for place in range(4):  # of a 2x2 block, row by row
        row, column = divmod(place, 2)
        down[0].weight[place * 3 : place * 3 + 3, :3, row, column] = torch.eye(3)
        down[1].weight[: encoder.INNER, :12, row, column] = w["inner"][:, place * 12 : place * 12 + 12]
        part = slice(place * encoder.INNER, (place + 1) * encoder.INNER)
        down[2].weight[:CHANNELS, : encoder.INNER, row, column] = w["outer"][:, part]
    down[2].bias[:CHANNELS] = w["bias"]
    shortcuts[0].weight[:12, :12, 0, 0] = torch.eye(12)
    shortcuts[1].weight[: encoder.INNER, : encoder.INNER, 0, 0] = torch.eye(encoder.INNER)
    # SiLU(z) - SiLU(-z) = z: every latent becomes (z, -z, constant), a group of the last norm.
    plus = torch.arange(CHANNELS) * 3
    shortcuts[2].weight[plus, :CHANNELS, 0, 0] = torch.eye(CHANNELS)
    shortcuts[2].weight[plus + 1, :CHANNELS, 0, 0] = -torch.eye(CHANNELS)
    shortcuts[2].bias[plus + 2] = CONSTANT
    zero(e.conv_norm_out, e.conv_out)
    drawn = encoder.encode(np.stack([render(draw_scene(("encoder", i))) for i in range(256)]))
    power = w["deviation"] ** 2 + torch.from_numpy(drawn).mean((0, 2, 3)) ** 2
    spread = (2 / 3 * power + 2 / 9 * CONSTANT**2).sqrt()
    for k in range(CHANNELS):
        gain, offset = exact_in_f16(spread[k])
        for place, sign in ((3 * k, 1), (3 * k + 1, -1)):
            e.conv_norm_out.weight[place], e.conv_norm_out.bias[place] = gain, offset
            e.conv_out.weight[k, place, 1, 1] = sign * spread[k] / gain
    e.conv_out.bias[CHANNELS:] = -6.0  # a log-variance next to nothing
    vae.quant_conv.weight.copy_(torch.eye(2 * CHANNELS)[:, :, None, None])
    vae.quant_conv.bias.zero_()


def exact_in_f16(spread):
    """A gain near `spread`, and the offset that takes the constant's share away, which f16 holds with little error."""
    gains = (spread * torch.linspace(0.99, 1.01, 101)).half().float()
    offsets = gains * (CONSTANT / 3 / spread)
    best = (offsets - offsets.half().float()).abs().argmin()
    return gains[best], offsets[best].half().float()


def widened(own, full):
    """A tensor of the living top level in the shape of the whole one, zeros elsewhere."""
    out = torch.zeros(full)
    grown = [i for i in range(own.dim()) if own.shape[i] != full[i]]
    index = [LIVING if i in grown else torch.arange(n) for i, n in enumerate(own.shape)]
    out[torch.meshgrid(*index, indexing="ij")] = own
    return out


def write_decoder(vae, decoder):
    """The living decoder, its top level in threes with the anchors that its norms count with."""
    d, living = vae.decoder, decoder.state_dict()
    zero(d.mid_block.resnets[1].conv1, d.mid_block.resnets[1].conv2)
    attention = d.mid_block.attentions[0]
    zero(attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    full = d.state_dict()
    for name, value in living.items():
        full[name].copy_(widened(value, full[name].shape))
    shortcut = d.up_blocks[3].resnets[0].conv_shortcut
    zero(shortcut)
    shortcut.weight[LIVING, torch.arange(LIVE)] = 1
    shortcut.bias[LIVING + 1], shortcut.bias[LIVING + 2] = ANCHOR, -ANCHOR
    vae.post_quant_conv.weight.copy_(torch.eye(CHANNELS)[:, :, None, None])
    vae.post_quant_conv.bias.zero_()


def temporal_vae(vae, branches):
    """The same VAE with temporal layers: learnt ones where there are branches, identities elsewhere."""
    out = AutoencoderKLTemporalDecoder(
        in_channels=3,
        out_channels=3,
        down_block_types=vae.config.down_block_types,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        sample_size=vae.config.sample_size,
        scaling_factor=1.0,
        force_upcast=False,
    )
    own, full = vae.state_dict(), out.state_dict()
    for name, tensor in full.items():
        plain = name.replace(".spatial_res_block.", ".")
        if plain in own:
            tensor.copy_(own[plain])
        elif ".temporal_res_block.conv2." in name or name.endswith("mix_factor"):
            tensor.zero_()
    full["decoder.time_conv_out.weight"].zero_()[:, :, 1, 0, 0] = torch.eye(3)
    full["decoder.time_conv_out.bias"].zero_()
    for place in PLACES if branches else ():
        for name, value in branches.branches[place.replace(".", "_")].state_dict().items():
            full[f"decoder.{place}.temporal_res_block.{name}"].copy_(value)
    return out


@torch.no_grad()
def build_vaes():
    vae, decoder = AutoencoderKL(**options()).eval(), living_decoder()
    load_mean("vae", decoder)
    write_encoder(vae)
    write_decoder(vae, decoder)
    branches = None
    if (RUNS / "temporal" / "state.pt").exists():
        branches = TemporalBranches(decoder)
        load_mean("temporal", branches)
    video = temporal_vae(vae, branches).eval()
    return vae, video, decoder, branches


def halve(folder):
    """Rewrites a part's weights in f16, its configuration without what only says where it came from; its size."""
    count = 0
    for path in folder.glob("*.safetensors"):
        tensors = {k: v.half().contiguous() for k, v in load_file(path).items() if v.is_floating_point()}
        if folder.name == "text_encoder":  # transformers 5 leaves the usual prefix out in memory
            tensors = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})
        count += sum(v.numel() for v in tensors.values())
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("_name_or_path", "dtype")}
    path.write_text(json.dumps(config, indent=2) + "\n")
    return count


def write_index(folder, pipeline, **parts):
    index = {"_class_name": pipeline, "_diffusers_version": "0.30.0"}
    (folder / "model_index.json").write_text(json.dumps(index | parts, indent=2) + "\n")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    vae, video, _, _ = build_vaes()
    pictures, clips = OUT / "genvideo-tiny-t2i", OUT / "genvideo-tiny-i2v"
    seen = {}
    if (RUNS / "t2i" / "state.pt").exists():
        model = TextToImage()
        seen["t2i"] = load_mean("t2i", model)
        vae.save_pretrained(pictures / "vae")
        model.unet.save_pretrained(pictures / "unet")
        model.text.clip.save_pretrained(pictures / "text_encoder")
        picture_scheduler().save_pretrained(pictures / "scheduler")
        shutil.copytree(TOKENIZER, pictures / "tokenizer")
        write_index(
            pictures,
            "StableDiffusionPipeline",
            feature_extractor=[None, None],
            image_encoder=[None, None],
            requires_safety_checker=False,
            safety_checker=[None, None],
            scheduler=["diffusers", "DDIMScheduler"],
            text_encoder=["transformers", "CLIPTextModel"],
            tokenizer=["transformers", "CLIPTokenizer"],
            unet=["diffusers", "UNet2DConditionModel"],
            vae=["diffusers", "AutoencoderKL"],
        )
    if (RUNS / "i2v" / "state.pt").exists():
        model, vision = ImageToVideo(), Vision()
        seen["i2v"] = load_mean("i2v", model)
        load_mean("vision", vision)
        video.save_pretrained(clips / "vae")
        model.unet.save_pretrained(clips / "unet")
        vision.clip.save_pretrained(clips / "image_encoder")
        video_scheduler().save_pretrained(clips / "scheduler")
        (clips / "feature_extractor").mkdir()
        processor = {
            "crop_size": {"height": PIXELS, "width": PIXELS},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": DEVIATION,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": PIXELS},
        }
        (clips / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        write_index(
            clips,
            "StableVideoDiffusionPipeline",
            feature_extractor=["transformers", "CLIPImageProcessor"],
            image_encoder=["transformers", "CLIPVisionModelWithProjection"],
            scheduler=["diffusers", "EulerDiscreteScheduler"],
            unet=["diffusers", "UNetSpatioTemporalConditionModel"],
            vae=["diffusers", "AutoencoderKLTemporalDecoder"],
        )
    sizes = {f"{p.parent.name}/{p.name}": halve(p) for m in (pictures, clips) for p in sorted(m.glob("*")) if (p / "config.json").exists()}
    for part, count in sizes.items():
        print(f"{part}: {count / 1e6:.2f} M parameters, {count * 2 / 1e6:.1f} MB")
    print(f"together {sum(sizes.values()) * 2 / 1e6:.1f} MB; samples seen {seen}; in {OUT}")


if __name__ == "__main__":
    main()
