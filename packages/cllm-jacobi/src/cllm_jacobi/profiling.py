"""Which block size pays on this machine: tokens a pass against the price of a pass.

    gain(n) = TPF(n) / (cost(n) / cost(1))

TPF(n) is measured by decoding, cost(n) by timing a pass over n tokens behind a cache. On a machine with arithmetic to
spare cost(n) is nearly flat, and long blocks pay.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tenfold_shared.errors import UserError
from transformers import DynamicCache

from cllm_jacobi.jacobi import jacobi_generate


@dataclass(frozen=True)
class BlockProfile:
    """One block size on one machine."""

    block_size: int
    tokens_per_forward: float
    cost_ms: float
    """Median milliseconds of a pass over `block_size` tokens."""
    gain: float
    """Expected speed-up over autoregressive decoding."""


@torch.inference_mode()
def pass_costs(model: Any, sizes: Sequence[int], *, context: int = 64, repeats: int = 15) -> dict[int, float]:
    """Median milliseconds of one pass over n tokens behind a cache of `context`, for each n, measured in turn."""
    ids = torch.full((1, max(sizes)), 5, device=model.device)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(torch.full((1, context), 5, device=model.device), past_key_values=cache, use_cache=True)
    cache.activate_past_recording()
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    for turn in range(repeats + 2):
        for n in sizes:
            start = time.perf_counter()
            model(ids[:, :n], past_key_values=cache, use_cache=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            # The first turns fill caches and compile kernels.
            if turn > 1:
                seconds[n].append(time.perf_counter() - start)
            cache.crop(-n)
    return {n: 1000 * float(np.median(v)) for n, v in seconds.items()}


def profile_blocks(
    model: Any,
    prompts: Sequence[torch.Tensor],
    *,
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    max_new_tokens: int = 128,
    repeats: int = 15,
    costs: dict[int, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    **settings: Any,
) -> list[BlockProfile]:
    """Tokens per forward, cost and expected gain of each block size; the first of equal gains is the smallest.

    prompts: (1, tokens) each. costs: milliseconds by n where they are known already. settings: of `jacobi_generate`.

    Raises UserError without prompts, or sizes under 1.
    """
    sizes = sorted(set(sizes) | {1})
    if not len(prompts) or sizes[0] < 1:
        raise UserError("profiling needs prompts and block sizes of 1 or more")
    costs = costs or pass_costs(model, sizes, repeats=repeats)
    rows = []
    for i, n in enumerate(sizes):
        speeds = []
        for ids in prompts:
            out = jacobi_generate(
                model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, block_size=n, return_dict_in_generate=True, **settings
            )  # fmt: skip
            speeds.append(float(out.tokens_per_forward[0]))
        speed = float(np.mean(speeds))
        rows.append(BlockProfile(n, speed, costs[n], speed * costs[1] / costs[n]))
        progress(i + 1, len(sizes))
    return rows


def best(rows: Sequence[BlockProfile]) -> BlockProfile:
    """The block size with the largest expected gain."""
    return max(rows, key=lambda row: row.gain)
