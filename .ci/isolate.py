"""Run tests in isolation: wheels built, an environment per package with only what that package declares.

    python .ci/isolate.py shared gp-ensemble workspace

`workspace` (the tests of the report and of the scripts here) runs in the workspace's own environment.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / ".ci"
ENVIRONMENTS = ROOT / ".isolated"


def folder_of(name: str) -> Path:
    return ROOT / name if name == "shared" else ROOT / "packages" / name


def distribution(name: str) -> str:
    return tomllib.loads((folder_of(name) / "pyproject.toml").read_text())["project"]["name"]


def run(*command: str | Path, **kwargs) -> None:
    subprocess.run([str(c) for c in command], check=True, **kwargs)


def build(uv: str, names: list[str], dist: Path) -> dict[str, Path]:
    """Build a wheel of each; returns name to wheel."""
    wheels = {}
    for name in names:
        stem = distribution(name).replace("-", "_")
        for old in dist.glob(f"{stem}-*"):
            old.unlink()
        run(uv, "build", "-q", "--wheel", "-o", dist, folder_of(name))
        (wheels[name],) = dist.glob(f"{stem}-*.whl")
    return wheels


def environment(uv: str, python: str, name: str, wheels: dict[str, Path]) -> Path:
    """A fresh environment with the wheel, what it declares and its test group; versions from requirements.lock."""
    target = ENVIRONMENTS / name
    run(uv, "venv", "-q", "--clear", "-p", python, target)
    # Wheels are named by path: a stranger's package of the same name on the registry can never take their place.
    own = {wheels["shared"], wheels[name]}
    group = f"{folder_of(name) / 'pyproject.toml'}:test"
    run(
        uv,
        "pip",
        "install",
        "-q",
        "--no-sources",
        "-p",
        target,
        "-c",
        ROOT / "requirements.lock",
        *own,
        "--group",
        group,
    )
    return target


def absent(target: Path) -> str:
    """Which direct dependencies of other packages are not in this environment: the proof of isolation."""
    installed = {_normal(p.name.rsplit("-", 2)[0]) for p in target.glob("lib/python*/site-packages/*.dist-info")}
    wanted = set()
    for file in ROOT.glob("packages/*/pyproject.toml"):
        project = tomllib.loads(file.read_text())["project"]
        extras = project.get("optional-dependencies", {}).values()
        for requirement in [*project.get("dependencies", []), *(r for extra in extras for r in extra)]:
            wanted.add(_normal(re.match(r"[\w.-]+", requirement)[0]))
    return f"{len(installed)} distributions; not among them: {', '.join(sorted(wanted - installed)) or 'none'}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def size(target: Path) -> int:
    """Installed bytes."""
    return sum(p.stat().st_size for p in target.rglob("*") if p.is_file() and not p.is_symlink())


@dataclass
class Result:
    """What became of one package's tests."""

    name: str
    status: int
    counts: dict[str, int]
    seconds: float
    bytes: int
    log: str


def test(name: str, uv: str, python: str, wheels: dict[str, Path], threads: int) -> Result:
    """Make the environment, run pytest in it with `threads` threads, and count."""
    start = time.monotonic()
    if name == "workspace":
        target, tests, log = Path(sys.prefix), [ROOT / "benchmarks", HERE], ""
    else:
        target, tests = environment(uv, python, name, wheels), [folder_of(name) / "tests"]
        log = f"      {absent(target)}\n"
    report = ENVIRONMENTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    settings = {
        **os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)
    }  # fmt: skip
    settings.pop("PYTHONPATH", None)
    command = [target / "bin/python", "-m", "pytest", *tests, "-p", "no:cacheprovider", f"--junitxml={report}", "-rs"]
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ENVIRONMENTS,
        env=settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    counts = {"passed": 0, "failed": 1, "skipped": 0}
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite").attrib
        failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
        counts = {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}
    return Result(name, done.returncode, counts, time.monotonic() - start, size(target), log + done.stdout.rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--uv", default=shutil.which("uv") or ".uv/bin/uv")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="packages tested at a time")
    options = parser.parse_args()
    known = ["shared", *sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml")), "workspace"]
    if unknown := [n for n in options.names if n not in known]:
        print(f"no package {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    ENVIRONMENTS.mkdir(exist_ok=True)
    finder = [sys.executable, str(ROOT / ".ci/find_python.py"), options.python]
    python = subprocess.run(finder, check=True, capture_output=True, text=True).stdout.strip()
    packages = [n for n in options.names if n != "workspace"]
    print(f"building wheels: {', '.join(packages)}", flush=True)
    wheels = build(options.uv, sorted({"shared", *packages}), ROOT / "dist")
    jobs = max(1, min(options.jobs, len(options.names)))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    print(f"testing {len(options.names)}, {jobs} at a time, {threads} threads each", flush=True)
    results, started = [], time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(test, name, options.uv, python, wheels, threads) for name in options.names]
        for done, future in enumerate(as_completed(futures), 1):
            result = future.result()
            results.append(result)
            left = (time.monotonic() - started) / done * (len(futures) - done)
            print(f"\n[{done}/{len(futures)}] {result.name}, about {left:.0f} s left\n{result.log}", flush=True)
    results.sort(key=lambda r: options.names.index(r.name))
    table = Table("package", "passed", "failed", "skipped", "seconds", "installed", title=f"Python {options.python}")
    for r in results:
        table.add_row(r.name, *map(str, r.counts.values()), f"{r.seconds:.0f}", f"{r.bytes / 1e9:.1f} GB")
    print(flush=True)
    Console(width=100).print(table)
    total = {key: sum(r.counts[key] for r in results) for key in ("passed", "failed", "skipped")}
    if broken := [r.name for r in results if r.status]:
        print(f"not passed: {', '.join(broken)}")
    # A run that broke before it counted anything still is a failure.
    total["failed"] = max(total["failed"], len(broken))
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
