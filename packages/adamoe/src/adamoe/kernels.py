"""Expert layers whose time follows the number of true (token, expert) pairs.

Registered with transformers under these names (`model.set_experts_implementation`):

adamoe          picks one of the others: static while compiling or capturing a graph, else loop on CPU, grouped elsewhere
adamoe_loop     one matrix product per expert that got a token
adamoe_grouped  the kept pairs sorted by expert, then two grouped products
adamoe_static   the stock grouped path on all T K slots; shapes do not depend on the routing

All read an index of n as "no expert", give exactly 0 for a token without one, and never multiply a row for a null.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

grouped_linear = moe._grouped_linear


def choose(experts: Any, hidden: Tensor) -> str:
    """The implementation that "adamoe" stands for here."""
    if torch.compiler.is_compiling() or (hidden.is_cuda and torch.cuda.is_current_stream_capturing()):
        return "adamoe_static"
    return "adamoe_loop" if hidden.device.type == "cpu" else "adamoe_grouped"


def adamoe(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The fastest of the three; `self` is an experts module of transformers.

    hidden_states: (T, d). top_k_index: (T, K) in [0, n], n for no expert. top_k_weights: (T, K). Returns (T, d).
    """
    return KERNELS[choose(self, hidden_states)](self, hidden_states, top_k_index, top_k_weights)


def adamoe_loop(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One product per expert that got a token; see `adamoe` for the shapes."""
    expert, place = _kept_pairs(top_k_index, self.num_experts)
    counts = torch.bincount(expert, minlength=self.num_experts).tolist()
    # Without a pair, the first expert gets zero rows: every parameter keeps a place in the graph and a gradient of zero,
    # which DistributedDataParallel waits for.
    active = [e for e, count in enumerate(counts) if count] or [0]
    tokens = (place // top_k_index.shape[1]).split(counts)
    weights = top_k_weights.reshape(-1, 1).index_select(0, place).split(counts)
    up, down = self.gate_up_proj if self.has_gate else self.up_proj, self.down_proj
    biases = _biases(self)
    # Unbound once: selecting expert by expert would give each backward step a gradient of the whole parameter's size.
    ups, downs = up.unbind(0), down.unbind(0)
    total = torch.zeros(hidden_states.shape, device=hidden_states.device)
    for e in active:
        rows = hidden_states.index_select(0, tokens[e]).to(ups[e].dtype)
        inner = _product(rows, ups[e], self.is_transposed)
        if biases is not None:
            inner = inner + biases[0][e]
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = _product(inner, downs[e], self.is_transposed)
        if biases is not None:
            outer = outer + biases[1][e]
        if getattr(self, "has_post_expert_norm", False):
            outer = self.post_expert_norm(outer)
        # A token meets an expert once, so a row has one writer here; each expert's rows are added while in the cache.
        total.index_add_(0, tokens[e], (outer * weights[e]).float())
    return total.to(hidden_states.dtype)


def adamoe_grouped(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Two grouped products over the kept pairs; see `adamoe` for the shapes."""
    T, K = top_k_index.shape
    expert, place = _kept_pairs(top_k_index, self.num_experts)
    token, weight = place // K, top_k_weights.reshape(-1)[place]
    offsets = torch.bincount(expert, minlength=self.num_experts).cumsum(0).to(torch.int32)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    biases = _biases(self)
    up_bias, down_bias = (None, None) if biases is None else (bias[expert] for bias in biases)
    inner = grouped_linear(hidden_states[token], up, offsets, bias=up_bias, is_transposed=self.is_transposed)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outer = grouped_linear(inner, self.down_proj, offsets, bias=down_bias, is_transposed=self.is_transposed)
    if getattr(self, "has_post_expert_norm", False):
        outer = self.post_expert_norm(outer)
    return _combine(outer, weight, token, place, T, K, hidden_states)


def adamoe_static(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The stock grouped path, which skips null slots in its products once `_is_expert_parallel` is set."""
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)


def add_identity(module: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """Forward hook of an experts module: identity nulls add the token, times the sum of their weights."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    hidden, index, weights = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    share = (weights * (index == module.num_experts)).sum(-1, keepdim=True)
    return output + (share * hidden).to(output.dtype)


def _kept_pairs(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Experts and flat places of the true pairs, sorted by expert: both (P,)."""
    flat = index.reshape(-1)
    place = (flat < n).nonzero().squeeze(-1)
    expert, order = flat[place].sort(stable=True)
    return expert, place[order]


def _biases(self: Any) -> tuple[Tensor, Tensor] | None:
    if not self.has_bias:
        return None
    return (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias), self.down_proj_bias


def _product(rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return rows @ weight if transposed else linear(rows, weight)


def _combine(rows: Tensor, weight: Tensor, token: Tensor, place: Tensor, T: int, K: int, like: Tensor) -> Tensor:
    """Weigh the pairs' outputs (P, d) and add them up per token, in float32: (T, d)."""
    weighted = (rows * weight.unsqueeze(-1)).float()
    d = rows.shape[-1]
    if rows.is_cuda and torch.are_deterministic_algorithms_enabled():
        slots = torch.zeros(T * K, d, device=rows.device, dtype=weighted.dtype)
        # Every place occurs once, so this index_copy has one writer per row.
        return slots.index_copy(0, place, weighted).view(T, K, d).sum(1).to(like.dtype)
    total = torch.zeros(T, d, device=rows.device, dtype=weighted.dtype)
    return total.index_add_(0, token, weighted).to(like.dtype)


KERNELS = {"adamoe_loop": adamoe_loop, "adamoe_grouped": adamoe_grouped, "adamoe_static": adamoe_static}

for _name, _kernel in {"adamoe": adamoe, **KERNELS}.items():
    ALL_EXPERTS_FUNCTIONS.register(_name, _kernel)
