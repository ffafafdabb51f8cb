"""Identities of the r-family: diffusers' DDIM and TCD, the Gaussian posterior, marginals of the exact mixture."""

import pytest
import torch
from scott import GaussianMixture, NoiseFunction, NoiseSchedule, NoiseStrength, SDESolver
from scott.lab import choose_noise, marginal_error, solver_check
from scott.solvers import NOISE_FUNCTIONS
from tenfold_shared.errors import UserError


def scheduler(name, **kwargs):
    import diffusers

    return getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, **kwargs
    )


def state(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, 8, 8, generator=g) for _ in range(3)]


def times(*pairs):
    return torch.tensor([t for t, _ in pairs]), torch.tensor([s for _, s in pairs])


def test_the_schedule_is_that_of_stable_diffusion(schedule):
    assert torch.allclose(schedule.alphas_cumprod.float(), scheduler("DDIMScheduler").alphas_cumprod, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_predict_x0_inverts_add_noise(prediction):
    schedule = NoiseSchedule.stable_diffusion(prediction)
    x, noise, _ = state()
    t = torch.tensor([1, 20, 400, 800, 999])
    z = schedule.add_noise(x, noise, t)
    a, s = (v.float().view(-1, 1, 1, 1) for v in (schedule.alpha(t), schedule.sigma(t)))
    output = {"epsilon": noise, "v_prediction": a * noise - s * x, "sample": x}[prediction]
    assert torch.allclose(schedule.predict_x0(output, z, t), x, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.6, 1.0])
def test_ddim_of_diffusers(eta):
    theirs = scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    schedule = NoiseSchedule.from_scheduler(theirs)
    theirs.set_timesteps(40)
    kind = {"kind": "ode"} if eta == 0 else {"kind": "ddim-eta", "eta": eta}
    ours = SDESolver(schedule, **kind)
    z, output, noise = state()
    for i in (0, 7, 25, 38):
        t, s = int(theirs.timesteps[i]), int(theirs.timesteps[i + 1])
        expected = theirs.step(output, t, z, eta=eta, variance_noise=noise if eta else None).prev_sample
        t_b, s_b = torch.full((5,), t), torch.full((5,), s)
        got = ours.step(z, t_b, s_b, schedule.predict_x0(output, z, t_b), noise=noise)
        assert torch.allclose(got, expected, atol=2e-5), (t, s)


def test_ddim_eta_zero_is_the_ode_and_eta_one_the_full_sde(schedule):
    t, s = times((999, 975), (500, 300), (24, 0), (10, -1))
    ode, zero = SDESolver(schedule, "ode"), SDESolver(schedule, "ddim-eta", eta=0.0)
    full, one = SDESolver(schedule, "er-sde", noise="sde"), SDESolver(schedule, "ddim-eta", eta=1.0)
    assert torch.allclose(ode.coefficient(t, s), zero.coefficient(t, s), atol=1e-12)
    assert torch.allclose(full.coefficient(t, s), one.coefficient(t, s), atol=1e-12)
    assert torch.allclose(SDESolver(schedule, noise="ode").coefficient(t, s), ode.coefficient(t, s), atol=1e-12)


def test_the_full_sde_has_mean_and_variance_of_the_posterior(schedule):
    """q(z_s | z_t, x0) of the forward process, written out."""
    t, s = times((999, 900), (500, 20), (40, 3))
    bar_t, bar_s = schedule.alphas_cumprod[t], schedule.alphas_cumprod[s]
    step = bar_t / bar_s
    variance = (1 - bar_s) / (1 - bar_t) * (1 - step)
    from_x0, from_z = bar_s.sqrt() * (1 - step) / (1 - bar_t), step.sqrt() * (1 - bar_s) / (1 - bar_t)
    solver = SDESolver(schedule, "er-sde", noise="sde")
    z, x0 = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    mean = solver.step(z, t, s, x0, noise=torch.zeros(3, 2, dtype=torch.float64))
    assert torch.allclose(mean, from_x0[:, None] * x0 + from_z[:, None] * z, atol=1e-12)
    assert torch.allclose(solver.fresh_noise(t, s) ** 2, variance, atol=1e-12)
    moved = solver.step(z, t, s, x0, noise=torch.ones(3, 2, dtype=torch.float64)) - mean
    assert torch.allclose(moved, variance.sqrt()[:, None].expand(3, 2), atol=1e-12)


