"""Images drawn on the spot: characters in the fonts that come with matplotlib, shapes with fills, smooth noise.

All images are grey, (n, 1, side, side), float32 in [0, 1].
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
FILLS = ("solid", "outlined", "striped", "dotted")
SHAPE_CLASSES = tuple(f"{fill} {shape}" for shape in SHAPES for fill in FILLS)


def character_names() -> list[str]:
    """What each of `CHARACTERS` is called in a caption."""
    letters = [f"{'capital' if c.isupper() else 'small'} letter {c.lower()}" for c in CHARACTERS[10:]]
    return [f"digit {word}" for word in DIGITS] + letters


@functools.cache
def _plates() -> Tensor:
    """Every character in every font, centred and scaled to fill the frame: (fonts, characters, 32, 32)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = sorted(p for p in folder.glob("DejaVu*.ttf") if "Display" not in p.name)
    plates: Any = np.zeros((len(fonts), len(CHARACTERS), 32, 32), dtype=np.float32)
    for i, path in enumerate(fonts):
        font = ImageFont.truetype(str(path), 40)
        for j, character in enumerate(CHARACTERS):
            image = Image.new("L", (80, 80))
            ImageDraw.Draw(image).text((20, 10), character, font=font, fill=255)
            left, top, right, bottom = image.getbbox() or (0, 0, 80, 80)
            scale = 28 / max(right - left, bottom - top)
            size = max(round((right - left) * scale), 1), max(round((bottom - top) * scale), 1)
            cut = np.asarray(image.crop((left, top, right, bottom)).resize(size), dtype=np.float32) / 255
            y, x = (32 - size[1]) // 2, (32 - size[0]) // 2
            plates[i, j, y : y + size[1], x : x + size[0]] = cut
    return torch.from_numpy(plates)


def glyphs(characters: Tensor, generator: torch.Generator, *, side: int = 16, low: int | None = 8) -> Tensor:
    """Characters in random fonts, moved, turned, sheared, dimmed and made noisy.

    characters: (n,) positions in `CHARACTERS`. low: side to which they are shrunk on the way, as the real digits are.
    """
    plates = _plates()
    n = len(characters)
    fonts = torch.randint(0, len(plates), (n,), generator=generator)
    return moved(plates[fonts, characters][:, None], generator, side=side, low=low)


def moved(images: Tensor, generator: torch.Generator, *, side: int, low: int | None = None) -> Tensor:
    """Random affine maps, brightness and noise, to (n, 1, side, side)."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    angle, shear = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    width, height = uniform(0.85, 1.5), uniform(0.85, 1.25)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = width * angle.cos(), -width * (angle.sin() + shear)
    theta[:, 1, 0], theta[:, 1, 1] = height * angle.sin(), height * angle.cos()
    theta[:, :, 2] = torch.stack([uniform(-0.15, 0.15), uniform(-0.15, 0.15)], dim=1)
    grid = functional.affine_grid(theta, [n, 1, 32, 32], align_corners=False)
    result = functional.grid_sample(images, grid, align_corners=False)
    result = functional.interpolate(result, size=low or side, mode="area")
    result = result * uniform(0.7, 1.3)[:, None, None, None]
    result = result + 0.06 * torch.randn(result.shape, generator=generator)
    return _resize(result.clamp(0, 1), side)


def shapes(
    classes: Tensor, generator: torch.Generator, *, side: int = 24, clutter: float = 0.4, upright: bool = False
) -> Tensor:
    """Shapes with fills on a smooth background.

    classes: (n,) positions in `SHAPE_CLASSES`. clutter: amplitude of the background. upright: not turned.
    """
    n = len(classes)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, 1, 1).uniform_(low, high, generator=generator)

    line = torch.linspace(-1, 1, side)
    y, x = line[None, :, None] - uniform(-0.3, 0.3), line[None, None, :] - uniform(-0.3, 0.3)
    angle = uniform(-math.pi / 4, math.pi / 4) * (0.0 if upright else 1.0)
    size = uniform(0.45, 0.75)
    u, v = (angle.cos() * x + angle.sin() * y) / size, (angle.cos() * y - angle.sin() * x) / size
    radius = (u**2 + v**2).sqrt()
    square = torch.maximum(u.abs(), v.abs())
    triangle = torch.maximum(v - 0.6, 1.73 * u.abs() / 2 - (v + 1) / 2 + 0.3)
    cross = torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.33, square - 1)
    inside = torch.stack([radius - 1, square - 0.9, triangle, cross, (radius - 0.75).abs() - 0.28], dim=1)
    distance = inside[torch.arange(n), classes // len(FILLS)]  # negative inside
    solid = (distance < 0).float()
    outline = (distance.abs() < 0.16).float()
    stripes = solid * (torch.sin(9 * u) > 0)
    dots = solid * ((torch.sin(10 * u) * torch.sin(10 * v)) > 0)
    drawn = torch.stack([solid, outline, stripes, dots], dim=1)[torch.arange(n), classes % len(FILLS)]
    background = clutter * (smooth_noise(n, generator, side=side)[:, 0])
    image = (background + drawn * uniform(0.6, 1.0) * (1 - background))[:, None]
    return (image + 0.03 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def smooth_noise(n: int, generator: torch.Generator, *, side: int = 24) -> Tensor:
    """Blurred noise."""
    return _resize(torch.rand(n, 1, 6, 6, generator=generator), side)


def _resize(images: Tensor, side: int) -> Tensor:
    return functional.interpolate(images, size=side, mode="bilinear", align_corners=False).clamp(0, 1)
