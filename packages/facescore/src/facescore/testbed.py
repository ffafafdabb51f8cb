"""The offline world: drawn faces with known defects, tiny diffusion models of them, and a judge that is exact.

There are two kinds of drawings. *Varied* faces, 32 x 32 in colour, test the reward: scale (+-20 %), position, rotation
(+-20 degrees), colours of skin, hair and background, hair shape, glasses, light from one side and clutter are chosen so that
no linear subspace holds the clean ones. *Plain* faces, 16 x 16 and grey, are few enough to list them all, so that whatever
the tiny diffusion model draws is judged by the nearest drawing in that list: the held-out word, which no reward has seen.

Five defects change the inside of a face; `severity` in (0, 1] says how far. Houses stand for everything that a refinement
for faces must leave alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from PIL import Image
from tenfold_shared.hub import replace_atomically
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from facescore.images import Box
from facescore.reward.model import RewardModel, RewardModelConfig

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
PLAIN = 16
"""Pixels of a side of a plain drawing."""
TONES = (0.55, 0.75, 0.95)
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def draw_plain(kind: int, tone: int, place: int) -> Array:
    """(16, 16) in [-1, 1]: kind an index into `DEFECTS`, or -1 for a house; tone and place into `TONES` and `PLACES`."""
    ys, xs = np.mgrid[:PLAIN, :PLAIN].astype(float)
    down, right = PLACES[place]
    picture = np.full((PLAIN, PLAIN), -0.6)
    if kind < 0:
        picture[8 + down : 15, 3 + right : 12 + right] = TONES[tone]
        for row in range(5):
            picture[3 + down + row, 7 - row + right : 8 + row + right] = TONES[tone] - 0.5
        picture[11 + down : 15, 6 + right : 9 + right] = -0.9
        return picture
    picture[((xs - 7 - right) / 6) ** 2 + ((ys - 7 - down) / 7) ** 2 <= 1] = TONES[tone]
    eye_rows = (4 + down, (7 if kind == 3 else 4) + down)
    for eye, (row, column) in enumerate(zip(eye_rows, (4 + right, 9 + right), strict=True)):
        if not (kind == 1 and eye == 1):
            picture[row : row + 2, column : column + 2] = -0.9
    if kind == 5:
        picture[2 + down : 4 + down, 6 + right : 8 + right] = -0.9
    for step in range(6):
        if kind != 2:
            row = 12 - step if kind == 4 else 11
            picture[row + down, 4 + step + right] = -0.9
    return picture


@dataclass
class Templates:
    """Every plain drawing there is: pictures (k, 16, 16) in [-1, 1] and kinds (k,), an index into `DEFECTS` or -1."""

    pictures: Array
    kinds: Array

    @classmethod
    def all(cls) -> "Templates":
        keys = [(k, t, p) for k in (*range(len(DEFECTS)), -1) for t in range(len(TONES)) for p in range(len(PLACES))]
        return cls(np.stack([draw_plain(*key) for key in keys]), np.array([key[0] for key in keys]))

    def pixels(self, rows: Array) -> Tensor:
        """(n, 3, 16, 16) in [0, 1]."""
        return torch.from_numpy(self.pictures[rows] / 2 + 0.5).float()[:, None].repeat(1, 3, 1, 1)

    def judge(self, pixels: Tensor) -> tuple[Array, Array]:
        """The kind of the nearest drawing, and the distance (root mean square, on [-1, 1]) to the nearest *flawless* one.

        pixels: (n, 3, 16, 16) in [0, 1]. A flawless drawing is a clean face or a house.
        """
        given = (pixels.mean(1) * 2 - 1).flatten(1).double().numpy()
        flat = self.pictures.reshape(len(self.pictures), -1)
        distance = np.sqrt(((given[:, None] - flat[None]) ** 2).mean(2))
        flawless = np.isin(self.kinds, (0, -1))
        return self.kinds[distance.argmin(1)], distance[:, flawless].min(1)


def plain_box(place: int) -> Box:
    """The box of the face of a plain drawing."""
    down, right = PLACES[place]
    return 1.0 + right, float(down), 14.0 + right, 15.0 + down


FOLD = 2
"""Side of the pixel blocks that are folded into the channels of one latent."""


class DrawnFacePipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Text to image and inpainting of drawings, with the calling convention of diffusers' own pipelines.

    There is no VAE: the latents are the pixels in [-1, 1], blocks of 2 x 2 folded into channels, (n, 4, 8, 8) for plain
    drawings and (n, 12, 16, 16) for varied ones. A prompt is one token, one-hot over `PROMPTS`.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """(n, 1, 16): one token per prompt; a prompt of neither kind counts as a face."""
        index = torch.tensor([1 if "house" in p.lower() else 0 for p in prompts])
        return F.one_hot(index, self.unet.config.cross_attention_dim).to(self.unet.dtype)[:, None]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a side of one latent."""
        return FOLD

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) in [0, 1] to latents; the mean of the colours where they are grey."""
        return self._fold(pixels) * 2 - 1

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_image`, clamped to [0, 1]."""
        pixels = (F.pixel_shuffle(latents, FOLD) / 2 + 0.5).clamp(0, 1)
        return pixels.expand(-1, 3, -1, -1)

    def _fold(self, pixels: Tensor) -> Tensor:
        grey = self.unet.config.in_channels == FOLD**2
        return F.pixel_unshuffle(pixels.mean(1, keepdim=True) if grey else pixels, FOLD)

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
        the latter tensors (3, h, w) in [0, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        condition = self.encode_prompt(prompts).to(self.device)
        known = self.encode_image(_stack(image)) if image is not None else None
        side = self.unet.config.sample_size
        shape = (self.unet.config.in_channels, side, side) if known is None else tuple(known.shape[1:])
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) == 1:
            noise = torch.randn((len(prompts), *shape), generator=generators[0])
        else:
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        self.scheduler.set_timesteps(num_inference_steps)
        times = self.scheduler.timesteps
        latents = noise
        if known is not None:
            mask = self._fold(_stack(mask_image))
            times = times[len(times) - max(1, round(strength * len(times))) :]
            latents = self.scheduler.add_noise(known, noise, times[:1].expand(len(known)))
        for t in times:
            predicted = self.unet(latents, t, condition).sample
            latents = self.scheduler.step(predicted, t, latents).prev_sample
            if known is not None:
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


