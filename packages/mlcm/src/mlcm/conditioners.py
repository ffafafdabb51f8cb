"""From prompts to the arguments of a network: nothing, a class label, Stable Diffusion's text, SDXL's text and sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from mlcm.network import Condition


class Conditioner(Protocol):
    """Gives the conditions that training draws from."""

    def __len__(self) -> int:
        """How many prompts there are."""
        ...

    def __call__(self, index: Tensor) -> Condition:
        """The condition of some prompts. index: long (batch,)."""
        ...

    def prompts(self, index: Tensor) -> list[str]:
        """Their texts, for rewards."""
        ...


class NoCondition:
    """An unconditional teacher."""

    def __len__(self) -> int:
        return 1

    def __call__(self, index: Tensor) -> Condition:
        return Condition()

    def prompts(self, index: Tensor) -> list[str]:
        return [""] * len(index)


class ClassCondition:
    """Class labels 0..classes-1 for networks with `class_labels`; the label `classes` is no class."""

    def __init__(self, classes: int, *, names: Sequence[str] | None = None):
        self.classes = classes
        self.names = list(names) if names else [str(i) for i in range(classes)]

    def __len__(self) -> int:
        return self.classes

    def __call__(self, index: Tensor) -> Condition:
        return Condition({"class_labels": index}, {"class_labels": torch.full_like(index, self.classes)})

    def prompts(self, index: Tensor) -> list[str]:
        return [self.names[i] for i in index.tolist()]


class PromptCondition:
    """The text encoders of a Stable Diffusion or SDXL pipeline.

    texts: the prompts. Embeddings are computed when drawn, as a prompt file may hold millions of lines. SDXL's pooled
    embeddings and sizes go into both calls of guidance.
    """

    def __init__(self, pipeline: Any, texts: Sequence[str], *, resolution: int | None = None):
        self.pipeline, self.texts = pipeline, list(texts)
        if not self.texts:
            raise UserError("no prompts to train on", hint="give at least one line of text")
        scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.resolution = resolution or pipeline.unet.config.sample_size * scale
        self.is_xl = getattr(pipeline, "text_encoder_2", None) is not None

    def __len__(self) -> int:
        return len(self.texts)

    def prompts(self, index: Tensor) -> list[str]:
        return [self.texts[i] for i in index.tolist()]

    @torch.no_grad()
    def __call__(self, index: Tensor) -> Condition:
        texts, device = self.prompts(index), self.pipeline.unet.device
        if not self.is_xl:
            given, null = self.pipeline.encode_prompt(texts, device, 1, True)[:2]
            return Condition({"encoder_hidden_states": given}, {"encoder_hidden_states": null})
        given, null, pooled, null_pooled = self.pipeline.encode_prompt(
            texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        size = (self.resolution, self.resolution)
        ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=given.dtype,
            text_encoder_projection_dim=self.pipeline.text_encoder_2.config.projection_dim,
        )  # fmt: skip
        ids = ids.to(device).repeat(len(texts), 1)
        return Condition(
            {"encoder_hidden_states": given, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}},
            {"encoder_hidden_states": null, "added_cond_kwargs": {"text_embeds": null_pooled, "time_ids": ids}},
        )


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError when there are none or it is not text."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"prompts file {path} is not UTF-8 text", hint="give one prompt a line") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"prompts file {path} is empty", hint="give one prompt a line")
    return found
