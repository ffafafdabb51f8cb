"""From captions to the keyword arguments of a U-Net: prompts for Stable Diffusion 1.5 and XL, class labels, nothing."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

Condition = dict[str, Any]
"""Keyword arguments of a U-Net: tensors with the batch first, or one level of dictionaries of them."""


class Conditioner(Protocol):
    """What the trainer needs to know about conditioning."""

    def __call__(self, captions: Sequence[str | int]) -> Condition:
        """The condition of these captions."""

    def empty(self, n: int) -> Condition:
        """The condition that guidance leads away from, n times."""


class NoConditioner:
    """For a U-Net that takes nothing but the latent and the time."""

    def __call__(self, captions: Sequence[str | int]) -> Condition:
        return {}

    def empty(self, n: int) -> Condition:
        return {}


class ClassConditioner:
    """Class labels of a `UNet2DModel`.

    classes: number of labels. null: the label of "no class", when the teacher was trained with one; guidance needs it.
    """

    def __init__(self, classes: int, *, null: int | None = None, device: str | torch.device = "cpu"):
        self.classes, self.null, self.device = classes, null, device

    def __call__(self, captions: Sequence[str | int]) -> Condition:
        try:
            labels = torch.tensor([int(c) for c in captions], device=self.device)
        except ValueError as error:
            raise UserError(f"class labels expected, given {list(captions)[:3]}") from error
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.classes):
            raise UserError(f"class label outside 0 .. {self.classes - 1}")
        return {"class_labels": labels}

    def empty(self, n: int) -> Condition:
        if self.null is None:
            raise UserError("guidance needs a teacher with a label for no class", hint="set guidance: 1")
        return {"class_labels": torch.full((n,), self.null, device=self.device)}


class TextConditioner:
    """Prompts through the text encoders of a loaded pipeline; the last results are kept.

    pipe: StableDiffusionPipeline or StableDiffusionXLPipeline. size: pixels of the images' side, told to SDXL.
    """

    CACHE = 4096

    def __init__(self, pipe: Any, *, size: int | None = None):
        self.pipe = pipe
        self.is_xl = getattr(pipe, "text_encoder_2", None) is not None
        self.size = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
        self._known: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def _encode(self, prompt: str) -> list[Tensor]:
        if prompt not in self._known:
            if len(self._known) >= self.CACHE:
                self._known.pop(next(iter(self._known)))
            encoded = self.pipe.encode_prompt(
                prompt=prompt, device=self.pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            self._known[prompt] = [encoded[0], encoded[2]] if self.is_xl else [encoded[0]]
        return self._known[prompt]

    def __call__(self, captions: Sequence[str | int]) -> Condition:
        columns = [torch.cat(column) for column in zip(*(self._encode(str(c)) for c in captions), strict=True)]
        condition: Condition = {"encoder_hidden_states": columns[0]}
        if self.is_xl:
            times = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], dtype=columns[0].dtype)
            times = times.to(columns[0].device).expand(len(captions), 6)
            condition["added_cond_kwargs"] = {"text_embeds": columns[1], "time_ids": times}
        return condition

    def empty(self, n: int) -> Condition:
        if not self.is_xl or not self.pipe.config.get("force_zeros_for_empty_prompt", False):
            return self([""] * n)
        # SDXL was trained with zeros, not with the empty prompt's embedding.
        condition = self([""] * n)
        condition["encoder_hidden_states"] = torch.zeros_like(condition["encoder_hidden_states"])
        added = condition["added_cond_kwargs"]
        condition["added_cond_kwargs"] = {**added, "text_embeds": torch.zeros_like(added["text_embeds"])}
        return condition


def join(a: Condition, b: Condition) -> Condition:
    """Two conditions as one of the joint batch."""
    return {
        key: join(value, b[key]) if isinstance(value, dict) else torch.cat([value, b[key]]) for key, value in a.items()
    }


def conditioner_for(pipe: Any) -> Conditioner:
    """The conditioner of a loaded pipeline. Raises UserError when the kind is unknown."""
    if getattr(pipe, "text_encoder", None) is not None:
        return TextConditioner(pipe)
    classes = pipe.unet.config.get("num_class_embeds")
    if classes:
        return ClassConditioner(classes, device=pipe.unet.device)
    if "cross_attention_dim" in pipe.unet.config:
        raise UserError("the pipeline has no text encoder", hint="give the trainer a conditioner of your own")
    return NoConditioner()


def guidance_embedding(guidance: Tensor, dim: int = 256) -> Tensor:
    """ω as the student sees it through `timestep_cond`, the way diffusers' pipelines embed guidance_scale − 1.

    guidance: (batch). Returns (batch, dim), float32.
    """
    rates = torch.exp(
        torch.arange(dim // 2, device=guidance.device) * (-torch.log(torch.tensor(10000.0)).item() / (dim // 2 - 1))
    )
    angle = 1000 * (guidance.float() - 1)[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], 1)
