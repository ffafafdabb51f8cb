"""Other kernel methods, from the libraries that have them: kernel ridge, Laplace classification, Dirichlet
regression."""

import numpy as np
from sklearn import kernel_ridge
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from gp_ensemble.baselines.base import Baseline, side_by_side


class KernelRidge(Baseline):
    """scikit-learn's kernel ridge regression of one-hot labels on concatenated features; a softmax at 0.075."""

    def __init__(self, alpha: float = 0.1, gamma: float = 0.75, *, encoder: str | None = None):
        self.alpha = alpha
        self.gamma = gamma
        self.encoder = encoder

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        self.model_ = kernel_ridge.KernelRidge(alpha=self.alpha, kernel="rbf", gamma=self.gamma)
        self.model_.fit(side_by_side(X, self.encoder), np.eye(len(self.classes_))[y])

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        return self.model_.predict(side_by_side(X, self.encoder)) / 0.075


class SklearnGPC(Baseline):
    """scikit-learn's Gaussian-process classifier (Laplace, one against the rest) on concatenated features."""

    tuned_on = "training images (marginal likelihood)"

    def __init__(self, encoder: str | None = None):
        self.encoder = encoder

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        kernel = ConstantKernel(1.0) * RBF(1.0)
        self.model_ = GaussianProcessClassifier(kernel, random_state=0).fit(side_by_side(X, self.encoder), y)

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        return np.log(self.model_.predict_proba(side_by_side(X, self.encoder)) + 1e-12)


class DirichletGP(Baseline):
    """gpytorch's Dirichlet-based regression (arXiv 1805.10915): a kernel matrix of its own for every class."""

    tuned_on = "training images (marginal likelihood)"

    def __init__(self, encoder: str | None = None, *, steps: int = 50):
        self.encoder = encoder
        self.steps = steps

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        import gpytorch
        import torch

        x, target = torch.tensor(side_by_side(X, self.encoder)), torch.tensor(y)
        classes = torch.Size([len(self.classes_)])
        likelihood = gpytorch.likelihoods.DirichletClassificationLikelihood(target, dtype=torch.float64)

        class Model(gpytorch.models.ExactGP):
            def __init__(self) -> None:
                super().__init__(x, likelihood.transformed_targets, likelihood)
                self.mean_module = gpytorch.means.ConstantMean(batch_shape=classes)
                base = gpytorch.kernels.RBFKernel(batch_shape=classes)
                self.covar_module = gpytorch.kernels.ScaleKernel(base, batch_shape=classes)

            def forward(self, inputs: torch.Tensor) -> gpytorch.distributions.MultivariateNormal:
                return gpytorch.distributions.MultivariateNormal(self.mean_module(inputs), self.covar_module(inputs))

        self.model_ = Model().double().train()
        optimiser = torch.optim.Adam(self.model_.parameters(), lr=0.1)
        evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, self.model_)
        with gpytorch.settings.max_cholesky_size(10**6):
            for _ in range(self.steps):
                optimiser.zero_grad()
                (-evidence(self.model_(x), likelihood.transformed_targets).sum()).backward()
                optimiser.step()
        self.model_.eval()

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        import gpytorch
        import torch

        with torch.no_grad(), gpytorch.settings.max_cholesky_size(10**6):
            latent = self.model_(torch.tensor(side_by_side(X, self.encoder)))
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(256, *latent.mean.shape, dtype=torch.float64, generator=generator)
            samples = latent.mean + latent.variance.sqrt() * noise
            return samples.softmax(1).mean(0).mT.log().numpy()
