"""Preference learning on the one-jump prediction: scorers, and the hinge that trains on them (arXiv 2406.05768, stage 3)."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_model
from torch import Tensor, nn
from torch.nn import functional

log = logging.getLogger(__name__)

REWARDS = {
    "clip": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "aesthetic": "",
    "hpsv2": "xswu/HPSv2/HPS_v2.1_compressed.pt",
    "image-reward": "ImageReward-v1.0",
}
"""The scorers by name, and the model each loads unless told otherwise. The aesthetic head has no release in safetensors."""


class RewardModel(Protocol):
    """Any function of this form is a reward. It must be differentiable in the images."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Images (batch, 3, height, width) in [0, 1] and their prompts to one score per image (batch,)."""
        ...


class MissingRewardError(UserError, ImportError):
    """A reward model's library is not installed."""


class RewardLoss:
    """max(s_0 - s(x, c), 0) + max(s(x, c'), 0), where c' is another prompt of the batch.

    reward: the scorer. margin: s_0, above which a score no longer pulls. latents_to_images: the decoder; nothing is decoded
    when not given. mismatched: weight of the second term, for scores whose zero means "does not match", as MPS; 0 leaves it out.
    held_out: a scorer that is only watched. `window`: steps over which the two are compared.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        margin: float = 16.0,
        latents_to_images: Callable[[Tensor], Tensor] | None = None,
        mismatched: float = 0.0,
        held_out: RewardModel | None = None,
        window: int = 50,
    ):
        self.reward, self.margin, self.mismatched = reward, margin, mismatched
        self.latents_to_images, self.held_out, self.window = latents_to_images, held_out, window
        self.history: list[tuple[float, float]] = []
        """(trained, held-out) mean score of every call with `held_out`."""
        self.over_optimised = False

    def __call__(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """One loss per row (batch,). latents: the student's clean prediction (batch, ...)."""
        images = self.latents_to_images(latents) if self.latents_to_images else latents
        score = self._score(self.reward, images, prompts)
        loss = (self.margin - score).clamp_min(0)
        if self.mismatched:
            loss = loss + self.mismatched * self._score(self.reward, images, prompts[1:] + prompts[:1]).clamp_min(0)
        if self.held_out is not None:
            with torch.no_grad():
                self._watch(float(score.mean()), float(self._score(self.held_out, images, prompts).mean()))
        return loss

    @staticmethod
    def _score(reward: RewardModel, images: Tensor, prompts: list[str]) -> Tensor:
        score = reward(images, prompts)
        if score.shape != (len(images),):
            raise UserError(
                f"the reward gave {tuple(score.shape)}, expected one score for each of {len(images)} images"
            )
        return score

    def _watch(self, trained: float, held_out: float) -> None:
        self.history.append((trained, held_out))
        if self.over_optimised or len(self.history) < 2 * self.window:
            return
        first, last = (
            torch.tensor(self.history[: self.window]).mean(0),
            torch.tensor(self.history[-self.window :]).mean(0),
        )
        if last[0] > first[0] and last[1] < first[1]:
            self.over_optimised = True
            log.warning(
                "over-optimisation: the trained reward rose from %.4g to %.4g, the held-out one fell from %.4g to %.4g",
                first[0], last[0], first[1], last[1],
            )  # fmt: skip


class Mixture:
    """A weighted sum of rewards. weighted: (weight, reward) pairs."""

    def __init__(self, *weighted: tuple[float, RewardModel]):
        self.weighted = weighted

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.stack([weight * reward(images, prompts) for weight, reward in self.weighted]).sum(0)


