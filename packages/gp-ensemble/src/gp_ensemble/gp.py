"""Exact Gaussian-process regression of one-hot labels; all classes share one kernel and one factorisation.

    f_c ~ GP(m_c, k),  y_c = f_c + eps,  eps ~ N(0, sigma^2)         (label regression, arXiv 2404.00312)

    A = K + sigma^2 I,  R = Y - m(X),  alpha = A^-1 R
    mu(x) = m(x) + k(x, X) alpha                 (C values)
    v(x)  = k(x, x) - k(x, X) A^-1 k(X, x)       (one value, the same for all classes)

Leaving row j out needs no refit: with q = diag(A^-1), mu_loo = Y - alpha / q and v_loo = 1 / q, noise included.
"""

import math
from dataclasses import dataclass
from typing import Any

import gpytorch
import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from gp_ensemble.features import Features
from gp_ensemble.kernels import EnsembleKernel, rows
from gp_ensemble.means import PriorMean, ZeroMean
from gp_ensemble.priors import positive
from gp_ensemble.solvers import CholeskySolver, Solver


@dataclass(frozen=True)
class Posterior:
    """mean (n*, C) and variance (n*,) of the latent f, and the noise variance of an observation."""

    mean: Tensor
    variance: Tensor
    noise: float


class SharedKernelGP(gpytorch.Module):
    """The Gaussian process on normalised features.

    kernel, mean: see those files. Every hyper-parameter is a parameter of this module with a prior, so
    `tuning.tune` can set them; `condition` then does the algebra.
    """

    def __init__(self, kernel: EnsembleKernel, mean: PriorMean | None = None, noise: float = 0.02):
        super().__init__()
        self.kernel = kernel
        self.mean = ZeroMean() if mean is None else mean
        positive(self, "noise", noise, width=0.5)

    @property
    def noise(self) -> float:
        """sigma^2."""
        return float(self.log_noise.detach().exp())

    @torch.no_grad()
    def condition(
        self,
        features: Features,
        targets: Tensor,
        *,
        prior_logits: Tensor | None = None,
        noise_scale: Tensor | None = None,
        solver: Solver | None = None,
    ) -> "SharedKernelGP":
        """Take in n labelled images.

        features: n unit rows per encoder. targets: Y (n, C), one-hot as a rule. prior_logits: z (n, C).
        noise_scale: (n,) positive factors of sigma^2, for rows that are trusted less (above 1) or more.
        """
        scale = targets.new_ones(len(targets)) if noise_scale is None else noise_scale.to(targets)
        solver = CholeskySolver() if solver is None else solver
        self.restore(features, targets, prior_logits=prior_logits, noise_scale=scale, solver=solver)
        solver.fit(self.kernel, features, self.noise * scale, self._residual())
        return self

    def restore(
        self,
        features: Features,
        targets: Tensor,
        *,
        prior_logits: Tensor | None,
        noise_scale: Tensor,
        solver: Solver,
    ) -> None:
        """Put back what `condition` made, with a solver that has been fitted before."""
        self.features, self.targets, self.prior_logits = features, targets, prior_logits
        self.noise_scale, self.solver = noise_scale, solver

    def _residual(self) -> Tensor:
        y = self.targets
        return y - self.mean(self.prior_logits, *y.shape, y.dtype).to(y)

    @torch.no_grad()
    def posterior(self, features: Features, *, prior_logits: Tensor | None = None, variance: bool = True) -> Posterior:
        """The posterior at n* images. variance=False saves n^2 operations per image and gives NaN."""
        m = self.prior_mean(features, prior_logits)
        m = m + self.solver.mean(self.kernel, features)
        v = self.solver.variance(self.kernel, features) if variance else m.new_full((len(m),), math.nan)
        return Posterior(m, v, self.noise)

    @torch.no_grad()
    def prior_mean(self, features: Features, prior_logits: Tensor | None) -> Tensor:
        """m at n* images, (n*, C)."""
        y = self.targets
        return self.mean(prior_logits, len(next(iter(features.values()))), y.shape[1], y.dtype).to(y)

    @torch.no_grad()
    def contributions(self, features: Features, *, prior_logits: Tensor | None = None) -> dict[str, Tensor]:
        """What each encoder, and the prior, add to the posterior mean: (n*, C) each, summing to it."""
        terms = self.kernel.each(features, self.solver.support)
        return {"prior": self.prior_mean(features, prior_logits)} | {
            name: term @ self.solver.coefficients for name, term in terms.items()
        }

    @torch.no_grad()
    def leave_one_out(self) -> Posterior:
        """Prediction of each training image from all others: mean (n, C), variance (n,) with the noise included."""
        q = self.solver.precision_diagonal()
        return Posterior(self.targets - self.solver.dual() / q[:, None], 1 / q, self.noise)

    @torch.no_grad()
    def leave_group_out(self, index: Tensor) -> Posterior:
        """Prediction of some training images from all others, for views of one image or a whole class.

        index: (g,) rows. mean = Y_S - B_SS^-1 alpha_S and the variances are the diagonal of B_SS^-1, where B = A^-1.
        """
        if not isinstance(self.solver, CholeskySolver):
            raise UserError("leaving groups out needs solver='cholesky'")
        block = torch.linalg.inv(self.solver.precision_block(index))
        return Posterior(self.targets[index] - block @ self.solver.dual()[index], block.diagonal(), self.noise)

    @torch.no_grad()
    def log_marginal_likelihood(self) -> float:
        """log p(Y | X): the sum over classes of Gaussian log densities."""
        n, c = self.targets.shape
        quadratic = (self._residual().double() * self.solver.dual().double()).sum()
        return float(-0.5 * quadratic - 0.5 * c * self.solver.log_determinant() - 0.5 * n * c * math.log(2 * math.pi))

    @torch.no_grad()
    def covariance(self, a: Features, b: Features) -> Tensor:
        """Posterior covariance of f between two sets of images, (n_a, n_b). Needs the Cholesky solver."""
        if not isinstance(self.solver, CholeskySolver):
            raise UserError("posterior covariances need solver='cholesky'")
        explained = self.solver.whiten(self.kernel, a).mT @ self.solver.whiten(self.kernel, b)
        return self.kernel(a, b) - explained

    @torch.no_grad()
    def add(
        self,
        features: Features,
        targets: Tensor,
        *,
        prior_logits: Tensor | None = None,
        noise_scale: Tensor | None = None,
    ) -> None:
        """Take in more images at the same hyper-parameters; equal to conditioning on all of them anew.

        targets: (m, C') with C' >= C; new columns are new classes, zero for all earlier images. With new classes,
        `self.prior_logits` must have been widened before. The other solvers than Cholesky are fitted again.
        """
        scale = targets.new_ones(len(targets)) if noise_scale is None else noise_scale.to(targets)
        wider = targets.shape[1] - self.targets.shape[1]
        old = torch.nn.functional.pad(self.targets, (0, wider))
        self.targets = torch.cat([old, targets])
        if prior_logits is not None and self.prior_logits is not None:
            self.prior_logits = torch.cat([self.prior_logits, prior_logits])
        self.noise_scale = torch.cat([self.noise_scale, scale])
        self.features = {name: torch.cat([array, features[name]]) for name, array in self.features.items()}
        if isinstance(self.solver, CholeskySolver):
            self.solver.extend(self.kernel, features, self.noise * scale)
            self.solver.solve(self._residual())
        else:
            self.solver.fit(self.kernel, self.features, self.noise * self.noise_scale, self._residual())

    @torch.no_grad()
    def forget(self, keep: Tensor) -> None:
        """Keep some rows only: exactly the predictor that never saw the others, at these hyper-parameters.

        keep: (n,) bool.
        """
        logits = None if self.prior_logits is None else self.prior_logits[keep]
        self.condition(
            rows(self.features, keep),
            self.targets[keep],
            prior_logits=logits,
            noise_scale=self.noise_scale[keep],
            solver=self.solver,
        )

    def to_gpytorch(self) -> list[gpytorch.models.ExactGP]:
        """One single-output gpytorch `ExactGP` per class, in evaluation mode and float64.

        Inputs are `gpytorch_inputs(features, prior_logits)[c]`: the features side by side and the class's prior mean in
        the last column. Wrap calls in `gpytorch.settings.max_cholesky_size(10**6)` for exact algebra.
        """
        kernels, start = [], 0
        for name, kernel, weight in zip(self.kernel.encoders, self.kernel.kernels, self.kernel.weights, strict=True):
            stop = start + self.features[name].shape[1]
            base = kernel.native() if hasattr(kernel, "native") else kernel
            base = _Slice(base, start, stop)
            scaled = gpytorch.kernels.ScaleKernel(base).double()
            scaled.outputscale = weight.detach()
            kernels.append(scaled)
            start = stop
        inputs = self.gpytorch_inputs(self.features, self.prior_logits)
        noise = self.noise * self.noise_scale.double()
        return [
            _ClassGP(inputs[c], self.targets[:, c].double(), noise, gpytorch.kernels.AdditiveKernel(*kernels)).eval()
            for c in range(self.targets.shape[1])
        ]

    def gpytorch_inputs(self, features: Features, prior_logits: Tensor | None = None) -> list[Tensor]:
        """Inputs (n, sum d_i + 1) of each class's model of `to_gpytorch`."""
        side_by_side = torch.cat([features[name].double() for name in self.kernel.encoders], dim=1)
        m = self.prior_mean(features, prior_logits).double()
        return [torch.cat([side_by_side, m[:, c : c + 1]], dim=1) for c in range(m.shape[1])]


class _Slice(gpytorch.kernels.Kernel):
    """A kernel on some of the columns (`active_dims` would need an index as long as the feature)."""

    def __init__(self, base: gpytorch.kernels.Kernel, start: int, stop: int):
        super().__init__()
        self.base, self.start, self.stop = base, start, stop

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Any:
        columns = slice(self.start, self.stop)
        result = self.base(x1[..., columns], x2[..., columns], diag=diag)
        return result if diag else result.to_dense()


class _LastColumn(gpytorch.means.Mean):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., -1]


class _ClassGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, noise: Tensor, kernel: gpytorch.kernels.Kernel):
        super().__init__(x, y, gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise))
        self.mean_module = _LastColumn()
        self.covar_module = kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def one_hot(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Y (n, classes) of class numbers y (n,)."""
    return torch.zeros(len(y), classes, dtype=dtype, device=y.device).scatter_(1, y[:, None], 1)
