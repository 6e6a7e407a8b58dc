"""Trains the text-to-image UNet, and goes on with its text encoder, on the latents of drawn scenes."""

import random

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from captions import caption, no_caption
from dataset import Latents
from draw import draw_scene
from arithmetic import quick
from settings import CELLS, CHANNELS, RUNS, SEED
from text import WIDTH, TextEncoder, labels, naming_loss
from trainer import DEVICE, PAINT, Run, command, half, load_mean, sheet

NAMING = 0.03  # weight of the text encoder's own loss
DROPPED = 0.1  # share of pictures without a caption, for guidance
STEPS, GUIDANCE = 20, 4.0
LOOK_AT = (
    "a cute kitten playing in a garden", "一只可爱的小猫在花园里玩耍", "a red apple on a white background", "红色的苹果",
    "a rocket in the night sky", "雪地里的企鹅", "a blue car in the city", "a panda in the forest", "沙滩上的螃蟹",
    "a robot in space", "天空中的黄色气球", "海里的一条鱼", "a dog on grass", "a purple butterfly in a garden",
    "a birthday cake in a room", "a castle at sunset", "a dinosaur in the desert", "一棵树，白色背景", "a lion in the mountains",
    "a snowman in the snow", "a sailboat in the sea", "向日葵在花园里", "a pink heart on a black background", "太空里的独角兽",
)


class TextToImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = TextEncoder()
        self.unet = quick(
            UNet2DConditionModel(
                sample_size=CELLS,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                block_out_channels=(96, 128, 128),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=WIDTH,
                attention_head_dim=4,
                norm_num_groups=32,
            )
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)


def scheduler():
    # beta_end .02 instead of .012: at 16x16 the last step would still show the picture's mean colour.
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


@torch.no_grad()
def sample(model, texts, seed=0, steps=STEPS, guidance=GUIDANCE):
    """Latents for the texts, by DDIM with guidance."""
    plan, count = scheduler(), len(texts)
    plan.set_timesteps(steps)
    hidden = model.text(model.text.ids([""] * count + list(texts)))
    x = torch.randn(count, CHANNELS, CELLS, CELLS, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    for t in plan.timesteps:
        with half():
            out = model.unet(torch.cat([x, x]), t, hidden).sample
        free, told = out.float().chunk(2)
        x = plan.step(free + guidance * (told - free), t, x).prev_sample
    return x


def train(plan):
    torch.manual_seed(2)
    model = TextToImage()
    run = Run("t2i", model, plan, lr=1.2e-3)
    if not run.resume():
        load_mean("text", model.text)
        model.train()
        run.mean = [p.detach().clone() for p in run.parameters]
        run.log(f"UNet: {sum(p.numel() for p in model.unet.parameters()) / 1e6:.2f} M parameters")
    kept = scheduler().alphas_cumprod.to(DEVICE)
    if PAINT:
        from painter import Painter

        painter = Painter(captions=True)
    else:
        data = Latents("scenes")

    def look():
        if (RUNS / "vae" / "state.pt").exists():
            from vae import trained_decoder

            sheet(trained_decoder()(sample(model, LOOK_AT)), 6, run.folder / "sheet.png")

    def drawn():
        """Latents, ids of captions, which of them say something, and what."""
        if PAINT:
            scenes, ids, told = painter.captioned(plan.batch, DROPPED)
            return painter.encode(painter.pictures(scenes)), ids, told, scenes.labels()
        r = random.Random(SEED * 11 + run.steps)
        numbers = [r.randrange(len(data)) for _ in range(plan.batch)]
        scenes = [draw_scene((i,)) for i in numbers]
        told = torch.tensor([r.random() >= DROPPED for _ in scenes])
        ids = model.text.ids([caption(s, r) if t else no_caption(r) for s, t in zip(scenes, told)])
        return data.take(numbers), ids, told, labels(scenes)

    def compute():
        z, ids, told, targets = drawn()
        z = z.contiguous(memory_format=torch.channels_last)
        place = torch.arange(plan.batch, device=DEVICE) + torch.rand(plan.batch, device=DEVICE)
        t = (place * (1000 / plan.batch)).long().clamp(max=999)  # evenly over all times
        signal, noise_level = (v.sqrt().view(-1, 1, 1, 1) for v in (kept[t], 1 - kept[t]))
        noise = torch.randn_like(z)
        hidden = model.text(ids)
        with half():
            out = model.unet(signal * z + noise_level * noise, t, hidden).sample
        picture = F.mse_loss(out.float(), signal * noise - noise_level * z)
        naming = naming_loss(model.text.guesses(hidden, ids), targets, told)
        return {"loss": picture + NAMING * naming, "picture": picture, "naming": naming}

    run.follow(compute, look)


if __name__ == "__main__":
    command(train, __doc__, samples=600_000, batch=64, gpu_batch=256)
