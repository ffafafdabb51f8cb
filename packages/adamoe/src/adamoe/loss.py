"""The load-balancing loss with nulls (2406.13233, eq. 6) and the schedule of its coefficient.

Per layer, over the T tokens that are not padding, with f_i the share of tokens that selected expert i and P_i its mean
probability:

    f'_i = f_i for true experts, f'_j = mean of f over the nulls
    l = (n + m) sum_i f'_i P_i

f carries no gradient. With K selected, l = K at perfect balance.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adamoe.config import AdaMoEConfig, Balance, Reduction
from adamoe.routing import Score, selection_scores


def load_balancing_loss(
    router_logits: Sequence[Tensor] | Tensor, num_experts: int, *, top_k: int, attention_mask: Tensor | None = None,
    balance: Balance = "null_average", aux_reduction: Reduction = "per_layer",
    selected: Sequence[Tensor] | None = None, score: Score = "softmax",
) -> Tensor:  # fmt: skip
    """Eq. 6 for the layers' logits; a scalar.

    router_logits: (T, n + m) of every layer, or of one. num_experts: n. top_k: K.
    attention_mask: (batch, tokens) or (T,), 0 at padding, which counts neither in f nor in P.
    balance: "individual" leaves every null its own f. aux_reduction: "per_layer" is the mean of the layers' losses;
    "pooled" adds f and P over the layers first, as transformers does, and lets layers make up for each other.
    selected: (T, K) of every layer, in [0, n + m), where it is not the top-K of the logits (a bias, groups of experts).
    score: "sigmoid" makes P from normalised sigmoids.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    n, total = num_experts, layers[0].shape[-1]
    shares, probabilities = [], []
    for i, logits in enumerate(layers):
        logits = logits.to(layers[0].device)
        with torch.no_grad():
            chosen = selected[i] if selected else selection_scores(logits, n, score=score).topk(top_k, -1)[1]
            counts = torch.zeros(logits.shape, device=logits.device).scatter_(-1, chosen.to(logits.device), 1.0)
        z = logits.float()
        p = z.softmax(-1) if score != "sigmoid" else z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
        if attention_mask is None:
            f, P = counts.mean(0), p.mean(0)
        else:
            mask = attention_mask.reshape(-1, 1).to(p)
            f, P = (counts * mask).sum(0) / mask.sum().clamp_min(1), (p * mask).sum(0) / mask.sum().clamp_min(1)
        if balance == "null_average" and total > n:
            f = torch.cat((f[:n], f[n:].mean().expand(total - n)))
        shares.append(f)
        probabilities.append(P)
    f, P = torch.stack(shares), torch.stack(probabilities)
    if aux_reduction == "pooled":
        return total * (f.mean(0) * P.mean(0)).sum()
    return total * (f * P).sum(-1).mean()


def aux_coefficient(config: AdaMoEConfig, progress: float) -> float:
    """The coefficient at `progress` in [0, 1] of training (section 3.3: two stages)."""
    first, last = config.aux_coef
    if progress < config.anneal_at:
        return first
    if config.anneal == "step":
        return last
    t = min(1.0, (progress - config.anneal_at) / max(1.0 - config.anneal_at, 1e-12))
    if config.anneal == "cosine":
        t = 0.5 - 0.5 * math.cos(math.pi * t)
    return first + (last - first) * t
