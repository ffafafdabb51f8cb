"""Which experts a token gets, and with what weights (2406.13233, section 3.2).

Shapes: T tokens, n true experts, m null experts, K selected. The set S is the top-K of all n + m scores, a null losing
every tie. A true expert i in S has weight p_i / sum over the true experts in S; a null slot has weight exactly 0 and the
index n, which the expert layers of transformers read as "no expert".
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamoe.config import Normalization, WeightGradient
from adamoe.errors import ConfigError

Score = Literal["softmax", "sigmoid", "sparsemixer"]


@dataclass
class Routing:
    """One layer's decision."""

    logits: Tensor
    """(T, n + m)"""
    weights: Tensor
    """(T, K), 0 at null slots (for identity nulls: their weight)"""
    index: Tensor
    """(T, K), in [0, n]; n is "no expert" """
    selected: Tensor
    """(T, K), in [0, n + m): the same with the nulls told apart"""

    def load(self, num_experts: int) -> Tensor:
        """True experts of each token, (T,)."""
        return (self.index < num_experts).sum(-1)


def selection_scores(
    logits: Tensor, num_experts: int, *, score: Score = "softmax", null_bias: Tensor | float = 0.0,
    correction: Tensor | None = None, groups: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """What the top-K is taken of, (T, n + m) float32.

    logits: (T, n + m). null_bias: added to every null's score: a load below the trained one with a positive value.
    correction: (n + m,), added to the scores (not the logits) for selection only. groups: (number, chosen); experts outside
    the chosen groups are out, and so are the nulls at the places of their copies.

    A null's score is the next float below its own value: a copy never displaces the expert it was copied from, on any
    device, though the order of ties in `torch.topk` is unspecified.
    """
    n = num_experts
    z = logits.float()
    if score == "sigmoid":
        z = z.sigmoid()
    elif correction is not None:
        z = (z - z[:, :n].logsumexp(-1, keepdim=True)).exp()
    if correction is not None:
        z = z + correction.float()
    true = z[:, :n]
    infinity = torch.full((), -torch.inf, device=z.device)
    null = torch.nextafter(z[:, n:] + null_bias, infinity)
    if groups is not None and groups[1] < groups[0]:
        grouped = true.view(-1, groups[0], n // groups[0])
        # A correction comes with the sum of the two best experts of a group, its absence with the best one.
        value = grouped.topk(2, -1)[0].sum(-1) if correction is not None else grouped.amax(-1)
        chosen = torch.zeros_like(value, dtype=torch.bool).scatter_(1, value.topk(groups[1], -1)[1], True)
        allowed = chosen.repeat_interleave(n // groups[0], -1)
        true = true.masked_fill(~allowed, -torch.inf)
        if m := null.shape[-1]:
            null = null.masked_fill(~allowed.repeat(1, -(-m // n))[:, :m], -torch.inf)
    return torch.cat((true, null), -1)


def route(
    logits: Tensor, num_experts: int, top_k: int, *, score: Score = "softmax", normalization: Normalization = "selected_true",
    weight_gradient: WeightGradient = "true_only", null_bias: Tensor | float = 0.0, correction: Tensor | None = None,
    groups: tuple[int, int] | None = None, identity: bool = False, scaling: float = 1.0, floor: float | None = None,
    jitter: float = 0.0, original_top_k: int | None = None,
) -> Routing:  # fmt: skip
    """Route T tokens.

    logits: (T, n + m), the m last for the nulls. num_experts: n. top_k: K.
    normalization: "selected_true" divides by the sum over the chosen true experts, "all_true" is the softmax over the n
    true experts, "selected_all" divides by the sum over all K chosen, "none" is the softmax over all n + m.
    identity: null slots keep their weight (for nulls that return the token). scaling: multiplies the weights.
    floor: smallest divisor. jitter: the threshold of "sparsemixer". original_top_k: k0 of the stock router, whose choice
    among true experts of equal score is then ours too: in bfloat16 such ties are common.
    For null_bias, correction and groups see `selection_scores`.

    Raises ConfigError when K is below 1 or above n + m.
    """
    n, total = num_experts, logits.shape[-1]
    if not 1 <= top_k <= total:
        raise ConfigError(f"top_k is {top_k} with {n} true and {total - n} null experts", hint=f"take 1 to {total}")
    with torch.no_grad():
        scores = selection_scores(logits, n, score=score, null_bias=null_bias, correction=correction, groups=groups)
        if original_top_k is not None and original_top_k < n:
            # The order of ties in topk is unspecified but fixed for one input; a float above moves none past a better one.
            stock = scores[:, :n].topk(original_top_k, -1)[1]
            scores.scatter_(-1, stock, torch.nextafter(scores.gather(-1, stock), scores.new_tensor(torch.inf)))
        best, selected = scores.topk(top_k, -1)
    # An expert outside the chosen groups is none, also where K is more than they hold.
    is_true = (selected < n) & (best > -torch.inf)
    index = torch.where(is_true, selected, n)
    over_all = normalization in ("selected_all", "none") or identity
    if score == "sparsemixer":
        weights = _sparsemixer(logits[:, :n].float(), top_k, jitter).gather(-1, (is_true.cumsum(-1) - 1).clamp_min(0))
        weights = weights * is_true
    else:
        weights = _weights(logits, n, selected, score, over_all)
        kept = weights if identity else weights * is_true
        if normalization in ("selected_true", "selected_all"):
            divisor = (weights if over_all else kept).sum(-1, keepdim=True)
            weights = kept / divisor.clamp_min(torch.finfo(kept.dtype).tiny if floor is None else floor)
        else:
            weights = kept
        if weight_gradient == "straight_through":
            everything = _weights(logits, n, selected, score, True)
            everything = everything / everything.sum(-1, keepdim=True)
            everything = everything if identity else everything * is_true
            weights = everything + (weights - everything).detach()
            weights = weights if identity else weights * is_true
    if scaling != 1.0:
        weights = weights * scaling
    return Routing(logits, weights, index, selected)


def _weights(logits: Tensor, n: int, selected: Tensor, score: Score, over_all: bool) -> Tensor:
    """Scores at the selected places, (T, K); over the n true experts unless `over_all` (null places are then arbitrary)."""
    z = logits.float()
    if score == "sigmoid":
        return z.sigmoid().gather(-1, selected)
    if over_all:
        return z.softmax(-1).gather(-1, selected)
    return z[:, :n].softmax(-1).gather(-1, selected.clamp_max(n - 1))


def _sparsemixer(z: Tensor, top_k: int, jitter: float) -> Tensor:
    """PhiMoE's weights in evaluation: the r-th best expert's share of a softmax from which the better ones, and those far
    below it, are struck out (2409.12136). Returns (T, min(K, n)), best first."""
    weights, left = [], z
    for _ in range(min(top_k, z.shape[-1])):
        best, place = left.max(-1, keepdim=True)
        far = (best - z) / z.abs().clamp(min=best) > 2 * jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, place))
        left = left.scatter(-1, place, -torch.inf)
    return torch.cat(weights, -1)


def expert_load(index: Tensor, num_experts: int, *, attention_mask: Tensor | None = None) -> Tensor:
    """Mean number of true experts per token, a scalar.

    index: (T, K) as a router returns it. attention_mask: (batch, tokens) or (T,), 0 at padding.
    """
    load = (index < num_experts).sum(-1).float()
    if attention_mask is None:
        return load.mean()
    mask = attention_mask.reshape(-1).to(load)
    return (load * mask).sum() / mask.sum().clamp_min(1)
