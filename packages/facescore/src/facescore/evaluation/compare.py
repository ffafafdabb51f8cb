"""Scorers side by side on the same pairs, and on human rankings.

A scorer sees face crops, all scorers the same ones. `WholeImages` sees the images whole, under the prompts they were made
from: that is what ImageReward was trained on, and a crop would not be fair to it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tenfold_shared.errors import UserError

from facescore.detectors import Detector, make_detector
from facescore.evaluation.statistics import correct, paired_bootstrap, rank_correlations, wilson
from facescore.images import crop_window, preprocess
from facescore.pairs.dataset import Pairs, Ranking
from facescore.reward.model import RewardModel
from facescore.reward.scorer import ImageRewardModel, load_named


@dataclass(frozen=True)
class WholeImages:
    """A scorer of whole images under their prompts, such as ImageReward."""

    model: ImageRewardModel

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return self.model.score(prompts, list(images))


Scorer = Callable[[Sequence[Image.Image]], Any] | WholeImages
"""Pictures of faces to one number each, higher for better; or whole images and their prompts."""


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


def reward_scorer(model: RewardModel, *, batch_size: int = 64) -> Callable[[Sequence[Image.Image]], np.ndarray]:
    """A reward model as a scorer of face crops."""

    def score(images: Sequence[Image.Image]) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.stack([preprocess(i, model.config.image_size) for i in images])
            device = next(model.parameters()).device
            return torch.cat([model(part.to(device)).float().cpu() for part in pixels.split(batch_size)]).numpy()

    return score


def evaluate(pairs: Pairs, scorers: Mapping[str, Scorer]) -> list[ScorerResult]:
    """Pairwise accuracy of each scorer on the same pairs, overall, per generator and per severity.

    The first scorer is the one that the others are compared with. Raises UserError when there are no scorers or a score is
    not finite.
    """
    if not scorers:
        raise UserError("there are no scorers to compare")
    rows = range(len(pairs))
    crops = [pairs.crops(i) for i in rows]
    whole = [pairs.images(i) for i in rows] if any(isinstance(s, WholeImages) for s in scorers.values()) else []
    results: list[ScorerResult] = []
    first: np.ndarray | None = None
    for name, scorer in scorers.items():
        if isinstance(scorer, WholeImages):
            win, lose = (np.asarray(scorer([w[side] for w in whole], pairs.prompts)) for side in (0, 1))
        else:
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


def evaluate_rankings(
    rankings: Sequence[Ranking], scorer: Scorer, *, detector: str | Detector = "skimage-lbp"
) -> dict[str, float]:
    """Against human rankings: pairwise accuracy over strict pairs, and Kendall's tau and Spearman's rho, means over prompts.

    A scorer of crops gets the largest face of each image. Images in which the detector finds none are left out for every
    scorer alike, so that all are asked about the same pairs; `left_out` counts them.
    """
    found = make_detector(detector)
    right: list[float] = []
    taus, rhos, left_out = [], [], 0
    for ranking in rankings:
        images = [load_named(i) for i in ranking.images]
        faces = [_largest_face(image, found) for image in images]
        kept = [i for i, face in enumerate(faces) if face is not None]
        left_out += len(faces) - len(kept)
        ranks = [ranking.rank[i] for i in kept]
        better = [(a, b) for a in range(len(kept)) for b in range(len(kept)) if ranks[a] < ranks[b]]
        if not better:
            continue
        if isinstance(scorer, WholeImages):
            scores = list(map(float, scorer([images[i] for i in kept], [ranking.prompt] * len(kept))))
        else:
            scores = list(map(float, scorer([face for face in faces if face is not None])))
        right += correct([scores[a] for a, _ in better], [scores[b] for _, b in better]).tolist()
        tau, rho = rank_correlations(scores, ranks)
        taus.append(tau)
        rhos.append(rho)
    if not right:
        raise UserError("the rankings hold no strict preference between images with a face")
    return {
        "accuracy": float(np.mean(right)),
        "kendall": float(np.mean(taus)),
        "spearman": float(np.mean(rhos)),
        "left_out": float(left_out),
    }


def _largest_face(image: Image.Image, detector: Detector) -> Image.Image | None:
    boxes = [d.box for d in detector.detect(image) if not detector.calibrated or d.confidence >= 0.9]
    if not boxes:
        return None
    window = crop_window(max(boxes, key=lambda b: (b[2] - b[0]) * (b[3] - b[1])), image.size)
    return image.crop(window) if window is not None else None


def _means(values: np.ndarray, groups: Sequence[Any]) -> dict[Any, float]:
    names = sorted({g for g in groups if g not in (None, "")})
    return {n: float(np.mean([v for v, g in zip(values, groups, strict=True) if g == n])) for n in names}
