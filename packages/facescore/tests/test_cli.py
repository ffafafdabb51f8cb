"""Every sub-command as a user types it, and every error as a user sees it."""

import csv
import io
import json
import shutil
import subprocess
import sys

import pytest
from facescore.cli import app
from facescore.testbed import write_world
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 6)
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_score(world, tmp_path):
    images = sorted((world / "images").glob("*.png"))[:2]
    options = ("--model", world / "reward", "--detector", "full-image")
    found = json.loads(run("score", *images, *options, "--json", "--viz", tmp_path / "viz"))
    assert [r["face"] for r in found] == [0, 0] and found[0]["x2"] == 32
    assert len(list((tmp_path / "viz").glob("*.scored.png"))) == 2
    rows = list(csv.DictReader(io.StringIO(run("score", *images, *options, "--csv"))))
    assert float(rows[1]["score"]) == pytest.approx(found[1]["score"])
    assert "face000.png" in run("score", *images, *options)
    none = json.loads(run("score", images[0], "--model", world / "reward", "--json"))
    assert none[0]["score"] is None


def test_viz_draws_the_box_and_keeps_names_apart(world, tmp_path):
    from PIL import Image

    for name in ("a/x.png", "b/x.png", "b/x.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (300, 200), "black").save(tmp_path / name)
    boxes = {"x.png": [[100, 80, 200, 160]], "x.bmp": []}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    run("score", *(tmp_path / n for n in ("a/x.png", "b/x.png", "b/x.bmp")), "--model", world / "reward", "--detector",
        f"boxes:{tmp_path / 'boxes.json'}", "--viz", tmp_path / "viz")  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "viz").iterdir()) == ["x.2.scored.png", "x.3.scored.png", "x.scored.png"]
    drawn, none = (Image.open(tmp_path / "viz" / n) for n in ("x.scored.png", "x.3.scored.png"))
    edges = {drawn.getpixel(p) for p in ((150, 80), (100, 120), (200, 120), (150, 160))}
    assert edges == {(193, 67, 46)} and drawn.getpixel((150, 120)) == (0, 0, 0) == none.getpixel((150, 80))
    assert none.getpixel((5, 5)) != (0, 0, 0)  # says that there is no face


def test_rank(world):
    images = sorted((world / "images").glob("*.png"))[:3]
    found = json.loads(run("rank", *images, "--model", world / "reward", "--detector", "full-image", "--json"))
    scores = [r["score"] for r in found]
    assert scores == sorted(scores, reverse=True) and found[0]["rank"] == 1
    by_prompt = json.loads(run("rank", *images, "--model", world / "reward", "--prompt", "A face.", "--json"))
    assert len(by_prompt) == 3


def test_build_train_evaluate_tune_convert(world, tmp_path):
    built = run("build-pairs", world / "images", "--pipeline", "toy", "--min-face", 8, "--steps", 2, "--missing", "ignore",
                "-o", tmp_path / "pairs", "--json")  # fmt: skip
    assert json.loads(built)["pairs"] == 6
    again = run("build-pairs", world / "images", "--pipeline", "toy", "-o", tmp_path / "pairs", code=2)
    assert "holds pairs already" in again
    resumed = run("build-pairs", world / "images", "--pipeline", "toy", "--min-face", 8, "--steps", 2, "--missing", "ignore",
                  "-o", tmp_path / "pairs", "--resume", "--json")  # fmt: skip
    assert json.loads(resumed)["now: pairs"] == 0
    train = ("train", tmp_path / "pairs", "--model", world / "reward", "--epochs", 1, "--batch-size", 2, "-o",
             tmp_path / "reward", "--validation", 0.3, "--json")  # fmt: skip
    assert json.loads(run(*train))["updates"] == 2
    assert json.loads(run(*train, "--resume"))["updates"] == 2
    scorers = f"facescore={tmp_path / 'reward' / 'model'},sharpness"
    found = json.loads(run("evaluate", "--pairs", world / "pairs", "--scorers", scorers, "--json"))
    assert [r["scorer"] for r in found] == ["facescore", "sharpness"]
    lines = json.dumps({"images": ["images/face000.png", "images/face001.png"], "rank": [1, 2]})
    (world / "ranks.jsonl").write_text(lines)
    ranked = json.loads(run("evaluate", "--rankings", world / "ranks.jsonl", "--scorers", "sharpness", "--detector",
                            "full-image", "--json"))  # fmt: skip
    assert ranked[0]["accuracy"] in (0, 1) and ranked[0]["images without a face"] == 0
    tuned = run("tune", "--pipeline", "toy", "--pairs", tmp_path / "pairs", "--steps", 2, "--batch-size", 2, "-o",
                tmp_path / "lora", "--json")  # fmt: skip
    assert (tmp_path / "lora" / "weights" / "pytorch_lora_weights.safetensors").exists() and json.loads(tuned)[
        "updates"
    ] == 2
    official = run("convert", tmp_path / "reward" / "model", "--to", "official", "-o", tmp_path / "official", "--json")
    assert json.loads(official)["written"].endswith("FS_model.pt")
    run("convert", tmp_path / "official" / "FS_model.pt", "-o", tmp_path / "back")
    a, b = (p / "model.safetensors" for p in (tmp_path / "reward" / "model", tmp_path / "back"))
    from safetensors.torch import load_file

    first, second = load_file(a), load_file(b)
    assert all((first[k] == second[k]).all() for k in first)


