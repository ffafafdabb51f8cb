"""The variance-preserving noise schedule and the three things a network may predict.

    z_t = α_t x + σ_t ε,   α_t = √ᾱ_t,   σ_t = √(1 − ᾱ_t),   λ_t = σ_t / α_t

λ is the noise-to-signal ratio; time step −1 means clean data (α = 1, σ = λ = 0). Tables are float64, because differences
of neighbouring λ vanish in half precision; the values handed out have the precision of the tensor they meet.
"""

from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    """α, σ and λ of a discrete schedule.

    alphas_cumprod: ᾱ, shape (timesteps,), falling, inside (0, 1].
    prediction_type: what the network gives: `epsilon`, `v_prediction` or `sample`, as diffusers names them.

    Raises UserError for ᾱ outside (0, 1] or not falling, and for an unknown prediction type.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon"):
        bar = torch.as_tensor(alphas_cumprod).detach().double().flatten()
        if bar.numel() < 2 or not bool(((bar > 0) & (bar <= 1)).all()) or not bool((bar.diff() < 0).all()):
            raise UserError(
                "alphas_cumprod must fall from at most 1 to above 0",
                hint="schedules with zero terminal SNR are not supported: set rescale_betas_zero_snr=False",
            )
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction type '{prediction_type}' is unknown", hint=f"expected {', '.join(PREDICTION_TYPES)}"
            )
        self.prediction_type = prediction_type
        self.timesteps = bar.numel()
        self.alphas_cumprod = bar
        padded = torch.cat([bar.new_ones(1), bar])
        self._alpha, self._sigma = padded.sqrt(), (1 - padded).sqrt()
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler."""
        return cls(scheduler.alphas_cumprod, scheduler.config.get("prediction_type", "epsilon"))

    @classmethod
    def stable_diffusion(cls, prediction_type: str = "epsilon") -> "NoiseSchedule":
        """1000 steps, √β linear from √0.00085 to √0.012: the schedule of Stable Diffusion."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0), prediction_type)

    def _table(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if t.device not in self._tables:
            # Some accelerators have no float64; ratios of float32 λ are still exact to seven digits.
            dtype = torch.float32 if t.device.type == "mps" else torch.float64
            alpha, sigma = (table.to(t.device, dtype) for table in (self._alpha, self._sigma))
            self._tables[t.device] = (alpha, sigma, sigma / alpha)
        return self._tables[t.device]

    def alpha(self, t: Tensor) -> Tensor:
        """α_t in float64, in the shape of t (long, −1 to timesteps − 1)."""
        return self._table(t)[0][t + 1]

    def sigma(self, t: Tensor) -> Tensor:
        """σ_t in float64, in the shape of t."""
        return self._table(t)[1][t + 1]

    def lam(self, t: Tensor) -> Tensor:
        """λ_t = σ_t / α_t in float64, in the shape of t."""
        return self._table(t)[2][t + 1]

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = α_t x + σ_t noise. x, noise: (*batch, ...); t: (*batch)."""
        return like(self.alpha(t), x) * x + like(self.sigma(t), x) * noise

    def predict_x0(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """x̂ from a network's output at z_t, in the precision of z. output, z: (*batch, ...); t: (*batch)."""
        if self.prediction_type == "sample":
            return output.to(z.dtype)
        alpha, sigma = like(self.alpha(t), z), like(self.sigma(t), z)
        if self.prediction_type == "v_prediction":
            return alpha * z - sigma * output
        return (z - sigma * output) / alpha


def like(per_sample: Tensor, values: Tensor) -> Tensor:
    """Put a factor per sample (*batch) in the precision and number of dimensions of values (*batch, ...)."""
    per_sample = per_sample.to(values.dtype)
    return per_sample.reshape(per_sample.shape + (1,) * (values.dim() - per_sample.dim()))
