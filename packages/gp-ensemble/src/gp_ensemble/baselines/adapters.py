"""Adapters of CLIP that keep the training images as a cache of keys (features) and values (labels)."""

import numpy as np
import torch
from scipy.special import softmax

from gp_ensemble.baselines.base import Baseline


class TipAdapter(Baseline):
    """Zero-shot logits + alpha exp(-beta (1 - f F^T)) Y on one encoder (arXiv 2111.03930), no training."""

    needs_prior = True

    def __init__(self, alpha: float = 1.0, beta: float = 5.5, *, encoder: str = "clip"):
        self.alpha = alpha
        self.beta = beta
        self.encoder = encoder

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        self.keys_, self.values_ = X[self.encoder], np.eye(len(self.classes_))[y]

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        return z + self.alpha * np.exp(-self.beta * (1 - X[self.encoder] @ self.keys_.T)) @ self.values_


class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys are fine-tuned: AdamW at 1e-3, 20 epochs of batches of 256, a cosine to zero."""

    def __init__(
        self, alpha: float = 1.0, beta: float = 5.5, *, encoder: str = "clip", epochs: int = 20, seed: int = 0
    ):
        super().__init__(alpha, beta, encoder=encoder)
        self.epochs = epochs
        self.seed = seed

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        super()._fit(X, y, z)
        generator = torch.Generator().manual_seed(self.seed)
        f, prior, target = torch.from_numpy(X[self.encoder]), torch.from_numpy(z), torch.from_numpy(y)
        keys, values = torch.from_numpy(self.keys_).clone().requires_grad_(), torch.from_numpy(self.values_)
        optimiser = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
        batches = -(-len(y) // 256)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs * batches)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(y), generator=generator).split(256):
                logits = prior[batch] + self.alpha * (-self.beta * (1 - f[batch] @ keys.mT)).exp() @ values
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(logits, target[batch]).backward()
                optimiser.step()
                schedule.step()
        self.keys_ = keys.detach().numpy()


class CacheFusion(Baseline):
    """CaFo's fusion of caches of several encoders (arXiv 2303.02151), without generated images or prompts.

    Zero-shot and cache logits are standardised row by row; a cache weighs as the softmax of its agreement (inner
    product) with the zero-shot row; alpha times the weighted sum is added to the zero-shot logits.
    """

    needs_prior = True

    def __init__(self, alpha: float = 1.0, beta: float = 5.5):
        self.alpha = alpha
        self.beta = beta

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        self.keys_, self.values_ = X, np.eye(len(self.classes_))[y]

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        caches = [np.exp(-self.beta * (1 - X[name] @ keys.T)) @ self.values_ for name, keys in self.keys_.items()]
        reference = _standard(z)
        standard = np.stack([_standard(cache) for cache in caches])
        weights = softmax((standard * reference).sum(2), axis=0)
        return z + self.alpha * (weights[:, :, None] * standard).sum(0)


def _standard(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(1, keepdims=True)) / (rows.std(1, keepdims=True) + 1e-12)
