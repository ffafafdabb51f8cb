"""Multiply-adds per token, of a configuration and of a run.

    L (attention projections + 2 s d + load 3 d I + d (n + m)) + V d

with s the sequence length (scores and values, without halving for the causal mask). With s = 128 it gives the FLOPs
reductions of the paper's Table 1 (2406.13233) to the printed digit. All L layers count as plain attention and experts: a
model with dense or state-space layers among them, or with latent attention, is counted as it is by `measure_flops` only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adamoe.errors import ConfigError


def count_flops(
    config: Any, load: float, *, seq_len: int = 128, num_null_experts: int | None = None, lm_head: bool = True
) -> float:
    """Multiply-adds of one token's forward pass at a mean load.

    config: a model's configuration, or a mapping with its names. load: mean true experts per token.
    num_null_experts: m; the configuration's own when not given. lm_head: whether the output layer counts.

    Raises ConfigError when the configuration lacks a size, or load is negative.
    """
    if not 0 <= load < float("inf"):
        raise ConfigError(f"load is {load}, expected 0 or more true experts per token")
    if seq_len < 1:
        raise ConfigError(f"seq_len is {seq_len}, expected 1 or more")
    d = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads")
    head = _size(config, "head_dim", default=d // heads)
    kv = _size(config, "num_key_value_heads", default=heads)
    inner = _size(config, "moe_intermediate_size", "intermediate_size")
    n = _size(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    own = _get(config, "adamoe") or {}
    m = own.get("num_null_experts", 0) if num_null_experts is None else num_null_experts
    shared = _size(config, "shared_expert_intermediate_size", default=0)
    shared += inner * _size(config, "n_shared_experts", "moe_num_shared_experts", default=0)
    attention = 2 * d * heads * head + 2 * d * kv * head + 2 * seq_len * heads * head
    layer = attention + load * 3 * d * inner + 3 * d * shared + d * (n + m)
    return _size(config, "num_hidden_layers") * layer + (_size(config, "vocab_size") * d if lm_head else 0)


def flops_reduction(config: Any, load: float, *, num_null_experts: int, seq_len: int = 128) -> float:
    """Share of a token's multiply-adds saved against the stock model, in [0, 1); for the other arguments see there."""
    before = count_flops(config, _size(config, "num_experts_per_tok", "moe_k"), seq_len=seq_len, num_null_experts=0)
    return 1.0 - count_flops(config, load, seq_len=seq_len, num_null_experts=num_null_experts) / before


@dataclass(frozen=True)
class MeasuredFlops:
    """What a real forward pass multiplied."""

    total: float
    """Multiply-adds per token of everything."""
    experts: float
    """Those of the true expert pairs."""
    load: float
    """Mean true experts per token."""


def measure_flops(model: Any, input_ids: Any) -> MeasuredFlops:
    """Count one forward pass of a converted model with torch's own counter. input_ids: (B, S).

    The counter sees every product; null slots have none, so the pairs' part follows the load.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from adamoe.conversion import base_of
    from adamoe.records import record_load

    base = base_of(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, record_load(model) as record:
        model(input_ids=input_ids)
    tokens = input_ids.numel()
    d, inner = _size(base.config, "hidden_size"), _size(base.config, "moe_intermediate_size", "intermediate_size")
    pairs = float(record.per_token.sum())
    return MeasuredFlops(counter.get_total_flops() / 2 / tokens, pairs * 3 * d * inner / tokens, record.mean)


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _size(config: Any, *names: str, default: int | None = None) -> int:
    for name in names:
        value = _get(config, name)
        if isinstance(value, int) and value >= 0:
            return value
    if default is None:
        raise ConfigError(
            f"the model's configuration has no {' or '.join(names)}", hint="give a mixture-of-experts one"
        )
    return default
