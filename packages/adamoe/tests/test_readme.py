"""The README's Python runs as it stands, and its commands exist with their options."""

import re
import shlex
from pathlib import Path

import pytest
from adamoe.cli import app
from typer.testing import CliRunner

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(1.5, abs=0.02)


def test_every_option_of_the_commands_exists():
    text = "\n".join(re.findall(r"```console\n(.*?)```", README, re.S)).replace("\\\n", " ")
    commands = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ adamoe")]
    assert len(commands) >= 10
    for _, name, *rest in commands:
        help_text = CliRunner().invoke(app, [name, "--help"]).stdout
        assert "Example" in help_text
        for option in [word for word in rest if word.startswith("--")]:
            assert option in help_text, f"{name} has no {option}"
