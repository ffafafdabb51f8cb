import pytest
import torch
from mlcm import digits
from mlcm.mixture import GaussianMixture
from mlcm.randomness import seeded
from mlcm.testbed import (
    RECIPES,
    Distillation,
    PlaneStudent,
    clip_members,
    make_reference,
    only,
    plane_denoiser,
    scheduler_points,
    side_by_side,
    student_points,
    teacher_points,
    train_plane_denoiser,
    tune_reward,
)

MIXTURE = GaussianMixture.rings()


@pytest.mark.parametrize("name", RECIPES)
def test_members_trained_side_by_side_are_those_trained_alone(name):
    together = Distillation(MIXTURE, RECIPES[name], [3, 5], iterations=4, batch=16, guidance_scale=2.0).run()
    alone = Distillation(MIXTURE, RECIPES[name], [5], iterations=4, batch=16, guidance_scale=2.0).run()
    for ours, wanted in zip(only(together.student, 1).parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert together.teacher_calls > alone.teacher_calls


def test_joint_distillation_lowers_its_distance_to_the_truth():
    reference = make_reference(MIXTURE, guidance_scale=1.0, seed=7, count=1000)
    before = reference.score(MIXTURE, student_points(plane_denoiser(), 0, reference, 4))
    run = Distillation(MIXTURE, RECIPES["joint"], [0], iterations=120, guidance_scale=1.0).run()
    after = reference.score(MIXTURE, student_points(run.student, 0, reference, 4))
    assert after["sw2"] < before["sw2"]


def test_the_shipped_denoiser_knows_the_teacher():
    x, labels = MIXTURE.sample(2000, seeded(1))
    t = torch.full((2000,), 500)
    z = MIXTURE.schedule.add_noise(x, torch.randn(2000, 2, generator=seeded(2)), t)
    condition = MIXTURE.condition(labels)
    assert float((plane_denoiser().x0(z, t, condition) - MIXTURE.x0(z, t, condition)).square().mean()) < 0.02


def test_the_denoisers_recipe_runs():
    student = train_plane_denoiser(MIXTURE, iterations=3, batch=8)
    assert all(p.isfinite().all() for p in student.parameters())


def test_gradients_are_clipped_for_each_member():
    student = side_by_side(PlaneStudent(MIXTURE.schedule, 4), 2)
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
        p.grad[0], p.grad[1] = 1e-6, 1.0
    clip_members(student)
    norms = [sum(float(p.grad[m].square().sum()) for p in student.parameters()) ** 0.5 for m in (0, 1)]
    assert norms[1] == pytest.approx(1.0, rel=1e-4) and norms[0] < 1e-2


def test_peers_are_sampled_with_diffusers_schedulers():
    reference = make_reference(MIXTURE, guidance_scale=1.0, seed=7, count=100)
    for name in ("LCMScheduler", "TCDScheduler"):
        assert scheduler_points(plane_denoiser(), 0, reference, 4, name).isfinite().all()
    assert teacher_points(MIXTURE, reference, 50, guidance_scale=1.0).sub(reference.ends).abs().mean() < 0.1


def test_the_reward_stage_raises_its_reward():
    reference = make_reference(MIXTURE, guidance_scale=1.0, seed=7, count=500)
    found = tune_reward(MIXTURE, plane_denoiser(), 0, reference, seed=0, iterations=40, batch=64)
    assert found["gain"] > 0.02 and found["held_out_gain"] > 0


def test_the_digits_recipe_runs(tmp_path):
    world = digits.train_world(autoencoder_steps=2, reader_steps=2, network_steps=2)
    digits.write_half(world.state(), tmp_path / "w.safetensors")
    again = digits.load_world(tmp_path / "w.safetensors")
    made = digits.distil(again, steps=2, seed=0, batch=4)
    moved = [p for name, p in made.network.named_parameters() if "lora_B" in name]
    assert moved and any(float(p.abs().max()) > 0 for p in moved)
    lcm = digits.distil_lcm(again, steps=1, seed=0, batch=4)
    labels, noise = torch.arange(4), torch.randn(4, *digits.SHAPE)
    for latents in (
        digits.draw(made, noise, labels, 2),
        digits.draw_lcm(lcm, noise, labels, 2),
        digits.draw_teacher(again, noise, labels, 2),
    ):
        assert latents.shape == (4, *digits.SHAPE) and again.features(latents).shape == (4, 32)


def test_the_shipped_digits_are_digits():
    world = digits.load_world()
    pixels, labels = digits.images()
    held_out = torch.arange(0, len(pixels), 5)
    with torch.no_grad():
        read = (world.reader(pixels[held_out]).argmax(1) == labels[held_out]).float().mean()
        latents = world.encode(pixels[held_out])
    assert read > 0.95 and world.accuracy(latents, labels[held_out]) > 0.9
    asked = torch.arange(100) % 10
    noise = torch.randn(100, *digits.SHAPE, generator=seeded(0))
    assert world.accuracy(digits.draw_teacher(world, noise, asked, 20), asked) > 0.8
    assert world.accuracy(digits.draw(digits.load_student(world), noise, asked, 4), asked) > 0.7
