"""Self-attention with quantisers at the five places where spikes flow: q, k, v, probabilities, context.

    q, k, v -> quantise;  p = quantise(softmax(scale * q k^T + mask));  context = quantise(p v)      (2406.03470, SESA)

`AttentionCore` is the mathematics; `TimmAttention` and `MultiheadAttention` take the place of the two library modules that
compute attention inside themselves; transformers models call the core through their own attention interface.
Shapes: B batch, H heads, N tokens (M keys), D head width, C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from spikezip.errors import QuantizationError
from spikezip.qann.quantizer import Quantizer, bounds


def product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a @ b, the scale folded into a. a: (..., M, K). b: (..., K, P)."""
    return torch.matmul(a if scale == 1.0 else a * scale, b)


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax over the last dimension of scores + mask. mask: additive, broadcastable to scores."""
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)


class Product(nn.Module):
    """`product` as a module, so that an engine can put a spiking product in its place."""

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return product(a, b, scale)


class MaskedSoftmax(nn.Module):
    """`masked_softmax` as a module, for the same reason."""

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return masked_softmax(scores, mask)


class AttentionCore(nn.Module):
    """The quantised product of queries, keys and values.

    levels: of the five quantisers. context_symmetric: False reproduces the official language branch, which clips every
    negative context value.
    """

    def __init__(self, levels: int, *, context_symmetric: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.quan_q = Quantizer(*bounds(levels, True))
        self.quan_k = Quantizer(*bounds(levels, True), parallel=True)
        self.quan_v = Quantizer(*bounds(levels, True), parallel=True)
        self.attn_quan = Quantizer(*bounds(levels, False))
        self.after_attn_quan = Quantizer(*bounds(levels, context_symmetric))
        self.qk, self.softmax, self.pv = Product(), MaskedSoftmax(), Product()
        self.attn_drop = nn.Dropout(dropout)

    def attend(self, q: Tensor, k: Tensor, *, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Context (B, H, N, D) of q (B, H, N, D), k and v (B, H, M, D). mask: additive, broadcastable to (B, H, N, M)."""
        q, k, v = self.quan_q(q), self.quan_k(k), self.quan_v(v)
        probabilities = self.attn_quan(self.softmax(self.qk(q, k.transpose(-2, -1), scale), mask))
        return self.after_attn_quan(self.pv(self.attn_drop(probabilities), v))


class TimmAttention(AttentionCore):
    """In place of `timm.layers.attention.Attention`, with the official checkpoints' names; input and output (B, N, C)."""

    def __init__(self, source: Any, *, levels: int, attn_levels: int) -> None:
        super().__init__(attn_levels, dropout=source.attn_drop.p)
        if source.gate is not None:
            raise QuantizationError("gated attention is not supported", hint="pass a model without gated=True")
        self.num_heads, self.head_dim, self.scale = source.num_heads, source.head_dim, float(source.scale)
        self.qkv, self.q_norm, self.k_norm = source.qkv, source.q_norm, source.k_norm
        self.norm, self.proj, self.proj_drop = source.norm, source.proj, source.proj_drop
        self.quan_proj = Quantizer(*bounds(levels, True))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mask = _additive(attn_mask, x.dtype)
        if is_causal:
            mask = x.new_full((tokens, tokens), -torch.inf).triu(1)
        context = self.attend(self.q_norm(q), self.k_norm(k), v=v, scale=self.scale, mask=mask)
        context = self.norm(context.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        return self.quan_proj(self.proj_drop(self.proj(context)))


class MultiheadAttention(AttentionCore):
    """In place of `nn.MultiheadAttention`, self-attention only; the same call, `(output, None)` back.

    Raises QuantizationError for cross-attention, `add_bias_kv` and `add_zero_attn`.
    """

    def __init__(self, source: nn.MultiheadAttention, *, levels: int, attn_levels: int) -> None:
        super().__init__(attn_levels, dropout=source.dropout)
        if source.in_proj_weight is None or source.bias_k is not None or source.add_zero_attn:
            raise QuantizationError(
                "nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn is not supported"
            )
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.batch_first = source.batch_first
        # nn.TransformerEncoderLayer reads these to see whether its fused path may go round this module; it may not.
        self._qkv_same_embed_dim, self.in_proj_bias = False, None
        self.qkv = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=source.in_proj_bias is not None)
        self.qkv.weight = source.in_proj_weight
        if source.in_proj_bias is not None:
            self.qkv.bias = source.in_proj_bias
        # A plain Linear: the library's own subclass exists only to be named in an error message.
        self.proj = nn.Linear(self.embed_dim, self.embed_dim, bias=source.out_proj.bias is not None)
        self.proj.weight, self.proj.bias = source.out_proj.weight, source.out_proj.bias
        self.quan_proj = Quantizer(*bounds(levels, True))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if key is not query or value is not query:
            raise QuantizationError("nn.MultiheadAttention is called with three different inputs (cross-attention)")
        x = query if self.batch_first else query.transpose(0, 1)
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mask = _additive(attn_mask, x.dtype, inverted=True)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(batch, self.num_heads, tokens, tokens)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, x.dtype, inverted=True).view(batch, 1, 1, tokens)  # type: ignore[union-attr]
            mask = padding if mask is None else mask + padding
        context = self.attend(q, k, v=v, scale=self.head_dim**-0.5, mask=mask)
        out = self.quan_proj(self.proj(context.transpose(1, 2).reshape(batch, tokens, channels)))
        return (out if self.batch_first else out.transpose(0, 1)), None


def _additive(mask: Tensor | None, dtype: torch.dtype, inverted: bool = False) -> Tensor | None:
    """A mask as numbers to add. inverted: True marks what is hidden, the convention of nn.MultiheadAttention."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    hidden = mask if inverted else ~mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(hidden, -torch.inf)


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that a quantised transformers model runs; query, key, value (B, H, N, D)."""
    core = getattr(module, "spike_core", None)
    if core is None:
        raise QuantizationError(
            f"{type(module).__name__} runs the quantised attention but has no quantisers",
            hint="quantize() supports self-attention with query, key and value projections",
        )
    if key.shape[1] != query.shape[1]:
        raise QuantizationError(f"{type(module).__name__} shares keys between heads, which is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    context = core.attend(query, key, v=value, scale=scale, mask=attention_mask)
    return context.transpose(1, 2).contiguous(), None


def register_with_transformers() -> None:
    """Make `transformers_attention` known to transformers as the attention implementation "spikezip"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("spikezip", transformers_attention)
    AttentionMaskInterface.register("spikezip", eager_mask)
