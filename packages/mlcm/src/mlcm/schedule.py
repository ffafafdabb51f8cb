"""The noise schedule, the milestones, and the one-step formulas (arXiv 2406.05768, section 3).

A state at training index t is z_t = alpha_t x + sigma_t e. The index `CLEAN` stands for alpha = 1, sigma = 0, so that a jump
there returns the clean latent itself; index 0 is almost clean and is the last milestone.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

CLEAN = -1
"""The index of the clean latent."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
OFFICIAL_POSITIONS = {
    1: (0,),
    2: (0, 4),
    3: (0, 4, 7),
    4: (0, 2, 4, 7),
    5: (0, 2, 4, 6, 7),
    6: (0, 2, 4, 5, 6, 7),
    7: (0, 2, 3, 4, 5, 6, 7),
    8: (0, 1, 2, 3, 4, 5, 6, 7),
}
"""Which of 8 milestones K steps start from, as the authors' inference code has it: the late times are kept."""


class NoiseSchedule:
    """alpha and sigma at the training indices 0..T, in float32 whatever the networks compute in.

    alphas, sigmas: (T + 1,). prediction_type: what a network of this schedule predicts.
    """

    def __init__(self, alphas: Tensor, sigmas: Tensor, *, prediction_type: str = "epsilon"):
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction_type is '{prediction_type}', expected one of {', '.join(PREDICTION_TYPES)}",
                hint="take it from the teacher's scheduler config",
            )
        if alphas.shape != sigmas.shape or alphas.ndim != 1 or len(alphas) < 2:
            raise UserError(f"alphas {tuple(alphas.shape)} and sigmas {tuple(sigmas.shape)}, expected one line of each")
        # The clean latent is kept as a last entry, where the index -1 finds it.
        self.alphas = torch.cat([alphas.float(), torch.ones(1, device=alphas.device)])
        self.sigmas = torch.cat([sigmas.float(), torch.zeros(1, device=sigmas.device)])
        self.prediction_type = prediction_type
        self.last = len(alphas) - 1
        """T, the last training index."""

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor, *, prediction_type: str = "epsilon") -> "NoiseSchedule":
        """alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod)."""
        product = alphas_cumprod.double()
        return cls(product.sqrt(), (1 - product).sqrt(), prediction_type=prediction_type)

    @classmethod
    def stable_diffusion(cls, *, prediction_type: str = "epsilon") -> "NoiseSchedule":
        """The schedule of Stable Diffusion and SDXL: scaled linear, 0.00085 to 0.012, 1000 indices."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
        return cls.variance_preserving(torch.cumprod(1 - betas, 0), prediction_type=prediction_type)

    @classmethod
    def flow(cls, num_train_timesteps: int = 1000, *, shift: float = 1.0) -> "NoiseSchedule":
        """Flow matching: alpha = 1 - sigma, the network predicts noise - x and is told 1000 sigma (FLUX, SD3)."""
        sigma = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return cls(1 - sigma, sigma, prediction_type="flow")

    @classmethod
    def from_scheduler(cls, scheduler: Any, *, prediction_type: str = "auto") -> "NoiseSchedule":
        """Of a diffusers scheduler, or of its config. prediction_type "auto" reads it there."""
        config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
        if "num_train_timesteps" not in config:
            raise UserError("the scheduler's config has no num_train_timesteps", hint="pass a diffusers scheduler")
        if prediction_type == "auto":
            flow = "shift" in config and "beta_schedule" not in config
            prediction_type = config.get("prediction_type") or ("flow" if flow else "epsilon")
        if prediction_type == "flow":
            return cls.flow(config["num_train_timesteps"], shift=config.get("shift", 1.0))
        if isinstance(scheduler, Mapping) or not hasattr(scheduler, "alphas_cumprod"):
            from diffusers import DDPMScheduler

            scheduler = DDPMScheduler.from_config(dict(config))
        return cls.variance_preserving(scheduler.alphas_cumprod, prediction_type=prediction_type)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule on another device."""
        return NoiseSchedule(
            self.alphas[:-1].to(device), self.sigmas[:-1].to(device), prediction_type=self.prediction_type
        )

    def alpha(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha_t, (batch, 1, ...) against `like` (batch, ...)."""
        return self.alphas[t].view(-1, *[1] * (like.ndim - 1))

    def sigma(self, t: Tensor, like: Tensor) -> Tensor:
        """sigma_t, (batch, 1, ...) against `like` (batch, ...)."""
        return self.sigmas[t].view(-1, *[1] * (like.ndim - 1))

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told at index t: the index, or 1000 sigma for a flow."""
        return self.sigmas[t] * 1000 if self.prediction_type == "flow" else t

    def predict_x0(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """x̂ from the network's output at (z, t). output, z: (batch, ...); t: long (batch,)."""
        output, z = output.float(), z.float()
        if self.prediction_type == "sample":
            return output
        alpha, sigma = self.alpha(t, z), self.sigma(t, z)
        if self.prediction_type == "epsilon":
            return (z - sigma * output) / alpha
        if self.prediction_type == "v_prediction":
            return alpha * z - sigma * output
        return z - sigma * output

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha_t x + sigma_t noise. x, noise: (batch, ...); t: long (batch,)."""
        return self.alpha(t, x) * x + self.sigma(t, x) * noise

    def jump(self, z: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """DDIM(z, x̂, t, s) = alpha_s x̂ + sigma_s (z - alpha_t x̂) / sigma_t; exactly z where t == s.

        z, x0: (batch, ...); t, s: long (batch,), s may be CLEAN. The boundary condition takes the place of c_skip, c_out.
        """
        noise = (z - self.alpha(t, z) * x0) / self.sigma(t, z).clamp_min(1e-12)
        moved = self.alpha(s, z) * x0 + self.sigma(s, z) * noise
        return torch.where((t == s).view(-1, *[1] * (z.ndim - 1)), z, moved)


def milestones(segments: int, last: int = 999, *, schedule: NoiseSchedule | None = None) -> list[int]:
    """The ends of the segments, falling: [T, ..., 0], segments + 1 of them.

    segments: M, 1 to T. last: T. schedule: when given, segments are equally long in log(alpha / sigma) and not in t.

    Raises UserError when segments is under 1 or over T.
    """
    last = schedule.last if schedule else last
    if not 1 <= segments <= last:
        raise UserError(f"segments is {segments}, expected 1 to {last}", hint="8 is the paper's choice")
    if schedule is None:
        return cast(list[int], torch.linspace(last, 0, segments + 1, dtype=torch.int).tolist())
    # Index 0 of a flow has no finite log-SNR, and neither has index T.
    log_snr = (schedule.alphas[:-1].clamp_min(1e-4) / schedule.sigmas[:-1].clamp_min(1e-4)).log()
    wanted = torch.linspace(float(log_snr[last]), float(log_snr[0]), segments + 1)
    found = [int((log_snr - w).abs().argmin()) for w in wanted]
    return check_milestones([last, *found[1:-1], 0], last)


def check_milestones(times: Sequence[int], last: int) -> list[int]:
    """The times when they fall strictly from `last` to 0. Raises UserError when they do not."""
    times = [int(t) for t in times]
    if len(times) < 2 or times[0] != last or times[-1] != 0 or any(a <= b for a, b in itertools.pairwise(times)):
        raise UserError(f"milestones {times}, expected whole numbers that fall strictly from {last} to 0")
    return times


def inference_times(steps: int, times: Sequence[int]) -> list[int]:
    """The milestones that `steps` network calls start from, falling.

    times: the M + 1 milestones. For M = 8 the authors' subsets are used, otherwise positions spread evenly.

    Raises UserError when steps is not 1 to M.
    """
    segments = len(times) - 1
    if not 1 <= steps <= segments:
        raise UserError(
            f"MLCM with M={segments} supports 1-{segments} milestone steps; got {steps}",
            hint="train with more segments, or give explicit timesteps",
        )
    positions = OFFICIAL_POSITIONS[steps] if segments == 8 else [i * segments // steps for i in range(steps)]
    return [times[p] for p in positions]
