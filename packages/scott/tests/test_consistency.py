"""Consistency functions, sampling and the adversary, against diffusers and closed forms."""

import itertools

import pytest
import torch
from scott import GaussianMixture, NoiseSchedule, SDESolver, multistep, sampling_times
from scott.adversary import hinge_discriminator, hinge_generator, r1_penalty
from scott.conditioners import guidance_embedding
from scott.consistency import (
    boundary_scalings,
    consistency_function,
    distance,
    guided,
    loss_weight,
    stochastic_target,
    training_times,
    update_average,
)
from tenfold_shared.errors import UserError


def lcm_scheduler():
    from diffusers import LCMScheduler

    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def test_boundary_scalings_are_those_of_lcm():
    scheduler = lcm_scheduler()
    for t in (0, 1, 19, 999):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        ours = boundary_scalings(torch.tensor(t))
        assert float(ours[0]) == pytest.approx(skip) and float(ours[1]) == pytest.approx(out)
    f = consistency_function(lambda z, t: 7 * torch.ones_like(z))
    z = torch.randn(3, 2)
    assert torch.equal(f(z, torch.zeros(3, dtype=torch.long)), z)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 50])
def test_sampling_times_are_those_of_lcm(steps):
    scheduler = lcm_scheduler()
    scheduler.set_timesteps(steps)
    assert sampling_times(steps) == scheduler.timesteps.tolist()


