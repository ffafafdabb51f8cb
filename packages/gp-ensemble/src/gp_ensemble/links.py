"""From the posterior of the label regression to probabilities of classes.

mu (n, C) is the posterior mean and v (n,) the variance that all classes share. mu lives near [0, 1], so a softmax
needs a temperature well below one.

    softmax     softmax(mu / T)
    argmax      P(class c has the largest f), exact, no parameter
    mean_field  softmax(mu / sqrt(T^2 + pi/8 v))
    clip        max(mu, 1e-4), scaled to sum to one
"""

import math
from collections.abc import Callable

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

TEMPERATURE = 0.075
"""Centre of the prior of T, and its value at one shot."""

GRID = torch.linspace(-5.0, 8.0, 131, dtype=torch.float64)
"""Points of the integral of `argmax`, in standard deviations from the largest mean. With many near-equal classes the
largest
of C Gaussians lies well above the largest mean."""


def softmax(mean: Tensor, variance: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """softmax(mu / T)."""
    return (mean / temperature).softmax(-1)


def mean_field(mean: Tensor, variance: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """softmax(mu / sqrt(T^2 + pi/8 v)): the variance flattens it."""
    return (mean / (temperature**2 + math.pi / 8 * variance[:, None]).sqrt()).softmax(-1)


def argmax(mean: Tensor, variance: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """P(f_c is the largest) = int phi(t; mu_c, v) prod_{c' != c} Phi((t - mu_c') / sqrt(v)) dt.

    The variance is shared, so one product of Phi over all classes serves each class after division by its own factor:
    O(classes) per row and grid point. The temperature is not used.
    """
    scale = variance.clamp_min(1e-18).sqrt().double()[:, None]
    standard = mean.double() / scale
    top = standard.amax(1, keepdim=True)
    log_p = torch.full_like(standard, -torch.inf)
    for t in GRID.to(mean.device):
        x = top + t - standard
        log_cdf = torch.special.log_ndtr(x)
        log_p = torch.logaddexp(log_p, -0.5 * x**2 - log_cdf + log_cdf.sum(1, keepdim=True))
    return log_p.softmax(1).to(mean.dtype)


def clip(mean: Tensor, variance: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """max(mu, 1e-4), scaled to sum to one: for reference."""
    clipped = mean.clamp_min(1e-4)
    return clipped / clipped.sum(1, keepdim=True)


LINKS = {"softmax": softmax, "argmax": argmax, "mean_field": mean_field, "clip": clip}


Link = Callable[[Tensor, Tensor, float], Tensor]


def get_link(name: str) -> Link:
    """A link by name. Raises UserError."""
    if name not in LINKS:
        raise UserError(f"link is {name!r}, expected one of {', '.join(LINKS)}")
    return LINKS[name]


def temperature_width(smallest_class: int) -> float:
    """Width of the prior of log T. The fewer shots, the less leave-one-out knows: at one shot no image of the
    left-out one's
    class remains, so it is pessimistic and T stays where it is."""
    return {1: 0.0, 2: 0.1}.get(smallest_class, 0.3)


def fit_temperature(loo_mean: Tensor, y: Tensor, width: float) -> float:
    """T that minimises the leave-one-out cross-entropy plus (log T - log 0.075)^2 / (2 width^2).

    loo_mean: (n, C). y: (n,) class numbers. width 0 gives 0.075.
    """
    if width == 0:
        return TEMPERATURE

    def loss(t: Tensor) -> Tensor:
        entropy = torch.nn.functional.cross_entropy(loo_mean.double() / t, y, reduction="sum")
        return entropy + 0.5 * (t / TEMPERATURE).log() ** 2 / width**2

    low, high = math.log(0.005), math.log(2.0)
    for _ in range(3):  # each grid refines around the best of the one before
        grid = torch.linspace(low, high, 41, dtype=torch.float64)
        best = int(torch.stack([loss(t.exp()) for t in grid]).argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 40)])
    return math.exp(float(grid[best]))
