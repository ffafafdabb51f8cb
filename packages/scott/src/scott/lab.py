"""The solver lab: how well a noise function keeps the marginals when the denoiser is exact.

With an exact x̂ and small steps every solver of the family ends on the data's distribution. What is left at few steps is
the solver's own error, and it differs by noise function; a short probe tells which one suits a number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

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


def marginal_error(
    solver: SDESolver, mixture: GaussianMixture, *, n: int = 1000, pairs: int = 16, seed: int = 0
) -> tuple[float, float]:
    """Run a solver from pure noise to clean data with the exact denoiser.

    Returns the sliced 2-Wasserstein distance of n of its samples to n fresh points, and that between two fresh draws of n
    points, averaged over `pairs` and over 64 pairs: how often each mode comes up makes one pair a poor measure.
    """
    error = solver_distance(solver, mixture, n=n, pairs=pairs, seed=seed)
    return error, data_distance(mixture, n=n, seed=seed)


def solver_distance(solver: SDESolver, mixture: GaussianMixture, *, n: int, pairs: int = 16, seed: int = 0) -> float:
    """The first of the two numbers of `marginal_error`."""
    generator = torch.Generator().manual_seed(seed)
    label = mixture.sample(pairs * n, generator=generator)[1][None]
    # All points as one sample: they share their times, and the solver then looks each time up once.
    z, start = torch.randn(1, pairs * n, 2, generator=generator), torch.tensor([solver.schedule.timesteps - 1])
    (x,) = solver.solve(z, start, torch.full_like(start, -1), lambda z, t: mixture.x0(z, t, label), generator=generator)
    return mean_distance(mixture, x, n=n, seed=seed)


def mean_distance(mixture: GaussianMixture, x: Tensor, *, n: int, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of n points to n of the data, averaged over the groups of n in x, (pairs · n, 2)."""
    generator = torch.Generator().manual_seed(seed + 2**32)
    found = [sliced_wasserstein(mixture.sample(n, generator=generator)[0], part) for part in x.split(n)]
    return sum(found) / len(found)


def data_distance(mixture: GaussianMixture, *, n: int, pairs: int = 64, seed: int = 0) -> float:
    """What `mean_distance` is for data themselves."""
    x, _ = mixture.sample(pairs * n, generator=torch.Generator().manual_seed(seed + 2**33))
    return mean_distance(mixture, x, n=n, seed=seed)


def solver_check(
    schedule: NoiseSchedule,
    *,
    noises: Sequence[str] = tuple(NOISE_FUNCTIONS),
    steps: Sequence[int] = (10, 50, 1000),
    n: int = 1000,
    seed: int = 0,
) -> list[MarginalError]:
    """The error of every noise function at every number of steps, on the exact mixture.

    Raises UserError as SDESolver does, and for more steps than the schedule has.
    """
    if too_many := [count for count in steps if count > schedule.timesteps]:
        raise UserError(f"{too_many[0]} solver steps, but the schedule has {schedule.timesteps}")
    solvers = [SDESolver(schedule, "er-sde", noise=noise, substeps=count) for noise in noises for count in steps]
    mixture = GaussianMixture(schedule)
    floor = data_distance(mixture, n=n, seed=seed)
    return [
        MarginalError(s.noise.name, s.substeps, solver_distance(s, mixture, n=n, seed=seed), floor) for s in solvers
    ]


def choose_noise(schedule: NoiseSchedule, *, steps: int, n: int = 1000, seed: int = 0) -> str:
    """The noise function with the least marginal error at this number of steps, by a probe of a few seconds."""
    rows = solver_check(schedule, steps=(steps,), n=n, seed=seed)
    return min(rows, key=lambda row: row.error).noise
