"""Features of images and texts for the metrics: pixels, or any CLIP or vision model of transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_model
from torch import Tensor

BATCH = 32


class Features:
    """Image features (N, d), and text features of the same space when the model is a CLIP.

    model: `pixels` (16 × 16 colours, for smoke tests), or the hub id or folder of a CLIP or other vision model.
    """

    def __init__(self, model: str = "pixels", *, device: str = "cpu"):
        self.name, self.device = model, device
        self._model: Any = None
        self._tokenizer: Any = None
        if model == "pixels":
            return
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizerFast

        kind = load_model(AutoConfig, model).model_type
        self.is_clip = kind == "clip"
        self._model = load_model(CLIPModel if self.is_clip else AutoModel, model).to(device).eval()
        self._processor = load_model(AutoImageProcessor, model)
        self._tokenizer = load_model(CLIPTokenizerFast, model) if self.is_clip else None

    @torch.no_grad()
    def images(self, images: Sequence[Any]) -> Tensor:
        """Features of PIL images."""
        if self._model is None:
            return torch.stack([_tiny(image) for image in images])
        parts = []
        for group in _groups(images):
            inputs = self._processor(images=[image.convert("RGB") for image in group], return_tensors="pt")
            inputs = {key: value.to(self.device) for key, value in inputs.items()}
            out = self._model.get_image_features(**inputs) if self.is_clip else self._model(**inputs)
            parts.append(_pooled(out).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts. Raises UserError when the model is not a CLIP."""
        if self._model is None or not self.is_clip:
            raise UserError(
                f"'{self.name}' has no text features", hint="the CLIP score needs --features with a CLIP model"
            )
        parts = []
        for group in _groups(texts):
            inputs = self._tokenizer(list(group), padding=True, truncation=True, return_tensors="pt").to(self.device)
            parts.append(_pooled(self._model.get_text_features(**inputs)).float().cpu())
        return torch.cat(parts)


def _pooled(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return pooled.flatten(1) if pooled is not None else output.last_hidden_state[:, 0]


def _tiny(image: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(image.convert("RGB").resize((16, 16)), dtype=np.float32)).flatten() / 255


def _groups(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def folder_images(folder: str | Path) -> tuple[list[Any], list[str]]:
    """All images of a folder and their captions; errors as in `data.read_images`."""
    from scott.data import read_images

    if not Path(folder).is_dir():
        raise UserError(f"image folder '{folder}' does not exist")
    pairs = list(read_images(folder))
    return [image for image, _ in pairs], [str(caption) for _, caption in pairs]