class ClipReward(nn.Module):
    """Logit scale x cosine of a CLIP model of transformers. PickScore is such a model.

    model: hub id or folder. The image is resized and normalised here, with gradient.
    """

    def __init__(self, model: str, *, processor: str | None = None):
        super().__init__()
        from tenfold_shared.hub import load_tokenizer
        from transformers import CLIPModel

        self.clip = load_model(CLIPModel, model).requires_grad_(False).eval()
        self.tokenizer = load_tokenizer(processor or model)

    def image_features(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] to projected features (batch, dims)."""
        size = self.clip.config.vision_config.image_size
        answer = self.clip.get_image_features(pixel_values=clip_pixels(images, size).to(self.clip.dtype))
        return getattr(answer, "pooler_output", answer)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            answer = self.clip.get_text_features(**tokens.to(images.device))
        text = functional.normalize(getattr(answer, "pooler_output", answer), dim=1)
        image = functional.normalize(self.image_features(images), dim=1)
        return (self.clip.logit_scale.exp() * (image * text).sum(1)).float()


class AestheticReward(nn.Module):
    """A linear head on normalised CLIP image features, as the LAION aesthetic predictors have it.

    clip: hub id or folder. head: safetensors file with `weight` (1, dims) and `bias` (1,).
    """

    def __init__(self, clip: str, head: str):
        super().__init__()
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self.clip = ClipReward(clip)
        try:
            weights = load_file(head)
            weight, bias = weights["weight"], weights["bias"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{head} is not a head with weight and bias", hint="save it as safetensors") from error
        self.head = nn.Linear(weight.shape[1], 1).requires_grad_(False)
        self.head.load_state_dict({"weight": weight.view(1, -1), "bias": bias.view(1)})

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(functional.normalize(self.clip.image_features(images), dim=1).float()).squeeze(1)


class HPSv2Reward(nn.Module):
    """100 x cosine of HPS v2, a fine-tuned open_clip model (extra `rewards`).

    checkpoint: its .pt file, or "owner/name/file" on the hub.
    """

    def __init__(self, checkpoint: str, *, architecture: str = "ViT-H-14"):
        super().__init__()
        open_clip = _library("open_clip", "hpsv2", hint="pip install 'mlcm[rewards]'")
        file = _checkpoint(checkpoint)
        self.model = open_clip.create_model(architecture).requires_grad_(False).eval()
        try:
            self.model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
        except (OSError, KeyError, RuntimeError, UnpicklingError, EOFError) as error:
            raise UserError(f"{file} is no checkpoint of HPS v2 for {architecture} ({type(error).__name__})") from error
        self.size = self.model.visual.image_size[0]
        self.tokenizer = open_clip.get_tokenizer(architecture)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        image = self.model.encode_image(clip_pixels(images, self.size), normalize=True)
        text = self.model.encode_text(self.tokenizer(prompts).to(images.device), normalize=True)
        return 100 * (image * text).sum(1)


class ImageRewardModel:
    """ImageReward through its own library, whose `score_gard` is differentiable."""

    def __init__(self, name: str, *, device: str = "cpu"):
        self.model = _library(
            "ImageReward",
            "image-reward",
            hint="pip install image-reward; mlcm[rewards] leaves it out, as its last release is of 2023",
        ).load(name, device=device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.model.blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(images.device)
        return self.model.score_gard(tokens.input_ids, tokens.attention_mask, clip_pixels(images, 224)).squeeze(1)


def make_reward(name: str, *, model: str | None = None, device: str = "cpu") -> Any:
    """A scorer of `REWARDS`. model: hub id, folder or checkpoint in place of its own; "clip,head" for aesthetic.

    Raises UserError for an unknown name, MissingRewardError (an ImportError) when its library is not installed.
    """
    if name not in REWARDS:
        raise UserError(
            f"reward is '{name}', expected one of {', '.join(REWARDS)}", hint="or pass a function to train_reward"
        )
    source = model or REWARDS[name]
    if name == "clip":
        return ClipReward(source).to(device)
    if name == "pickscore":
        return ClipReward(source).to(device)
    if name == "aesthetic":
        if "," not in source:
            raise UserError(f"the aesthetic reward got '{source}', expected 'CLIP model,head.safetensors'")
        return AestheticReward(*source.split(",", 1)).to(device)
    if name == "hpsv2":
        return HPSv2Reward(source).to(device)
    return ImageRewardModel(source, device=device)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Images in [0, 1] as CLIP wants them, (batch, 3, size, size), with gradient."""
    images = functional.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    mean = images.new_tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = images.new_tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (images - mean) / std


def _checkpoint(source: str) -> Path:
    """A file here, or owner/name/file on the hub."""
    if Path(source).is_file():
        return Path(source)
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if not file or owner in ("", ".", "..", "~"):
        raise UserError(f"file '{source}' does not exist", hint="pass a checkpoint file, or owner/name/file of the hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:
        raise UserError(
            f"'{source}' is neither a file here nor reachable on the hub", hint="check the name and the network"
        ) from error


def _library(module: str, reward: str, *, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingRewardError(
            f"reward '{reward}' needs the library {module}, which is not installed", hint=hint
        ) from error
