import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel
from tenfold_shared import cli
from tenfold_shared.errors import UserError
from typer.testing import CliRunner

TABLE = cli.Table("Runs", ["name", "value"], [["a", 1.23456], ["b", None]])


class Config(BaseModel):
    steps: int


@pytest.fixture
def app():
    app = cli.make_app("thing", "A thing.", distribution="tenfold-shared")

    @app.command(epilog="Example: thing show")
    def show(json: cli.Json = False, output: cli.Output = Path("out"), seed: cli.Seed = 0) -> None:
        cli.emit(TABLE, json)

    @app.command()
    def wrong() -> None:
        raise UserError("steps is 0, expected 1 or more", hint="pass --steps 4")

    @app.command()
    def config() -> None:
        Config(steps="many")

    @app.command()
    def missing() -> None:
        Path("no-such-folder/file.json").read_text()

    @app.command()
    def bug() -> None:
        raise ValueError("an internal mistake")

    return app


def run(app, *arguments: str):
    return CliRunner().invoke(app, arguments)


def test_a_table_for_people_and_json_for_programs(app) -> None:
    text = run(app, "show").stdout
    assert "Runs" in text and "1.235" in text
    assert json.loads(run(app, "show", "--json").stdout) == [
        {"name": "a", "value": 1.23456},
        {"name": "b", "value": None},
    ]


def test_a_user_error_is_one_line_on_stderr_and_exit_2(app) -> None:
    result = run(app, "wrong")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: steps is 0, expected 1 or more; pass --steps 4\n"


def test_a_file_as_output_folder_is_refused_in_the_houses_line(app, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    for path, what in ((file, "a file"), (file / "x", f"inside the file '{file}'")):
        result = run(app, "show", "--output", str(path))
        line = f"error: --output is '{path}', {what}; give a folder; it is made when missing\n"
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", line)


def test_a_wrong_configuration_names_the_field(app) -> None:
    result = run(app, "config")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: steps: ") and "'many'" in result.stderr and result.stderr.count("\n") == 1


def test_a_missing_file_is_named(app) -> None:
    result = run(app, "missing")
    assert result.exit_code == 2
    assert result.stderr == "error: no-such-folder/file.json: No such file or directory\n"


def test_a_bug_is_not_dressed_up_as_bad_input(app) -> None:
    result = run(app, "bug")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_verbose_shows_the_traceback_and_keeps_the_exit_code(app) -> None:
    result = run(app, "--verbose", "wrong")
    assert result.exit_code == 2
    assert "error: steps is 0" in result.stderr


def test_version_and_help(app) -> None:
    assert run(app, "--version").stdout.startswith("thing 0.")
    assert "Example: thing show" in run(app, "show", "--help").stdout
    assert run(app, "nonsense").exit_code == 2


def test_markup_in_values_is_shown_as_it_is(capsys) -> None:
    cli.emit(cli.Table("", ["x"], [["[red]a[/nope]"]]))
    assert "[red]a[/nope]" in capsys.readouterr().out


def test_summary_is_what_the_page_reads(tmp_path: Path) -> None:
    path = cli.write_summary(tmp_path / "new", "thing", TABLE, [("curve.png", "A curve.")], ["A note."])
    record = json.loads(path.read_text())
    assert record["rows"] == [["a", 1.23456], ["b", None]]
    assert record["figures"] == [{"file": "curve.png", "caption": "A curve."}]


def test_the_frame_imports_nothing_heavy() -> None:
    code = "import sys, tenfold_shared.cli; print({'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
