import gpytorch
import numpy as np
import pytest
import torch
from gp_ensemble.errors import UserError
from gp_ensemble.features import Features, Normaliser
from gp_ensemble.gp import SharedKernelGP, one_hot
from gp_ensemble.kernels import EnsembleKernel, rows
from gp_ensemble.means import LogitsMean
from gp_ensemble.solvers import NystromSolver, PrimalSolver
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Kernel
from sklearn.kernel_ridge import KernelRidge

N, C = 40, 5


class World:
    """A conditioned process with awkward hyper-parameters, and test images."""

    def __init__(self, kernel: str = "rbf", n: int = N):
        generator = torch.Generator().manual_seed(0)
        raw = {name: torch.randn(n + 11, d, generator=generator) for name, d in (("a", 6), ("b", 8))}
        _, self.every = Normaliser.fit(raw, dtype=torch.float64)
        self.x, self.x_test = rows(self.every, slice(0, n)), rows(self.every, slice(n, None))
        self.z = torch.randn(n + 11, C, generator=generator).double()
        self.y = one_hot(torch.randint(0, C, (n,), generator=generator), C, torch.float64)
        self.gp = SharedKernelGP(EnsembleKernel(["a", "b"], kernel), LogitsMean(2.0))
        with torch.no_grad():
            self.gp.kernel.log_weight += torch.tensor([0.4, -0.7])
            for i, k in enumerate(self.gp.kernel.kernels):
                if hasattr(k, "log_beta"):
                    k.log_beta += 0.3 * (i + 1)
        self.gp.condition(self.x, self.y, prior_logits=self.z[:n])

    @property
    def z_test(self) -> torch.Tensor:
        return self.z[-11:]

    def matrix(self, a: Features, b: Features) -> torch.Tensor:
        return self.gp.kernel(a, b).detach()


@pytest.mark.parametrize("kernel", ["rbf", "matern52", "linear"])
def test_posterior_and_likelihood_are_gpytorchs(kernel: str) -> None:
    world = World(kernel)
    ours = world.gp.posterior(world.x_test, prior_logits=world.z_test)
    inputs = world.gp.gpytorch_inputs(world.x_test, world.z_test)
    total = 0.0
    with gpytorch.settings.max_cholesky_size(10**6), torch.no_grad():
        for c, model in enumerate(world.gp.to_gpytorch()):
            theirs = model(inputs[c])
            torch.testing.assert_close(ours.mean[:, c], theirs.mean, atol=1e-8, rtol=0)
            torch.testing.assert_close(ours.variance, theirs.variance, atol=1e-8, rtol=0)
            model.train()
            evidence = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
            total += float(evidence(model(*model.train_inputs), model.train_targets)) * N
    assert world.gp.log_marginal_likelihood() == pytest.approx(total, abs=1e-6)


class _Columns(Kernel):
    """A scikit-learn kernel on some columns."""

    def __init__(self, kernel: Kernel, start: int, stop: int):
        self.kernel, self.start, self.stop = kernel, start, stop

    def __call__(self, X, Y=None, eval_gradient=False):
        return self.kernel(X[:, self.start : self.stop], None if Y is None else Y[:, self.start : self.stop])

    def diag(self, X):
        return self.kernel.diag(X[:, self.start : self.stop])

    def is_stationary(self) -> bool:
        return True


def test_posterior_is_scikit_learns() -> None:
    world = World()
    weights, betas = world.gp.kernel.weights.detach(), [float(k.beta.detach()) for k in world.gp.kernel.kernels]
    kernel = _Columns(ConstantKernel(float(weights[0])) * RBF(betas[0] ** -0.5), 0, 6) + _Columns(
        ConstantKernel(float(weights[1])) * RBF(betas[1] ** -0.5), 6, 14
    )
    side_by_side = torch.cat([world.every["a"], world.every["b"]], 1).numpy()
    residual = world.y - world.gp.prior_mean(world.x, world.z[:N])
    theirs = GaussianProcessRegressor(kernel, alpha=world.gp.noise, optimizer=None)
    theirs.fit(side_by_side[:N], residual.numpy())
    mean, deviation = theirs.predict(side_by_side[N:], return_std=True)
    ours = world.gp.posterior(world.x_test, prior_logits=world.z_test)
    np.testing.assert_allclose(
        ours.mean.numpy() - world.gp.prior_mean(world.x_test, world.z_test).numpy(), mean, atol=1e-8
    )
    np.testing.assert_allclose(ours.variance.numpy(), deviation[:, 0] ** 2, atol=1e-8)