@pytest.mark.parametrize("noise", NOISE_FUNCTIONS)
def test_one_step_keeps_the_marginal_when_x0_is_known(schedule, noise):
    """With x̂ = x the mean of z_s is α_s x and its variance σ_s², whatever the noise function."""
    t, s = times((999, 700), (300, 20), (30, 5))
    solver = SDESolver(schedule, "er-sde", noise=noise)
    r = solver.coefficient(t, s)
    variance = (schedule.alpha(s) * r * schedule.lam(t)) ** 2 + solver.fresh_noise(t, s) ** 2
    assert torch.allclose(variance, schedule.sigma(s) ** 2, atol=1e-10)
    assert bool((r >= 0).all()) and bool((r <= schedule.lam(s) / schedule.lam(t) + 1e-12).all())


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_gamma_sampling_of_diffusers(eta):
    theirs = scheduler("TCDScheduler")
    schedule = NoiseSchedule.from_scheduler(theirs)
    theirs.set_timesteps(4)
    z, output, _ = state()
    t, s = int(theirs.timesteps[1]), int(theirs.timesteps[2])
    expected = theirs.step(output, t, z, eta=eta, generator=torch.Generator().manual_seed(5)).prev_sample \
        if theirs._init_step_index(t) is None else None  # fmt: skip
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    t_b, s_b = torch.full((5,), t), torch.full((5,), s)
    got = SDESolver(schedule, "gamma", eta=eta).step(z, t_b, s_b, schedule.predict_x0(output, z, t_b), noise=noise)
    assert torch.allclose(got, expected, atol=2e-5)


def test_renoising_forgets_z(schedule):
    solver, (z, x0, noise) = SDESolver(schedule, "renoise"), state()
    t, s = torch.full((5,), 700), torch.full((5,), 400)
    assert torch.allclose(solver.step(z, t, s, x0, noise=noise), schedule.add_noise(x0, noise, s), atol=1e-6)


@pytest.mark.parametrize("noise", NOISE_FUNCTIONS)
def test_a_thousand_substeps_reproduce_the_mixture(schedule, noise):
    """Bar B6: at most 1.3 times the distance between two draws of the data, both averaged over many pairs."""
    solver = SDESolver(schedule, noise=noise, substeps=1000)
    error, floor = marginal_error(solver, GaussianMixture(schedule), n=250, pairs=32)
    assert error <= 1.3 * floor


def test_few_full_noise_steps_do_not_reproduce_the_mixture(schedule):
    error, floor = marginal_error(SDESolver(schedule, noise="sde", substeps=4), GaussianMixture(schedule), n=1000)
    assert error > 2.5 * floor


def test_the_probe_prefers_little_noise_at_few_steps(schedule):
    rows = {row.noise: row.error for row in solver_check(schedule, steps=[4], n=1000)}
    chosen = choose_noise(schedule, steps=4)
    assert rows[chosen] == min(rows.values()) and chosen in ("ode", "log", "sde5")
    assert rows["ode"] < rows["sde"] < rows["power2.5"] and rows["power2.5"] > 1.05 * rows[chosen]
    many = solver_check(schedule, noises=["ode"], steps=[64], n=1000)[0]
    assert many.error < 0.5 * rows["ode"] and many.floor < 0.5 * rows["ode"]


def test_noise_functions_are_those_of_the_solver_paper():
    """φ at λ = 1 and λ = 4, worked out by hand."""
    by_hand = {
        "ode": (1.0, 4.0), "sde": (1.0, 16.0), "power1.5": (1.0, 8.0), "power2.5": (1.0, 32.0),
        "log": (2.0043214, 3.4822022 * 2.9036325), "sde5": (12.7182818, 4 * (4.5526823 + 10)),
    }  # fmt: skip
    assert set(by_hand) == set(NOISE_FUNCTIONS)
    for name, values in by_hand.items():
        found = NOISE_FUNCTIONS[name](torch.tensor([1.0, 4.0], dtype=torch.float64))
        assert found.tolist() == pytest.approx(values, rel=1e-6), name


def test_batched_times_equal_single_ones(schedule):
    solver = SDESolver(schedule, substeps=3)
    z, _, _ = state()
    t_n, t_m = torch.tensor([999, 500, 123, 19, 2]), torch.tensor([975, 476, 99, 0, 0])
    mixing = lambda z, t: 0.3 * z  # noqa: E731
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    together = solver.solve(z, t_n, t_m, mixing, generator=generators)
    for i in range(5):
        alone = solver.solve(
            z[i : i + 1], t_n[i : i + 1], t_m[i : i + 1], mixing, generator=[torch.Generator().manual_seed(i)]
        )
        assert torch.equal(together[i : i + 1], alone)


