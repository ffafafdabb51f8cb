"""The offline world: drawn faces with known defects, a small diffusion model of them, and a judge that is not the reward.

A face is 32 x 32 in colour. What varies is chosen so that no linear subspace holds the clean faces: scale (+-20 %),
position, rotation (+-20 degrees), colours of skin, hair and background, hair shape, glasses, light from one side, clutter.
Five defects change the inside of the face; `severity` in (0, 1] says how far. A second class, houses, stands for everything
that a refinement for faces must leave alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from facescore.reward.model import RewardModel, RewardModelConfig
from tenfold_shared.hub import replace_atomically

SIZE = 32
"""Pixels of a side."""
DEFECTS = ("clean", "eye missing", "mouth missing", "eye shifted", "mouth tilted", "third eye")

Array = np.ndarray


@dataclass
class Faces:
    """What n faces look like, defects apart: every field is (n,) or (n, k)."""

    center: Array
    """(n, 2) pixels, x and y."""
    scale: Array
    """Half the height of the head in pixels."""
    aspect: Array
    angle: Array
    """Radians, clockwise."""
    skin: Array
    hair: Array
    background: Array
    clutter: Array
    """(n, 2, 7): centre, radii and colour of two blobs behind the head."""
    hair_shape: Array
    """0 bald, 1 short, 2 long."""
    hairline: Array
    glasses: Array
    """0 or 1."""
    light: Array
    """(n, 2): the gradient of the light over the picture."""
    eye: Array
    lips: Array
    side: Array
    """-1 or 1: which eye, or which way, a defect takes."""

    def __len__(self) -> int:
        return len(self.scale)

    def boxes(self) -> Array:
        """(n, 4) boxes of the heads in pixels, x1 y1 x2 y2, clamped to the picture."""
        across, along = self.scale * self.aspect, self.scale
        c, s = np.cos(self.angle), np.sin(self.angle)
        half = np.stack([np.hypot(across * c, along * s), np.hypot(across * s, along * c)], axis=1)
        return np.concatenate([self.center - half, self.center + half], axis=1).clip(0, SIZE)


def sample_faces(n: int, *, seed: int) -> Faces:
    """n random faces."""
    rng = np.random.default_rng([seed, 1])
    tone = rng.uniform(0.35, 1.0, (n, 1))
    return Faces(
        center=rng.uniform(14.5, 17.5, (n, 2)),
        scale=rng.uniform(9.0, 13.2, n),
        aspect=rng.uniform(0.72, 0.86, n),
        angle=np.radians(rng.uniform(-20, 20, n)),
        skin=np.clip(tone * [0.96, 0.78, 0.66] + rng.normal(0, 0.03, (n, 3)), 0.1, 1),
        hair=np.clip(rng.uniform(0.05, 0.75, (n, 1)) * [1.0, 0.8, 0.5] + rng.normal(0, 0.04, (n, 3)), 0, 1),
        background=rng.uniform(0.1, 0.95, (n, 3)),
        clutter=np.concatenate(
            [rng.uniform(0, SIZE, (n, 2, 2)), rng.uniform(3, 9, (n, 2, 2)), rng.uniform(0.1, 0.95, (n, 2, 3))], axis=2
        ),
        hair_shape=rng.integers(0, 3, n),
        hairline=rng.uniform(-0.72, -0.5, n),
        glasses=(rng.random(n) < 0.25).astype(float),
        light=rng.uniform(-0.25, 0.25, (n, 2)),
        eye=rng.uniform(0.0, 0.3, (n, 3)),
        lips=np.clip(np.array([0.75, 0.2, 0.25]) + rng.normal(0, 0.08, (n, 3)), 0, 1) * (0.5 + 0.5 * tone),
        side=rng.choice([-1.0, 1.0], n),
    )


def draw_faces(faces: Faces, defect: Array | int = 0, severity: Array | float = 1.0) -> Array:
    """(n, 3, 32, 32) pictures in [0, 1].

    defect: (n,) index into `DEFECTS`. severity: (n,) in (0, 1]; a missing part fades, a moved part moves by so much.
    """
    n = len(faces)
    defect = np.broadcast_to(np.asarray(defect), n)
    severity = np.broadcast_to(np.asarray(severity, dtype=float), n)
    amount = [np.where(defect == i, severity, 0.0)[:, None, None] for i in range(len(DEFECTS))]
    ys, xs = np.mgrid[:SIZE, :SIZE] + 0.5
    pixel = faces.scale[:, None, None]
    dx, dy = xs - faces.center[:, 0, None, None], ys - faces.center[:, 1, None, None]
    c, s = np.cos(faces.angle)[:, None, None], np.sin(faces.angle)[:, None, None]
    u, v = (c * dx + s * dy) / pixel, (c * dy - s * dx) / pixel
    aspect, side = faces.aspect[:, None, None], faces.side[:, None, None]

    canvas = np.broadcast_to(faces.background[:, :, None, None], (n, 3, SIZE, SIZE)).astype(np.float32)

    def paint(coverage: Array, colour: Array) -> None:
        canvas[:] += coverage.astype(np.float32)[:, None] * (colour.astype(np.float32)[:, :, None, None] - canvas)

    for i in range(2):
        blob = faces.clutter[:, i]
        paint(
            _ellipse(xs - blob[:, 0, None, None], ys - blob[:, 1, None, None], blob[:, 2], blob[:, 3], 1.0), blob[:, 4:]
        )
    shape = faces.hair_shape[:, None, None]
    paint(_ellipse(u, v + 0.22, faces.aspect * 1.2, 0.95, pixel) * (shape > 0), faces.hair)
    paint(_box(u, v - 0.25, faces.aspect * 1.12, 0.75, pixel) * (shape == 2), faces.hair)
    head = _ellipse(u, v, faces.aspect, 1.0, pixel)
    paint(head, faces.skin)
    paint(
        head * np.clip((faces.hairline[:, None, None] - v) * pixel + 0.5, 0, 1) * (shape > 0),
        faces.hair,
    )
    white = np.clip(faces.skin + 0.3, 0, 1)
    for which in (-1.0, 1.0):
        own = side == which
        gone = np.where(own, amount[1], 0.0)
        down = np.where(own, 0.36 * amount[3], 0.0)
        x, y = u - which * 0.44 * aspect, v + 0.16 - down
        paint(_ellipse(x, y, 0.2, 0.13, pixel) * (1 - gone), white)
        paint(_ellipse(x, y, 0.11, 0.12, pixel) * (1 - gone), faces.eye)
        ring = _ellipse(x, v + 0.16, 0.33, 0.29, pixel) - _ellipse(x, v + 0.16, 0.23, 0.19, pixel)
        paint(0.8 * ring.clip(0, 1) * faces.glasses[:, None, None], faces.eye)
    third = amount[5] > 0
    grow = np.where(third, 0.5 + 0.5 * amount[5], 1.0)
    x, y = u / grow, (v + 0.52) / grow
    paint(_ellipse(x, y, 0.2, 0.13, pixel) * amount[5].clip(0, 1), white)
    paint(_ellipse(x, y, 0.11, 0.12, pixel) * amount[5].clip(0, 1), faces.eye)
    paint(0.5 * _ellipse(u, v - 0.12, 0.07, 0.17, pixel), faces.skin * 0.6)
    turn = side * np.radians(50) * amount[4]
    x, y = u, v - 0.52
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    paint(_ellipse(x, y, 0.36, 0.11, pixel) * (1 - amount[2]), faces.lips)
    ramp = (
        1
        + faces.light[:, 0, None, None] * (xs / SIZE - 0.5) * 2
        + faces.light[:, 1, None, None] * (ys / SIZE - 0.5) * 2
    )
    return np.clip(canvas * ramp[:, None], 0, 1).astype(np.float32)


def draw_houses(n: int, *, seed: int) -> Array:
    """(n, 3, 32, 32) pictures of houses in [0, 1]."""
    rng = np.random.default_rng([seed, 2])
    ys, xs = (np.mgrid[:SIZE, :SIZE] + 0.5)[:, None]
    canvas = np.broadcast_to(rng.uniform(0.3, 0.95, (n, 3, 1, 1)), (n, 3, SIZE, SIZE)).astype(np.float32)

    def paint(coverage: Array, colour: Array) -> None:
        canvas[:] += coverage.astype(np.float32)[:, None] * (colour.astype(np.float32)[:, :, None, None] - canvas)

    def column(low: float, high: float) -> Array:
        return rng.uniform(low, high, (n, 1, 1))

    x, wide, eaves, base = xs - column(13, 19), column(7, 11), column(11, 15), column(25, 29)
    paint(np.clip(ys - base + 0.5, 0, 1), rng.uniform(0.1, 0.6, (n, 3)))
    wall = np.clip(wide - np.abs(x) + 0.5, 0, 1) * np.clip(ys - eaves + 0.5, 0, 1) * np.clip(base - ys + 0.5, 0, 1)
    paint(wall, rng.uniform(0.3, 0.95, (n, 3)))
    height = column(6, 10)
    roof = np.clip((1 - (eaves - ys) / height) * (wide + 2) - np.abs(x) + 0.5, 0, 1) * np.clip(eaves - ys + 0.5, 0, 1)
    paint(roof, rng.uniform(0.05, 0.6, (n, 3)))
    door, dark = column(-3, 3), rng.uniform(0, 0.3, (n, 3))
    paint(np.clip(2.5 - np.abs(x - door), 0, 1) * np.clip(ys - base + 7.5, 0, 1) * np.clip(base - ys + 0.5, 0, 1), dark)
    return np.clip(canvas, 0, 1).astype(np.float32)


def _ellipse(x: Array, y: Array, across: Array | float, along: Array | float, pixel: Array | float) -> Array:
    """Coverage in [0, 1] of an ellipse with an edge one pixel soft; radii in units of `pixel`."""
    across, along = (np.asarray(r, dtype=float).reshape(-1, 1, 1) for r in (across, along))
    return np.clip((1 - np.hypot(x / across, y / along)) * np.minimum(across, along) * pixel + 0.5, 0, 1)


def _box(x: Array, y: Array, across: Array | float, along: Array | float, pixel: Array | float) -> Array:
    across, along = (np.asarray(r, dtype=float).reshape(-1, 1, 1) for r in (across, along))
    inside = np.minimum(across - np.abs(x), along - np.abs(y))
    return np.clip(inside * pixel + 0.5, 0, 1)


PROMPTS = ("a face", "a house")


class DrawnFacePipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Text to image and inpainting in the drawn world, with the calling convention of diffusers' own pipelines.

    There is no VAE: the latents are the pixels in [-1, 1], 2 x 2 blocks folded into channels, (n, 12, 16, 16). A prompt is
    one token, one-hot over `PROMPTS`.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """(n, 1, 16): one token per prompt; a prompt of neither kind counts as a face."""
        index = torch.tensor([1 if "house" in p.lower() else 0 for p in prompts])
        return F.one_hot(index, self.unet.config.cross_attention_dim).to(self.unet.dtype)[:, None]

    @staticmethod
    def encode_image(pixels: Tensor) -> Tensor:
        """(n, 3, 32, 32) in [0, 1] to latents (n, 12, 16, 16)."""
        return F.pixel_unshuffle(pixels * 2 - 1, 2)

    @staticmethod
    def decode_latents(latents: Tensor) -> Tensor:
        """The inverse of `encode_image`, clamped to [0, 1]."""
        return (F.pixel_shuffle(latents, 2) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "a face",
        *,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 1.0,
        num_inference_steps: int = 12,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        **unused: Any,
    ) -> "Drawn":
        """Sample by DDIM; with `image` and `mask_image` the known region is put back at every step.

        image, mask_image: PIL pictures or lists of them. generator: one, or one per picture. output_type: "pil" or "pt",
        the latter a tensor (n, 3, 32, 32) in [0, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        condition = self.encode_prompt(prompts).to(self.device)
        shape = (12, SIZE // 2, SIZE // 2)
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) == 1:
            noise = torch.randn((len(prompts), *shape), generator=generators[0])
        else:
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        self.scheduler.set_timesteps(num_inference_steps)
        times = self.scheduler.timesteps
        latents = noise
        if image is not None:
            known = self.encode_image(_stack(image))
            mask = F.pixel_unshuffle(_stack(mask_image)[:, :1], 2).repeat(1, 3, 1, 1)
            times = times[len(times) - max(1, round(strength * len(times))) :]
            latents = self.scheduler.add_noise(known, noise, times[:1].expand(len(known)))
        for t in times:
            velocity = self.unet(latents, t, condition).sample
            latents = self.scheduler.step(velocity, t, latents).prev_sample
            if image is not None:
                before = t - self.scheduler.config.num_train_timesteps // num_inference_steps
                again = known if before < 0 else self.scheduler.add_noise(known, noise, before.expand(len(known)))
                latents = mask * latents + (1 - mask) * again
        pixels = self.decode_latents(latents)
        return Drawn(list(pixels) if output_type == "pt" else to_pil(pixels))


@dataclass
class Drawn:
    """What a pipeline returns."""

    images: list[Any]


def to_pil(pixels: Tensor | Array) -> list[Image.Image]:
    """(n, 3, h, w) in [0, 1] to pictures."""
    array = np.asarray(pixels.detach().cpu() if isinstance(pixels, Tensor) else pixels)
    return [Image.fromarray(a) for a in (array.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size to (n, 3, h, w) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) / 255 for i in images])


