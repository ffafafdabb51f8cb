"""Linear classifiers on frozen features: zero-shot, logistic regression, LP++ and Gaussian discriminant analysis."""

import numpy as np
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from gp_ensemble.baselines.base import Baseline, side_by_side


class ZeroShot(Baseline):
    """The text model alone."""

    needs_prior = True

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        pass

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        return z


class LinearProbe(Baseline):
    """scikit-learn's logistic regression on unit features. encoder: one of them, or all concatenated when None."""

    fitting: tuple[str, ...] = ("encoder", "C")

    def __init__(self, encoder: str | None = None, *, C: float = 10.0):
        self.encoder = encoder
        self.C = C

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        self.model_ = LogisticRegression(C=self.C, max_iter=1000).fit(side_by_side(X, self.encoder), y)

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        return self.model_.predict_log_proba(side_by_side(X, self.encoder))


class LinearProbeEnsemble(Baseline):
    """Mean of the probabilities of one logistic regression per encoder and of the zero-shot classifier where
    there is one."""

    def __init__(self, C: float = 10.0):
        self.C = C

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        self.models_ = {n: LogisticRegression(C=self.C, max_iter=1000).fit(u, y) for n, u in X.items()}

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        parts = [self.models_[name].predict_proba(u) for name, u in X.items()]
        return np.log(np.mean(parts + ([softmax(z, axis=1)] if z.size else []), axis=0) + 1e-12)


class GDA(Baseline):
    """Gaussian discriminant analysis added to the zero-shot logits (arXiv 2402.04087), no training.

    Class means mu, shrunk precision d pinv((N - 1) S + tr(S) I), W = mu S^-1, b = -mu S^-1 mu / 2,
    logits = zero-shot + alpha (f W + b). encoder: one of them, or all concatenated when None.
    """

    fitting: tuple[str, ...] = ("encoder",)
    needs_prior = True

    def __init__(self, encoder: str | None = None, *, alpha: float = 1.0):
        self.encoder = encoder
        self.alpha = alpha

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        f = side_by_side(X, self.encoder)
        means = np.stack([f[y == c].mean(0) for c in range(len(self.classes_))])
        centred = f - means[y]
        n, d = f.shape
        covariance = centred.T @ centred / max(n - 1, 1)
        # With one image per class the within-class scatter is zero; the scatter of all images stands in for it.
        if np.trace(covariance) < 1e-12:
            covariance = np.cov(f.T)
        precision = d * np.linalg.pinv((n - 1) * covariance + np.trace(covariance) * np.eye(d), hermitian=True)
        self.coef_ = precision @ means.T
        self.intercept_ = -0.5 * np.einsum("cd,dc->c", means, self.coef_)

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        return z + self.alpha * (side_by_side(X, self.encoder) @ self.coef_ + self.intercept_)


class LPPlusPlus(Baseline):
    """LP++ (arXiv 2404.02285), simplified: logits f.w_c + alpha_c z_c, both learned by gradient steps.

    w starts at the class means, alpha at one; each block's step comes from its own Lipschitz constant, momentum 0.9.
    encoder: one of them, or all concatenated when None.
    """

    needs_prior = True

    def __init__(self, encoder: str | None = None, *, steps: int = 300):
        self.encoder = encoder
        self.steps = steps

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        f = side_by_side(X, self.encoder)
        n, classes = len(y), len(self.classes_)
        target = np.eye(classes)[y]
        w = np.stack([f[y == c].mean(0) for c in range(classes)], axis=1)
        alpha = np.ones(classes)
        z = z - z.mean(1, keepdims=True)
        rates = 4 * n / np.linalg.norm(f, 2) ** 2, 4 * n / np.linalg.norm(z, 2) ** 2
        speeds = [np.zeros_like(w), np.zeros_like(alpha)]
        for _ in range(self.steps):
            error = (softmax(f @ w + alpha * z, axis=1) - target) / n
            for speed, rate, gradient in zip(speeds, rates, (f.T @ error, (error * z).sum(0)), strict=True):
                speed *= 0.9
                speed -= 0.1 * rate * gradient
            w, alpha = w + speeds[0], alpha + speeds[1]
        self.coef_, self.alpha_ = w, alpha

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        return side_by_side(X, self.encoder) @ self.coef_ + self.alpha_ * (z - z.mean(1, keepdims=True))