def new_pipeline(channels: tuple[int, ...] = (24, 48), *, size: int = PLAIN) -> DrawnFacePipeline:
    """An untrained `DrawnFacePipeline` of v-prediction with cosine betas. size: `PLAIN` for grey drawings, `SIZE` for colour."""
    levels = len(channels) - 1
    latents = FOLD**2 * (1 if size == PLAIN else 3)
    unet = UNet2DConditionModel(
        sample_size=size // FOLD,
        in_channels=latents,
        out_channels=latents,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",) * levels + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn",
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )
    return DrawnFacePipeline(unet, scheduler)


def plain_drawings(n: int, defective: float, *, seed: int) -> tuple[Tensor, list[str]]:
    """n plain drawings (n, 3, 16, 16) in [0, 1] and their prompts: 30 % houses; of the faces a share is defective."""
    templates, rng = Templates.all(), np.random.default_rng(seed)
    kinds = np.where(rng.random(n) < 0.3, -1, np.where(rng.random(n) < defective, rng.integers(1, len(DEFECTS), n), 0))
    rows = np.array([rng.choice(np.flatnonzero(templates.kinds == kind)) for kind in kinds])
    return templates.pixels(rows), [PROMPTS[int(kind < 0)] for kind in kinds]


def varied_drawings(n: int, defective: float, *, seed: int) -> tuple[Tensor, list[str]]:
    """n varied drawings (n, 3, 32, 32) in [0, 1] and their prompts: 20 % houses; of the faces a share is defective."""
    rng, parts, prompts = np.random.default_rng([seed, 3]), [], []
    for start in range(0, n, 1000):  # drawing needs a hundred times the memory of the pictures
        size = min(1000, n - start)
        house = rng.random(size) < 0.2
        defect = np.where(rng.random(size) < defective, rng.integers(1, len(DEFECTS), size), 0)
        faces, houses = (int(v) for v in rng.integers(2**31, size=2))
        pixels = draw_faces(sample_faces(size, seed=faces), defect)
        pixels[house] = draw_houses(int(house.sum()), seed=houses)
        parts.append(torch.from_numpy(pixels))
        prompts += [PROMPTS[int(h)] for h in house]
    return torch.cat(parts), prompts


