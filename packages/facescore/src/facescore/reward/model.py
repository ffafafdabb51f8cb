"""The reward model of ImageReward (2304.05977) and FaceScore (2406.17100).

    v = ViT(pixels)                      (batch, patches + 1, vision_width), all tokens kept
    s = BERT(prompt, cross-attending v)  (batch, tokens, text_width), encoder mode: no causal mask
    r = head(s[:, 0])                    (batch,)

FaceScore asks about a face crop with the prompt "A face."; ImageReward about an image with the prompt it was made from, and
shifts and scales r. The head is five linear layers *without* activations, so at inference it is one affine map.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor, nn
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

IMAGE_REWARD_MEAN = 0.16717362830052426
IMAGE_REWARD_STD = 1.0333394966054072


@dataclass(frozen=True)
class RewardModelConfig:
    """Sizes of a reward model; the defaults are those of the published checkpoints."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_depth: int = 24
    vision_heads: int = 16
    vision_mlp: int = 4096
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    vocabulary: int = 30524
    positions: int = 512
    head_widths: tuple[int, ...] = (1024, 128, 64, 16, 1)
    text_dropout: float = 0.1
    prompt_ids: tuple[int, ...] = (101, 1037, 2227, 1012, 102)
    """Tokens of the model's own prompt; the default is "[CLS] a face . [SEP]" of bert-base-uncased."""
    pad_to: int = 35
    """Prompts are padded and cut to this many tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_widths", tuple(self.head_widths))
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        if self.vision_width % self.vision_heads or self.text_width % self.text_heads:
            raise UserError(
                f"widths {self.vision_width} and {self.text_width} do not divide into "
                f"{self.vision_heads} and {self.text_heads} heads"
            )
        if self.image_size % self.patch_size:
            raise UserError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RewardModelConfig":
        """Raises UserError for a field that is not one of ours."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"unknown fields in the reward model's config: {', '.join(unknown)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RewardHead(nn.Module):
    """Five linear layers with dropout between and no activation, under the names of the published checkpoints."""

    def __init__(self, width: int, widths: Sequence[int]):
        super().__init__()
        ins = (width, *widths[:-1])
        linear = [nn.Linear(i, o) for i, o in zip(ins, widths, strict=True)]
        first, second, third, fourth, last = linear
        drops = (nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1))
        self.layers = nn.Sequential(first, drops[0], second, drops[1], third, drops[2], fourth, last)
        for layer in linear:  # the width of the feature for every layer, as in the original
            nn.init.normal_(layer.weight, std=1 / (width + 1))
            nn.init.zeros_(layer.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """(batch, width) to (batch,)."""
        return self.layers(feature).squeeze(-1)


class RewardModel(nn.Module):
    """Pixels and a prompt to one number, un-normalised.

    `unused` keeps the tensors of an official checkpoint that the reward never touches, so that it exports back whole.
    """

    def __init__(self, config: RewardModelConfig | None = None):
        super().__init__()
        self.config = c = config or RewardModelConfig()
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=c.vision_width,
                intermediate_size=c.vision_mlp,
                num_hidden_layers=c.vision_depth,
                num_attention_heads=c.vision_heads,
                image_size=c.image_size,
                patch_size=c.patch_size,
                layer_norm_eps=1e-6,  # the default, 1e-5, moves the tokens by 2e-4
                attn_implementation="eager",
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=c.vocabulary,
                hidden_size=c.text_width,
                encoder_hidden_size=c.vision_width,
                intermediate_size=c.text_mlp,
                num_hidden_layers=c.text_depth,
                num_attention_heads=c.text_heads,
                max_position_embeddings=c.positions,
                layer_norm_eps=1e-12,
                hidden_dropout_prob=c.text_dropout,
                attention_probs_dropout_prob=c.text_dropout,
                is_decoder=True,  # only so that the cross-attention layers exist
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
                sep_token_id=None,
                attn_implementation="eager",
            ),
            add_pooling_layer=False,
        )
        self.head = RewardHead(c.text_width, c.head_widths)
        self.unused: dict[str, Tensor] = {}

    def tokens(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids, padded and cut to `config.pad_to`, and their attention mask, both (batch, tokens)."""
        length = self.config.pad_to
        device = self.head.layers[0].weight.device
        rows = [[*row[:length], *[0] * (length - len(row))] for row in map(list, ids)]
        mask = [[int(i < len(row)) for i in range(length)] for row in map(list, ids)]
        return torch.tensor(rows, device=device), torch.tensor(mask, device=device)

    def vision_tokens(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, S, S) normalised pixels to (batch, patches + 1, vision_width)."""
        return self.vision(pixel_values=pixel_values).last_hidden_state

    def feature(self, vision_tokens: Tensor, ids: Sequence[Sequence[int]] | None = None) -> Tensor:
        """The text encoder's state at position 0, (batch, text_width). ids: a prompt per image; the model's own if None."""
        if ids is None:
            ids = [self.config.prompt_ids] * len(vision_tokens)
        input_ids, mask = self.tokens(ids)
        seen = vision_tokens.new_ones(vision_tokens.shape[:2], dtype=torch.long)
        states = self.text(
            input_ids=input_ids,
            attention_mask=mask,
            encoder_hidden_states=vision_tokens,
            encoder_attention_mask=seen,
            is_decoder=False,
        ).last_hidden_state
        feature = states[:, 0]
        return feature.float() if feature.dtype in (torch.float16, torch.bfloat16) else feature

    def forward(self, pixel_values: Tensor, ids: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Rewards (batch,) of normalised pixels (batch, 3, S, S); differentiable. Raises UserError on a wrong shape."""
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise UserError(f"pixel_values of shape {tuple(pixel_values.shape)}, expected (batch, 3, {size}, {size})")
        return self.head(self.feature(self.vision_tokens(pixel_values), ids))

    @torch.no_grad()
    def collapse_head(self) -> tuple[Tensor, Tensor]:
        """The head at inference as one affine map: weight (text_width,) and bias (), so r = weight @ feature + bias."""
        weight, bias = None, None
        for layer in self.head.layers:
            if not isinstance(layer, nn.Linear):
                continue
            w, b = layer.weight.double(), layer.bias.double()
            weight, bias = (w, b) if weight is None else (w @ weight, w @ bias + b)
        assert weight is not None and bias is not None
        dtype = self.head.layers[0].weight.dtype
        return weight[0].to(dtype), bias[0].to(dtype)


def normalize_reward(reward: Tensor) -> Tensor:
    """ImageReward's published scale: (r - 0.1672) / 1.0333."""
    return (reward - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD
