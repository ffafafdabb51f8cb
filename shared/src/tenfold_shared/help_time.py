"""How long a package's commands take to answer `--help`, beside a bare interpreter's start."""

import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tenfold_shared.claims import Claim, cli_digest, spread
from tenfold_shared.errors import UserError

LIMIT = 0.5
"""Seconds above a bare interpreter's start that every `--help` stays under on an idle machine."""


def help_time(package: str, paper: str) -> Callable[[list[int]], list[Claim]]:
    """The measurement of one package, for `run_benchmark`. paper: arXiv id for the row."""

    def help_time(seeds: list[int]) -> list[Claim]:
        commands = list(command_paths(package))
        rounds = [_round(package, commands) for _ in seeds]
        slowest = [max(seconds for _, _, seconds in each) for each in rounds]
        bare = [statistics.median(start for _, start, _ in each) for each in rounds]
        excess = [max(seconds - start for _, start, seconds in each) for each in rounds]
        ratios = [a / b for a, b in zip(slowest, bare, strict=True)]
        name = max(rounds[-1], key=lambda each: each[2])[0]
        return [
            Claim(
                id="help-time",
                paper=paper,
                statement="Every command answers --help at once",
                metric="slowest --help / bare interpreter start, ratio of wall-clock times (lower is better)",
                ours=statistics.fmean(ratios),
                peers={"slowest --help, s": statistics.fmean(slowest), "bare interpreter, s": statistics.fmean(bare)},
                bar=f"every --help less than {LIMIT} s above the bare interpreter, in every round",
                passed=max(excess) < LIMIT,
                seeds=seeds,
                spread=spread(ratios),
                environment={"cli": cli_digest(Path(_cli(package).__file__).parent)},
                note=f"{len(commands)} commands, each beside a bare interpreter, one round per seed; slowest: {name}.",
            )
        ]

    return help_time


def command_paths(package: str) -> Iterator[list[str]]:
    """The words of every command of a package's command line: [], ["demo"], ["group", "command"] ..."""
    from typer.main import get_command

    yield from _walk(get_command(_cli(package).app), [])


def _cli(package: str) -> Any:
    return importlib.import_module(f"{package.replace('-', '_')}.cli")


def _walk(command: Any, words: list[str]) -> Iterator[list[str]]:
    yield words
    for name, child in getattr(command, "commands", {}).items():
        yield from _walk(child, [*words, name])


def _round(package: str, commands: list[list[str]]) -> list[tuple[str, float, float]]:
    """(command, seconds of a bare interpreter, seconds of its --help) of every command, the two one after the other."""
    script = Path(sys.executable).parent / package
    return [
        (" ".join([package, *words]), _seconds([sys.executable, "-c", ""]), _seconds([str(script), *words, "--help"]))
        for words in commands
    ]


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{' '.join(command)} ended with exit status {done.returncode}: {last}", hint="run make setup")
    return seconds
