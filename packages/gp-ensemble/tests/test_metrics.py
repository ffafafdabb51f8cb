import numpy as np
import pytest
import torch
from gp_ensemble import metrics
from torchmetrics.functional import accuracy, auroc
from torchmetrics.functional.classification import multiclass_calibration_error


def predictions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 7)) * 2
    y = np.where(rng.random(500) < 0.6, logits.argmax(1), rng.integers(0, 7, 500))
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True), y


def test_scores_are_torchmetrics() -> None:
    p, y = predictions()
    a, b = torch.from_numpy(p), torch.from_numpy(y)
    expected = multiclass_calibration_error(a, b, num_classes=7, n_bins=15, norm="l1")
    assert metrics.ece(p, y) == pytest.approx(float(expected), abs=1e-6)
    assert metrics.accuracy(p, y) == pytest.approx(float(accuracy(a, b, task="multiclass", num_classes=7)))
    assert metrics.nll(p, y) == pytest.approx(float(torch.nn.functional.nll_loss(a.log(), b)))
    inside, outside = p.max(1)[:250], p.max(1)[250:] + 0.1
    target = torch.arange(500) >= 250
    score = torch.from_numpy(np.r_[inside, outside])
    assert metrics.auroc(inside, outside) == pytest.approx(float(auroc(score, target, task="binary")), abs=1e-6)


def test_certain_and_right() -> None:
    p, y = np.eye(3), np.arange(3)
    assert metrics.evaluate(p, y) == {"accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0, "ece_mass": 0.0}
    wrong = metrics.evaluate(p, np.asarray([1, 2, 0]))
    assert wrong["accuracy"] == 0 and wrong["ece"] == 1 and wrong["brier"] == 2


def test_equal_mass_bins_of_a_constant_gap() -> None:
    p = np.full((100, 2), 0.5)
    y = np.arange(100) % 4 == 0
    assert metrics.ece(p, y.astype(int), bins=5, equal_mass=True) == pytest.approx(0.25)


def test_detection() -> None:
    assert metrics.auroc(np.zeros(5), np.ones(5)) == 1 and metrics.fpr95(np.zeros(5), np.ones(5)) == 0
    assert metrics.fpr95(np.arange(100.0), np.arange(100.0)) == pytest.approx(0.95)


def test_reliability_counts_every_image() -> None:
    p, y = predictions()
    confidence, accuracy, count = metrics.reliability(p, y)
    assert count.sum() == 500
    assert float((np.abs(accuracy - confidence) * count).sum() / 500) == pytest.approx(metrics.ece(p, y))
