"""A biased prompt drawn by the trained tiny model, as it is and repaired, and what the switch step does to it."""

from pathlib import Path
from typing import Any

from tenfold_shared import figures
from tenfold_shared.cli import Table, write_summary

from lcmis_align import testbed
from lcmis_align.levels import rate_level
from lcmis_align.worlds import trained

IMAGES, HELD_OUT, CURVE = 12, 20, (0, 4, 8, 12, 16, 20, 26, 32, 40)


def run(output: Path, seed: int = 0) -> Table:
    """Search the switch step on some seeds, judge plain and repaired samples on others; figures and summary in `output`."""
    pipe, plans = trained.load(), trained.plans()
    plan = plans[seed % len(plans)]
    seeds = [10_000 * seed + i for i in range(IMAGES)]
    found = testbed.moce(pipe, trained)(plan, seeds=seeds, num_inference_steps=testbed.STEPS, guidance_scale=1.0)
    curve = [
        testbed.measure(trained, str(k), testbed.at_step(pipe, plan, seeds, k), plan, testbed.STEPS) for k in CURVE
    ]
    others = [10_000 * seed + 5000 + i for i in range(HELD_OUT)]
    drawn = {
        "plain sampler": testbed.at_step(pipe, plan, others, 0),
        "MoCE": testbed.at_step(pipe, plan, others, found.switch_step, found.stage2),
    }
    rows: list[list[Any]] = []
    for name, images in drawn.items():
        seen = testbed.measure(trained, name, images, plan, testbed.STEPS)
        k = found.switch_step if name == "MoCE" else 0
        rows.append([name, k, seen.a, seen.b, seen.both, seen.latent, rate_level(seen.correct, seen.images)])
    columns = ["", "switch step", plan.first.name, plan.second.name, "both", f"{plan.latent} instead", "level"]
    table = Table(f'"{plan.prompt}": {HELD_OUT} held-out images each, judged exactly', columns, rows)
    _grid(output, drawn, plan.prompt, found.switch_step)
    _curve(output, plan, curve, found.switch_step)
    write_summary(
        output, "lcmis-align", table,
        [
            ("samples.png", f'"{plan.prompt}" as the model draws it and with {plan.first.name!r} alone for the first '
                            f"{found.switch_step} of {testbed.STEPS} steps"),
            ("curve.png", f"What {IMAGES} images show, by the step at which the text is switched"),
        ],
        [
            f"Level 5: no image shows both; level 1: more than three quarters do. The search took {len(found.trace)} "
            f"probe(s) and {found.calls // IMAGES} denoiser calls an image; a plain image takes {testbed.STEPS}.",
            f"The schedule for other tools: {found.schedule}",
        ],
    )  # fmt: skip
    return table


def _grid(output: Path, drawn: dict[str, list[Any]], prompt: str, k: int) -> None:
    with figures.style() as plt:
        figure = plt.figure(figsize=(10, 2.8))
        for part, (name, images) in zip(figure.subfigures(len(drawn), 1), drawn.items(), strict=True):
            for axis, image in zip(part.subplots(1, 10), images, strict=False):
                axis.imshow(image, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(visible=False)
                axis.spines[:].set_visible(False)
            title = f'"{prompt}", {name}' + (f", switched at step {k}" if name == "MoCE" else "")
            part.suptitle(title, x=0.005, ha="left", fontsize="medium")
        figures.save(figure, output / "samples")


def _curve(output: Path, plan: Any, curve: list[testbed.Outcome], k: int) -> None:
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(7, 3.6))
        # A and B are dashed, so that what lies under them is seen.
        axis.plot(CURVE, [o.both for o in curve], color=figures.OURS, linewidth=6, alpha=0.45, label="both")
        axis.plot(CURVE, [o.a for o in curve], "o--", color=figures.PEERS[0], label=f"A: {plan.first.name}")
        axis.plot(CURVE, [o.b for o in curve], "s--", color=figures.PEERS[1], label=f"B: {plan.second.name}")
        axis.plot(CURVE, [o.latent for o in curve], "o-", color=figures.PEERS[6], label=f"hidden: {plan.latent}")
        axis.axvline(k, color=figures.OURS, linestyle=":", label=f"found: {k}")
        axis.set_xlabel("switch step (0: the prompt from the start; 40: the first concept alone)")
        axis.set_ylabel("share of images")
        axis.set_title(f'"{plan.prompt}"')
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figures.save(figure, output / "curve")
