"""The command `lcmis-align`."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer
from tenfold_shared.cli import Device, Json, Output, Resume, Seed, Table, console, emit, make_app
from tenfold_shared.errors import UserError

app = make_app("lcmis-align", "Find the hidden concept that spoils a prompt, and draw what was asked (2408.00230).")

Model = Annotated[str, typer.Option(help="Pipeline: hub id, folder, testbed:trained or testbed:exact.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
ScorerName = Annotated[str, typer.Option("--scorer", help="clip:MODEL, vqa:MODEL, testbed:trained or testbed:exact.")]
JudgeName = Annotated[str | None, typer.Option("--judge", help="Scorer that decides whether an image is correct.")]
Threshold = Annotated[float, typer.Option(help="Score above which the judge says that a concept is there.")]
PlannerName = Annotated[str, typer.Option("--planner", help="rule, openai, hf or file.")]
PlannerModel = Annotated[str | None, typer.Option(help="Model of the openai or hf planner.")]
BaseUrl = Annotated[str, typer.Option(help="Server of the openai planner; its key is read from OPENAI_API_KEY.")]
Plans = Annotated[Path | None, typer.Option(help="Prompt file of the file planner.")]
Cache = Annotated[Path | None, typer.Option(help="JSON-lines file of the planner's answers.")]
Steps = Annotated[int, typer.Option(help="Inference steps.", min=1)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own when not given.")]
Negative = Annotated[str | None, typer.Option(help="Negative prompt.")]
Side = Annotated[int | None, typer.Option(help="Pixels; the pipeline's own when not given.")]
Batch = Annotated[int, typer.Option(help="Images drawn at a time.", min=1)]
SearchName = Annotated[str, typer.Option("--search", help="binary, golden, sweep or successive_halving.")]
Policy = Annotated[str, typer.Option(help="robust, or paper for the published loop.")]
Stage2 = Annotated[str, typer.Option(help="Second stage: full, second or auto.")]
Stage2Model = Annotated[str | None, typer.Option(help="Pipeline of the second stage, such as the SDXL refiner.")]
Normalise = Annotated[str | None, typer.Option(help="Calibrate scores: zscore or rank.")]
Tau = Annotated[float, typer.Option(help="What both scores must exceed.")]
PerImage = Annotated[bool, typer.Option("--per-image", help="A switch step for every seed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the number of denoiser calls and stop.")]
BASE_URL = "https://api.openai.com/v1"
CLIP = "clip:openai/clip-vit-base-patch32"


def _arguments(**given: Any) -> dict[str, Any]:
    names = {"guidance": "guidance_scale", "negative": "negative_prompt"}
    return {names.get(name, name): value for name, value in given.items() if value is not None}


def _cost(least: int, most: int, as_json: bool) -> None:
    record = {"denoiser_calls": most} if least == most else {"denoiser_calls_least": least, "denoiser_calls_most": most}
    emit(record, as_json)


@app.command(epilog='Example: lcmis-align plan "a tea cup of iced coke"')
def plan(
    prompt: Annotated[str, typer.Argument(help="The prompt to split.")],
    planner: PlannerName = "rule",
    planner_model: PlannerModel = None,
    base_url: BaseUrl = BASE_URL,
    plans: Plans = None,
    cache: Cache = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Split a prompt into its two concepts, in painting order, with the hidden one where it is known."""
    from lcmis_align import parts

    if dry_run:
        return _cost(0, 0, json)
    made = parts.planner(planner, model=planner_model, base_url=base_url, cache=cache, file=plans)
    emit(made.plan(prompt).record(), json)


