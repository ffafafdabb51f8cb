"""What the README says runs."""

import re
import shlex
from pathlib import Path

import pytest
from smartspec import cli
from typer.testing import CliRunner

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""


def test_the_ten_lines(capsys):
    code = re.search(r"```python\n(import numpy.*?)```", TEXT, re.S).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert "speculate" in capsys.readouterr().out


def commands():
    """Of the first block; a later one needs a GPU and downloaded weights."""
    block = re.search(r"(?:^    smartspec .*\n)+", TEXT, re.MULTILINE).group()
    return [line.split("#")[0].strip() for line in block.splitlines()]


def test_every_subcommand_is_shown():
    assert {shlex.split(c)[1] for c in commands()} == {
        "demo", "profile", "fit", "explain", "simulate", "table", "serve-args", "verify", "bench", "generate",
    }  # fmt: skip


def test_the_commands_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The same commands with less work in each.
    small = {
        "profile": "--repeats 1 --batch-sizes 1,3 --contexts 8,24 --draft-lens 0,2",
        "simulate": "--requests 4 --output-tokens 8",
        "verify": "--draws 100 --max-new-tokens 4",
        "bench": "--rounds 1 --new-tokens 30 --concurrency 2 --lengths 0,2",
        "generate": "--max-new-tokens 6",
    }
    for command in commands():
        name = shlex.split(command)[1]
        if name == "demo":
            continue
        device = ["--device", "cpu"] if name in ("profile", "verify", "bench", "generate") else []
        words = [*shlex.split(command)[1:], *small.get(name, "").split(), *device]
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, f"{command}: {result.output} {result.exception}"


@pytest.mark.parametrize(
    "command", [line.strip() for line in TEXT.splitlines() if "lmsys" in line and line.startswith("    smartspec")]
)
def test_commands_for_real_models_have_valid_options(command):
    name = shlex.split(command)[1]
    text = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "300"}).stdout
    for option in re.findall(r"--[a-z-]+", command):
        assert option in text, option
