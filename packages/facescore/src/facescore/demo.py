"""The demo: a reward trained on inpainted faces ranks faces and says why; the tiny diffusion model before and after."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold_shared import figures
from tenfold_shared.cli import Table, write_summary
from torch import Tensor

from facescore.evaluation.statistics import roc_auc
from facescore.images import normalise
from facescore.pairs.builder import InpaintPairBuilder
from facescore.pairs.dataset import TensorPairs
from facescore.refine.tuner import FaceTuner
from facescore.reward.model import RewardModel
from facescore.reward.scorer import FaceScorer
from facescore.reward.training import RewardConfig, RewardTrainer
from facescore.testbed import (
    DEFECTS,
    PROMPTS,
    DrawnFacePipeline,
    Templates,
    base_pipeline,
    plain_box,
    plain_reward,
    to_pil,
    to_tensor,
)


def run(
    output: Path, seed: int, *, pairs: int = 1024, reward_steps: int = 250, tune_steps: int = 20, samples: int = 64
) -> Table:
    """Run the demo; returns the table and leaves `summary.json`, `ranking.png` and `samples.png` in `output`."""
    templates, pipe = Templates.all(), base_pipeline()
    made = inpainted_pairs(pipe, pairs, seed=seed)
    torch.manual_seed(seed)
    reward = plain_reward()
    config = RewardConfig(
        lr=1e-3, epochs=999, max_steps=reward_steps, batch_size=32, fix_rate=0.0, validation=0.12, evaluate_every=20,
        noise=1.2, dropout=False, warmup=10, l2_reward=1e-3, seed=seed,
    )  # fmt: skip
    report = RewardTrainer(reward, made, config).train()
    before = _sample(pipe, PROMPTS[0], samples, seed)
    FaceTuner(
        pipe, made.select(range(min(60, len(made)))), method="guidance", outside_weight=0.2, steps=tune_steps, lr=3e-4,
        batch_size=12, lora_rank=None, seed=seed,
    ).train()  # fmt: skip
    after = _sample(pipe, PROMPTS[0], samples, seed)
    houses = _sample(pipe, PROMPTS[1], samples // 2, seed)
    rows: list[list[Any]] = []
    for name, pixels in (("before", before), ("after", after)):
        kinds, distance = templates.judge(pixels)
        rows.append([name, float((kinds == 0).mean()), float(distance.mean()), float(_scores(reward, pixels).mean())])
    table = Table(
        f"{samples} faces of the tiny diffusion model, {tune_steps} updates of guidance",
        ["model", "share of good faces (judge)", "distance to a flawless face", "mean face score"],
        rows,
    )
    kinds = templates.judge(before)[0]
    scores = _scores(reward, before)
    auc = roc_auc(scores[kinds == 0], scores[kinds != 0]) if 0 < (kinds == 0).sum() < len(kinds) else float("nan")
    _ranking(reward, before, kinds, output)
    _samples(before, after, [row[1] for row in rows], output)
    intact = float((templates.judge(houses)[0] == -1).mean())
    write_summary(
        output,
        "facescore",
        table,
        [
            (
                "ranking.png",
                "Faces of the base model from the best score to the worst, the judge's word, and the saliency",
            ),
            (
                "samples.png",
                "The same noise drawn before and after the refinement; red frames are the judge's bad faces",
            ),
        ],
        [
            f"The reward saw {len(made)} inpainted pairs; its validation accuracy is {report.best_accuracy:.2f}. On new faces "
            f"of the base model it puts a good one above a bad one {auc:.0%} of the time.",
            f"Of {samples // 2} pictures asked for as houses, {intact:.0%} still are houses after the refinement.",
            "The judge compares with the list of all drawings there are; neither the reward nor the refinement sees it.",
        ],
    )
    return table


def inpainted_pairs(pipe: DrawnFacePipeline, n: int, *, seed: int, grain: float = 0.0) -> TensorPairs:
    """About n pairs of clean plain faces and what the pipeline makes of them. grain: see `InpaintPairBuilder`."""
    templates, rng = Templates.all(), np.random.default_rng(seed)
    rows = rng.choice(np.flatnonzero(templates.kinds == 0), n)
    images = to_pil(templates.pixels(rows))
    items = [
        {"id": f"{i:04d}", "image": image, "prompt": PROMPTS[0], "boxes": [plain_box(int(row) % 4)]}
        for i, (image, row) in enumerate(zip(images, rows, strict=True))
    ]
    builder = InpaintPairBuilder(
        pipe, "full-image", min_face=8, missing="ignore", seed=seed, batch_size=64, enlarge=0.95, grain=grain,
        options={"num_inference_steps": 12},
    )  # fmt: skip
    made = list(builder.pairs(items))
    win, lose = (to_tensor([getattr(p, side) for p in made]) for side in ("win", "lose"))
    masks = torch.stack([torch.from_numpy(np.array(p.mask)).float()[None] / 255 for p in made])
    return TensorPairs(win, lose, sources=[p.record.source for p in made], masks=masks)


def _sample(pipe: DrawnFacePipeline, prompt: str, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.stack(pipe([prompt] * n, output_type="pt", generator=generator).images)


@torch.no_grad()
def _scores(reward: RewardModel, pixels: Tensor) -> np.ndarray:
    return reward(normalise(pixels)).numpy()


def _ranking(reward: RewardModel, pixels: Tensor, kinds: np.ndarray, output: Path) -> None:
    scores = _scores(reward, pixels)
    order = np.argsort(-scores)[np.linspace(0, len(scores) - 1, 10).round().astype(int)]
    saliency = FaceScorer(reward, "full-image").saliency(normalise(pixels[order])).numpy()
    with figures.style() as plt:
        figure, axes = plt.subplots(2, 10, figsize=(12, 3.1))
        for i, row in enumerate(order):
            axes[0, i].imshow(pixels[row].permute(1, 2, 0), vmin=0, vmax=1)
            name = "house" if kinds[row] < 0 else DEFECTS[kinds[row]]
            axes[0, i].set_title(f"{scores[row]:+.2f}\n{name}", fontsize=8, loc="center")
            axes[1, i].imshow(saliency[i], cmap="magma")
            for axis in axes[:, i]:
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
        axes[0, 0].set_ylabel("face")
        axes[1, 0].set_ylabel("saliency")
        figures.save(figure, output / "ranking")


def _samples(before: Tensor, after: Tensor, shares: list[float], output: Path) -> None:
    templates = Templates.all()
    with figures.style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.8))
        panels = (("before", before, shares[0]), ("after", after, shares[1]))
        for axis, (name, pixels, share) in zip(axes, panels, strict=True):
            shown = pixels[:36].clone()
            bad = templates.judge(shown)[0] != 0
            framed = torch.nn.functional.pad(shown, (1, 1, 1, 1), value=1.0)
            for i in np.flatnonzero(bad):
                colour = torch.tensor([0.76, 0.26, 0.18])[:, None]
                framed[i, :, 0, :] = framed[i, :, -1, :] = colour
                framed[i, :, :, 0] = framed[i, :, :, -1] = colour
            columns = 6
            lines = [torch.cat(list(framed[i : i + columns]), 2) for i in range(0, len(framed) - columns + 1, columns)]
            axis.imshow(torch.cat(lines, 1).permute(1, 2, 0))
            axis.set_title(f"{name}: the judge finds {share:.0%} good")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
        figures.save(figure, output / "samples")
