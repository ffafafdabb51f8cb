"""FaceScore as a torchmetrics metric (extra `metrics`): sums that several processes add up."""

from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from facescore.reward.scorer import FaceScorer

try:
    from torchmetrics import Metric
except ImportError as error:
    raise UserError("FaceScoreMetric needs torchmetrics", hint="pip install 'facescore[metrics]'") from error


class FaceScoreMetric(Metric):
    """The mean face score of generated images.

    aggregate: how the faces of one image become a number (max, min, mean or area_weighted). Images without a face do not
    count; `share_with_face` tells how many had one. `compute()` is NaN before any face was seen.
    """

    higher_is_better = True
    full_state_update = False
    total: Tensor
    counted: Tensor
    images: Tensor

    def __init__(self, scorer: FaceScorer, *, aggregate: str = "mean", **options: Any):
        super().__init__(**options)
        if aggregate not in ("max", "min", "mean", "area_weighted"):
            raise UserError(f"aggregate is {aggregate!r}, expected max, min, mean or area_weighted")
        self.scorer, self.aggregate = scorer, aggregate
        for name, start in (("total", torch.tensor(0.0)), ("counted", torch.tensor(0)), ("images", torch.tensor(0))):
            self.add_state(name, start, dist_reduce_fx="sum")

    def update(self, images: Any) -> None:
        """images: as `FaceScorer` takes them; a batch tensor (n, 3, H, W) is n images."""
        results = self.scorer(list(images))
        values = [v for v in (getattr(result, self.aggregate) for result in results) if v is not None]
        self.images += len(results)
        self.counted += len(values)
        self.total += sum(values)

    def compute(self) -> Tensor:
        """The mean over the images with a face, a scalar."""
        return self.total / self.counted

    @property
    def share_with_face(self) -> float:
        return float(self.counted / self.images)
