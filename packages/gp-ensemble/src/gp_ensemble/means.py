"""The prior mean: what the zero-shot classifier says before a labelled image is seen (arXiv 2404.00312).

z (n, C) are zero-shot logits. The paper's own choice of scale could not be consulted; three are offered:

    logits   m = s (z - mean_c z) + 1/C                 s > 0 learned; keeps ranking and margins
    probs    m = a softmax(z / tau) + (1 - a) / C       a in (0, 1), tau > 0 learned
    zero     m = 1/C                                    no text model

Rows of m sum to one, as the one-hot targets do, so rows of the posterior mean do too.

A zero-shot classifier trained elsewhere favours some classes whatever the image shows. `class_bias` estimates that from
the labelled images; the classifier subtracts it from z first. This is ours, not the paper's.
"""

import gpytorch
import torch
from torch import Tensor

from gp_ensemble.priors import free, positive


class PriorMean(gpytorch.Module):
    """m(x) of every class."""

    needs_logits = True

    def __init__(self, margin: float):
        super().__init__()

    def forward(self, prior_logits: Tensor | None, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
        """m, (rows, classes). prior_logits: z (rows, classes), or None for the mean without a text model."""
        raise NotImplementedError


class ZeroMean(PriorMean):
    """1/C for every class."""

    needs_logits = False

    def __init__(self, margin: float = 1.0):
        super().__init__(margin)

    def forward(self, prior_logits: Tensor | None, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
        device = None if prior_logits is None else prior_logits.device
        return torch.full((rows, classes), 1 / classes, dtype=dtype, device=device)


class LogitsMean(PriorMean):
    """Centred logits times a learned scale. margin: mean over the training rows of max_c z - mean_c z.

    The scale starts at 0.3 / margin, so neither the logits' own scale nor a shift of them matters.
    """

    def __init__(self, margin: float):
        super().__init__(margin)
        positive(self, "scale", 0.3 / margin, width=0.5)

    def forward(self, prior_logits: Tensor | None, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
        assert prior_logits is not None
        z = prior_logits.to(dtype)
        return self.log_scale.exp().to(dtype) * (z - z.mean(1, keepdim=True)) + 1 / classes


class ProbsMean(PriorMean):
    """Zero-shot probabilities mixed with the uniform ones. margin: as for `LogitsMean`; tau starts at a
    quarter of it."""

    def __init__(self, margin: float):
        super().__init__(margin)
        positive(self, "tau", margin / 4, width=0.5)
        free(self, "logit_a", 0.0, width=1.0)

    def forward(self, prior_logits: Tensor | None, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
        assert prior_logits is not None
        a = self.logit_a.sigmoid().to(dtype)
        return a * (prior_logits.to(dtype) / self.log_tau.exp().to(dtype)).softmax(1) + (1 - a) / classes


def margin(prior_logits: Tensor) -> float:
    """Mean over rows of max_c z - mean_c z, at least a tiny positive number (all-equal logits say nothing)."""
    z = prior_logits.double()
    return max(float((z.amax(1) - z.mean(1)).mean()), 1e-6)


def class_bias(prior_logits: Tensor, targets: Tensor) -> Tensor:
    """b (C,): how much the zero-shot logits favour each class on average, to be subtracted; sums to zero.

    Mean over images of z minus its row mean, each class counting the same, shrunk towards zero as James and Stein do, by
    1 - (sampling variance of the means) / (variance of the means), at least 0: few images, or an even-handed z, give
    almost nothing. prior_logits: z (n, C). targets: Y (n, C), one-hot.
    """
    n, classes = targets.shape
    z = prior_logits - prior_logits.mean(1, keepdim=True)
    weight = (targets / targets.sum(0).clamp(min=1)).sum(1, keepdim=True)
    weight = weight / weight.sum()
    b = (weight * z).sum(0)
    sampling = (weight**2 * (z - b) ** 2).sum(0).mean() * n / (n - 1)
    between = b.square().sum() / (classes - 1)
    return b * (1 - sampling / between.clamp(min=torch.finfo(b.dtype).tiny)).clamp(min=0)


MEANS: dict[str, type[PriorMean]] = {"logits": LogitsMean, "probs": ProbsMean, "zero": ZeroMean}
