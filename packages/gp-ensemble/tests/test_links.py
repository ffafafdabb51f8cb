import math

import pytest
import torch
from gp_ensemble.errors import UserError
from gp_ensemble.links import (
    LINKS,
    TEMPERATURE,
    argmax,
    fit_temperature,
    get_link,
    mean_field,
    softmax,
    temperature_width,
)


@pytest.mark.parametrize("classes", [2, 5, 60])
def test_argmax_is_monte_carlo(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    mean = 0.3 * torch.randn(1, classes, dtype=torch.float64, generator=generator)
    if classes == 60:
        mean = mean / 30  # many near-equal classes: the largest lies far above the largest mean
    variance = torch.tensor([0.04], dtype=torch.float64)
    counts = torch.zeros(classes, dtype=torch.float64)
    for _ in range(10):
        draws = mean + 0.2 * torch.randn(100_000, classes, dtype=torch.float64, generator=generator)
        counts += torch.bincount(draws.argmax(1), minlength=classes)
    got = argmax(mean, variance)
    assert float((got[0] - counts / 1e6).abs().max()) < 3e-3
    assert float(got.sum()) == pytest.approx(1.0)


def test_argmax_of_two_classes_is_the_normal_cdf() -> None:
    mean, variance = torch.tensor([[0.7, 0.4]], dtype=torch.float64), torch.tensor([0.09], dtype=torch.float64)
    expected = 0.5 * (1 + math.erf(0.3 / math.sqrt(2 * 0.09) / math.sqrt(2)))
    assert float(argmax(mean, variance)[0, 0]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", LINKS)
def test_links_are_distributions_that_keep_the_order(name: str) -> None:
    mean = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.3]], dtype=torch.float64)
    p = get_link(name)(mean, torch.tensor([0.01, 0.0], dtype=torch.float64), 0.1)
    torch.testing.assert_close(p.sum(1), torch.ones(2, dtype=torch.float64))
    assert torch.equal(p.argsort(1), mean.argsort(1)) and torch.isfinite(p).all()


def test_mean_field_without_variance_is_softmax_and_variance_flattens() -> None:
    mean = torch.tensor([[0.2, 0.8]])
    torch.testing.assert_close(mean_field(mean, torch.zeros(1), 0.1), softmax(mean, torch.zeros(1), 0.1))
    assert float(mean_field(mean, torch.ones(1), 0.1).max()) < float(softmax(mean, torch.ones(1), 0.1).max())


def test_temperature_minimises_the_penalised_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (50,), generator=generator)
    mean = torch.nn.functional.one_hot(y, 4) * 0.5 + 0.25 * torch.randn(50, 4, generator=generator)

    def loss(t: float) -> float:
        entropy = torch.nn.functional.cross_entropy(mean.double() / t, y, reduction="sum")
        return float(entropy) + 0.5 * math.log(t / TEMPERATURE) ** 2 / 0.3**2

    best = fit_temperature(mean, y, 0.3)
    assert all(loss(best) <= loss(best * step) + 1e-6 for step in (0.97, 1.03))


def test_one_shot_keeps_the_temperature() -> None:
    assert [temperature_width(s) for s in (1, 2, 3, 16)] == [0.0, 0.1, 0.3, 0.3]
    assert fit_temperature(torch.zeros(3, 3), torch.arange(3), 0.0) == TEMPERATURE


def test_unknown_link() -> None:
    with pytest.raises(UserError, match="expected one of"):
        get_link("probit")
