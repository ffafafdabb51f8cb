"""Data-free training states: points of the teacher's own guided trajectory, started from pure noise.

Multi-step denoising (arXiv 2406.05768, section 3.2): a state of segment s, counted from the clean end, is reached in
L = M - s solver steps on a uniform grid from T to t_m: few steps for the noisy end, more for the clean one. L is tied to the
number of segments training began with; with fewer segments and fewer steps the states blur and training diverges.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from mlcm.network import Condition, Teacher
from mlcm.schedule import NoiseSchedule

SOLVERS = ("ddim", "dpm++")


@dataclass(frozen=True)
class TeacherTrajectory:
    """States of a teacher's trajectory, and single solver steps.

    segments: M_0, which the number of solver steps is tied to. solver: "ddim", or "dpm++" for DPM-Solver++ (2M).
    """

    teacher: Teacher
    schedule: NoiseSchedule
    segments: int = 8
    guidance_scale: float = 8.0
    solver: str = "ddim"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"solver is '{self.solver}', expected one of {', '.join(SOLVERS)}")

    def steps(self, t: Tensor) -> Tensor:
        """L = M_0 - floor(t M_0 / (T + 1)), long (batch,)."""
        return self.segments - t * self.segments // (self.schedule.last + 1)

    def grid(self, start: Tensor, end: Tensor, steps: Tensor | int) -> Tensor:
        """Uniform times from `start` to `end` in each row's own number of steps, long (batch, most steps + 1).

        Rounded; a row that is done stays at its end. start, end: long (batch,).
        """
        steps = torch.as_tensor(steps, device=start.device).expand_as(start)
        place = torch.arange(int(steps.max()) + 1, device=start.device)
        fraction = (place / steps[:, None]).clamp_max(1).double()
        return (start[:, None] + (end - start)[:, None] * fraction).round().long()

    @torch.no_grad()
    def states(self, noise: Tensor, t: Tensor, condition: Condition, *, steps: Tensor | int | None = None) -> Tensor:
        """z_t on the trajectory from pure noise. noise: (batch, ...); t: long (batch,). Returns (batch, ...)."""
        start = torch.full_like(t, self.schedule.last)
        return self.solve(noise, start, t, condition, steps=self.steps(t) if steps is None else steps)

    @torch.no_grad()
    def solve(self, z: Tensor, start: Tensor, end: Tensor, condition: Condition, *, steps: Tensor | int = 1) -> Tensor:
        """Follow the guided flow from `start` to `end` in `steps` solver steps. start, end: long (batch,)."""
        times, z = self.grid(start, end, steps), z.clone()
        previous, span = torch.zeros_like(z), torch.zeros(len(z), device=z.device)
        for t, s in zip(times.T[:-1], times.T[1:], strict=True):
            moving = (t != s).nonzero().squeeze(1)
            if not len(moving):
                continue
            t, s, here = t[moving], s[moving], z[moving]
            x0 = self.teacher(here, t, condition.rows(moving), self.guidance_scale)
            direction = x0
            if self.solver == "dpm++":
                direction, span[moving] = self._second_order(x0, previous[moving], t, s, span[moving])
                previous[moving] = x0
            z[moving] = self.schedule.jump(here, direction, t, s)
        return z

    def _second_order(self, x0: Tensor, previous: Tensor, t: Tensor, s: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ extrapolated to the middle of the step in log(alpha / sigma), and the step's length there."""
        log_snr = (self.schedule.alphas / self.schedule.sigmas.clamp_min(1e-12)).log()
        length = log_snr[s] - log_snr[t]
        # The first step of a row has no predecessor: span is 0 there.
        weight = torch.where(span > 0, length / (2 * span.clamp_min(1e-12)), 0.0).view(-1, *[1] * (x0.ndim - 1))
        return x0 + weight * (x0 - previous), length


@dataclass(frozen=True)
class TrajectoryBank:
    """Trajectories computed once and shared by epochs and processes: the state at every milestone.

    states: (entries, milestones, ...), noise first. prompts: long (entries,), what each is conditioned on.
    milestones: the times of the states, falling.
    """

    states: Tensor
    prompts: Tensor
    milestones: tuple[int, ...]

    @classmethod
    def compute(
        cls,
        trajectory: TeacherTrajectory,
        batches: Iterator[tuple[Tensor, Tensor, Condition]],
        milestones: Sequence[int],
        *,
        substeps: int = 1,
    ) -> "TrajectoryBank":
        """Solve whole trajectories. batches: (noise, prompt indices, condition). substeps: solver steps between milestones."""
        states, prompts = [], []
        for noise, index, condition in batches:
            z, line = noise, [noise]
            for t, s in itertools.pairwise(milestones):
                start, end = torch.full_like(index, t), torch.full_like(index, s)
                z = trajectory.solve(z, start, end, condition, steps=substeps)
                line.append(z)
            states.append(torch.stack(line, 1).cpu())
            prompts.append(index.cpu())
        return cls(torch.cat(states), torch.cat(prompts), tuple(milestones))

    def __len__(self) -> int:
        return len(self.prompts)

    def above(self, entries: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The stored state at the nearest milestone at or above t, and that milestone. entries, t: long (batch,)."""
        times = torch.tensor(self.milestones, device=t.device)
        place = (times[None] >= t[:, None]).sum(1) - 1
        return self.states[entries.cpu(), place.cpu()].to(t.device), times[place]

    def save(self, folder: str | Path, *, shard: int = 1024) -> None:
        """Write safetensors shards and an index, whole or not at all."""
        from safetensors.torch import save_file
        from tenfold_shared.hub import replace_atomically

        with replace_atomically(folder) as partial:
            partial.mkdir()
            files = []
            for i, start in enumerate(range(0, len(self), shard)):
                files.append(f"shard-{i:05d}.safetensors")
                part = slice(start, start + shard)
                tensors = {"states": self.states[part].contiguous(), "prompts": self.prompts[part].contiguous()}
                save_file(tensors, partial / files[-1])
            index = {"milestones": list(self.milestones), "entries": len(self), "shards": files}
            (partial / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TrajectoryBank":
        """Read what `save` wrote. Raises UserError when a part is missing, damaged or not finite."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            # Only the names' last parts: an index must not lead out of its folder.
            parts = [load_file(folder / Path(name).name) for name in index["shards"]]
            bank = cls(
                torch.cat([p["states"] for p in parts]),
                torch.cat([p["prompts"] for p in parts]),
                tuple(index["milestones"]),
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{folder} is not a trajectory bank ({type(error).__name__}: {error})",
                hint="write it with mlcm trajectories",
            ) from error
        if bank.states.shape[:2] != (index.get("entries"), len(bank.milestones)):
            raise UserError(
                f"{folder} holds states {tuple(bank.states.shape)}, not what its index says", hint="write it again"
            )
        if not bank.states.isfinite().all():
            raise UserError(f"{folder} holds numbers that are not finite", hint="write it again")
        return bank
