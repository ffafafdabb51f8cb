import diffusers
import pytest
import torch
from mlcm import MLCMScheduler, NoiseSchedule, inference_times, milestones
from mlcm.schedule import CLEAN, check_milestones
from tenfold_shared.errors import UserError

SCHEDULE = NoiseSchedule.stable_diffusion()


def rows(*times: int) -> torch.Tensor:
    return torch.tensor(times)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_milestones_are_the_published_ones():
    assert milestones(8) == [999, 874, 749, 624, 499, 374, 249, 124, 0]
    assert milestones(4) == [999, 749, 499, 249, 0]
    assert milestones(1) == [999, 0]


def test_jump_to_the_same_time_is_exactly_the_state():
    z, t = draw(4, 3, 2, 2), rows(999, 500, 1, 0)
    assert torch.equal(SCHEDULE.jump(z, draw(4, 3, 2, 2, seed=1), t, t), z)


def test_jump_to_clean_is_the_prediction():
    x0 = draw(2, 3)
    torch.testing.assert_close(
        SCHEDULE.jump(draw(2, 3, seed=1), x0, rows(900, 3), rows(CLEAN, CLEAN)), x0, rtol=0, atol=1e-6
    )


def test_jumps_compose_when_the_prediction_is_constant():
    z, x0 = draw(3, 5).double().float(), draw(3, 5, seed=1)
    t, s, u = rows(999, 700, 400), rows(800, 350, 200), rows(100, 20, 0)
    twice = SCHEDULE.jump(SCHEDULE.jump(z, x0, t, s), x0, s, u)
    torch.testing.assert_close(twice, SCHEDULE.jump(z, x0, t, u), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_every_prediction_type_gives_back_the_clean_latent(kind):
    schedule = NoiseSchedule.flow() if kind == "flow" else NoiseSchedule.stable_diffusion(prediction_type=kind)
    x, noise, t = draw(4, 6), draw(4, 6, seed=1), rows(10, 300, 600, 900)
    alpha, sigma = schedule.alpha(t, x), schedule.sigma(t, x)
    output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "sample": x, "flow": noise - x}[kind]
    torch.testing.assert_close(schedule.predict_x0(output, schedule.add_noise(x, noise, t), t), x, rtol=1e-3, atol=2e-4)


def test_a_scheduler_of_diffusers_gives_its_own_schedule():
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for source in (scheduler, scheduler.config):
        schedule = NoiseSchedule.from_scheduler(source)
        assert torch.equal(schedule.alphas, SCHEDULE.alphas) and schedule.prediction_type == "epsilon"
    flow = NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert flow.prediction_type == "flow" and float(flow.network_time(rows(999))) == 1000


def test_alphas_stay_float32_and_the_clean_end_keeps_its_noise():
    assert SCHEDULE.sigmas.dtype == torch.float32 and float(SCHEDULE.sigmas[0]) > 0.02


def test_log_snr_milestones_are_even_in_log_snr():
    times = milestones(4, schedule=SCHEDULE)
    log_snr = (SCHEDULE.alphas / SCHEDULE.sigmas.clamp_min(1e-9)).log()[torch.tensor(times)]
    steps = log_snr.diff()
    assert times[0] == 999 and times[-1] == 0
    assert float(steps.max() - steps.min()) < 0.15 * float(steps.mean())


def test_inference_times():
    assert inference_times(4, milestones(8)) == [999, 749, 499, 124]
    assert inference_times(8, milestones(8)) == milestones(8)[:-1]
    assert inference_times(2, milestones(4)) == [999, 499]


@pytest.mark.parametrize("segments", [0, -1, 1000])
def test_impossible_segments(segments):
    with pytest.raises(ValueError, match=rf"segments is {segments}, expected 1 to 999"):
        milestones(segments)


def test_too_many_steps():
    with pytest.raises(ValueError, match="MLCM with M=8 supports 1-8 milestone steps; got 12"):
        inference_times(12, milestones(8))


@pytest.mark.parametrize("times", [[999, 500], [999, 500, 500, 0], [998, 0], [0]])
def test_wrong_milestones(times):
    with pytest.raises(UserError, match="fall strictly from 999 to 0"):
        check_milestones(times, 999)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type is 'noise', expected one of epsilon"):
        NoiseSchedule.stable_diffusion(prediction_type="noise")
    with pytest.raises(UserError, match="prediction_type is 'noise'"):
        MLCMScheduler(prediction_type="noise")


def test_a_config_without_a_schedule():
    with pytest.raises(UserError, match="num_train_timesteps"):
        NoiseSchedule.from_scheduler({"beta_start": 0.1})


def test_shapes_of_a_schedule_are_checked():
    with pytest.raises(UserError, match="expected one line of each"):
        NoiseSchedule(torch.ones(3), torch.ones(4))
