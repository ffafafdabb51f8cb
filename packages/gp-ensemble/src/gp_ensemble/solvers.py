"""Solving (K + N) alpha = R for all classes at once; N is the diagonal of the rows' noise variances.

    cholesky  exact, one factorisation in place; the default
    primal    exact for linear kernels, in weight space: O(n D^2 + D^3) with D features
    nystrom   m inducing rows chosen by pivoted Cholesky, FITC noise: O(n m^2)
    cg        conjugate gradients through linear_operator; only for a handful of classes

Conjugate gradients cost 2 n^2 C per iteration against n^3 / 3 for the factorisation, so they win only under n / (6 C)
iterations, and n / C is the number of shots.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from gp_ensemble.errors import NumericalError, OutOfMemoryError, UserError
from gp_ensemble.features import Features
from gp_ensemble.kernels import STRIP, EnsembleKernel, rows

CLASSES = 128
"""Classes that are solved for at a time, which bounds the memory of the float64 residual."""

BLOCK = 512
"""Columns that are factorised at a time."""

SOLVERS = ("auto", "cholesky", "primal", "nystrom", "cg")


class Solver:
    """The posterior of the residual: f ~ GP(0, k), R = f + noise."""

    support: Features
    """Rows that predictions are expanded in."""
    coefficients: Tensor
    """(support rows, C): the posterior mean is k(x, support) @ coefficients."""

    def fit(self, kernel: EnsembleKernel, features: Features, noise: Tensor, residual: Tensor) -> None:
        """features: n rows. noise: variances (n,). residual: R (n, C)."""
        raise NotImplementedError

    def mean(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        """Posterior mean of f, (n*, C)."""
        return kernel(features, self.support) @ self.coefficients

    def variance(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        """Posterior variance of f, (n*,), not negative."""
        return self.covariance_diagonal(kernel, features).clamp_min_(0)

    def covariance_diagonal(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        """The variance before rounding errors are clipped."""
        raise NotImplementedError

    def dual(self) -> Tensor:
        """alpha = (K + N)^-1 R, (n, C)."""
        raise NotImplementedError

    def precision_diagonal(self) -> Tensor:
        """diag (K + N)^-1, (n,): what leave-one-out needs."""
        raise NotImplementedError

    def log_determinant(self) -> Tensor:
        """log |K + N|."""
        raise NotImplementedError


class CholeskySolver(Solver):
    """K + N = L L^T, factorised in the memory of K.

    The lower triangle of `factor` becomes L; the upper keeps K. In float32 the solution is improved once with the
    residual computed in float64 from that upper triangle.
    """

    jitter = 0.0

    def fit(self, kernel: EnsembleKernel, features: Features, noise: Tensor, residual: Tensor) -> None:
        self.support = features
        matrix = kernel.gram(features)
        matrix.diagonal().add_(noise)
        self._blocks = _diagonal_blocks(matrix)
        self.factor = matrix
        self._factorise()
        self.solve(residual)

    def state(self) -> dict[str, Tensor]:
        """What `restored` needs besides the support."""
        return {"factor": self.factor, "blocks": _side_by_side(self._blocks), "coefficients": self.coefficients}

    @classmethod
    def restored(cls, support: Features, state: dict[str, Tensor], jitter: float) -> "CholeskySolver":
        """A fitted solver from its state."""
        solver = cls()
        solver.support, solver.factor, solver.jitter = support, state["factor"], jitter
        solver.coefficients = state["coefficients"]
        solver._blocks = [block[: block.shape[1]] for block in state["blocks"].split(BLOCK, dim=1)]
        return solver

    def _factorise(self) -> None:
        matrix = self.factor
        base = 1e-8 if matrix.dtype == torch.float64 else 1e-6
        for attempt in range(7):
            self.jitter = 0.0 if attempt == 0 else base * 10.0 ** (attempt - 1)
            if attempt:
                _restore(matrix, self._blocks)
                matrix.diagonal().add_(self.jitter)
            if cholesky_in_place(matrix):
                return
        _restore(matrix, self._blocks)
        raise NumericalError(
            f"the kernel matrix of {len(matrix)} rows is not positive definite with jitter {self.jitter:g} "
            f"(smallest eigenvalue about {_smallest_eigenvalue(matrix):.2g})",
            hint="raise the noise, remove duplicate images, or use dtype='float64'",
        )

    def solve(self, residual: Tensor) -> None:
        """Set the coefficients for another R with the same factor: O(n^2 C)."""
        alpha = torch.empty_like(residual)
        for start in range(0, residual.shape[1], CLASSES):
            columns = slice(start, start + CLASSES)
            part = self._solve(residual[:, columns])
            if part.dtype == torch.float32:
                error = residual[:, columns].double() - self._product(part.double())
                part = part + self._solve(error.float())
            alpha[:, columns] = part
        self.coefficients = alpha

    def _solve(self, right: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.factor, right, upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, half, upper=True)

    def _product(self, x: Tensor) -> Tensor:
        """(K + N) x from the upper triangle, in the precision of x."""
        result = torch.zeros_like(x)
        for start, block in zip(range(0, len(x), BLOCK), self._blocks, strict=True):
            stop = start + len(block)
            right = self.factor[start:stop, stop:].to(x.dtype)
            result[start:stop] += block.to(x.dtype) @ x[start:stop] + right @ x[stop:] + self.jitter * x[start:stop]
            result[stop:] += right.mT @ x[start:stop]
        return result

    def whiten(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        """L^-1 k(X, x*), (n, n*): inner products of its columns are what the data explain of the covariance."""
        return torch.linalg.solve_triangular(self.factor, kernel(self.support, features), upper=False)

    def covariance_diagonal(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        return kernel.diagonal(features) - self.whiten(kernel, features).square().sum(0)

    def dual(self) -> Tensor:
        return self.coefficients

    def precision_diagonal(self) -> Tensor:
        # Column j of L^-1 is zero above j, so only the trailing part of L is solved with.
        n = len(self.factor)
        result = self.factor.new_empty(n)
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            unit = self.factor.new_zeros(n - start, stop - start)
            unit.fill_diagonal_(1)
            tail = torch.linalg.solve_triangular(self.factor[start:, start:], unit, upper=False)
            result[start:stop] = tail.square().sum(0)
        return result

    def precision_block(self, index: Tensor) -> Tensor:
        """The block of (K + N)^-1 at some rows, for leaving groups out."""
        unit = self.factor.new_zeros(len(self.factor), len(index))
        unit[index, torch.arange(len(index), device=unit.device)] = 1
        half = torch.linalg.solve_triangular(self.factor, unit, upper=False)
        return half.mT @ half

    def log_determinant(self) -> Tensor:
        return 2 * self.factor.diagonal().double().log().sum()

    def extend(self, kernel: EnsembleKernel, features: Features, noise: Tensor) -> None:
        """Add rows: L' = [[L, 0], [B^T, L_2]], B = L^-1 K_12, L_2 L_2^T = K_22 + N_2 - B^T B. `solve` must follow."""
        n, m = len(self.factor), len(noise)
        cross = kernel(self.support, features)
        b = torch.linalg.solve_triangular(self.factor, cross, upper=False)
        corner = kernel.gram(features)
        corner.diagonal().add_(noise + self.jitter)
        lower, info = torch.linalg.cholesky_ex(corner - b.mT @ b)
        support = {name: torch.cat([array, features[name]]) for name, array in self.support.items()}
        if info > 0:
            raise NumericalError(
                "the new rows make the kernel matrix indefinite", hint="raise the noise or remove duplicate images"
            )
        factor = self.factor.new_empty(n + m, n + m)
        factor[:n, :n], factor[n:, :n], factor[n:, n:] = self.factor, b.mT, lower
        factor[:n, n:] = cross
        # The blocks are cut anew, since the new rows may share one with old rows.
        full = corner - self.jitter * torch.eye(m, dtype=corner.dtype, device=corner.device)
        self._blocks = self._extended_blocks(factor, full, n)
        self.factor, self.support = factor, support

    def _extended_blocks(self, factor: Tensor, corner: Tensor, n: int) -> list[Tensor]:
        upper = factor.triu()
        for start, block in zip(range(0, n, BLOCK), self._blocks, strict=True):
            upper[start : start + len(block), start : start + len(block)] = block
        upper[n:, n:] = corner
        full = upper.triu() + upper.triu(1).mT
        factor.copy_(factor.tril() + full.triu(1))
        return _diagonal_blocks(full)


