"""Distances between sets of samples."""

import numpy as np
import torch
from torch import Tensor


def sliced_wasserstein(a: Tensor, b: Tensor, *, directions: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance. a, b: (count, dims), equal counts; in two dimensions the directions are even."""
    if a.shape[1] == 2:
        angle = (torch.arange(directions) + 0.5) * torch.pi / directions
        lines = torch.stack([angle.cos(), angle.sin()])
    else:
        lines = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(seed))
        lines = lines / lines.norm(dim=0)
    apart = (a @ lines).sort(0).values - (b @ lines).sort(0).values
    return float(apart.square().mean().sqrt())


def coverage(real: Tensor, fake: Tensor, *, neighbours: int = 5) -> float:
    """Share of real points with a fake one inside their k-nearest-neighbour ball (Naeem et al. 2020). (count, dims) each."""
    radius = torch.cdist(real, real).kthvalue(neighbours + 1, 1).values
    return float((torch.cdist(real, fake).min(1).values < radius).float().mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to two sets of features, (count, dims) each."""
    x, y = a.double().numpy(), b.double().numpy()
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # trace sqrt(AB) is the sum of the roots of the eigenvalues of AB, which are real and not negative.
    eigenvalues = np.linalg.eigvals(first @ second).real.clip(0)
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * np.sqrt(eigenvalues).sum())
