"""The offline world: seeds side by side, shipped weights and the recipe that makes them, the experiments."""

import itertools

import pytest
import torch
from scott import SDESolver, coverage, digits, testbed
from scott.metrics import sliced_wasserstein
from scott.recipes import RECIPES, Recipe


@pytest.mark.parametrize("name", ["LCM", "SCott"])
def test_a_seed_is_the_same_alone_and_in_company(name):
    together = testbed.distil(RECIPES[name], [3, 4], iterations=4, batch=16)
    alone = testbed.distil(RECIPES[name], [4], iterations=4, batch=16)
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a[1:], b, atol=2e-5)
    assert not torch.allclose(next(together.parameters())[0], next(together.parameters())[1])


def test_samples_of_a_seed_are_the_same_alone_and_in_company():
    both = testbed.samples(testbed.pretrained(2), [0, 1], steps=2, n=50)
    alone = testbed.samples(testbed.pretrained(1), [1], steps=2, n=50)
    assert torch.allclose(both[1], alone[0], atol=1e-4) and not torch.allclose(both[0], both[1])


def test_the_loss_is_the_squared_norm_minus_the_weighted_score():
    jump, target = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[0.0, -3.0], [0.0, 0.0]]])
    assert testbed.student_loss(jump, target).tolist() == [[25.0, 0.0]]
    assert testbed.student_loss(jump, target, torch.tensor([[2.0, -1.0]]), adv_weight=0.5).tolist() == [[24.0, 0.5]]


def test_the_world_is_as_hard_as_the_reference_for_the_exact_teacher():
    """How unequal the weights are is read from what one and two DDIM steps of the exact teacher give: no training in it."""
    mixture, generator = testbed.mixture_world(), torch.Generator().manual_seed(10)
    ode, n = SDESolver(mixture.schedule, "ode"), 16_000
    found = []
    for times in ((999, -1), (999, 499, -1)):
        label, z = mixture.sample(n, generator=generator)[1], torch.randn(n, 2, generator=generator)
        for t, s in itertools.pairwise(times):
            t_b, s_b = torch.full((n,), t), torch.full((n,), s)
            z = ode.step(z, t_b, s_b, mixture.x0(z, t_b, label))
        found.append(testbed.measure(z, seed=10))
    assert [row["sw2"] for row in found] == pytest.approx([0.676, 0.428], rel=0.04)
    assert [row["far"] for row in found] == pytest.approx([0.997, 0.684], rel=0.03)


def test_two_draws_of_the_data_are_at_the_floor():
    x, _ = testbed.mixture_world().sample(32_000, generator=torch.Generator().manual_seed(11))
    scores = testbed.measure(x, seed=11)
    assert scores["sw2"] == pytest.approx(0.036, abs=0.008) and scores["coverage"] == pytest.approx(0.967, abs=0.005)
    assert scores["density"] == pytest.approx(1, abs=0.02) and scores["far"] < 0.001


def test_measures_of_many_points_are_means_over_groups():
    x, generator = testbed.mixture_world().sample(8000)[0] + 0.1, torch.Generator().manual_seed(3005)
    by_hand = []
    for group in x.split(4000):
        real, _ = testbed.mixture_world().sample(4000, generator=generator)
        by_hand.append((sliced_wasserstein(real, group), coverage(real[:2000], group[:2000])))
    scores = testbed.measure(x, seed=3)
    assert (scores["sw2"], scores["coverage"]) == pytest.approx(
        tuple(sum(column) / 2 for column in zip(*by_hand, strict=True))
    )
    assert testbed.measure(x[:4000], seed=3)["sw2"] == pytest.approx(by_hand[0][0])


def test_the_shipped_denoiser_is_close_to_the_posterior_mean_and_its_recipe_runs(tmp_path):
    mixture = testbed.mixture_world()
    x, label = mixture.sample(500, generator=torch.Generator().manual_seed(0))
    t = torch.randint(0, 1000, (500,), generator=torch.Generator().manual_seed(1))
    z = mixture.schedule.add_noise(x, torch.randn(500, 2, generator=torch.Generator().manual_seed(2)), t)

    def error(student):
        with torch.no_grad():
            return float((student.x0(label[None])(z[None], t[None])[0] - mixture.x0(z, t, label)).square().mean())

    trained = error(testbed.train_denoiser(mixture, iterations=40, batch=64))
    untrained = error(testbed.Student(mixture, 1))
    assert error(testbed.pretrained(1)) < 0.003 < trained < untrained


