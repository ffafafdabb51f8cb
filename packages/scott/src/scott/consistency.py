"""Consistency distillation with a stochastic target.

    f_θ(z, t) = c_skip(t) z + c_out(t) x̂_θ(z, t)
    c_skip = σ_d² / ((κ t)² + σ_d²),   c_out = κ t / √((κ t)² + σ_d²),   σ_d = 0.5, κ = 10   (as diffusers' LCMScheduler)
    L_CD = w(t_n) d( f_θ(z, t_n), f_θ⁻(ẑ, t_m) ),   ẑ = Ψ_h(z, t_n → t_m), h steps of an SDE solver   (2403.01505)

With the squared error the minimum of L_CD is the mean of x_0 over the solver's own paths. Full noise makes that the
posterior mean, from which nothing is gained in one step; no noise makes it the end point of the ODE. What the noise buys is
correction of earlier errors, and it is paid for with blur at few steps.
"""

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from scott.schedule import NoiseSchedule, like
from scott.solvers import Generator, PredictX0, SDESolver

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
LOSSES = ("l2", "huber")
WEIGHTINGS = ("uniform", "min-snr")


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at time t (long), float64, in the shape of t; 1 and 0 at t = 0."""
    scaled = t.double() * TIMESTEP_SCALING
    square = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, scaled / square.sqrt()


def consistency_function(predict_x0: PredictX0) -> PredictX0:
    """f(z, t) from a denoiser x̂(z, t): the identity at t = 0 by construction."""

    def f(z: Tensor, t: Tensor) -> Tensor:
        c_skip, c_out = boundary_scalings(t)
        return like(c_skip, z) * z + like(c_out, z) * predict_x0(z, t)

    return f


def guided(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance, ε(∅) + ω (ε(c) − ε(∅)), on whatever the network predicts. guidance: number or (*batch)."""
    scale = like(guidance, conditional) if isinstance(guidance, Tensor) else guidance
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def stochastic_target(
    solver: SDESolver,
    z: Tensor,
    *,
    t_n: Tensor,
    t_m: Tensor,
    teacher: PredictX0,
    target: PredictX0,
    draws: int = 1,
    generator: Generator = None,
) -> Tensor:
    """f_θ⁻(Ψ_h(z, t_n → t_m), t_m), without a gradient.

    z: (*batch, ...); t_n, t_m: long (*batch). teacher: guided x̂. target: f_θ⁻, a consistency function.
    draws: solver paths per sample that are averaged; more of them lower the variance of the gradient, not its mean (l2).
    """
    total = torch.zeros_like(z)
    for _ in range(draws):
        total += target(solver.solve(z, t_n, t_m, teacher, generator=generator), t_m)
    return total / draws


def distance(prediction: Tensor, target: Tensor, kind: str = "l2", *, huber_c: float = 1e-3, dims: int = 1) -> Tensor:
    """d(a, b) per sample: the mean square, or the mean pseudo-Huber √(δ² + c²) − c.

    prediction, target: (*batch, ...), the batch being the first `dims` dimensions. Returns (*batch).
    """
    if kind not in LOSSES:
        raise UserError(f"loss '{kind}' is unknown", hint=f"expected {', '.join(LOSSES)}")
    square = (prediction.float() - target.float()) ** 2
    if kind == "huber":
        square = (square + huber_c**2).sqrt() - huber_c
    return square.flatten(dims).mean(-1)


def loss_weight(schedule: NoiseSchedule, t: Tensor, kind: str = "uniform") -> Tensor:
    """w(t): 1, or min(1/λ², 5)/5, which takes the weight off the noisiest times."""
    if kind not in WEIGHTINGS:
        raise UserError(f"weighting '{kind}' is unknown", hint=f"expected {', '.join(WEIGHTINGS)}")
    if kind == "uniform":
        return torch.ones_like(t, dtype=torch.float32)
    return (schedule.lam(t) ** -2).clamp(max=5).div(5).float()


def training_times(
    n: int, *, timesteps: int, skip: int, grid: int | None = 50, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """n times t_n and their t_m = max(t_n − skip, 0).

    grid: t_n on the grid that LCMScheduler samples from (50 gives 19, 39, ..., 999), or None for all of 1 .. timesteps − 1.
    """
    if grid is None:
        t_n = torch.randint(1, timesteps, (n,), generator=generator)
    else:
        t_n = (torch.randint(1, grid + 1, (n,), generator=generator)) * (timesteps // grid) - 1
    return t_n, (t_n - skip).clamp(min=0)


def update_average(average: list[Tensor], current: list[Tensor], decay: float) -> None:
    """θ⁻ ← decay θ⁻ + (1 − decay) θ, in place."""
    with torch.no_grad():
        torch._foreach_lerp_(average, current, 1 - decay)
