import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gp_ensemble import FeatureTable, GPEnsembleClassifier, ZeroShotClassifier
from gp_ensemble.cli import app
from gp_ensemble.testbed import load_world
from PIL import Image
from typer.testing import CliRunner, Result

COMMANDS = [
    "demo",
    "extract",
    "fit",
    "predict",
    "evaluate",
    "benchmark",
    "inspect",
    "update",
    "forget",
    "import-cache",
    "doctor",
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def answer(*arguments: object) -> object:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture
def features(tmp_path: Path) -> dict[str, Path]:
    world = load_world("digits")
    train, test = world.draw(4, 0)
    tables = {"train": train, "test": test[np.arange(60)], "other": world.elsewhere["letters"][np.arange(60)]}
    for name, table in tables.items():
        table.save(tmp_path / name / "features.safetensors")
    return {name: tmp_path / name / "features.safetensors" for name in tables}


@pytest.fixture
def classifier(features: dict[str, Path], tmp_path: Path) -> Path:
    answer("fit", features["train"], "--output", tmp_path / "classifier")
    return tmp_path / "classifier"


def test_help_is_instant_and_each_command_has_an_example() -> None:
    code = "import sys, gp_ensemble.cli, gp_ensemble; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    listed = call("--help").stdout
    for name in COMMANDS:
        assert name in listed and "Example: gp-ensemble" in call(name, "--help").stdout


def test_from_images_to_answers(tmp_path: Path) -> None:
    """extract, fit, predict, evaluate and inspect on a folder of images with a real timm model's code."""
    import timm

    rng = np.random.default_rng(0)
    for name, colour in {"red": (220, 20, 20), "blue": (20, 30, 220)}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.clip(np.asarray(colour) + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "weights.pth")
    encoder = f"cnn=timm:test_resnet@{tmp_path / 'weights.pth'}"
    answer("extract", tmp_path / "images", "--encoder", encoder, "--output", tmp_path / "features", "--views", 2)
    table = tmp_path / "features" / "features.safetensors"
    fitted = answer("fit", table, "--shots", 3, "--output", tmp_path / "clf")
    assert {r["what"] for r in fitted} >= {"chosen by", "leave-one-out accuracy", "share of cnn", "noise"}
    answer("predict", tmp_path / "clf", table, "--top-k", 2, "--output", tmp_path / "answers.csv")
    rows = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert list(rows[0]) == ["path", "label", "p", "label 2", "p 2", "variance"] and len(rows) == 8
    assert all(row["path"].startswith(row["label"]) for row in rows)
    assert answer("evaluate", tmp_path / "clf", table)["accuracy"] == 1.0


def test_evaluate_and_inspect(classifier: Path, features: dict[str, Path]) -> None:
    result = answer("evaluate", classifier, features["test"], "--ood", features["other"])
    assert result["accuracy"] > 0.8 and result["chosen by"] == "training images (loo_ce)"
    assert result[f"auroc of variance, {features['other']}"] > 0.8
    rows = answer("inspect", classifier, "--suspects", 2)
    assert sum("suspect" in r["what"] for r in rows) == 2
    assert "share of hog" in call("inspect", classifier).stdout


def test_update_and_forget(classifier: Path, features: dict[str, Path], tmp_path: Path) -> None:
    more = tmp_path / "more"
    assert answer("update", classifier, features["test"], "--output", more)["images"] == 100
    gone = answer("forget", more, "--index", 3, "--index", 7, "--output", tmp_path / "less")
    assert gone == {"images": 98, "classes": 10, "written": str(tmp_path / "less")}
    assert len(GPEnsembleClassifier.load(more).gp_.targets) == 100
    stranger = FeatureTable.load(features["test"])
    stranger.labels = np.asarray(["ten"] * 60)
    stranger.save(tmp_path / "ten.safetensors")
    assert "zero-shot logits" in refused("update", classifier, tmp_path / "ten.safetensors", "--output", tmp_path / "x")
    answer("fit", features["train"], "--mean", "zero", "--output", tmp_path / "plain")
    assert (
        answer("update", tmp_path / "plain", tmp_path / "ten.safetensors", "--output", tmp_path / "x")["classes"] == 11
    )


def test_benchmark_writes_tables_and_goes_on(features: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("benchmark", features["train"], features["test"], "--method", "GP ensemble", "--method", "zero-shot",
                 "--shots", 1, "--seeds", 2, "--output", tmp_path / "runs")  # fmt: skip
    rows = answer(*arguments)
    assert [r["method"] for r in rows] == ["GP ensemble", "zero-shot"] and rows[0][
        "chosen by"
    ] == "training images (ml)"
    before = (tmp_path / "runs" / "records.jsonl").read_text()
    answer(*arguments)
    assert (tmp_path / "runs" / "records.jsonl").read_text() == before
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"records.jsonl", "runs.csv", "tables.md"}
    small = ("benchmark", "--suite", "digits", "--method", "GP ensemble", "--shots", 1, "--seeds", 1)
    assert "GP ensemble" in call(*small, "--output", tmp_path / "small").stdout


def test_import_cache_and_doctor(tmp_path: Path) -> None:
    torch.save(torch.eye(4), tmp_path / "keys_2shots.pt")
    torch.save(torch.eye(2).repeat(2, 1), tmp_path / "values_2shots.pt")
    (row,) = answer("import-cache", tmp_path, "--output", tmp_path / "out")
    assert row["images"] == 4 and len(FeatureTable.load(tmp_path / "out" / "train.safetensors")) == 4
    rows = answer("doctor", "--images", 16000, "--classes", 1000, "--dimensions", 2304)
    need = {(r["solver"], r["dtype"]): r["GiB"] for r in rows}
    assert 1.0 < need["cholesky", "float32"] < 2.0 < need["cholesky", "float64"] < 4.0


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gp_ensemble import demo

    monkeypatch.setattr(demo, "SHOTS", (1, 4))
    monkeypatch.setattr(demo, "SHOWN", ("GP ensemble", "zero-shot"))
    rows = answer("demo", "--output", tmp_path, "--seed", 5)
    scores = {r["method"]: r for r in rows}
    assert scores["GP ensemble"]["4 shots"] > scores["zero-shot"]["4 shots"] + 10
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["package"] == "gp-ensemble" and len(summary["figures"]) == 3
    for figure in summary["figures"]:
        for suffix in (".png", ".svg"):
            assert (tmp_path / figure["file"]).with_suffix(suffix).stat().st_size > 5000


def test_bad_input_is_one_line_and_writes_nothing(features: dict[str, Path], classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "never"
    train = FeatureTable.load(features["train"])

    def saved(name: str, **changes: object) -> Path:
        fields = {"features": dict(train.items()), "labels": train.labels, "prior_logits": train.prior_logits}
        FeatureTable(**{**fields, "class_names": train.class_names, **changes}).save(tmp_path / name)
        return tmp_path / name

    broken = {**dict(train.items()), "hog": train["hog"].copy()}
    broken["hog"][3, 2] = np.nan
    message = refused("fit", saved("nan.safetensors", features=broken), "--output", out)
    assert "'hog' hold NaN" in message and "row 3" in message
    one = saved("one.safetensors", labels=np.asarray(["one"] * len(train)))
    assert "one class" in refused("fit", one, "--output", out)
    assert "shots is 0" in refused("fit", features["train"], "--shots", 0, "--output", out)
    assert "has no labels" in refused("fit", saved("bare.safetensors", labels=None), "--output", out)
    assert "expected auto" in refused("fit", features["train"], "--mean", "median", "--output", out)
    assert "does not exist" in refused("fit", tmp_path / "nowhere.safetensors", "--output", out)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert "is damaged" in refused("fit", tmp_path / "empty.safetensors", "--output", out)
    narrow = saved("narrow.safetensors", features={**dict(train.items()), "hog": train["hog"][:, :5]})
    assert "hog (5)" in refused("predict", classifier, narrow, "--output", out)
    few = saved("few.safetensors", features={"hog": train["hog"]})
    assert "missing: clip" in refused("predict", classifier, few, "--output", out)
    textless = saved("textless.safetensors", prior_logits=None)
    assert "without them" in refused("predict", classifier, textless, "--output", out)
    assert "does not exist" in refused("predict", tmp_path / "nowhere", features["test"], "--output", out)
    assert "there are 40 training images" in refused("forget", classifier, "--index", 40, "--output", out)
    assert "device 'warp9'" in refused("fit", features["train"], "--device", "warp9", "--output", out)
    assert "no method" in refused("benchmark", "--suite", "digits", "--method", "magic", "--output", out)
    assert "nothing to run on" in refused("benchmark", "--output", out)
    assert "no world" in refused("benchmark", "--suite", "imagenet", "--output", out)
    assert "does not exist" in refused("import-cache", tmp_path / "nowhere", "--output", out)
    assert not out.exists()


def test_bad_images_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    out = tmp_path / "never"
    encoder = "a=timm:test_resnet.r160_in1k"
    assert "does not exist" in refused("extract", tmp_path / "nowhere", "--encoder", encoder, "--output", out)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    assert "could not be loaded" in refused("extract", tmp_path / "images", "--encoder", encoder, "--output", out)
    hub = "a=transformers:nobody/nothing-at-all"
    assert "neither a folder" in refused("extract", tmp_path / "images", "--encoder", hub, "--output", out)
    prior = refused("extract", tmp_path / "images", "--encoder", encoder, "--prior", "clip", "--output", out)
    assert "not among the encoders" in prior
    (tmp_path / "images" / "b" / "1.png").write_bytes(b"no image")
    assert "1.png' cannot be read" in refused("extract", tmp_path / "images", "--encoder", encoder, "--output", out)
    assert not out.exists()


def test_update_knows_a_new_class_by_the_zero_shot_classifier(features: dict[str, Path], tmp_path: Path) -> None:
    world = load_world("digits")
    train = FeatureTable.load(features["train"])
    zero_shot = ZeroShotClassifier(world.zero_shot.class_names, world.zero_shot.weights, world.zero_shot.scale)
    known = train[train.labels != "nine"]
    known.prior_logits = None
    GPEnsembleClassifier(zero_shot=zero_shot).fit(known, known.labels).save(tmp_path / "nine-less")
    new = train[train.labels == "nine"]
    new.save(tmp_path / "nine.safetensors")
    grown = answer("update", tmp_path / "nine-less", tmp_path / "nine.safetensors", "--output", tmp_path / "grown")
    assert grown["classes"] == 10
