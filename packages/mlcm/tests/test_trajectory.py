import diffusers
import pytest
import torch
from mlcm import Condition, NoiseSchedule, TeacherTrajectory, TrajectoryBank, milestones
from mlcm.mixture import GaussianMixture
from tenfold_shared.errors import UserError

MIXTURE = GaussianMixture.rings()
SCHEDULE = MIXTURE.schedule


def draw(count: int, seed: int = 0) -> tuple[torch.Tensor, Condition]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=generator), MIXTURE.condition(
        torch.randint(0, 4, (count,), generator=generator)
    )


def noise_of(x0: torch.Tensor, z: torch.Tensor, t: int) -> torch.Tensor:
    at = torch.full((len(z),), t)
    return (z - SCHEDULE.alpha(at, z) * x0) / SCHEDULE.sigma(at, z)


@pytest.mark.parametrize(("steps", "t", "w"), [(500, 0, 1.0), (500, 0, 3.0), (7, 124, 2.0)])
def test_multi_step_denoising_is_the_ddim_of_diffusers(steps, t, w):
    z, condition = draw(64)
    trajectory = TeacherTrajectory(MIXTURE, SCHEDULE, guidance_scale=w)
    ours = trajectory.states(z, torch.full((64,), t), condition, steps=steps)
    times = trajectory.grid(torch.tensor([999]), torch.tensor([t]), steps)[0].unique().flip(0)
    ddim = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    state = z
    for now, following in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        # Explicit times: DDIMScheduler walks back by num_train_timesteps // num_inference_steps.
        ddim.num_inference_steps = 1000 // (now - following)
        assert 1000 // ddim.num_inference_steps == now - following
        x0 = MIXTURE(state, torch.full((64,), now), condition, w)
        state = ddim.step(noise_of(x0, state, now), now, state, eta=0.0).prev_sample
    torch.testing.assert_close(ours, state, rtol=1e-5, atol=1e-5)


def test_second_order_solver_is_the_one_of_diffusers():
    z, condition = draw(32)
    trajectory = TeacherTrajectory(MIXTURE, SCHEDULE, guidance_scale=2.0, solver="dpm++")
    times = trajectory.grid(torch.tensor([999]), torch.tensor([200]), 4)[0].tolist()
    solver = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver_order=2, prediction_type="sample",
        lower_order_final=False, final_sigmas_type="sigma_min", thresholding=False,
    )  # fmt: skip
    solver.set_timesteps(timesteps=times)
    state = z
    for t in times[:-1]:
        x0 = MIXTURE(state, torch.full((32,), t), condition, 2.0)
        state = solver.step(x0, t, state).prev_sample
    ours = trajectory.solve(z, torch.full((32,), 999), torch.full((32,), 200), condition, steps=4)
    torch.testing.assert_close(ours, state, rtol=0, atol=1e-3)


def test_second_order_is_nearer_to_the_flow_than_first_order():
    z, condition = draw(256)
    t = torch.full((256,), 200)
    exact = TeacherTrajectory(MIXTURE, SCHEDULE, guidance_scale=1.0).states(z, t, condition, steps=400)
    apart = {
        solver: (TeacherTrajectory(MIXTURE, SCHEDULE, guidance_scale=1.0, solver=solver).states(z, t, condition, steps=20) - exact)
        .square().mean().item()
        for solver in ("ddim", "dpm++")
    }  # fmt: skip
    assert apart["dpm++"] < apart["ddim"]


@pytest.mark.parametrize("flow", [False, True])
def test_one_gaussian_has_a_linear_flow(flow):
    """Variance 1 under a variance-preserving schedule: x̂ = alpha z, and the flow does not move."""
    schedule = NoiseSchedule.flow() if flow else SCHEDULE

    def teacher(z, t, condition, w):
        alpha, sigma = schedule.alpha(t, z), schedule.sigma(t, z)
        return alpha / (alpha**2 + sigma**2) * z

    z, t = draw(16)[0], torch.zeros(16, dtype=torch.long)
    end = TeacherTrajectory(teacher, schedule).states(z, t, Condition(), steps=900)
    # The exact flow scales by the ratio of the standard deviations, which are 1 at both ends.
    torch.testing.assert_close(end, z, rtol=0, atol=5e-3)


def test_a_row_does_not_depend_on_its_batch():
    z, condition = draw(12)
    t = torch.tensor([999, 900, 640, 500, 374, 373, 124, 60, 2, 1, 0, 250])
    trajectory = TeacherTrajectory(MIXTURE, SCHEDULE, guidance_scale=3.0)
    together = trajectory.states(z, t, condition)
    for i in range(12):
        one = torch.tensor([i])
        torch.testing.assert_close(trajectory.states(z[one], t[one], condition.rows(one)), together[one])
    assert torch.equal(together[0], z[0])


