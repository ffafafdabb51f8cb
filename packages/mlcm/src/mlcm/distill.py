"""What the student is trained on: pairs of neighbours on the teacher's flow that must answer alike.

Stage 1 (multistep latent consistency distillation): two neighbours inside a segment, both jumped to the segment's clean end.
Stage 2 (sparse): two neighbouring milestones, both jumped to the clean latent, so that few large steps work as well.
Both are data-free: the states are the teacher's trajectory in stage 1, the student's own noised samples in stage 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlcm.network import Condition, Student
from mlcm.randomness import RowNoise
from mlcm.sampling import sample
from mlcm.schedule import CLEAN, NoiseSchedule
from mlcm.trajectory import TeacherTrajectory, TrajectoryBank

Distance = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), both (batch, ...), to one number per row (batch,)."""


@dataclass(frozen=True)
class Pairs:
    """Rows to train on: from z at t the student must reach `target` at `end`."""

    z: Tensor
    t: Tensor
    end: Tensor
    target: Tensor
    condition: Condition
    weight: Tensor
    """Of each row's loss, (batch,)."""

    @staticmethod
    def cat(parts: "Sequence[Pairs]") -> "Pairs":
        """Batches one after the other."""
        names = ("z", "t", "end", "target", "weight")
        z, t, end, target, weight = (torch.cat([getattr(p, name) for p in parts]) for name in names)
        return Pairs(z, t, end, target, Condition.cat([p.condition for p in parts]), weight)

    def rows(self, index: Tensor) -> "Pairs":
        """Some of the rows. index: long (rows,)."""
        z, t, end, target, weight = (x[index] for x in (self.z, self.t, self.end, self.target, self.weight))
        return Pairs(z, t, end, target, self.condition.rows(index), weight)


def segment_times(
    noise: RowNoise, milestones: Sequence[int], skip: int, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """t_m uniform in a uniform segment (tau_s, tau_{s+1}], t_n = max(t_m - skip, tau_s), and tau_s; long (batch,) each."""
    tau = torch.tensor(milestones[::-1], device=device)
    segment = noise.integers(0, len(tau) - 2)
    t = noise.integers(tau[segment] + 1, tau[segment + 1])
    return t, (t - skip).maximum(tau[segment]), tau[segment]


@torch.no_grad()
def segment_pairs(
    student: Student, trajectory: TeacherTrajectory, condition: Condition, noise: RowNoise, *,
    start: Tensor | Callable[[Tensor], tuple[Tensor, Tensor]], milestones: Sequence[int], skip: int,
) -> Pairs:  # fmt: skip
    """Stage 1: (z_m, t_m) and its teacher-neighbour (z_n, t_n), both jumped by the student to the segment's clean end.

    start: pure noise (batch, ...), or a function from t_m to states at or above t_m and their times (a `TrajectoryBank`).
    milestones: falling. With a single segment this is consistency distillation to tau_0.
    """
    schedule = trajectory.schedule
    t, n, end = segment_times(noise, milestones, skip, device=noise.device)
    if isinstance(start, Tensor):
        z = trajectory.states(start, t, condition)
    else:
        near, at = start(t)
        z = trajectory.solve(near, at, t, condition)
    neighbour = trajectory.solve(z, t, n, condition)
    # A neighbour on the milestone is its own target: the jump from there to there changes nothing.
    target = schedule.jump(neighbour, student(neighbour, n, condition), n, end)
    return Pairs(z, t, end, target, condition, torch.ones(len(z), device=z.device))


@torch.no_grad()
def milestone_pairs(
    student: Student, trajectory: TeacherTrajectory, condition: Condition, noise: RowNoise, *,
    start: Tensor, milestones: Sequence[int], student_steps: int = 4, substeps: int = 3, weighting: str = "velocity",
) -> Pairs:  # fmt: skip
    """Stage 2: a student sample noised to a milestone, and the teacher's walk to the next one; both jumped to the clean latent.

    start: pure noise (batch, ...). student_steps: q re-noised steps at uniform times. substeps: p guided teacher steps.
    weighting: "uniform", as the paper has the loss, or "velocity", 1 / sigma_t^2: a difference d in the clean latent is one of
    d / sigma_t in v. Every milestone's target is built on the answer at the next one below, so the last milestone's error is
    everyone's, and without the weight it counts least: sigma there is small.
    """
    schedule, shape = trajectory.schedule, start.shape[1:]
    tau = torch.tensor(milestones[::-1], device=start.device)
    sampled = student_sample(student, schedule, condition, noise, start=start, steps=student_steps)
    place = noise.integers(1, len(tau) - 1)
    t, n = tau[place], tau[place - 1]
    z = schedule.add_noise(sampled, noise.normal(*shape), t)
    neighbour, clean = trajectory.solve(z, t, n, condition, steps=substeps), torch.full_like(t, CLEAN)
    # At the last milestone the teacher's state itself is the target.
    end = torch.where(n == 0, n, clean)
    target = schedule.jump(neighbour, student(neighbour, n, condition), n, end)
    weight = schedule.sigmas[t] ** -2 if weighting == "velocity" else torch.ones(len(t), device=t.device)
    return Pairs(z, t, clean, target, condition, weight)


def student_sample(
    student: Student, schedule: NoiseSchedule, condition: Condition, noise: RowNoise, *, start: Tensor, steps: int
) -> Tensor:
    """ẑ_0: the student's own sample in `steps` re-noised steps at uniform times T, T - T/q, ... start: (batch, ...)."""
    times = [round(schedule.last * (1 - i / steps)) for i in range(steps)]
    return sample(student, schedule, start, condition, times=times, noise=lambda: noise.normal(*start.shape[1:]))


def predictions(student: Student, schedule: NoiseSchedule, pairs: Pairs) -> Tensor:
    """What the student reaches from z at t, with gradient, (batch, ...)."""
    return schedule.jump(pairs.z, student(pairs.z, pairs.t, pairs.condition), pairs.t, pairs.end)


def consistency_loss(student: Student, schedule: NoiseSchedule, pairs: Pairs, distance: Distance) -> Tensor:
    """One number per row (batch,)."""
    return pairs.weight * distance(predictions(student, schedule, pairs), pairs.target)


def from_bank(bank: TrajectoryBank, entries: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The `start` of `segment_pairs` that reads stored states. entries: long (batch,)."""
    return lambda t: bank.above(entries, t)
