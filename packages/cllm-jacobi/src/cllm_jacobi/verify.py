"""Is the output of Jacobi decoding the greedy output? Where it is not, was it a near-tie or a mistake?

A pass over a block and a pass over one token sum in another order, so logits differ by rounding. In float32 that decides
nothing but near-ties; in half precision ties are common. A difference is a tie when the model's own two best logits at
that place, read in one full pass over the common prefix, are the two tokens in question and closer than the tolerance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cllm_jacobi.jacobi import JacobiConfig, jacobi_generate

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}
"""Logit gap under which two tokens tie, by the model's precision."""


@dataclass(frozen=True)
class Verdict:
    """One prompt's comparison."""

    row: int
    kind: str
    """equal, near-tie or different."""
    position: int | None = None
    """Index of the first new token that differs."""
    greedy: int | None = None
    jacobi: int | None = None
    gap: float | None = None
    """Between the two best logits there."""


def verify(
    model: Any,
    prompts: Sequence[torch.Tensor],
    *,
    config: JacobiConfig | None = None,
    max_new_tokens: int = 128,
    tolerance: float | None = None,
    **settings: Any,
) -> list[Verdict]:
    """Compare Jacobi decoding with `model.generate(do_sample=False)`, prompt by prompt.

    prompts: (1, tokens) each. tolerance: see `TOLERANCES`. settings: further arguments of `generate`.
    """
    decoder = (config or JacobiConfig()).decoder()
    limit = TOLERANCES.get(model.dtype, 1e-4) if tolerance is None else tolerance
    verdicts = []
    for row, ids in enumerate(prompts):
        wanted = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            **settings,
        }
        greedy = model.generate(ids, **wanted)[0, ids.shape[1] :].tolist()
        ours = jacobi_generate(model, ids, decoder=decoder, **wanted)[0, ids.shape[1] :].tolist()
        verdicts.append(_judge(model, row, ids, greedy, ours, limit))
    return verdicts


@torch.inference_mode()
def _judge(model: Any, row: int, ids: torch.Tensor, greedy: list[int], ours: list[int], tolerance: float) -> Verdict:
    if greedy == ours:
        return Verdict(row, "equal")
    at = next((i for i, (a, b) in enumerate(zip(greedy, ours, strict=False)) if a != b), min(len(greedy), len(ours)))
    first, second = (tokens[at] if at < len(tokens) else None for tokens in (greedy, ours))
    prefix = torch.cat([ids, torch.tensor([greedy[:at]], dtype=ids.dtype, device=ids.device)], 1)
    best = model(prefix).logits[0, -1].float().topk(2)
    gap = float(best.values[0] - best.values[1])
    tie = {first, second} == set(best.indices.tolist()) and gap < tolerance
    return Verdict(row, "near-tie" if tie else "different", at, first, second, gap)