def test_distillation_brings_the_student_to_the_ode():
    """At t = 199 a tenth of a run already takes an eighth off the distance from the denoiser to the ODE's end point."""
    mixture = testbed.mixture_world()
    x, label = mixture.sample(1000, generator=torch.Generator().manual_seed(0))
    t = torch.full((1000,), 199)
    z = mixture.schedule.add_noise(x, torch.randn(1000, 2, generator=torch.Generator().manual_seed(1)), t)
    ode = SDESolver(mixture.schedule, "ode", substeps=200)
    end = ode.solve(z, t, torch.full_like(t, -1), lambda z, t: mixture.x0(z, t, label))

    def error(student):
        with torch.no_grad():
            return float((student.f(label[None])(z[None], t[None])[0] - end).square().mean().sqrt())

    student = testbed.distil(RECIPES["LCM"], [0], iterations=200, batch=128)
    assert error(student) < 0.875 * error(testbed.pretrained(1))


def test_the_discriminator_brings_samples_onto_the_data():
    """A tenth of a run with the same solver and seeds: the share of strays of one step falls by a quarter."""
    seeds = [10, 11]
    strays = {}
    for name in ("ODE", "ODE + GAN"):
        student = testbed.distil(RECIPES[name], seeds, iterations=200, batch=128)
        strays[name] = testbed.mixture_world().far(testbed.samples(student, seeds, steps=1, n=1000).flatten(0, 1))
    assert strays["ODE + GAN"] < 0.75 * strays["ODE"]


def test_recipes_are_what_they_are_called():
    assert RECIPES["LCM"] == Recipe("LCM", "ode", substeps=1)
    scott, ode = RECIPES["SCott"], RECIPES["ODE + GAN"]
    assert scott.gan and scott.solver == "er-sde" and scott.noise == "sde5" and scott.substeps == 3
    assert ode.gan and ode.solver == "ode" and ode.substeps == 3
    late = RECIPES["late noise"].make_solver(testbed.mixture_world().schedule)
    t, s = torch.tensor([399, 400]), torch.tensor([391, 392])
    sde, none = RECIPES["SDE 5"].make_solver(late.schedule), RECIPES["ODE"].make_solver(late.schedule)
    assert torch.equal(late.coefficient(t, s)[:1], sde.coefficient(t, s)[:1])
    assert torch.equal(late.coefficient(t, s)[1:], none.coefficient(t, s)[1:])
    assert RECIPES["late noise"].noise_below == 400 and RECIPES["late noise + GAN"].gan


def test_digits_ship_a_good_classifier_and_a_teacher_that_draws_digits():
    from diffusers import DDIMScheduler

    assert digits.accuracy(digits.classifier()) >= 0.97
    real, labels = digits.digits()
    assert real.shape == (1797, 1, 8, 8) and float(real.min()) == -1.0 and float(real.max()) == 1.0
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    with torch.no_grad():
        named = digits.classifier()(digits.teacher_samples(scheduler, steps=10, seed=0)).argmax(1)
    assert float((named == labels).float().mean()) > 0.8


def test_the_recipe_of_the_digit_models_runs():
    assert digits.accuracy(digits.train_classifier(iterations=60, batch=64)) > 0.5
    unet = digits.train_teacher(iterations=2, batch=4)
    assert unet(torch.zeros(1, 1, 8, 8), 5, class_labels=torch.tensor([digits.NULL])).sample.shape == (1, 1, 8, 8)


@pytest.mark.parametrize("name", ["LCM", "SCott", "late noise + GAN"])
def test_digits_distil_with_the_real_trainer(name):
    trainer = digits.distil(RECIPES[name], 0, iterations=2)
    assert trainer.step == 2 and (trainer.discriminator is not None) == RECIPES[name].gan
    assert trainer.sample([1, 2, 3], steps=2).shape == (3, 1, 8, 8)


def test_measures_of_the_data_itself_are_perfect():
    scores = digits.measure(digits.digits()[0])
    assert scores["frechet"] == pytest.approx(0, abs=1e-9) and scores["coverage"] == 1.0 and scores["label"] > 0.97