def test_substeps_are_uniform_and_have_noise_of_their_own(schedule):
    solver = SDESolver(schedule, substeps=3)
    grid = list(solver.subtimes(torch.tensor([999]), torch.tensor([975])))
    assert [(int(t), int(s)) for t, s in grid] == [(999, 991), (991, 983), (983, 975)]
    drawn = []
    step = solver.step
    solver.step = lambda *a, **k: drawn.append(k["generator"].get_state()) or step(*a, **k)
    solver.solve(torch.zeros(1, 2), *times((999, 975)), lambda z, t: z, generator=torch.Generator().manual_seed(0))
    assert len(drawn) == 3 and not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_half_precision_latents_are_stepped_in_float32(schedule):
    solver, (z, x0, noise) = SDESolver(schedule), state()
    t, s = torch.full((5,), 30), torch.full((5,), 6)
    half = solver.step(z.bfloat16(), t, s, x0.bfloat16(), noise=noise)
    whole = solver.step(z.bfloat16().float(), t, s, x0.bfloat16().float(), noise=noise)
    assert half.dtype == torch.bfloat16 and torch.equal(half, whole.bfloat16())


@pytest.mark.parametrize("ramp", ["step", "linear", "cosine"])
def test_noise_strength_is_the_ode_above_and_the_sde_at_zero(schedule, ramp):
    strength = NoiseStrength(400, ramp)
    late, sde, ode = SDESolver(schedule, strength=strength), SDESolver(schedule), SDESolver(schedule, "ode")
    t, s = times((999, 975), (400, 376))
    assert torch.allclose(late.coefficient(t, s), ode.coefficient(t, s), atol=1e-12)
    t, s = times((300, 276), (100, 76), (5, 0))
    between = late.coefficient(t, s)
    assert bool((between <= ode.coefficient(t, s)).all()) and bool((between >= sde.coefficient(t, s) - 1e-12).all())
    if ramp == "step":
        assert torch.allclose(between, sde.coefficient(t, s), atol=1e-12)


def test_errors(schedule):
    with pytest.raises(UserError, match="noise strength of 2 to 2, expected 0 to 1"):
        SDESolver(schedule, strength=lambda t: 2 * torch.ones_like(t).double()).coefficient(*times((500, 476)))
    with pytest.raises(UserError, match="eta is 1\\.5"):
        SDESolver(schedule, "ddim-eta", eta=1.5)
    with pytest.raises(UserError, match="substeps is 0"):
        SDESolver(schedule, substeps=0)
    with pytest.raises(UserError, match="solver 'euler' is unknown"):
        SDESolver(schedule, "euler")
    with pytest.raises(UserError, match="noise function 'brown' is unknown"):
        SDESolver(schedule, noise="brown")
    with pytest.raises(UserError, match="falling"):
        SDESolver(schedule, noise=lambda lam: lam**0.5)
    with pytest.raises(UserError, match="not positive and increasing"):
        NoiseFunction("down", lambda lam: 1 / lam).check(schedule)
    with pytest.raises(UserError, match="belong together"):
        SDESolver(schedule, "custom")
    too_much = SDESolver(schedule, "custom", r=lambda t, s: schedule.lam(s) / schedule.lam(t) * 1.5)
    with pytest.raises(UserError, match="from t = 500 to s = 476"):
        too_much.step(torch.zeros(1, 2), *times((500, 476)), torch.zeros(1, 2))
    with pytest.raises(UserError, match="t_m is above t_n"):
        SDESolver(schedule).solve(torch.zeros(1, 2), *times((10, 20)), lambda z, t: z)
    with pytest.raises(UserError, match="ramp 'square'"):
        NoiseStrength(400, "square")
    with pytest.raises(UserError, match="below time step 0"):
        NoiseStrength(0)
    with pytest.raises(UserError, match="prediction type"):
        NoiseSchedule(schedule.alphas_cumprod, "score")
    with pytest.raises(UserError, match="must fall"):
        NoiseSchedule(torch.tensor([0.9, 0.5, 0.0]))


def test_a_custom_r_inside_the_bounds_is_used(schedule):
    half = SDESolver(schedule, "custom", r=lambda t, s: schedule.lam(s) / schedule.lam(t) / 2)
    t, s = times((500, 476))
    assert torch.allclose(half.coefficient(t, s), schedule.lam(s) / schedule.lam(t) / 2)