@dataclass(frozen=True)
class Recipe:
    """How a base model is made. Both draw bad faces, since most of the faces that they learn from have a defect."""

    draw: Callable[..., tuple[Tensor, list[str]]]
    size: int
    channels: tuple[int, ...]
    steps: int
    phases: tuple[tuple[float, float, float], ...]
    """Share of the steps, share of the faces with a defect, and peak learning rate."""
    passes: int = 1
    """How often each drawing is seen."""


RECIPES = {
    "plain": Recipe(plain_drawings, PLAIN, (24, 48), 2000, ((0.8, 0.7, 2e-3), (0.2, 0.9, 7e-4))),
    "varied": Recipe(varied_drawings, SIZE, (40, 64, 88), 1400, ((1.0, 0.85, 2e-3),), passes=3),
}


def train_pipeline(
    kind: str = "plain", *, steps: int | None = None, batch: int = 32, seed: int = 0
) -> DrawnFacePipeline:
    """A base model from nothing. steps: the recipe's own when not given."""
    recipe = RECIPES[kind]
    steps = steps or recipe.steps
    torch.manual_seed(seed)
    pipe = new_pipeline(recipe.channels, size=recipe.size)
    for part, (share, defective, lr) in enumerate(recipe.phases):
        count = max(1, round(share * steps))
        pixels, prompts = recipe.draw(-(-count // recipe.passes) * batch, defective, seed=seed + part)
        _learn(pipe, pixels, prompts, count, batch, lr, seed + part)
    return pipe


def _learn(
    pipe: DrawnFacePipeline, pixels: Tensor, prompts: list[str], steps: int, batch: int, lr: float, seed: int
) -> None:
    """Denoising of the pictures in order, again and again; the learning rate rises for a tenth of it and falls as a cosine."""

    def rate(step: int) -> float:
        done = (step + 0.5) / steps
        return min(10 * done, 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)))

    torch.manual_seed(seed)
    unet, scheduler = pipe.unet, pipe.scheduler
    condition = pipe.encode_prompt(prompts)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    unet.train().to(memory_format=torch.channels_last)
    for step in tqdm(range(steps), desc="base model", mininterval=5, disable=None):
        start = step * batch % len(pixels)
        rows = slice(start, start + batch)
        x = pipe.encode_image(pixels[rows])
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (batch,))
        noisy = scheduler.add_noise(x, noise, t).to(memory_format=torch.channels_last)
        loss = F.mse_loss(unet(noisy, t, condition[rows]).sample, scheduler.get_velocity(x, noise, t))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    unet.eval()


ASSETS = Path(__file__).parent / "assets"
"""The packaged base models, in half precision; `facescore toy --rebuild` makes them again."""


def base_pipeline(kind: str = "plain") -> DrawnFacePipeline:
    """A packaged base model: a tiny diffusion model that draws plain or varied faces, too many of them with defects."""
    from safetensors.torch import load_file

    pipe = new_pipeline(RECIPES[kind].channels, size=RECIPES[kind].size)
    state = load_file(ASSETS / f"{kind}.safetensors")
    pipe.unet.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    pipe.unet.eval()
    return pipe


def rebuild_assets(
    folder: str | Path, *, steps: int | None = None, kinds: Sequence[str] = tuple(RECIPES)
) -> dict[str, Any]:
    """Train the base models from nothing and write one file each. steps: the recipes' own when not given."""
    from safetensors.torch import save_file

    written = {}
    for kind in kinds:
        path = Path(folder) / f"{kind}.safetensors"
        pipe = train_pipeline(kind, steps=steps)
        with replace_atomically(path) as partial:
            save_file({key: t.half().contiguous() for key, t in pipe.unet.state_dict().items()}, partial)
        written[kind] = str(path)
    return written


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


def plain_reward() -> RewardModel:
    """An untrained reward model of the same kind for plain drawings."""
    return RewardModel(replace(small_reward(32, 2).config, image_size=PLAIN))


FACE_IDS, HOUSE_IDS = (1, 3, 4, 6, 2), (1, 3, 5, 6, 2)
"""[CLS] a face . [SEP] and [CLS] a house . [SEP] in the small model's vocabulary."""
