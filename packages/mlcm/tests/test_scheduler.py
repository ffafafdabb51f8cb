import logging

import diffusers
import pytest
import torch
from mlcm import Condition, MLCMScheduler, NoiseSchedule, milestones, sample
from mlcm.sampling import check_sampler
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_pipeline

SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Any smooth function."""
    return torch.sin(3 * z) * (1 + float(t) / 1000)


def run(scheduler, times: list[int], **more) -> torch.Tensor:
    z, generator = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    for t in torch.tensor(times):
        z = scheduler.step(network(z, t), t, z, generator=generator, **more).prev_sample
    return z


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_renoise_is_the_lcm_scheduler_without_its_boundary_scalings(prediction_type):
    times = [999, 749, 499, 124]
    lcm = diffusers.LCMScheduler(**SETTINGS, timestep_scaling=1e9, prediction_type=prediction_type)
    lcm.set_timesteps(timesteps=times)
    ours = MLCMScheduler(prediction_type=prediction_type)
    ours.set_timesteps(4)
    assert ours.timesteps.tolist() == times
    torch.testing.assert_close(run(ours, times), run(lcm, times), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sampler", "gamma"), [("ddim", 0.7), ("gamma", 0.0), ("gamma", 0.3), ("gamma", 1.0)])
def test_gamma_is_the_tcd_scheduler(sampler, gamma):
    times = [999, 749, 499, 249]
    tcd = diffusers.TCDScheduler(**SETTINGS)
    tcd.set_timesteps(timesteps=times)
    ours = MLCMScheduler(sampler=sampler, gamma=gamma)
    ours.set_timesteps(timesteps=times)
    eta = 0.0 if sampler == "ddim" else gamma
    torch.testing.assert_close(run(ours, times), run(tcd, times, eta=eta), rtol=1e-4, atol=1e-4)


def test_the_last_renoise_step_returns_the_prediction():
    scheduler = MLCMScheduler()
    scheduler.set_timesteps(1)
    z = torch.randn(1, 4, 8, 8)
    step = scheduler.step(torch.zeros_like(z), 999, z)
    torch.testing.assert_close(step.prev_sample, step.pred_original_sample)


@pytest.mark.parametrize("sampler", ["renoise", "ddim", "gamma"])
def test_scheduler_and_sample_function_agree(sampler):
    schedule = NoiseSchedule.stable_diffusion()
    scheduler = MLCMScheduler(sampler=sampler)
    scheduler.set_timesteps(3)
    times = scheduler.timesteps.tolist()
    z, generator = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    ours = sample(
        lambda z, t, c: schedule.predict_x0(network(z, t[0]), z, t), schedule, z, Condition(), times=times, sampler=sampler,
        noise=lambda: torch.randn(z.shape, generator=generator),
    )  # fmt: skip
    torch.testing.assert_close(ours, run(scheduler, times), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_pipeline_runs_at_every_number_of_steps(pipe, steps):
    pipe.scheduler = MLCMScheduler.from_config(pipe.scheduler.config, segments=8)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a ball", num_inference_steps=steps, guidance_scale=0, generator=generator, output_type="pt").images
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()


def test_a_pipeline_saves_and_reloads_with_it(pipe, tmp_path):
    pipe.scheduler = MLCMScheduler.from_config(pipe.scheduler.config, segments=4, sampler="gamma", gamma=0.5)
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, MLCMScheduler)
    assert (again.scheduler.config.segments, again.scheduler.config.sampler, again.scheduler.config.gamma) == (
        4,
        "gamma",
        0.5,
    )
    images = [
        p(
            ["a", "b"],
            num_inference_steps=3,
            guidance_scale=0,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
        for p in (pipe, again)
    ]
    assert torch.equal(*images)


def test_image_to_image_starts_at_a_later_milestone(pipe):
    kind = {"StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline"}.get(
        type(pipe).__name__, "StableDiffusionXLImg2ImgPipeline"
    )
    pipe.scheduler = MLCMScheduler.from_config(pipe.scheduler.config)
    other = getattr(diffusers, kind).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 32, 32)
    image = other("a ball", image=start, strength=0.5, num_inference_steps=4, guidance_scale=0, output_type="pt").images
    assert image.shape == start.shape and image.isfinite().all()


def test_half_precision_keeps_its_dtype_and_loses_no_noise():
    scheduler = MLCMScheduler()
    scheduler.set_timesteps(8)
    z = torch.randn(1, 4, 8, 8)
    full = scheduler.step(torch.ones_like(z), 999, z, generator=torch.Generator().manual_seed(0)).prev_sample
    scheduler.set_timesteps(8)
    half = scheduler.step(
        torch.ones_like(z).bfloat16(), 999, z.bfloat16(), generator=torch.Generator().manual_seed(0)
    ).prev_sample
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.2)


def test_times_off_the_milestones_warn(caplog):
    scheduler = MLCMScheduler()
    with caplog.at_level(logging.WARNING):
        scheduler.set_timesteps(timesteps=[999, 759, 499, 259])
    assert "[759, 259] are not milestones" in caplog.text
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]


def test_own_milestones_and_positions():
    scheduler = MLCMScheduler(segments=2, milestones=[999, 300, 0])
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 300]
    chosen = MLCMScheduler(positions=[0, 1])
    chosen.set_timesteps(2)
    assert chosen.timesteps.tolist() == milestones(8)[:2]


def test_add_noise():
    scheduler, x, noise = MLCMScheduler(), torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    t = torch.tensor([0, 500])
    reference = diffusers.DDPMScheduler(**SETTINGS).add_noise(x, noise, t)
    torch.testing.assert_close(scheduler.add_noise(x, noise, t), reference)


def test_refusals():
    scheduler = MLCMScheduler()
    with pytest.raises(ValueError, match="MLCM with M=8 supports 1-8 milestone steps; got 12"):
        scheduler.set_timesteps(12)
    with pytest.raises(UserError, match="either num_inference_steps or timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(UserError, match="fall within 999 to 1"):
        scheduler.set_timesteps(timesteps=[500, 700])
    with pytest.raises(UserError, match="before set_timesteps"):
        scheduler.step(torch.zeros(1), 999, torch.zeros(1))
    scheduler.set_timesteps(2)
    with pytest.raises(UserError, match="timestep 7 is not among"):
        scheduler.step(torch.zeros(1, 1), 7, torch.zeros(1, 1))
    with pytest.raises(UserError, match="3 milestones for 8 segments"):
        MLCMScheduler(milestones=[999, 500, 0])
    with pytest.raises(UserError, match="segments is 0"):
        MLCMScheduler(segments=0)
    with pytest.raises(UserError, match="sampler is 'euler'"):
        check_sampler("euler", 0.3)
    with pytest.raises(UserError, match=r"gamma is 1\.5"):
        MLCMScheduler(sampler="gamma", gamma=1.5)
