"""First values of the steps, from the activations of unlabelled data.

lsq          s = 2 mean|x| / sqrt(hi)                                          (2406.03470's first-batch rule; 1902.08153)
mse          the s of a grid that minimises the mean squared error
percentile   s such that the 99.9th percentile lands on the bound: outliers are clipped, and reported
kl           the s whose quantised histogram is nearest in Kullback-Leibler divergence to the histogram
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor, nn

from spikezip.errors import QuantizationError
from spikezip.qann.quantizer import SMALLEST_STEP, Quantizer, levels, quantizers
from spikezip.watch import forbid

METHODS = ("lsq", "mse", "percentile", "kl")
SAMPLES = 1 << 16
"""Activations kept for each quantiser."""
PERCENTILE = 0.999
BINS = 512


@dataclass(frozen=True)
class Calibration:
    """What calibration found at one quantiser."""

    name: str
    lo: int
    hi: int
    step: float
    """Mean over channels when there are several."""
    clipped: float
    """Share of the activations beyond the bounds; what an unsigned quantiser cuts off below zero is not counted."""
    error: float
    """Root mean squared error of quantisation, relative to the activations' own root mean square."""


class _Observer:
    """Keeps an even selection of what passes, at most SAMPLES values, and passes it on."""

    def __init__(self, quantizer: Quantizer, batches: int):
        self.quantizer, self.share = quantizer, max(SAMPLES // batches, 1)
        self.kept: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.detach()
        if not bool(torch.isfinite(rows).all()):
            raise QuantizationError("an activation is not finite", hint="look for NaN or infinity in data and weights")
        if self.quantizer.s.dim():
            rows = rows.movedim(self.quantizer.axis, -1).reshape(-1, self.quantizer.s.numel())
        else:
            rows = rows.reshape(-1, 1)
        self.kept.append(rows[:: max(len(rows) * rows.shape[1] // self.share, 1)].float().cpu())
        return x


@torch.no_grad()
def calibrate(
    qann: nn.Module, loader: Iterable[Any], *, method: str = "lsq", max_batches: int = 8
) -> list[Calibration]:
    """Set every step from the activations that `loader`'s first batches cause, and report what each one clips.

    loader: batches as the model takes them: a tensor, a mapping of keyword arguments, or a tuple whose last entry is the
    label. method: "lsq", "mse", "percentile" or "kl". The activations are those of the unquantised network.

    Raises UserError for an unknown method or an empty loader, QuantizationError when a quantiser saw nothing or a value
    that is not finite, or when an attention runs a fused product that no quantiser can reach.
    """
    if method not in METHODS:
        raise UserError(f"method is '{method}', expected one of {', '.join(METHODS)}")
    found = quantizers(qann)
    if not found:
        raise QuantizationError("the model has no quantisers", hint="call quantize(model, config) first")
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == max_batches:
            break
    if not batches:
        raise UserError("the loader gave no batch, expected one or more")
    training = qann.training
    qann.eval()
    observers = {name: _Observer(quantizer, len(batches)) for name, quantizer in found.items()}
    try:
        for name, quantizer in found.items():
            quantizer.observer = observers[name]
        fused = {torch.nn.functional.scaled_dot_product_attention}
        with forbid(qann, fused, QuantizationError, "a fused attention product cannot be intercepted"):
            call(qann, batches[0])
        for batch in batches[1:]:
            call(qann, batch)
    finally:
        for quantizer in found.values():
            quantizer.observer = None
        qann.train(training)
    report = []
    for name, quantizer in found.items():
        if not observers[name].kept:
            raise QuantizationError(f"{name} saw no activation: the model's forward does not reach it")
        x = torch.cat(observers[name].kept)
        s = _steps(x, quantizer, method).clamp(min=SMALLEST_STEP)
        quantizer.s.copy_(s if quantizer.s.dim() else s[0])
        q = levels(x, s, quantizer.lo, quantizer.hi)
        below = (x / s + 0.5 < quantizer.lo) & (quantizer.lo < 0)
        clipped = (below | (x / s + 0.5 >= quantizer.hi + 1)).float().mean()
        error = (q * s - x).square().mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-12)
        report.append(Calibration(name, quantizer.lo, quantizer.hi, float(s.mean()), float(clipped), float(error)))
    return report


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a batch as loaders give it, without its labels; the logits of what comes back."""
    if isinstance(inputs, Mapping):
        device = next(model.parameters()).device
        out = model(**{k: v.to(device) for k, v in inputs.items() if k not in ("labels", "label")})
    else:
        x = inputs[0] if isinstance(inputs, tuple | list) else inputs
        out = model(x.to(next(model.parameters()).device))
    return logits_of(out)


def logits_of(out: Any) -> Tensor:
    """The tensor that matters in a model's output: itself, `.logits`, or the first entry."""
    if isinstance(out, Tensor):
        return out
    logits = getattr(out, "logits", None)
    return logits if logits is not None else logits_of(out[0])


def _steps(x: Tensor, quantizer: Quantizer, method: str) -> Tensor:
    """A step for each column of x (samples, channels)."""
    lo, hi = quantizer.lo, quantizer.hi
    if method == "lsq":
        return 2 * x.abs().mean(0) / math.sqrt(hi)
    if method == "percentile":
        return _reach(x, lo, hi, PERCENTILE)
    widest = _reach(x, lo, hi, 1.0)
    best, least = widest, torch.full_like(widest, math.inf)
    for share in torch.linspace(0.05, 1.0, 60):
        s = (widest * share).clamp(min=SMALLEST_STEP)
        q = levels(x, s, lo, hi) * s
        loss = (q - x).square().mean(0) if method == "mse" else _divergence(x, q)
        best, least = torch.where(loss < least, s, best), torch.minimum(loss, least)
    return best


def _reach(x: Tensor, lo: int, hi: int, share: float) -> Tensor:
    """The step whose bounds hold the `share` quantile of each column, on both sides where lo < 0."""

    def quantile(values: Tensor) -> Tensor:
        # torch.quantile refuses large inputs.
        return values.clamp(min=0).sort(0).values[min(int(share * len(values)), len(values) - 1)]

    step = quantile(x) / hi
    return torch.maximum(step, quantile(-x) / -lo) if lo < 0 else step


def _divergence(x: Tensor, q: Tensor) -> Tensor:
    """KL(histogram of x, histogram of q smoothed over the values between two levels), a column at a time."""
    out = []
    for column, quantised in zip(x.T, q.T, strict=True):
        low, high = float(column.min()), float(column.max()) + 1e-12
        p = torch.histc(column, BINS, low, high)
        edges = torch.linspace(low, high, BINS + 1)
        centre = ((edges[:-1] + edges[1:]) / 2).contiguous()
        values, counts = quantised.unique(return_counts=True)
        nearest = torch.bucketize(centre, (values[:-1] + values[1:]) / 2)
        filled = p > 0
        sharing = torch.zeros(len(values)).index_add(0, nearest, filled.float()).clamp(min=1)
        r = torch.where(filled, counts.float()[nearest] / sharing[nearest], 0.0) + 1e-3
        p, r = p / p.sum(), r / r.sum()
        out.append((p[filled] * (p[filled] / r[filled]).log()).sum())
    return torch.stack(out)
