"""A world in which the best possible denoiser is known in closed form, and the bias of every prompt is planted.

A bank of images mu_i and a prior pi(i | prompt) give

    E[x_0 | x_t, prompt] = sum_i w_i mu_i,   w = softmax_i( log pi_i + (a_t <x_t, mu_i> - a_t^2 |mu_i|^2 / 2) / s_t^2 )

with x_t = a_t x_0 + s_t noise. A sampler with this denoiser draws from pi, so every deviation is the schedule's doing. The
shapes are coarse and of high contrast, the textures fine and of low contrast: shapes are settled early, textures late.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from PIL import Image
from torch import nn

from lcmis_align.concepts import Concept, ConceptPlan
from lcmis_align.worlds.parts import assemble, named_word, word_tokenizer

SHAPES, TEXTURES = ("circle", "square", "cross"), ("solid", "bars", "checker")
TONES, CENTRES, SIZE = (0.1, 0.5), ((6.5, 6.5), (6.5, 7.5), (7.5, 6.5), (7.5, 7.5)), 16
BANKS = {"low contrast": 0.22, "lower contrast": 0.16}
"""Name of a bank to the strength of its textures."""
PRIORS = {".95/.03/.02": (0.95, 0.03, 0.02), ".975/.02/.005": (0.975, 0.02, 0.005), ".88/.02/.10": (0.88, 0.02, 0.10)}
"""Of "checker square": mass on circle with checker, square with checker, square with another texture."""
WORDS = (*SHAPES, *TEXTURES)
FLOOR = 1e-12
HIDDEN = "circle"


def bank(texture: float = 0.22) -> torch.Tensor:
    """The images mu, (shape, texture, tone and centre, 16, 16), in -1..1. texture: its strength."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    fields = {"solid": 0 * y, "bars": np.where(y % 4 < 2, 1.0, -1.0), "checker": (-1.0) ** (x // 2 + y // 2)}
    images = np.full((3, 3, len(TONES) * len(CENTRES), SIZE, SIZE), -0.9)
    for i, (tone, (cy, cx)) in enumerate((tone, centre) for tone in TONES for centre in CENTRES):
        dx, dy = np.abs(x - cx), np.abs(y - cy)
        cross = ((dx <= 1.6) & (dy <= 6.6)) | ((dy <= 1.6) & (dx <= 6.6))
        for s, mask in enumerate([dx**2 + dy**2 <= 30, (dx <= 5.6) & (dy <= 5.6), cross]):
            for t, name in enumerate(TEXTURES):
                images[s, t, i] = np.where(mask, tone + texture * fields[name], -0.9)
    return torch.from_numpy(images).float()


def prior(prompt: str, masses: Sequence[float]) -> torch.Tensor:
    """log pi(shape, texture | prompt), (9,); every kind of image has mass, be it 1e-12.

    masses: of the joined prompt, as in PRIORS. The words in `prompt` decide; one that names nothing gives even masses.
    """
    words = prompt.split()
    shape = next((w for w in words if w in SHAPES), None)
    texture = next((w for w in words if w in TEXTURES), None)
    pi = torch.zeros(3, 3, dtype=torch.float64)
    if shape and texture:
        s, t = SHAPES.index(shape), TEXTURES.index(texture)
        others = [i for i in range(3) if i != t]
        pi[SHAPES.index(HIDDEN), t] += masses[0]
        pi[s, t] += masses[1]
        pi[s, others] += masses[2] / 2
    elif shape:
        pi[SHAPES.index(shape)] = torch.tensor([0.49, 0.49, 0.02])
    elif texture:
        t = TEXTURES.index(texture)
        pi[SHAPES.index(HIDDEN), t] = 0.98
        pi[1:, t] = 0.01
    else:
        pi += 1 / 9
    return (pi.flatten() + FLOOR).log().float()


class PriorEncoder(nn.Module):
    """Stands for a text encoder: from token ids to log pi, (batch, 1, 9)."""

    def __init__(self, masses: Sequence[float]):
        super().__init__()
        self.masses, self.words = masses, tokenizer()
        self.config = SimpleNamespace(use_attention_mask=False)
        self.unused = nn.Parameter(torch.zeros(1))

    @property
    def dtype(self) -> torch.dtype:
        return self.unused.dtype

    @property
    def device(self) -> torch.device:
        return self.unused.device

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        prompts = self.words.batch_decode(ids, skip_special_tokens=True)
        return (torch.stack([prior(prompt, self.masses) for prompt in prompts])[:, None],)


class ExactDenoiser(ModelMixin, ConfigMixin):
    """E[x_0 | x_t, prompt] with the call of a UNet; `encoder_hidden_states` is log pi, (batch, 1, 9)."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, texture: float = 0.22, in_channels: int = 1, sample_size: int = SIZE):
        super().__init__()
        self.register_to_config(time_cond_proj_dim=None)
        images = bank(texture)
        self.register_buffer("images", images.flatten(3).flatten(0, 2))
        self.kinds = images.shape[0] * images.shape[1]
        self.register_buffer("alphas", scheduler().alphas_cumprod)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, return_dict: bool = True,
        **unused: Any,
    ) -> Any:  # fmt: skip
        """sample: (batch, 1, 16, 16). Returns the expected clean image, of the same shape."""
        a2 = self.alphas[torch.as_tensor(timestep).long().reshape(-1)].reshape(-1, 1)
        each = self.images.shape[0] // self.kinds
        log_prior = encoder_hidden_states.flatten(1).repeat_interleave(each, dim=1) - math.log(each)
        match = a2.sqrt() * sample.flatten(1) @ self.images.T - a2 * self.images.square().sum(1) / 2
        weights = (log_prior + match / (1 - a2)).softmax(-1)
        output = (weights @ self.images).reshape(sample.shape)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


def tokenizer() -> Any:
    """Knows the shapes and the textures."""
    return word_tokenizer(WORDS, 8)


def scheduler() -> DDIMScheduler:
    """Predicts the clean image; the squared-cosine noise schedule."""
    return DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, steps_offset=1
    )


def load(*, bank: str = "low contrast", masses: str = ".95/.03/.02") -> Any:
    """The world as a Stable Diffusion pipeline. bank: of BANKS. masses: of PRIORS."""
    return assemble(ExactDenoiser(BANKS[bank]), PriorEncoder(PRIORS[masses]), tokenizer(), scheduler())


def look(images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the shape and of the texture of each image: those of the nearest ideal image of any bank."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("L"), dtype=np.float32) for image in images]))
    ideal = torch.cat([bank(texture).flatten(3) for texture in BANKS.values()], dim=2)
    nearest = torch.cdist(pixels.flatten(1) / 127.5 - 1, ideal.flatten(0, 2)).argmin(1) // ideal.shape[2]
    return nearest // 3, nearest % 3


def exact_scores(images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """The exact judge as a scorer: 1 where the image shows the shape or texture that the text names, else 0.

    Raises ScorerError for a text that names none.
    """
    shape, texture = look(images)
    named = [named_word(text, WORDS) for text in texts]
    columns = [shape == SHAPES.index(w) if w in SHAPES else texture == TEXTURES.index(w) for w in named]
    return torch.stack(columns, dim=1).float()


def plan(shape: str) -> ConceptPlan:
    """The misaligned prompt: "checker square" or "checker cross", with the circle that nobody mentions."""
    return ConceptPlan(Concept(shape), Concept("checker"), f"checker {shape}", latent=HIDDEN)
