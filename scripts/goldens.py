"""Golden numbers of our own: what diffusers, peft and transformers give for the tiny models of tests/fixtures/goldens.

    python scripts/goldens.py own [DIR]     LoRAs, weighted and long prompts, a batch, tiles, torch's noise
                                            (default: tests/fixtures/goldens_own)
    python scripts/goldens.py other DIR     the four models of other dimensions and at other sizes, in the layout of
                                            tests/fixtures/goldens, for GENVIDEO_GOLDENS

Written with Python 3.11, torch 2.15.0, diffusers 0.42.1, transformers 5.24.0, peft 0.21.2, safetensors 0.8.0,
numpy 2.4.6 and pillow 13.0.0, on a CPU. Everything is seeded: a second run writes the same numbers.

Layout and tolerances are those of tests/fixtures/goldens/README.md. Every run is made in f32, again with weights and
activations in f64, and again with the start noise multiplied by 1 + 1e-6 times normal noise:

    tol = max(10 max|f32 - f64|, 10 max|f32 - perturbed|, 1e-4 max|f32|)    tensors at the end of a run
    tol = max(20 max|f32 - f64|, 1e-5 max|f32|)                             embeddings, weights, single calls

Prompt weights and long prompts are no business of diffusers. Their rule is A1111's, written here from its definition:
a round bracket multiplies the weight of what is in it by 1.1 or by its own number, a square one divides by 1.1;
`\\(` is a bracket; BREAK begins a new chunk; tokens go into chunks of 75, each with its own begin, end and padding;
each chunk is encoded alone, its tokens are multiplied by their weights, and the whole chunk is scaled so that its mean
is what it was; chunks lie side by side, a shorter prompt is filled up with empty ones; the pooled text is the first
chunk's.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline,
                       StableDiffusionXLPipeline)
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

# One thread: sums are taken in one order, so the numbers come out the same everywhere.
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests/fixtures/goldens"
DDIM = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
            clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1,
            prediction_type="epsilon")
EULER = {key: DDIM[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps",
                                    "timestep_spacing", "steps_offset", "prediction_type")}
SCHEDULERS = {"sd1": (DDIMScheduler, DDIM, 7.5), "xl": (EulerDiscreteScheduler, EULER, 5.0)}
SIZES = {"sd1": (64, 96), "xl": (96, 64)}
NEGATIVE = "blurry, low quality"


# --- models, runs, tolerances

def load(model, dtype, folder=GOLDENS):
    kind = StableDiffusionXLPipeline if model == "xl" else StableDiffusionPipeline
    pipe = kind.from_pretrained(folder / "models" / model, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def parts(pipe):
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def denoise(pipe, model, latents, embeds, steps=3):
    """A run from unit noise; every UNet output and every latents."""
    kind, config, guidance = SCHEDULERS[model]
    pipe.scheduler = kind(**config)
    out, seen = {"init_latents": latents}, []
    handle = pipe.unet.register_forward_hook(lambda _, __, result: seen.append(result[0]))

    def after(_, step, __, values):
        out[f"latents.{step}"] = values["latents"].clone()
        return values

    height, width = latents.shape[-2] * 8, latents.shape[-1] * 8
    final = pipe(**embeds, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
                 latents=latents.clone(), output_type="latent", callback_on_step_end=after)[0]
    handle.remove()
    out |= {f"unet_out.{call}": value for call, value in enumerate(seen)}
    return out | {"final_latents": final, "timesteps": pipe.scheduler.timesteps}


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start(model, seed):
    height, width = SIZES[model]
    return noise(seed, 1, 4, height // 8, width // 8)


END = re.compile(r"(unet_out|latents|final_latents|decoded|frames_raw)")
GIVEN = ("init_latents", "timesteps")


def rounded(value):
    return float(f"{value:.3g}")


def measure(plain, exact, perturbed):
    measured = {}
    for name, value in plain.items():
        if name in GIVEN or not value.is_floating_point():
            continue
        a, b = value.double().flatten(), exact[name].double().flatten()
        entry = {"max_abs": (a - b).abs().max().item(), "ref_max": a.abs().max().item()}
        entry["one_minus_cos"] = 1 - torch.nn.functional.cosine_similarity(a, b, dim=0).item()
        entry["ref_rms"] = a.square().mean().sqrt().item()
        if END.match(name) and perturbed is not None:
            entry["perturb_1e6_max_abs"] = (a - perturbed[name].double().flatten()).abs().max().item()
            entry["tol"] = max(10 * entry["max_abs"], 10 * entry["perturb_1e6_max_abs"], 1e-4 * entry["ref_max"])
        else:
            entry["tol"] = max(20 * entry["max_abs"], 1e-5 * entry["ref_max"])
        measured[name] = {key: rounded(value) for key, value in entry.items()}
    return measured


def three(make, latents):
    """`make(dtype, latents)` in f32, in f64 and perturbed: the first, and what the three say about tolerances."""
    plain = make(torch.float32, latents)
    exact = make(torch.float64, latents.double())
    shaken = latents * (1 + 1e-6 * noise(99, *latents.shape))
    return plain, measure(plain, exact, make(torch.float32, shaken))


def write(folder, model, name, tensors, settings, measured):
    target = folder / "runs" / model
    target.mkdir(parents=True, exist_ok=True)
    keep = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    keep |= {key: value.float() for key, value in keep.items() if value.dtype == torch.float64 and key != "timesteps"}
    if "timesteps" in keep:
        keep["timesteps"] = keep["timesteps"].double()
    save_file(keep, target / f"{name}.safetensors")
    if settings is not None:
        (target / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")
    path = target / "measured.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: measured}, indent=1) + "\n")
    print(f"{model}/{name}: {len(keep)} tensors, worst tolerance over size "
          f"{max(entry['tol'] / max(entry['ref_max'], 1e-30) for entry in measured.values()):.1e}")


def settings_of(model, prompt, negative, **more):
    kind, config, guidance = SCHEDULERS[model]
    height, width = SIZES[model]
    return dict(prompt=prompt, negative_prompt=negative, height=height, width=width, scheduler_class=kind.__name__,
                scheduler_config=config, num_inference_steps=3, guidance_scale=guidance, **more)


# --- LoRA

def lora_numbers(pipe, seed, rank, alpha, targets, conv=None):
    """Matrices for the modules of each part that match: (down, up, alpha), all numbers exact in f16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale):
        return (torch.randn(shape, generator=generator) * scale).half().float()

    numbers = {}
    for part, root in parts(pipe).items():
        for name, module in root.named_modules():
            if not any(name.endswith(target) for target in targets):
                continue
            if isinstance(module, torch.nn.Linear):
                down, up = draw(rank, module.in_features, scale=0.3), draw(module.out_features, rank, scale=0.3)
                numbers[part, name] = (down, up, alpha)
            elif isinstance(module, torch.nn.Conv2d) and conv is not None:
                inner, own = conv
                shape = (inner, module.in_channels, *module.kernel_size)
                down, up = draw(*shape, scale=0.2), draw(module.out_channels, inner, 1, 1, scale=0.3)
                numbers[part, name] = (down, up, own)
    return numbers


