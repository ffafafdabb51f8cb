"""How badly a pair is misaligned, in five levels, from how many of its images show both concepts.

With n of 20 images correct (2408.00230, table of levels): 0 is level 5, 1 to 5 level 4, 6 to 10 level 3, 11 to 15 level 2,
16 to 20 level 1. For other numbers of images N: level 5 where n = 0, else 5 - ceil(4 n / N).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold_shared.errors import UserError

from lcmis_align.concepts import ConceptPlan

LEVELS = (1, 2, 3, 4, 5)


def rate_level(n_correct: int, n_images: int = 20) -> int:
    """1 (most images right) to 5 (none).

    Raises UserError when n_images is under 1 or n_correct outside 0..n_images.
    """
    if n_images < 1 or not 0 <= n_correct <= n_images:
        raise UserError(f"{n_correct} of {n_images} images correct, expected 0..n of n >= 1")
    return 5 if n_correct == 0 else 5 - -(-4 * n_correct // n_images)


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: ((p + z²/2n) ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    if trials < 1 or not 0 <= successes <= trials:
        raise UserError(f"{successes} of {trials}, expected 0..n of n >= 1")
    p, z2 = successes / trials, z * z / trials
    half = z * math.sqrt(p * (1 - p) / trials + z2 / trials / 4)
    low, high = (p + z2 / 2 - half) / (1 + z2), (p + z2 / 2 + half) / (1 + z2)
    return 0.0 if successes == 0 else low, 1.0 if successes == trials else high  # exact where rounding is not


@dataclass
class LevelReport:
    """Levels of many pairs: `correct[i]` of `images[i]` images of pair `names[i]` show both concepts."""

    names: list[str]
    correct: list[int]
    images: list[int]
    levels: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.levels = [rate_level(n, total) for n, total in zip(self.correct, self.images, strict=True)]

    @property
    def counts(self) -> dict[int, int]:
        """Pairs at each level."""
        return {level: self.levels.count(level) for level in LEVELS}

    def intervals(self) -> dict[int, tuple[float, float]]:
        """Wilson's 95 % interval of each level's share."""
        return {level: wilson(count, len(self.levels)) for level, count in self.counts.items()}

    def rows(self) -> list[tuple[int, int, float, float, float]]:
        """(level, pairs, share, low, high), worst last."""
        intervals = self.intervals()
        return [(level, n, n / len(self.levels), *intervals[level]) for level, n in self.counts.items()]


Judge = Callable[[Any, ConceptPlan], bool]
"""Does this image show both concepts of the plan?"""


def judge(images: Sequence[Any], plan: ConceptPlan, judge: Judge) -> list[bool]:
    """Whether each image is correct."""
    return [bool(judge(image, plan)) for image in images]


class ScoreJudge:
    """Judges an image correct when the scorer gives both concepts more than a threshold.

    threshold: of one concept's score; VQA scores are probabilities, CLIP scores need a threshold found by eye.
    """

    def __init__(self, scorer: Any, threshold: float = 0.5):
        self.scorer, self.threshold = scorer, threshold

    def __call__(self, image: Any, plan: ConceptPlan) -> bool:
        from lcmis_align.scorers.base import concept_scores

        return bool((concept_scores(self.scorer, [image], [plan.first, plan.second]) > self.threshold).all())
