"""The audit of preference data: which of the four scenarios it is, and which pairs are a risk.

Off-policy halves are what hurts (2406.07327, section 4.2): a half counts as on-policy when its log-likelihood per token
is not far below what the policy's own samples have. CHES (2410.08847) ranks the pairs whose halves look alike to the
model, which displace the chosen answer most.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from tenfold_shared.errors import UserError
from torch import Tensor

from dpo3d.scoring import Row, Scored, evaluating, sample, score, tokenize_pair
from dpo3d.theory import displacement_band

SCENARIOS = {(True, True): "S1", (False, True): "S2", (True, False): "S3", (False, False): "S4"}
"""(chosen on-policy, rejected on-policy) to the paper's scenario."""


@dataclass
class AuditReport:
    """What the audit found. `rows` has one dictionary per pair, in the order of the data; `summary` the totals."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    dataset: Dataset = field(repr=False)

    def filter(
        self,
        *,
        max_ches_quantile: float | None = None,
        scenarios: Sequence[str] | set[str] | None = None,
        drop_flagged: bool = True,
    ) -> Dataset:
        """The pairs that pass, in the format they came in, ready to train on.

        max_ches_quantile: leave out pairs above this quantile of length-normalised CHES. scenarios: keep these only.
        drop_flagged: leave out empty, identical, duplicate and conflicting pairs.

        Raises UserError for an unknown scenario, a quantile outside [0, 1] or without CHES, and when nothing passes.
        """
        if unknown := sorted(set(scenarios or ()) - set(SCENARIOS.values())):
            raise UserError(f"no scenario '{unknown[0]}'", hint="the scenarios are S1, S2, S3 and S4")
        limit = float("inf")
        if max_ches_quantile is not None:
            if not 0 <= max_ches_quantile <= 1:
                raise UserError(f"max_ches_quantile is {max_ches_quantile}, expected a value between 0 and 1")
            scores = sorted(row["ches_normalized"] for row in self.rows if row.get("ches_normalized") is not None)
            if not scores:
                raise UserError("the audit has no CHES scores", hint="audit with ches=True")
            limit = scores[int(max_ches_quantile * (len(scores) - 1))]
        keep = [
            i
            for i, row in enumerate(self.rows)
            if (scenarios is None or row["scenario"] in scenarios)
            and (row.get("ches_normalized") is None or row["ches_normalized"] <= limit)
            and not (drop_flagged and row["flags"])
        ]
        if not keep:
            raise UserError("no pair passes the filter", hint="loosen max_ches_quantile or scenarios")
        return self.dataset.select(keep)


def audit_pairs(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    *,
    ref_samples: int = 4,
    ches: bool = True,
    band: bool = False,
    on_policy_z: float = -3.0,
    max_length: int | None = None,
    max_new_tokens: int = 128,
    sample_prompts: int = 128,
    budget: int = 4096,
    seed: int = 0,
) -> AuditReport:
    """Audit preference pairs against the policy they will train.

    dataset: any of TRL's formats. ref_samples: own samples for each of `sample_prompts` prompts; their log-likelihoods
    per token make the pool that z-scores are against (robust ones: median and median deviation). on_policy_z: a half
    below it is off-policy. ches, band: compute CHES, and the first-order band of each pair (a backward pass each). max_length: what training will cut at, in tokens.

    Raises UserError for an empty dataset, missing columns, or when every pair has an empty half.
    """
    if len(dataset) == 0:
        raise UserError("the dataset has no rows")
    if ref_samples < 1 or sample_prompts < 1:
        raise UserError(f"ref_samples is {ref_samples} and sample_prompts is {sample_prompts}, expected 1 or more")
    pairs = [tokenize_pair(example, tokenizer) for example in dataset]
    flags = _flags(dataset, pairs, tokenizer, max_length)
    usable = [i for i, flag in enumerate(flags) if not {"empty chosen", "empty rejected"} & set(flag)]
    if not usable:
        raise UserError("every pair has an empty half", hint="check the columns chosen and rejected")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with evaluating(model):
        chosen = score(model, [pairs[i][0] for i in usable], pad, budget=budget, hidden=ches)
        rejected = score(model, [pairs[i][1] for i in usable], pad, budget=budget, hidden=ches)
        centre, deviation = _own_likelihood(
            model,
            tokenizer,
            [pairs[i][0].prompt for i in usable],
            pad,
            ref_samples,
            sample_prompts,
            max_new_tokens,
            budget,
            seed,
        )
        bands = {i: _band(model, pairs[i], pad) for i in usable} if band else {}
    found = dict(zip(usable, zip(chosen, rejected, strict=True), strict=True))
    rows = []
    for i, (plus, minus) in enumerate(pairs):
        row: dict[str, Any] = {"index": i, "flags": flags[i], **_shape(plus, minus), "scenario": None}
        if i in found:
            row |= _likelihood(*found[i], centre, deviation, on_policy_z)
            row |= ches_scores(*found[i]) if ches else {}
            row |= {"band": bands[i]} if band else {}
        rows.append(row)
    return AuditReport(rows, _summary(rows, centre, deviation), dataset)


def ches_scores(chosen: Scored, rejected: Scored) -> dict[str, float]:
    """CHES ⟨s+, s−⟩ − ‖s+‖² and its length-normalised form ⟨s+, s−⟩/(T+ T−) − ‖s+‖²/T+², from sums of hidden states.

    s± sums the last hidden states from the last prompt token to the last but one response token (2410.08847, section 5).
    """
    plus, minus = chosen.hidden_sum, rejected.hidden_sum
    if not isinstance(plus, Tensor) or not isinstance(minus, Tensor):
        raise UserError("the rows were scored without hidden states", hint="score(..., hidden=True)")
    t_plus, t_minus = len(chosen.logps), len(rejected.logps)
    across, own = float(plus @ minus), float(plus @ plus)
    return {"ches": across - own, "ches_normalized": across / (t_plus * t_minus) - own / t_plus**2}


def _own_likelihood(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    pad: int,
    n: int,
    limit: int,
    max_new_tokens: int,
    budget: int,
    seed: int,
) -> tuple[float, float]:
    """Centre and deviation of the log-likelihood per token of the policy's own samples, over `limit` prompts.

    Median and scaled median deviation: a policy's rare samples have a long tail, in which a mean and a standard deviation
    hide everything that is off-policy.
    """
    step = max(len(prompts) // limit, 1)
    some = list(prompts)[::step][:limit]
    drawn = sample(model, some, tokenizer, n=n, max_new_tokens=max_new_tokens, seed=seed)
    rows = [Row(p, answer) for p, group in zip(some, drawn, strict=True) for answer in group if answer]
    values = [s.per_token for s in score(model, rows, pad, budget=budget)]
    centre = statistics.median(values)
    # 1.4826 makes it the standard deviation of a normal distribution.
    return centre, max(1.4826 * statistics.median(abs(v - centre) for v in values), 1e-6)


def _likelihood(chosen: Scored, rejected: Scored, centre: float, deviation: float, limit: float) -> dict[str, Any]:
    z = (chosen.per_token - centre) / deviation, (rejected.per_token - centre) / deviation
    return {
        "logp_chosen": chosen.total,
        "logp_rejected": rejected.total,
        "logp_chosen_per_token": chosen.per_token,
        "logp_rejected_per_token": rejected.per_token,
        "z_chosen": z[0],
        "z_rejected": z[1],
        "scenario": SCENARIOS[z[0] >= limit, z[1] >= limit],
    }


def _shape(chosen: Row, rejected: Row) -> dict[str, Any]:
    a, b = chosen.completion, rejected.completion
    prefix = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return {
        "length_ratio": len(a) / max(len(b), 1),
        "shared_prefix": prefix,
        "edit_distance": edit_distance(a, b) / max(len(a), len(b), 1),
    }


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b`."""
    other, places = np.asarray(b, dtype=np.int64), np.arange(len(b) + 1)
    last = places
    for i, x in enumerate(a, 1):
        row: np.ndarray = np.append(i, np.minimum(last[1:] + 1, last[:-1] + (other != x)))
        # An insertion comes from the left: the least of row[k] + (j - k) over k up to j.
        last = np.minimum.accumulate(row - places) + places
    return int(last[-1])