def adapt(pipe, adapters):
    """Puts `(name, numbers, scale)` onto the parts of the pipeline with peft; gives back its layers by part and name."""
    for name, numbers, _ in adapters:
        for part, root in parts(pipe).items():
            of_part = {module: value for (own, module), value in numbers.items() if own == part}
            if not of_part:
                continue
            config = LoraConfig(
                r=1, lora_alpha=1, target_modules="|".join(re.escape(module) for module in of_part),
                rank_pattern={module: down.shape[0] for module, (down, _, _) in of_part.items()},
                alpha_pattern={module: alpha for module, (_, _, alpha) in of_part.items()})
            inject_adapter_in_model(config, root, adapter_name=name)
            modules = dict(root.named_modules())
            for module, (down, up, alpha) in of_part.items():
                layer = modules[module]
                assert layer.r[name] == down.shape[0] and layer.lora_alpha[name] == alpha
                layer.lora_A[name].weight.data = down.to(layer.weight.dtype)
                layer.lora_B[name].weight.data = up.to(layer.weight.dtype)
    layers = {}
    for part, root in parts(pipe).items():
        for module, layer in root.named_modules():
            if isinstance(layer, LoraLayer):
                own = [(name, scale) for name, _, scale in adapters if name in layer.lora_A]
                layer.set_adapter([name for name, _ in own])
                for name, scale in own:
                    layer.set_scale(name, scale)
                layers[part, module] = layer
    return layers


def merged(layer):
    delta = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
    return layer.get_base_layer().weight.data + delta.reshape(layer.get_base_layer().weight.shape)


def classic(part, module):
    """Module names as published files have them: transformers 5 dropped one level."""
    return f"text_model.{module}" if part != "unet" and not module.startswith("text_model.") else module


