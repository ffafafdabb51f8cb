"""FaceScore inside diffusers' sampling loop."""

from typing import Any

import torch

from facescore.reward.scorer import FaceScorer


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
