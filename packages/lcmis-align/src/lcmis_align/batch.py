"""Searching every prompt of a prompt file, one after the other, so that a stopped run goes on where it was.

The folder holds `run.json` (versions and settings), `results.json` (one record per prompt, written after each),
`trace.csv` (one row per probe) and the images.
"""

import csv
import json
import platform
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tenfold_shared.hub import replace_atomically

from lcmis_align.dataset import LCMisDataset
from lcmis_align.errors import DataError
from lcmis_align.levels import Judge, LevelReport, judge
from lcmis_align.moce import MoCE, MoCEResult

COLUMNS = ("key", "stage2", "k", "sA", "sB", "D", "joint", "latent", "images", "calls", "seconds")
SCHEMA = ("prompt", "switch_step", "ratio", "stage2", "scores", "calls", "steps", "seeds", "schedule", "files", "trace")
"""Fields of every record of results.json; `latent`, and `correct` with `images`, are there where they are known."""


def search_all(
    moce: MoCE, prompts: LCMisDataset, output: Path, *, seeds: Sequence[int], num_inference_steps: int = 40,
    resume: bool = False, judge_image: Judge | None = None, settings: dict[str, Any] | None = None,
    progress: Callable[[str, dict[str, Any]], Any] | None = None, **arguments: Any,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Search each prompt and return the records by key.

    resume: keep what `output` holds of the same settings, and search only what is missing. judge_image: counts the
    images that show both concepts, for `lcmis-align level`. settings: put down in run.json.

    Raises DataError when `output` holds results and `resume` is off, or they are of other settings.
    """
    path = output / "results.json"
    settings = {**(settings or {}), "steps": num_inference_steps, "seeds": list(seeds)}
    begin(output, settings, resume=resume)
    results: dict[str, dict[str, Any]] = read_results(path) if path.exists() else {}
    for i, (key, plan) in enumerate(zip(prompts.keys, prompts.plans, strict=True)):
        if key in results:
            continue
        found = moce(plan, seeds=seeds, num_inference_steps=num_inference_steps, **arguments)
        # A key may hold anything; the folder's name is our own.
        folder = Path("images") / f"{i:04d}-{re.sub(r'[^a-z0-9]+', '-', plan.prompt.lower())[:40].strip('-')}"
        record = as_record(found, save_images(found.images, seeds, output, folder))
        if judge_image is not None:
            record |= {"correct": sum(judge(found.images, plan, judge_image)), "images": len(found.images)}
        results[key] = record
        _write_json(path, results)
        write_trace(output / "trace.csv", results)
        if progress is not None:
            progress(key, record)
    return results


def as_record(found: MoCEResult, files: list[str]) -> dict[str, Any]:
    """What results.json keeps of a search."""
    return {
        "prompt": found.plan.prompt, "switch_step": found.switch_step, "ratio": found.switch_step / found.steps,
        "stage2": found.stage2, "scores": found.scores, "calls": found.calls, "steps": found.steps,
        "seeds": found.seeds, "switch_steps": found.switch_steps, "schedule": str(found.schedule),
        "latent": found.plan.latent, "files": files, "trace": found.trace,
    }  # fmt: skip


def begin(output: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Write run.json, or check that the one there is of the same settings."""
    path = output / "run.json"
    if path.exists():
        before = _read_json(path).get("settings")
        if not resume:
            raise DataError(f"{output} holds a run already", hint="pass --resume to go on with it, or another --output")
        if before != json.loads(json.dumps(settings)):
            names = sorted(
                name for name in {*settings, *(before or {})} if (before or {}).get(name) != settings.get(name)
            )
            raise DataError(
                f"{output} holds a run of other settings ({', '.join(names)})", hint="pass another --output"
            )
        return
    versions = {name: version(name) for name in ("lcmis-align", "torch", "diffusers", "transformers")}
    _write_json(path, {"settings": settings, "versions": versions, "python": platform.python_version()})


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a results.json. Raises DataError when it is none."""
    results = _read_json(path)
    if not isinstance(results, dict) or not all(isinstance(r, dict) and "prompt" in r for r in results.values()):
        raise DataError(f"{path} is no results file", hint="pass the results.json of a search")
    return results


def read_levels(path: Path) -> LevelReport:
    """Levels from a results.json with judged images, or from the pairs.jsonl of mining.

    Raises DataError when images were not judged.
    """
    from lcmis_align.mining import read_mined, report

    if not path.is_file():
        raise DataError(f"{path} does not exist", hint="pass a results.json or a pairs.jsonl")
    if path.suffix == ".jsonl":
        mined = read_mined(path)
        if not mined:
            raise DataError(f"{path} is empty")
        return report(mined)
    records = list(read_results(path).values())
    if not records or any("correct" not in record for record in records):
        raise DataError(f"{path} holds no judged images", hint="search with --judge")
    return LevelReport(
        [r["prompt"] for r in records], [r["correct"] for r in records], [r["images"] for r in records]
    )  # fmt: skip


def export_pt(results: dict[str, dict[str, Any]], path: Path) -> Path:
    """Write the official result file, `{prompt: [ratio, s1, s2]}`, which `torch.load` reads."""
    import torch

    official = {r["prompt"]: [r["ratio"], r["scores"]["sA"], r["scores"]["sB"]] for r in results.values()}
    with replace_atomically(path) as partial:
        torch.save(official, partial)
    return path


def save_images(images: Sequence[Any], seeds: Sequence[int], output: Path, folder: Path) -> list[str]:
    """Write images as `folder`/<seed>.png under `output`; returns their paths relative to it."""
    (output / folder).mkdir(parents=True, exist_ok=True)
    names = [str(folder / f"{seed}.png") for seed in seeds]
    for image, name in zip(images, names, strict=True):
        with replace_atomically(output / name) as partial:
            image.save(partial, format="PNG")
    return names


def write_trace(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """One row per probe of all prompts."""
    with replace_atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for key, record in results.items():
            writer.writerows({"key": key, **row} for row in record["trace"])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON ({error})") from error


def _write_json(path: Path, value: Any) -> None:
    with replace_atomically(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