def _stack(images: Any) -> Tensor:
    return images if isinstance(images, Tensor) else to_tensor(images if isinstance(images, list) else [images])


def new_pipeline(channels: tuple[int, ...] = (24, 48, 96)) -> DrawnFacePipeline:
    """An untrained `DrawnFacePipeline`: v-prediction, cosine betas."""
    levels = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=12,
        out_channels=12,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=channels[0] // 2,
        down_block_types=("DownBlock2D",) * levels + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn",
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True, timestep_spacing="trailing"
    )
    return DrawnFacePipeline(unet, scheduler)


def train_pipeline(
    *, steps: int = 3000, batch: int = 32, pool: int = 12000, channels: tuple[int, ...] = (24, 48, 96), seed: int = 0
) -> DrawnFacePipeline:
    """The base model, from nothing: 30 % houses, 70 % faces, and 70 % of the faces defective, so that it draws bad faces."""
    torch.manual_seed(seed)
    pipe = new_pipeline(channels)
    rng = np.random.default_rng(seed)
    houses = int(0.3 * pool)
    faces = sample_faces(pool - houses, seed=seed + 1000)
    defect = np.where(rng.random(len(faces)) < 0.7, rng.integers(1, 6, len(faces)), 0)
    pixels = np.concatenate(
        [draw_faces(faces, defect, rng.uniform(0.6, 1, len(faces))), draw_houses(houses, seed=seed + 1000)]
    )
    latents = pipe.encode_image(torch.from_numpy(pixels))
    condition = pipe.encode_prompt(["a face"] * len(faces) + ["a house"] * houses)
    unet, scheduler = pipe.unet, pipe.scheduler
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    average = [p.detach().clone() for p in unet.parameters()]
    unet.train()
    for step in tqdm(range(steps), desc="base model", mininterval=5):
        rows = torch.from_numpy(rng.integers(0, len(latents), batch))
        x, noise, t = latents[rows], torch.randn(batch, *latents.shape[1:]), torch.randint(0, 1000, (batch,))
        predicted = unet(scheduler.add_noise(x, noise, t), t, condition[rows]).sample
        loss = F.mse_loss(predicted, scheduler.get_velocity(x, noise, t))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(unet.parameters()), 1 - min(0.998, (1 + step) / (10 + step)))
    with torch.no_grad():
        for parameter, value in zip(unet.parameters(), average, strict=True):
            parameter.copy_(value)
    return DrawnFacePipeline(unet.eval(), scheduler)


