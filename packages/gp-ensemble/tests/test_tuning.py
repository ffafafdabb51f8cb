import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gp_ensemble import GPEnsembleClassifier
from gp_ensemble.errors import NumericalError, UserError
from gp_ensemble.features import Features, Normaliser
from gp_ensemble.gp import SharedKernelGP, one_hot
from gp_ensemble.kernels import EnsembleKernel
from gp_ensemble.priors import log_prior
from gp_ensemble.tuning import SharedSolve, choose_objective, tune

Problem = dict[str, Any]


def spd(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT + 3 * torch.eye(len(x), dtype=x.dtype)


def test_closed_form_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    r = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, r: SharedSolve.apply(spd(x), r), (x, r))


def data(n: int = 30) -> tuple[Features, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    raw = torch.randn(n, 5, generator=generator) + 2 * torch.eye(5)[y]
    return Normaliser.fit({"a": raw, "b": torch.randn(n, 4, generator=generator)}, dtype=torch.float64)[1], one_hot(
        y, 3, torch.float64
    )


def process() -> SharedKernelGP:
    return SharedKernelGP(EnsembleKernel(["a", "b"]))


def test_ml_raises_the_posterior_and_its_value_is_the_likelihood() -> None:
    u, y = data()
    before, after = process().condition(u, y), process()
    tuned = tune(after, u, y, objective="ml")
    after.condition(u, y)

    def value(gp: SharedKernelGP) -> float:
        return gp.log_marginal_likelihood() + float(log_prior(gp).detach())

    assert value(after) > value(before)
    assert -tuned.value * len(y) == pytest.approx(value(after), rel=1e-6)


def test_loo_value_is_the_density_of_the_left_out_labels() -> None:
    u, y = data()
    gp = process()
    tuned = tune(gp, u, y, objective="loo", prior_strength=0.0)
    loo = gp.condition(u, y).leave_one_out()
    density = torch.distributions.Normal(loo.mean, loo.variance.sqrt()[:, None]).log_prob(y).sum()
    assert -tuned.value * len(y) == pytest.approx(float(density), rel=1e-6)


def test_loo_ce_scale_makes_the_residuals_unit_and_leaves_the_mean() -> None:
    u, y = data()
    gp = process()
    tune(gp, u, y, objective="loo_ce")
    loo = gp.condition(u, y).leave_one_out()
    assert float(((y - loo.mean) ** 2 / loo.variance[:, None]).mean()) == pytest.approx(1.0)
    mean = gp.posterior(u).mean
    with torch.no_grad():
        gp.kernel.log_weight += math.log(3.0)
        gp.log_noise += math.log(3.0)
    torch.testing.assert_close(gp.condition(u, y).posterior(u).mean, mean)


def test_weight_goes_to_the_encoder_that_knows() -> None:
    u, y = data()
    gp = process()
    tune(gp, u, y, objective="loo_ce")
    assert float(gp.kernel.weights[0]) > 1.5 * float(gp.kernel.weights[1])


def test_the_prior_holds_the_kernel_at_one_shot(problem: Problem) -> None:
    first = [int(np.flatnonzero(problem["y"] == c)[0]) for c in np.unique(problem["y"])]
    X = {name: array[first] for name, array in problem["X"].items()}
    y = problem["y"][first]
    with pytest.warns(UserWarning, match="negative evidence"):
        free = GPEnsembleClassifier(objective="ml", prior_strength=0.0).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = GPEnsembleClassifier(objective="ml").fit(X, y)
    betas = [max(v for k, v in c.hyperparameters_.items() if k.startswith("beta")) for c in (free, held)]
    assert betas[0] > 2 * betas[1]


def test_auto_depends_on_the_smallest_class() -> None:
    assert [choose_objective("auto", s) for s in (1, 2, 3, 16)] == ["ml", "ml", "loo_ce", "loo_ce"]
    assert choose_objective("loo", 1) == "loo"
    with pytest.raises(UserError, match="expected one of"):
        choose_objective("evidence", 1)


def test_a_hopeless_matrix_says_so() -> None:
    u, y = data()
    gp = process()
    u["a"][0] = math.nan
    with pytest.raises(NumericalError, match="tuning on 30 rows failed with jitter"):
        tune(gp, u, y, objective="ml")
    assert float(gp.log_noise) == pytest.approx(math.log(0.02))
