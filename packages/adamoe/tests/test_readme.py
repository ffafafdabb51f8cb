"""The README's Python runs as it stands, and so do its commands, in their order."""

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


def test_the_commands_run(tmp_path, monkeypatch):
    """All but the demo, which `make demo` runs and test_testbed.py in short."""
    text = "\n".join(re.findall(r"```console\n(.*?)```", README, re.S))
    commands = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("$ adamoe")]
    assert len(commands) >= 10 and commands.pop(0) == ["demo", "--output", "out"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, f"{command}: {done.stderr}"
    assert {p.name for p in tmp_path.iterdir()} == {"toy", "toy-null", "tuned", "calibrated", "report.html", "official"}
