"""Pictures: the toy's curves, heat-maps and gradients (the paper's figures 1 to 3), and a monitored run's panels.

Everything is drawn in log space: probabilities underflow float32 within a few hundred steps of DPO, and an average that
silently drops exact zeros jumps (as the paper's curve of unseen answers does near epoch 1300).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold_shared.figures import OURS, PEERS, save, style

from dpo3d.alarms import Record
from dpo3d.toy import ANSWERS, PROMPTS, Run

LN10 = math.log(10)
HALVES = {"chosen": PEERS[0], "rejected": OURS}
"""One colour for each half of the pair in all pictures of a monitored run."""


def likelihood_curves(runs: Sequence[Run], path: Path) -> Path:
    """π+, log10 π− and the mass outside the pair over the steps: a row per scenario, a line per method."""
    scenarios = sorted(set(runs[0].world.scenarios.tolist()))
    with style() as plt:
        figure, axes = plt.subplots(len(scenarios), 3, figsize=(11, 2.5 * len(scenarios)), squeeze=False, sharex=True)
        for row, scenario in zip(axes, scenarios, strict=True):
            for i, run in enumerate(runs):
                rows = run.scenario(scenario)
                lines = (
                    run.chosen[:, rows].exp().mean((1, 2)),
                    run.rejected[:, rows].mean((1, 2)) / LN10,
                    run.off_pair[:, rows].mean((1, 2)),
                )
                for axis, line in zip(row, lines, strict=True):
                    axis.plot(line, label=run.method, color=_colour(i))
            row[0].set(ylabel=f"S{scenario}", ylim=(0, 1.02))
            row[2].set(ylim=(0, 1.02))
        for axis, title in zip(axes[0], ("chosen, π+", "rejected, log10 π−", "mass outside the pair"), strict=True):
            axis.set_title(title)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 6))
        return save(figure, path)


def heat_maps(runs: Sequence[Run], path: Path, *, scenario: int) -> Path:
    """Where the probability is at the end: prompts by answers, mean over the seeds, one map per method and the start.

    Rejected answers differ by seed, so each prompt's own one is shown first of the four.
    """
    world = runs[0].world
    rows = runs[0].scenario(scenario)
    order = torch.arange(ANSWERS).expand(len(world.seeds), PROMPTS, ANSWERS).clone()
    for r in range(len(world.seeds)):
        for p in range(PROMPTS):
            own = int(world.rejected[r, p])
            order[r, p, 4:8] = torch.tensor([own] + [a for a in range(4, 8) if a != own])
    maps = {"start": world.reference} | {run.method: run.logps[-1] for run in runs}
    with style() as plt:
        columns = min(len(maps), 4)
        lines = math.ceil(len(maps) / columns)
        figure, axes = plt.subplots(lines, columns, figsize=(3.3 * columns, 2.2 * lines), squeeze=False, sharey=True)
        for axis in axes.flat[len(maps) :]:
            axis.set_axis_off()
        for axis, (name, logps) in zip(axes.flat, maps.items(), strict=False):
            image = axis.imshow(logps.gather(-1, order)[rows].exp().mean(0), vmin=0, vmax=1, aspect="auto")
            axis.set(title=name, xticks=range(ANSWERS), yticks=range(PROMPTS))
            axis.set_xticklabels(["c0", "c1", "c2", "c3", "r", "r'", "r'", "r'", "u8", "u9"], fontsize=7)
            axis.grid(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("prompt")
        figure.colorbar(image, ax=axes, label="probability")
        return save(figure, path)


def gradient_picture(run: Run, path: Path, *, beta_rejected: float | None = None, gamma: float = 0.0) -> Path:
    """log10 of |∂ℓ/∂π+| and |∂ℓ/∂π−| over the steps, a panel per scenario; shaded between the seeds' extremes."""
    chosen, rejected = run.gradients(beta_rejected=beta_rejected, gamma=gamma)
    scenarios = sorted(set(run.world.scenarios.tolist()))
    with style() as plt:
        figure, axes = plt.subplots(1, len(scenarios), figsize=(3 * len(scenarios), 2.8), squeeze=False, sharey=True)
        for axis, scenario in zip(axes[0], scenarios, strict=True):
            rows = run.scenario(scenario)
            for values, colour, label in ((chosen, PEERS[0], "|∂ℓ/∂π+|"), (rejected, OURS, "|∂ℓ/∂π−|")):
                per_seed = values[:, rows].mean(-1) / LN10
                axis.plot(per_seed.mean(-1), color=colour, label=label)
                axis.fill_between(
                    range(len(per_seed)), per_seed.amin(-1), per_seed.amax(-1), color=colour, alpha=0.2, linewidth=0
                )
            axis.set(title=f"{run.method}, S{scenario}", xlabel="step")
        axes[0][0].set_ylabel("log10")
        axes[0][0].legend()
        return save(figure, path)


