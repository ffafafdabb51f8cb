"""Few-step sampling from a consistency function: jump to x̂, go back up to the next time, jump again.

Multistep consistency sampling is the solver of `solvers` with r = 0 and the student in the teacher's place; γ-sampling and
every other r work the same way, so each is one choice of `solver`.
"""

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from scott.schedule import NoiseSchedule
from scott.solvers import Generator, PredictX0, SDESolver


def sampling_times(steps: int, *, timesteps: int = 1000, grid: int = 50) -> list[int]:
    """The times at which LCMScheduler calls the student: `steps` of the grid's, from the noisiest down."""
    if not 1 <= steps <= grid:
        raise UserError(f"{steps} sampling steps, expected 1 to {grid}")
    stride = timesteps // grid
    return [(grid - i * grid // steps) * stride - 1 for i in range(steps)]


@torch.no_grad()
def multistep(
    f: PredictX0,
    noise: Tensor,
    *,
    steps: int,
    schedule: NoiseSchedule,
    solver: SDESolver | None = None,
    grid: int = 50,
    batch_dims: int = 1,
    generator: Generator = None,
) -> Tensor:
    """Sample with `steps` calls of the student.

    f: consistency function (z, t) to x̂. noise: N(0, I), (*batch, ...), with `batch_dims` batch dimensions.
    solver: how to go from one time to the next; r = 0, as LCMScheduler does, when not given.
    """
    solver = solver or SDESolver(schedule, "renoise")
    times = sampling_times(steps, timesteps=schedule.timesteps, grid=grid)
    z, batch = noise, noise.shape[:batch_dims]
    for i, time in enumerate(times):
        t = torch.full(batch, time, dtype=torch.long, device=noise.device)
        x0 = f(z, t)
        if i + 1 < len(times):
            z = solver.step(z, t, torch.full_like(t, times[i + 1]), x0, generator=generator)
    return x0
