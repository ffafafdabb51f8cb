"""The report card: what a student is worth at each number of steps, against its own teacher."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tenfold_shared.cli import Table
from tenfold_shared.errors import UserError
from torch import Tensor

from mlcm.metrics import coverage, frechet_distance

Generate = Callable[[int], Tensor]
"""Number of steps to images (count, 3, height, width) in [0, 1]."""


def report_card(
    generate: Generate,
    reference: Tensor,
    *,
    steps: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
    features: Callable[[Tensor], Tensor],
    prompts: Sequence[str] = (),
    rewards: dict[str, Any] | None = None,
    inception: bool = False,
) -> Table:
    """One row per number of steps: Fréchet distance and coverage against the teacher's images, rewards, seconds an image.

    reference: the teacher's images for the same prompts. features: images to (count, dims). rewards: scorers by name.
    inception: also the usual FID, by torchmetrics (extra `metrics`, downloads its weights). Distances are to the teacher and
    not to real pictures: a data-free student is meant to follow its teacher.

    Raises UserError when there are fewer than 8 reference images, or they are not finite.
    """
    if len(reference) < 8:
        raise UserError(f"{len(reference)} reference images, expected 8 or more", hint="give more prompts")
    if not reference.isfinite().all():
        raise UserError("the teacher's images are not finite", hint="decode in float32: SDXL's VAE overflows in fp16")
    rewards = rewards or {}
    with torch.no_grad():
        wanted = features(reference).float().cpu()
        rows = [_row("teacher", reference, wanted, wanted, None, reference, features, prompts, rewards, inception)]
        for count in steps:
            started = time.perf_counter()
            images = generate(count)
            seconds = (time.perf_counter() - started) / len(images)
            found = features(images).float().cpu()
            rows.append(
                _row(str(count), images, found, wanted, seconds, reference, features, prompts, rewards, inception)
            )
    columns = ["steps", "Fréchet", "coverage", *rewards, *(["FID"] if inception else []), "seconds an image"]
    return Table("Report card, against the teacher's images", columns, rows)


def _row(
    name: str, images: Tensor, found: Tensor, wanted: Tensor, seconds: float | None, reference: Tensor,
    features: Callable[[Tensor], Tensor], prompts: Sequence[str], rewards: dict[str, Any], inception: bool,
) -> list[Any]:  # fmt: skip
    itself = name == "teacher"
    scores = [float(reward(images, list(prompts)).mean()) for reward in rewards.values()]
    apart = None if itself else frechet_distance(wanted, found)
    covered = None if itself else coverage(wanted, found, neighbours=min(5, len(wanted) - 1))
    fid = [None if itself else _fid(reference, images)] if inception else []
    return [name, apart, covered, *scores, *fid, seconds]


def _fid(reference: Tensor, images: Tensor) -> float:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(normalize=True)
    except (ImportError, ModuleNotFoundError, OSError) as error:
        raise UserError(
            "FID needs torchmetrics and its Inception weights", hint="pip install 'mlcm[metrics]', with a network"
        ) from error
    metric.update(reference.cpu(), real=True)
    metric.update(images.cpu(), real=False)
    return float(metric.compute())


def pipeline_images(
    pipe: Any, prompts: Sequence[str], steps: int, *, guidance_scale: float, seed: int, batch: int = 8
) -> Tensor:
    """Images (count, 3, height, width) in [0, 1] of a pipeline, one per prompt, each from its own seed."""
    images = []
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
        answer = pipe(
            texts, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, output_type="pt"
        )
        images.append(answer.images.float().cpu())
    return torch.cat(images)


def small_pixels(images: Tensor) -> Tensor:
    """Features that need no network: pixels averaged to 8 x 8, (count, 192)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
