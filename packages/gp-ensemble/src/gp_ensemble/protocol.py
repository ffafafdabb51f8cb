"""Methods by shots by seeds: the runs that every table of this package is made of.

A run is one record: who, on what, how many shots, which seed, the scores, the seconds, and which data chose the
hyper-parameters. Records are written as they come, one JSON object a line, so that an interrupted table goes on.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tenfold_shared.cli import Table
from tenfold_shared.errors import UserError
from tqdm.auto import tqdm

from gp_ensemble import baselines, metrics
from gp_ensemble.baselines import Tuned
from gp_ensemble.classifier import GPEnsembleClassifier
from gp_ensemble.features import FeatureTable

LR_GRID = {"C": (1.0, 10.0, 100.0, 1000.0)}
TIP_GRID = {"alpha": (0.3, 1, 3, 10, 30), "beta": (1, 2, 4, 5.5, 8, 12)}
GDA_GRID = {"alpha": (1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100)}
FUSION_GRID = {"alpha": (0.1, 0.3, 1, 3, 10), "beta": (1, 2, 4, 5.5, 8, 12)}

Method = Callable[[], Any]

METHODS: dict[str, Method] = {
    "GP ensemble": GPEnsembleClassifier,
    "GP ensemble, ml": lambda: GPEnsembleClassifier(objective="ml"),
    "GP ensemble, loo": lambda: GPEnsembleClassifier(objective="loo"),
    "GP ensemble, loo_ce": lambda: GPEnsembleClassifier(objective="loo_ce"),
    "GP ensemble, untuned": lambda: GPEnsembleClassifier(objective="none"),
    "GP ensemble, linear": lambda: GPEnsembleClassifier("linear"),
    "GP ensemble, argmax link": lambda: GPEnsembleClassifier(link="argmax"),
    "GP ensemble, text as it is": lambda: GPEnsembleClassifier(debias=False),
    "GP ensemble, no text": lambda: GPEnsembleClassifier(mean="zero"),
    "zero-shot": baselines.ZeroShot,
    "LR, clip": lambda: baselines.LinearProbe("clip"),
    "LR, concatenated": baselines.LinearProbe,
    "LR, concatenated, C=100": lambda: baselines.LinearProbe(C=100.0),
    "LR per encoder, averaged": baselines.LinearProbeEnsemble,
    "Tip-Adapter": baselines.TipAdapter,
    "Tip-Adapter-F": baselines.TipAdapterF,
    "CaFo-style fusion": baselines.CacheFusion,
    "GDA, concatenated": baselines.GDA,
    "LP++, clip": lambda: baselines.LPPlusPlus("clip"),
    "LP++, concatenated": baselines.LPPlusPlus,
    "kernel ridge": baselines.KernelRidge,
    "Dirichlet GP (gpytorch)": baselines.DirichletGP,
    "GPC (scikit-learn)": baselines.SklearnGPC,
    "LR, concatenated, test-tuned": lambda: Tuned(baselines.LinearProbe(), LR_GRID),
    "Tip-Adapter, test-tuned": lambda: Tuned(baselines.TipAdapter(), TIP_GRID),
    "Tip-Adapter-F, test-tuned": lambda: Tuned(baselines.TipAdapterF(), TIP_GRID),
    "CaFo-style fusion, test-tuned": lambda: Tuned(baselines.CacheFusion(), FUSION_GRID),
    "GDA, concatenated, test-tuned": lambda: Tuned(baselines.GDA(), GDA_GRID),
}
"""Every method by the name it has in tables. The test-tuned ones are an upper bound, not a fair opponent."""

SLOW = ("Dirichlet GP (gpytorch)", "GPC (scikit-learn)")


def single_encoder(name: str) -> Method:
    """The Gaussian process on one encoder, with the same zero-shot prior."""
    return lambda: _OneEncoder(name)


class _OneEncoder:
    def __init__(self, encoder: str):
        self.encoder, self.model = encoder, GPEnsembleClassifier()

    def fit(self, X: Mapping[str, Any], y: Any, prior_logits: Any = None) -> "_OneEncoder":
        self.model.fit({self.encoder: X[self.encoder]}, y, prior_logits)
        self.classes_, self.tuned_ = self.model.classes_, self.model.tuned_
        return self

    def predict_proba(self, X: Mapping[str, Any], prior_logits: Any = None) -> np.ndarray:
        return self.model.predict_proba({self.encoder: X[self.encoder]}, prior_logits)


def tuned_on(model: Any) -> str:
    """Which data chose a fitted method's hyper-parameters, in words for a table."""
    tuned = getattr(model, "tuned_", None)
    if tuned is None:
        return model.tuned_on
    return "nothing (fixed defaults)" if tuned.objective == "none" else f"training images ({tuned.objective})"


