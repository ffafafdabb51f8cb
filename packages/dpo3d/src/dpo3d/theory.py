"""The closed forms behind the three D's (2406.07327, section 3 and appendix A).

For ℓ = −log σ(z), z = β+ Δ+ − β− Δ−, w = σ(−z):

    ∂ℓ/∂log π+ = −β+ w          ∂ℓ/∂log π− = β− w
    ∂ℓ/∂π+     = −β+ w / π+     ∂ℓ/∂π−     = β− w / π−

Everything is computed from log-probabilities: π− underflows within a few hundred steps of DPO.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tenfold_shared.errors import UserError
from torch import Tensor

from dpo3d.losses import PairLogps, check_betas


@dataclass(frozen=True)
class LikelihoodGradients:
    """Natural logarithms of gradient sizes with respect to probabilities, `(batch,)` each."""

    log_chosen: Tensor
    """log |∂ℓ/∂π+|."""
    log_rejected: Tensor
    """log |∂ℓ/∂π−|."""

    @property
    def log_ratio(self) -> Tensor:
        """log of |∂ℓ/∂π−| / |∂ℓ/∂π+|."""
        return self.log_rejected - self.log_chosen


def grad_wrt_likelihood(
    logps: PairLogps,
    *,
    beta: float = 0.1,
    beta_chosen: float | None = None,
    beta_rejected: float | None = None,
    gamma: float = 0.0,
) -> LikelihoodGradients:
    """Gradients of (Flex-, SFT-) DPO with respect to the two likelihoods, as logarithms.

    log |∂ℓ/∂π±| = log β± + log σ(−z) − log π±; γ adds γ/π+ to the chosen side. Finite at log π = −1e4.
    Raises UserError as `preference_loss` does.
    """
    plus = beta if beta_chosen is None else beta_chosen
    minus = beta if beta_rejected is None else beta_rejected
    check_betas(plus, minus)
    logps = logps.checked()
    log_w = F.logsigmoid(-logps.margin(plus, minus))
    log_weight = math.log(plus) + log_w
    if gamma:
        log_weight = torch.logaddexp(log_weight, torch.full_like(log_w, math.log(gamma)))
    log_minus = math.log(minus) if minus > 0 else -math.inf
    return LikelihoodGradients(log_weight - logps.chosen, log_minus + log_w - logps.rejected)


def vanishing_rejected_limit(
    logps: PairLogps, *, beta_chosen: float, beta_rejected: float, gamma: float = 0.0
) -> LikelihoodGradients:
    """The limits of `grad_wrt_likelihood` as π− → 0 (corollary 2, and its Flex and SFT forms).

    |∂ℓ/∂π+| → α β+ π+^(−β+−1) π−^β− (plus γ/π+),  |∂ℓ/∂π−| → α β− π+^(−β+) π−^(β−−1),  α = π0+^β+ / π0−^β−.
    """
    logps = logps.checked()
    log_alpha = beta_chosen * logps.ref_chosen - beta_rejected * logps.ref_rejected
    log_chosen = log_alpha + math.log(beta_chosen) - (beta_chosen + 1) * logps.chosen + beta_rejected * logps.rejected
    if gamma:
        log_chosen = torch.logaddexp(log_chosen, math.log(gamma) - logps.chosen)
    log_rejected = (
        log_alpha + math.log(beta_rejected) - beta_chosen * logps.chosen + (beta_rejected - 1) * logps.rejected
    )
    return LikelihoodGradients(log_chosen, log_rejected)


def likelihood_ratio(logps: PairLogps, *, beta_chosen: float = 1.0, beta_rejected: float = 1.0) -> Tensor:
    """log of |∂ℓ/∂π− / ∂ℓ/∂π+| = (β−/β+) π+/π− (corollary 1); the ratio itself is negative. `(batch,)`."""
    return math.log(beta_rejected / beta_chosen) + logps.chosen - logps.rejected


def reward_model_gradient(reward_chosen: Tensor, reward_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """∂ℓ/∂r+ and ∂ℓ/∂r− of the Bradley-Terry reward loss: equal and opposite, so none of the three D's."""
    w = torch.sigmoid(reward_rejected - reward_chosen)
    return -w, w


