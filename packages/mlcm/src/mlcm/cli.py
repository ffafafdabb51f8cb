"""The command line: parses, calls, prints."""

from pathlib import Path
from typing import Annotated

import typer
from tenfold_shared.cli import Device, Json, Output, Resume, Seed, Table, emit, make_app
from tenfold_shared.errors import UserError

app = make_app("mlcm", "One few-step student for 2 to 8 sampling steps, distilled without data.")
Model = Annotated[str, typer.Argument(help="Hub id or folder of a Stable Diffusion or SDXL pipeline.")]
Config = Annotated[Path, typer.Option(help="YAML file: model, prompts, and any setting of MLCMConfig.", dir_okay=False)]
Prompts = Annotated[Path, typer.Option(help="Text file, one prompt a line.", dir_okay=False)]
LoraPath = Annotated[
    Path | None, typer.Option("--lora", help="LoRA file or folder; a checkpoint of mlcm train is one.")
]
STAGES = ("1", "2", "reward", "adversarial")


@app.command(epilog="Example: mlcm demo --output out")
def demo(
    output: Output = Path("out"), seed: Seed = 0, json: Json = False,
    iterations: Annotated[int, typer.Option(help="Training steps of each method on the mixture.", min=1)] = 500,
) -> None:  # fmt: skip
    """Distil on an exact mixture and draw digits with the shipped student, offline."""
    from mlcm.demo import run

    table = run(output, seed, iterations=iterations)
    emit(table, json)
    if not json:
        typer.echo(f"pictures: {output / 'mixture.png'}, {output / 'digits.png'}", err=True)


