"""The refinement losses against diffusers' schedulers, and the tuner on tiny pipelines in the real formats."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from facescore import FaceTuner, PairDataset, TensorPairs, TuneConfig, best_and_worst
from facescore.errors import CheckpointError, TrainingError
from facescore.images import open_image
from facescore.refine import losses
from facescore.refine.losses import NoiseSchedule
from facescore.refine.pipelines import backbone_of
from facescore.refine.tuner import fit, own_samples
from facescore.testbed import new_pipeline, write_world
from tenfold_shared.errors import UserError


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets_are_those_of_the_scheduler(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    schedule = NoiseSchedule.of(scheduler)
    x, noise, t = some(4, 3, 8, 8), some(4, 3, 8, 8, seed=1), torch.tensor([3, 200, 640, 990])
    alpha, sigma = schedule.at(t)
    z = alpha * x + sigma * noise
    torch.testing.assert_close(z, scheduler.add_noise(x, noise, t))
    wanted = losses.target(kind, x, noise, alpha, sigma)
    torch.testing.assert_close(wanted, noise if kind == "epsilon" else scheduler.get_velocity(x, noise, t))
    torch.testing.assert_close(losses.to_x0(kind, wanted, z, alpha, sigma), x, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(losses.to_noise(kind, wanted, z, alpha, sigma), noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_the_schedulers_interpolation(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.of(scheduler)
    torch.testing.assert_close(schedule.times.flip(0), scheduler.timesteps, rtol=1e-4, atol=1e-2)
    x, noise, index = some(3, 4, 8, 8), some(3, 4, 8, 8, seed=1), torch.tensor([10, 500, 900])
    alpha, sigma = schedule.at(index)
    z = alpha * x + sigma * noise
    torch.testing.assert_close(
        z, scheduler.scale_noise(x, scheduler.timesteps[999 - index], noise), rtol=1e-4, atol=1e-4
    )
    wanted = losses.target("flow", x, noise, alpha, sigma)
    torch.testing.assert_close(losses.to_x0("flow", wanted, z, alpha, sigma), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.to_noise("flow", wanted, z, alpha, sigma), noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_guidance_on_equal_images_is_sigma_squared_times_denoising(kind):
    """Values and gradients: the unit test of the trajectory loss."""
    x, noise = some(2, 3, 4, 4).double(), some(2, 3, 4, 4, seed=1).double()
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64).view(2, 1, 1, 1)
    alpha = 1 - sigma if kind == "flow" else (1 - sigma**2).sqrt()
    prediction = some(2, 3, 4, 4, seed=2).double().requires_grad_()
    guided = losses.guidance_x0(kind, prediction, alpha * x + sigma * noise, x, alpha, sigma)
    denoise = losses.mean_error(prediction - losses.target(kind, x, noise, alpha, sigma))
    torch.testing.assert_close(guided, sigma.flatten() ** 2 * denoise)
    (a,) = torch.autograd.grad(guided.sum(), prediction, retain_graph=True)
    (b,) = torch.autograd.grad(denoise.sum(), prediction)
    torch.testing.assert_close(a, sigma**2 * b)


def test_ddim_step_is_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule.of(scheduler)
    z, v, t = some(1, 3, 4, 4), some(1, 3, 4, 4, seed=1), scheduler.timesteps[3]
    now, then = schedule.at(t.view(1)), schedule.at(t.view(1) - 100)
    torch.testing.assert_close(
        losses.ddim_step("v_prediction", v, z, now, then), scheduler.step(v, t, z).prev_sample, rtol=1e-4, atol=1e-4
    )


def test_dpo_masks_and_weights():
    w, b, rw, rb = (torch.rand(5) for _ in range(4))
    expected = torch.nn.functional.softplus(50 * ((w - rw) - (b - rb)))
    torch.testing.assert_close(losses.dpo(w, b, rw, rb, 100.0), expected)
    assert losses.dpo(w, b, w, b, 5000.0).allclose(torch.tensor(2.0).log())
    difference, mask = some(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[:, :, :4] = 1
    torch.testing.assert_close(losses.mean_error(difference, mask), losses.mean_error(difference[:, :, :4]))
    pooled = losses.latent_mask(torch.nn.functional.interpolate(mask, scale_factor=4), (8, 8), 0.2)
    torch.testing.assert_close(pooled, 0.2 + 0.8 * mask)
    alpha, sigma = torch.tensor(0.8).view(1, 1, 1, 1), torch.tensor(0.6).view(1, 1, 1, 1)
    assert losses.min_snr_weight("epsilon", alpha, sigma, 1.0).item() == pytest.approx(1 / (0.64 / 0.36))
    with pytest.raises(UserError, match="expected epsilon"):
        NoiseSchedule.of(DDPMScheduler(prediction_type="sample"))


def plain_pairs(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, 1, 16, 16)
    masks[:, :, 4:12, 4:12] = 1
    return TensorPairs(torch.rand(n, 3, 16, 16, generator=g), torch.rand(n, 3, 16, 16, generator=g), masks=masks)


def drawn(seed=0):
    torch.manual_seed(seed)
    return new_pipeline((16, 24))


def bright(pixels):
    return pixels.mean((1, 2, 3))


def probe(pipe):
    with torch.no_grad():
        z = some(2, 4, 8, 8).to(pipe.unet.dtype)
        return pipe.unet(z, torch.tensor([500, 20]), pipe.encode_prompt(["a face", "a house"])).sample


@pytest.mark.parametrize(
    ("method", "options"),
    [("sft", {}), ("guidance", {}), ("guidance", {"target": "teacher"}), ("guidance", {"target": "step"}),
     ("dpo", {}), ("filter", {"samples": 4, "sampling_steps": 2}), ("refl", {"sampling_steps": 3})],
)  # fmt: skip
@pytest.mark.parametrize("rank", [4, None])
def test_every_method_trains_what_it_should(method, options, rank):
    pipe, untouched = drawn(), drawn()
    tuner = FaceTuner(pipe, plain_pairs(), method=method, scorer=bright, prompts=["a face"], steps=2, lr=1e-2,
                      batch_size=2, lora_rank=rank, **options).train()  # fmt: skip
    assert len(tuner.history) == 2 and all(np.isfinite(h["loss"]) for h in tuner.history)
    assert not torch.allclose(probe(pipe), probe(untouched))
    if rank is not None:
        with tuner.reference():
            torch.testing.assert_close(probe(pipe), probe(untouched), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "target"),
    [("sft", ""), ("guidance", "x0"), ("guidance", "teacher"), ("guidance", "step"), ("dpo", "")],
)  # fmt: skip
def test_the_second_updates_loss_is_the_formula(method, target):
    """Written out with alpha, sigma and plain means; the second update's, since the reference differs by then."""
    pairs, pipe, first = plain_pairs(), drawn(), drawn()
    after_one = []
    options = {"target": target, "guidance_weight": 0.7, "outside_weight": 0.25} if target else {"beta": 30.0}
    tuner = FaceTuner(pipe, pairs, method=method, steps=2, lr=1e-2, batch_size=3, lora_rank=None, **options)
    tuner.train(on_step=lambda step, t: after_one.append(copy.deepcopy(pipe.unet)) if step == 1 else None)
    unet = after_one[0]

    generator = torch.Generator().manual_seed(1)  # update 1 of seed 0
    rows = torch.randint(6, (3,), generator=generator)
    index = torch.randint(100 if method == "guidance" else 0, 1000, (3,), generator=generator)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    kept = pipe.scheduler.alphas_cumprod
    a, s = (v.view(3, 1, 1, 1) for v in (kept[index].sqrt(), (1 - kept[index]).sqrt()))
    stored = [(getattr(pairs, side)[rows] * 255).round() / 255 for side in ("win", "lose")]
    good, bad = (pipe.encode_image(p) for p in stored)
    condition = pipe.encode_prompt(["a face"] * 3)

    def ask(net, z, t=index):
        return net(z, t, condition).sample

    def error(difference, weight=None):
        weight = torch.ones(3, 1, 8, 8) if weight is None else weight
        return (difference**2 * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)) / 4

    with torch.no_grad():
        zg, zb = a * good + s * noise, a * bad + s * noise
        vg, vb = a * noise - s * good, a * noise - s * bad
        new_g, new_b, old_g, old_b = ask(unet, zg), ask(unet, zb), ask(first.unet, zg), ask(first.unet, zb)
        expected = error(new_g - vg).mean()
        weight = torch.full((3, 1, 8, 8), 0.25)
        weight[:, :, 2:6, 2:6] = 1  # the mask covers pixels 4 to 12
        if target == "x0":
            expected = expected + 0.7 * error(a * zb - s * new_b - good, weight).mean()
        if target == "teacher":
            expected = expected + 0.7 * error(new_b - old_g, weight).mean()
        if target == "step":
            back = (index - 50).clamp(min=0)
            a2, s2 = (v.view(3, 1, 1, 1) for v in (kept[back].sqrt(), (1 - kept[back]).sqrt()))
            step_b, step_g = (a2 * (a * z - s * v) + s2 * (s * z + a * v) for z, v in ((zb, new_b), (zg, new_g)))
            expected = expected + 0.7 * error(step_b - step_g, weight).mean()
        if method == "dpo":
            won, lost = error(new_g - vg) - error(old_g - vg), error(new_b - vb) - error(old_b - vb)
            expected = torch.nn.functional.softplus(15 * (won - lost)).mean()
    assert tuner.history[1]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_filter_keeps_the_best_samples():
    tuner = FaceTuner(drawn(), None, method="filter", scorer=bright, prompts=["a face"], samples=8, keep=0.25,
                      sampling_steps=2, steps=1)  # fmt: skip
    images, _, scores = own_samples(drawn(), ["a face"], bright, 8, steps=2)
    kept = bright(tuner.pipe.decode_latents(tuner._data().good))
    assert sorted(kept.tolist()) == pytest.approx(sorted(scores)[-2:], abs=1e-5) and len(images) == 8
    assert np.ptp(scores) > 1e-3


