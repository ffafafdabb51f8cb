"""The main job on the testbed: a small Mixtral is trained, gets null experts, and learns where it needs fewer."""

from pathlib import Path
from typing import Any

import torch
from tenfold_shared import figures
from tenfold_shared.cli import Table, write_summary
from torch import Tensor

from adamoe.calibration import calibrate
from adamoe.config import AdaMoEConfig
from adamoe.conversion import convert, revert
from adamoe.flops import flops_reduction
from adamoe.records import record_load
from adamoe.rendering import to_figure, to_html
from adamoe.testbed import KINDS, fine_tune, pretrain, score, symbols

TARGETS = (1.75, 1.5, 1.25, 1.0, 0.75)


def run(output: Path, seed: int = 0, *, steps: int = 600) -> Table:
    """Train, convert, fine-tune, calibrate, draw and write `summary.json`; returns the table.

    steps: of pre-training; a third as many for each fine-tuning.
    """
    model, language = pretrain(seed, steps)
    changed = language.changed(seed)
    tokens, _ = changed.batch(2, 64, torch.Generator().manual_seed(seed))
    difference = conversion_difference(model, tokens)
    tuned = {
        "top-2": fine_tune(model, changed, AdaMoEConfig(num_null_experts=0), seed=seed, steps=steps // 3),
        "AdaMoE (8 nulls, top-3)": fine_tune(model, changed, AdaMoEConfig(), seed=seed, steps=steps // 3),
    }
    scores = {name: score(m, changed, seed=seed) for name, m in tuned.items()}
    adaptive = tuned["AdaMoE (8 nulls, top-3)"]
    with record_load(adaptive, token_ids=tokens) as record, torch.no_grad():
        adaptive(tokens)
    page = output / "load.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    words = [[symbols()[t] for t in row] for row in tokens.tolist()]
    page.write_text(
        to_html(words, record.per_token.float().mean(0).tolist(), "True experts per token"), encoding="utf-8"
    )
    picture = to_figure(
        words,
        record.per_token,
        output / "load",
        titles=[f"layer {i + 1}: mean {v:.2f}" for i, v in enumerate(record.by_layer())],
    )
    calibration = changed.batch(64, 64, torch.Generator().manual_seed(seed + 1))[0]
    for target in TARGETS:
        calibrate(adaptive, [calibration], target_load=target)
        scores[f"the same, calibrated to {target:g}"] = score(adaptive, changed, seed=seed)
    config = adaptive.config
    columns = ["model", "load", "easy", "hard", "random", "FLOPs saved %", "loss", "hard accuracy %"]
    rows = [
        [
            name, round(s["load"], 3), *(round(s[f"load {kind}"], 2) for kind in ("easy", "hard", "random")),
            round(100 * flops_reduction(config, s["load"], num_null_experts=0 if name == "top-2" else 8, seq_len=64), 1),
            round(s["ce"], 4), round(100 * s["accuracy hard"], 1),
        ]
        for name, s in scores.items()
    ]  # fmt: skip
    table = Table(f"Mixed-difficulty language, seed {seed}: true experts per token, cost and quality", columns, rows)
    curve = _curve(scores, config, output)
    notes = [
        f"Conversion changed no logit by more than {difference:.1e}.",
        "Letters follow a cycle (easy), the fourth sign after an operator is a memorised fact (hard), operands are random.",
        "The calibrated rows are the one checkpoint with one number added to the nulls' scores.",
    ]
    captions = [
        (picture.name, "Two sequences, coloured by how many true experts each token got"),
        (curve.name, "Multiply-adds saved against loss, from one fine-tuned checkpoint"),
    ]
    write_summary(output, "adamoe", table, captions, notes)
    return table


def conversion_difference(model: Any, tokens: Tensor) -> float:
    """Largest change of a logit by converting with copied nulls and the K that preserves the function."""
    with torch.no_grad():
        before = model(tokens).logits
        convert(model)
        difference = float((model(tokens).logits - before).abs().max())
    revert(model)
    return difference


def _curve(scores: dict[str, dict[str, float]], config: Any, output: Path) -> Path:
    with figures.style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
        for name, s in scores.items():
            ours = name != "top-2"
            nulls = 8 if ours else 0
            saved = 100 * flops_reduction(config, s["load"], num_null_experts=nulls, seq_len=64)
            trained = "calibrated" not in name
            axes[0].scatter(
                saved, s["ce"], s=70 if trained else 30, color=figures.OURS if ours else figures.PEERS[0], zorder=3
            )
            axes[0].annotate(
                f"load {s['load']:.2f}",
                (saved, s["ce"]),
                textcoords="offset points",
                xytext=(0, -15 if trained else 8),
                ha="center",
                fontsize=8,
            )
        axes[0].margins(0.12, 0.2)
        axes[0].set(xlabel="multiply-adds saved, %", ylabel="cross-entropy", title="cost and loss (large: as trained)")
        names = list(scores)[:2]
        for i, (name, tint) in enumerate(zip(names, (figures.PEERS[0], figures.OURS), strict=True)):
            values = [scores[name][f"load {kind}"] for kind in KINDS]
            axes[1].bar([x + 0.4 * i for x in range(len(KINDS))], values, 0.36, color=tint, label=name)
        axes[1].set_xticks([x + 0.2 for x in range(len(KINDS))], KINDS)
        axes[1].set(ylabel="true experts per token", title="what is to be predicted")
        axes[1].legend(loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=2)
        return figures.save(figure, output / "cost")
