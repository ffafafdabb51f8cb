"""The main job on the testbed: real digits from a few examples each, with six encoders that never saw one."""

from pathlib import Path
from typing import Any

import numpy as np
from tenfold_shared import figures
from tenfold_shared.cli import Table, write_summary

from gp_ensemble import metrics
from gp_ensemble.classifier import GPEnsembleClassifier
from gp_ensemble.protocol import METHODS, mean_of, run_grid, single_encoder, summarise
from gp_ensemble.testbed import World, load_world

SHOTS = (1, 2, 4, 8, 16)
SHOWN = (
    "GP ensemble",
    "zero-shot",
    "LR, concatenated",
    "LR per encoder, averaged",
    "Tip-Adapter",
    "CaFo-style fusion",
    "LP++, concatenated",
)


def run(output: Path, seed: int = 0) -> Table:
    """Measure, draw and write `summary.json`; returns the table. Three draws of training images from `seed` on."""
    world = load_world("digits")
    methods = {name: METHODS[name] for name in SHOWN} | {"GP, clip alone": single_encoder("clip")}
    seeds = range(seed, seed + 3)
    records = run_grid(world.draw, methods, shots=SHOTS, seeds=seeds, data="digits", elsewhere=world.elsewhere)
    table = summarise(records)
    table.title = f"Real digits, accuracy % on 600 images, mean of 3 draws of the training images from seed {seed}"
    gp = [r for r in records if r["method"] == "GP ensemble"]
    rows = [
        ["GP ensemble: calibration error", *[round(mean_of(gp, "ece", shots=s), 3) for s in SHOTS], "training images"],
        [
            "GP ensemble: AUROC of variance",
            *[round(mean_of(gp, "auroc_variance", shots=s), 3) for s in SHOTS],
            "no labels",
        ],
    ]
    table.rows = [*table.rows, *rows]
    pictures = [
        (_curves(records, output).name, "Accuracy by examples per class, and the calibration error of the same runs"),
        (
            _uncertainty(world, seed, output).name,
            "4 examples a class: confidence and accuracy; variance of strangers",
        ),
        (_explained(world, seed, output).name, "What the zero-shot prior and each encoder add for the winning class"),
    ]
    notes = [
        "The encoders were trained on rendered characters and drawn shapes only; no test image chose anything.",
        "Letters and shapes are images of another kind; the variance tells them apart without having seen one.",
    ]
    write_summary(output, "gp-ensemble", table, pictures, notes)
    return table


def _curves(records: list[dict[str, Any]], output: Path) -> Path:
    with figures.style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
        for axis, metric, factor in ((axes[0], "accuracy", 100), (axes[1], "ece", 1)):
            for name in dict.fromkeys(r["method"] for r in records):
                ours = name == "GP ensemble"
                values = [factor * mean_of(records, metric, method=name, shots=s) for s in SHOTS]
                style = {"color": figures.OURS, "linewidth": 2.6, "zorder": 5} if ours else {"linewidth": 1.4}
                axis.plot(SHOTS, values, marker="o", markersize=4, label=name, **style)
            axis.set_xscale("log", base=2)
            axis.set_xticks(SHOTS, [str(s) for s in SHOTS])
            axis.set_xlabel("examples per class")
        axes[0].set_title("accuracy, %")
        axes[1].set_title("expected calibration error (lower is better)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return figures.save(figure, output / "accuracy")


def _fitted(world: World, seed: int) -> tuple[GPEnsembleClassifier, Any]:
    train, test = world.draw(4, seed)
    return GPEnsembleClassifier().fit(train, train.labels), test


def _uncertainty(world: World, seed: int, output: Path) -> Path:
    model, test = _fitted(world, seed)
    y: Any = np.searchsorted(model.classes_, test.labels)
    proba = model.predict_proba(test)
    confidence, accuracy, count = metrics.reliability(proba, y, bins=10)
    with figures.style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
        axes[0].plot([0, 1], [0, 1], color="#999999", linewidth=1)
        axes[0].scatter(confidence, accuracy, s=12 + 500 * count / count.sum(), color=figures.OURS, alpha=0.85)
        axes[0].set(xlabel="confidence", xlim=(0, 1.02), ylim=(0, 1.05))
        axes[0].set_title(f"accuracy at each confidence (ECE {metrics.ece(proba, y):.3f}; area: share of images)")
        bins = np.linspace(0, 1, 41)
        axes[1].hist(model.ood_score(test), bins, density=True, alpha=0.8, color=figures.OURS, label="digits")
        for (name, table), colour in zip(world.elsewhere.items(), figures.PEERS, strict=False):
            axes[1].hist(model.ood_score(table), bins, density=True, alpha=0.6, color=colour, label=name)
        axes[1].set_title("posterior over prior variance")
        axes[1].set(xlabel="variance", ylabel="density")
        axes[1].legend()
        return figures.save(figure, output / "uncertainty")


def _explained(world: World, seed: int, output: Path) -> Path:
    """Two sure and right, two unsure, two wrong images, with the terms of the winning class's score."""
    model, test = _fitted(world, seed)
    y: Any = np.searchsorted(model.classes_, test.labels)
    proba, parts = model.predict_proba(test), model.contributions(test)
    guess: Any
    confidence: Any
    guess, confidence = proba.argmax(1), proba.max(1)
    wrong = np.flatnonzero(guess != y)
    order = np.argsort(confidence)
    chosen = [*order[-2:], *[i for i in order if guess[i] == y[i]][:2], *wrong[np.argsort(-confidence[wrong])][:2]]
    pictures = world.images[world.test_rows(seed)]
    with figures.style() as plt:
        figure, axes = plt.subplots(
            2, len(chosen), figsize=(2.0 * len(chosen), 4.4), height_ratios=[1, 1.1], squeeze=False
        )
        low = min(0.0, *(float(part[i, guess[i]]) for part in parts.values() for i in chosen))
        for column, i in zip(axes.T, chosen, strict=True):
            column[0].imshow(pictures[i], cmap="gray_r", vmin=0, vmax=1)
            column[0].set_axis_off()
            says = model.classes_[guess[i]]
            verdict = f"says {says}" if guess[i] == y[i] else f"says {says}, is {test.labels[i]}"
            column[0].set_title(f"{verdict}\np {confidence[i]:.2f}", fontsize=9)
            values = [float(part[i, guess[i]]) for part in parts.values()]
            column[1].barh(list(parts), values, color=[figures.PEERS[6], *[figures.OURS] * (len(parts) - 1)])
            column[1].set_xlim(low - 0.02, 0.75)
            column[1].invert_yaxis()
            column[1].tick_params(labelsize=8, labelleft=column[0] is axes[0, 0])
        return figures.save(figure, output / "explained")