def monitor_panels(history: Sequence[Record]) -> list[tuple[str, Any]]:
    """(caption, figure) of a monitored run: likelihoods, the three D's, gradients; a passive run has fewer."""
    with style() as plt:
        probed = [record for record in history if "kinds" in record]
        return _probed_panels(plt, probed) if probed else _passive_panels(plt, history)


def _probed_panels(plt: Any, history: Sequence[Record]) -> list[tuple[str, Any]]:
    steps = [record["step"] for record in history]

    def series(key: str) -> list[float | None]:
        return [record.get(key) for record in history]

    likelihood, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    for i, kind in enumerate(history[-1]["kinds"]):
        if kind == "known":
            continue
        rows = [record["kinds"].get(kind) for record in history]
        low, high = ([r["quantiles"][q] if r else math.nan for r in rows] for q in (0, 2))
        colour = HALVES.get(kind) or PEERS[(i - 1) % len(PEERS)]
        axes[0].plot(steps, [r["per_token"] if r else math.nan for r in rows], label=kind, color=colour)
        axes[0].fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axes[1].plot(steps, [r["delta"] if r else math.nan for r in rows], label=kind, color=colour)
    axes[0].set(title="log π per token (band: 10 % to 90 %)", xlabel="step", ylabel="nats per token")
    axes[1].set(title="change since step 0", xlabel="step", ylabel="nats per sequence")
    likelihood.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    signs, axes = plt.subplots(1, 3, figsize=(11, 3))
    # At step 0 nothing has moved, and 0 has no place on a logarithmic axis.
    axes[0].plot(steps, [value or math.nan for value in series("drop_ratio")], color=OURS)
    axes[0].set(title="drop: |Δ−| / |Δ+|", xlabel="step", yscale="log")
    for labels in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        labels("{x:g}")
    axes[1].plot(steps, _numbers(series("chosen_share")), label="chosen's share of the margin")
    axes[1].plot(steps, _numbers(series("chosen_drawdown")), label="chosen's drawdown, nats/token")
    axes[1].axhline(0, color="#999", linewidth=0.8)
    axes[1].set(title="degradation", xlabel="step")
    for key, label in (
        ("off_pair_mass", "mass outside the known answers"),
        ("self_ref_logp", "log π0 of fresh samples, nats/token"),
        ("kl_k3", "KL(π‖π0), nats"),
        ("entropy", "entropy, nats"),
    ):
        if any(value is not None for value in series(key)):
            axes[2].plot(steps, _numbers(series(key)), label=label)
    axes[2].set(title="dispersion", xlabel="step", yscale="symlog")
    for axis in axes[1:]:
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    gradients, axes = plt.subplots(1, 2, figsize=(10, 3))
    for axis, suffix, title in ((axes[0], "", "log |∂ℓ/∂π|"), (axes[1], "_per_token", "log |∂ℓ/∂π| per token")):
        axis.plot(steps, series(f"log_grad_chosen{suffix}"), label="chosen", color=HALVES["chosen"])
        axis.plot(steps, series(f"log_grad_rejected{suffix}"), label="rejected", color=HALVES["rejected"])
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=8)
    return [
        ("Likelihoods of the pair and of unseen answers.", likelihood),
        ("The three D's.", signs),
        (
            "Gradients with respect to the two likelihoods; mostly the sequence's length, hence the view per token.",
            gradients,
        ),
    ]


def _passive_panels(plt: Any, history: Sequence[Record]) -> list[tuple[str, Any]]:
    steps = [record["step"] for record in history]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3))
    for key, colour in HALVES.items():
        axes[0].plot(steps, [record[f"logp_{key}"] for record in history], label=key, color=colour)
        axes[1].plot(steps, [record[f"delta_{key}"] for record in history], label=key, color=colour)
    axes[2].plot(steps, _numbers([record["chosen_share"] for record in history]), color=OURS)
    axes[0].set(title="log π, training batches", xlabel="step", ylabel="nats per sequence")
    axes[1].set(title="Δ against the reference", xlabel="step")
    axes[2].set(title="chosen's share of the margin", xlabel="step")
    axes[0].legend()
    return [("What the trainer logged; unseen answers were not probed.", figure)]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _colour(i: int) -> str:
    return OURS if i == 0 else PEERS[(i - 1) % len(PEERS)]
