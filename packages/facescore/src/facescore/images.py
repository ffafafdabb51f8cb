"""Pictures in, crops out: what may be given for an image, and the arithmetic of a face box.

The box (x1, y1, x2, y2) of a detector becomes the crop (arXiv 2406.17100, official code)

    x = int(x1 - 1),  y = int(y1 - 1),  w = int(x2 + 1) - x,  h = int(y2 + 1) - y.

At the left or top border x or y is -1 there, the slice is empty, and the face is lost without a word. Here the crop is
clamped to the image; `compat="official"` keeps the fault.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from facescore.errors import ImageError, InvalidBoxError

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the image."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(image: Any) -> Image.Image:
    """An RGB picture from a path, a PIL image, a uint8 array (H, W[, 3 or 4]) or a float tensor (3, H, W) in [0, 1].

    EXIF rotation is applied, transparency is laid on white, 16-bit and CMYK are converted. Raises ImageError naming the
    file when it is missing, damaged, empty or animated, or when an array has another shape or holds NaN.
    """
    if isinstance(image, str | Path):
        return _from_file(Path(image))
    if isinstance(image, Image.Image):
        name = str(getattr(image, "filename", "") or "the image")
        try:
            image.load()  # an opened file is read only now
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"'{name}' is damaged ({error})", hint="save it again") from error
        return _to_rgb(image, name)
    if isinstance(image, Tensor):
        return _from_floats(image.detach().float().cpu().numpy())
    if isinstance(image, np.ndarray):
        if np.issubdtype(image.dtype, np.floating):
            return _from_floats(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
            raise ImageError(f"an array of {image.dtype} with shape {image.shape}, expected uint8 (height, width, 3)")
        if image.ndim == 3 and image.shape[2] not in (1, 3, 4):
            raise ImageError(f"an array with shape {image.shape}, expected 1, 3 or 4 channels last")
        return _to_rgb(
            Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image), "the array"
        )
    raise ImageError(f"cannot read an image from {type(image).__name__}", hint="pass a path, a PIL image or an array")


def _from_file(path: Path) -> Image.Image:
    if not path.is_file():
        raise ImageError(f"image file '{path}' does not exist", hint="check the path")
    try:
        with Image.open(path) as opened:
            if getattr(opened, "n_frames", 1) > 1:
                raise ImageError(f"'{path}' is animated ({opened.n_frames} frames)", hint="save one frame as an image")
            opened.load()
            return _to_rgb(opened, str(path))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"'{path}' is not an image or is damaged ({error})", hint="save it again") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if 0 in image.size:
        raise ImageError(f"{name} is empty")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ImageError(f"{name} holds NaN or infinity")
        # PIL clips instead of scaling when it converts 16 bits to 8; mode "I" may hold either.
        deep = image.mode.startswith("I;16") or values.max() > 255
        scale = 257 if deep else 1 if image.mode.startswith("I") or values.max() > 1 else 1 / 255
        return Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_floats(array: np.ndarray) -> Image.Image:
    if array.ndim != 3 or array.shape[0] not in (1, 3) or 0 in array.shape:
        raise ImageError(f"a float image with shape {array.shape}, expected (3, height, width) in [0, 1]")
    if not np.isfinite(array).all():
        raise ImageError("a float image holds NaN or infinity")
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise ImageError(f"a float image spans {array.min():.3g} to {array.max():.3g}, expected [0, 1]")
    pixels = (np.repeat(array, 3 // array.shape[0], axis=0).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def crop_window(
    box: Box, size: tuple[int, int], *, crop: str = "box", margin: float = 0.0, compat: str = "fixed"
) -> tuple[int, int, int, int] | None:
    """The window (left, top, right, bottom) of whole pixels that a box cuts out of an image of `size` (width, height).

    crop: "box" as the checkpoint was trained; "square" takes the longer side both ways. margin: share of the box added on
    each side. compat: "official" returns None where the original code loses the face.

    A box that reaches outside is clamped, with a warning when more than the rounding does. Raises InvalidBoxError when
    nothing is left, or when the box is not finite.
    """
    if len(box) != 4 or not all(math.isfinite(v) for v in box):
        raise InvalidBoxError(f"box {tuple(box)} is not four finite numbers")
    x1, y1, x2, y2 = (float(v) for v in box)
    if x2 <= x1 or y2 <= y1:
        raise InvalidBoxError(f"box {tuple(box)} is empty", hint="boxes are x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    width, height = size
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise InvalidBoxError(f"box {tuple(box)} lies outside the image of {width} x {height}")
    if compat == "fixed" and (x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1):
        warnings.warn(f"box {tuple(box)} reaches outside the image of {width} x {height}; it is clamped", stacklevel=2)
    if crop == "square":
        half = max(x2 - x1, y2 - y1) / 2
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        x1, y1, x2, y2 = cx - half, cy - half, cx + half, cy + half
    grow_x, grow_y = margin * (x2 - x1), margin * (y2 - y1)
    left, top = int(x1 - grow_x - 1), int(y1 - grow_y - 1)
    right, bottom = int(x2 + grow_x + 1), int(y2 + grow_y + 1)
    if compat == "official" and (left < 0 or top < 0):
        return None
    return max(left, 0), max(top, 0), min(right, width), min(bottom, height)


def preprocess(crop: Image.Image, size: int = 224) -> Tensor:
    """A crop as the model sees it, (3, size, size): shorter side to `size` (bicubic), centre crop, normalised."""
    from torchvision.transforms.v2.functional import InterpolationMode as Mode
    from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

    resized = center_crop(resize(crop, [size], interpolation=Mode.BICUBIC), [size, size])
    return normalise(pil_to_tensor(resized).float() / 255)


def normalise(pixels: Tensor) -> Tensor:
    """(..., 3, h, w) in [0, 1] to zero mean and unit variance per channel."""
    return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def differentiable_crops(images: Tensor, boxes: Sequence[Box], size: int = 224) -> Tensor:
    """(n, 3, H, W) in [0, 1] and one box each to model input (n, 3, size, size), with a gradient to the images.

    Resizing is torch's antialiased bicubic, within about 0.02 of `preprocess`, which rounds to 8 bits on the way.
    """
    crops = []
    for image, box in zip(images, boxes, strict=True):
        window = crop_window(box, (image.shape[-1], image.shape[-2]))
        assert window is not None  # only compat="official" returns None
        left, top, right, bottom = window
        part = image[:, top:bottom, left:right]
        height, width = part.shape[-2:]
        scale = size / min(height, width)
        target = (size, int(size * width / height)) if height < width else (int(size * height / width), size)
        if scale != 1 or height != width:
            part = F.interpolate(part[None], target, mode="bicubic", antialias=True)[0].clamp(0, 1)
        y, x = round((part.shape[-2] - size) / 2), round((part.shape[-1] - size) / 2)
        crops.append(normalise(part[:, y : y + size, x : x + size]))
    return torch.stack(crops)