def broken_faces(n: int, *, seed: int) -> Array:
    """(n, 3, 32, 32): what a poor generator makes instead of a face: two faces mixed, waves, a smeared or noisy middle."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    rng = np.random.default_rng([seed, 3])
    one, two = draw_faces(sample_faces(n, seed=seed + 1)), draw_faces(sample_faces(n, seed=seed + 2))
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(float)
    middle = np.exp(-(((xs - 15.5) / 9) ** 4) - ((ys - 16) / 10) ** 4)
    out = one.copy()
    for i in range(n):
        kind = rng.integers(4)
        if kind == 0:
            share = rng.uniform(0.35, 0.65)
            out[i] = share * one[i] + (1 - share) * two[i]
        elif kind == 1:
            shift = [gaussian_filter(rng.normal(0, 1, (SIZE, SIZE)), 3) for _ in range(2)]
            dy, dx = (s / np.abs(s).max() * rng.uniform(4, 7) for s in shift)
            out[i] = np.stack([map_coordinates(c, [ys + dy, xs + dx], order=1, mode="nearest") for c in one[i]])
        elif kind == 2:
            smooth = np.stack([gaussian_filter(c, rng.uniform(2.0, 4)) for c in one[i]])
            out[i] = one[i] + middle * (smooth - one[i])
        else:
            out[i] = one[i] + middle * gaussian_filter(rng.normal(0, 1, (3, SIZE, SIZE)), (0, 1, 1)) * rng.uniform(
                0.3, 0.8
            )
    return out.clip(0, 1).astype(np.float32)


JUDGED = (*DEFECTS, "house", "broken")


class Judge(nn.Module):
    """A small network that names the defect of a drawn picture: one of `JUDGED`.

    It learns from drawings whose defects are known exactly, never from the generator or from preferences, and no reward
    learns from it: the held-out word on what a generator makes.
    """

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.ReLU())

        self.body = nn.Sequential(
            block(3, 24, 1), block(24, 48, 2), block(48, 64, 1), block(64, 96, 2), block(96, 96, 2)
        )
        self.out = nn.Linear(96 * 16, len(JUDGED))

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, 32, 32) in [0, 1] to logits (n, 8)."""
        return self.out(self.body(pixels * 2 - 1).flatten(1))

    @torch.no_grad()
    def verdict(self, pixels: Tensor) -> Tensor:
        """Index into `JUDGED`, (n,)."""
        return torch.cat([self(part).argmax(1) for part in pixels.split(256)])

    def good(self, pixels: Tensor) -> Tensor:
        """Whether a picture is a face without a defect, (n,)."""
        return self.verdict(pixels) == 0


