"""The command line: images to features, features to a classifier, a classifier to answers."""

from pathlib import Path
from typing import Annotated, Any

import typer
from tenfold_shared.cli import Device, Json, Output, Seed, Table, emit, make_app
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError

app = make_app("gp-ensemble", "Low-shot image classification by one Gaussian process over several frozen encoders.")

Features = Annotated[Path, typer.Argument(help="Feature file written by extract or import-cache.")]
Classifier = Annotated[Path, typer.Argument(help="Folder written by fit.")]


@app.command(epilog="Example: gp-ensemble demo --output out")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
    """Classify real digits from 1 to 16 examples with six encoders that never saw one; offline, under a minute."""
    from gp_ensemble.demo import run

    emit(run(output, seed), json)


@app.command(epilog="Example: gp-ensemble extract photos --encoder clip=open_clip:RN50/openai --prior clip -o features")
def extract(
    images: Annotated[Path, typer.Argument(help="Folder with one sub-folder of images per class.")],
    encoder: Annotated[
        list[str],
        typer.Option(help="NAME=LIBRARY:MODEL[@FILE]; timm, open_clip, transformers, torchvision. Repeatable."),
    ],
    output: Output = Path("out"),
    prior: Annotated[str | None, typer.Option(help="Encoder whose text tower gives zero-shot logits.")] = None,
    class_name: Annotated[
        list[str] | None,
        typer.Option(help="Class whose zero-shot logits are wanted; the folders' names when not given."),
    ] = None,
    template: Annotated[list[str] | None, typer.Option(help="Caption with {} for the class name. Repeatable.")] = None,
    split: Annotated[Path | None, typer.Option(help="Split file in CoOp's layout; IMAGES is then its root.")] = None,
    part: Annotated[str, typer.Option(help="Part of the split: train, val or test.")] = "train",
    views: Annotated[int, typer.Option(min=1, help="Random crops averaged per image; for training images.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Features of a folder of images under frozen encoders, into OUTPUT/features.safetensors.

    Finished shards are kept in OUTPUT/cache, so that an interrupted run goes on where it was.
    """
    from gp_ensemble.vision import extract_features, make_extractor, open_images, open_split

    found = open_split(split, part, root=images) if split else open_images(images)
    found.check()
    if prior is not None and prior not in [text.partition("=")[0] for text in encoder]:
        raise UserError(f"prior encoder '{prior}' is not among the encoders", hint="give it with --encoder too")
    extractors = [make_extractor(text, device=str(pick_device(device))) for text in encoder]
    zero_shot = None
    if prior is not None:
        names = class_name or found.classes()
        captions = [name.replace("_", " ") for name in names]
        tower = next(e for e in extractors if e.name == prior)
        zero_shot = tower.zero_shot(captions, templates=template or None)
        zero_shot.class_names = names
    table = extract_features(
        found, extractors, cache_dir=output / "cache", batch_size=batch_size, views=views, seed=seed
    )
    if zero_shot is not None:
        table.prior_logits, table.class_names = zero_shot.logits(table[zero_shot.encoder]), list(zero_shot.class_names)
    table.save(output / "features.safetensors")
    rows = [[name, array.shape[1], table.fingerprint[name]] for name, array in table.items()]
    emit(
        Table(f"{len(table)} images into {output}/features.safetensors", ["encoder", "dimensions", "cache key"], rows),
        json,
    )


@app.command(epilog="Example: gp-ensemble fit features/features.safetensors --shots 4 --output classifier")
def fit(
    features: Features,
    output: Output = Path("classifier"),
    shots: Annotated[
        int | None, typer.Option(help="Draw this many images per class; all of them when not given.")
    ] = None,
    kernel: Annotated[str, typer.Option(help="rbf, matern52 or linear.")] = "rbf",
    mean: Annotated[str, typer.Option(help="auto, logits, probs or zero.")] = "auto",
    objective: Annotated[str, typer.Option(help="auto, ml, loo, loo_ce or none.")] = "auto",
    link: Annotated[str, typer.Option(help="softmax, argmax, mean_field or clip.")] = "softmax",
    solver: Annotated[str, typer.Option(help="auto, cholesky, primal, nystrom or cg.")] = "auto",
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Fit a classifier on labelled features and write it to OUTPUT."""
    from gp_ensemble import FeatureTable, GPEnsembleClassifier, few_shot_indices

    table = _labelled(FeatureTable.load(features), features)
    if shots is not None:
        table = table[few_shot_indices(table.labels, shots, seed=seed)]
    classifier = GPEnsembleClassifier(
        kernel, mean, objective=objective, link=link, solver=solver, random_state=seed, device=str(pick_device(device))
    )
    classifier.fit(table, table.labels).save(output)
    emit(_description(classifier, f"{len(table)} images, {len(classifier.classes_)} classes, into {output}"), json)


@app.command(epilog="Example: gp-ensemble predict classifier features/features.safetensors --top-k 3")
def predict(
    classifier: Classifier,
    features: Features,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file; a table on stdout otherwise.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes listed per image.")] = 1,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Label, probability, further classes and variance of each image."""
    import numpy as np

    from gp_ensemble import FeatureTable, GPEnsembleClassifier

    model = GPEnsembleClassifier.load(classifier, device=str(pick_device(device)))
    table = FeatureTable.load(features)
    proba, variance = model.predict_proba(table), model.ood_score(table)
    k = min(top_k, proba.shape[1])
    order = np.argsort(-proba, axis=1)[:, :k]
    columns = ["path", "label", "p"] + [c for i in range(2, k + 1) for c in (f"label {i}", f"p {i}")] + ["variance"]
    rows = []
    for i in range(len(table)):
        pairs = [value for j in order[i] for value in (str(model.classes_[j]), round(float(proba[i, j]), 4))]
        rows.append([table.paths[i] if table.paths else str(i), *pairs, round(float(variance[i]), 4)])
    _write_or_emit(Table(f"{len(rows)} images", columns, rows), output, json)


@app.command(
    epilog="Example: gp-ensemble evaluate classifier test/features.safetensors --ood other/features.safetensors"
)
def evaluate(
    classifier: Classifier,
    features: Features,
    ood: Annotated[list[Path] | None, typer.Option(help="Features of images of another kind. Repeatable.")] = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Accuracy, negative log likelihood, calibration, and detection of images of another kind."""
    import numpy as np

    from gp_ensemble import FeatureTable, GPEnsembleClassifier, metrics
    from gp_ensemble.protocol import tuned_on
    from gp_ensemble.zero_shot import columns_by_name

    model = GPEnsembleClassifier.load(classifier, device=str(pick_device(device)))
    table = _labelled(FeatureTable.load(features), features)
    y = np.asarray(columns_by_name([str(c) for c in model.classes_], table.labels))
    proba = model.predict_proba(table)
    result: dict[str, Any] = {"images": len(table), "chosen by": tuned_on(model), **metrics.evaluate(proba, y)}
    for path in ood or []:
        other = FeatureTable.load(path)
        for kind in ("variance", "max_prob"):
            inside, outside = (model.ood_score(t, kind) for t in (table, other))
            result[f"auroc of {kind}, {path}"] = metrics.auroc(inside, outside)
            result[f"fpr95 of {kind}, {path}"] = metrics.fpr95(inside, outside)
    emit(result, json)


@app.command(epilog="Example: gp-ensemble benchmark --suite digits --shots 1 --shots 4 --seeds 3 --output runs")
def benchmark(
    train: Annotated[Path | None, typer.Argument(help="Features to draw training images from.")] = None,
    test: Annotated[Path | None, typer.Argument(help="Features to test on.")] = None,
    suite: Annotated[str | None, typer.Option(help="digits, shapes, or small for both, instead of files.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method by name; all quick ones when not given.")] = None,
    shots: Annotated[list[int] | None, typer.Option(help="Repeatable; 1, 2, 4, 8, 16 when not given.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 3,
    metric: Annotated[
        str, typer.Option(help="accuracy, nll, ece, brier or seconds: of the printed table.")
    ] = "accuracy",
    output: Output = Path("out"),
    json: Json = False,
) -> None:
    """Methods by shots by seeds. OUTPUT/records.jsonl keeps every run, so that an interrupted table goes on."""
    from gp_ensemble import FeatureTable, few_shot_indices
    from gp_ensemble.protocol import METHODS, SLOW, run_grid, summarise, write_tables

    names = method or [name for name in METHODS if name not in SLOW]
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"no method '{unknown[0]}'", hint=f"there are {'; '.join(METHODS)}")
    if metric not in ("accuracy", "nll", "ece", "brier", "seconds"):
        raise UserError(f"metric is '{metric}', expected accuracy, nll, ece, brier or seconds")
    if shots and min(shots) < 1:
        raise UserError(f"shots is {min(shots)}, expected 1 or more")
    methods, counts = {name: METHODS[name] for name in names}, shots or [1, 2, 4, 8, 16]
    common: dict[str, Any] = {"shots": counts, "seeds": range(seeds), "records": output / "records.jsonl"}
    records = []
    if suite is not None:
        from gp_ensemble.testbed import WORLDS, load_world

        for name in WORLDS if suite == "small" else [suite]:
            world = load_world(name)
            records += run_grid(world.draw, methods, data=name, elsewhere=world.elsewhere, **common)
    elif train is None or test is None:
        raise UserError("nothing to run on", hint="give two feature files, or --suite small")
    else:
        pool, images = _labelled(FeatureTable.load(train), train), _labelled(FeatureTable.load(test), test)

        def draw(count: int, seed: int) -> tuple[FeatureTable, FeatureTable]:
            return pool[few_shot_indices(pool.labels, count, seed=seed)], images

        records += run_grid(draw, methods, data=f"{train} -> {test}", **common)
    for data in dict.fromkeys(r["data"] for r in records):
        emit(summarise([r for r in records if r["data"] == data], metric), json)
    write_tables(records, output)


@app.command(epilog="Example: gp-ensemble inspect classifier --suspects 5")
def inspect(
    classifier: Classifier,
    suspects: Annotated[int, typer.Option(min=0, help="Training images whose label is most doubtful.")] = 5,
    json: Json = False,
) -> None:
    """Encoder weights, hyper-parameters, leave-one-out accuracy, and the labels that look wrong."""
    from gp_ensemble import GPEnsembleClassifier

    model = GPEnsembleClassifier.load(classifier)
    table = _description(model, str(classifier))
    numbers = model.gp_.targets.argmax(1).cpu().numpy()
    rows = list(table.rows)
    for i in model.suspect_labels(suspects):
        row, given = model.loo_.proba[i], model.classes_[numbers[i]]
        text = (
            f"labelled {given} (p {row[numbers[i]]:.3f}), looks like {model.classes_[row.argmax()]} (p {row.max():.3f})"
        )
        rows.append([f"suspect {i}", text])
    emit(Table(table.title, table.columns, rows), json)


@app.command(epilog="Example: gp-ensemble update classifier more/features.safetensors --output classifier2")
def update(classifier: Classifier, features: Features, output: Output = Path("classifier"), json: Json = False) -> None:
    """Add labelled images, of known or new classes, without tuning or fitting anew."""
    import numpy as np

    from gp_ensemble import FeatureTable, GPEnsembleClassifier, PriorMissingError

    model = GPEnsembleClassifier.load(classifier)
    table = _labelled(FeatureTable.load(features), features)
    known = np.isin(table.labels.astype(str), model.classes_.astype(str))
    if known.any():
        part = table[np.flatnonzero(known)]
        model.add_examples(part, part.labels)
    for name in np.unique(table.labels[~known]):
        if model.gp_.prior_logits is not None and model.zero_shot is None:
            raise PriorMissingError(
                f"class {name} is new and its zero-shot logits of the earlier images are not known",
                hint="use GPEnsembleClassifier.add_class with support_prior_logits, or fit with --mean zero",
            )
        model.add_class(name, table[np.flatnonzero(table.labels == name)])
    model.save(output)
    emit({"images": len(model.gp_.targets), "classes": len(model.classes_), "written": str(output)}, json)


@app.command(epilog="Example: gp-ensemble forget classifier --index 3 --index 7 --output classifier2")
def forget(
    classifier: Classifier,
    index: Annotated[list[int], typer.Option(help="Number of a training image. Repeatable.")],
    output: Output = Path("classifier"),
    recenter: Annotated[bool, typer.Option("--recenter", help="Compute the centring anew as well.")] = False,
    json: Json = False,
) -> None:
    """Remove training images; what remains is exactly the predictor without them, at the same hyper-parameters."""
    from gp_ensemble import GPEnsembleClassifier

    model = GPEnsembleClassifier.load(classifier).forget(index, recenter=recenter)
    model.save(output)
    emit({"images": len(model.gp_.targets), "classes": len(model.classes_), "written": str(output)}, json)


@app.command("import-cache", epilog="Example: gp-ensemble import-cache caches/caltech101 --shots 16 --output features")
def import_cache(
    folder: Annotated[Path, typer.Argument(help="Folder with Tip-Adapter's keys_*shots.pt and values_*shots.pt.")],
    output: Output = Path("out"),
    shots: Annotated[int | None, typer.Option(help="Which cache; the only one when not given.")] = None,
    encoder: Annotated[str, typer.Option(help="Name for the encoder.")] = "clip",
    json: Json = False,
) -> None:
    """Turn Tip-Adapter's cache files into feature files OUTPUT/train.safetensors and OUTPUT/test.safetensors."""
    from gp_ensemble.tip_cache import read_tip_cache

    tables = read_tip_cache(folder, shots=shots, encoder=encoder)
    for name, table in tables.items():
        table.save(output / f"{name}.safetensors")
    rows = [[str(output / f"{name}.safetensors"), len(t), t.shape[1]] for name, t in tables.items()]
    emit(Table(f"from {folder}", ["file", "images", "dimensions"], rows), json)


@app.command(epilog="Example: gp-ensemble doctor --images 16000 --classes 1000 --dimensions 2304")
def doctor(
    images: Annotated[int, typer.Option(min=2, help="Training images.")],
    classes: Annotated[int, typer.Option(min=2)],
    dimensions: Annotated[int, typer.Option(min=1, help="Feature dimensions of all encoders together.")],
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Memory that each solver needs, and what there is."""
    import torch

    from gp_ensemble.solvers import free_memory, memory_estimate

    have = free_memory(str(pick_device(device)))
    rows = []
    for solver in ("cholesky", "primal", "nystrom"):
        for dtype in (torch.float32, torch.float64):
            need = memory_estimate(solver, rows=images, dimensions=dimensions, classes=classes, dtype=dtype)
            fits = None if have is None else need <= have
            rows.append([solver, str(dtype).removeprefix("torch."), round(need, 3), fits])
    free = "unknown" if have is None else f"{have:.1f} GiB"
    emit(Table(f"{images} images, {classes} classes; free: {free}", ["solver", "dtype", "GiB", "fits"], rows), json)


def _labelled(table: Any, path: Path) -> Any:
    if table.labels is None:
        raise UserError(f"'{path}' has no labels", hint="extract from a folder with one sub-folder per class")
    return table


def _description(classifier: Any, title: str) -> Table:
    weights = {f"share of {name}": share for name, share in classifier.encoder_weights_.items()}
    rows = [
        ["chosen by", f"training images ({classifier.tuned_.objective})"],
        ["leave-one-out accuracy", classifier.loo_accuracy_],
    ]
    rows += [[k, v] for k, v in {**weights, **classifier.hyperparameters_}.items()]
    return Table(title, ["what", "value"], rows)


def _write_or_emit(table: Table, path: Path | None, as_json: bool) -> None:
    if path is None:
        emit(table, as_json)
        return
    import csv

    from tenfold_shared.hub import replace_atomically

    with replace_atomically(path) as partial:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table.columns)
            writer.writerows(table.rows)
    emit({"images": len(table.rows), "written": str(path)}, as_json)