def test_dpo_starts_at_log_two_and_drift_stops_it():
    tuner = FaceTuner(drawn(), plain_pairs(), method="dpo", steps=1, lora_rank=None).train()
    assert tuner.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and tuner.history[0][
        "drift"
    ] == pytest.approx(1)
    stopped = FaceTuner(drawn(), plain_pairs(), method="dpo", steps=60, lr=0.05, lora_rank=None, max_drift=1.02).train()
    assert len(stopped.history) < 60


def test_refl_climbs_the_reward():
    tuner = FaceTuner(drawn(), None, method="refl", scorer=bright, prompts=["a face"], steps=12, lr=3e-3, lora_rank=None,
                      sampling_steps=3, batch_size=4).train()  # fmt: skip
    rewards = [h["reward"] for h in tuner.history]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3])


def test_general_images_ema_and_min_snr():
    one = open_image(torch.rand(3, 16, 16))
    plain = ([one.resize((24, 16))], ["a house"])
    options = {"steps": 1, "lora_rank": None, "batch_size": 2, "mask_loss": False}

    def first(pairs=None, **more):
        tuner = FaceTuner(drawn(), plain_pairs() if pairs is None else pairs, **{**options, "method": "sft", **more})
        return tuner.train().history[0]["loss"]

    # sft on the very picture that is the general one: both terms are the same loss.
    pixels = torch.from_numpy(np.array(fit(plain[0][0], 16))).permute(2, 0, 1)[None] / 255
    same = TensorPairs(pixels, pixels, prompts=["a house"])
    assert first(same, general=plain, general_weight=0.5) == pytest.approx(1.5 * first(same), rel=1e-5)
    # At a huge gamma nothing is cut: SNR / (SNR + 1) = alpha^2 for a v-model, below 1.
    assert first(min_snr_gamma=1e9) < first() and first(min_snr_gamma=1e-3) < first(min_snr_gamma=1e9)
    passed = []
    tuner = FaceTuner(drawn(), plain_pairs(), method="sft", **{**options, "steps": 3}, ema_decay=0.999)
    tuner.train(on_step=lambda step, t: passed.append({n: p.detach().clone() for n, p in t.trained.items()}))
    for name, weight in tuner.trained.items():  # diffusers' ramp of the decay: 0, 2/11, 3/12
        second = passed[1][name] + 2 / 11 * (passed[0][name] - passed[1][name])
        torch.testing.assert_close(weight.detach(), passed[2][name] + 3 / 12 * (second - passed[2][name]))
    assert not torch.equal(tuner.trained["conv_in.weight"], passed[2]["conv_in.weight"])


