"""Other ways to give tokens different amounts of work, behind the interface of `route`, for comparisons.

Every router is a function (logits (T, n + m), n, K, **options) -> Routing. `use(model, router, **options)` puts one into a
converted model; None puts the model's own back. None of them is a library's: where no library packages a method, it is
written here from its paper.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adamoe.conversion import base_of, drop_extra, layer_routers
from adamoe.errors import ConfigError, ConversionError
from adamoe.routing import Routing, route, selection_scores


def topk(logits: Tensor, num_experts: int, top_k: int) -> Routing:
    """The stock rule: the K best true experts, whatever nulls there are."""
    return route(logits[:, :num_experts], num_experts, top_k)


def null(logits: Tensor, num_experts: int, top_k: int, **options: Any) -> Routing:
    """AdaMoE (2406.13233); options as for `route`."""
    return route(logits, num_experts, top_k, **options)


def top_p(logits: Tensor, num_experts: int, top_k: int, *, threshold: float = 0.5) -> Routing:
    """The fewest experts whose probabilities reach `threshold`, at most K (2403.07652).

    With null rows, the rule runs over true and null experts together, and nulls do nothing.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold is {threshold}, expected a probability above 0")
    p = logits.float().softmax(-1)
    best, selected = p.topk(min(top_k, p.shape[-1]), -1)
    kept = (best.cumsum(-1) - best < threshold) & (selected < num_experts)
    weights = best * kept
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return Routing(logits, weights, torch.where(kept, selected, num_experts), selected)


def expert_choice(logits: Tensor, num_experts: int, top_k: int, *, capacity: float | None = None) -> Routing:
    """Every expert takes its best tokens, `capacity` per token on average, K when not given (2202.09368). Not causal."""
    T, n = len(logits), num_experts
    p = logits[:, :n].float().softmax(-1)
    each = min(T, math.ceil(T * (top_k if capacity is None else capacity) / n))
    taken = torch.zeros_like(p, dtype=torch.bool).scatter_(0, p.topk(each, 0)[1], True)
    index = torch.where(taken, torch.arange(n, device=p.device), n)
    return Routing(logits, p * taken, index, torch.arange(n, device=p.device).expand(T, n))


def mod(logits: Tensor, num_experts: int, top_k: int, *, capacity: float = 0.75) -> Routing:
    """Mixture of depths (2404.02258): the share `capacity` of tokens gets K experts, the others none. Not causal.

    The first null row scores the tokens; its sigmoid multiplies the weights, which gives it a gradient.
    """
    if logits.shape[-1] <= num_experts:
        raise ConfigError(
            "mod scores tokens with a null row, and there is none", hint="convert with num_null_experts=1"
        )
    if not 0 < capacity <= 1:
        raise ConfigError(f"capacity is {capacity}, expected a share of the tokens")
    value = logits[:, num_experts].float()
    chosen = torch.zeros_like(value, dtype=torch.bool).scatter_(
        0, value.topk(math.ceil(capacity * len(value)))[1], True
    )
    routing = route(logits[:, :num_experts], num_experts, top_k)
    weights = routing.weights * value.sigmoid().unsqueeze(-1) * chosen.unsqueeze(-1)
    index = torch.where(chosen.unsqueeze(-1), routing.index, num_experts)
    return Routing(logits, weights, index, routing.selected)


def moepp(logits: Tensor, num_experts: int, top_k: int, *, copies: int = 1, constants: int = 1) -> Routing:
    """MoE++ (2410.07348): the nulls are zero, copy and constant experts, in this order; weights over all selected.

    copies, constants: how many of the last nulls are copy and constant experts, which are given the indices n + 1 and
    n + 2; `use` adds what they return.
    """
    n, total = num_experts, logits.shape[-1]
    if copies + constants > total - n:
        raise ConfigError(f"{copies} copy and {constants} constant experts with {total - n} null experts")
    routing = route(logits, n, top_k, identity=True, normalization="selected_all")
    kind = torch.full_like(routing.selected, n)
    kind = torch.where(routing.selected >= total - copies - constants, n + 1, kind)
    kind = torch.where(routing.selected >= total - constants, n + 2, kind)
    index = torch.where(routing.selected < n, routing.selected, kind)
    return Routing(logits, routing.weights * (index != n), index, routing.selected)


def aux_free(logits: Tensor, num_experts: int, top_k: int, *, bias: Tensor) -> Routing:
    """Balance without a loss (2408.15664): `bias` (n + m,) is added for selection only; see `BiasBalancer`."""
    n = num_experts
    selected = selection_scores(logits.float() + bias, n).topk(top_k, -1)[1]
    kept = selected < n
    weights = logits[:, :n].float().softmax(-1).gather(-1, selected.clamp_max(n - 1)) * kept
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return Routing(logits, weights, torch.where(kept, selected, n), selected)


def use(model: Any, router: Callable[..., Routing] | None, **options: Any) -> Any:
    """Let every layer of a converted model route by `router`; returns the model.

    `moepp` gets its constant experts' parameters here. Raises ConversionError for a model without null routers.
    """
    routers = list(layer_routers(model))
    if not routers or hasattr(base_of(model), "molora"):
        raise ConversionError("the model has no null routers", hint="call convert first; num_null_experts=0 is enough")
    blocks = {id(child): block for block in model.modules() for child in block.children()}
    for layer in routers:
        layer.adamoe_router = partial(router, **options) if router is not None else None
        drop_extra(layer)
        if router is moepp:
            d = layer.weight.shape[1]
            layer.constant = nn.Parameter(layer.weight.new_zeros(d))
            layer.constant_gate = nn.Parameter(layer.weight.new_zeros(2, d))
            layer.adamoe_constants = blocks[id(layer)].experts.register_forward_hook(partial(_add_constants, layer))
    return model


def _add_constants(router: Any, experts: Any, args: tuple, output: Tensor) -> Tensor:
    """Copy experts return x, constant ones a x + b v with (a, b) a softmax of x."""
    hidden, index, weights = args
    copy = (weights * (index == experts.num_experts + 1)).sum(-1, keepdim=True)
    constant = (weights * (index == experts.num_experts + 2)).sum(-1, keepdim=True)
    a, b = nn.functional.linear(hidden, router.constant_gate).softmax(-1).unsqueeze(-1).unbind(1)
    return output + copy * hidden + constant * (a * hidden + b * router.constant)


class BiasBalancer:
    """Moves the biases of `aux_free` after every step: down for experts selected more than the mean, up for the others.

    model: a converted model, which from now on routes by `aux_free`. rate: the step.
    """

    def __init__(self, model: Any, *, rate: float = 0.01):
        self.rate = rate
        self.biases, self.counts = [], []
        for router in layer_routers(model):
            total = router.num_experts + router.null_weight.shape[0]
            bias, count = (
                torch.zeros(total, device=router.weight.device),
                torch.zeros(total, device=router.weight.device),
            )
            router.adamoe_router = partial(_counted, bias=bias, count=count)
            self.biases.append(bias)
            self.counts.append(count)

    def step(self) -> None:
        """Use the selections since the last step."""
        for bias, count in zip(self.biases, self.counts, strict=True):
            bias += self.rate * (count.mean() - count).sign()
            count.zero_()


def _counted(logits: Tensor, num_experts: int, top_k: int, *, bias: Tensor, count: Tensor) -> Routing:
    routing = aux_free(logits, num_experts, top_k, bias=bias)
    count += torch.bincount(routing.selected.flatten(), minlength=len(count))
    return routing
