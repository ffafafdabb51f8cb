"""Run benchmarks one at a time; what was stopped goes on where it was.

A benchmark that fails does not stop the others; it is named at the end, and the exit status is 1.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = 900.0
"""Seconds that a benchmark is taken to need when its results do not say."""


def expected(results: Path) -> float:
    """Seconds that the measurements of a results file took; the claims of one measurement carry the same figure."""
    if not results.exists():
        return UNKNOWN
    seconds = {claim["environment"].get("seconds") for claim in json.loads(results.read_text(encoding="utf-8"))}
    return sum(seconds - {None}) or UNKNOWN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    known = sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml"))
    names = options.names or known
    if unknown := [n for n in names if n not in known]:
        print(f"no package {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    left = {name: expected(ROOT / "benchmarks/results" / f"{name}.json") for name in names}
    failed = {}
    for i, name in enumerate(names, 1):
        print(f"[{i}/{len(names)}] {name} ... about {sum(left.values()) / 60:.0f} min left in all", flush=True)
        start = time.monotonic()
        script = ROOT / "benchmarks" / f"{name.replace('-', '_')}.py"
        # Without -P the script's folder would hide the package of the same name.
        if status := subprocess.run([sys.executable, "-P", script]).returncode:
            failed[name] = status
        del left[name]
        print(f"[{i}/{len(names)}] {name}: {time.monotonic() - start:.0f} s", flush=True)
    for name, status in failed.items():
        print(f"{name} failed with exit status {status}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
