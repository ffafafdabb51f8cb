"""The prior mean and the class bias of zero-shot logits."""

import numpy as np
import pytest
import torch
from gp_ensemble import GPEnsembleClassifier
from gp_ensemble.gp import one_hot
from gp_ensemble.means import MEANS, class_bias, margin

CLASSES = 5


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4])


@pytest.fixture
def logits(labels: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(labels), CLASSES, generator=generator, dtype=torch.float64) + 2.0 * torch.arange(CLASSES)


@pytest.mark.parametrize("name", MEANS)
def test_rows_sum_to_one(name: str, logits: torch.Tensor) -> None:
    mean = MEANS[name](margin(logits))(logits, *logits.shape, logits.dtype)
    torch.testing.assert_close(mean.sum(1), torch.ones(len(logits), dtype=torch.float64))


def test_class_bias_is_the_shrunk_mean_of_class_means(logits: torch.Tensor, labels: torch.Tensor) -> None:
    z, n = logits - logits.mean(1, keepdim=True), len(labels)
    means = torch.stack([z[labels == c].mean(0) for c in range(CLASSES)]).mean(0)
    weight = torch.stack([1 / (CLASSES * (labels == y).sum()) for y in labels])
    sampling = (
        sum(float(sum(weight[j] ** 2 * (z[j, c] - means[c]) ** 2 for j in range(n))) for c in range(CLASSES)) / CLASSES
    )
    kept = 1 - sampling * n / (n - 1) / float(means.var())
    assert 0.5 < kept < 1
    torch.testing.assert_close(class_bias(logits, one_hot(labels, CLASSES, logits.dtype)), kept * means)


def test_an_even_handed_classifier_has_no_bias() -> None:
    labels = torch.arange(CLASSES)
    z = torch.eye(CLASSES, dtype=torch.float64)
    assert class_bias(z, one_hot(labels, CLASSES, z.dtype)).abs().max() == 0
    noise = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert class_bias(noise, one_hot(labels, CLASSES, z.dtype)).abs().max() < noise.mean(0).abs().max() / 2


def test_the_order_of_classes_does_not_matter(logits: torch.Tensor, labels: torch.Tensor) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    y = one_hot(labels, CLASSES, logits.dtype)
    torch.testing.assert_close(class_bias(logits[:, order], y[:, order]), class_bias(logits, y)[order])


def test_a_classifier_that_always_says_one_class_still_helps() -> None:
    """Noisy logits whose ranking within a class is right and whose class offsets are absurd."""
    rng = np.random.default_rng(0)
    y, test = np.arange(10).repeat(2), np.arange(10).repeat(20)

    def draw(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = 2.0 * np.eye(10)[y] + rng.normal(size=(len(y), 10)) + np.linspace(0, 30, 10)
        return rng.normal(size=(len(y), 8)), z  # the features say nothing

    (x, z), (x_test, z_test) = draw(y), draw(test)
    scores = [GPEnsembleClassifier(debias=debias).fit(x, y, z).score(x_test, test, z_test) for debias in (True, False)]
    assert scores[0] > 0.5 > 0.2 > scores[1]


def test_without_debias_the_logits_are_taken_as_they_are(logits: torch.Tensor, labels: torch.Tensor) -> None:
    x = np.random.default_rng(0).normal(size=(len(labels), 6))
    z, y = logits.numpy(), labels.numpy()
    plain = GPEnsembleClassifier(debias=False, objective="none").fit(x, y, z)
    by_hand = GPEnsembleClassifier(debias=True, objective="none").fit(x, y, z)
    assert plain.prior_bias_ is not None and not plain.prior_bias_.any()
    shifted = GPEnsembleClassifier(debias=False, objective="none").fit(x, y, z - by_hand.prior_bias_.numpy())
    np.testing.assert_allclose(
        shifted.predict_proba(x, z - by_hand.prior_bias_.numpy()), by_hand.predict_proba(x, z), atol=1e-12
    )


def test_a_new_class_keeps_the_bias_of_the_others(logits: torch.Tensor, labels: torch.Tensor) -> None:
    rng = np.random.default_rng(0)
    x, z, y = rng.normal(size=(len(labels), 6)), logits.numpy(), labels.numpy()
    model = GPEnsembleClassifier(objective="none").fit(x, y, z)
    before = model.prior_bias_.clone()
    column = rng.normal(size=len(y))
    model.add_class(
        CLASSES, rng.normal(size=(2, 6)), prior_logits=rng.normal(size=(2, CLASSES + 1)), support_prior_logits=column
    )
    assert torch.equal(model.prior_bias_, torch.cat([before, torch.zeros(1, dtype=torch.float64)]))
    expected = np.concatenate([z - before.numpy(), column[:, None]], axis=1)
    np.testing.assert_allclose(model.gp_.prior_logits[: len(y)].numpy(), expected, atol=1e-12)