def test_multistep_is_lcm_scheduler_step_by_step():
    scheduler = lcm_scheduler()
    scheduler.set_timesteps(4)
    schedule = NoiseSchedule.from_scheduler(scheduler)

    def network(z, t):
        return torch.tanh(z * 0.7) * (1 + t.float().view(-1, 1, 1, 1) / 1000)

    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z, generator = noise, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        result = scheduler.step(network(z, t.expand(3)), t, z, generator=generator)
        z = result.prev_sample
    f = consistency_function(lambda z, t: schedule.predict_x0(network(z, t), z, t))
    ours = multistep(f, noise, steps=4, schedule=schedule, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(ours, result.denoised, atol=1e-4)


def test_training_times():
    t_n, t_m = training_times(4000, timesteps=1000, skip=24, generator=torch.Generator().manual_seed(0))
    assert set(t_n.tolist()) == set(range(19, 1000, 20))
    assert torch.equal(t_m, (t_n - 24).clamp(min=0)) and int(t_m.min()) == 0
    t_n, _ = training_times(20000, timesteps=1000, skip=24, grid=None, generator=torch.Generator().manual_seed(0))
    assert int(t_n.min()) == 1 and int(t_n.max()) == 999


def test_guidance():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.allclose(guided(a, b, 1.0), a) and torch.allclose(guided(a, b, 0.0), b)
    assert torch.allclose(guided(a, b, torch.tensor([1.0, 0.0])), torch.stack([a[0], b[1]]))


def test_guidance_embedding_is_that_of_the_pipelines(sd):
    w = torch.tensor([1.0, 4.5, 7.5])
    assert torch.allclose(
        guidance_embedding(w, 64), sd.get_guidance_scale_embedding(w - 1, embedding_dim=64), atol=1e-5
    )


def test_the_target_carries_no_gradient_and_averages_draws(schedule):
    z, generator = torch.randn(4, 2), torch.Generator().manual_seed(0)
    t_n, t_m = torch.full((4,), 500), torch.full((4,), 476)
    weight = torch.ones((), requires_grad=True)
    settings = {"t_n": t_n, "t_m": t_m, "teacher": lambda z, t: weight * z * 0.2, "target": lambda z, t: weight * z}
    solver = SDESolver(schedule, noise="sde")
    one = stochastic_target(solver, z, generator=generator, **settings)
    assert not one.requires_grad
    mean = solver.step(z, t_n, t_m, 0.2 * z, noise=torch.zeros(4, 2))
    many = stochastic_target(solver, z, draws=1000, generator=generator, **settings)
    assert float((many - mean).abs().max()) < 0.04 < float((one - mean).abs().max())
    noise_free = stochastic_target(SDESolver(schedule, "ode"), z, draws=3, **settings)
    assert torch.allclose(noise_free, stochastic_target(SDESolver(schedule, "ode"), z, **settings), atol=1e-6)


def test_the_target_is_the_average_at_t_m_of_the_solved_state(schedule):
    """With h = 3 and no noise, by hand: three DDIM steps of the teacher, then f at t_m and nowhere else."""
    z, (t_n, t_m) = torch.randn(2, 2), (torch.tensor([500, 19]), torch.tensor([476, 0]))
    called = []

    def f(z, t):
        called.append(t)
        return 3 * z + t[:, None]

    target = stochastic_target(
        SDESolver(schedule, "ode", substeps=3), z, t_n=t_n, t_m=t_m, teacher=lambda z, t: z / 5, target=f
    )
    assert len(called) == 1 and torch.equal(called[0], t_m)
    alpha, sigma = schedule.alpha(torch.arange(1000)), schedule.sigma(torch.arange(1000))
    for i, grid in enumerate([(500, 492, 484, 476), (19, 13, 6, 0)]):
        end = z[i].double()
        for t, s in itertools.pairwise(grid):
            end = alpha[s] * end / 5 + sigma[s] * (end - alpha[t] * end / 5) / sigma[t]
        assert torch.allclose(target[i].double(), 3 * end + grid[-1], atol=1e-5)


def test_full_noise_makes_the_posterior_mean_a_fixed_point(schedule):
    """E[ x̂(z_s, s) | z_t ] = x̂(z_t, t) over the full SDE: the student would gain nothing (martingale)."""
    mixture = GaussianMixture(schedule)
    z, n = torch.tensor([[0.9, 0.3]]), 4000
    t, s = torch.full((n,), 500), torch.full((n,), 300)
    many = z.expand(n, 2)
    end = SDESolver(schedule, noise="sde", substeps=40).solve(
        many, t, s, mixture.x0, generator=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(mixture.x0(end, s).mean(0), mixture.x0(z, t[:1])[0], atol=0.04)
    ode = SDESolver(schedule, "ode", substeps=40).solve(many[:1], t[:1], s[:1], mixture.x0)
    assert not torch.allclose(mixture.x0(ode, s[:1])[0], mixture.x0(z, t[:1])[0], atol=0.1)


def test_the_exact_denoiser_is_bayes_by_monte_carlo(schedule):
    mixture = GaussianMixture(schedule)
    x, label = mixture.sample(400_000, generator=torch.Generator().manual_seed(0))
    t, z = torch.tensor([600]), torch.tensor([[0.4, -0.2]])
    a, s = schedule.alpha(t).float(), schedule.sigma(t).float()
    for of_class in (None, 2):
        rows = x if of_class is None else x[label == of_class]
        weight = (-((z - a * rows) ** 2).sum(1) / (2 * s**2)).softmax(0)
        ours = mixture.x0(z, t, None if of_class is None else torch.tensor([of_class]))
        assert torch.allclose(ours[0], (weight[:, None] * rows).sum(0), atol=0.01)
    assert mixture.far(mixture.means) == 0.0 and mixture.far(mixture.means + 0.4) > 0.5


def test_losses():
    a, b = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    assert torch.allclose(distance(a, b, "l2"), ((a - b) ** 2).flatten(1).mean(1))
    assert torch.allclose(distance(a, b, "huber", huber_c=0.1), (((a - b) ** 2 + 0.01).sqrt() - 0.1).flatten(1).mean(1))
    assert distance(a, b, dims=2).shape == (3, 4) and bool((distance(a, a, "huber") == 0).all())
    schedule = NoiseSchedule.stable_diffusion()
    weight = loss_weight(schedule, torch.tensor([0, 500, 999]), "min-snr")
    assert float(weight[0]) == 1.0 and float(weight[0]) > float(weight[1]) > float(weight[2])
    average, current = [torch.ones(2)], [torch.zeros(2)]
    update_average(average, current, 0.95)
    assert torch.allclose(average[0], torch.full((2,), 0.95))


def test_hinge():
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_discriminator(real, fake).tolist() == [0.0, 2.0, 4.0]
    assert hinge_generator(fake).tolist() == [2.0, 0.0, -1.0]
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.allclose(r1_penalty((x * torch.tensor([3.0, 4.0])).sum(1), x), torch.full((3,), 12.5))


def test_errors(schedule):
    with pytest.raises(UserError, match="loss 'l1' is unknown"):
        distance(torch.zeros(1, 2), torch.zeros(1, 2), "l1")
    with pytest.raises(UserError, match="weighting 'p2'"):
        loss_weight(schedule, torch.tensor([1]), "p2")
    with pytest.raises(UserError, match="0 sampling steps"):
        sampling_times(0)
    with pytest.raises(UserError, match="5 modes in 2 classes"):
        GaussianMixture(schedule, modes=5, classes=2)
