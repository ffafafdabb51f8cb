"""A world whose denoiser is known exactly: a mixture of Gaussians in the plane.

With x ~ Σ w_k N(μ_k, s² I) and z_t = α x + σ ε, Bayes gives in closed form

    γ_k ∝ w_k N(z; α μ_k, (α² s² + σ²) I),   x̂(z, t) = Σ γ_k [ μ_k + α s² / (α² s² + σ²) (z − α μ_k) ]

so a solver's or a student's error is its own, never the teacher's.
"""

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from scott.schedule import NoiseSchedule, like


class GaussianMixture:
    """16 Gaussians of width 0.07 on two rings, in 4 classes, with unequal weights.

    schedule: the noise schedule of the teacher. modes: Gaussians, even. classes: mode k is of class k mod classes.
    seed: of the weights. spread: standard deviation of their logarithms; 0 makes all weights equal.
    """

    RADII = (1.4, 0.77)
    STD = 0.07

    def __init__(
        self, schedule: NoiseSchedule, *, modes: int = 16, classes: int = 4, seed: int = 0, spread: float = 0.6
    ):
        if modes < 2 or modes % 2 or classes < 1 or classes > modes:
            raise UserError(f"{modes} modes in {classes} classes, expected an even number of modes and no empty class")
        self.schedule, self.classes = schedule, classes
        half = modes // 2
        angle = torch.arange(half) * (2 * torch.pi / half)
        angle = torch.stack([angle, angle + torch.pi / half], 1)
        radius = torch.tensor(self.RADII)
        self.means = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).reshape(modes, 2)
        self.label = torch.arange(modes) % classes
        generator = torch.Generator().manual_seed(seed)
        self.log_weights = (spread * torch.randn(modes, generator=generator)).log_softmax(0)
        self._per_class = torch.where(
            self.label == torch.arange(classes)[:, None], self.log_weights, self.log_weights.new_full((), -torch.inf)
        )

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n points (n, 2) and their classes (n), long."""
        mode = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        return self.means[mode] + self.STD * torch.randn(n, 2, generator=generator), self.label[mode]

    def x0(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The posterior mean E[x | z_t = z], of one class when label is given. z: (*batch, 2); t, label: long (*batch)."""
        alpha, sigma = like(self.schedule.alpha(t), z), like(self.schedule.sigma(t), z)
        variance = alpha**2 * self.STD**2 + sigma**2
        prior = (self.log_weights if label is None else self._per_class[label]).to(z.dtype)
        means = self.means.to(z.dtype)
        logits = prior + alpha / variance * (z @ means.T - alpha / 2 * means.square().sum(-1))
        shrink = alpha * self.STD**2 / variance
        return shrink * z + (1 - shrink * alpha) * (logits.softmax(-1) @ means)

    def far(self, x: Tensor) -> float:
        """Share of points (n, 2) further than 4 standard deviations from every mode."""
        return float((torch.cdist(x, self.means.to(x.dtype)).amin(1) > 4 * self.STD).float().mean())
