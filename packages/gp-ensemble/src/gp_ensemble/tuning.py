"""Choosing the hyper-parameters from the training images alone; no validation split, no gradient through a network.

Each objective is minimised per row, with the log prior of every parameter added (MAP):

    ml      1/2 tr(R^T alpha) + C/2 log|A| + nC/2 log 2 pi                    negative log marginal likelihood
    loo     1/2 sum ((Y - mu_loo)^2 / v_loo + log v_loo + log 2 pi)           negative leave-one-out log density
    loo_ce  sum_j cross-entropy(softmax(mu_loo_j / T), y_j)                   learns T as well

With one image per class no two training images share a class, so the data hold only negative evidence for similarity,
and the priors are what keeps the kernel from becoming diagonal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gpytorch.priors import NormalPrior
from scipy.optimize import minimize
from tenfold_shared.errors import UserError
from torch import Tensor

from gp_ensemble.errors import NumericalError
from gp_ensemble.features import Features
from gp_ensemble.gp import SharedKernelGP
from gp_ensemble.links import TEMPERATURE, temperature_width
from gp_ensemble.priors import log_prior

OBJECTIVES = ("auto", "ml", "loo", "loo_ce", "none")
MAX_ITERATIONS = 50


class SharedSolve(torch.autograd.Function):
    """(A, R) -> alpha = A^-1 R, q = diag(A^-1), log|A|, by one Cholesky factorisation.

    The gradient is in closed form, so the factorisation's own backward graph is never stored: with B = A^-1 and g the
    incoming gradients,

        dA = -sym(B g_alpha alpha^T) - B diag(g_q) B + g_logdet B,      dR = B g_alpha.

    For the marginal likelihood that is dA = (C B - alpha alpha^T) / 2. A is symmetric (n, n), R is (n, C).
    """

    @staticmethod
    def forward(ctx, a: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        factor, info = torch.linalg.cholesky_ex(a)
        if info > 0 or not torch.isfinite(factor).all():
            raise torch.linalg.LinAlgError("the kernel matrix is not positive definite")
        inverse = torch.cholesky_inverse(factor)
        alpha = torch.cholesky_solve(r, factor)
        ctx.save_for_backward(inverse, alpha)
        ctx.set_materialize_grads(False)
        return alpha, inverse.diagonal().clone(), 2 * factor.diagonal().log().sum()

    @staticmethod
    def backward(ctx, g_alpha, g_q, g_logdet):  # type: ignore[no-untyped-def]
        inverse, alpha = ctx.saved_tensors
        grad_a, grad_r = torch.zeros_like(inverse), None
        if g_alpha is not None:
            grad_r = inverse @ g_alpha
            outer = grad_r @ alpha.mT
            grad_a -= (outer + outer.mT) / 2
        if g_q is not None:
            grad_a -= (inverse * g_q) @ inverse
        if g_logdet is not None:
            grad_a += g_logdet * inverse
        return grad_a, grad_r


@dataclass(frozen=True)
class Tuned:
    """What `tune` did. Its result is in the parameters of the process."""

    objective: str
    """The objective that was minimised, `none` when nothing was."""
    rows: int
    value: float
    """Objective per row at the end, log prior included."""
    iterations: int
    jitter: float


def choose_objective(objective: str, smallest_class: int) -> str:
    """`auto` is `ml` when the smallest class has one or two images and `loo_ce` otherwise."""
    if objective not in OBJECTIVES:
        raise UserError(f"objective is {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    if objective != "auto":
        return objective
    return "ml" if smallest_class <= 2 else "loo_ce"


def tune(
    gp: SharedKernelGP,
    features: Features,
    targets: Tensor,
    *,
    objective: str,
    prior_logits: Tensor | None = None,
    noise_scale: Tensor | None = None,
    prior_strength: float = 1.0,
) -> Tuned:
    """Set the parameters of `gp` to the minimum of an objective on n rows.

    features: unit rows in float64. targets: Y (n, C). prior_logits: z (n, C). noise_scale: (n,).
    Raises NumericalError when the matrix stays indefinite with the largest jitter.
    """
    n, classes = targets.shape
    if objective == "none":
        return Tuned("none", n, math.nan, 0, 0.0)
    y = targets.argmax(1)
    counts = targets.sum(0)
    width = temperature_width(int(counts[counts > 0].min())) or 0.1
    log_t = torch.tensor(math.log(TEMPERATURE), dtype=targets.dtype, requires_grad=True)
    t_prior = NormalPrior(math.log(TEMPERATURE), width)
    prepared = gp.kernel.prepare(features)
    scale = targets.new_ones(n) if noise_scale is None else noise_scale.to(targets)
    jitter = 0.0

    def loss() -> Tensor:
        a = gp.kernel.evaluate(prepared) + torch.diag(gp.log_noise.exp().to(targets) * scale + jitter)
        residual = targets - gp.mean(prior_logits, n, classes, targets.dtype).to(targets)
        alpha, q, logdet = SharedSolve.apply(a, residual)
        value = OBJECTIVE_TERMS[objective](residual, targets, y, alpha, q, logdet, log_t)
        prior = log_prior(gp) + (t_prior.log_prob(log_t) if objective == "loo_ce" else 0.0)
        return (value - prior_strength * prior) / n

    parameters = [p for p in gp.parameters() if p.requires_grad] + ([log_t] if objective == "loo_ce" else [])
    good = [p.detach().clone() for p in parameters]
    best, iterations = math.inf, 0
    for attempt in range(7):
        try:
            best, iterations = _minimise(loss, parameters)
            break
        except (torch.linalg.LinAlgError, FloatingPointError) as error:
            with torch.no_grad():
                for parameter, value in zip(parameters, good, strict=True):
                    parameter.copy_(value)
            if attempt == 6:
                raise NumericalError(
                    f"tuning on {n} rows failed with jitter {jitter:g}",
                    hint="remove duplicate images, raise prior_strength, or use objective='none'",
                ) from error
            jitter = 1e-8 if jitter == 0 else jitter * 10
    if objective == "loo_ce":
        _calibrate_scale(gp, prepared, targets, prior_logits, scale, jitter)
    return Tuned(objective, n, best, iterations, jitter)


def _minimise(loss: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[float, int]:
    """L-BFGS until the loss falls by less than 1e-5 of itself; leaves the parameters at the minimum."""

    def put(x: np.ndarray) -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, torch.from_numpy(x).split(sizes), strict=True):
                parameter.copy_(value.reshape(parameter.shape))

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        put(x)
        value = loss()
        gradient = torch.autograd.grad(value, parameters)
        flat = torch.cat([g.reshape(-1).cpu() for g in gradient]).numpy()
        if not (torch.isfinite(value) and np.isfinite(flat).all()):
            raise FloatingPointError("the objective is not finite")
        return value.item(), flat

    sizes = [p.numel() for p in parameters]
    start = torch.cat([p.detach().reshape(-1).cpu() for p in parameters]).numpy()
    options = {"maxiter": MAX_ITERATIONS, "ftol": 1e-5}
    found = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    put(found.x)
    return float(found.fun), int(found.nit)


@torch.no_grad()
def _calibrate_scale(
    gp: SharedKernelGP, prepared: list, targets: Tensor, prior_logits: Tensor | None, scale: Tensor, jitter: float
) -> None:
    """Multiply all weights and the noise by c = mean (Y - mu_loo)^2 / v_loo.

    That leaves mu as it is and multiplies v by c. The cross-entropy does not see the scale of v; this c maximises the
    Gaussian leave-one-out density.
    """
    n, classes = targets.shape
    a = gp.kernel.evaluate(prepared) + torch.diag(gp.log_noise.exp().to(targets) * scale + jitter)
    residual = targets - gp.mean(prior_logits, n, classes, targets.dtype).to(targets)
    alpha, q, _ = SharedSolve.apply(a, residual)
    c = (alpha**2 / q[:, None]).mean()
    gp.kernel.log_weight += c.log()
    gp.log_noise += c.log()


def _ml(
    residual: Tensor, targets: Tensor, y: Tensor, alpha: Tensor, q: Tensor, logdet: Tensor, log_t: Tensor
) -> Tensor:
    n, classes = targets.shape
    return 0.5 * (residual * alpha).sum() + classes / 2 * logdet + n * classes / 2 * math.log(2 * math.pi)


def _loo(
    residual: Tensor, targets: Tensor, y: Tensor, alpha: Tensor, q: Tensor, logdet: Tensor, log_t: Tensor
) -> Tensor:
    n, classes = targets.shape
    # (Y - mu_loo)^2 / v_loo = (alpha / q)^2 q
    return 0.5 * (alpha**2 / q[:, None]).sum() - classes / 2 * q.log().sum() + n * classes / 2 * math.log(2 * math.pi)


def _loo_ce(
    residual: Tensor, targets: Tensor, y: Tensor, alpha: Tensor, q: Tensor, logdet: Tensor, log_t: Tensor
) -> Tensor:
    return torch.nn.functional.cross_entropy((targets - alpha / q[:, None]) / log_t.exp(), y, reduction="sum")


OBJECTIVE_TERMS = {"ml": _ml, "loo": _loo, "loo_ce": _loo_ce}
