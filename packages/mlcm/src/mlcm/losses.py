"""Distances between two predictions, one number per row."""

import math

from tenfold_shared.errors import UserError
from torch import Tensor

from mlcm.distill import Distance


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference, (batch,)."""
    return (prediction - target).square().flatten(1).mean(1)


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Pseudo-Huber, sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(entries), (batch,)."""
    c = 0.00054 * math.sqrt(prediction[0].numel())
    return ((prediction - target).square().flatten(1).sum(1) + c**2).sqrt() - c


def make_distance(name: str, *, features: object | None = None) -> Distance:
    """l2, huber, or latent_lpips with its feature network. Raises UserError for anything else."""
    if name == "l2":
        return l2
    if name == "huber":
        return huber
    if name == "latent_lpips":
        if not callable(features):
            raise UserError(
                "loss 'latent_lpips' needs the feature network's weights",
                hint="pass latent_lpips=<safetensors file>, or use loss 'l2'",
            )
        return features
    raise UserError(f"loss is '{name}', expected l2, huber or latent_lpips")
