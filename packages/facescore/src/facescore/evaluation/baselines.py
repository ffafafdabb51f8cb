"""Scores of a face crop that need no preferences: what a reward has to beat.

Each is called with a list of pictures and gives one number per picture, higher for better.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from tenfold_shared.errors import UserError

Array = np.ndarray


def sharpness(images: Sequence[Image.Image]) -> Array:
    """Variance of the Laplacian of the grey picture."""
    from scipy.ndimage import laplace

    return np.array([laplace(_grey(i)).var() for i in images])


class NaturalStatistics:
    """A BRISQUE-like statistic without its trained regression: how far the locally normalised grey values of a picture are
    from those of good faces.

    The features are BRISQUE's (mean-subtracted contrast-normalised values: shape and variance, and the same of products of
    neighbours in four directions); the score is minus the Mahalanobis distance to their mean over clean faces, as in NIQE.
    """

    def __init__(self, clean: Sequence[Image.Image]):
        if len(clean) < 2:
            raise UserError("the statistic of clean faces needs at least two")
        features = np.stack([self.features(i) for i in clean])
        self.mean = features.mean(0)
        self.precision = np.linalg.pinv(np.cov(features.T) + 1e-6 * np.eye(features.shape[1]))

    @staticmethod
    def features(image: Image.Image) -> Array:
        """(18,): log shape and log scale of the normalised values, then mean, log scales left and right of 0, and size of four products."""
        from scipy.ndimage import gaussian_filter

        grey = _grey(image)
        mean = gaussian_filter(grey, 7 / 6)
        deviation = np.sqrt(np.abs(gaussian_filter(grey**2, 7 / 6) - mean**2))
        x = (grey - mean) / (deviation + 1 / 255)
        found = [np.log((x**2).mean() + 1e-9), np.log(np.abs(x).mean() ** 2 / ((x**2).mean() + 1e-12) + 1e-9)]
        for product in (x[:, 1:] * x[:, :-1], x[1:] * x[:-1], x[1:, 1:] * x[:-1, :-1], x[1:, :-1] * x[:-1, 1:]):
            left, right = product[product < 0], product[product > 0]
            found += [product.mean(), _log_scale(left), _log_scale(right), np.abs(product).mean()]
        return np.array(found)

    def __call__(self, images: Sequence[Image.Image]) -> Array:
        d = np.stack([self.features(i) for i in images]) - self.mean
        return -np.sqrt(np.einsum("ni,ij,nj->n", d, self.precision, d))


class Eigenfaces:
    """Minus the error of reconstructing a picture from the first principal components of clean faces."""

    def __init__(self, clean: Sequence[Image.Image], components: int = 8, *, size: int = 32):
        if len(clean) <= components:
            raise UserError(f"{components} components need more than {len(clean)} clean faces")
        self.size = size
        rows = self._rows(clean)
        self.mean = rows.mean(0)
        self.basis = np.linalg.svd(rows - self.mean, full_matrices=False)[2][:components]

    def _rows(self, images: Sequence[Image.Image]) -> Array:
        same = [i.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC) for i in images]
        return np.stack([np.asarray(i, dtype=np.float64).ravel() / 255 for i in same])

    def __call__(self, images: Sequence[Image.Image]) -> Array:
        d = self._rows(images) - self.mean
        return -np.sqrt(((d - d @ self.basis.T @ self.basis) ** 2).mean(1))


def _grey(image: Image.Image) -> Array:
    return np.asarray(image.convert("L"), dtype=np.float64) / 255


def _log_scale(values: Array) -> float:
    return float(np.log((values**2).mean() + 1e-9)) if values.size else float(np.log(1e-9))