def test_steps_grow_towards_the_clean_end():
    trajectory = TeacherTrajectory(MIXTURE, SCHEDULE)
    assert trajectory.steps(torch.tensor([999, 875, 874, 500, 124, 0])).tolist() == [1, 1, 2, 4, 8, 8]
    grid = trajectory.grid(torch.tensor([999, 999]), torch.tensor([997, 0]), torch.tensor([8, 3]))
    assert grid[0].unique().tolist() == [997, 998, 999] and grid[1].tolist()[:4] == [999, 666, 333, 0]
    assert int(grid[1, -1]) == 0


def test_guidance_is_affine_and_scale_one_is_none():
    z, condition = draw(8)
    t = torch.full((8,), 400)
    x1, x3 = MIXTURE(z, t, condition, 1.0), MIXTURE(z, t, condition, 3.0)
    x0 = MIXTURE(z, t, condition, 0.0)
    torch.testing.assert_close(x3, x0 + 3 * (x1 - x0), rtol=1e-4, atol=1e-4)
    unconditional = MIXTURE.x0(z, t, MIXTURE.condition(torch.full((8,), 4)))
    torch.testing.assert_close(x0, unconditional)


def test_the_teacher_is_the_posterior_mean():
    """Against a long Monte-Carlo average over the mixture's own points."""
    generator = torch.Generator().manual_seed(0)
    x, _ = MIXTURE.sample(400_000, generator)
    z, t = torch.tensor([[0.3, 0.4]]), torch.tensor([700])
    alpha, sigma = SCHEDULE.alphas[700], SCHEDULE.sigmas[700]
    weight = (-(z - alpha * x).square().sum(1) / (2 * sigma**2)).softmax(0)
    torch.testing.assert_close(
        MIXTURE.x0(z, t, MIXTURE.condition(torch.tensor([4]))), (weight[:, None] * x).sum(0)[None], rtol=0, atol=0.01
    )


def test_the_mixture_is_the_one_described():
    """16 modes, every fourth of a class: a class has one radius, and its modes lie a quarter turn apart."""
    assert len(MIXTURE.means) == 16 and MIXTURE.classes == 4 and float(MIXTURE.class_weights.sum()) == pytest.approx(1)
    for label, radius in enumerate((1.4, 0.77, 1.4, 0.77)):
        own = MIXTURE.means[MIXTURE.labels == label]
        torch.testing.assert_close(own.norm(dim=1), torch.full((4,), radius))
        torch.testing.assert_close(own.sum(0), torch.zeros(2), rtol=0, atol=1e-6)
    x, labels = MIXTURE.sample(5000, torch.Generator().manual_seed(0))
    assert MIXTURE.far(x) < 0.01 and MIXTURE.far(x + 0.4) > 0.5
    shares = torch.bincount(labels, minlength=4) / 5000
    torch.testing.assert_close(shares, MIXTURE.class_weights, rtol=0, atol=0.03)


def bank() -> TrajectoryBank:
    z, condition = draw(10)
    trajectory = TeacherTrajectory(MIXTURE, SCHEDULE, guidance_scale=2.0)
    index = condition.given["class_labels"]
    return TrajectoryBank.compute(trajectory, iter([(z, index, condition)]), milestones(8))


def test_bank_holds_the_trajectory_and_comes_back_from_disk(tmp_path):
    z, condition = draw(10)
    found = bank()
    assert found.states.shape == (10, 9, 2) and torch.equal(found.states[:, 0], z)
    trajectory = TeacherTrajectory(MIXTURE, SCHEDULE, guidance_scale=2.0)
    first = trajectory.solve(z, torch.full((10,), 999), torch.full((10,), 874), condition)
    torch.testing.assert_close(found.states[:, 1], first)
    found.save(tmp_path / "bank", shard=4)
    again = TrajectoryBank.load(tmp_path / "bank")
    assert torch.equal(again.states, found.states) and torch.equal(again.prompts, found.prompts)
    assert again.milestones == found.milestones


def test_bank_gives_the_state_at_or_above_a_time():
    found = bank()
    states, at = found.above(torch.tensor([0, 1, 2]), torch.tensor([999, 874, 873]))
    assert at.tolist() == [999, 874, 874] and torch.equal(states[2], found.states[2, 1])


def test_damaged_banks(tmp_path):
    with pytest.raises(UserError, match="not a trajectory bank"):
        TrajectoryBank.load(tmp_path)
    bank().save(tmp_path / "bank")
    shard = tmp_path / "bank" / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50])
    with pytest.raises(UserError, match="not a trajectory bank"):
        TrajectoryBank.load(tmp_path / "bank")
    broken = bank()
    broken.states[3, 2, 0] = float("nan")
    broken.save(tmp_path / "nan")
    with pytest.raises(UserError, match="not finite"):
        TrajectoryBank.load(tmp_path / "nan")


def test_unknown_solver():
    with pytest.raises(UserError, match="solver is 'euler'"):
        TeacherTrajectory(MIXTURE, SCHEDULE, solver="euler")