def cholesky_in_place(matrix: Tensor) -> bool:
    """Factorise a symmetric matrix in its own memory by columns of blocks; False when it is not positive definite.

    The lower triangle becomes L, the blocks above the diagonal keep their values. torch's own call needs a second
    matrix.
    """
    n = len(matrix)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        if start:
            matrix[start:, start:stop].addmm_(matrix[start:, :start], matrix[start:stop, :start].mT, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if info > 0 or not torch.isfinite(corner).all():
            return False
        matrix[start:stop, start:stop] = corner
        if stop < n:
            below = torch.linalg.solve_triangular(corner.mT, matrix[stop:, start:stop], upper=True, left=False)
            matrix[stop:, start:stop] = below
    return True


def _diagonal_blocks(matrix: Tensor) -> list[Tensor]:
    n = len(matrix)
    return [matrix[i : min(i + BLOCK, n), i : min(i + BLOCK, n)].clone() for i in range(0, n, BLOCK)]


def _side_by_side(blocks: list[Tensor]) -> Tensor:
    height = len(blocks[0])
    return torch.cat([torch.nn.functional.pad(block, (0, 0, 0, height - len(block))) for block in blocks], dim=1)


def _restore(matrix: Tensor, blocks: list[Tensor]) -> None:
    for start, block in zip(range(0, len(matrix), BLOCK), blocks, strict=True):
        stop = start + len(block)
        matrix[start:stop, start:stop] = block
        matrix[stop:, start:stop] = matrix[start:stop, stop:].mT


def _smallest_eigenvalue(matrix: Tensor, steps: int = 100) -> float:
    """Power iteration on c I - A with c an upper bound of the largest eigenvalue."""
    bound = matrix.abs().sum(1).amax().double()
    x = torch.ones(len(matrix), 1, dtype=torch.float64, device=matrix.device)
    x[::2] = -0.5
    value = bound
    for _ in range(steps):
        x = bound * x - (matrix @ x.to(matrix.dtype)).double()
        value = x.norm()
        x = x / value
    return float(bound - value)


class WeightSpaceSolver(Solver):
    """Bayesian linear regression on a feature map: K + N is replaced by Phi Phi^T + Lambda.

    Lambda is N plus what the map leaves of the kernel's diagonal (FITC), which is nothing for an exact map.
    """

    def feature_map(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        """Phi, (n, D)."""
        raise NotImplementedError

    def prepare_map(self, kernel: EnsembleKernel, features: Features) -> None:
        """Choose what the map depends on."""

    def fit(self, kernel: EnsembleKernel, features: Features, noise: Tensor, residual: Tensor) -> None:
        self.support = features
        self.prepare_map(kernel, features)
        phi = self.feature_map(kernel, features)
        self._phi, self._residual = phi, residual
        self._lambda = noise + (kernel.diagonal(features) - phi.square().sum(1)).clamp_min(0)
        scaled = phi / self._lambda[:, None]
        inner = phi.mT @ scaled
        inner.diagonal().add_(1)
        self._factor = torch.linalg.cholesky(inner)
        self.weights = torch.cholesky_solve(scaled.mT @ residual, self._factor)
        self.coefficients = self.dual()

    def mean(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        return self.feature_map(kernel, features) @ self.weights

    def covariance_diagonal(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        phi = self.feature_map(kernel, features)
        left = (kernel.diagonal(features) - phi.square().sum(1)).clamp_min(0)
        return left + torch.linalg.solve_triangular(self._factor, phi.mT, upper=False).square().sum(0)

    def dual(self) -> Tensor:
        return (self._residual - self._phi @ self.weights) / self._lambda[:, None]

    def precision_diagonal(self) -> Tensor:
        half = torch.linalg.solve_triangular(self._factor, self._phi.mT, upper=False)
        return 1 / self._lambda - half.square().sum(0) / self._lambda**2

    def log_determinant(self) -> Tensor:
        return self._lambda.double().log().sum() + 2 * self._factor.diagonal().double().log().sum()


class PrimalSolver(WeightSpaceSolver):
    """Exact for linear kernels: phi = [sqrt(sum w / 2), sqrt(w_i / 2) u_i ...]."""

    def feature_map(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        half = kernel.weights / 2
        parts = [w.sqrt().to(features[n]) * features[n] for n, w in zip(kernel.encoders, half, strict=True)]
        return torch.cat([half.sum().sqrt().to(parts[0]).expand(len(parts[0]), 1), *parts], dim=1)


class NystromSolver(WeightSpaceSolver):
    """phi = L_m^-1 k(Z, x) with m rows Z of the training set, chosen greedily by remaining variance."""

    def __init__(self, inducing: int = 1000):
        self.inducing = inducing

    def prepare_map(self, kernel: EnsembleKernel, features: Features) -> None:
        chosen = pivoted_cholesky(
            kernel.diagonal(features),
            lambda i: kernel(features, rows(features, [i]))[:, 0],
            min(self.inducing, len(next(iter(features.values())))),
        )
        self._inducing_rows = rows(features, chosen)
        matrix = kernel.gram(self._inducing_rows)
        matrix.diagonal().add_(1e-6 if matrix.dtype == torch.float32 else 1e-10)
        self._inducing_factor = torch.linalg.cholesky(matrix)

    def feature_map(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        cross = kernel(self._inducing_rows, features)
        return torch.linalg.solve_triangular(self._inducing_factor, cross, upper=False).mT

    def fit(self, kernel: EnsembleKernel, features: Features, noise: Tensor, residual: Tensor) -> None:
        super().fit(kernel, features, noise, residual)
        self.support = self._inducing_rows
        self.coefficients = torch.linalg.solve_triangular(self._inducing_factor.mT, self.weights, upper=True)


class CGSolver(Solver):
    """Conjugate gradients of linear_operator to a residual of 1e-5; no leave-one-out and no determinant."""

    def fit(self, kernel: EnsembleKernel, features: Features, noise: Tensor, residual: Tensor) -> None:
        if residual.shape[1] > 4:
            raise UserError(
                f"solver 'cg' with {residual.shape[1]} classes, expected 4 or fewer",
                hint="use solver='cholesky', which solves for all classes at once",
            )
        self.support = features
        self._matrix = kernel.gram(features)
        self._matrix.diagonal().add_(noise)
        self.coefficients = self._solve(residual)

    def _solve(self, right: Tensor) -> Tensor:
        import linear_operator

        operator = linear_operator.to_linear_operator(self._matrix)
        settings = linear_operator.settings
        with settings.max_cholesky_size(0), settings.cg_tolerance(1e-5), settings.max_cg_iterations(2000):
            return operator.solve(right)

    def covariance_diagonal(self, kernel: EnsembleKernel, features: Features) -> Tensor:
        cross = kernel(self.support, features)
        return kernel.diagonal(features) - (cross * self._solve(cross)).sum(0)

    def dual(self) -> Tensor:
        return self.coefficients

    def precision_diagonal(self) -> Tensor:
        raise UserError("leave-one-out is not available with solver 'cg'", hint="use solver='cholesky'")

    def log_determinant(self) -> Tensor:
        raise UserError("the marginal likelihood is not available with solver 'cg'", hint="use solver='cholesky'")


def pivoted_cholesky(diagonal: Tensor, column: Callable[[int], Tensor], count: int, noise: float = 0.0) -> list[int]:
    """Indices in the order of greatest remaining variance.

    diagonal: variances (n,). column: index to the covariances with it (n,). noise: variance of an observation of a
    chosen row. Stops early when nothing is left to explain.
    """
    left = diagonal.double().clone()
    floor = 1e-10 * float(left.max())
    basis = left.new_empty(count, len(left))
    chosen: list[int] = []
    while len(chosen) < count:
        open_rows = left.clone()
        open_rows[chosen] = -torch.inf
        pivot = int(open_rows.argmax())
        if float(open_rows[pivot]) <= floor:
            break
        explained = basis[: len(chosen), pivot] @ basis[: len(chosen)]
        direction = (column(pivot).double() - explained) / (left[pivot] + noise).sqrt()
        basis[len(chosen)] = direction
        left = (left - direction**2).clamp_min(0)
        chosen.append(pivot)
    return chosen


def make_solver(
    solver: str,
    kernel: EnsembleKernel,
    *,
    rows: int,
    dimensions: int,
    classes: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    max_memory: float | None = None,
    inducing: int = 1000,
) -> Solver:
    """A solver by name; `auto` takes the weight space where it is exact and smaller, Nystrom above 30,000 rows.

    max_memory: GiB that may be used; what is free when None. Raises UserError and OutOfMemoryError.
    """
    if solver not in SOLVERS:
        raise UserError(f"solver is {solver!r}, expected one of {', '.join(SOLVERS)}")
    if solver == "primal" and not kernel.linear:
        raise UserError("solver 'primal' needs kernel='linear'", hint="use solver='cholesky' or 'nystrom'")
    if solver == "auto":
        exact_and_smaller = kernel.linear and dimensions + 1 < rows
        solver = "primal" if exact_and_smaller else "nystrom" if rows > 30_000 else "cholesky"
    need = memory_estimate(solver, rows=rows, dimensions=dimensions, classes=classes, dtype=dtype, inducing=inducing)
    have = max_memory if max_memory is not None else free_memory(device)
    if have is not None and need > have:
        others = "dtype='float32', solver='nystrom' with fewer inducing rows" + (
            ", solver='primal'" if kernel.linear else ""
        )
        raise OutOfMemoryError(
            f"solver '{solver}' needs about {need:.2f} GiB for {rows} rows, {have:.2f} GiB are available",
            hint=f"use {others}, or raise max_memory",
        )
    if solver == "nystrom":
        return NystromSolver(inducing)
    return {"cholesky": CholeskySolver, "primal": PrimalSolver, "cg": CGSolver}[solver]()


def memory_estimate(
    solver: str, *, rows: int, dimensions: int, classes: int, dtype: torch.dtype, inducing: int = 1000
) -> float:
    """GiB that fitting needs at its peak: the matrices, the features and the targets."""
    size = torch.finfo(dtype).bits // 8
    width = {"primal": dimensions + 1, "nystrom": min(inducing, rows)}.get(solver, rows)
    matrices = {"primal": 3 * rows * width, "nystrom": 3 * rows * width}.get(solver, rows * rows + 6 * STRIP)
    targets = rows * classes * (size * 3 + (24 if size == 4 else 0))
    return (matrices * size + rows * dimensions * size + targets) / 2**30


def free_memory(device: torch.device | str = "cpu") -> float | None:
    """GiB free on the device, or None where it cannot be asked."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(available.split()[1]) / 2**20
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, AttributeError, OSError):
        return None