def _flags(
    dataset: Dataset, pairs: Sequence[tuple[Row, Row]], tokenizer: Any, max_length: int | None
) -> list[list[str]]:
    """What is wrong with each pair beside its likelihoods."""
    end = {tokenizer.eos_token_id}
    keys = [(tuple(c.prompt), tuple(c.completion), tuple(r.completion)) for c, r in pairs]
    counts = Counter(keys)
    seen: set[Any] = set()
    preferred = {(prompt, plus) for prompt, plus, minus in keys if plus != minus}
    dispreferred = {(prompt, minus) for prompt, plus, minus in keys if plus != minus}
    contradicted = preferred & dispreferred
    flags = []
    for key, (chosen, rejected) in zip(keys, pairs, strict=True):
        prompt, plus, minus = key
        longest = len(prompt) + max(len(plus), len(minus))
        conditions = {
            "empty chosen": not set(chosen.completion) - end,
            "empty rejected": not set(rejected.completion) - end,
            "identical": plus == minus,
            "duplicate": counts[key] > 1 and key in seen,
            "conflict": plus != minus and ((prompt, plus) in contradicted or (prompt, minus) in contradicted),
            "truncated": max_length is not None and longest > max_length,
        }
        seen.add(key)
        flags.append([name for name, holds in conditions.items() if holds])
    return flags