def run(
    method: Method, train: FeatureTable, test: FeatureTable, *, elsewhere: Mapping[str, FeatureTable] | None = None
) -> dict[str, Any]:
    """Fit on one table and score on another.

    elsewhere: out-of-distribution tables; detection is scored by 1 - max p and, where there is one, by the variance.
    """
    model = method()
    classes = np.unique(train.labels)
    z, z_test = (_logits(table, classes) for table in (train, test))
    start = time.perf_counter()
    if isinstance(model, Tuned):
        model.fit(train, train.labels, z, X_val=test, y_val=test.labels, prior_val=z_test)
    else:
        model.fit(train, train.labels, z)
    seconds = time.perf_counter() - start
    if unknown := sorted(set(np.unique(test.labels)) - set(classes)):
        raise UserError(f"test images of classes without a training image: {', '.join(map(str, unknown))}")
    y: Any = np.searchsorted(classes, test.labels)
    proba = model.predict_proba(test, z_test)
    record = metrics.evaluate(proba, y) | {"seconds": seconds, "tuned_on": tuned_on(model)}
    if elsewhere:
        outside = {name: model.predict_proba(table, _logits(table, classes)) for name, table in elsewhere.items()}
        record |= _detection("max_prob", 1 - proba.max(1), {n: 1 - p.max(1) for n, p in outside.items()})
        if isinstance(model, GPEnsembleClassifier):
            scores = {name: model.ood_score(table) for name, table in elsewhere.items()}
            record |= _detection("variance", model.ood_score(test), scores)
    return record


def _detection(kind: str, inside: np.ndarray, outside: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the out-of-distribution sets."""
    values = list(outside.values())
    return {
        f"auroc_{kind}": float(np.mean([metrics.auroc(inside, v) for v in values])),
        f"fpr95_{kind}": float(np.mean([metrics.fpr95(inside, v) for v in values])),
    }


def _logits(table: FeatureTable, classes: np.ndarray) -> np.ndarray | None:
    from gp_ensemble.zero_shot import columns_by_name

    return None if table.prior_logits is None else table.prior_logits[:, columns_by_name(table.class_names, classes)]


def run_grid(
    draw: Callable[[int, int], tuple[FeatureTable, FeatureTable]],
    methods: Mapping[str, Method],
    *,
    shots: Sequence[int],
    seeds: Iterable[int],
    data: str,
    elsewhere: Mapping[str, FeatureTable] | None = None,
    records: Path | None = None,
) -> list[dict[str, Any]]:
    """Every method on every number of shots and seed. draw: (shots, seed) to training and test tables.

    records: a file of JSON lines; runs that it holds are not run again. A damaged last line, as an interruption
    leaves it, is run again.
    """
    done = read_records(records) if records else []
    known = {(r["data"], r["method"], r["shots"], r["seed"]) for r in done}
    cells = [(s, seed, name) for seed in seeds for s in shots for name in methods]
    missing = [cell for cell in cells if (data, cell[2], cell[0], cell[1]) not in known]
    for shot, seed, name in tqdm(missing, desc=data, disable=not missing, leave=False):
        train, test = draw(shot, seed)
        record = {"data": data, "method": name, "shots": shot, "seed": seed}
        record |= run(methods[name], train, test, elsewhere=elsewhere)
        done.append(record)
        if records:
            records.parent.mkdir(parents=True, exist_ok=True)
            with records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    wanted = {(data, name, shot, seed) for shot, seed, name in cells}
    return [r for r in done if (r["data"], r["method"], r["shots"], r["seed"]) in wanted]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, in order; a missing file has none. A damaged last line is cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for i, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i < len(lines) - 1:
                raise UserError(f"{path} is damaged in line {i + 1}", hint="remove it and run again") from error
            path.write_text("".join(f"{kept}\n" for kept in lines[:-1]), encoding="utf-8")
    return found


def mean_of(records: Iterable[Mapping[str, Any]], metric: str, **where: Any) -> float:
    """Mean of a metric over the records that have the given values."""
    values = [r[metric] for r in records if metric in r and all(r[k] == v for k, v in where.items())]
    return float(np.mean(values)) if values else float("nan")


def summarise(records: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> Table:
    """Methods by shots: mean over the seeds, in per cent for accuracy; with who chose the hyper-parameters."""
    factor = 100 if metric == "accuracy" else 1
    shots = sorted({r["shots"] for r in records})
    rows = []
    for name in dict.fromkeys(r["method"] for r in records):
        own = [r for r in records if r["method"] == name]
        choosers = " / ".join(dict.fromkeys(r["tuned_on"] for r in own))
        cells = [factor * mean_of(own, metric, shots=s) for s in shots]
        rows.append([name, *[None if np.isnan(c) else round(c, 3) for c in cells], choosers])
    seeds = len({r["seed"] for r in records})
    data = ", ".join(dict.fromkeys(r["data"] for r in records))
    title = f"{data}: {metric}{' %' if factor == 100 else ''}, {seeds} seeds"
    return Table(title, ["method", *(f"{s} shots" if s > 1 else "1 shot" for s in shots), "chosen by"], rows)


def write_tables(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Every run as `runs.csv`, and accuracy, NLL and ECE tables of each data set as `tables.md`."""
    import csv

    from tenfold_shared.cli import cell
    from tenfold_shared.hub import replace_atomically

    columns = list(dict.fromkeys(key for record in records for key in record))
    with replace_atomically(folder / "runs.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
    parts = []
    for data in dict.fromkeys(r["data"] for r in records):
        for metric in ("accuracy", "nll", "ece"):
            table = summarise([r for r in records if r["data"] == data], metric)
            lines = [table.columns, ["---"] * len(table.columns), *[[cell(v) for v in row] for row in table.rows]]
            parts.append(f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    with replace_atomically(folder / "tables.md") as partial:
        partial.write_text("\n".join(parts), encoding="utf-8")