@app.command(epilog="Example: mlcm tiny --output tiny && mlcm sample tiny 'a red ball' --steps 2 --output images")
def tiny(
    output: Output, xl: Annotated[bool, typer.Option(help="SDXL in place of Stable Diffusion.")] = False,
    seed: Seed = 0, json: Json = False,
) -> None:  # fmt: skip
    """Save a tiny random pipeline, a CLIP model, a prompt file and a config: for trying every other command offline."""
    from mlcm.testbed import tiny_clip, tiny_pipeline

    tiny_pipeline(xl=xl, seed=seed).save_pretrained(output)
    tiny_clip(output / "clip")
    prompts = [f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("ball", "cube", "cat")]
    (output / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    settings = (
        "model: .\nprompts: prompts.txt\nguidance_scale: 3.0\nlora_rank: 4\nbatch_size: 2\nreward_model: clip\nreward_margin: 1.0\n"
        "stage1_steps: 4\nstage2_steps: 4\nreward_steps: 4\nadversarial_steps: 2\ncheckpoint_every: 2\n"
    )
    (output / "config.yaml").write_text(settings, encoding="utf-8")
    names = {"pipeline": output, **{name: output / name for name in ("clip", "prompts.txt", "config.yaml")}}
    emit({name: str(path) for name, path in names.items()}, json)


@app.command(epilog="Example: mlcm tiny --output tiny && mlcm train --config tiny/config.yaml --stage 1 --output run")
def train(
    config: Config,
    output: Output = Path("mlcm-run"),
    stage: Annotated[
        list[str] | None, typer.Option(help="1, 2, reward, adversarial; repeat it. Default: 1 and 2.")
    ] = None,
    resume: Resume = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a LoRA without data. On several GPUs: accelerate launch -m mlcm train ..."""
    from mlcm.config import read_config
    from mlcm.runs import train_pipeline

    stages = stage or ["1", "2"]
    if unknown := [s for s in stages if s not in STAGES]:
        raise UserError(f"stage is '{unknown[0]}', expected one of {', '.join(STAGES)}")
    checkpoint, main = train_pipeline(read_config(config), output, stages=stages, resume=resume, device=device)
    if main:
        emit({"checkpoint": str(checkpoint), "load it with": f"pipe.load_lora_weights('{checkpoint}')"}, json)


@app.command(
    epilog="Example: mlcm tiny --output tiny && mlcm trajectories --config tiny/config.yaml --entries 16 --output bank"
)
def trajectories(
    config: Config,
    output: Output = Path("trajectories"),
    entries: Annotated[int, typer.Option(help="How many noises.", min=1)] = 1024,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Solve the teacher's trajectories once; name the folder as `trajectories:` in the config."""
    from mlcm.config import read_config
    from mlcm.runs import compute_bank

    bank = compute_bank(read_config(config), entries=entries, device=device)
    bank.save(output)
    emit({"folder": str(output), "entries": len(bank), "milestones": list(bank.milestones)}, json)


@app.command(epilog="Example: mlcm tiny --output tiny && mlcm sample tiny 'a red ball' --steps 4 --output images")
def sample(
    model: Model,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    steps: Annotated[int, typer.Option(help="Network calls, 1 to the number of segments.")] = 4,
    lora: LoraPath = None,
    sampler: Annotated[str, typer.Option(help="renoise, ddim or gamma.")] = "renoise",
    gamma: Annotated[float, typer.Option(help="Noise of the gamma sampler, 0 to 1.")] = 0.3,
    segments: Annotated[int | None, typer.Option(help="Segments of training; the checkpoint's own, else 8.")] = None,
    guidance_scale: Annotated[float, typer.Option(help="0 or 1: guidance is distilled into the student.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    output: Output = Path("out"),
    json: Json = False,
) -> None:
    """Draw images with a student."""
    from mlcm.runs import sample_images

    files = sample_images(
        model, prompt, output, steps=steps, lora=lora, sampler=sampler, gamma=gamma, segments=segments,
        guidance_scale=guidance_scale, seed=seed, device=device,
    )  # fmt: skip
    emit(Table("", ["prompt", "file"], list(zip(prompt, map(str, files), strict=True))), json)


@app.command(
    "eval", epilog="Example: mlcm tiny --output tiny && mlcm eval tiny --prompts tiny/prompts.txt --teacher-steps 4"
)
def evaluate(
    model: Model,
    prompts: Prompts,
    lora: LoraPath = None,
    steps: Annotated[list[int] | None, typer.Option(help="Numbers of steps; default 1 to the segments.")] = None,
    segments: Annotated[int | None, typer.Option(help="Segments of training; the checkpoint's own, else 8.")] = None,
    sampler: Annotated[str, typer.Option(help="renoise, ddim or gamma.")] = "renoise",
    guidance_scale: Annotated[float, typer.Option(help="Of the teacher.")] = 8.0,
    teacher_steps: Annotated[int, typer.Option(help="DDIM steps of the teacher.", min=1)] = 25,
    clip: Annotated[str | None, typer.Option(help="CLIP model for features and CLIP score; pixels without it.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="pickscore, aesthetic, hpsv2, image-reward; NAME=MODEL for another.")
    ] = None,
    fid: Annotated[bool, typer.Option("--fid", help="Also the usual FID (downloads Inception's weights).")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """The report card per number of steps, against the teacher's own images for the same prompts."""
    from mlcm.runs import evaluate_pipeline

    table = evaluate_pipeline(
        model, prompts, lora=lora, steps=steps, segments=segments, sampler=sampler, guidance_scale=guidance_scale,
        teacher_steps=teacher_steps, clip=clip, rewards=reward or [], fid=fid, seed=seed, device=device,
    )  # fmt: skip
    emit(table, json)


@app.command(epilog="Example: mlcm convert run/checkpoint --to kohya --output lora")
def convert(
    source: Annotated[
        str, typer.Argument(help="peft folder of the authors (or its hub id), or a diffusers or kohya LoRA.")
    ],
    to: Annotated[str, typer.Option(help="diffusers, kohya or peft.")] = "diffusers",
    output: Output = Path("lora"),
    alpha: Annotated[float | None, typer.Option(help="lora_alpha of a peft folder, in place of its own.")] = None,
    json: Json = False,
) -> None:
    """Convert a LoRA, with its scale baked in."""
    from mlcm.lora import export_lora, load_lora, load_official_lora

    is_file = (
        Path(source).exists()
        and not (Path(source) / "adapter_model.safetensors").exists()
        and not (Path(source) / "adapter_model.bin").exists()
    )
    lora = load_lora(source) if is_file else load_official_lora(source, alpha=alpha)
    file = export_lora(lora, output, format=to)
    numbers = {"layers": len(lora.tensors) // 2, "rank": lora.rank, "alpha": lora.alpha, "alpha from": lora.origin}
    emit({"file": str(file), **numbers}, json)


@app.command(epilog="Example: mlcm bench toy --iterations 20")
def bench(
    what: Annotated[str, typer.Argument(help="toy (the mixture) or digits.")],
    iterations: Annotated[
        int | None, typer.Option(help="Student steps; 1000 on the mixture, 150 on digits.", min=2)
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="On the mixture.")] = 3.0,
    batch: Annotated[int, typer.Option(help="Rows a step, on digits.", min=2)] = 64,
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Ours against LCM at 2, 4 and 8 steps, one seed; `make bench-mlcm` has three seeds and every peer."""
    if what not in ("toy", "digits"):
        raise UserError(f"bench is '{what}', expected toy or digits")
    from mlcm.demo import bench_digits, bench_toy

    if what == "toy":
        emit(bench_toy(iterations or 1000, guidance_scale=guidance_scale, seed=seed), json)
    else:
        emit(bench_digits(iterations or 150, seed=seed, batch=batch, device=device), json)
