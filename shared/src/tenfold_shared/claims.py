"""The record of one claim: what a paper or a bar states, what ours and each peer measured, and whether it holds.

A benchmark is one function per claim (or per group of claims measured in one run):

    def calibration(seeds: list[int]) -> list[Claim]: ...

    if __name__ == "__main__":
        run_benchmark("gp-ensemble", [calibration, speed])

`run_benchmark` runs them one after the other, keeps what is finished when it is stopped, and writes
`results/<package>.json` beside the script.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically


@dataclass
class Claim:
    """One row of the evidence table.

    `ours`, `peers` and `spread` are in the unit of `metric`; NaN and None are written as null.
    """

    id: str
    """Short, unique in the package, lower case with hyphens."""
    paper: str
    """arXiv id."""
    statement: str
    """What is claimed, in one sentence."""
    metric: str
    """What is measured, with its unit and the direction that is better."""
    ours: float | None
    peers: dict[str, float | None]
    """Name of the real peer to its figure, measured in the same run."""
    bar: str
    """The condition for passing, in words and figures."""
    passed: bool | None
    """None: not run here, or measured (`ours` is there) without a bar."""
    seeds: list[int]
    spread: dict[str, float] = field(default_factory=dict)
    """`std` over the seeds, and `low` and `high` of the 95 % interval of the mean (or of the ratio)."""
    environment: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """What the figures cannot say: a peer written here because nobody packages it, the command that runs it on a GPU."""
    figures: list[str] = field(default_factory=list)
    """Pictures, as paths relative to the results folder."""
    headline: bool = False
    """Shown in the workspace's own table; failed claims always are."""

    def __post_init__(self) -> None:
        self.ours = _number(self.ours)
        self.peers = {name: _number(value) for name, value in self.peers.items()}
        self.spread = {name: value for name, raw in self.spread.items() if (value := _number(raw)) is not None}
        self.passed = None if self.passed is None else bool(self.passed)
        if self.passed is not None and len(self.seeds) < 3:
            raise UserError(f"claim {self.id} has {len(self.seeds)} seeds, expected 3 or more")

    @property
    def verdict(self) -> str:
        """passed, failed, reported (measured, but there is no bar) or not run here."""
        if self.passed is None:
            return "not run here" if self.ours is None else "reported"
        return "passed" if self.passed else "failed"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Sample standard deviation over seeds and the 95 % t interval of the mean (extra `claims`)."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"std": 0.0, "low": mean, "high": mean}
    std = statistics.stdev(values)
    half = float(t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return {"std": std, "low": mean - half, "high": mean + half}


def source_digest(package: str) -> str:
    """Digest of the installed package, by which a results file is known to be of the present code."""
    module = importlib.util.find_spec(package.replace("-", "_"))
    if module is None or module.origin is None:
        raise UserError(f"package {package} is not installed", hint="run make setup")
    return folder_digest(Path(module.origin).parent)


def folder_digest(folder: Path) -> str:
    """Digest of what the figures of a package can depend on: every module and data file under `folder`, names included.

    `cli.py` is left out: it parses and prints, and the import contracts keep everything else from using it.
    """
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc" and p != folder / "cli.py"]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cli_digest(folder: Path) -> str:
    """Digest of a package's command line, which only the rows about the command itself depend on."""
    return hashlib.sha256((folder / "cli.py").read_bytes()).hexdigest()[:16]


def environment(package: str, libraries: Sequence[str] = ()) -> dict[str, Any]:
    """Where a figure was measured: machine, threads, versions, and the digest of the package."""
    names = ["torch", "numpy", *libraries]
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads() if torch else 1,
        "versions": {package: importlib.metadata.version(package), **found},
        "source": source_digest(package),
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def read_claims(path: Path) -> list[Claim]:
    """Read a results file. Raises UserError when it is not a list of claims."""
    try:
        return [Claim(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a list of claims ({error})", hint="run the benchmark again") from error


def write_claims(path: Path, claims: Sequence[Claim]) -> None:
    """Write a results file whole or not at all. Raises UserError when two claims have one id."""
    ids = [claim.id for claim in claims]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise UserError(f"claims with the same id: {', '.join(twice)}")
    text = json.dumps([asdict(claim) for claim in claims], indent=1, ensure_ascii=False, allow_nan=False)
    with replace_atomically(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def run_benchmark(
    package: str,
    measurements: Sequence[Callable[[list[int]], Sequence[Claim]]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    libraries: Sequence[str] = (),
    results: Path | None = None,
    arguments: Sequence[str] | None = None,
) -> list[Claim]:
    """Run a package's measurements and write `results/<package>.json`. The `main` of every benchmark script.

    measurements: functions from the seeds to claims; each one's environment is filled in here.
    libraries: distributions whose versions belong into the record (the peers).

    What is finished is kept under `results/.partial`, with the digest of the sources it was measured with, so a run that
    was stopped goes on where it was. `--fresh` forgets it, `--only NAME` measures some functions again.
    """
    parser = argparse.ArgumentParser(description=f"Benchmark of {package}")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[m.__name__ for m in measurements])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    options = parser.parse_args(arguments)
    results = results or Path(sys.argv[0]).resolve().parent / "results"
    partial = results / ".partial" / package
    claims: list[Claim] = []
    started = time.monotonic()
    for i, measure in enumerate(measurements, 1):
        kept = partial / f"{measure.__name__}-{source_digest(package)}-{'-'.join(map(str, options.seeds))}.json"
        again = options.fresh or (options.only and measure.__name__ in options.only)
        if kept.exists() and not again:
            claims += read_claims(kept)
            print(f"[{i}/{len(measurements)}] {measure.__name__}: kept", file=sys.stderr)  # noqa: T201
            continue
        print(f"[{i}/{len(measurements)}] {measure.__name__} ...", file=sys.stderr, flush=True)  # noqa: T201
        start = time.monotonic()
        measured = list(measure(options.seeds))
        seconds = time.monotonic() - start
        for claim in measured:
            claim.environment = {**environment(package, libraries), **claim.environment, "seconds": round(seconds, 1)}
        write_claims(kept, measured)
        claims += measured
        left = (time.monotonic() - started) / i * (len(measurements) - i)
        verdicts = ", ".join(f"{c.id} {c.verdict}" for c in measured)
        print(f"    {seconds:.0f} s, about {left:.0f} s left: {verdicts}", file=sys.stderr, flush=True)  # noqa: T201
    write_claims(results / f"{package}.json", claims)
    return claims


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None
