"""The main job on the exact mixture: five ways to distil it, sampled in 1, 2, 4 and 8 steps."""

from collections.abc import Callable
from pathlib import Path

import torch
from tenfold_shared import figures
from tenfold_shared.cli import Table, write_summary
from torch import Tensor

from scott.recipes import RECIPES
from scott.testbed import distil, measure, mixture_world, samples

METHODS = ("LCM", "SCott", "ODE + GAN", "late noise + GAN", "late noise")
STEPS = (1, 2, 4, 8)
ITERATIONS = 1200


def run(
    output: Path, seed: int, *, iterations: int = ITERATIONS, progress: Callable[[str], None] | None = None
) -> Table:
    """Distil, sample, measure, draw; writes the picture and summary.json and returns the table.

    progress: called with a line before each method.
    """
    threads = torch.get_num_threads()
    # Networks this small only wait for a second thread.
    torch.set_num_threads(1)
    try:
        return _run(output, seed, iterations, progress)
    finally:
        torch.set_num_threads(threads)


def _run(output: Path, seed: int, iterations: int, progress: Callable[[str], None] | None) -> Table:
    points: dict[tuple[str, int], Tensor] = {}
    scores: dict[tuple[str, int], dict[str, float]] = {}
    for i, name in enumerate(METHODS, 1):
        if progress:
            progress(f"{i}/{len(METHODS)} distilling: {name}")
        student = distil(RECIPES[name], [seed], iterations=iterations)
        for steps in STEPS:
            points[name, steps] = samples(student, [seed], steps=steps)[0]
            scores[name, steps] = measure(points[name, steps], seed=seed)
    table = Table(
        "Distilled samplers of the mixture: sliced W2 / coverage / share of strays",
        ["steps", *METHODS, "SDE noise", "noise and discriminator"],
        [
            [
                steps,
                *(
                    f"{s['sw2']:.3f} / {s['coverage']:.2f} / {s['far']:.2f}"
                    for s in (scores[m, steps] for m in METHODS)
                ),
                verdict(scores["SCott", steps], scores["ODE + GAN", steps]),
                verdict(scores["SCott", steps], scores["LCM", steps]),
            ]
            for steps in STEPS
        ],
    )
    name = figures.save(picture(points, scores), output / "mixture").name
    notes = [
        "sliced W2: distance to fresh data, lower is better; coverage: share of the data near a sample; strays: further "
        "than 4 standard deviations from every mode",
        "SDE noise compares SCott with ODE + GAN, which differ in the solver's noise alone; noise and discriminator "
        "compares SCott with LCM, which has neither",
        f"one seed and {iterations} iterations; the benchmark has three seeds and the full length",
    ]
    caption = "The mixture from distilled students in 1, 2, 4 and 8 steps; grey: the data"
    write_summary(output, "scott", table, [(name, caption)], notes)
    return table


def verdict(with_noise: dict[str, float], without: dict[str, float], margin: float = 0.1) -> str:
    """`helps`, `harms`, `mixed` or `no difference`: sliced W2 and strays, where a tenth counts as a difference."""
    signs = set()
    for metric in ("sw2", "far"):
        low, high = (1 - margin) * without[metric], (1 + margin) * without[metric]
        if with_noise[metric] < low:
            signs.add("helps")
        elif with_noise[metric] > high:
            signs.add("harms")
    return "mixed" if len(signs) > 1 else next(iter(signs), "no difference")


def picture(points: dict[tuple[str, int], Tensor], scores: dict[tuple[str, int], dict[str, float]]) -> object:
    """One row a method, one column a number of steps."""
    mixture = mixture_world()
    data, _ = mixture.sample(2000)
    methods = [m for m in METHODS if (m, STEPS[0]) in points]
    with figures.style() as plt:
        figure, axes = plt.subplots(
            len(methods), len(STEPS), figsize=(2.5 * len(STEPS), 2.55 * len(methods)), sharex=True, sharey=True
        )
        for row, method in zip(axes, methods, strict=True):
            for axis, steps in zip(row, STEPS, strict=True):
                colour = figures.OURS if method == "SCott" else figures.PEERS[0]
                axis.scatter(*data.T.numpy(), s=1.5, c="#c8c8c8", linewidths=0, rasterized=True)
                axis.scatter(*points[method, steps][:1500].T.numpy(), s=2, c=colour, linewidths=0, rasterized=True)
                score = scores[method, steps]
                axis.set_title(
                    f"W2 {score['sw2']:.3f}, cov {score['coverage']:.2f}, strays {score['far']:.2f}", fontsize=8
                )
                axis.set(xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), xticks=[], yticks=[], aspect="equal")
                axis.spines[:].set(visible=True, color="#d8d8d8")
            row[0].set_ylabel(method)
        for axis, steps in zip(axes[-1], STEPS, strict=True):
            noise, both = (verdict(scores["SCott", steps], scores[name, steps]) for name in ("ODE + GAN", "LCM"))
            axis.set_xlabel(
                f"{steps} step{'s' if steps > 1 else ''}\nSDE noise: {noise}\nnoise and GAN: {both}", fontsize=9
            )
    return figure
