"""Every sub-command as a user types it."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from mlcm import milestones
from mlcm.cli import app
from mlcm.runs import scheduler_settings
from typer.testing import CliRunner

README = Path(__file__).parents[1] / "README.md"
NAMES = ("demo", "tiny", "train", "trajectories", "sample", "eval", "convert", "bench")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    made = run("tiny", "--output", folder, "--json")
    assert made.exit_code == 0, made.output
    assert all(Path(path).exists() for path in json.loads(made.stdout).values())
    return folder


@pytest.fixture(scope="module")
def trained(tiny) -> Path:
    done = run(
        "train",
        "--config",
        tiny / "config.yaml",
        "--stage",
        "1",
        "--stage",
        "2",
        "--device",
        "cpu",
        "--output",
        tiny / "run",
        "--json",
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["checkpoint"] == str(tiny / "run" / "checkpoint")
    return tiny / "run" / "checkpoint"


def test_version_and_help_need_no_torch():
    code = "import sys, mlcm.cli; assert 'torch' not in sys.modules; import mlcm; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert run("--version").output.startswith("mlcm 0.1.0")


@pytest.mark.parametrize("name", NAMES)
def test_every_help_ends_with_an_example(name):
    assert re.search(r"Example: mlcm \w+", run(name, "--help").output)


def test_train_writes_a_lora_that_samples(tiny, trained):
    assert (trained / "pytorch_lora_weights.safetensors").exists()
    drawn = run(
        "sample",
        tiny,
        "a red ball",
        "a cube",
        "--steps",
        2,
        "--lora",
        trained,
        "--output",
        tiny / "images",
        "--device",
        "cpu",
        "--json",
    )
    assert drawn.exit_code == 0, drawn.output
    assert [row["prompt"] for row in json.loads(drawn.stdout)] == ["a red ball", "a cube"]
    assert [p.name for p in sorted((tiny / "images").glob("*.png"))] == ["000.png", "001.png"]


def test_resume_goes_on_and_other_stages_follow(tiny, trained):
    done = run(
        "train",
        "--config",
        tiny / "config.yaml",
        "--stage",
        "adversarial",
        "--resume",
        "--device",
        "cpu",
        "--output",
        tiny / "run",
    )
    assert done.exit_code == 0, done.output
    assert json.loads((trained / "trainer.json").read_text())["progress"]["adversarial"] == 2


def test_the_reward_stage_runs_offline(tiny, trained):
    done = run(
        "train", "--config", tiny / "config.yaml", "--stage", "reward", "--resume", "--device", "cpu", "--output", tiny / "run"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((trained / "trainer.json").read_text())["progress"]["reward"] == 4


def test_own_milestones_of_training_are_sampled_with(tiny):
    """Even log-SNR milestones live in the checkpoint, and sampling takes them from there."""
    (tiny / "snr.yaml").write_text((tiny / "config.yaml").read_text() + "milestone_spacing: snr\nsegments: 4\n")
    done = run("train", "--config", tiny / "snr.yaml", "--stage", "1", "--device", "cpu", "--output", tiny / "snr")
    assert done.exit_code == 0, done.output
    checkpoint = tiny / "snr" / "checkpoint"
    settings = scheduler_settings(checkpoint, None, sampler="ddim")
    assert settings["segments"] == 4 and settings["sampler"] == "ddim"
    assert (
        settings["milestones"] == json.loads((checkpoint / "trainer.json").read_text())["milestones"] != milestones(4)
    )
    common = ["sample", tiny, "a", "--lora", checkpoint, "--device", "cpu", "--output", tiny / "never"]
    refused([*common, "--segments", 8], "segments is 8, but")
    refused([*common, "--steps", 5], "MLCM with M=4 supports 1-4 milestone steps; got 5")
    assert run(*common[:-1], tiny / "four", "--steps", 4).exit_code == 0
    assert scheduler_settings(None, None) == {"segments": 8}


def test_trajectories_then_training_on_them(tiny):
    made = run(
        "trajectories", "--config", tiny / "config.yaml", "--entries", 4, "--output", tiny / "bank", "--device", "cpu"
    )
    assert made.exit_code == 0, made.output
    text = (tiny / "config.yaml").read_text() + "trajectories: bank\n"
    (tiny / "banked.yaml").write_text(text)
    done = run(
        "train", "--config", tiny / "banked.yaml", "--stage", "1", "--device", "cpu", "--output", tiny / "banked"
    )
    assert done.exit_code == 0, done.output


def test_eval_card(tiny, trained):
    card = run("eval", tiny, "--prompts", tiny / "prompts.txt", "--lora", trained, "--steps", 1, "--steps", 4,
               "--teacher-steps", 4, "--guidance-scale", 3, "--device", "cpu", "--json")  # fmt: skip
    assert card.exit_code == 0, card.output
    records = json.loads(card.stdout)
    assert [r["steps"] for r in records] == ["teacher", "1", "4"] and records[1]["Fréchet"] > 0


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_convert(tiny, trained, to):
    done = run("convert", trained, "--to", to, "--output", tiny / f"as-{to}")
    assert done.exit_code == 0, done.output
    assert list((tiny / f"as-{to}").glob("*.safetensors"))


def test_convert_back_from_peft(tiny, trained):
    assert run("convert", trained, "--to", "peft", "--output", tiny / "folder").exit_code == 0
    done = run("convert", tiny / "folder", "--output", tiny / "back")
    assert done.exit_code == 0 and "adapter_config.json" in done.output


def test_bench_toy():
    done = run("bench", "toy", "--iterations", 2, "--json")
    assert done.exit_code == 0, done.output
    assert {r["method"] for r in json.loads(done.stdout)} == {"LCM", "joint"}


def test_demo(tmp_path):
    done = run("demo", "--output", tmp_path, "--iterations", 3)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row[0] for row in summary["rows"]] == ["DDIM 4", "DDIM 8", "LCM 4", "ours 2", "ours 4", "ours 8"]
    for figure in summary["figures"]:
        assert (tmp_path / figure["file"]).stat().st_size > 5000


def test_guidance_on_a_distilled_student_warns(tiny, trained):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(
            "sample",
            tiny,
            "a",
            "--lora",
            trained,
            "--guidance-scale",
            7,
            "--steps",
            1,
            "--device",
            "cpu",
            "--output",
            tiny / "w",
        )
    assert any("guidance_scale 7.0 on a student" in str(w.message) for w in caught)


def refused(arguments, text: str) -> None:
    answer = run(*arguments)
    assert answer.exit_code == 2, answer.output
    lines = [line for line in answer.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ") and text in lines[-1] and "Traceback" not in answer.output


def test_bad_input_is_one_line(tiny, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    config = tmp_path / "c.yaml"

    def settings(**changed) -> Path:
        base = {"model": str(tiny), "prompts": str(tiny / "prompts.txt"), **changed}
        config.write_text("".join(f"{k}: {v}\n" for k, v in base.items()))
        return config

    out = ("--output", tmp_path / "never")
    refused(["train", "--config", tmp_path / "none.yaml", *out], "none.yaml")
    refused(["train", "--config", empty, *out], "holds no settings")
    refused(["train", "--config", settings(segments=0), *out], "segments")
    refused(["train", "--config", settings(skip=0), *out], "skip")
    refused(["train", "--config", settings(prediction_type="noise"), *out], "prediction_type")
    refused(["train", "--config", settings(typo=1), *out], "typo")
    refused(["train", "--config", settings(prompts=empty), *out], "is empty")
    refused(["train", "--config", settings(model="./nowhere"), *out], "does not exist")
    refused(
        ["train", "--config", settings(segments=2000), "--device", "cpu", *out], "segments is 2000, expected 1 to 999"
    )
    refused(["train", "--config", settings(), "--stage", "7", *out], "stage is '7'")
    refused(["train", "--config", settings(), "--device", "cuda:7", *out], "expected auto or cpu")
    refused(["train", "--config", settings(), "--resume", *out], "holds no checkpoint to resume")
    refused(["train", "--config", settings(reward="beauty"), "--stage", "reward", *out], "reward is 'beauty'")
    refused(["train", "--config", settings(loss="latent_lpips"), *out], "latent_lpips")
    refused(["train", "--config", settings(resolution=33), "--device", "cpu", *out], "multiple of 2")
    refused(["sample", tiny, "a", "--steps", 12, *out], "MLCM with M=8 supports 1-8 milestone steps; got 12")
    refused(["sample", "./nowhere", "a", *out], "does not exist")
    refused(["sample", tiny, "a", "--sampler", "euler", *out], "sampler is 'euler'")
    refused(["sample", tiny, "a", "--lora", tmp_path / "no.safetensors", "--device", "cpu", *out], "does not exist")
    refused(["sample", tiny, "a", "--device", "tpu9", *out], "device 'tpu9'")
    refused(["sample", "some/model", "a", "--device", "cpu", *out], "neither a folder here nor a model")
    refused(["eval", tiny, "--prompts", empty, "--device", "cpu"], "is empty")
    refused(["convert", tmp_path / "no", *out], "does not exist")
    refused(["trajectories", "--config", settings(prompts="missing.txt"), *out], "missing.txt")
    refused(["bench", "imagenet"], "bench is 'imagenet'")
    assert not (tmp_path / "never").exists()


def test_the_readmes_commands_exist():
    for line in re.findall(r"^mlcm ([a-z]+)", README.read_text(), re.M):
        assert line in NAMES
