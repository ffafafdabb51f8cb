"""CLIPScore of an image and a concept: w max(cos(E_I(M), E_T(prefix + X)), 0), with w = 2.5 (2408.00230, section 4; Hessel 2021)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class CLIPScorer:
    """CLIPScore by a transformers `CLIPModel` and its `CLIPProcessor`.

    prefix: put before each text. weight: the factor. batch_size: images encoded at a time.
    Texts are encoded once and remembered.
    """

    def __init__(
        self, model: Any, processor: Any, *, prefix: str = "A photo depicts ", weight: float = 2.5, batch_size: int = 32
    ):
        def embed_images(images: list[Image.Image]) -> torch.Tensor:
            inputs = processor(images=images, return_tensors="pt").to(model.device)
            return _pooled(model.get_image_features(**inputs))

        def embed_texts(texts: list[str]) -> torch.Tensor:
            inputs = processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(model.device)
            return _pooled(model.get_text_features(**inputs))

        self._setup(embed_images, embed_texts, prefix, weight, batch_size)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "cpu", **kwargs: Any) -> "CLIPScorer":
        """From a hub id or a folder, such as openai/clip-vit-base-patch32.

        Raises UserError when it is neither.
        """
        from tenfold_shared.hub import load_model
        from transformers import CLIPModel

        from lcmis_align.scorers.base import load_processor

        return cls(load_model(CLIPModel, name).eval().to(device), load_processor(name), **kwargs)

    @classmethod
    def from_open_clip(
        cls, model: Any, preprocess: Any, tokenizer: Any, *, prefix: str = "A photo depicts ", weight: float = 2.5,
        batch_size: int = 32,
    ) -> "CLIPScorer":  # fmt: skip
        """From what `open_clip.create_model_and_transforms` and `open_clip.get_tokenizer` give."""
        self = cls.__new__(cls)
        device = next(model.parameters()).device
        self._setup(
            lambda images: model.encode_image(torch.stack([preprocess(image) for image in images]).to(device)),
            lambda texts: model.encode_text(tokenizer(texts).to(device)),
            prefix, weight, batch_size,
        )  # fmt: skip
        return self

    def _setup(
        self, embed_images: Callable[[list[Image.Image]], torch.Tensor],
        embed_texts: Callable[[list[str]], torch.Tensor], prefix: str, weight: float, batch_size: int,
    ) -> None:  # fmt: skip
        self._embed_images, self._embed_texts = embed_images, embed_texts
        self.prefix, self.weight, self.batch_size = prefix, weight, batch_size
        self._known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """(images, texts) in 0..weight."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            features = _unit(self._embed_texts([self.prefix + text for text in new]))
            self._known |= dict(zip(new, features, strict=True))
        words = torch.stack([self._known[text] for text in texts])
        batches = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        pictures = torch.cat([_unit(self._embed_images([im.convert("RGB") for im in batch])) for batch in batches])
        return self.weight * (pictures @ words.T).clamp(min=0)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def _pooled(output: Any) -> torch.Tensor:
    # Newer transformers return the projected features as `pooler_output` of an output object.
    return output if torch.is_tensor(output) else output.pooler_output