def rejected_log_ratio(z: float, delta_chosen: float, *, beta_chosen: float, beta_rejected: float) -> float:
    """Δ− = (β+ Δ+ − z) / β−: for the same margin a smaller β− ends with a *deeper* rejected answer."""
    return (beta_chosen * delta_chosen - z) / beta_rejected


def beta_rejected_peak(delta_chosen: Tensor, delta_rejected: Tensor, beta_chosen: float) -> Tensor:
    """The β− at which the rejected gradient β− σ(−z) is largest, `(batch,)`.

    With a = β+ Δ+ and d = −Δ− > 0 it solves β− d σ(a + β− d) = 1; at a = 0 it is 1.2785 / d. Left of it a smaller β−
    lowers the gradient on the rejected answer, right of it a smaller β− raises it.

    Raises UserError when Δ− >= 0, where the gradient has no peak.
    """
    if not bool((delta_rejected < 0).all()):
        raise UserError(
            "delta_rejected must be below 0", hint="the gradient has a peak only once the rejected has fallen"
        )
    a, d = (beta_chosen * delta_chosen).double(), (-delta_rejected).double()
    # u = β− d solves log u + log σ(a + u) = 0, whose left side grows in u; σ >= 1/2 or a < 0 bounds u.
    low, high = torch.ones_like(a), 2 + (-a).clamp(min=0)
    for _ in range(80):
        middle = (low + high) / 2
        above = middle.log() + F.logsigmoid(a + middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ((low + high) / 2 / d).to(delta_rejected.dtype)


@dataclass(frozen=True)
class Band:
    """Where β+/β− must lie for a small plain-gradient step to raise the chosen and lower the rejected answer."""

    low: float
    """⟨g+, g−⟩ / ‖g+‖²: below it the chosen falls."""
    high: float
    """‖g−‖² / ⟨g+, g−⟩: above it the rejected rises; infinite when the gradients do not point the same way."""

    def holds(self, beta_chosen: float, beta_rejected: float) -> bool:
        """Whether β+/β− is inside."""
        return self.low * beta_rejected <= beta_chosen and beta_chosen <= self.high * beta_rejected


def displacement_band(chosen_chosen: float, chosen_rejected: float, rejected_rejected: float) -> Band:
    """The first-order band from ⟨g+, g+⟩, ⟨g+, g−⟩ and ⟨g−, g−⟩, with g± the parameter gradients of log π±.

    A diagnostic: it is first-order and for plain gradient steps, so Adam and saturation are outside it.

    Raises UserError when a norm is not positive.
    """
    if not (chosen_chosen > 0 and rejected_rejected > 0):
        raise UserError(f"squared norms are {chosen_chosen} and {rejected_rejected}, expected more than 0")
    return Band(
        chosen_rejected / chosen_chosen, rejected_rejected / chosen_rejected if chosen_rejected > 0 else math.inf
    )


def tabular_descent(
    logits: Tensor, chosen: int, rejected: int, *, beta: float = 0.1, steps: int = 1000, learning_rate: float = 1.0
) -> Tensor:
    """log π of one free softmax row under gradient descent on DPO, `(steps + 1, responses)`: the control.

    log π+ − log π− is a difference of logits, the normaliser cancels, and π+ rises monotonically to 1. Degradation and
    dispersion need parameters that answers share.
    """
    reference = logits.detach().double().log_softmax(-1)
    free, rows = logits.detach().double().clone(), [reference]
    for _ in range(steps):
        now = free.log_softmax(-1)
        z = beta * (now[chosen] - reference[chosen] - now[rejected] + reference[rejected])
        step = learning_rate * beta * torch.sigmoid(-z)
        free[chosen] += step
        free[rejected] -= step
        rows.append(free.log_softmax(-1))
    return torch.stack(rows)