def test_mean_is_kernel_ridge_on_the_residual_of_the_zero_shot_function() -> None:
    world = World()
    ridge = KernelRidge(alpha=world.gp.noise, kernel="precomputed")
    ridge.fit(world.matrix(world.x, world.x), world.y - world.gp.prior_mean(world.x, world.z[:N]))
    expected = world.gp.prior_mean(world.x_test, world.z_test).numpy() + ridge.predict(
        world.matrix(world.x_test, world.x)
    )
    got = world.gp.posterior(world.x_test, prior_logits=world.z_test).mean
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-8)


def test_leave_one_out_is_as_many_refits() -> None:
    world = World()
    loo = world.gp.leave_one_out()
    for j in range(N):
        keep = torch.arange(N) != j
        refit = SharedKernelGP(world.gp.kernel, world.gp.mean)
        refit.condition(rows(world.x, keep), world.y[keep], prior_logits=world.z[:N][keep])
        left = refit.posterior(rows(world.x, [j]), prior_logits=world.z[j : j + 1])
        torch.testing.assert_close(loo.mean[j], left.mean[0], atol=1e-8, rtol=0)
        torch.testing.assert_close(loo.variance[j], left.variance[0] + left.noise, atol=1e-8, rtol=0)


def test_leave_group_out_is_a_refit_without_the_group() -> None:
    world = World()
    group = torch.tensor([3, 17, 4])
    keep = torch.ones(N, dtype=torch.bool)
    keep[group] = False
    refit = SharedKernelGP(world.gp.kernel, world.gp.mean)
    refit.condition(rows(world.x, keep), world.y[keep], prior_logits=world.z[:N][keep])
    expected = refit.posterior(rows(world.x, group), prior_logits=world.z[group])
    got = world.gp.leave_group_out(group)
    torch.testing.assert_close(got.mean, expected.mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(got.variance, expected.variance + expected.noise, atol=1e-8, rtol=0)


def test_without_noise_it_interpolates_and_far_away_it_returns_to_the_prior() -> None:
    world = World()
    with torch.no_grad():
        world.gp.log_noise.fill_(-25.0)
        for kernel in world.gp.kernel.kernels:
            kernel.log_beta.fill_(3.0)
    world.gp.condition(world.x, world.y, prior_logits=world.z[:N])
    seen = world.gp.posterior(world.x, prior_logits=world.z[:N])
    torch.testing.assert_close(seen.mean, world.y, atol=1e-6, rtol=0)
    assert float(seen.variance.max()) < 1e-6
    with torch.no_grad():
        for kernel in world.gp.kernel.kernels:
            kernel.log_beta.fill_(8.0)
    world.gp.condition(world.x, world.y, prior_logits=world.z[:N])
    far = world.gp.posterior({name: -v for name, v in rows(world.x, slice(0, 1)).items()}, prior_logits=world.z[:1])
    torch.testing.assert_close(far.mean, world.gp.prior_mean(rows(world.x, [0]), world.z[:1]), atol=1e-6, rtol=0)
    assert float(far.variance) == pytest.approx(world.gp.kernel.weights.sum().item(), abs=1e-6)


def test_rows_of_the_posterior_mean_sum_to_one() -> None:
    world = World()
    total = world.gp.posterior(world.x_test, prior_logits=world.z_test).mean.sum(1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_contributions_sum_to_the_mean() -> None:
    world = World()
    parts = world.gp.contributions(world.x_test, prior_logits=world.z_test)
    assert list(parts) == ["prior", "a", "b"]
    expected = world.gp.posterior(world.x_test, prior_logits=world.z_test).mean
    torch.testing.assert_close(sum(parts.values()), expected, atol=1e-10, rtol=0)


def test_adding_and_forgetting_are_refits() -> None:
    world = World()
    early = SharedKernelGP(world.gp.kernel, world.gp.mean)
    early.condition(rows(world.x, slice(0, 25)), world.y[:25], prior_logits=world.z[:25])
    early.add(rows(world.x, slice(25, N)), world.y[25:], prior_logits=world.z[25:N])
    expected = world.gp.posterior(world.x_test, prior_logits=world.z_test)
    got = early.posterior(world.x_test, prior_logits=world.z_test)
    torch.testing.assert_close(got.mean, expected.mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(got.variance, expected.variance, atol=1e-8, rtol=0)
    early.forget(torch.arange(N) < 25)
    fresh = SharedKernelGP(world.gp.kernel, world.gp.mean)
    fresh.condition(rows(world.x, slice(0, 25)), world.y[:25], prior_logits=world.z[:25])
    a, b = (gp.posterior(world.x_test, prior_logits=world.z_test) for gp in (early, fresh))
    torch.testing.assert_close(a.mean, b.mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(a.variance, b.variance, atol=1e-8, rtol=0)


def test_noise_scale_of_a_row_is_as_many_equal_observations() -> None:
    world = World()
    twice = {name: torch.cat([v, v[:1]]) for name, v in world.x.items()}
    double = SharedKernelGP(world.gp.kernel, world.gp.mean)
    double.condition(twice, torch.cat([world.y, world.y[:1]]), prior_logits=torch.cat([world.z[:N], world.z[:1]]))
    scale = torch.ones(N)
    scale[0] = 0.5
    scaled = SharedKernelGP(world.gp.kernel, world.gp.mean)
    scaled.condition(world.x, world.y, prior_logits=world.z[:N], noise_scale=scale)
    a, b = (gp.posterior(world.x_test, prior_logits=world.z_test) for gp in (double, scaled))
    torch.testing.assert_close(a.mean, b.mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(a.variance, b.variance, atol=1e-8, rtol=0)


def test_a_users_gpytorch_kernel_takes_part() -> None:
    world = World()
    native = gpytorch.kernels.RBFKernel().double()
    native.lengthscale = torch.tensor(0.8, dtype=torch.float64)
    a = SharedKernelGP(EnsembleKernel(["a", "b"], native)).condition(world.x, world.y)
    b = SharedKernelGP(EnsembleKernel(["a", "b"], "rbf"))
    with torch.no_grad():
        for kernel in b.kernel.kernels:
            kernel.log_beta.fill_(float(np.log(0.8**-2)))
    b.condition(world.x, world.y)
    torch.testing.assert_close(a.posterior(world.x_test).mean, b.posterior(world.x_test).mean, atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", ["primal", "nystrom"])
def test_weight_space_is_the_same_process(solver: str) -> None:
    """Primal is exact for a linear kernel; Nystrom with all rows as inducing rows is exact for any."""
    world = World("linear" if solver == "primal" else "rbf")
    other = SharedKernelGP(world.gp.kernel, world.gp.mean)
    chosen = PrimalSolver() if solver == "primal" else NystromSolver(N)
    other.condition(world.x, world.y, prior_logits=world.z[:N], solver=chosen)
    a, b = (gp.posterior(world.x_test, prior_logits=world.z_test) for gp in (world.gp, other))
    torch.testing.assert_close(a.mean, b.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(a.variance, b.variance, atol=1e-6, rtol=0)
    a, b = world.gp.leave_one_out(), other.leave_one_out()
    torch.testing.assert_close(a.mean, b.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(a.variance, b.variance, atol=1e-6, rtol=0)
    assert other.log_marginal_likelihood() == pytest.approx(world.gp.log_marginal_likelihood(), abs=1e-3)
    parts = other.contributions(world.x_test, prior_logits=world.z_test)
    torch.testing.assert_close(
        sum(parts.values()), other.posterior(world.x_test, prior_logits=world.z_test).mean, atol=1e-8, rtol=0
    )


def test_posterior_covariance_has_the_variance_on_its_diagonal() -> None:
    world = World()
    covariance = world.gp.covariance(world.x_test, world.x_test)
    variance = world.gp.posterior(world.x_test, prior_logits=world.z_test).variance
    torch.testing.assert_close(covariance.diagonal(), variance, atol=1e-10, rtol=0)


def test_groups_need_the_factor() -> None:
    world = World("linear")
    world.gp.condition(world.x, world.y, prior_logits=world.z[:N], solver=PrimalSolver())
    with pytest.raises(UserError, match="cholesky"):
        world.gp.leave_group_out(torch.tensor([0]))
