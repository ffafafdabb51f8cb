"""The offline demo: distil on the exact mixture, draw digits with the shipped student, two pictures and a table."""

import logging
from pathlib import Path
from typing import Any

import torch
from tenfold_shared.cli import Table, write_summary
from tenfold_shared.figures import OURS, PEERS, save, style
from torch import Tensor

from mlcm.mixture import GaussianMixture
from mlcm.testbed import RECIPES, Distillation, make_reference, scheduler_points, student_points, teacher_points

log = logging.getLogger(__name__)
GUIDANCE = 3.0


def run(output: Path, seed: int, *, iterations: int = 500) -> Table:
    """Train ours and LCM on the mixture for `iterations` each, sample, draw. Writes pictures and summary.json."""
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    mixture = GaussianMixture.rings()
    reference = make_reference(mixture, guidance_scale=GUIDANCE, seed=1000 + seed, count=3000)
    runs = {}
    for name in ("LCM", "joint"):
        log.info("distilling %s, %d iterations", name, iterations)
        runs[name] = Distillation(mixture, RECIPES[name], [seed], iterations=iterations, guidance_scale=GUIDANCE).run()
    ours, lcm = runs["joint"].student, runs["LCM"].student
    samples = {
        "exact": reference.points,
        **{f"DDIM {k}": teacher_points(mixture, reference, k, guidance_scale=GUIDANCE) for k in (4, 8)},
        "LCM 4": scheduler_points(lcm, 0, reference, 4, "LCMScheduler", seed=seed),
        **{f"ours {k}": student_points(ours, 0, reference, k, seed=seed) for k in (2, 4, 8)},
    }
    rows = []
    for name, points in samples.items():
        if name == "exact":
            continue
        score = reference.score(mixture, points)
        # Guidance costs the teacher two network calls a step.
        calls = int(name.split()[1]) * (2 if name.startswith("DDIM") else 1)
        rows.append([name, calls, score["sw2"], score["coverage"], score["far"]])
    table = Table(
        f"The guided mixture after {iterations} iterations: sliced W2 and off-mode share are better low, coverage high",
        ["sampler", "network calls", "sliced W2", "coverage", "off every mode"],
        rows,
    )
    draw_mixture(mixture, samples, output / "mixture")
    draw_digits(output / "digits", seed)
    write_summary(
        output, "mlcm", table,
        [
            ("mixture.png", "The exact guided distribution, DDIM of its exact teacher, LCM, and one student of ours at 2, 4 and 8 steps."),
            ("digits.png", "Digits from a tiny latent teacher in 50 steps, and from one shipped student in 2, 4 and 8."),
        ],
        ["The student has seen no data: its training states are the teacher's own trajectory. LCM is trained on real points.",
         f"Teacher rows during training: ours {runs['joint'].teacher_calls}, LCM {runs['LCM'].teacher_calls}."],
    )  # fmt: skip
    return table


def draw_mixture(mixture: GaussianMixture, samples: dict[str, Tensor], path: Path) -> None:
    """One panel of points for each sampler."""
    with style() as plt:
        figure, axes = plt.subplots(2, 4, figsize=(11, 5.8), sharex=True, sharey=True)
        for axis, (name, points) in zip(axes.flat, samples.items(), strict=False):
            color = OURS if name.startswith("ours") else "#444444" if name == "exact" else PEERS[0]
            axis.plot(*points[:2000].T, ".", markersize=1.6, color=color, alpha=0.5)
            axis.plot(*mixture.means.T, "+", color="#bbbbbb", markersize=6)
            title = name if name == "exact" else f"{name}   off mode {mixture.far(points):.0%}"
            axis.set(title=title, xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=(), yticks=())
        axes.flat[-1].set_visible(False)
        save(figure, path)


def draw_digits(path: Path, seed: int) -> None:
    """The digits 0 to 9 twice: the teacher's, and the shipped student's in 2, 4 and 8 steps, from the same noise."""
    from mlcm import digits

    world = digits.load_world()
    labels = torch.arange(2 * digits.CLASSES) // 2
    noise = torch.randn(len(labels), *digits.SHAPE, generator=torch.Generator().manual_seed(seed))
    student = digits.load_student(world)
    shown: dict[str, Any] = {"teacher, 50 steps": digits.draw_teacher(world, noise, labels, 50)}
    shown |= {f"teacher, {k} steps": digits.draw_teacher(world, noise, labels, k) for k in (4, 8)}
    shown |= {f"ours, {k} steps": digits.draw(student, noise, labels, k, seed=seed) for k in (2, 4, 8)}
    with style() as plt:
        figure, axes = plt.subplots(len(shown), 1, figsize=(11, 0.7 * len(shown)))
        for axis, (name, latents) in zip(axes, shown.items(), strict=True):
            axis.imshow(digits.grid(world, latents), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=(), yticks=())
            axis.grid(False)
            axis.set_ylabel(name, rotation=0, ha="right", va="center", color=OURS if "ours" in name else "black")
        save(figure, path)


def bench_toy(iterations: int, *, guidance_scale: float, seed: int) -> Table:
    """Ours and LCM on the mixture, one seed."""
    mixture, rows = GaussianMixture.rings(), []
    reference = make_reference(mixture, guidance_scale=guidance_scale, seed=1000 + seed)
    for name in ("LCM", "joint"):
        run = Distillation(mixture, RECIPES[name], [seed], iterations=iterations, guidance_scale=guidance_scale).run()
        for k in (2, 4, 8):
            points = (
                scheduler_points(run.student, 0, reference, k, "LCMScheduler", seed=seed)
                if name == "LCM"
                else student_points(run.student, 0, reference, k, seed=seed)
            )
            score = reference.score(mixture, points)
            rows.append([name, k, score["sw2"], score["coverage"], score["far"], run.seconds, run.teacher_calls])
    columns = ["method", "steps", "sliced W2", "coverage", "off every mode", "training seconds", "teacher rows"]
    return Table("The exact mixture", columns, rows)


def bench_digits(iterations: int, *, seed: int, batch: int = 64, device: str = "cpu") -> Table:
    """Ours and LCM on digits, one seed."""
    from mlcm import digits
    from mlcm.metrics import frechet_distance

    world, generator = digits.load_world(), torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(0, digits.CLASSES, (500,), generator=generator)
    noise, other = (torch.randn(500, *digits.SHAPE, generator=generator) for _ in range(2))
    truth = world.features(digits.draw_teacher(world, other, labels, 50))
    ours = digits.distil(world, steps=iterations, seed=seed, batch=batch, device=device)
    lcm = digits.distil_lcm(world, steps=iterations, seed=seed, batch=batch, device=device)
    rows = []
    for k in (2, 4, 8):
        for name, z in (
            ("LCM", digits.draw_lcm(lcm, noise, labels, k, seed=seed)),
            ("joint", digits.draw(ours, noise, labels, k, seed=seed)),
        ):
            rows.append([name, k, frechet_distance(truth, world.features(z)), world.accuracy(z, labels)])
    return Table("Digits in a latent space", ["method", "steps", "Fréchet to the teacher", "read as their class"], rows)
