import sys
from pathlib import Path

import pytest
from tenfold_shared import help_time
from tenfold_shared.claims import cli_digest
from tenfold_shared.errors import UserError

CLI = """
import typer
from tenfold_shared.cli import make_app

app = make_app("toy-thing", "A toy.", distribution="tenfold-shared")
more = typer.Typer()
app.add_typer(more, name="more")

@app.command()
def demo() -> None: ...

@more.command()
def one() -> None: ...

@more.command()
def two() -> None: ...
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "toy_thing").mkdir()
    (tmp_path / "toy_thing/__init__.py").write_text("")
    (tmp_path / "toy_thing/cli.py").write_text(CLI)
    monkeypatch.syspath_prepend(tmp_path)
    yield "toy-thing"
    for name in ("toy_thing.cli", "toy_thing"):
        sys.modules.pop(name, None)


def test_every_command_of_every_group_is_found(package: str) -> None:
    assert list(help_time.command_paths(package)) == [[], ["demo"], ["more"], ["more", "one"], ["more", "two"]]


@pytest.mark.parametrize(("slow", "passed"), [(0.35, True), (0.75, False)])
def test_the_slowest_command_of_all_rounds_decides(package: str, monkeypatch, slow: float, passed: bool) -> None:
    calls = []

    def seconds(command: list[str]) -> float:
        calls.append(command)
        if command[1:] == ["-c", ""]:
            return 0.1
        return slow if command[1:] == ["more", "two", "--help"] and len(calls) < 12 else 0.3

    monkeypatch.setattr(help_time, "_seconds", seconds)
    (claim,) = help_time.help_time(package, "2404.00312")([0, 1, 2])
    assert claim.passed is passed
    assert claim.ours == pytest.approx((slow / 0.1 + 3 + 3) / 3)
    assert claim.peers["bare interpreter, s"] == pytest.approx(0.1)
    assert len(calls) == 3 * 2 * 5
    assert claim.environment == {"cli": cli_digest(Path(sys.modules["toy_thing.cli"].__file__).parent)}


def test_a_command_that_fails_is_named() -> None:
    with pytest.raises(UserError, match="ended with exit status 3: broken"):
        help_time._seconds([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"])
    assert 0 < help_time._seconds([sys.executable, "-c", ""]) < 60
