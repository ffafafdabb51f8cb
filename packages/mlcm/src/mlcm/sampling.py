"""Few-step sampling with a student: re-noise, deterministic, and the mix of the two."""

from collections.abc import Callable, Sequence

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from mlcm.network import Condition, Student
from mlcm.schedule import CLEAN, NoiseSchedule

SAMPLERS = ("renoise", "ddim", "gamma")


def step(
    schedule: NoiseSchedule, z: Tensor, x0: Tensor, t: Tensor, s: Tensor, *,
    sampler: str, gamma: float, noise: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    """From t to s given x̂. z, x0: (batch, ...); t, s: long (batch,).

    renoise: x̂ noised afresh to s (the authors' sampler). ddim: the deterministic jump, best when every segment gets its step.
    gamma: jump below s, to floor((1 - gamma) s), and noise back up; gamma 0 is ddim. At s = CLEAN all return x̂, at s = 0 the
    last two end at the last milestone.
    """
    if sampler == "renoise":
        return x0 if bool((s == CLEAN).all()) else schedule.add_noise(x0, noise(), s)
    if sampler == "ddim" or gamma == 0:
        return schedule.jump(z, x0, t, s)
    below = ((1 - gamma) * s).floor().long()
    landed = schedule.jump(z, x0, t, below)
    if bool((s == below).all()):
        return landed
    ratio = schedule.alpha(s, z) / schedule.alpha(below, z)
    variance = schedule.sigma(s, z) ** 2 - (ratio * schedule.sigma(below, z)) ** 2
    return ratio * landed + variance.clamp_min(0).sqrt() * noise()


def check_sampler(sampler: str, gamma: float) -> None:
    """Raises UserError for a sampler that there is not, or a gamma outside [0, 1]."""
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is '{sampler}', expected one of {', '.join(SAMPLERS)}")
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma is {gamma}, expected 0 (deterministic) to 1")


@torch.no_grad()
def sample(
    student: Student, schedule: NoiseSchedule, z: Tensor, condition: Condition, *,
    times: Sequence[int], noise: Callable[[], Tensor], sampler: str = "renoise", gamma: float = 0.3,
) -> Tensor:  # fmt: skip
    """Samples in len(times) network calls. z: (batch, ...) noise at times[0]; times: falling; noise: fresh rows like z."""
    check_sampler(sampler, gamma)
    end = CLEAN if sampler == "renoise" else 0
    for t, s in zip(times, [*times[1:], end], strict=True):
        at, to = (torch.full((len(z),), n, dtype=torch.long, device=z.device) for n in (t, s))
        z = step(schedule, z, student(z, at, condition), at, to, sampler=sampler, gamma=gamma, noise=noise)
    return z