def test_filter_without_a_face():
    with pytest.raises(UserError, match="face in none of 4"):
        FaceTuner(drawn(), None, method="filter", scorer=lambda x: x.new_full((len(x),), torch.nan), prompts=["a face"],
                  samples=4, sampling_steps=2, steps=1).train()  # fmt: skip


def test_training_pictures_are_squares_around_the_face():
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[5:15, 44:54] = 255
    image = open_image(wide)
    cut = np.asarray(fit(image, 20, (49 / 60, 0.5)))
    assert cut.shape == (20, 20, 3) and np.array_equal(cut, wide[:, 39:59])
    assert np.array_equal(np.asarray(fit(image, 20, (1.0, 0.5))), wide[:, 40:])  # never beyond the picture
    assert fit(image, 10).size == (10, 10) and fit(image, 32).size == (32, 32)
    assert fit(open_image(wide[:, :20]), 20).size == (20, 20)


def test_resumed_equals_uninterrupted(tmp_path):
    settings = {"method": "guidance", "steps": 4, "batch_size": 2, "save_every": 1, "lora_rank": 4, "ema_decay": 0.9}
    whole = drawn()
    FaceTuner(whole, plain_pairs(), **settings).train()

    class Interrupted(Exception):
        pass

    def dies(step, tuner):
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        FaceTuner(drawn(), plain_pairs(), output=tmp_path, **settings).train(on_step=dies)
    resumed = drawn()
    FaceTuner(resumed, plain_pairs(), output=tmp_path, **settings).train(resume=True)
    assert torch.equal(probe(resumed), probe(whole))
    with pytest.raises(UserError, match="another beta"):
        FaceTuner(drawn(), plain_pairs(), output=tmp_path, **{**settings, "beta": 1.0}).train(resume=True)
    (tmp_path / "training.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        FaceTuner(drawn(), plain_pairs(), output=tmp_path, **settings).train(resume=True)


SCRIPT = """
import sys, torch
from test_refine import drawn, plain_pairs, probe
from facescore import FaceTuner
torch.set_num_threads(1)
pipe = drawn().to(torch.float64)
FaceTuner(pipe, plain_pairs(), method="guidance", steps=2, lr=1e-2, batch_size=4, lora_rank=4).train()
torch.save(probe(pipe), sys.argv[1])
"""


def test_two_processes_equal_one(tmp_path):
    pipe = drawn().to(torch.float64)
    start = probe(pipe)
    FaceTuner(pipe, plain_pairs(), method="guidance", steps=2, lr=1e-2, batch_size=4, lora_rank=4).train()
    assert (probe(pipe) - start).abs().max() > 1e-3
    (tmp_path / "two.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(tmp_path / "two.py"), str(tmp_path / "p.pt")]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "p.pt"), probe(pipe), rtol=0, atol=1e-7)


def test_best_and_worst_of_own_samples():
    pairs = best_and_worst(drawn(), ["a face"] * 3, bright, of=3, steps=2)
    assert len(pairs) == 3 and (bright(pairs.win) > bright(pairs.lose)).all()
    with pytest.raises(UserError, match="2 or more"):
        best_and_worst(drawn(), ["a face"], bright, of=1)
    with pytest.raises(UserError, match="no prompt gave"):
        best_and_worst(drawn(), ["a face"], lambda x: x.new_full((len(x),), float("nan")), of=2, steps=2)


def test_errors():
    pairs = plain_pairs()
    for arguments, text in (
        ({"method": "magic"}, "method is 'magic'"), ({"target": "?"}, "target is"), ({"lora_rank": 0}, "lora_rank"),
        ({"t_min": 1.0}, "t_min"), ({"general_weight": 1.0}, "general images"), ({"method": "filter"}, "needs a scorer"),
        ({"colour": 1}, "colour"), ({"steps": 0}, "steps"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=text):
            FaceTuner(drawn(), pairs, **arguments)
    with pytest.raises(UserError, match="needs pairs"):
        FaceTuner(drawn(), None, method="sft")
    with pytest.raises(UserError, match="cannot tune a"):
        FaceTuner(type("Odd", (), {})(), pairs)
    with pytest.raises(UserError, match="not both"):
        FaceTuner(drawn(), pairs, config=TuneConfig(), steps=3)
    pairs.win[:] = 0.5
    pipe = drawn()
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"at update 0; pairs \d"):
        FaceTuner(pipe, pairs, method="sft", lora_rank=None).train()


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lora_loads_into_a_fresh_pipeline(name, tmp_path, make_pipeline):
    write_world(tmp_path / "world", 4)
    pairs = PairDataset.read(tmp_path / "world" / "pairs")
    pipe, loader = make_pipeline(name, tmp_path)
    before = backbone_of(pipe)
    condition = before.encode_prompts(["a face"], (32, 32))
    z, index = some(1, 4, 16, 16), torch.tensor([400])

    def answer(p):
        view = backbone_of(p)
        with torch.no_grad():
            return view.predict(view.module, z, index, condition)

    start = answer(pipe)
    tuner = FaceTuner(pipe, pairs, method="guidance", steps=2, lr=5e-2, batch_size=2, lora_rank=2).train()
    tuned = answer(pipe)
    fresh = loader.from_pretrained(tmp_path / "pipe")
    fresh.load_lora_weights(tuner.save(tmp_path / "lora"))
    torch.testing.assert_close(answer(fresh), tuned, rtol=1e-4, atol=1e-5)
    assert (tuned - start).abs().max() > 1e-4


def test_builder_on_a_tiny_inpainting_pipeline(tmp_path, make_pipeline):
    from diffusers import AutoPipelineForInpainting
    from facescore import InpaintPairBuilder

    write_world(tmp_path / "world", 2)
    make_pipeline("sd", tmp_path)
    pipe = AutoPipelineForInpainting.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    builder = InpaintPairBuilder(pipe, "full-image", [0.6, 1.0], min_face=8, missing="ignore",
                                 options={"num_inference_steps": 2, "guidance_scale": 1.0})  # fmt: skip
    pairs = builder.build(tmp_path / "world" / "images", tmp_path / "pairs")
    assert len(pairs) == 4
    for i in range(4):
        (win, lose), mask = pairs.images(i), np.asarray(pairs.mask(i))
        assert (np.asarray(win)[mask == 0] == np.asarray(lose)[mask == 0]).all() and (mask == 0).any()
