"""The command line: parses, calls, prints."""

import csv
import sys
from pathlib import Path
from typing import Annotated

import typer
from tenfold_shared.cli import Device, Json, Output, Resume, Seed, Table, emit, make_app
from tenfold_shared.errors import UserError

OFFICIAL = "AIGCer-OPPO/FaceScore"
IMAGE_REWARD = "THUDM/ImageReward"

app = make_app("facescore", "A reward model for generated faces, and diffusion fine-tuning with it (arXiv 2406.17100).")

Images = Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)]
Model = Annotated[str, typer.Option(help="Reward model: hub id, folder, .pt or .safetensors file.")]
DetectorName = Annotated[
    str, typer.Option(help="skimage-lbp, dlib, mtcnn, yunet:FILE, full-image or boxes:FILE.", show_default=True)
]
Pipeline = Annotated[str, typer.Option(help="Diffusion pipeline: hub id, folder, or 'toy' for the drawn world's own.")]


@app.command(epilog="Example: facescore score a.png b.png --model FS_model.pt --viz out/")
def score(
    images: Images,
    model: Model = OFFICIAL,
    detector: DetectorName = "skimage-lbp",
    crop: Annotated[str, typer.Option(help="box, as the checkpoint was trained, or square.")] = "box",
    margin: Annotated[float, typer.Option(help="Share of the box added on each side.")] = 0.0,
    compat: Annotated[str, typer.Option(help="fixed, or official to lose faces at the border.")] = "fixed",
    viz: Annotated[
        Path | None, typer.Option(help="Folder for pictures with boxes and scores.", file_okay=False)
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")] = False,
    json: Json = False,
    device: Device = "cpu",
) -> None:
    """Score every face of some images."""
    if as_csv and json:
        raise UserError("--csv and --json at once", hint="pass one of them")
    from facescore.images import open_image

    opened = [open_image(path) for path in images]  # every file is read before the model, which takes longer
    del opened
    from facescore.reward.scorer import FaceScorer

    scorer = FaceScorer.from_pretrained(
        model, detector=detector, device=device, crop=crop, margin=margin, compat=compat
    )
    results = scorer([str(path) for path in images])
    if viz is not None:
        from facescore.visual import draw_result

        stems = [path.stem for path in images]
        for i, (path, result) in enumerate(zip(images, results, strict=True)):
            alike = stems[:i].count(path.stem)  # a.png and a.jpg, or one name in two folders
            draw_result(path, result, viz / f"{path.stem}{f'.{alike + 1}' if alike else ''}.scored.png")
    columns = ["image", "face", "score", "x1", "y1", "x2", "y2", "confidence"]
    rows: list[list[object]] = []
    for path, result in zip(images, results, strict=True):
        for i, face in enumerate(result.faces):
            box = [round(v, 2) for v in face.box]
            rows.append([str(path), i, face.score, *box, face.confidence if result.calibrated else None])
        if not result.faces:
            rows.append([str(path), None, None, None, None, None, None, None])
    if as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(columns)
        writer.writerows(rows)
        return
    emit(Table(f"Face scores by {model}", columns, rows), json)


@app.command(epilog="Example: facescore rank a.png b.png c.png --model FS_model.pt")
def rank(
    images: Images,
    model: Model = OFFICIAL,
    detector: DetectorName = "skimage-lbp",
    aggregate: Annotated[str, typer.Option(help="Of the faces of an image: max, min, mean or area_weighted.")] = "max",
    prompt: Annotated[
        str | None, typer.Option(help="Rank whole images under this prompt, with an ImageReward model.")
    ] = None,
    json: Json = False,
    device: Device = "cpu",
) -> None:
    """Rank images by their faces, or by an ImageReward model under a prompt."""
    if aggregate not in ("max", "min", "mean", "area_weighted"):
        raise UserError(f"aggregate is {aggregate!r}, expected max, min, mean or area_weighted")
    from facescore.reward.scorer import FaceScorer, ImageRewardModel

    names = [str(path) for path in images]
    values: list[float | None]
    if prompt is not None:
        chosen = IMAGE_REWARD if model == OFFICIAL else model
        values = list(ImageRewardModel.from_pretrained(chosen, device=device).score(prompt, names))
    else:
        scorer = FaceScorer.from_pretrained(model, detector=detector, device=device)
        values = [getattr(result, aggregate) for result in scorer(names)]
    order = sorted(range(len(names)), key=lambda i: (values[i] is None, -(values[i] or 0.0)))
    scored = [v for v in values if v is not None]
    rows = []
    for i in order:
        value = values[i]
        rows.append([None if value is None else 1 + sum(v > value for v in scored), names[i], value])
    emit(Table("Best first; images without a face last", ["rank", "image", "score"], rows), json)


@app.command("build-pairs", epilog="Example: facescore build-pairs toy/images --pipeline toy --min-face 12 -o pairs")
def build_pairs(
    images: Annotated[Path, typer.Argument(help="Folder of images; metadata.jsonl may give prompts and boxes.")],
    pipeline: Pipeline,
    output: Output = Path("pairs"),
    detector: DetectorName = "skimage-lbp",
    strength: Annotated[list[float] | None, typer.Option(help="In (0, 1]; repeat it for graded losers. 1.0.")] = None,
    mask: Annotated[
        str, typer.Option(help="What is repainted: box, or landmarks (mtcnn, yunet, or given in metadata.jsonl).")
    ] = "box",
    min_face: Annotated[int, typer.Option(help="Smallest side of a face in pixels.")] = 64,
    missing: Annotated[str, typer.Option(help="A loser without a face: flag, drop or ignore.")] = "flag",
    grain: Annotated[
        float, typer.Option(help="Strength at which the winner too is repainted, to share the generator's grain.")
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Sampling steps of the pipeline.", min=1)] = 50,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Make (win, lose) pairs by inpainting the faces of real images."""
    from facescore.images import open_image
    from facescore.pairs.builder import InpaintPairBuilder, read_images
    from facescore.pairs.dataset import FILE

    items = read_images(images)
    for item in items:
        open_image(item["image"])  # a damaged file is named now, not after hours of painting
    if not resume and (output / FILE).exists():
        raise UserError(f"'{output}' holds pairs already", hint="pass --resume, or another --output")
    builder = InpaintPairBuilder(
        _pipeline(pipeline, device, inpaint=True),
        detector,
        strength or [1.0],
        mask=mask,
        min_face=min_face,
        missing=missing,
        grain=grain,
        generator_id=pipeline,
        seed=seed,
        batch_size=batch_size,
        options={"num_inference_steps": steps},
    )
    pairs = builder.build(items, output, resume=resume)
    emit({"pairs": len(pairs), "folder": str(output), **{f"now: {k}": v for k, v in builder.counts.items()}}, json)


@app.command(epilog="Example: facescore train toy/pairs --model toy/reward --lr 1e-3 --epochs 1 -o reward")
def train(
    pairs: Annotated[Path, typer.Argument(help="Pair folder or pairs.jsonl.")],
    model: Model = IMAGE_REWARD,
    output: Output = Path("reward"),
    lr: float = 1e-5,
    epochs: int = 3,
    batch_size: int = 64,
    accumulation: int = 1,
    fix_rate: Annotated[float, typer.Option(help="Share of the layers that stay as they are.")] = 0.7,
    label_smoothing: float = 0.0,
    l2_reward: float = 0.0,
    validation: Annotated[float, typer.Option(help="Share of the source images held out.")] = 0.1,
    patience: int | None = None,
    noise: Annotated[float, typer.Option(help="Largest noise of the augmentation, on normalised pixels.")] = 0.0,
    blur: Annotated[float, typer.Option(help="Largest blur of the augmentation, in pixels of the crop.")] = 0.0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror pairs at random.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    save_every: Annotated[
        int | None, typer.Option(help="Updates between checkpoints; each validation if unset.")
    ] = None,
    resume: Resume = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a reward on pairs; start it with `accelerate launch -m facescore train ...` on several devices."""
    from facescore.pairs.dataset import PairDataset
    from facescore.reward.checkpoint import load_reward
    from facescore.reward.training import RewardConfig, RewardTrainer

    config = RewardConfig(
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        fix_rate=fix_rate,
        label_smoothing=label_smoothing,
        l2_reward=l2_reward,
        validation=validation,
        patience=patience,
        noise=noise,
        blur=blur,
        flip=flip,
        mixed_precision=mixed_precision,
        save_every=save_every,
        seed=seed,
    )
    data = PairDataset.read(pairs)
    for row in range(len(data)):
        data.crops(row)  # a damaged file is named before the training, not in the middle
    report = RewardTrainer(load_reward(model), data, config, output=output).train(resume=resume)
    emit(
        {
            "pairs": len(data),
            "updates": report.steps,
            "best validation loss": report.best_loss,
            "best validation accuracy": report.best_accuracy,
            "model": str(output / "model"),
        },
        json,
    )


@app.command(epilog="Example: facescore evaluate --pairs toy/pairs --scorers facescore=toy/reward,sharpness")
def evaluate(
    pairs: Annotated[Path | None, typer.Option(help="Pair folder or pairs.jsonl.")] = None,
    rankings: Annotated[Path | None, typer.Option(help="Human rankings: lines of prompt, images, rank.")] = None,
    scorers: Annotated[
        str,
        typer.Option(
            help="NAME or NAME=MODEL of facescore (face crops), imagereward (whole images under their prompts), "
            "sharpness, eigenfaces, natural."
        ),
    ] = "facescore,sharpness",
    detector: Annotated[str, typer.Option(help="Of the faces of --rankings; as in score.")] = "skimage-lbp",
    clean: Annotated[Path | None, typer.Option(help="Folder of good faces, for eigenfaces and natural.")] = None,
    json: Json = False,
) -> None:
    """Compare scorers on the same pairs or rankings; the first is what the others are compared with."""
    if (pairs is None) == (rankings is None):
        raise UserError("expected one of --pairs and --rankings")
    from facescore.evaluation.compare import Scorer, evaluate_rankings
    from facescore.evaluation.compare import evaluate as compare
    from facescore.pairs.dataset import PairDataset, read_rankings

    data = PairDataset.read(pairs) if pairs is not None else None
    ranked = read_rankings(rankings) if rankings is not None else None
    asked = scorers.split(",")
    short = [text.partition("=")[0] for text in asked]
    names = [name if short.count(name) == 1 else text for name, text in zip(short, asked, strict=True)]
    built: dict[str, Scorer] = {name: _scorer(text, clean) for name, text in zip(names, asked, strict=True)}
    if ranked is not None:
        rows = [[name, *evaluate_rankings(ranked, s, detector=detector).values()] for name, s in built.items()]
        columns = ["scorer", "accuracy", "kendall", "spearman", "images without a face"]
        emit(Table(f"{len(ranked)} rankings", columns, rows), json)
        return
    assert data is not None
    found = []
    for r in compare(data, built):
        detail = {**{str(k): v for k, v in r.by_severity.items()}, **r.by_generator}
        found.append(
            [
                r.name,
                r.accuracy,
                f"{r.interval[0]:.3f} to {r.interval[1]:.3f}",
                "-"
                if r.difference is None
                else f"{r.difference[0]:+.3f} ({r.difference[1]:+.3f} to {r.difference[2]:+.3f})",
                ", ".join(f"{k}: {v:.3f}" for k, v in detail.items()),
            ]
        )
    columns = ["scorer", "pairwise accuracy", "95 % interval", "minus the first", "by strength and generator"]
    emit(Table(f"{len(data)} pairs", columns, found), json)


@app.command(epilog="Example: facescore tune --pipeline toy --pairs toy/pairs --method guidance --steps 3 -o lora")
def tune(
    pipeline: Pipeline,
    pairs: Annotated[Path | None, typer.Option(help="Pair folder; for sft, guidance and dpo.")] = None,
    method: Annotated[str, typer.Option(help="sft, guidance, dpo, refl or filter.")] = "guidance",
    output: Output = Path("lora"),
    target: Annotated[str, typer.Option(help="Of guidance: x0, teacher or step.")] = "x0",
    steps: int = 500,
    lr: float = 1e-4,
    batch_size: int = 4,
    lora_rank: Annotated[int, typer.Option(help="0 trains every weight.")] = 8,
    resolution: Annotated[int | None, typer.Option(help="Side of the pictures; the pipeline's own if unset.")] = None,
    beta: Annotated[float, typer.Option(help="Of dpo.")] = 2000.0,
    max_drift: Annotated[
        float | None, typer.Option(help="Of dpo: stop when the winners' error exceeds this multiple of the start's.")
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="Folder of other images and prompts, whose loss keeps general quality.")
    ] = None,
    general_weight: Annotated[float, typer.Option(help="Of the loss on --general.")] = 1.0,
    model: Annotated[str, typer.Option(help="Reward model; for refl and filter.")] = OFFICIAL,
    detector: DetectorName = "skimage-lbp",
    prompts: Annotated[Path | None, typer.Option(help="Text file of prompts; for refl and filter.")] = None,
    save_every: int = 50,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Refine a diffusion model; the result loads with `pipe.load_lora_weights(OUTPUT/weights)`."""
    from facescore.pairs.dataset import PairDataset
    from facescore.refine.tuner import METHODS, FaceTuner, TuneConfig

    if method not in METHODS:
        raise UserError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    config = TuneConfig(
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        lora_rank=lora_rank or None,
        target=target,
        resolution=resolution,
        beta=beta,
        max_drift=max_drift,
        general_weight=general_weight if general is not None else 0.0,
        save_every=save_every,
        mixed_precision=mixed_precision,
        seed=seed,
    )
    data = PairDataset.read(pairs) if pairs is not None else None
    asked = _prompts(prompts) if prompts is not None else None
    plain = None
    if general is not None:
        from facescore.images import open_image
        from facescore.pairs.builder import read_images

        items = read_images(general)
        plain = ([open_image(item["image"]) for item in items], [item["prompt"] for item in items])
    scorer = None
    if method in ("refl", "filter"):
        from facescore.reward.scorer import FaceScorer

        scorer = FaceScorer.from_pretrained(model, detector=detector, device=device).score_images
    tuner = FaceTuner(
        _pipeline(pipeline, device),
        data,
        method=method,
        config=config,
        scorer=scorer,
        prompts=asked,
        general=plain,
        output=output,
    )
    tuner.train(resume=resume)
    folder = tuner.save(output / "weights")
    last = tuner.history[-1]
    emit({"method": method, "updates": int(last["step"]), "loss": last["loss"], "weights": str(folder)}, json)


@app.command(epilog="Example: facescore convert FS_model.pt --to safetensors -o reward")
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, folder, .pt or .safetensors file.")],
    output: Output = Path("converted"),
    to: Annotated[str, typer.Option(help="safetensors or official.")] = "safetensors",
    json: Json = False,
) -> None:
    """Convert a reward checkpoint between the official layout and safetensors; both ways are exact."""
    from facescore.reward.checkpoint import load_reward, save_reward

    path = save_reward(load_reward(checkpoint), output, layout=to)
    emit({"written": str(path), "layout": to}, json)


@app.command(epilog="Example: facescore toy --faces 8 -o toy")
def toy(
    output: Output = Path("toy"),
    faces: Annotated[int, typer.Option(help="How many faces and pairs are drawn.", min=2)] = 32,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Train the packaged base models again, from nothing, into OUTPUT."),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Of --rebuild: updates of each base model; the recipe's own if unset.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write the drawn world: images with boxes, pairs with known defects, a small untrained reward."""
    from facescore.testbed import rebuild_assets, write_world

    emit(rebuild_assets(output, steps=steps) if rebuild else write_world(output, faces, seed=seed), json)


@app.command(epilog="Example: facescore demo --output out")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
    """Train a reward on inpainted faces, rank faces with it, refine the small diffusion model; offline."""
    from facescore.demo import run

    emit(run(output, seed), json)


def _prompts(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file '{path}' is not a text file here", hint="give one prompt a line") from error
    if not lines:
        raise UserError(f"prompt file '{path}' is empty", hint="give one prompt a line")
    return lines


def _pipeline(name: str, device: str, inpaint: bool = False):  # type: ignore[no-untyped-def]
    from tenfold_shared.device import pick_device

    if name == "toy":
        from facescore.testbed import base_pipeline

        return base_pipeline()
    from tenfold_shared.hub import load_pipeline

    if inpaint:
        from diffusers import AutoPipelineForInpainting

        pipe = load_pipeline(name, AutoPipelineForInpainting)
    else:
        pipe = load_pipeline(name)
    return pipe.to(pick_device(device))


def _scorer(text: str, clean: Path | None):  # type: ignore[no-untyped-def]
    from facescore.evaluation.baselines import Eigenfaces, NaturalStatistics, sharpness
    from facescore.evaluation.compare import WholeImages, reward_scorer
    from facescore.images import open_image
    from facescore.pairs.builder import read_images
    from facescore.reward.checkpoint import load_reward
    from facescore.reward.scorer import ImageRewardModel

    name, _, path = text.partition("=")
    if name == "facescore":
        return reward_scorer(load_reward(path or OFFICIAL))
    if name == "imagereward":
        return WholeImages(ImageRewardModel.from_pretrained(path or IMAGE_REWARD))
    if name == "sharpness":
        return sharpness
    if name in ("eigenfaces", "natural"):
        if clean is None:
            raise UserError(f"{name} needs --clean with a folder of good faces")
        faces = [open_image(item["image"]) for item in read_images(clean)]
        return Eigenfaces(faces) if name == "eigenfaces" else NaturalStatistics(faces)
    raise UserError(f"scorer is {name!r}, expected facescore, imagereward, sharpness, eigenfaces or natural")
