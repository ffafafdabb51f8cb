"""Pipelines, scorers, judges and planners by the names that the command line takes."""

from pathlib import Path
from typing import Any

from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError

from lcmis_align.levels import Judge, ScoreJudge


def pipeline(name: str, device: str = "auto", dtype: str = "auto") -> Any:
    """`testbed:exact`, `testbed:trained`, a folder, or a hub id.

    dtype: auto (half precision on an accelerator), float32, float16 or bfloat16.

    Raises UserError when there is no such model or device.
    """
    import torch

    place = pick_device(device)
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in ("auto", *kinds):
        raise UserError(f"dtype is {dtype!r}, expected auto, {', '.join(kinds)}")
    if name.startswith("testbed:"):
        return world(name).load().to(place)
    from tenfold_shared.hub import load_pipeline

    wanted = kinds.get(dtype, torch.float32 if place.type == "cpu" else torch.float16)
    pipe = load_pipeline(name, torch_dtype=wanted).to(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def world(name: str) -> Any:
    """The module of `testbed:exact` or `testbed:trained`."""
    from lcmis_align.worlds import exact, trained

    worlds = {"testbed:exact": exact, "testbed:trained": trained}
    if name not in worlds:
        raise UserError(f"there is no {name!r}", hint=f"there are {', '.join(worlds)}")
    return worlds[name]


def scorer(name: str, device: str = "auto") -> Any:
    """`testbed:exact`, `testbed:trained` (their exact judges), `clip:ID` or `vqa:ID`, ID being a folder or a hub id."""
    from lcmis_align.scorers import CallableScorer, CLIPScorer, VQAScorer

    if name.startswith("testbed:"):
        return CallableScorer(world(name).exact_scores)
    kind, _, model = name.partition(":")
    kinds: dict[str, Any] = {"clip": CLIPScorer, "vqa": VQAScorer}
    if kind not in kinds or not model:
        raise UserError(f"scorer is {name!r}, expected clip:MODEL, vqa:MODEL or testbed:WORLD")
    return kinds[kind].from_pretrained(model, device=str(pick_device(device)))


def judge(name: str, threshold: float, device: str = "auto") -> Judge:
    """A judge by a scorer: an image is correct when both concepts score above `threshold`."""
    return ScoreJudge(scorer(name, device), threshold)


def planner(
    name: str, *, model: str | None = None, base_url: str = "https://api.openai.com/v1",
    cache: Path | None = None, file: Path | None = None,
) -> Any:  # fmt: skip
    """`rule`, `openai` (any compatible server), `hf` (a chat model here) or `file`.

    Raises UserError when what it takes is not given.
    """
    from lcmis_align import planners

    if name == "rule":
        return planners.RulePlanner()
    if name == "file":
        if file is None:
            raise UserError("the file planner needs a prompt file", hint="pass --plans FILE")
        return planners.FilePlanner(file)
    if name not in ("openai", "hf"):
        raise UserError(f"planner is {name!r}, expected rule, openai, hf or file")
    if model is None:
        raise UserError(f"the {name} planner needs a model", hint="pass --planner-model NAME")
    if name == "openai":
        return planners.OpenAICompatiblePlanner(base_url, model, cache=cache)
    return planners.TransformersPlanner(model, cache=cache)


def seeds_of(text: str) -> list[int]:
    """ "0-7" or "1,5,9-11" as numbers.

    Raises UserError when it is neither.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"seeds are {text!r}, expected numbers and ranges such as 0-7 or 1,5,9")
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise UserError(f"seeds are {text!r}, the range is empty")
    return found
