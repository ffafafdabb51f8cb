"""Prove what dist/ holds: no tests or caches in a wheel, sdists that build again, wheels that install alone and run.

    python .ci/wheels.py --uv uv gp-ensemble scott

Each package's wheel goes with tenfold-shared's into a fresh environment by plain pip, and its demo runs there.
"""

import argparse
import os
import re
import subprocess
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
UNWANTED = re.compile(r"(^|/)(tests?|tests_vllm|__pycache__|\.pytest_cache|conftest\.py|test_[^/]*\.py)(/|$)|\.pyc$")


def unwanted(names: list[str]) -> list[str]:
    """The names of tests and caches among the files of an archive."""
    return [name for name in names if UNWANTED.search(name)]


def distribution(name: str, pattern: str) -> Path:
    found = list(DIST.glob(f"{name.replace('-', '_')}-{pattern}"))
    if len(found) != 1:
        raise SystemExit(f"error: dist/ holds {len(found)} files {name}-{pattern}, expected one; run make dist")
    return found[0]


def check_contents(uv: str, name: str) -> None:
    wheel, sdist = distribution(name, "*.whl"), distribution(name, "*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    if wrong := unwanted(names):
        raise SystemExit(f"error: {wheel.name} holds {', '.join(wrong[:5])}")
    with tarfile.open(sdist) as archive, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        run(uv, "build", "-q", "--wheel", "-o", folder, str(source))
        (again,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(again) as rebuilt:
            if sorted(rebuilt.namelist()) != sorted(names):
                raise SystemExit(f"error: {sdist.name} builds a wheel with other files than {wheel.name}")


def check_alone(name: str) -> int:
    """Install one wheel alone and run its demo; gives the number of distributions that came with it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        wheels = [str(distribution(wanted, "*.whl")) for wanted in ("tenfold-shared", name)]
        run(f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q", *wheels)
        # In a folder outside the repository, so that nothing but the wheel can be imported.
        run(f"{folder}/bin/{name}", "--version", cwd=folder)
        run(f"{folder}/bin/{name}", "demo", "--output", f"{folder}/out", cwd=folder)
        if not Path(folder, "out/summary.json").exists():
            raise SystemExit(f"error: the demo of {name} wrote no summary.json")
        return len(list(Path(folder).glob("lib/python*/site-packages/*.dist-info")))


def run(*command: str, cwd: str | None = None) -> None:
    # Instead of folders that the machine's own pip settings add: a torch for CPUs from there does not fit the index's torchvision.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PIP_FIND_LINKS": str(DIST)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uv", default="uv")
    parser.add_argument("names", nargs="+")
    options = parser.parse_args()
    for name in ["tenfold-shared", *options.names]:
        check_contents(options.uv, name)
        print(f"{name}: wheel and sdist hold no tests or caches, the sdist builds the same wheel", flush=True)
    for name in options.names:
        start = time.monotonic()
        count = check_alone(name)
        seconds = time.monotonic() - start
        print(f"{name}: installed alone ({count} distributions), its demo ran; {seconds:.0f} s", flush=True)
