"""What the README says runs."""

import re
import shlex
from pathlib import Path

import pytest
from cllm_jacobi import cli
from typer.testing import CliRunner

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""


def test_the_ten_lines(capsys):
    exec(compile(re.search(r"```python\n(.*?)```", TEXT, re.S).group(1), "README.md", "exec"), {})
    assert "SELECT COUNT" in capsys.readouterr().out


def commands() -> list[str]:
    """Of the first block; later ones need a GPU and downloaded weights."""
    block = re.search(r"(?:^    cllm-jacobi .*\n)+", TEXT, re.MULTILINE).group()
    return [line.strip() for line in block.splitlines()]


def test_every_subcommand_is_shown():
    assert {shlex.split(c)[1] for c in commands()} == {
        "demo", "generate", "collect", "clean", "train", "convert", "evaluate", "verify", "profile", "export", "serve-args",
    }  # fmt: skip


def test_the_commands_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in commands():
        words = shlex.split(command)[1:]
        if words[0] == "demo":
            continue
        device = (
            ["--device", "cpu"] if words[0] in ("generate", "collect", "train", "evaluate", "verify", "profile") else []
        )
        result = CliRunner().invoke(cli.app, [*words, *device])
        assert result.exit_code == 0, f"{command}: {result.output} {result.exception}"


@pytest.mark.parametrize(
    "command", [line.strip() for line in TEXT.splitlines() if line.startswith("    cllm-jacobi") and "--dtype" in line]
)
def test_commands_for_real_models_have_valid_options(command):
    name = shlex.split(command)[1]
    text = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "300"}).stdout
    for option in re.findall(r"--[a-z][a-z0-9-]*", command):
        assert option in text, option