def _band(model: Any, pair: tuple[Row, Row], pad: int) -> dict[str, float]:
    from dpo3d.monitor import log_gradient

    plus, minus = (log_gradient(model, [row], pad) for row in pair)
    found = displacement_band(float(plus @ plus), float(plus @ minus), float(minus @ minus))
    return {"low": found.low, "high": found.high}


def _summary(rows: Sequence[dict[str, Any]], centre: float, deviation: float) -> dict[str, Any]:
    scenarios = Counter(row["scenario"] for row in rows if row["scenario"])
    total = sum(scenarios.values())
    shares = {name: scenarios[name] / total for name in SCENARIOS.values()}
    flags = Counter(flag for row in rows for flag in row["flags"])
    ranked = [row for row in rows if row.get("ches_normalized") is not None]
    ranked.sort(key=lambda row: row["ches_normalized"], reverse=True)
    return {
        "pairs": len(rows),
        "scenario": max(shares, key=shares.__getitem__),
        "shares": shares,
        "flags": dict(flags),
        "own_logp_per_token": centre,
        "own_logp_deviation": deviation,
        "length_ratio": statistics.median(row["length_ratio"] for row in rows),
        "risk": [row["index"] for row in ranked[: max(len(ranked) // 20, 1)]],
        **_advice(shares),
    }


def _advice(shares: dict[str, float]) -> dict[str, Any]:
    """γ per token (`sft_reduction=token`) and β− to start with at β = 0.1, and why: what the digit task needed."""
    off_chosen, off_rejected = shares["S2"] + shares["S4"], shares["S3"] + shares["S4"]
    if off_chosen > 0.5:
        why = "chosen answers are off-policy: plain DPO loses them, so anchor them, or sample pairs from the policy"
        return {"sft_gamma": 1.0, "beta_rejected": None, "advice": why}
    if off_rejected > 0.5:
        why = "rejected answers are off-policy: they teach little and fall fast; sample them from the policy"
        return {"sft_gamma": 0.25, "beta_rejected": 0.02, "advice": why}
    return {"sft_gamma": 0.25, "beta_rejected": None, "advice": "on-policy pairs: a light anchor is enough"}
