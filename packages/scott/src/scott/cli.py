"""The `scott` command."""

from pathlib import Path
from typing import Annotated, Any

import typer
from tenfold_shared.cli import Device, Json, Output, Resume, Seed, Table, console, emit, make_app
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError

app = make_app("scott", "Stochastic consistency distillation: few-step students of diffusion models, and the solvers.")

Model = Annotated[str | None, typer.Option(help="Teacher: hub id or folder of a diffusers pipeline.")]
More = Annotated[list[str] | None, typer.Argument(hidden=True)]
"""Takes the values after the first of an option that is followed by several, as in `--steps 1 2 4 8`."""


def _numbers(values: list[str], what: str) -> list[int]:
    try:
        return [int(v) for value in values for v in value.split(",") if v]
    except ValueError as error:
        raise UserError(f"{what} {' '.join(values)}: expected whole numbers") from error


def _pipeline(model: str | None, device: str) -> Any:
    from tenfold_shared.hub import load_pipeline

    if not model:
        raise UserError(
            "no teacher given", hint="pass --model with a hub id or a folder, or `model:` in the configuration"
        )
    pipe = load_pipeline(model)
    if getattr(pipe, "unet", None) is None:
        raise UserError(f"'{model}' has no U-Net", hint="expected a Stable Diffusion 1.5 or XL pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@app.command(
    "prepare-latents",
    epilog="Example: scott prepare-latents photos --model runwayml/stable-diffusion-v1-5 --output latents",
)
def prepare_latents(
    images: Annotated[str, typer.Argument(help="Folder of images, webdataset tar, or data set of the hub.")],
    model: Model = None,
    output: Output = Path("latents"),
    size: Annotated[int, typer.Option(help="Pixels of the side.", min=8)] = 512,
    batch_size: Annotated[int, typer.Option(help="Images that the VAE encodes at once.", min=1)] = 8,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Encode images and captions once, for training."""
    from rich.progress import track

    from scott.data import prepare_latents as prepare
    from scott.data import read_images

    if not Path(images).exists() and images.startswith((".", "/", "~")):
        raise UserError(f"'{images}' does not exist", hint="pass a folder of images, a tar, or a hub id")
    pipe = _pipeline(model, str(pick_device(device)))
    found = track(read_images(images), description="encoding", console=console)
    dataset = prepare(found, pipe.vae, output, size=size, batch_size=batch_size)
    emit({"latents": len(dataset), "shape": "x".join(map(str, dataset[0][0].shape)), "folder": str(output)}, json)


@app.command(
    epilog="Example: scott train --config sd15.yaml --output student   (sd15.yaml: model, dataset and any setting of SCottConfig)"
)
def train(
    config: Annotated[Path, typer.Option(help="YAML or JSON with the settings of SCottConfig.", dir_okay=False)],
    model: Model = None,
    dataset: Annotated[Path | None, typer.Option(help="Folder made by prepare-latents.")] = None,
    output: Output = Path("student"),
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Distil a student. Start it with `accelerate launch -m scott train ...` for several devices."""
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    from scott.config import SCottConfig
    from scott.data import LatentDataset
    from scott.student import CONFIG_FILE
    from scott.train import SCottTrainer

    settings = SCottConfig.load(config)
    source = dataset or settings.dataset
    if source is None and settings.data == "latents":
        raise UserError("no data to train on", hint="pass --dataset, or set data: teacher")
    if (output / CONFIG_FILE).exists() and not resume:
        raise UserError(f"'{output}' holds a student already", hint="pass --resume to go on, or another --output")
    latents = LatentDataset(source) if source is not None else None
    accelerator = Accelerator()
    pipe = _pipeline(model or settings.model, str(accelerator.device))
    trainer = SCottTrainer(pipe, settings, accelerator=accelerator)
    if resume and (output / CONFIG_FILE).exists():
        trainer.load(output)
    bar = tqdm(total=settings.iterations, initial=trainer.step, disable=not accelerator.is_main_process)

    def advance(step: int, terms: dict[str, float]) -> None:
        bar.update()
        bar.set_postfix({name: f"{value:.3g}" for name, value in terms.items()})

    history = trainer.fit(latents, output=output, progress=advance)
    bar.close()
    if accelerator.is_main_process:
        last = history[-1] if history else {}
        emit({"iterations": trainer.step, **{f"loss {k}": v for k, v in last.items()}, "student": str(output)}, json)


@app.command(
    epilog='Example: scott sample --model runwayml/stable-diffusion-v1-5 --student student --prompt "a red bus" --steps 1 2 4 8'
)
def sample(
    more: More = None,
    model: Model = None,
    student: Annotated[Path | None, typer.Option(help="Folder that training wrote.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line.", dir_okay=False)] = None,
    steps: Annotated[list[str] | None, typer.Option(help="Numbers of steps: --steps 1 2 4 8.")] = None,
    guidance: Annotated[float | None, typer.Option(help="ω, for a student with an ω input.")] = None,
    output: Output = Path("samples"),
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw images with a student, in as many steps as are named."""
    import torch
    from tenfold_shared.hub import replace_atomically

    from scott.student import attach, settings

    counts = _numbers([*(steps or ["4"]), *(more or [])], "--steps")
    texts = [*(prompt or [])]
    if prompts is not None:
        texts += [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise UserError("no prompt given", hint='pass --prompt "..." or --prompts FILE')
    if student is None:
        raise UserError("no student given", hint="pass --student with the folder that training wrote")
    config = settings(student)
    if any(not 1 <= count <= (config.grid or 50) for count in counts):
        raise UserError(f"--steps {' '.join(map(str, counts))}: expected 1 to {config.grid or 50}")
    takes_omega = (student / "unet").is_dir()
    if guidance is not None and not takes_omega:
        raise UserError("--guidance given to a student that was trained without an ω input", hint="leave it out")
    pipe = attach(_pipeline(model or config.model, str(pick_device(device))), student)
    low, high = config.guidance if isinstance(config.guidance, tuple) else (config.guidance,) * 2
    # A LoRA student has its guidance trained in: guiding it once more burns the image.
    omega = (guidance if guidance is not None else (low + high) / 2) if takes_omega else 0.0
    rows = []
    for count in counts:
        folder = output / f"steps-{count}"
        with replace_atomically(folder) as partial:
            partial.mkdir()
            lines = []
            for i, text in enumerate(texts):
                generator = torch.Generator().manual_seed(seed + i)
                image = pipe(text, num_inference_steps=count, guidance_scale=omega, generator=generator).images[0]
                image.save(partial / f"{i:05d}.png")
                lines.append(_json({"file_name": f"{i:05d}.png", "text": text}))
            (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows.append([count, len(texts), str(folder)])
    emit(Table("Samples", ["steps", "images", "folder"], rows), json)


def _json(record: dict[str, Any]) -> str:
    import json

    return json.dumps(record, ensure_ascii=False)


@app.command(
    "eval",
    epilog="Example: scott eval --real photos --fake samples/steps-2 --features openai/clip-vit-base-patch32 --metrics frechet clip coverage",
)
def evaluate(
    more: More = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real images.")] = None,
    fake: Annotated[Path | None, typer.Option(help="Folder of samples, as `scott sample` writes it.")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="frechet (also fid), coverage, precision, recall, density, vendi, diversity, clip."),
    ] = None,
    features: Annotated[str, typer.Option(help="pixels, or hub id or folder of a CLIP or vision model.")] = "pixels",
    k: Annotated[int, typer.Option(help="Neighbours of coverage, precision, recall and density.", min=1)] = 5,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare a folder of samples with a folder of real images."""
    from scott import metrics as m
    from scott.features import Features, folder_images

    wanted = [v for value in [*(metrics or ["frechet", "coverage"]), *(more or [])] for v in value.split(",") if v]
    known = ("frechet", "fid", "coverage", "precision", "recall", "density", "vendi", "diversity", "clip")
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"metric '{unknown[0]}' is unknown", hint=f"expected {', '.join(known)}")
    if fake is None:
        raise UserError("no samples given", hint="pass --fake with a folder of images")
    needs_real = [name for name in wanted if name not in ("vendi", "diversity", "clip")]
    if needs_real and real is None:
        raise UserError(f"{needs_real[0]} compares with real images", hint="pass --real with a folder of images")
    images, captions = folder_images(fake)
    extractor = Features(features, device=str(pick_device(device)))
    if "clip" in wanted and not all(captions):
        raise UserError(
            "the CLIP score needs a caption for every sample", hint="metadata.jsonl with file_name and text"
        )
    texts = extractor.texts(captions) if "clip" in wanted else None
    ours = extractor.images(images)
    theirs = extractor.images(folder_images(real)[0]) if needs_real and real is not None else None
    values: dict[str, float] = {}
    for name in wanted:
        if name in ("frechet", "fid"):
            values[name] = m.frechet_distance(theirs, ours)
        elif name == "vendi":
            values[name] = m.vendi_score(ours)
        elif name == "diversity":
            values[name] = m.pairwise_diversity(ours)
        elif name == "clip":
            values[name] = m.clip_score(ours, texts)
        elif name not in values:
            values |= {n: v for n, v in m.prdc(theirs, ours, k=k).items() if n in wanted}
    sizes: dict[str, Any] = {"samples": len(ours), "real": None if theirs is None else len(theirs), "k": k}
    emit({"features": features, **sizes, **values}, json)


@app.command(epilog="Example: scott convert student --to kohya --output converted")
def convert(
    student: Annotated[Path, typer.Argument(help="Folder that training wrote.")],
    to: Annotated[
        str, typer.Option(help="kohya: the LoRA for other programs; pipeline: a whole pipeline, LoRA fused.")
    ] = "kohya",
    model: Model = None,
    output: Output = Path("converted"),
    json: Json = False,
) -> None:
    """Write a student in another format."""
    from scott.student import fuse, settings, to_kohya

    if to == "kohya":
        written = to_kohya(student, output)
    elif to == "pipeline":
        written = fuse(_pipeline(model or settings(student).model, "cpu"), student, output)
    else:
        raise UserError(f"format '{to}' is unknown", hint="expected kohya or pipeline")
    emit({"format": to, "written": str(written)}, json)


@app.command("solver-check", epilog="Example: scott solver-check --steps 10 100 --noise sde5 --noise ode")
def solver_check(
    more: More = None,
    noise: Annotated[list[str] | None, typer.Option(help="Noise functions; all of them when not given.")] = None,
    steps: Annotated[list[str] | None, typer.Option(help="Numbers of solver steps.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Take the noise schedule from this pipeline's scheduler, not Stable Diffusion's.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Points of each of the 16 sets that are compared.", min=50)] = 1000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """How well each noise function keeps the marginals, measured on a mixture whose denoiser is exact."""
    from scott.lab import solver_check as check
    from scott.schedule import NoiseSchedule
    from scott.solvers import NOISE_FUNCTIONS

    counts = _numbers([*(steps or ["10", "50", "1000"]), *(more or [])], "--steps")
    schedule = NoiseSchedule.stable_diffusion()
    if model:
        from diffusers import DDIMScheduler
        from tenfold_shared.hub import load_pipeline

        schedule = NoiseSchedule.from_scheduler(load_pipeline(model, DDIMScheduler, subfolder="scheduler"))
    found = check(schedule, noises=noise or list(NOISE_FUNCTIONS), steps=counts, n=samples, seed=seed)
    rows = [[r.noise, r.steps, r.error, r.floor, r.error / r.floor] for r in found]
    emit(
        Table("Marginal error on the exact mixture (sliced W2)", ["noise", "steps", "error", "floor", "ratio"], rows),
        json,
    )


@app.command(epilog="Example: scott bench toy --solver er-sde --noise sde5 --substeps 3 --no-gan")
def bench(
    world: Annotated[str, typer.Argument(help="toy: the exact mixture; digits: 8 × 8 digits and a U-Net.")] = "toy",
    solver: Annotated[str, typer.Option(help="ode, ddim-eta or er-sde.")] = "er-sde",
    noise: Annotated[str, typer.Option(help="Noise function of er-sde.")] = "sde5",
    eta: Annotated[float, typer.Option(help="η of ddim-eta.")] = 0.0,
    substeps: Annotated[int, typer.Option(help="Solver steps h of one target.", min=1)] = 3,
    noise_below: Annotated[int | None, typer.Option(help="Noise only below this time step.", min=1)] = None,
    gan: Annotated[bool, typer.Option("--gan/--no-gan", help="With the discriminator.")] = True,
    iterations: Annotated[int | None, typer.Option(help="As in the benchmark when not given.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the student.", min=0)] = None,
    disc_lr: Annotated[float | None, typer.Option(help="Learning rate of the discriminator.", min=0)] = None,
    adv_weight: Annotated[float | None, typer.Option(help="Weight of the adversarial term.", min=0)] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """One experiment of the solver question: distil, sample in 1, 2, 4, 8 steps, measure."""
    from scott.recipes import Recipe

    recipe = Recipe("bench", solver, noise, eta, substeps, noise_below, gan)
    given: dict[str, Any] = {"iterations": iterations, "lr": lr, "disc_lr": disc_lr, "adv_weight": adv_weight}
    given = {name: value for name, value in given.items() if value is not None}
    rows: list[dict[str, float]] = []
    if world == "toy":
        from scott.testbed import distil, measure, samples

        student = distil(recipe, [seed], **given)
        rows = [measure(samples(student, [seed], steps=count)[0], seed=seed) for count in (1, 2, 4, 8)]
    elif world == "digits":
        from scott import digits

        trainer = digits.distil(recipe, seed, **given)
        labels = digits.digits()[1].tolist()
        rows = [digits.measure(trainer.sample(labels, steps=count, seed=seed)) for count in (1, 2, 4, 8)]
    else:
        raise UserError(f"world '{world}' is unknown", hint="expected toy or digits")
    table = [[count, *row.values()] for count, row in zip((1, 2, 4, 8), rows, strict=True)]
    emit(Table(f"{world}, {solver}, {'with' if gan else 'without'} discriminator", ["steps", *rows[0]], table), json)


@app.command("build-testbed", epilog="Example: scott build-testbed --output weights")
def build_testbed(output: Output = Path("weights"), json: Json = False) -> None:
    """Train the small models that come with the package anew, from nothing (some minutes)."""
    from scott import digits, testbed

    output.mkdir(parents=True, exist_ok=True)
    written = [testbed.build(output), *digits.build(output)]
    emit({path.stem: str(path) for path in written}, json)


@app.command(epilog="Example: scott demo --output out --seed 0")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
    """Distil the mixture in five ways and draw what 1, 2, 4 and 8 steps give; about a minute."""
    from scott.demo import run

    output.mkdir(parents=True, exist_ok=True)
    table = run(output, seed, progress=console.print)
    emit(table, json)
    console.print(f"picture: {output / 'mixture.png'}; record: {output / 'summary.json'}")
