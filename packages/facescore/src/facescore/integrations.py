"""FaceScore inside other libraries' loops: a metric with torchmetrics' calls, and a diffusers step callback."""

from typing import Any

import torch
from tenfold_shared.errors import UserError

from facescore.reward.scorer import FaceScorer


class FaceScoreMetric:
    """The mean face score of generated images, with torchmetrics' `update`, `compute` and `reset`.

    aggregate: how the faces of one image become a number (max, min, mean or area_weighted). Images without a face do not
    count; `share_with_face` tells how many had one.
    """

    higher_is_better = True

    def __init__(self, scorer: FaceScorer, *, aggregate: str = "mean"):
        if aggregate not in ("max", "min", "mean", "area_weighted"):
            raise UserError(f"aggregate is {aggregate!r}, expected max, min, mean or area_weighted")
        self.scorer, self.aggregate = scorer, aggregate
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.total, self.faces, self.images = 0.0, 0, 0

    def update(self, images: Any) -> None:
        """images: as `FaceScorer` takes them; a batch tensor (n, 3, H, W) is n images."""
        results = self.scorer(list(images))
        self.images += len(results)
        for result in results:
            value = getattr(result, self.aggregate)
            if value is not None:
                self.total, self.faces = self.total + value, self.faces + 1

    def compute(self) -> torch.Tensor:
        """The mean as a scalar tensor; NaN before any face was seen."""
        return torch.tensor(self.total / self.faces if self.faces else float("nan"))

    @property
    def share_with_face(self) -> float:
        return self.faces / self.images if self.images else float("nan")

    def __call__(self, images: Any) -> torch.Tensor:
        self.update(images)
        return self.compute()


class EarlyReject:
    """A `callback_on_step_end` that gives up a sample whose face is poor before all steps are spent.

    At step `at` the latents are decoded and scored; when the best face of the batch is below `threshold`, or there is none
    and `need_face`, the pipeline is interrupted and `rejected` is True.
    """

    def __init__(self, scorer: FaceScorer, *, at: int, threshold: float, need_face: bool = False):
        self.scorer, self.at, self.threshold, self.need_face = scorer, at, threshold, need_face
        self.rejected = False
        self.best: float | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            self.rejected, self.best = False, None
        if step == self.at:
            vae, latents = pipe.vae, kwargs["latents"]
            with torch.no_grad():
                scale = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
                pixels = (vae.decode(scale).sample / 2 + 0.5).clamp(0, 1).float().cpu()
            found = [result.max for result in self.scorer(list(pixels))]
            self.best = max((value for value in found if value is not None), default=None)
            self.rejected = self.need_face if self.best is None else self.best < self.threshold
            if self.rejected:
                pipe._interrupt = True
        return kwargs
