"""Each long command, on models and pipelines saved to disk, killed with -9 in the middle and resumed from the command line."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import StableDiffusionPipeline
from facescore.cli import app
from facescore.pairs.dataset import FILE
from facescore.testbed import write_world
from safetensors.torch import load_file
from typer.testing import CliRunner


def kill_in_the_middle(arguments, enough):
    """Start a command and kill it as soon as `enough()` of its work is on disk."""
    process = subprocess.Popen(
        [sys.executable, "-m", "facescore", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 300
    while not enough():
        assert process.poll() is None and time.monotonic() < end, "the command ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output


def updates(path):
    """How many updates a checkpoint holds; 0 when there is none yet."""
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_pipeline):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 12)
    make_pipeline("sd", folder)
    return folder


def test_build_pairs(world, tmp_path):
    def command(name):
        return ("build-pairs", world / "images", "--pipeline", world / "pipe", "--detector", "full-image", "--min-face", 8,
                "--missing", "ignore", "--steps", 2, "-o", tmp_path / name)  # fmt: skip

    lines = tmp_path / "broken" / FILE
    kill_in_the_middle(command("broken"), lambda: lines.exists() and lines.read_text().count("\n") >= 2)
    before = lines.read_text().splitlines()
    assert 2 <= len(before) < 12
    run(*command("broken"), "--resume")
    run(*command("whole"))
    assert lines.read_text() == (tmp_path / "whole" / FILE).read_text()
    whole = sorted((tmp_path / "whole" / "images").iterdir())
    assert len(whole) == 36 and all(p.read_bytes() == (lines.parent / "images" / p.name).read_bytes() for p in whole)


def test_train(world, tmp_path):
    def command(name):
        return ("train", world / "pairs", "--model", world / "reward", "--lr", 1e-3, "--epochs", 12, "--batch-size", 3,
                "--fix-rate", 0, "--validation", 0.25, "--save-every", 1, "--noise", 0.1, "-o", tmp_path / name)  # fmt: skip

    kill_in_the_middle(command("broken"), (tmp_path / "broken" / "training.pt").exists)
    assert 1 <= updates(tmp_path / "broken" / "training.pt") < 36
    run(*command("broken"), "--resume")
    run(*command("whole"))
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("broken", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    start = load_file(world / "reward" / "model.safetensors")
    assert any(not torch.equal(a[k], start[k]) for k in a)


def test_tune(world, tmp_path):
    def command(name):
        return ("tune", "--pipeline", world / "pipe", "--pairs", world / "pairs", "--steps", 24, "--lr", 1e-2, "--batch-size",
                2, "--lora-rank", 2, "--save-every", 1, "-o", tmp_path / name)  # fmt: skip

    kill_in_the_middle(command("broken"), (tmp_path / "broken" / "training.pt").exists)
    assert 1 <= updates(tmp_path / "broken" / "training.pt") < 24
    run(*command("broken"), "--resume")
    run(*command("whole"))
    name = "pytorch_lora_weights.safetensors"
    a, b = (load_file(tmp_path / n / "weights" / name) for n in ("broken", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    pipe = StableDiffusionPipeline.from_pretrained(world / "pipe")
    pipe.load_lora_weights(tmp_path / "broken" / "weights")
    assert any(p.abs().max() > 0 for n, p in pipe.unet.named_parameters() if "lora_B" in n)
