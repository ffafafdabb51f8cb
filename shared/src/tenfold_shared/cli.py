"""The frame of every command: options with one meaning, one error boundary, results on stdout.

    app = make_app("adamoe", "Null experts for mixture-of-experts models.")

    @app.command(epilog="Example: adamoe demo --output out")
    def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
        from adamoe.demo import run            # heavy imports happen inside the sub-command
        emit(run(output, seed), json)

The app itself is the console script's entry point. This module imports nothing heavy.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from typer.core import TyperGroup

from tenfold_shared.errors import UserError

console = Console(stderr=True)
"""Progress and logs; results go to stdout through `emit`."""

Seed = Annotated[int, typer.Option(help="Seed of every random choice.", show_default=True)]
Device = Annotated[str, typer.Option(help="torch device: auto, cpu, cuda, cuda:1, mps ...", show_default=True)]


def _folder(path: Path) -> Path:
    """Refuse a file where a folder is wanted, before any work is done."""
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        what = "a file" if there == path else f"inside the file '{there}'"
        raise UserError(f"--output is '{path}', {what}", hint="give a folder; it is made when missing")
    return path


Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for the results; made when missing.", callback=_folder)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")]

FILE_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


@dataclasses.dataclass
class Table:
    """A result as people and programs read it: `rows` are sequences in the order of `columns`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def emit(result: Table | dict[str, Any], as_json: bool = False) -> None:
    """Print a result on stdout: a table for people, or JSON (a table becomes a list of records)."""
    if as_json:
        print(json.dumps(result.records() if isinstance(result, Table) else result, indent=2, default=_plain))  # noqa: T201
        return
    if isinstance(result, dict):
        result = Table("", ["", "value"], list(result.items()))
    # Left to itself rich cuts columns to 80 characters when stdout is a pipe.
    out = Console(width=None if sys.stdout.isatty() else 160)
    table = RichTable(title=escape(result.title) or None, title_justify="left", show_header=any(result.columns))
    for i, column in enumerate(result.columns):
        numeric = all(isinstance(row[i], int | float) for row in result.rows)
        table.add_column(column, justify="right" if numeric and result.rows else "left", overflow="fold")
    for row in result.rows:
        table.add_row(*(escape(cell(value)) for value in row))
    out.print(table)


def cell(value: Any) -> str:
    """A value as a table shows it: four significant digits, yes and no, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_summary(
    output: Path, package: str, table: Table, figures: Sequence[tuple[str, str]], notes: Sequence[str] = ()
) -> Path:
    """Write `summary.json`, the record of a demo that the workspace's page is made of.

    figures: (file name inside `output`, caption) pairs. notes: sentences that the table cannot say.
    """
    from tenfold_shared.hub import replace_atomically

    record = {
        "package": package,
        "title": table.title,
        "columns": list(table.columns),
        "rows": [list(row) for row in table.rows],
        "figures": [{"file": file, "caption": caption} for file, caption in figures],
        "notes": list(notes),
    }
    path = output / "summary.json"
    with replace_atomically(path) as partial:
        partial.write_text(json.dumps(record, indent=2, default=_plain) + "\n", encoding="utf-8")
    return path


def make_app(name: str, help: str, *, distribution: str | None = None) -> typer.Typer:
    """The Typer app of a package: `--version`, `--verbose`, `--help`, and the error boundary.

    name: the command. distribution: the installed distribution whose version is shown, `name` when not given.
    """
    app = typer.Typer(
        name=name, help=help, cls=_Boundary, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"{name} {version(distribution or name)}")  # noqa: T201
            raise typer.Exit

    @app.callback()
    def options(
        ctx: typer.Context,
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
        ] = False,
        verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More log; tracebacks of errors.")] = False,
    ) -> None:
        import logging

        from rich.logging import RichHandler

        ctx.meta["verbose"] = verbose
        logging.basicConfig(
            level=logging.DEBUG if verbose else logging.INFO,
            format="%(message)s",
            handlers=[RichHandler(console=console, show_path=verbose, show_time=verbose)],
        )
        for chatty in ("httpx", "httpcore", "urllib3", "matplotlib", "PIL", "filelock", "fsspec"):
            logging.getLogger(chatty).setLevel(logging.WARNING)

    return app


class _Boundary(TyperGroup):
    """Turns what a person can mend into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            text = _mendable(error)
            if text is None:
                raise
            if ctx.meta.get("verbose"):
                console.print_exception()
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(2) from error


def _mendable(error: Exception) -> str | None:
    """What to tell the person, or None for a mistake of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FILE_ERRORS):
        return f"{error.filename or 'file'}: {error.strerror or error}"
    # Only a package that uses pydantic can raise its error; it is not a dependency here.
    if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, given {e['input']!r}" for e in error.errors())
    return None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
