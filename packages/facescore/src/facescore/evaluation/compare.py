"""Scorers side by side on the same pairs, and on human rankings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tenfold_shared.errors import UserError

from facescore.evaluation.statistics import correct, paired_bootstrap, rank_correlations, wilson
from facescore.images import open_image, preprocess
from facescore.pairs.dataset import Pairs, Ranking
from facescore.reward.model import RewardModel

Scorer = Callable[[Sequence[Image.Image]], Any]
"""Pictures of faces to one number each, higher for better."""


@dataclass(frozen=True)
class ScorerResult:
    """How one scorer did."""

    name: str
    accuracy: float
    interval: tuple[float, float]
    """Wilson, 95 %."""
    by_generator: dict[str, float]
    by_severity: dict[float, float]
    difference: tuple[float, float, float] | None
    """Accuracy minus the first scorer's, and the 95 % interval of the paired bootstrap; None for the first."""
    win: np.ndarray
    lose: np.ndarray


def reward_scorer(model: RewardModel, *, batch_size: int = 64) -> Scorer:
    """A reward model as a scorer of face crops."""

    def score(images: Sequence[Image.Image]) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.stack([preprocess(i, model.config.image_size) for i in images])
            device = next(model.parameters()).device
            return torch.cat([model(part.to(device)).float().cpu() for part in pixels.split(batch_size)]).numpy()

    return score


def evaluate(pairs: Pairs, scorers: Mapping[str, Scorer]) -> list[ScorerResult]:
    """Pairwise accuracy of each scorer on the same crops, overall, per generator and per severity.

    The first scorer is the one that the others are compared with. Raises UserError when there are no scorers or a score is
    not finite.
    """
    if not scorers:
        raise UserError("there are no scorers to compare")
    crops = [pairs.crops(i) for i in range(len(pairs))]
    results: list[ScorerResult] = []
    first: np.ndarray | None = None
    for name, scorer in scorers.items():
        win, lose = (np.asarray(scorer([c[side] for c in crops]), dtype=float) for side in (0, 1))
        right = correct(win, lose)
        first = right if first is None else first
        results.append(
            ScorerResult(
                name,
                float(right.mean()),
                wilson(float(right.sum()), len(right)),
                {str(k): v for k, v in _means(right, pairs.generators).items()},
                {float(k): v for k, v in _means(right, pairs.severities).items()},
                None if not results else paired_bootstrap(right, first),
                win,
                lose,
            )
        )
    return results


def evaluate_rankings(rankings: Sequence[Ranking], scorer: Scorer) -> dict[str, float]:
    """Against human rankings: pairwise accuracy over strict pairs, and Kendall's tau and Spearman's rho, means over prompts."""
    right: list[float] = []
    taus, rhos = [], []
    for ranking in rankings:
        scores = [float(s) for s in scorer([open_image(i) for i in ranking.images])]
        better = [(a, b) for a in range(len(scores)) for b in range(len(scores)) if ranking.rank[a] < ranking.rank[b]]
        if better:
            right += correct([scores[a] for a, _ in better], [scores[b] for _, b in better]).tolist()
        tau, rho = rank_correlations(scores, ranking.rank)
        taus.append(tau)
        rhos.append(rho)
    if not right:
        raise UserError("the rankings hold no strict preference")
    return {"accuracy": float(np.mean(right)), "kendall": float(np.mean(taus)), "spearman": float(np.mean(rhos))}


def _means(values: np.ndarray, groups: Sequence[Any]) -> dict[Any, float]:
    names = sorted({g for g in groups if g not in (None, "")})
    return {n: float(np.mean([v for v, g in zip(values, groups, strict=True) if g == n])) for n in names}
