"""Is a target and its drafter lossless on this machine? Greedy identity, and chi-squared at temperature 1."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tenfold_shared.errors import UserError

from smartspec.engine import Sampling, SpecEngine
from smartspec.policies import FixedLength


def lossless(
    target: Any, draft: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int = 32, draws: int = 4000, seed: int = 0
) -> dict[str, Any]:
    """Compare a speculating engine with the target alone.

    prompts: token ids. new_tokens: of the greedy comparison. draws: outputs sampled after the first prompt; their second
    token, the first one that a draft may have given, is compared with its exact distribution.

    Returns how many prompts are identical, the statistic with its degrees of freedom and p-value, and the verdict
    (all identical and p > 0.001). Two passes of different shapes may round a near tie differently in low precision; such
    a first difference is reported with the gap between the two logits.

    Raises UserError without prompts.
    """
    if not prompts:
        raise UserError("no prompts to check with")
    longest = max(len(p) for p in prompts) + new_tokens + 1
    engine = SpecEngine(
        target, draft, policy=FixedLength(4), max_num_seqs=min(len(prompts), 8), max_len=longest, seed=seed
    )
    outputs = engine.generate(prompts, new_tokens)
    same, gap = 0, 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = _greedy(target, prompt, new_tokens)
        same += output == wanted
        if output != wanted:
            at = next(i for i, (a, b) in enumerate(zip(output, wanted, strict=True)) if a != b)
            logits = _logits(target, [*prompt, *wanted[:at]])
            gap = max(gap, float(logits[wanted[at]] - logits[output[at]]))
    statistic, freedom, p_value = _chi_squared(target, draft, prompts[0], draws, seed)
    return {
        "greedy identical": f"{same} of {len(prompts)}",
        "largest logit gap": gap,
        "chi squared": statistic,
        "degrees of freedom": freedom,
        "p value": p_value,
        "accepted of verified": f"{engine.stats.accepted} of {engine.stats.verified}",
        "lossless": same == len(prompts) and p_value > 1e-3,
    }


def _greedy(target: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt)], device=target.device)
    with torch.inference_mode():
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return [int(t) for t in out[0, len(prompt) :]]


@torch.inference_mode()
def _logits(target: Any, tokens: Sequence[int]) -> torch.Tensor:
    return target(torch.tensor([list(tokens)], device=target.device)).logits[0, -1].float()


@torch.inference_mode()
def _chi_squared(target: Any, draft: Any, prompt: Sequence[int], draws: int, seed: int) -> tuple[float, int, float]:
    """Second tokens after the most likely first one; rare tokens are put together."""
    first = int(_logits(target, prompt).argmax())
    p = _logits(target, [*prompt, first]).double().softmax(-1).cpu().numpy()
    engine = SpecEngine(
        target, draft, policy=FixedLength(3), max_num_seqs=min(draws, 256), max_len=len(prompt) + 5, seed=seed
    )
    # The first token comes from prefill; the second is the first that a draft can have given.
    outputs = engine.generate([prompt] * draws, 3, sampling=Sampling(temperature=1.0))
    second = np.array([o[1] for o in outputs if o[0] == first])
    seen = np.bincount(second, minlength=len(p)).astype(float)
    expected = p * len(second)
    common = expected >= 5
    seen = np.append(seen[common], seen[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    keep = expected > 0
    statistic = float((((seen - expected) ** 2)[keep] / expected[keep]).sum())
    freedom = max(int(keep.sum()) - 1, 1)
    tail = torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2.0).double())
    return statistic, freedom, float(tail)
