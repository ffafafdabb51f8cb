import math

import pytest
import torch
import torch.nn.functional as F
from dpo3d.losses import PairLogps
from dpo3d.theory import (
    beta_rejected_peak,
    displacement_band,
    grad_wrt_likelihood,
    likelihood_ratio,
    rejected_log_ratio,
    reward_model_gradient,
    tabular_descent,
    vanishing_rejected_limit,
)
from tenfold_shared.errors import UserError

DOUBLE = torch.float64


def pairs(rejected: float | None = None) -> PairLogps:
    generator = torch.Generator().manual_seed(0)
    values = [-6 * torch.rand(16, generator=generator, dtype=DOUBLE) - 0.05 for _ in range(4)]
    if rejected is not None:
        values[1] = torch.full((16,), rejected, dtype=DOUBLE)
    return PairLogps(*values)


@pytest.mark.parametrize("betas", [(0.1, 0.1), (0.1, 0.02), (0.5, 0.3)])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_closed_form_is_autograd(betas: tuple[float, float], gamma: float) -> None:
    logps = pairs()
    chosen, rejected = logps.chosen.exp().requires_grad_(), logps.rejected.exp().requires_grad_()
    z = betas[0] * (chosen.log() - logps.ref_chosen) - betas[1] * (rejected.log() - logps.ref_rejected)
    (-F.logsigmoid(z) - gamma * chosen.log()).sum().backward()
    found = grad_wrt_likelihood(logps, beta_chosen=betas[0], beta_rejected=betas[1], gamma=gamma)
    torch.testing.assert_close(-found.log_chosen.exp(), chosen.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.log_rejected.exp(), rejected.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("betas", [(0.1, 0.1), (0.1, 0.02)])
def test_corollary_1(betas: tuple[float, float]) -> None:
    logps = pairs()
    found = grad_wrt_likelihood(logps, beta_chosen=betas[0], beta_rejected=betas[1]).log_ratio
    expected = (betas[1] / betas[0] * logps.chosen.exp() / logps.rejected.exp()).log()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    ratio = likelihood_ratio(logps, beta_chosen=betas[0], beta_rejected=betas[1])
    torch.testing.assert_close(found, ratio, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("betas", "gamma"), [((0.1, 0.1), 0.0), ((0.1, 0.05), 0.0), ((0.1, 0.1), 0.1)])
def test_corollary_2_is_the_limit(betas: tuple[float, float], gamma: float) -> None:
    logps = pairs(rejected=-1500.0)
    found = grad_wrt_likelihood(logps, beta_chosen=betas[0], beta_rejected=betas[1], gamma=gamma)
    limit = vanishing_rejected_limit(logps, beta_chosen=betas[0], beta_rejected=betas[1], gamma=gamma)
    torch.testing.assert_close(found.log_chosen, limit.log_chosen, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.log_rejected, limit.log_rejected, rtol=1e-10, atol=1e-10)


def test_corollary_2_vanishes_and_explodes_and_gamma_keeps_the_chosen_alive() -> None:
    at = [grad_wrt_likelihood(pairs(rejected=r)) for r in (-10.0, -100.0, -1000.0)]
    assert (at[0].log_chosen > at[1].log_chosen).all() and (at[1].log_chosen > at[2].log_chosen).all()
    assert (at[2].log_rejected > at[1].log_rejected).all()
    alive = grad_wrt_likelihood(pairs(rejected=-1e4), gamma=0.1)
    torch.testing.assert_close(alive.log_chosen, math.log(0.1) - pairs().chosen)


def test_finite_in_log_space_far_out() -> None:
    far = PairLogps(*(torch.full((3,), v) for v in (-1e4, -1e4, -5.0, -5.0)))
    found = grad_wrt_likelihood(far, beta_rejected=0.02)
    assert all(t.isfinite().all() for t in (found.log_chosen, found.log_rejected, found.log_ratio))


def test_reward_model_is_balanced() -> None:
    chosen = torch.randn(9, dtype=DOUBLE, requires_grad=True)
    rejected = torch.randn(9, dtype=DOUBLE, requires_grad=True)
    (-F.logsigmoid(chosen - rejected)).sum().backward()
    plus, minus = reward_model_gradient(chosen.detach(), rejected.detach())
    torch.testing.assert_close(plus, chosen.grad)
    torch.testing.assert_close(minus, rejected.grad)
    torch.testing.assert_close(plus, -minus)


def test_peak_solves_its_equation_and_is_the_maximum() -> None:
    delta_chosen = torch.tensor([-40.0, -3.0, 0.0, 2.0, 500.0], dtype=DOUBLE)
    delta_rejected = torch.tensor([-60.0, -5.0, -20.0, -100.0, -0.1], dtype=DOUBLE)
    peak = beta_rejected_peak(delta_chosen, delta_rejected, 0.1)
    a, d = 0.1 * delta_chosen, -delta_rejected
    torch.testing.assert_close(peak * d * torch.sigmoid(a + peak * d), torch.ones_like(d), rtol=1e-12, atol=1e-12)
    gradient = lambda b: b * torch.sigmoid(-(a + b * d))  # noqa: E731
    assert (gradient(peak) > gradient(peak * 0.9)).all() and (gradient(peak) > gradient(peak * 1.1)).all()
    assert (peak[2] * 20.0).item() == pytest.approx(1.2785, abs=1e-4)


def test_same_margin_goes_deeper_with_a_smaller_beta() -> None:
    depth = [rejected_log_ratio(5.0, 1.0, beta_chosen=0.1, beta_rejected=b) for b in (0.1, 0.05, 0.02)]
    assert depth == sorted(depth, reverse=True) and depth[0] == pytest.approx((0.1 - 5) / 0.1)


def test_tabular_dpo_is_monotone() -> None:
    for seed in range(3):
        logits = torch.randn(10, generator=torch.Generator().manual_seed(seed))
        path = tabular_descent(logits, 0, 4, steps=20000, learning_rate=20.0)
        assert (path[1:, 0] >= path[:-1, 0]).all() and (path[1:, 4] <= path[:-1, 4]).all()
        assert path[-1, 0].exp() > 0.95
        others = path[:, [1, 2, 3, 5, 6, 7, 8, 9]].logsumexp(-1)
        assert others[-1] < others[0]


def test_band_is_first_order_exact() -> None:
    plus, minus = torch.tensor([1.0, 0.5]), torch.tensor([0.8, 1.4])
    band = displacement_band(*(float(a @ b) for a, b in ((plus, plus), (plus, minus), (minus, minus))))
    for ratio in (band.low * 0.99, band.low * 1.01, band.high * 0.99, band.high * 1.01):
        step = ratio * plus - minus
        assert band.holds(ratio, 1.0) == (float(step @ plus) >= 0 and float(step @ minus) <= 0)
    assert displacement_band(1.0, -0.2, 1.0).high == math.inf


def test_errors() -> None:
    with pytest.raises(UserError, match="must be below 0"):
        beta_rejected_peak(torch.zeros(1), torch.zeros(1), 0.1)
    with pytest.raises(UserError, match="squared norms"):
        displacement_band(0.0, 0.0, 1.0)
    with pytest.raises(UserError, match="beta_chosen is -1"):
        grad_wrt_likelihood(pairs(), beta_chosen=-1)