@app.command(
    epilog='Example: lcmis-align generate "square of red" --model testbed:trained --scorer testbed:trained '
    "--guidance 1 --seeds 0-3 --output out/square"
)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; or a schedule such as [A:p:0.25] with --switch none.")],
    model: Model = "stabilityai/stable-diffusion-xl-base-1.0",
    switch: Annotated[
        str, typer.Option(help="Switch step, auto to search it, none to draw the text as it is.")
    ] = "auto",
    scorer: ScorerName = CLIP,
    planner: PlannerName = "rule",
    planner_model: PlannerModel = None,
    base_url: BaseUrl = BASE_URL,
    plans: Plans = None,
    cache: Cache = None,
    search: SearchName = "binary",
    policy: Policy = "robust",
    stage2: Stage2 = "full",
    stage2_model: Stage2Model = None,
    normalise: Normalise = None,
    tau: Tau = 0.72,
    per_image: PerImage = False,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, one image each: 0-7 or 1,5,9. --seed when not given.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = 40,
    guidance: Guidance = None,
    negative: Negative = None,
    height: Side = None,
    width: Side = None,
    batch_size: Batch = 4,
    output: Output = Path("out"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Draw one prompt: search the switch step, or take the one given."""
    from lcmis_align import batch, parts
    from lcmis_align.moce import MoCE, two_stages
    from lcmis_align.sampling.sampler import check_switch
    from lcmis_align.schedule import PromptSchedule
    from lcmis_align.search import Rules

    numbers = parts.seeds_of(str(seed) if seeds is None else seeds)
    arguments = _arguments(guidance=guidance, negative=negative, height=height, width=width)
    if switch != "auto":
        schedule = PromptSchedule.parse(prompt)
        if switch != "none":
            if not switch.isdigit():
                raise UserError(f"switch is {switch!r}, expected a number of steps, auto or none")
            made = parts.planner(planner, model=planner_model, base_url=base_url, cache=cache, file=plans).plan(prompt)
            chosen = "full" if stage2 == "auto" else stage2
            schedule = two_stages(made, check_switch(int(switch), steps), chosen)
        if dry_run:
            exact = len(numbers) * schedule.calls(steps)
            return _cost(exact, exact, json)
        pipe = parts.pipeline(model, device, dtype)
        images = schedule.run(pipe, seeds=numbers, num_inference_steps=steps, batch_size=batch_size, **arguments)
        calls = len(numbers) * schedule.calls(steps)
        files = batch.save_images(images, numbers, output, Path("images"))
        return emit({"schedule": str(schedule), "calls": calls, "files": files, "output": str(output)}, json)
    pipe = parts.pipeline(model, device, dtype)
    moce = MoCE(
        pipe, _NoScorer() if dry_run else parts.scorer(scorer, device), search=search, policy=policy, stage2=stage2,
        stage2_pipeline=parts.pipeline(stage2_model, device, dtype) if stage2_model else None, per_image=per_image,
        normalise=normalise, rules=Rules(tau=tau), batch_size=batch_size,
        planner=parts.planner(planner, model=planner_model, base_url=base_url, cache=cache, file=plans),
    )  # fmt: skip
    if dry_run:
        return _cost(*moce.estimate(len(numbers), steps), json)
    split = moce.plan(prompt)
    found = moce(split, seeds=numbers, num_inference_steps=steps, **arguments)
    record = batch.as_record(found, batch.save_images(found.images, numbers, output, Path("images")))
    (output / "result.json").write_text(jsonlib.dumps(record, indent=1) + "\n", encoding="utf-8")
    if json:
        return emit(record, True)
    columns = ["stage2", "k", "sA", "sB", "D", "joint", "latent", "calls"]
    title = f'"{prompt}": switch at {found.switch_step} of {steps}, {found.schedule}; images in {output}'
    emit(Table(title, columns, [[row[c] for c in columns] for row in found.trace]))


@app.command(
    epilog="Example: lcmis-align search --prompts prompt.json --model testbed:trained --scorer testbed:trained "
    "--guidance 1 --num-images 4 --output out/search --resume"
)
def search(
    prompts: Annotated[Path, typer.Option(help="Official prompt file, or a JSON(L) list of such records.")],
    model: Model = "stabilityai/stable-diffusion-xl-base-1.0",
    scorer: ScorerName = CLIP,
    judge: JudgeName = None,
    threshold: Threshold = 0.5,
    search_name: SearchName = "binary",
    policy: Policy = "robust",
    stage2: Stage2 = "full",
    stage2_model: Stage2Model = None,
    normalise: Normalise = None,
    tau: Tau = 0.72,
    per_image: PerImage = False,
    num_images: Annotated[int, typer.Option(help="Images per prompt.", min=1)] = 64,
    seed: Seed = 0,
    steps: Steps = 40,
    guidance: Guidance = None,
    negative: Negative = None,
    height: Side = None,
    width: Side = None,
    batch_size: Batch = 4,
    output: Output = Path("out"),
    export_pt: Annotated[bool, typer.Option("--export-pt", help="Also write the official result.pt.")] = False,
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Search the switch step of every prompt of a file; stands in for the official run.py."""
    from lcmis_align import batch, parts
    from lcmis_align.dataset import LCMisDataset
    from lcmis_align.moce import MoCE
    from lcmis_align.search import Rules

    data = LCMisDataset.from_json(prompts)
    pipe = parts.pipeline(model, device, dtype)
    moce = MoCE(
        pipe, _NoScorer() if dry_run else parts.scorer(scorer, device), search=search_name, policy=policy,
        stage2=stage2, stage2_pipeline=parts.pipeline(stage2_model, device, dtype) if stage2_model else None,
        per_image=per_image, normalise=normalise, rules=Rules(tau=tau), batch_size=batch_size,
    )  # fmt: skip
    if dry_run:
        least, most = moce.estimate(num_images, steps)
        return _cost(least * len(data), most * len(data), json)
    arguments = _arguments(guidance=guidance, negative=negative, height=height, width=width)
    settings = {
        "model": model, "scorer": scorer, "search": search_name, "policy": policy, "stage2": stage2,
        "stage2_model": stage2_model, "normalise": normalise, "tau": tau, "per_image": per_image, "judge": judge,
        "threshold": threshold, **arguments,
    }  # fmt: skip
    results = batch.search_all(
        moce, data, output, seeds=range(seed, seed + num_images), num_inference_steps=steps, resume=resume,
        judge_image=parts.judge(judge, threshold, device) if judge else None, settings=settings,
        progress=lambda key, record: console.print(f"{key}: switch at {record['switch_step']} of {steps}"), **arguments,
    )  # fmt: skip
    if export_pt:
        batch.export_pt(results, output / "result.pt")
    rows = [
        [
            r["prompt"],
            r["switch_step"],
            r["stage2"],
            r["scores"]["sA"],
            r["scores"]["sB"],
            r["scores"]["joint"],
            r["calls"],
        ]
        for r in results.values()
    ]
    columns = ["prompt", "switch", "stage2", "sA", "sB", "joint", "calls"]
    emit(results if json else Table(f"{len(rows)} prompts; results in {output}", columns, rows), json)


@app.command(
    epilog="Example: lcmis-align mine --pattern 'beverage, wrong container' --planner rule --n 2 --model testbed:trained "
    "--judge clip:openai/clip-vit-base-patch32 --threshold 0.6 --dry-run"
)
def mine(
    pattern: Annotated[str, typer.Option(help="Kind of pair, in words.")],
    model: Model = "stabilityai/stable-diffusion-xl-base-1.0",
    judge: JudgeName = "vqa:Qwen/Qwen2.5-VL-3B-Instruct",
    threshold: Threshold = 0.5,
    planner: PlannerName = "rule",
    planner_model: PlannerModel = None,
    base_url: BaseUrl = BASE_URL,
    plans: Plans = None,
    cache: Cache = None,
    n: Annotated[int, typer.Option(help="Pairs per round.", min=1)] = 15,
    rounds: Annotated[int, typer.Option(help="Rounds; the planner learns of the one before.", min=1)] = 1,
    num_images: Annotated[int, typer.Option(help="Images per pair.", min=1)] = 20,
    seed: Seed = 0,
    steps: Steps = 40,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    batch_size: Batch = 4,
    output: Output = Path("out"),
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Think of pairs of a pattern, draw each, judge the images, and rate the pair's level."""
    from lcmis_align import batch, mining, parts

    if dry_run:
        return _cost(0, rounds * n * num_images * steps, json)
    made = parts.planner(planner, model=planner_model, base_url=base_url, cache=cache, file=plans)
    pipe, judging = parts.pipeline(model, device, dtype), parts.judge(str(judge), threshold, device)
    settings = {
        "pattern": pattern, "model": model, "judge": judge, "threshold": threshold, "planner": planner, "steps": steps,
        "num_images": num_images, "seed": seed,
    }  # fmt: skip
    batch.begin(output, settings, resume=resume)
    found = mining.mine(
        made, pattern, pipe=pipe, judge_image=judging, n=n, rounds=rounds, images=num_images,
        seeds=range(seed, seed + num_images), output=output / "pairs.jsonl", num_inference_steps=steps,
        batch_size=batch_size, progress=lambda m: console.print(f"{m.prompt}: {m.correct} of {m.images}, level {m.level}"),
        **_arguments(guidance=guidance, height=height, width=width),
    )  # fmt: skip
    rows = [[m.prompt, m.correct, m.images, *m.interval, m.level] for m in found]
    emit(Table(f"{pattern}; pairs in {output}", ["prompt", "correct", "images", "low", "high", "level"], rows), json)


@app.command(epilog="Example: lcmis-align level out/search/results.json")
def level(
    results: Annotated[Path, typer.Argument(help="results.json of a judged search, or pairs.jsonl of mining.")],
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Count the pairs at each level, 1 (drawn well) to 5 (never), with 95 % intervals."""
    from lcmis_align.batch import read_levels

    if dry_run:
        return _cost(0, 0, json)
    report = read_levels(results)
    emit(Table(f"{len(report.levels)} prompts", ["level", "prompts", "share", "low", "high"], report.rows()), json)


@app.command(epilog="Example: lcmis-align bench --toy --num-images 50")
def bench(
    toy: Annotated[bool, typer.Option("--toy/--trained", help="The exact world, or the trained model.")] = True,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be given again.")] = None,
    num_images: Annotated[int, typer.Option(help="Images of each method.", min=1)] = 100,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Draw one misaligned prompt in every way there is, and judge each exactly."""
    from lcmis_align import testbed

    if dry_run:
        return _cost(*testbed.cost(num_images, method), json)
    outcomes = testbed.compare("exact" if toy else "trained", images=num_images, seed=seed, methods=method)
    columns = ["method", "A", "B", "both", "hidden", "calls", "switch", "stage2"]
    rows = [[o.method, o.a, o.b, o.both, o.latent, o.calls, o.switch_step, o.stage2 or None] for o in outcomes]
    emit(Table(f"{num_images} images each, denoiser calls per image", columns, rows), json)


@app.command(epilog="Example: lcmis-align train --seed 0 --steps 20 --output out/weights")
def train(
    output: Output = Path("out"),
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps; the shipped weights took 5000.", min=1)] = 5000,
    resume: Resume = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train the tiny misaligned model from nothing, as the shipped weights were made."""
    from lcmis_align.worlds import trained

    path = output / f"trained-{seed}.safetensors"
    if dry_run:
        return _cost(steps, steps, json)
    trained.train(path, seed=seed, steps=steps, resume=resume)
    emit({"weights": str(path), "bytes": path.stat().st_size, "seed": seed, "steps": steps}, json)


@app.command(epilog="Example: lcmis-align demo --output out")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
    """Draw a biased prompt as it is and repaired, with the curve over switch steps (about half a minute)."""
    from lcmis_align.demo import run

    emit(run(output, seed), json)
    if not json:
        console.print(f"pictures: {output / 'samples.png'}, {output / 'curve.png'}")


class _NoScorer:
    """Stands where a dry run scores nothing."""

    def score(self, images: Any, texts: Any) -> Any:
        raise UserError("a dry run scores nothing")
