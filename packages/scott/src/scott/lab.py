"""The solver lab: how well a noise function keeps the marginals when the denoiser is exact.

With an exact x̂ and small steps every solver of the family ends on the data's distribution. What is left at few steps is
the solver's own error, and it differs by noise function; a short probe tells which one suits a number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scott.metrics import sliced_wasserstein
from scott.mixture import GaussianMixture
from scott.schedule import NoiseSchedule
from scott.solvers import NOISE_FUNCTIONS, SDESolver


@dataclass(frozen=True)
class MarginalError:
    """Sliced 2-Wasserstein distance of a solver's samples to data, beside that of data to data."""

    noise: str
    steps: int
    error: float
    floor: float


def marginal_error(solver: SDESolver, mixture: GaussianMixture, *, n: int = 4000, seed: int = 0) -> tuple[float, float]:
    """Run a solver from pure noise to clean data with the exact denoiser.

    Returns the sliced 2-Wasserstein distance to n fresh points, and that between two fresh draws of n points, averaged
    over eight pairs: how often each mode comes up makes one pair a poor measure.
    """
    generator = torch.Generator().manual_seed(seed)
    real, label = mixture.sample(n, generator=generator)
    z = torch.randn(n, 2, generator=generator)
    start = torch.full((n,), solver.schedule.timesteps - 1)
    x = solver.solve(z, start, torch.full_like(start, -1), lambda z, t: mixture.x0(z, t, label), generator=generator)
    draws = [mixture.sample(n, generator=generator)[0] for _ in range(16)]
    floors = [sliced_wasserstein(a, b) for a, b in zip(draws[::2], draws[1::2], strict=True)]
    return sliced_wasserstein(real, x), sum(floors) / len(floors)


def solver_check(
    schedule: NoiseSchedule,
    *,
    noises: Sequence[str] = tuple(NOISE_FUNCTIONS),
    steps: Sequence[int] = (10, 50, 1000),
    n: int = 4000,
    seed: int = 0,
) -> list[MarginalError]:
    """The error of every noise function at every number of steps, on the exact mixture. Errors as in `SDESolver`."""
    mixture = GaussianMixture(schedule)
    rows = []
    for noise in noises:
        for count in steps:
            solver = SDESolver(schedule, "er-sde", noise=noise, substeps=count)
            rows.append(MarginalError(noise, count, *marginal_error(solver, mixture, n=n, seed=seed)))
    return rows


def choose_noise(schedule: NoiseSchedule, *, steps: int, n: int = 2000, seed: int = 0) -> str:
    """The noise function with the least marginal error at this number of steps, by a probe of a few seconds."""
    rows = solver_check(schedule, steps=(steps,), n=n, seed=seed)
    return min(rows, key=lambda row: row.error).noise
