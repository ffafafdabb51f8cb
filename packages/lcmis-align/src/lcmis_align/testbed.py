"""Every way of drawing a misaligned prompt, side by side, in a world where what is drawn can be told exactly.

The two worlds are `worlds.exact` (the best denoiser in closed form) and `worlds.trained` (a diffusion model with shipped
weights, trained by `lcmis-align train`). Both are real Stable Diffusion pipelines, and both judges are exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from tenfold_shared.errors import UserError

from lcmis_align.concepts import ConceptPlan
from lcmis_align.moce import MoCE, two_stages
from lcmis_align.schedule import PromptSchedule, Ramp
from lcmis_align.scorers import CallableScorer
from lcmis_align.worlds import exact, trained

STEPS = 40
WORLDS: dict[str, ModuleType] = {"exact": exact, "trained": trained}


@dataclass
class Outcome:
    """What one way of drawing gave: shares of images, and denoiser evaluations of one image."""

    method: str
    a: float
    b: float
    both: float
    latent: float
    """Share with the hidden concept in the place of the first one, and the second one there."""
    calls: float
    strict: float | None = None
    """Share with both and an image as close to an ideal one as the ordinary prompts' are (trained world)."""
    correct: int = 0
    images: int = 0
    switch_step: int | None = None
    stage2: str = ""


Draw = Callable[[Any, ConceptPlan, Sequence[int]], tuple[list[Any], float]]
"""From (pipeline, plan, seeds) to the images and the denoiser evaluations of one image."""


def by_schedule(schedule: Callable[[ConceptPlan], PromptSchedule], **arguments: Any) -> Draw:
    """Draw by a schedule made from the plan."""

    def draw(pipe: Any, plan: ConceptPlan, seeds: Sequence[int]) -> tuple[list[Any], float]:
        chosen = schedule(plan)
        settings: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "batch_size": 64, **arguments}
        if settings.get("negative_prompt") == "latent":
            settings["negative_prompt"] = plan.latent
        images = chosen.run(pipe, seeds=seeds, **settings)
        doubled = 2 if settings["guidance_scale"] > 1 else 1
        return images, chosen.calls(STEPS) * doubled

    return draw


def _ramp(plan: ConceptPlan, mix: str) -> PromptSchedule:
    return PromptSchedule([(Ramp(plan.first.name, plan.prompt), 0.5), (plan.prompt, 1.0)], mix=mix)


def _half(plan: ConceptPlan) -> PromptSchedule:
    return PromptSchedule.composed({plan.first.name: 0.5, plan.second.name: 0.5})


def _edited(when: float) -> Callable[[ConceptPlan], PromptSchedule]:
    return lambda plan: PromptSchedule([(plan.first.name, when), (plan.prompt, 1.0)])


def _plain(plan: ConceptPlan) -> PromptSchedule:
    return PromptSchedule([(plan.prompt, 1.0)])


SCHEDULES: dict[str, Callable[[ConceptPlan], PromptSchedule]] = {
    "plain": _plain,
    "prompt editing [A:p:0.25]": _edited(0.25),
    "prompt editing [A:p:0.3]": _edited(0.3),
    "prompt editing [A:p:0.5]": _edited(0.5),
    "alternation [A|p]": lambda plan: PromptSchedule([([plan.first.name, plan.prompt], 1.0)]),
    "ramp of embeddings": lambda plan: _ramp(plan, "embedding"),
    "ramp of scores": lambda plan: _ramp(plan, "score"),
    "composable A + B - empty": lambda plan: PromptSchedule.composed(
        {plan.first.name: 1.0, plan.second.name: 1.0, "": -1.0}
    ),
    "composable (A + B) / 2": _half,
    "negative prompt C, guidance 2": _plain,
    "guidance 1.5": _plain,
}
_GUIDED: dict[str, dict[str, Any]] = {
    "negative prompt C, guidance 2": {"guidance_scale": 2.0, "negative_prompt": "latent"},
    "guidance 1.5": {"guidance_scale": 1.5},
}
METHODS: dict[str, Draw] = {
    name: by_schedule(schedule, **_GUIDED.get(name, {})) for name, schedule in SCHEDULES.items()
}
SEARCHES: dict[str, dict[str, Any]] = {
    "MoCE, published search": {"policy": "paper"},
    "MoCE, default search": {},
    "MoCE, golden section": {"search": "golden"},
    "MoCE, successive halving": {"search": "successive_halving"},
    "MoCE, second stage B": {"stage2": "second"},
    "MoCE, second stage auto": {"stage2": "auto"},
    "MoCE, full sweep": {"search": "sweep"},
}


def attend_and_excite(pipe: Any, plan: ConceptPlan, seeds: Sequence[int]) -> tuple[list[Any], float]:
    """diffusers' own Attend-and-Excite over the same parts, both concepts' words excited, at its own settings.

    Its evaluations are counted: it refines each image until the words are attended to.
    """
    from diffusers import StableDiffusionAttendAndExcitePipeline

    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    other = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    words = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(plan.prompt).input_ids)
    indices = [words.index(plan.first.name), words.index(plan.second.name)]
    side, rows, images = pipe.unet.config.sample_size // 2, 0, []

    def count(module: Any, arguments: Any) -> None:
        nonlocal rows
        rows += len(arguments[0])

    handle = pipe.unet.register_forward_pre_hook(count)
    try:
        for seed in seeds:
            images += other(
                plan.prompt, token_indices=indices, num_inference_steps=STEPS, guidance_scale=1.0,
                generator=torch.Generator().manual_seed(seed), attn_res=(side, side),
            ).images  # fmt: skip
    finally:
        handle.remove()
    return images, rows / len(seeds)


