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


def test(python: Path, tests: list[Path]) -> tuple[int, dict[str, int]]:
    """Run pytest; returns its exit status and the counts."""
    report = ENVIRONMENTS / "report.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
    settings.pop("PYTHONPATH", None)
    command = [python, "-m", "pytest", *tests, "-p", "no:cacheprovider", f"--junitxml={report}", "-rs"]
    status = subprocess.run([str(c) for c in command], cwd=ENVIRONMENTS, env=settings).returncode
    if not report.exists():
        return status or 1, {"passed": 0, "failed": 1, "skipped": 0}
    suite = ElementTree.parse(report).getroot().find("testsuite").attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return status, {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--uv", default=shutil.which("uv") or ".uv/bin/uv")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    options = parser.parse_args()
    known = ["shared", *sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml")), "workspace"]
    if unknown := [n for n in options.names if n not in known]:
        print(f"no package {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    finder = [sys.executable, str(ROOT / ".ci/find_python.py"), options.python]
    python = subprocess.run(finder, check=True, capture_output=True, text=True).stdout.strip()
    packages = [n for n in options.names if n != "workspace"]
    print(f"building wheels: {', '.join(packages)}", flush=True)
    wheels = build(options.uv, sorted({"shared", *packages}), ROOT / "dist")
    table = Table("package", "passed", "failed", "skipped", "seconds", "installed", title=f"Python {options.python}")
    total, broken, started = {"passed": 0, "failed": 0, "skipped": 0}, [], time.monotonic()
    for i, name in enumerate(options.names, 1):
        left = (
            f", about {(time.monotonic() - started) / (i - 1) * (len(options.names) - i + 1):.0f} s left"
            if i > 1
            else ""
        )
        print(f"\n[{i}/{len(options.names)}] {name}{left}", flush=True)
        target, start = Path(sys.prefix), time.monotonic()
        if name == "workspace":
            tests = [ROOT / "benchmarks", HERE]
        else:
            target, tests = environment(options.uv, python, name, wheels), [folder_of(name) / "tests"]
            print(f"      {absent(target)}", flush=True)
        status, counts = test(target / "bin/python", tests)
        if status:
            broken.append(name)
        for key in total:
            total[key] += counts[key]
        table.add_row(
            name, *(str(counts[k]) for k in total), f"{time.monotonic() - start:.0f}", f"{size(target) / 1e9:.1f} GB"
        )
    print(flush=True)
    Console(width=100).print(table)
    if broken:
        print(f"not passed: {', '.join(broken)}")
    # A run that broke before it counted anything still is a failure.
    total["failed"] = max(total["failed"], len(broken))
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
