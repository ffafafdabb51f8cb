"""The refinement losses, written on denoiser outputs.

A pair has latents x^g (good) and x^b (bad), one noise e and one time t: z = alpha_t x + sigma_t e. The denoiser f predicts,
by `kind`,

    epsilon        e                    x0 = (z - sigma f) / alpha
    v_prediction   alpha e - sigma x    x0 = alpha z - sigma f
    flow           e - x                x0 = z - sigma f          (alpha = 1 - sigma)

Shapes: latents (batch, channels, h, w); alpha, sigma and t (batch,); errors (batch,), averaged over channels and pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor
from torch.nn import functional as F

KINDS = ("epsilon", "v_prediction", "flow")
TARGETS = ("x0", "teacher", "step")


@dataclass
class NoiseSchedule:
    """alpha_t and sigma_t of a diffusers scheduler at its training times 0 .. `length` - 1."""

    alphas: Tensor
    sigmas: Tensor
    times: Tensor
    """What the denoiser is given for each training time."""
    kind: str

    @classmethod
    def of(cls, scheduler: Any) -> "NoiseSchedule":
        """Raises UserError for a scheduler that predicts something else ("sample")."""
        config = scheduler.config
        if "FlowMatch" in type(scheduler).__name__ or getattr(config, "prediction_type", "") == "flow_prediction":
            # The scheduler's own sigmas change with set_timesteps; those of training are shifted t / T.
            n = config.num_train_timesteps
            sigmas = torch.arange(1, n + 1, dtype=torch.float64) / n
            shift = getattr(config, "shift", getattr(config, "flow_shift", 1.0)) or 1.0
            if not getattr(config, "use_dynamic_shifting", False):
                sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
            return cls((1 - sigmas).float(), sigmas.float(), (sigmas * n).float(), "flow")
        kind = getattr(config, "prediction_type", "epsilon")
        if kind not in KINDS or not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"{type(scheduler).__name__} predicts {kind!r}, expected epsilon, v_prediction or a flow-matching scheduler"
            )
        kept = scheduler.alphas_cumprod.double().cpu()
        return cls(kept.sqrt().float(), (1 - kept).sqrt().float(), torch.arange(len(kept)), kind)

    @property
    def length(self) -> int:
        return len(self.alphas)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (batch, 1, 1, 1) each."""
        return self.alphas[index.cpu()].view(-1, 1, 1, 1).to(index.device), self.sigmas[index.cpu()].view(
            -1, 1, 1, 1
        ).to(index.device)


def target(kind: str, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the denoiser should answer for z = alpha x + sigma noise."""
    if kind == "epsilon":
        return noise
    return alpha * noise - sigma * x if kind == "v_prediction" else noise - x


def to_x0(kind: str, prediction: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that a prediction means."""
    if kind == "epsilon":
        return (z - sigma * prediction) / alpha
    return alpha * z - sigma * prediction if kind == "v_prediction" else z - sigma * prediction


def to_noise(kind: str, prediction: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a prediction means."""
    if kind == "epsilon":
        return prediction
    return sigma * z + alpha * prediction if kind == "v_prediction" else z + (1 - sigma) * prediction


def mean_error(difference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference averaged over channels and pixels, (batch,); weighted by mask (batch, 1, h, w) when given."""
    squared = difference.square()
    if mask is None:
        return squared.mean((1, 2, 3))
    return (squared * mask).mean((1, 2, 3)) / mask.mean((1, 2, 3))


def guidance_x0(
    kind: str,
    prediction: Tensor,
    z_bad: Tensor,
    x_good: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """From the bad state, predict the good image: w |x0_hat(z^b) - x^g|^2, (batch,).

    w is alpha^2 for an epsilon model, whose x0 divides by alpha, else 1. With x^b = x^g this is sigma^2 times the
    denoising error for every kind.
    """
    error = mean_error(to_x0(kind, prediction, z_bad, alpha, sigma) - x_good, mask)
    return alpha.flatten().square() * error if kind == "epsilon" else error


def ddim_step(
    kind: str, prediction: Tensor, z: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]
) -> Tensor:
    """One deterministic step from (alpha, sigma) `now` to `then`."""
    x0, noise = to_x0(kind, prediction, z, *now), to_noise(kind, prediction, z, *now)
    return then[0] * x0 + then[1] * noise


def dpo(win: Tensor, lose: Tensor, win_reference: Tensor, lose_reference: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO (2311.12908, equation 14): -log sigma(-beta/2 [(win - win_ref) - (lose - lose_ref)]), (batch,).

    The arguments are denoising errors (batch,), averaged over channels and pixels.
    """
    return -F.logsigmoid(-beta / 2 * ((win - win_reference) - (lose - lose_reference)))


def min_snr_weight(kind: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Weights (batch,) of denoising errors: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v (2303.09556)."""
    snr = (alpha / sigma).square().flatten()
    kept = snr.clamp(max=gamma)
    return kept / snr if kind == "epsilon" else kept / (snr + 1)


def latent_mask(mask: Tensor, size: tuple[int, int], outside_weight: float) -> Tensor:
    """A mask (batch, 1, H, W) in [0, 1] area-pooled to latent size; outside it weighs `outside_weight` instead of 0."""
    pooled = F.adaptive_avg_pool2d(mask, size)
    return outside_weight + (1 - outside_weight) * pooled


def sample_times(n: int, schedule: NoiseSchedule, t_min: float, t_max: float, generator: torch.Generator) -> Tensor:
    """(n,) indices of training times, uniform over the share [t_min, t_max] of them."""
    low, high = round(t_min * schedule.length), max(round(t_min * schedule.length) + 1, round(t_max * schedule.length))
    return torch.randint(low, min(high, schedule.length), (n,), generator=generator)
