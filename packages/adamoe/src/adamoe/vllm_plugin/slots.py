"""The arithmetic of null slots, without vLLM.

Shapes: T tokens, K slots, n true experts. Slots arrive as `adamoe.routing.route` gives them: a null has index n, weight 0.
"""

import torch
from torch import Tensor


def true_pairs(weights: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs with a true expert: tokens (P,), weights (P, 1), experts (P, 1)."""
    token, slot = (index < num_experts).nonzero(as_tuple=True)
    return token, weights[token, slot].unsqueeze(-1), index[token, slot].unsqueeze(-1)


def mask_slots(weights: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """Indices (T, K) in which a null slot is the token's best true expert (0 without one): right with weight 0."""
    best = index.amin(-1, keepdim=True)
    # The heaviest true expert's rows are in use anyway; any in-range expert would do.
    heaviest = index.gather(-1, weights.argmax(-1, keepdim=True))
    best = torch.where(heaviest < num_experts, heaviest, best)
    return torch.where(index < num_experts, index, best.where(best < num_experts, torch.zeros_like(best)))


def extended_map(expert_map: Tensor | None, num_experts: int, device: torch.device | str = "cpu") -> Tensor:
    """vLLM's map of experts to local slots with one more, absent, expert at n: (n + 1,) int32."""
    own = torch.arange(num_experts, device=device) if expert_map is None else expert_map
    return torch.cat((own.to(torch.int32), torch.full((1,), -1, dtype=torch.int32, device=own.device)))