def moce(pipe: Any, world: ModuleType, **options: Any) -> MoCE:
    """MoCE with the world's exact judge as the scorer."""
    return MoCE(pipe, CallableScorer(world.exact_scores), **{"batch_size": 64, **options})


def measure(
    world: ModuleType, method: str, images: list[Any], plan: ConceptPlan, calls: float, rmse: float | None = None
) -> Outcome:
    """Judge images exactly. rmse: the distance from an ideal image up to which one counts as strict (trained world)."""
    assert plan.latent is not None
    a, b, c = world.exact_scores(images, [plan.first.name, plan.second.name, plan.latent]).T.bool()

    def share(which: torch.Tensor) -> float:
        return int(which.sum()) / len(images)

    strict = share(a & b & (world.look(images).rmse <= rmse)) if rmse is not None else None
    return Outcome(
        method, share(a), share(b), share(a & b), share(c & b), calls, strict, int((a & b).sum()), len(images)
    )  # fmt: skip


def search_outcome(
    pipe: Any, world: ModuleType, plan: ConceptPlan, seeds: Sequence[int], method: str, **options: Any
) -> Outcome:
    """Search on `seeds` and judge the images that the search returns. options: of MoCE, above the method's own."""
    searched = moce(pipe, world, **{**SEARCHES[method], **options})
    result = searched(plan, seeds=seeds, num_inference_steps=STEPS, guidance_scale=1.0)
    outcome = measure(world, method, result.images, plan, result.calls / len(seeds))
    outcome.switch_step, outcome.stage2 = result.switch_step, result.stage2
    return outcome


def best_of(plain: float, calls: float, steps: int = STEPS) -> tuple[int, float]:
    """N plain images cost as much as the search; with a perfect judge, one of N is right at rate 1 - (1 - q)^N."""
    n = max(1, -(-round(calls) // steps))
    return n, 1 - (1 - plain) ** n


def at_step(pipe: Any, plan: ConceptPlan, seeds: Sequence[int], k: int, stage2: str = "full") -> list[Any]:
    """The images of a switch at step k."""
    return two_stages(plan, k, stage2).run(
        pipe, seeds=seeds, guidance_scale=1.0, num_inference_steps=STEPS, batch_size=64
    )  # fmt: skip


def ordinary(pipe: Any, images: int, seed: int = 0) -> tuple[float, float]:
    """Share of ordinary prompts that the trained model draws right, and the 95 % quantile of their distance from ideal."""
    right, distances = [], []
    prompts = [(shape, colour) for shape in trained.SHAPES for colour in trained.ORDINARY]
    for i, (shape, colour) in enumerate(prompts):
        seeds = [50_000 + 1000 * seed + images * i + j for j in range(images)]
        drawn = PromptSchedule([(f"{shape} of {colour}", 1.0)]).run(
            pipe, seeds=seeds, guidance_scale=1.0, num_inference_steps=STEPS, batch_size=64
        )
        right.append(trained.exact_scores(drawn, [shape, colour]).min(dim=1).values)
        distances.append(trained.look(drawn).rmse)
    return float(torch.cat(right).mean()), float(torch.cat(distances).quantile(0.95))


def compare(world_name: str, *, images: int, seed: int = 0, methods: Sequence[str] | None = None) -> list[Outcome]:
    """Every way of drawing, on one misaligned prompt of a world, `images` images each. The table of `lcmis-align bench`.

    Raises UserError for an unknown world or method, or images under 1.
    """
    if world_name not in WORLDS:
        raise UserError(f"world is {world_name!r}, expected one of {', '.join(WORLDS)}")
    if images < 1:
        raise UserError(f"images is {images}, expected 1 or more")
    known = [*METHODS, *SEARCHES]
    if unknown := [name for name in methods or [] if name not in known]:
        raise UserError(f"no method {unknown[0]!r}, there are {', '.join(known)}")
    world = WORLDS[world_name]
    pipe = world.load()
    plan = exact.plan("square") if world is exact else trained.plans()[2]
    seeds = [1000 * seed + i for i in range(images)]
    outcomes = []
    for name in methods or known:
        if name in METHODS:
            drawn, calls = METHODS[name](pipe, plan, seeds)
            outcomes.append(measure(world, name, drawn, plan, calls))
        else:
            outcomes.append(search_outcome(pipe, world, plan, seeds, name))
    return outcomes


def cost(images: int, methods: Sequence[str] | None = None) -> tuple[int, int]:
    """Least and most denoiser calls of `compare`."""
    plan, least, most = exact.plan("square"), 0, 0
    pipe = exact.load()
    for name in methods or [*METHODS, *SEARCHES]:
        if name in SEARCHES:
            low, high = moce(pipe, exact, **SEARCHES[name]).estimate(images, STEPS)
        else:
            low = high = images * SCHEDULES[name](plan).calls(STEPS) * (2 if name in _GUIDED else 1)
        least, most = least + low, most + high
    return least, most