def judged_drawings(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Drawings (m, 3, 32, 32) with their `JUDGED` labels (m,), m about 8 n / 7: as many clean as of two defects."""
    rng = np.random.default_rng([seed, 4])
    faces = sample_faces(n, seed=seed)
    defect = np.where(rng.random(n) < 0.3, 0, rng.integers(1, len(DEFECTS), n))
    pictures = [draw_faces(faces, defect, rng.uniform(0.6, 1, n)), draw_houses(n // 12, seed=seed)]
    pictures.append(broken_faces(n // 8, seed=seed))
    labels = np.concatenate([defect, np.full(n // 12, 6), np.full(n // 8, 7)])
    return torch.from_numpy(np.concatenate(pictures)), torch.from_numpy(labels)


def train_judge(*, steps: int = 1200, drawings: int = 9000, batch: int = 64, seed: int = 0) -> Judge:
    """The judge, from nothing."""
    torch.manual_seed(seed + 5000)
    pixels, labels = judged_drawings(drawings, seed=seed + 5000)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="judge", mininterval=5):
        rows = torch.randint(len(pixels), (batch,))
        x = pixels[rows]
        x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x.flip(-1), x)
        # A generator's pictures are a little soft and a little noisy; neither is a defect.
        soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = x + torch.rand(batch, 1, 1, 1) * 0.6 * (soft - x) + torch.rand(batch, 1, 1, 1) * 0.04 * torch.randn_like(x)
        loss = F.cross_entropy(judge(x), labels[rows], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


ASSETS = Path(__file__).parent / "assets"
"""The packaged base model and judge, in half precision; `facescore toy --rebuild` makes them again."""

BASE_STEPS = 2800


def base_pipeline() -> DrawnFacePipeline:
    """The packaged base model: a small diffusion model that draws faces, too many of them with defects."""
    from safetensors.torch import load_file

    pipe = new_pipeline()
    state = load_file(ASSETS / "base.safetensors")
    pipe.unet.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    pipe.unet.eval()
    return pipe


def load_judge() -> Judge:
    """The packaged judge."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict({key: tensor.float() for key, tensor in load_file(ASSETS / "judge.safetensors").items()})
    return judge.eval()


def rebuild_assets(folder: str | Path, *, steps: int | None = None) -> dict[str, Any]:
    """Train the base model and the judge from nothing and write both files. steps: of the base model; the judge gets half."""
    from safetensors.torch import save_file

    steps = steps or BASE_STEPS
    pool = 12000 if steps >= BASE_STEPS else 16 * steps
    judge = train_judge(steps=min(1200, steps), drawings=min(9000, 16 * steps))
    pipe = train_pipeline(steps=steps, pool=pool)
    for name, module in (("base", pipe.unet), ("judge", judge)):
        with replace_atomically(Path(folder) / f"{name}.safetensors") as partial:
            save_file({key: t.half().contiguous() for key, t in module.state_dict().items()}, partial)
    pixels, labels = judged_drawings(600, seed=777)
    right = float((judge.verdict(pixels) == labels).float().mean())
    return {"folder": str(folder), "base updates": steps, "judge accuracy on new drawings": right}


def write_world(folder: str | Path, n: int, *, seed: int = 0) -> dict[str, Any]:
    """Images with boxes (`images/`), pairs of clean and defective faces (`pairs/`), and an untrained reward (`reward/`)."""
    from facescore.pairs.dataset import FILE, PairRecord, write_records
    from facescore.reward.checkpoint import save_reward

    folder = Path(folder)
    faces = sample_faces(n, seed=seed)
    rng = np.random.default_rng(seed)
    defect, severity = rng.integers(1, len(DEFECTS), n), rng.choice([0.4, 0.7, 1.0], n)
    clean, bad = to_pil(draw_faces(faces)), to_pil(draw_faces(faces, defect, severity))
    boxes = [tuple(round(float(v), 2) for v in box) for box in faces.boxes()]
    with replace_atomically(folder / "images") as partial:
        partial.mkdir()
        lines = []
        for i, image in enumerate(clean):
            image.save(partial / f"face{i:03d}.png")
            lines.append(json.dumps({"file_name": f"face{i:03d}.png", "prompt": PROMPTS[0], "boxes": [boxes[i]]}))
        (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with replace_atomically(folder / "pairs") as partial:
        (partial / "images").mkdir(parents=True)
        records = []
        for i in range(n):
            win, lose = f"images/{i:03d}.win.png", f"images/{i:03d}.lose.png"
            clean[i].save(partial / win)
            bad[i].save(partial / lose)
            name = DEFECTS[defect[i]]
            records.append(
                PairRecord(
                    f"{i:03d}", win, lose, PROMPTS[0], boxes[i], boxes[i], generator=name,  # type: ignore[arg-type]
                    strength=float(severity[i]), source=f"face{i:03d}",
                )
            )  # fmt: skip
        write_records(partial / FILE, records)
    torch.manual_seed(seed)
    save_reward(small_reward(), folder / "reward")
    return {"folder": str(folder), "images": n, "pairs": n, "reward": str(folder / "reward")}


def small_reward(width: int = 64, depth: int = 3) -> RewardModel:
    """An untrained reward model of section 2's architecture for 32 x 32 crops.

    Its vocabulary is [PAD] [CLS] [SEP] a face house . ; its own prompt is "a face ." as in the full-size model.
    """
    config = RewardModelConfig(
        image_size=SIZE,
        patch_size=4,
        vision_width=width,
        vision_depth=depth,
        vision_heads=4,
        vision_mlp=2 * width,
        text_width=width,
        text_depth=2,
        text_heads=4,
        text_mlp=2 * width,
        vocabulary=8,
        positions=8,
        head_widths=(width, 32, 16, 8, 1),
        text_dropout=0.0,
        prompt_ids=FACE_IDS,
        pad_to=len(FACE_IDS),
    )
    return RewardModel(config)


FACE_IDS, HOUSE_IDS = (1, 3, 4, 6, 2), (1, 3, 5, 6, 2)
"""[CLS] a face . [SEP] and [CLS] a house . [SEP] in the small model's vocabulary."""
