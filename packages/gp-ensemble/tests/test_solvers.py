import pytest
import torch
from gp_ensemble import solvers
from gp_ensemble.errors import NumericalError, OutOfMemoryError, UserError
from gp_ensemble.features import Features, Normaliser
from gp_ensemble.kernels import EnsembleKernel, rows
from gp_ensemble.solvers import CGSolver, CholeskySolver, cholesky_in_place, make_solver, pivoted_cholesky


def features(n: int = 90, dtype: torch.dtype = torch.float64) -> Features:
    generator = torch.Generator().manual_seed(1)
    return Normaliser.fit({"a": torch.randn(n, 12, generator=generator)}, dtype=dtype)[1]


@pytest.fixture(params=[32, 512])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Small blocks, so that several are used, and the real size."""
    monkeypatch.setattr(solvers, "BLOCK", request.param)
    return request.param


def test_in_place_factor_is_torchs_and_keeps_the_upper_triangle(block: int) -> None:
    x = torch.randn(100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = x @ x.mT + 5 * torch.eye(100)
    work = a.clone()
    assert cholesky_in_place(work)
    torch.testing.assert_close(work.tril(), torch.linalg.cholesky(a))
    for start in range(0, 100, block):
        assert torch.equal(work[start : start + block, start + block :], a[start : start + block, start + block :])
    a[50, 50] = -1.0
    assert not cholesky_in_place(a)


def test_leave_one_out_diagonal_product_and_extension_across_blocks(block: int) -> None:
    kernel, u = EnsembleKernel(["a"]), features()
    noise = torch.linspace(0.01, 0.1, 90, dtype=torch.float64)
    right = torch.randn(90, 3, dtype=torch.float64)
    a = kernel(u, u).detach() + torch.diag(noise)
    solver = CholeskySolver()
    solver.fit(kernel, rows(u, slice(0, 70)), noise[:70], right[:70])
    solver.extend(kernel, rows(u, slice(70, 90)), noise[70:])
    solver.solve(right)
    torch.testing.assert_close(solver.coefficients, torch.linalg.solve(a, right))
    torch.testing.assert_close(solver.precision_diagonal(), torch.linalg.inv(a).diagonal())
    torch.testing.assert_close(solver._product(right), a @ right)
    assert solver.log_determinant().item() == pytest.approx(torch.logdet(a).item())


def test_float32_is_refined(block: int) -> None:
    kernel, u = EnsembleKernel(["a"]), features(dtype=torch.float32)
    right = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    solver = CholeskySolver()
    solver.fit(kernel, u, torch.full((90,), 1e-4), right)
    refined = solver.coefficients
    matrix = kernel.gram(u)
    matrix.diagonal().add_(1e-4)
    exact = torch.linalg.solve(matrix.double(), right.double())
    error = float((refined - exact).norm() / exact.norm())
    plain = float((solver._solve(right) - exact).norm() / exact.norm())
    assert error < plain / 3


def test_conjugate_gradients_agree() -> None:
    kernel, u = EnsembleKernel(["a"]), features()
    right, noise = torch.randn(90, 2, dtype=torch.float64), torch.full((90,), 0.1, dtype=torch.float64)
    exact, iterative = CholeskySolver(), CGSolver()
    for solver in (exact, iterative):
        solver.fit(kernel, u, noise, right)
    torch.testing.assert_close(iterative.coefficients, exact.coefficients, atol=1e-3, rtol=0)
    torch.testing.assert_close(iterative.variance(kernel, u), exact.variance(kernel, u), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="4 or fewer"):
        iterative.fit(kernel, u, noise, torch.zeros(90, 5, dtype=torch.float64))
    with pytest.raises(UserError, match="leave-one-out"):
        iterative.precision_diagonal()
    with pytest.raises(UserError, match="marginal likelihood"):
        iterative.log_determinant()


def test_pivots_are_the_greedy_conditional_variances() -> None:
    kernel, u = EnsembleKernel(["a"]), features(25)
    k = kernel(u, u).detach()
    expected: list[int] = []
    for _ in range(6):
        left = k.diagonal().clone()
        if expected:
            cross = k[:, expected]
            inner = k[expected][:, expected] + 0.1 * torch.eye(len(expected))
            left = left - (cross @ torch.linalg.inv(inner) * cross).sum(1)
        left[expected] = -1
        expected.append(int(left.argmax()))
    assert pivoted_cholesky(k.diagonal(), lambda i: k[:, i], 6, noise=0.1) == expected


def test_equal_images_need_jitter_and_a_hopeless_matrix_says_so() -> None:
    kernel, u = EnsembleKernel(["a"]), features(20, torch.float32)
    twice = {"a": torch.cat([u["a"], u["a"]])}
    solver = CholeskySolver()
    solver.fit(kernel, twice, torch.zeros(40), torch.ones(40, 2))
    assert solver.jitter > 0 and torch.isfinite(solver.coefficients).all()
    with pytest.raises(NumericalError, match="smallest eigenvalue about -"):
        solver.fit(kernel, twice, torch.full((40,), -0.2), torch.ones(40, 2))


def test_auto_and_the_errors_of_a_choice() -> None:
    linear, rbf = EnsembleKernel(["a"], "linear"), EnsembleKernel(["a"])
    size = {"dimensions": 50, "classes": 10, "dtype": torch.float32}

    def name(kernel: EnsembleKernel, rows: int) -> str:
        return type(make_solver("auto", kernel, rows=rows, max_memory=1e3, **size)).__name__

    assert name(rbf, 100) == name(linear, 40) == "CholeskySolver"
    assert name(linear, 100) == "PrimalSolver" and name(rbf, 40_000) == "NystromSolver"
    with pytest.raises(OutOfMemoryError, match=r"needs about .* GiB for 20000 rows, 0.50 GiB") as caught:
        make_solver("cholesky", rbf, rows=20_000, max_memory=0.5, **size)
    assert isinstance(caught.value, MemoryError) and "nystrom" in str(caught.value)
    with pytest.raises(UserError, match="linear"):
        make_solver("primal", rbf, rows=10, **size)
    with pytest.raises(UserError, match="expected one of"):
        make_solver("lu", rbf, rows=10, **size)
