"""What the tuner needs of a diffusion pipeline, for the pipelines there are.

Stable Diffusion and SDXL (a U-Net, epsilon- or v-prediction), Stable Diffusion 3 (a transformer, flow), and pipelines
without a VAE that offer `encode_image`, `decode_latents` and `encode_prompt` themselves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tenfold_shared.errors import UserError
from torch import Tensor, nn

from facescore.refine.losses import NoiseSchedule

Condition = dict[str, Tensor]
"""Keyword arguments of the denoiser, one row per prompt."""


class Backbone:
    """A pipeline seen as: images to latents, prompts to conditions, a denoiser, latents to pixels."""

    part = "unet"

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.schedule = NoiseSchedule.of(pipe.scheduler)

    @property
    def module(self) -> nn.Module:
        return getattr(self.pipe, self.part)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of one size to latents (n, c, h, w): the mean of the VAE's posterior, on the denoiser's scale."""
        vae = self.pipe.vae
        pixels = torch.stack([to_pixels(i) for i in images]).to(vae.device, vae.dtype) * 2 - 1
        latents = vae.encode(pixels).latent_dist.mode()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels (n, 3, H, W) in [0, 1], differentiable."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """size: width and height of the pictures, which SDXL is told."""
        embeds = self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0]
        return {"encoder_hidden_states": embeds}

    def predict(self, module: nn.Module, z: Tensor, index: Tensor, condition: Condition) -> Tensor:
        """The denoiser's answer for latents at training-time indices (n,). module: `self.module`, or its wrapped self."""
        times = self.schedule.times.to(z.device)[index.to(z.device)]
        return module(z.to(self.dtype), times, **self.arguments(condition)).sample.to(
            torch.promote_types(self.dtype, torch.float32)
        )

    def arguments(self, condition: Condition) -> dict[str, Any]:
        return dict(condition)

    def save_lora(self, folder: Path, layers: dict[str, Tensor]) -> None:
        """Write LoRA layers so that `pipe.load_lora_weights(folder)` reads them."""
        self.pipe.save_lora_weights(folder, **{f"{self.part}_lora_layers": layers})


class SDXL(Backbone):
    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        width, height = size
        ids = torch.tensor(
            [[height, width, 0, 0, height, width]] * len(prompts), device=self.device, dtype=embeds.dtype
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids}

    def arguments(self, condition: Condition) -> dict[str, Any]:
        added = {name: condition[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": condition["encoder_hidden_states"], "added_cond_kwargs": added}


class SD3(Backbone):
    part = "transformer"

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        texts = list(prompts)
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=texts, prompt_2=texts, prompt_3=texts, device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, module: nn.Module, z: Tensor, index: Tensor, condition: Condition) -> Tensor:
        times = self.schedule.times.to(z.device)[index.to(z.device)]
        answer = module(hidden_states=z.to(self.dtype), timestep=times, **condition).sample
        return answer.to(torch.promote_types(self.dtype, torch.float32))


class Pixels(Backbone):
    """A pipeline without a VAE, which encodes images and prompts itself and says `vae_scale_factor`, pixels per latent."""

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        return self.pipe.encode_image(torch.stack([to_pixels(i) for i in images]).to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        return self.pipe.decode_latents(latents)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        return {"encoder_hidden_states": self.pipe.encode_prompt(list(prompts)).to(self.device)}


def backbone_of(pipe: Any) -> Backbone:
    """The view of a pipeline. Raises UserError for one whose denoiser is neither a U-Net nor SD3's transformer."""
    name = type(pipe).__name__
    if hasattr(pipe, "encode_image") and not getattr(pipe, "vae", None):
        return Pixels(pipe)
    if name.startswith("StableDiffusionXL"):
        return SDXL(pipe)
    if name.startswith("StableDiffusion3"):
        return SD3(pipe)
    if name.startswith("StableDiffusion") and getattr(pipe, "unet", None) is not None:
        return Backbone(pipe)
    raise UserError(f"cannot tune a {name}", hint="pass a Stable Diffusion 1, 2, XL or 3 pipeline")


def to_pixels(image: Image.Image) -> Tensor:
    """(3, h, w) in [0, 1]."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(image.convert("RGB")).float() / 255
