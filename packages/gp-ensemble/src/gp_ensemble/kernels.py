"""The kernel ensemble: a weighted sum of deep kernels, one on each encoder's features (arXiv 2404.00312).

    k(x, x') = sum_i w_i kappa_i(u_i, u_i')

The u_i are unit vectors, so the base kernels are functions of their cosine, with kappa(u, u) = 1:

    rbf       exp(beta (u.u' - 1))        the RBF kernel with length scale beta^-1/2, and Tip-Adapter's affinity
    matern52  the Matern-5/2 kernel with length scale beta^-1/2
    linear    (1 + u.u') / 2

All are gpytorch kernels, and any `gpytorch.kernels.Kernel` takes their place. Positive parameters are stored as
logarithms; each has a normal prior on the logarithm, which is also where tuning starts.
"""

from collections.abc import Mapping
from typing import Any

import gpytorch
import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from gp_ensemble.features import Features
from gp_ensemble.priors import positive

STRIP = 2**20
"""Entries of a kernel matrix that are computed at a time; some strips of this size exist at once."""


class CosineKernel(gpytorch.kernels.Kernel):
    """A kernel that depends on the cosine of two unit vectors only."""

    def of_cosine(self, cosine: Tensor) -> Tensor:
        """kappa, element by element."""
        raise NotImplementedError

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        return self.of_cosine((x1 * x2).sum(-1) if diag else x1 @ x2.mT)


class _Scaled(CosineKernel):
    def __init__(self) -> None:
        super().__init__()
        positive(self, "beta", 1.5, width=0.3)

    @property
    def beta(self) -> Tensor:
        """Inverse squared length scale."""
        return self.log_beta.exp()


class RBF(_Scaled):
    """exp(beta (c - 1))."""

    def of_cosine(self, cosine: Tensor) -> Tensor:
        return ((cosine - 1) * self.beta.to(cosine.dtype)).exp()

    def native(self) -> gpytorch.kernels.Kernel:
        kernel = gpytorch.kernels.RBFKernel().double()
        kernel.lengthscale = self.beta.detach() ** -0.5
        return kernel


class Matern52(_Scaled):
    """(1 + t + t^2/3) exp(-t) with t = sqrt(5 beta) |u - u'| and |u - u'|^2 = 2 - 2c."""

    def of_cosine(self, cosine: Tensor) -> Tensor:
        # The clamp keeps the square root's gradient finite at equal vectors.
        t = (10 * self.beta.to(cosine.dtype) * (1 - cosine).clamp_min(1e-15)).sqrt()
        return (1 + t + t**2 / 3) * (-t).exp()

    def native(self) -> gpytorch.kernels.Kernel:
        kernel = gpytorch.kernels.MaternKernel(nu=2.5).double()
        kernel.lengthscale = self.beta.detach() ** -0.5
        return kernel


class Linear(CosineKernel):
    """(1 + c) / 2."""

    def of_cosine(self, cosine: Tensor) -> Tensor:
        return (1 + cosine) / 2

    def native(self) -> gpytorch.kernels.Kernel:
        linear, constant = gpytorch.kernels.LinearKernel().double(), gpytorch.kernels.ConstantKernel().double()
        half = torch.tensor(0.5, dtype=torch.float64)
        linear.variance, constant.constant = half, half
        return linear + constant


KERNELS: dict[str, type[CosineKernel]] = {"rbf": RBF, "matern52": Matern52, "linear": Linear}


def make_kernel(kernel: str | gpytorch.kernels.Kernel) -> gpytorch.kernels.Kernel:
    """A base kernel by name, or a copy of a gpytorch kernel."""
    if isinstance(kernel, gpytorch.kernels.Kernel):
        import copy

        return copy.deepcopy(kernel).double()
    if kernel not in KERNELS:
        raise UserError(f"kernel is {kernel!r}, expected one of {', '.join(KERNELS)} or a gpytorch kernel")
    return KERNELS[kernel]()


