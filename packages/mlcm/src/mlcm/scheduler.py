"""A diffusers scheduler for students of this method: milestone times, and the three samplers."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from tenfold_shared.errors import UserError
from torch import Tensor

from mlcm.sampling import check_sampler, step
from mlcm.schedule import CLEAN, NoiseSchedule, check_milestones, inference_times, milestones

log = logging.getLogger(__name__)


@dataclass
class MLCMSchedulerOutput(BaseOutput):
    """One step: the next state and the prediction of the clean latent."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class MLCMScheduler(SchedulerMixin, ConfigMixin):
    """Samples a multistep latent consistency model in 1 to `segments` steps (arXiv 2406.05768).

    segments: M of training. sampler: "renoise" (the authors'), "ddim" (deterministic; best at M steps after stage 1) or "gamma",
    the mix of the two that `gamma` sets. milestones: own segment ends, falling from T to 0, when training did not use the uniform
    ones. positions: which milestones steps start from, when it is not the authors' choice. The rest describes the noise schedule
    as in every diffusers scheduler, so `MLCMScheduler.from_config(pipe.scheduler.config)` keeps the pipeline's own.

    Use it with guidance_scale 0 or 1: guidance is distilled into the student.
    """

    order = 1
    _compatibles = ["LCMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "TCDScheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        segments: int = 8,
        sampler: str = "renoise",
        gamma: float = 0.3,
        milestones: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ):
        check_sampler(sampler, gamma)
        base = DDPMScheduler(
            num_train_timesteps, beta_start, beta_end, beta_schedule,
            trained_betas=None if trained_betas is None else np.asarray(trained_betas),
        )  # fmt: skip
        self.alphas_cumprod = base.alphas_cumprod
        self.schedule = NoiseSchedule.variance_preserving(base.alphas_cumprod, prediction_type=prediction_type)
        self.milestones = _milestones(segments, self.schedule.last, milestones)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.tensor(self.milestones[:-1])
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """How many steps of the current run are done."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step's place in `timesteps`, for image-to-image."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later time, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the milestones to start steps from.

        num_inference_steps: 1 to `segments`. timesteps: own times, falling, in its place; a warning says when they are no
        milestones. Raises UserError when both or neither are given, or a number cannot be had.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise UserError("give either num_inference_steps or timesteps")
        if timesteps is not None:
            chosen = [int(t) for t in timesteps]
            falling = all(a > b for a, b in itertools.pairwise(chosen))
            if not chosen or not falling or chosen[0] > self.schedule.last or chosen[-1] < 1:
                raise UserError(
                    f"timesteps {chosen}, expected whole numbers that fall within {self.schedule.last} to 1"
                )
            if off := [t for t in chosen if t not in self.milestones]:
                log.warning("timesteps %s are not milestones of the %d segments", off, self.config.segments)
        elif self.config.positions is not None and len(self.config.positions) == num_inference_steps:
            chosen = [self.milestones[p] for p in self.config.positions]
        else:
            chosen = inference_times(int(num_inference_steps or 0), self.milestones)
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.tensor(chosen, device=device)
        self._step_index = self._begin_index = None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MLCMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step. model_output, sample: (batch, ...). The last one returns x̂ (ddim and gamma: the state at index 0)."""
        if self.num_inference_steps is None:
            raise UserError("step was called before set_timesteps", hint="call set_timesteps(num_inference_steps)")
        if self._step_index is None:
            found = (self.timesteps == int(timestep)).nonzero()
            if not len(found) and self._begin_index is None:
                raise UserError(f"timestep {int(timestep)} is not among the chosen {self.timesteps.tolist()}")
            self._step_index = int(found[0]) if self._begin_index is None else self._begin_index
        end = CLEAN if self.config.sampler == "renoise" else 0
        following = self._step_index + 1
        to = int(self.timesteps[following]) if following < len(self.timesteps) else end
        t, s = (torch.full((len(sample),), int(n), dtype=torch.long, device=sample.device) for n in (timestep, to))
        if self.schedule.alphas.device != sample.device:
            self.schedule = self.schedule.to(sample.device)
        # float32 throughout: in half precision sigma is 0 at the clean end.
        z = sample.float()
        x0 = self.schedule.predict_x0(model_output, z, t)

        def noise() -> Tensor:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)

        moved = step(self.schedule, z, x0, t, s, sampler=self.config.sampler, gamma=self.config.gamma, noise=noise)
        self._step_index = following
        moved, x0 = moved.to(sample.dtype), x0.to(sample.dtype)
        return MLCMSchedulerOutput(prev_sample=moved, pred_original_sample=x0) if return_dict else (moved, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean latents to given times, (batch, ...)."""
        schedule = self.schedule.to(original_samples.device)
        t = timesteps.to(original_samples.device).long().expand(len(original_samples))
        return schedule.add_noise(original_samples.float(), noise.float(), t).to(original_samples.dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _milestones(segments: int, last: int, given: Sequence[int] | None) -> list[int]:
    uniform = milestones(segments, last)
    if given is None:
        return uniform
    times = check_milestones(given, last)
    if len(times) != segments + 1:
        raise UserError(f"{len(times)} milestones for {segments} segments, expected {segments + 1}")
    return times
