"""Accuracy, proper scores, calibration and detection, from probabilities (n, C) and class numbers (n,)."""

from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve


def accuracy(proba: np.ndarray, y: np.ndarray) -> float:
    """Share of images whose likeliest class is the true one."""
    return float((proba.argmax(1) == y).mean())


def nll(proba: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log probability of the true class, in nats."""
    return float(-np.log(np.maximum(proba[np.arange(len(y)), y], 1e-12)).mean())


def brier(proba: np.ndarray, y: np.ndarray) -> float:
    """Mean squared distance to the one-hot label, summed over classes."""
    return float(((proba - np.eye(proba.shape[1])[y]) ** 2).sum(1).mean())


def ece(proba: np.ndarray, y: np.ndarray, *, bins: int = 15, equal_mass: bool = False) -> float:
    """Expected calibration error: mean |accuracy - confidence| over bins of confidence, weighted by their share.

    Bins are of equal width, as torchmetrics' `multiclass_calibration_error(norm="l1")` has them, or of equal mass.
    """
    confidence, right = proba.max(1), proba.argmax(1) == y
    if equal_mass:
        number: Any = np.empty(len(y), dtype=int)
        number[np.argsort(confidence, kind="stable")] = np.arange(len(y)) * bins // len(y)
    else:
        number = np.clip(np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="right") - 1, 0, bins - 1)
    gap = np.bincount(number, right - confidence, bins)
    return float(np.abs(gap).sum() / len(y))


def reliability(proba: np.ndarray, y: np.ndarray, *, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and count of each bin of equal width that is not empty."""
    confidence, right = proba.max(1), proba.argmax(1) == y
    number = np.clip((confidence * bins).astype(int), 0, bins - 1)
    count = np.bincount(number, minlength=bins)
    full = count > 0
    sums = [np.bincount(number, values, bins)[full] / count[full] for values in (confidence, right)]
    return sums[0], sums[1], count[full]


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Chance that an outsider scores above an insider."""
    return float(roc_auc_score(*_labelled(inside, outside)))


def fpr95(inside: np.ndarray, outside: np.ndarray) -> float:
    """Share of insiders that are raised when 95 % of the outsiders are."""
    false_rate, true_rate, _ = roc_curve(*_labelled(inside, outside), drop_intermediate=False)
    return float(false_rate[np.argmax(true_rate >= 0.95)])


def evaluate(proba: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """All scores of labelled images."""
    return {
        "accuracy": accuracy(proba, y),
        "nll": nll(proba, y),
        "brier": brier(proba, y),
        "ece": ece(proba, y),
        "ece_mass": ece(proba, y, equal_mass=True),
    }


def _labelled(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.r_[np.zeros(len(inside)), np.ones(len(outside))], np.r_[inside, outside]