class EnsembleKernel(gpytorch.Module):
    """The weighted sum over encoders.

    encoders: names, in order.
    kernel: a name, a gpytorch kernel (copied for each encoder), or a mapping from encoder to one of them.
    """

    def __init__(self, encoders: list[str], kernel: str | gpytorch.kernels.Kernel | Mapping[str, Any] = "rbf"):
        super().__init__()
        self.encoders = list(encoders)
        if isinstance(kernel, Mapping):
            if set(kernel) != set(encoders):
                raise UserError(f"kernels for {sorted(kernel)}, encoders are {sorted(encoders)}")
            chosen = [kernel[name] for name in encoders]
        else:
            chosen = [kernel] * len(encoders)
        self.kernels = torch.nn.ModuleList(make_kernel(k) for k in chosen)
        positive(self, "weight", 0.3 / len(encoders), width=2.0, count=len(encoders))

    @property
    def weights(self) -> Tensor:
        """w (M,)."""
        return self.log_weight.exp()

    @property
    def linear(self) -> bool:
        """Every base kernel is linear, so that the weight-space form is exact."""
        return all(isinstance(kernel, Linear) for kernel in self.kernels)

    def prepare(self, a: Features, b: Features | None = None) -> list[Any]:
        """What does not change while the hyper-parameters do: the cosines (n_a, n_b) of each encoder."""
        b = a if b is None else b
        return [
            a[name] @ b[name].mT if isinstance(kernel, CosineKernel) else (a[name], b[name])
            for name, kernel in zip(self.encoders, self.kernels, strict=True)
        ]

    def evaluate(self, prepared: list[Any]) -> Tensor:
        """The kernel matrix (n_a, n_b) of what `prepare` gave; differentiable in the hyper-parameters."""
        return sum(
            (weight.to(part.dtype) * part for weight, part in zip(self.weights, self._parts(prepared), strict=True)),
            start=torch.zeros(()),
        )

    def _parts(self, prepared: list[Any]) -> list[Tensor]:
        return [
            kernel.of_cosine(given) if isinstance(kernel, CosineKernel) else kernel(*given).to_dense()
            for given, kernel in zip(prepared, self.kernels, strict=True)
        ]

    def forward(self, a: Features, b: Features) -> Tensor:
        """k(a, b), (n_a, n_b), one encoder after the other, so that their matrices never exist side by side."""
        total = None
        for name, kernel, weight in zip(self.encoders, self.kernels, self.weights, strict=True):
            part = weight.to(a[name]) * kernel(a[name], b[name]).to_dense()
            total = part if total is None else total + part
        return total

    def each(self, a: Features, b: Features) -> dict[str, Tensor]:
        """Encoder to its own term w_i kappa_i(a, b), (n_a, n_b)."""
        parts = self._parts(self.prepare(a, b))
        return {n: w.to(p) * p for n, w, p in zip(self.encoders, self.weights, parts, strict=True)}

    def diagonal(self, a: Features) -> Tensor:
        """k(x, x) of each row, (n,)."""
        total = torch.zeros((), dtype=torch.float64)
        for name, weight, kernel in zip(self.encoders, self.weights, self.kernels, strict=True):
            rows = a[name]
            ones = isinstance(kernel, CosineKernel)
            total = total + weight.to(rows) * (rows.new_ones(len(rows)) if ones else kernel(rows, diag=True))
        return total.to(a[self.encoders[0]])

    @torch.no_grad()
    def gram(self, a: Features) -> Tensor:
        """k(a, a), (n, n), without gradient: one triangle is computed, by strips of rows, and mirrored."""
        first = a[self.encoders[0]]
        n = len(first)
        matrix = first.new_empty(n, n)
        step = max(STRIP // n, 1)
        for start in range(0, n, step):
            stop = min(start + step, n)
            block = self(rows(a, slice(start, stop)), rows(a, slice(0, stop)))
            matrix[start:stop, :stop] = block
            matrix[:stop, start:stop] = block.mT
        return matrix


def rows(features: Features, index: Any) -> Features:
    """The features of some images."""
    return {name: array[index] for name, array in features.items()}