def test_toy_and_its_recipe(tmp_path):
    assert json.loads(run("toy", "--faces", 2, "-o", tmp_path / "w", "--json"))["pairs"] == 2
    made = json.loads(run("toy", "--rebuild", "--steps", 5, "-o", tmp_path / "a", "--json"))
    from facescore.testbed import ASSETS, RECIPES
    from safetensors.torch import load_file

    assert list(made) == list(RECIPES)
    for kind, path in made.items():
        new, packaged = load_file(path), load_file(ASSETS / f"{kind}.safetensors")
        assert {k: (t.shape, t.dtype) for k, t in new.items()} == {k: (t.shape, t.dtype) for k, t in packaged.items()}


def test_errors_are_one_line_and_exit_2(world, tmp_path):
    image = world / "images" / "face000.png"
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}')
    (tmp_path / "empty.txt").write_text("")
    for part, source in (("photos", world / "images"), ("broken", world / "pairs")):
        shutil.copytree(source, tmp_path / part)
        cut = max((tmp_path / part).rglob("*.png"))
        cut.write_bytes(cut.read_bytes()[:100])
    for arguments, text in (
        (("score", tmp_path / "no.png", "--model", world / "reward"), "no.png"),
        (("score", tmp_path / "empty.png", "--model", world / "reward"), "empty.png"),
        (("score", image, "--model", tmp_path / "no.pt"), "no.pt"),
        (("score", image, "--model", "nobody/nothing"), "nobody/nothing"),
        (("score", image, "--model", world / "reward", "--detector", "mtcnn"), "mtcnn"),
        (("score", image, "--model", world / "reward", "--csv", "--json"), "--csv and --json"),
        (("rank", image, "--model", world / "reward", "--aggregate", "sum"), "aggregate"),
        (("build-pairs", tmp_path / "none", "--pipeline", "toy"), "does not exist"),
        (("build-pairs", world / "images", "--pipeline", tmp_path / "nopipe", "-o", tmp_path / "x"), "nopipe"),
        (("build-pairs", tmp_path / "photos", "--pipeline", "toy", "-o", tmp_path / "x"), "is damaged"),
        (("build-pairs", world / "images", "--pipeline", "toy", "--min-face", 8, "--mask", "landmarks", "-o",
          tmp_path / "x"), "has no landmarks"),
        (("build-pairs", world / "images", "--pipeline", "toy", "--min-face", 99, "-o", tmp_path / "x"), "no pair could"),
        (("train", tmp_path / "broken", "--model", world / "reward", "-o", tmp_path / "x"), "is damaged"),
        (("train", world / "pairs", "--model", world / "reward", "--save-every", 0), "save_every is 0"),
        (("train", world / "pairs", "--model", world / "reward", "--mixed-precision", "x"), "mixed_precision is x"),
        (("tune", "--pipeline", "toy", "--pairs", tmp_path / "broken", "-o", tmp_path / "x"), "is damaged"),
        (("tune", "--pipeline", "toy", "--pairs", world / "pairs", "--save-every", 0), "save_every is 0"),
        (("tune", "--pipeline", "toy", "--method", "filter", "--prompts", tmp_path / "no.txt"), "no.txt"),
        (("tune", "--pipeline", "toy", "--method", "filter", "--prompts", tmp_path / "empty.txt"), "is empty"),
        (("train", tmp_path / "bad.jsonl", "--model", world / "reward"), "line 1: missing 'win'"),
        (("train", world / "pairs", "--model", world / "reward", "--lr", -1), "lr is -1"),
        (("evaluate",), "expected one of"),
        (("evaluate", "--pairs", world / "pairs", "--scorers", "taste"), "scorer is 'taste'"),
        (("evaluate", "--pairs", world / "pairs", "--scorers", "eigenfaces"), "--clean"),
        (("tune", "--pipeline", "toy", "--method", "sft"), "needs pairs"),
        (("tune", "--pipeline", "toy", "--pairs", world / "pairs", "--method", "x"), "method is 'x'"),
        (("convert", world / "reward", "--to", "zip", "-o", tmp_path / "z"), "layout is 'zip'"),
    ):  # fmt: skip
        error = run(*arguments, code=2)
        assert text in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists() and not (tmp_path / "z").exists()


def test_help_has_examples_and_needs_no_torch():
    for command in ("score", "rank", "build-pairs", "train", "evaluate", "tune", "convert", "toy", "demo"):
        assert "Example: facescore" in run(command, "--help")
    code = "import sys, facescore, facescore.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
