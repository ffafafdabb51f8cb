"""A teacher that is exact: the posterior mean of a mixture of Gaussians under the forward process."""

import torch
from torch import Tensor
from torch.nn import functional

from mlcm.network import Condition, guide
from mlcm.schedule import NoiseSchedule


class GaussianMixture:
    """Isotropic Gaussians with class labels; x̂(z, t, class) by Bayes, guidance exact.

    means: (modes, dims). weights: (modes,), sum 1. std: of every mode. labels: long (modes,), the class of each mode.
    The condition is {"class_labels": long (batch,)}; the label `classes` means no class.
    """

    def __init__(self, schedule: NoiseSchedule, means: Tensor, weights: Tensor, std: float, labels: Tensor):
        self.schedule, self.means, self.std, self.labels = schedule, means, std, labels
        self.log_weights = weights.log()
        self.classes = int(labels.max()) + 1
        self.calls = 0
        """Rows the teacher has answered, the two halves of guidance counted apart."""

    @classmethod
    def rings(cls, schedule: NoiseSchedule | None = None) -> "GaussianMixture":
        """16 modes at even angles, radii 1.4 and 0.77 in turn, std 0.07, unequal weights; a class is every fourth mode."""
        place = torch.arange(16)
        angle = place * torch.pi / 8
        radius = torch.where(place % 2 == 0, 1.4, 0.77)[:, None]
        weights = (0.5 * torch.randn(16, generator=torch.Generator().manual_seed(0))).softmax(0)
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        return cls(schedule or NoiseSchedule.stable_diffusion(), means, weights, 0.07, place % 4)

    @property
    def class_weights(self) -> Tensor:
        """Probability of each class, (classes,)."""
        return torch.zeros(self.classes).index_add(0, self.labels, self.log_weights.exp())

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw points (count, dims) and their labels (count,)."""
        mode = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.means[mode] + self.std * noise, self.labels[mode]

    def condition(self, labels: Tensor) -> Condition:
        """The condition of a batch of classes, long (batch,)."""
        return Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, self.classes)})

    def _posterior(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Log-responsibilities up to a constant (batch, modes), and each mode's posterior mean (batch, modes, dims)."""
        alpha, sigma = self.schedule.alphas[t][:, None], self.schedule.sigmas[t][:, None]
        variance = alpha**2 * self.std**2 + sigma**2
        away = z[:, None] - alpha[..., None] * self.means
        logits = self.log_weights - away.square().sum(-1) / (2 * variance)
        means = self.means + (alpha * self.std**2 / variance)[..., None] * away
        return logits, means

    def x0(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """E[x | z_t, class], (batch, dims)."""
        return self(z, t, condition, 1.0)

    def __call__(self, z: Tensor, t: Tensor, condition: Condition, scale: float | Tensor = 1.0) -> Tensor:
        """The guided posterior mean, (batch, dims). z: (batch, dims); t: long (batch,)."""
        logits, means = self._posterior(z, t)
        label = condition.given["class_labels"][:, None]
        within = (self.labels == label) | (label == self.classes)
        x0 = self._mean(logits.masked_fill(~within, -torch.inf), means)
        guided = isinstance(scale, Tensor) or scale != 1
        self.calls += len(z) * (2 if guided else 1)
        return guide(self._mean(logits, means), x0, scale) if guided else x0

    @staticmethod
    def _mean(logits: Tensor, means: Tensor) -> Tensor:
        return (functional.softmax(logits, 1)[..., None] * means).sum(1)

    def far(self, points: Tensor) -> float:
        """Share of points further than 4 std from every mode. points: (count, dims)."""
        return float((torch.cdist(points, self.means).min(1).values > 4 * self.std).float().mean())
