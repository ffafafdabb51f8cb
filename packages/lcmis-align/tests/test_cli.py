"""Every sub-command as a user types it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lcmis_align.cli import app
from typer.testing import CliRunner

COMMAND = str(Path(sys.executable).parent / "lcmis-align")
TRAINED = ["--model", "testbed:trained", "--guidance", "1"]
EXACT = ["--model", "testbed:exact", "--scorer", "testbed:exact", "--guidance", "1"]
RECORD = {"first_describe": "", "second_describe": ""}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def result(*arguments):
    found = run(*arguments)
    assert found.exit_code == 0, found.output + str(found.exception)
    return json.loads(found.stdout)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompt.json"
    names = ["square", "cross"]
    path.write_text(json.dumps({f"prompt{i}": {"prompt": f"checker {name}", "first_prompt": name, "second_prompt": "checker", **RECORD}
                                for i, name in enumerate(names)}))  # fmt: skip
    return path


def test_help_and_version_at_once():
    done = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True)
    for name in ("plan", "generate", "search", "mine", "level", "bench", "train", "demo"):
        assert name in done.stdout
        assert "Example: lcmis-align" in run(name, "--help").output
    assert "0.1.0" in subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True).stdout
    code = "import lcmis_align.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_plan():
    found = result("plan", "a tea cup of iced coke", "--json")
    assert found["first_prompt"] == "a tea cup"
    assert found["latent"] == "glass cup"


def test_generate_at_a_step_and_by_notation(tmp_path):
    a = result("generate", "checker square", *EXACT, "--switch", "10", "--planner", "file", "--plans", plans(tmp_path),
               "--seeds", "0-1,4", "--output", tmp_path / "a", "--json")  # fmt: skip
    b = result("generate", "[square:checker square:0.25]", *EXACT, "--switch", "none", "--seeds", "0,1,4",
               "--output", tmp_path / "b", "--json")  # fmt: skip
    assert a["calls"] == b["calls"] == 120
    for name in a["files"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    dry = result(
        "generate", "[square:checker square:0.25]", "--switch", "none", "--seeds", "0,1,4", "--dry-run", "--json"
    )
    assert dry == {"denoiser_calls": 120}


def plans(folder):
    path = folder / "plans.json"
    path.write_text(
        json.dumps([{"prompt": "checker square", "first_prompt": "square", "second_prompt": "checker", **RECORD}])
    )
    return path


def test_generate_searches_and_a_dry_run_tells_its_cost(tmp_path):
    common = ["generate", "checker square", *EXACT, "--planner", "file", "--plans", plans(tmp_path), "--seeds", "0-3",
              "--search", "sweep", "--output", tmp_path / "out", "--json"]  # fmt: skip
    dry = result(*common, "--dry-run")
    assert not (tmp_path / "out").exists()
    found = result(*common)
    assert found["calls"] == dry["denoiser_calls"]
    assert len(found["files"]) == 4
    assert json.loads((tmp_path / "out" / "result.json").read_text())["switch_step"] == found["switch_step"]


def test_search_stands_in_for_the_official_script(prompts, tmp_path):
    out = tmp_path / "out"
    common = ["search", "--prompts", prompts, *EXACT, "--judge", "testbed:exact", "--num-images", "5", "--output", out]
    found = result(*common, "--policy", "paper", "--export-pt", "--json")
    from lcmis_align.batch import SCHEMA

    assert list(found) == ["prompt0", "prompt1"]
    assert all(set(SCHEMA) <= set(record) for record in found.values())
    assert json.loads((out / "results.json").read_text()) == found
    with (out / "trace.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert sum(int(row["calls"]) for row in rows) == sum(record["calls"] for record in found.values())
    official = torch.load(out / "result.pt", weights_only=True)
    assert official["checker square"] == [
        found["prompt0"]["ratio"],
        *(found["prompt0"]["scores"][s] for s in ("sA", "sB")),
    ]
    assert json.loads((out / "run.json").read_text())["settings"]["policy"] == "paper"
    assert all((out / name).exists() for record in found.values() for name in record["files"])
    table = result("level", out / "results.json", "--json")
    assert sum(row["prompts"] for row in table) == 2
    again = run(*common, "--policy", "paper")
    assert again.exit_code == 2
    assert "holds a run already" in again.output
    other = run(*common, "--policy", "robust", "--resume")
    assert other.exit_code == 2
    assert "other settings (policy)" in other.output


def test_a_killed_search_goes_on_where_it_was(prompts, tmp_path):
    names = ["square", "cross"] * 10
    prompts.write_text(json.dumps({f"p{i}": {"prompt": f"checker {n}", "first_prompt": n, "second_prompt": "checker", **RECORD}
                                   for i, n in enumerate(names)}))  # fmt: skip
    out = tmp_path / "out"
    command = [
        COMMAND,
        "search",
        "--prompts",
        str(prompts),
        *EXACT,
        "--search",
        "sweep",
        "--num-images",
        "2",
        "--output",
        str(out),
        "--resume",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 300
    while not (out / "results.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads((out / "results.json").read_text())
    assert 0 < len(before) < 20
    kept = {name: (out / name).stat().st_mtime_ns for record in before.values() for name in record["files"]}
    found = result(*command[1:], "--json")
    assert list(found) == [f"p{i}" for i in range(20)]
    assert all(json.loads(json.dumps(found[key])) == record for key, record in before.items())
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    assert {record["switch_step"] for key, record in found.items() if record["prompt"] == "checker square"} == {
        found["p0"]["switch_step"]
    }


def test_keys_of_a_prompt_file_never_leave_the_folder(prompts, tmp_path):
    prompts.write_text(
        json.dumps(
            {
                "../../evil": {
                    "prompt": "../checker square",
                    "first_prompt": "square",
                    "second_prompt": "checker",
                    **RECORD,
                }
            }
        )
    )
    out = tmp_path / "deep" / "out"
    found = result("search", "--prompts", prompts, *EXACT, "--num-images", "1", "--output", out, "--json")
    assert all((out / name).resolve().is_relative_to(out.resolve()) for name in found["../../evil"]["files"])


def test_mine_rates_pairs(tmp_path):
    pairs = tmp_path / "pairs.json"
    pairs.write_text(
        json.dumps([{"prompt": "square of red", "first_prompt": "square", "second_prompt": "red", **RECORD}])
    )
    common = ["mine", "--pattern", "shape, wrong colour", "--planner", "file", "--plans", pairs, *TRAINED, "--judge",
              "testbed:trained", "--num-images", "3", "--steps", "10", "--output", tmp_path / "out"]  # fmt: skip
    assert result(*common, "--n", "1", "--dry-run", "--json") == {"denoiser_calls_least": 0, "denoiser_calls_most": 30}
    found = result(*common, "--json")
    assert [row["prompt"] for row in found] == ["square of red"]
    assert found == result(*common, "--resume", "--json")
    assert sum(row["prompts"] for row in result("level", tmp_path / "out" / "pairs.jsonl", "--json")) == 1


def test_bench():
    names = ["plain", "MoCE, default search"]
    methods = [part for name in names for part in ("--method", name)]
    found = result("bench", "--toy", *methods, "--num-images", "40", "--json")
    assert [row["method"] for row in found] == names
    assert found[1]["both"] > found[0]["both"]
    cost = result("bench", "--toy", "--method", "plain", "--num-images", "40", "--dry-run", "--json")
    assert cost == {"denoiser_calls": 1600} == {"denoiser_calls": 40 * found[0]["calls"]}


def test_train_writes_weights_that_load(tmp_path):
    found = result("train", "--steps", "2", "--output", tmp_path, "--json")
    from lcmis_align.worlds import trained

    assert trained.load(Path(found["weights"])).unet.config.width == 64


@pytest.mark.parametrize(("arguments", "message"), [
    (["plan", "red"], "could not split 'red' into two concepts"),
    (["plan", "a b", "--planner", "x"], "planner is 'x'"),
    (["plan", "cup of tea", "--planner", "openai"], "needs a model"),
    (["plan", "cup of tea", "--planner", "file"], "needs a prompt file"),
    (["plan", "cup of tea", "--planner", "openai", "--planner-model", "m", "--base-url", "http://127.0.0.1:9/v1"], "cannot be reached"),
    (["plan", "cup of tea", "--planner", "hf", "--planner-model", "./missing"], "does not exist"),
    (["generate", "cup of tea", "--model", "./missing"], "does not exist"),
    (["generate", "cup of tea", "--model", "nobody/nothing", "--switch", "3"], "neither a folder here nor a model"),
    (["generate", "cup of tea", "--model", "testbed:x"], "there is no 'testbed:x'"),
    (["generate", "cup of tea", "--switch", "45", "--dry-run"], "switch_step 45 is outside 0..40"),
    (["generate", "cup of tea", "--switch", "soon"], "switch is 'soon'"),
    (["generate", "[a:b:0.5", "--switch", "none"], "column 1 that is not closed"),
    (["generate", "square of checker", *EXACT, "--seeds", "7-3"], "range is empty"),
    (["generate", "square of checker", *EXACT, "--seeds", "x"], "seeds are 'x'"),
    (["generate", "square of checker", *EXACT, "--search", "x"], "search is 'x'"),
    (["generate", "square of checker", *EXACT, "--device", "gpu"], "device 'gpu' cannot be used"),
    (["generate", "square of checker", *EXACT, "--dtype", "int3"], "dtype is 'int3'"),
    (["generate", "square of checker", "--model", "testbed:exact", "--scorer", "x"], "scorer is 'x'"),
    (["generate", "square of gold", *EXACT], "judge knows nothing of 'gold'"),
    (["search", "--prompts", "missing.json"], "missing.json: No such file"),
    (["level", "missing.json"], "missing.json does not exist"),
    (["mine", "--pattern", "x", "--model", "testbed:exact", "--judge", "testbed:exact"], "knows no pattern 'x'"),
    (["bench", "--method", "magic"], "no method 'magic'"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    done = run(*arguments)
    assert done.exit_code == 2, done.output + str(done.exception)
    lines = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("{", "is no JSON"), ('{"p": {"prompt": "x"}}', "p has first_prompt")]
)
def test_bad_prompt_files(prompts, text, message, tmp_path):
    prompts.write_text(text)
    done = run("search", "--prompts", prompts, *EXACT, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_bad_results(tmp_path):
    path = tmp_path / "results.json"
    for text, message in (("[]", "no results file"), ('{"p": {"prompt": "x"}}', "no judged images"), ("x", "no JSON")):
        path.write_text(text)
        done = run("level", path)
        assert done.exit_code == 2
        assert message in done.output