def lora_files(folder, model, name, numbers):
    """The same numbers in the layouts of kohya, diffusers and PEFT."""
    short = {"unet": "lora_unet", "text_encoder": "lora_te1" if model == "xl" else "lora_te",
             "text_encoder_2": "lora_te2"}
    kohya, diffusers, peft, alphas = {}, {}, {}, {}
    for (part, module), (down, up, alpha) in numbers.items():
        known = classic(part, module)
        key = f"{short[part]}_{known.replace('.', '_')}"
        kohya |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        diffusers |= {f"{part}.{known}.lora_A.weight": down, f"{part}.{known}.lora_B.weight": up}
        alphas.setdefault(part, {})[known] = alpha
        if part == "unet":
            peft |= {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
    def half(tensors):
        return {key: value.half() for key, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    header = {f"{part}.alpha_pattern": pattern for part, pattern in alphas.items()}
    save_file(half(kohya), folder / f"{model}-{name}.kohya.safetensors")
    save_file(half(diffusers), folder / f"{model}-{name}.diffusers.safetensors",
              metadata={"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    beside = folder / f"{model}-{name}.peft"
    beside.mkdir(exist_ok=True)
    save_file(half(peft), beside / "adapter_model.safetensors")
    (beside / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "alpha_pattern": alphas["unet"]}, indent=1) + "\n")


def check_loader(model, folder, name, layers):
    """diffusers' own reader takes the kohya file and ends with the same UNet weights."""
    pipe = load(model, torch.float32)
    state, alphas = type(pipe).lora_state_dict(folder / f"{model}-{name}.kohya.safetensors")[:2]
    type(pipe).load_lora_into_unet(state, alphas, pipe.unet, adapter_name="read")
    compared = 0
    for module, layer in pipe.unet.named_modules():
        if isinstance(layer, LoraLayer):
            own = layers["unet", module].get_delta_weight(name)
            assert (layer.get_delta_weight("read") - own / layers["unet", module].scaling[name]
                    * layer.scaling["read"]).abs().max() < 1e-6, module
            alpha = layers["unet", module].lora_alpha[name] / layers["unet", module].r[name]
            assert abs(layer.scaling["read"] - alpha) < 1e-9, module
            compared += 1
    print(f"diffusers reads {compared} modules of {model}-{name} from kohya's layout alike")


LINEAR = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.0.proj", "self_attn.q_proj", "mlp.fc1")
CONVS = ("resnets.0.conv1", "downsamplers.0.conv", "resnets.0.conv_shortcut", "proj_in")


def loras(folder):
    for model in ("sd1", "xl"):
        base = load(model, torch.float32)
        one = lora_numbers(base, 1, rank=4, alpha=2.0, targets=LINEAR + CONVS, conv=(3, 1.5))
        two = lora_numbers(base, 2, rank=2, alpha=5.0, targets=("attn1.to_q", "resnets.0.conv2", "self_attn.v_proj"),
                           conv=(1, 2.0))
        for name, numbers in (("one", one), ("two", two)):
            lora_files(folder / "loras", model, name, numbers)
        adapters = [("one", one, 0.8), ("two", two, -0.5)]
        prompt, dims = "a photograph of an astronaut riding a horse", start(model, 11)
        shown = [key for key in one if key in two] + list(one)[::9] + list(two)[::9]

        def make(dtype, latents):
            pipe = load(model, dtype)
            layers = adapt(pipe, adapters)
            embeds = encode(pipe, prompt, NEGATIVE)
            out = {f"merged.{part}.{classic(part, module)}.weight": merged(layers[part, module])
                   for part, module in shown[:12]}
            return out | embeds | denoise(pipe, model, latents, embeds)

        tensors, measured = three(make, dims)
        write(folder, model, "lora_two", tensors, settings_of(model, prompt, NEGATIVE, loras=[
            {"name": f"{model}-one", "scale": 0.8}, {"name": f"{model}-two", "scale": -0.5}]), measured)
        check_loader(model, folder / "loras", "one", adapt(load(model, torch.float32), adapters))


def encode(pipe, prompt, negative):
    """What diffusers makes of two literal prompts."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        given = pipe.encode_prompt(prompt=prompt, negative_prompt=negative, device="cpu", num_images_per_prompt=1,
                                   do_classifier_free_guidance=True)
    return dict(zip(names, given))


# --- weighted and long prompts

NUMBER = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")


def weigh(text):
    """A1111's syntax: runs of (text, weight), None for a break."""
    letters, weights, open_round, open_square = [], [], [], []

    def scale(start, factor):
        weights[start:] = [weight * factor for weight in weights[start:]]

    place = 0
    while place < len(text):
        letter, number = text[place], NUMBER.match(text, place)
        step = 1
        if letter == "\\" and text[place + 1:place + 2] in tuple("()[]\\"):
            letters.append(text[place + 1])
            weights.append(1.0)
            step = 2
        elif letter == "(":
            open_round.append(len(letters))
        elif letter == "[":
            open_square.append(len(letters))
        elif letter == ":" and number and open_round:
            scale(open_round.pop(), float(number[1]))
            step = len(number[0])
        elif letter == ")" and open_round:
            scale(open_round.pop(), 1.1)
        elif letter == "]" and open_square:
            scale(open_square.pop(), 1 / 1.1)
        else:
            letters.append(letter)
            weights.append(1.0)
        place += step
    for start in open_round:
        scale(start, 1.1)
    for start in open_square:
        scale(start, 1 / 1.1)
    runs, text = [], "".join(letters)
    breaks = {place: match for match in re.finditer(r"\s*\bBREAK\b\s*", text)
              for place in range(match.start(), match.end())}
    for place, letter in enumerate(text):
        if place in breaks:
            if breaks[place].start() == place:
                runs.append(None)
        elif runs and runs[-1] is not None and runs[-1][1] == weights[place]:
            runs[-1][0] += letter
        else:
            runs.append([letter, weights[place]])
    return runs


def chunks(tokenizer, text):
    """Rows of 75 (token, weight)."""
    rows = [[]]
    for run in weigh(text):
        if run is None:
            rows.append([])
            continue
        for token in tokenizer(run[0], add_special_tokens=False)["input_ids"]:
            if len(rows[-1]) == 75:
                rows.append([])
            rows[-1].append((token, run[1]))
    return rows


def encode_chunk(encoder, tokenizer, row, last):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens = [bos, *(token for token, _ in row), eos]
    tokens += [tokenizer.pad_token_id] * (77 - len(tokens))
    weights = [1.0, *(weight for _, weight in row)]
    weights += [1.0] * (77 - len(weights))
    with torch.no_grad():
        out = encoder(torch.tensor([tokens]), output_hidden_states=True)
    states = out.last_hidden_state if last else out.hidden_states[-2]
    weighted = states * torch.tensor(weights, dtype=states.dtype)[None, :, None]
    if any(weight != 1.0 for weight in weights):
        weighted = weighted * (states.mean() / weighted.mean())
    return weighted, out[0]


def encode_weighted(pipe, prompt, negative):
    two = getattr(pipe, "text_encoder_2", None) is not None
    towers = [(pipe.tokenizer, pipe.text_encoder)] + ([(pipe.tokenizer_2, pipe.text_encoder_2)] if two else [])
    rows = {(tower, role): chunks(tokenizer, text) for tower, (tokenizer, _) in enumerate(towers)
            for role, text in (("", prompt), ("negative_", negative))}
    length = max(map(len, rows.values()))
    out, used = {}, {}
    for role in ("", "negative_"):
        sides = []
        for tower, (tokenizer, encoder) in enumerate(towers):
            own = rows[tower, role]
            own = own + [[]] * (length - len(own))
            encoded = [encode_chunk(encoder, tokenizer, row, last=not two) for row in own]
            sides.append(torch.cat([states for states, _ in encoded], 1))
            if tower == 1:
                out[f"{role}pooled_prompt_embeds"] = encoded[0][1]
        out[f"{role}prompt_embeds"] = torch.cat(sides, 2)
        used[f"{role}tokens"] = sum(map(len, rows[0, role]))
    return out, used | {"chunks": length}


LONG = ", ".join(f"{adjective} {noun}" for adjective, noun in zip(
    "old red tall quiet golden broken distant wet narrow bright empty ancient frozen round heavy".split() * 3,
    "house river tower garden bridge window mountain street harbour castle forest road boat market lamp".split() * 3))
PROMPTS = {
    "weighted_one": ("a photo of a (red:1.3) fox in the [snow], (detailed)", NEGATIVE),
    "weighted_nested": (r"(a ((tall) tower:1.2) in [[fog]]:0.9), \(sketch\), (unclosed light", "(blurry:1.4), [text]"),
    "weighted_break": ("a castle on a hill BREAK (night sky:1.25), stars BREAK oil painting", "day, (sun:0.5)"),
    "long_two": (LONG, NEGATIVE),
    "long_negative": ("a quiet garden, (golden light:1.2)", LONG),
}


def prompts(folder):
    for model in ("sd1", "xl"):
        for name, (prompt, negative) in PROMPTS.items():
            said = {}

            def make(dtype, latents):
                pipe = load(model, dtype)
                embeds, used = encode_weighted(pipe, prompt, negative)
                said.update(used)
                return embeds | denoise(pipe, model, latents, embeds)

            tensors, measured = three(make, start(model, 12))
            write(folder, model, name, tensors,
                  settings_of(model, prompt, negative, syntax="a1111", **said), measured)


# --- batch, tiles, noise

def batch(folder):
    """Three pictures of one call with a list of generators, the last one with a seed beyond 32 bits."""
    seeds, prompt = [2**32 + 5, 2**32 + 6, 2**32 + 7], "a lighthouse in a storm"
    for model in ("sd1", "xl"):
        height, width = SIZES[model]
        shape = (1, 4, height // 8, width // 8)
        latents = torch.cat([noise(seed, *shape) for seed in seeds])

        def make(dtype, latents):
            pipe = load(model, dtype)
            with torch.no_grad():
                embeds = encode(pipe, [prompt] * 3, [NEGATIVE] * 3)
                out = denoise(pipe, model, latents, embeds)
                scaled = out["final_latents"] / pipe.vae.config.scaling_factor
                decoded = pipe.vae.decode(scaled.to(pipe.vae.dtype))[0]
            return {key: out[key] for key in ("init_latents", "final_latents", "timesteps")} | {
                "decoded_raw": decoded}

        tensors, measured = three(make, latents)
        pipe = load(model, torch.float32)
        kind, config, guidance = SCHEDULERS[model]
        pipe.scheduler = kind(**config)
        images = pipe(prompt=[prompt] * 3, negative_prompt=[NEGATIVE] * 3, height=height, width=width,
                      num_inference_steps=3, guidance_scale=guidance, output_type="np",
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds])[0]
        tensors["image_u8"] = torch.from_numpy((images * 255).round().astype(np.uint8))
        assert torch.equal(tensors["image_u8"], ((tensors["decoded_raw"].detach() / 2 + 0.5).clamp(0, 1) * 255)
                           .round().to(torch.uint8).permute(0, 2, 3, 1)), "the list of generators draws other noise"
        del tensors["decoded_raw"], measured["decoded_raw"]
        write(folder, model, "batch_three", tensors, settings_of(model, prompt, NEGATIVE, seeds=seeds), measured)


def tiles(folder):
    """Decoding in tiles by diffusers' rule."""
    latents = noise(21, 1, 4, 20, 28)

    def make(dtype, latents):
        vae = AutoencoderKL.from_pretrained(GOLDENS / "models/sd1/vae", dtype=torch.float32).to(dtype)
        with torch.no_grad():
            whole = vae.decode(latents)[0]
            vae.enable_tiling()
            tiled = vae.decode(latents)[0]
        said.update(tile_sample_min_size=vae.tile_sample_min_size, tile_latent_min_size=vae.tile_latent_min_size,
                    tile_overlap_factor=vae.tile_overlap_factor,
                    seam_max_abs=(tiled - whole).abs().max().item(), seam_mean_abs=(tiled - whole).abs().mean().item())
        return {"init_latents": latents, "decoded_tiled": tiled}

    said = {}
    tensors, measured = three(make, latents)
    write(folder, "sd1", "vae_tiles", tensors, said, measured)


def randn(folder):
    """torch's normal numbers: whole blocks of sixteen, tails, successive draws, seeds of all lengths."""
    seeds = [0, 1, 42, 123456789, 2**31, 2**32 - 1, 2**32, 2**64 - 1]
    counts = [16, 17, 31, 32, 100, 625, 1000]
    out = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for place, count in enumerate(counts):
            out[f"{seed}.{place}"] = torch.randn(count, generator=generator)
    out["7.0"] = noise(7, 4 * 64 * 64)
    save_file(out, folder / "noise.safetensors")
    print(f"noise: {len(out)} draws")


def own(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("runs/*/measured.json"):
        path.unlink()
    loras(folder)
    prompts(folder)
    batch(folder)
    tiles(folder)
    randn(folder)


# --- a second set of the same layout

WIDER = {
    "sd1": dict(unet=dict(block_out_channels=[16, 32, 32, 48], attention_head_dim=2, norm_num_groups=8,
                          cross_attention_dim=40, layers_per_block=2),
                vae=dict(block_out_channels=[16, 16, 32, 32], norm_num_groups=8, sample_size=96),
                text_encoder=dict(hidden_size=40, num_attention_heads=5, intermediate_size=56, num_hidden_layers=4)),
    "sd2": dict(unet=dict(block_out_channels=[12, 24, 24, 36], attention_head_dim=[3, 6, 3, 12], norm_num_groups=6,
                          cross_attention_dim=48),
                vae=dict(block_out_channels=[12, 24, 24, 36], norm_num_groups=6),
                text_encoder=dict(hidden_size=48, num_attention_heads=6, intermediate_size=64, num_hidden_layers=3)),
    "xl": dict(unet=dict(block_out_channels=[16, 24, 32], attention_head_dim=[4, 3, 2], cross_attention_dim=56,
                         addition_time_embed_dim=6, projection_class_embeddings_input_dim=36 + 20,
                         transformer_layers_per_block=[1, 2, 1]),
               vae=dict(block_out_channels=[8, 16, 16, 24], norm_num_groups=8),
               text_encoder=dict(hidden_size=24, num_attention_heads=2, intermediate_size=40),
               text_encoder_2=dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, projection_dim=20)),
}
SECOND_RUNS = {"sd1": ["ddim_3_batch2", "ddim_5", "dpmpp_8_karras", "pndm_10", "unipc_6"],
               "sd2": ["ddim_5", "ddim_6_zsnr_rescale", "euler_6"],
               "xl": ["ddim_5", "euler_6", "euler_5_micro", "euler_4_prompt2", "euler_4_noneg_zeros"]}


def half_exact(module):
    """Draws weights of a trained model's spread, all exact in f16."""
    generator = torch.Generator().manual_seed(5)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            spread = value.shape[1:].numel() ** -0.5 if value.dim() > 1 else 0.1
            drawn = torch.randn(value.shape, generator=generator) * spread
            # One-dimensional weights are those of norms, which are near 1.
            near = 1.0 if value.dim() == 1 and name.endswith("weight") else 0.0
            value.copy_((drawn + near).half().float())
    return module


def second_model(model, folder):
    import shutil
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    source, target = GOLDENS / "models" / model, folder / "models" / model
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
             "text_encoder_2": CLIPTextModelWithProjection}
    for part, changes in WIDER[model].items():
        config = json.loads((source / part / "config.json").read_text()) | changes
        if part.startswith("text"):
            module = kinds[part](CLIPTextConfig(**config))
        else:
            module = kinds[part].from_config(config)
        (target / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        half_exact(module)
        state = {key: value for key, value in module.state_dict().items() if not key.endswith("position_ids")}
        if part == "text_encoder" and model != "sd2":
            state = {key if key.startswith("text_model.") else f"text_model.{key}": value
                     for key, value in state.items()}
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file({key: value.half().contiguous() for key, value in state.items()}, target / part / f"{name}.safetensors",
                  metadata={"format": "pt"})


PASSED = ("prompt_2", "negative_prompt_2", "guidance_rescale", "original_size", "crops_coords_top_left", "target_size",
          "negative_original_size", "negative_crops_coords_top_left", "negative_target_size", "num_images_per_prompt")


def second_run(model, folder, name):
    import diffusers
    settings = json.loads((GOLDENS / "runs" / model / f"{name}.json").read_text())
    settings.pop("same_as", None)
    settings |= dict(height=settings["height"] - 16, width=settings["width"] + 32)
    count = settings.get("num_images_per_prompt", 1)
    latents = noise(31, count, 4, settings["height"] // 8, settings["width"] // 8)
    called = {key: tuple(settings[key]) if isinstance(settings.get(key), list) else settings[key]
              for key in PASSED if settings.get(key) is not None}

    def make(dtype, latents):
        pipe = load(model, dtype, folder)
        pipe.scheduler = getattr(diffusers, settings["scheduler_class"])(**settings["scheduler_config"])
        out, seen = {"init_latents": latents}, []
        handle = pipe.unet.register_forward_hook(lambda _, __, result: seen.append(result[0]))

        def after(_, step, __, values):
            out[f"latents.{step}"] = values["latents"].clone()
            return values

        out["final_latents"] = pipe(
            settings["prompt"], negative_prompt=settings.get("negative_prompt"), height=settings["height"],
            width=settings["width"], num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"], latents=latents.clone(), output_type="latent",
            callback_on_step_end=after, **called)[0]
        handle.remove()
        kept = {0, 1, 2, len(seen) - 1}
        out |= {f"unet_out.{call}": value for call, value in enumerate(seen) if call in kept}
        texts = {} if model != "xl" else {key: settings[key] for key in ("prompt_2", "negative_prompt_2")
                                          if settings.get(key) is not None}
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        with torch.no_grad():
            embeds = pipe.encode_prompt(
                prompt=settings["prompt"], negative_prompt=settings.get("negative_prompt"), device="cpu",
                num_images_per_prompt=1, do_classifier_free_guidance=settings["guidance_scale"] > 1, **texts)
            out |= {key: value for key, value in zip(names, embeds) if value is not None}
            scaled = out["final_latents"] / pipe.vae.config.scaling_factor
            out["decoded_raw"] = pipe.vae.decode(scaled.to(dtype))[0]
        return out | {"timesteps": pipe.scheduler.timesteps}

    tensors, measured = three(make, latents)
    write(folder, model, name, tensors, settings, measured)


BLOCK = re.compile(r"(time_embedding|add_embedding|conv_in|mid_block|(down|up)_blocks\.\d)$")


def second_units(model, folder):
    wide = WIDER[model]["unet"]
    given = {"in.sample": noise(41, 2, 4, 10, 8), "in.timestep": torch.tensor(321.0),
             "in.encoder_hidden_states": noise(42, 2, 77, wide["cross_attention_dim"]),
             "in.pixels": noise(43, 1, 3, 32, 56).clamp(-1, 1), "in.z": noise(44, 1, 4, 5, 6)}
    if model == "xl":
        given |= {"in.text_embeds": noise(45, 2, WIDER["xl"]["text_encoder_2"]["projection_dim"]),
                  "in.time_ids": torch.tensor([[512.0, 768, 0, 16, 1024, 640], [256, 300, 1, 2, 500, 700]])}

    def make(dtype, _):
        pipe = load(model, dtype, folder)
        cast = {key: value.to(dtype) for key, value in given.items()}
        out, handles = {}, []

        def keep(name):
            def hook(_, __, result):
                out[name] = (result[0] if isinstance(result, tuple) else result).clone()
            return hook

        for name, module in pipe.unet.named_modules():
            if BLOCK.match(name):
                handles.append(module.register_forward_hook(keep(name)))
        added = {"text_embeds": cast["in.text_embeds"], "time_ids": cast["in.time_ids"]} if model == "xl" else None
        with torch.no_grad():
            out["out"] = pipe.unet(cast["in.sample"], cast["in.timestep"], cast["in.encoder_hidden_states"],
                                   added_cond_kwargs=added)[0]
            out["vae_moments"] = pipe.vae.encode(cast["in.pixels"]).latent_dist.parameters
            out["vae_decode"] = pipe.vae.decode(cast["in.z"])[0]
        return out

    plain = make(torch.float32, None)
    measured = measure(plain, make(torch.float64, None), None)
    given["in.timestep"] = given["in.timestep"].double()
    write(folder, model, "units", plain, None, measured)
    path = folder / "runs" / model / "units.safetensors"
    save_file({key: value.contiguous() for key, value in (plain | given).items()}, path)


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTER = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2":
         "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
         "conv_norm_out": "out.0", "conv_out": "out.2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def compvis_unet(name, layers, has):
    """The one-file name of a UNet tensor."""
    base, _, leaf = name.rpartition(".")
    if base in OUTER:
        return f"{OUTER[base]}.{leaf}"
    kind, *rest = name.split(".")
    if kind == "mid_block":
        where, place, *inner = rest
        block = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}[where, place]
        target = f"middle_block.{block}"
    else:
        level, where, place, *inner = rest
        down = kind == "down_blocks"
        start = int(level) * (layers + 1) + (1 if down else 0)
        side = "input_blocks" if down else "output_blocks"
        if where == "downsamplers":
            return f"{side}.{start + layers}.0.op.{leaf}"
        if where == "upsamplers":
            return f"{side}.{start + layers}.{2 if has(f'{kind}.{level}.attentions.0') else 1}.conv.{leaf}"
        target = f"{side}.{start + int(place)}.{0 if where == 'resnets' else 1}"
    if where == "resnets":
        return f"{target}.{RESNET['.'.join(inner[:-1])]}.{leaf}"
    return ".".join([target, *inner])


def compvis_vae(name, levels):
    """The one-file name of an autoencoder's tensor."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda found:
                  f"up.{levels - 1 - int(found[1])}.block.{found[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        head, inner = name.split("mid.attn_1.")
        base, _, leaf = inner.rpartition(".")
        name = f"{head}mid.attn_1.{ATTENTION[base]}.{leaf}"
    return name


def open_clip(state):
    """The second text encoder as OpenCLIP stores it."""
    out = {"text_projection": state["text_projection.weight"].T, "logit_scale": torch.tensor(4.6)}
    fixed = {"embeddings.token_embedding.weight": "token_embedding.weight",
             "embeddings.position_embedding.weight": "positional_embedding",
             "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
    for name, value in state.items():
        bare = name.removeprefix("text_model.")
        if bare in fixed:
            out[fixed[bare]] = value
        layer = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$", bare)
        if layer and layer[2] in inner:
            out[f"transformer.resblocks.{layer[1]}.{inner[layer[2]]}.{layer[3]}"] = value
        elif layer and layer[2] == "self_attn.q_proj":
            rows = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            out[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(rows)
    return out


def one_file(model, folder):
    """The model as one file in the CompVis layout."""
    from safetensors.torch import load_file
    source = folder / "models" / model
    state = {part.name: load_file(file) for part in source.iterdir() for file in part.glob("*.safetensors")}
    unet, layers = state["unet"], WIDER[model]["unet"].get("layers_per_block", 1 if model == "sd1" else 2)

    def has(prefix):
        return any(name.startswith(prefix) for name in unet)

    out = {f"model.diffusion_model.{compvis_unet(name, layers, has)}": value for name, value in unet.items()}
    for name, value in state["vae"].items():
        square = "attentions" in name and value.dim() == 2
        key = f"first_stage_model.{compvis_vae(name, len(WIDER[model]['vae']['block_out_channels']))}"
        out[key] = value[:, :, None, None] if square else value
    first = "cond_stage_model.transformer." if model == "sd1" else "conditioner.embedders.0.transformer."
    out |= {first + name: value for name, value in state["text_encoder"].items()}
    if model == "xl":
        out |= {f"conditioner.embedders.1.model.{name}": value
                for name, value in open_clip(state["text_encoder_2"]).items()}
    target = folder / "single_file"
    target.mkdir(exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in out.items()}, target / f"{model}.safetensors")
    print(f"single_file/{model}: {len(out)} tensors")


WIDER_VIDEO = dict(
    unet=dict(block_out_channels=[32, 64, 64], num_attention_heads=[4, 2, 8], cross_attention_dim=40,
              addition_time_embed_dim=24, projection_class_embeddings_input_dim=72, num_frames=3),
    vae=dict(block_out_channels=[32, 32, 64, 64]),
    image_encoder=dict(hidden_size=48, num_attention_heads=6, intermediate_size=80, projection_dim=40))


def load_video(dtype, folder):
    from diffusers import StableVideoDiffusionPipeline
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder / "models/svd", dtype=torch.float32,
                                                        local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(dtype)
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x: encode(x.to(dtype))
    return pipe


def video_model(folder):
    import shutil
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    source, target = GOLDENS / "models/svd", folder / "models/svd"
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, changes in WIDER_VIDEO.items():
        config = json.loads((source / part / "config.json").read_text()) | changes
        (target / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if part == "image_encoder":
            module, name = CLIPVisionModelWithProjection(CLIPVisionConfig(**config)), "model"
        else:
            kind = UNetSpatioTemporalConditionModel if part == "unet" else AutoencoderKLTemporalDecoder
            module, name = kind.from_config(config), "diffusion_pytorch_model"
        state = {key: value.half().contiguous() for key, value in half_exact(module).state_dict().items()
                 if not key.endswith("position_ids")}
        save_file(state, target / part / f"{name}.safetensors", metadata={"format": "pt"})


def video_run(folder, name, frames, size, steps, settings):
    """One run with its inputs caught on their way into the networks."""
    from unittest import mock
    from PIL import Image
    module = "diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion.randn_tensor"
    height, width = size
    drawn = noise(51, 1, 3, height, width)
    picture = Image.open(GOLDENS / "runs/svd/svd_input.png")
    chunk = settings["decode_chunk_size"] or frames

    def make(dtype, latents):
        pipe, out, seen, inputs = load_video(dtype, folder), {}, [], []
        pipe.unet.register_forward_hook(lambda _, __, result: seen.append(result[0]))
        pipe.unet.register_forward_pre_hook(
            lambda _, args, named: inputs.append((args[0], named)), with_kwargs=True)
        pipe.image_encoder.register_forward_pre_hook(
            lambda _, args: out.update(clip_pixel_values_ch0=args[0][:, :1].clone()))

        def after(_, step, __, values):
            out[f"latents.{step}"] = values["latents"].clone()
            return values

        with mock.patch(module, lambda shape, **_: drawn.clone().to(dtype)):
            final = pipe(picture, height=height, width=width, num_frames=frames, num_inference_steps=steps,
                         latents=latents.clone(), output_type="latent", callback_on_step_end=after,
                         **settings)[0]
        sample, named = inputs[0]
        out |= {f"unet_out.{call}": value for call, value in enumerate(seen)}
        out |= {"init_latents": latents, "final_latents": final, "added_time_ids": named["added_time_ids"],
                "image_embeddings": named["encoder_hidden_states"], "image_latents": sample[:, 0, 4:]}
        with torch.no_grad():
            decoded = pipe.decode_latents(final, frames, chunk)
        out["frames_raw"] = decoded[0].transpose(0, 1)
        return out

    tensors, measured = three(make, noise(52, 1, frames, 4, height // 8, width // 8))
    said = dict(height=height, width=width, image="svd_input.png", frames=frames, num_inference_steps=steps)
    write(folder, "svd", name, tensors | {"noise.0": drawn}, said | settings, measured)


VIDEO_BLOCK = re.compile(r"(time_embedding|add_embedding|conv_in|mid_block|(down|up)_blocks\.\d|down_blocks\.0\."
                         r"(attentions\.0(\.temporal_transformer_blocks\.0)?"
                         r"|resnets\.0(\.(spatial|temporal)_res_block)?))$")


def video_units(folder):
    given = {"in.sample": noise(61, 1, 3, 8, 4, 9), "in.timestep": torch.tensor(0.7),
             "in.encoder_hidden_states": noise(62, 1, 1, 40), "in.added_time_ids": torch.tensor([[9.0, 60, 0.05]]),
             "in.z": noise(63, 3, 4, 5, 3)}

    def make(dtype, _):
        pipe, out = load_video(dtype, folder), {}

        def keep(name):
            def hook(_, __, result):
                out[name] = (result[0] if isinstance(result, tuple) else result).clone()
            return hook

        for name, module in pipe.unet.named_modules():
            if VIDEO_BLOCK.match(name):
                module.register_forward_hook(keep(name))
        cast = {key: value.to(dtype) for key, value in given.items()}
        with torch.no_grad():
            out["out"] = pipe.unet(cast["in.sample"], cast["in.timestep"], cast["in.encoder_hidden_states"],
                                   cast["in.added_time_ids"])[0]
            out["vae_decode_3frames"] = pipe.vae.decode(cast["in.z"], num_frames=3)[0]
            out["vae_decode_1frame"] = pipe.vae.decode(cast["in.z"][:1], num_frames=1)[0]
        return out

    plain = make(torch.float32, None)
    measured = measure(plain, make(torch.float64, None), None)
    write(folder, "svd", "units", plain, None, measured)
    given["in.timestep"] = given["in.timestep"].double()
    save_file({key: value.contiguous() for key, value in (plain | given).items()},
              folder / "runs/svd/units.safetensors")


def video(folder):
    import shutil
    (folder / "runs/svd").mkdir(parents=True, exist_ok=True)
    (folder / "runs/svd/measured.json").unlink(missing_ok=True)
    shutil.copy(GOLDENS / "runs/svd/svd_input.png", folder / "runs/svd")
    video_model(folder)
    video_units(folder)
    video_run(folder, "default_5", 3, (80, 64), 5, dict(
        fps=7, motion_bucket_id=90, noise_aug_strength=0.02, min_guidance_scale=1.0, max_guidance_scale=2.5,
        decode_chunk_size=None))
    video_run(folder, "nocfg_3", 2, (64, 112), 3, dict(
        fps=6, motion_bucket_id=200, noise_aug_strength=0.0, min_guidance_scale=1.0, max_guidance_scale=1.0,
        decode_chunk_size=1))


def other(folder):
    """All four models; schedules and tokenizers are those of the shipped set."""
    import shutil
    shutil.copytree(GOLDENS / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copy(GOLDENS / "schedules.json", folder)
    for model, runs in SECOND_RUNS.items():
        (folder / "runs" / model / "measured.json").unlink(missing_ok=True)
        second_model(model, folder)
        second_units(model, folder)
        for name in runs:
            second_run(model, folder, name)
        if model != "sd2":
            one_file(model, folder)
    video(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["own"]:
        own(Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "tests/fixtures/goldens_own")
    elif sys.argv[1:2] == ["other"] and len(sys.argv) == 3:
        other(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
