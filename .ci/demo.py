"""Run demos one after the other, and make one page of them that grows: out/index.html.

A demo that fails does not stop the others; it is named at the end, and the exit status is 1.
"""

import argparse
import html
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tenfold_shared.cli import cell
from tenfold_shared.hub import replace_atomically

ROOT = Path(__file__).resolve().parent.parent
TYPICAL = 75.0
"""Seconds that a demo is taken to need before one has been timed."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tenfold: the demos</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 1px solid #ddd; margin-top: 3rem; padding-top: 1.2rem; } img { max-width: 100%; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; } th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #e6e6e6; }
th { background: #f6f6f4; } td { font-variant-numeric: tabular-nums; } figcaption, li { color: #555; font-size: 13.5px; }
figure { margin: 1.2rem 0; } .failed { color: #b3261e; } pre { background: #f6f6f4; padding: .7rem; overflow-x: auto; }
</style>
<h1>Tenfold: the demos</h1>
"""


def section(name: str, folder: Path, state: str) -> str:
    """One package's part of the page."""
    esc = html.escape
    parts = [f'<h2 id="{name}">{esc(name)}</h2>']
    if state != "done":
        return "".join([*parts, f'<p class="{"failed" if state.startswith("failed") else ""}">{esc(state)}</p>'])
    record = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    head = "".join(f"<th>{esc(str(c))}</th>" for c in record["columns"])
    rows = "".join("<tr>" + "".join(f"<td>{esc(cell(v))}</td>" for v in row) + "</tr>" for row in record["rows"])
    parts.append(f"<p>{esc(record['title'])}</p><div class=scroll><table><tr>{head}</tr>{rows}</table></div>")
    for figure in record["figures"]:
        source, caption = esc(f"{name}/{figure['file']}"), esc(figure["caption"])
        parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    if record["notes"]:
        parts.append("<ul>" + "".join(f"<li>{esc(note)}</li>" for note in record["notes"]) + "</ul>")
    return "\n".join(parts)


def write_page(output: Path, states: dict[str, str]) -> None:
    body = "\n".join(section(name, output / name, state) for name, state in states.items())
    with replace_atomically(output / "index.html") as partial:
        partial.write_text(PAGE + body + "\n</html>\n", encoding="utf-8")


def run(name: str, output: Path, seed: int) -> str:
    """Run one demo; returns what became of it."""
    folder = output / name
    (folder / "summary.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    command = [str(Path(sys.executable).parent / name), "demo", "--output", str(folder), "--seed", str(seed)]
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "120"}
        ).returncode
    if status or not (folder / "summary.json").exists():
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        return f"failed with exit status {status}: {last.strip()} (all of it in {log.relative_to(output.parent)})"
    return "done"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path, default=ROOT / "out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    output = options.output.resolve()
    known = sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml"))
    names = options.names or known
    if unknown := [n for n in names if n not in known]:
        print(f"no package {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    states = dict.fromkeys(names, "not run yet")
    table = Table("demo", "result", "seconds", "figures", title="Demos")
    seconds: list[float] = []
    for i, name in enumerate(names, 1):
        left = (sum(seconds) / len(seconds) if seconds else TYPICAL) * (len(names) - i + 1)
        print(f"[{i}/{len(names)}] {name} ... about {left:.0f} s left", flush=True)
        write_page(output, {**states, name: "running"})
        start = time.monotonic()
        states[name] = run(name, output, options.seed)
        seconds.append(time.monotonic() - start)
        figures = len(list((output / name).glob("*.png")))
        table.add_row(name, states[name].split(":")[0], f"{seconds[-1]:.0f}", str(figures))
        if states[name] == "done" and len(names) == 1:
            print((output / name / "log.txt").read_text(encoding="utf-8").rstrip())
        write_page(output, states)
    Console(width=100).print(table)
    print(f"pictures and tables: {os.path.relpath(output / 'index.html')}")
    failed = {name: state for name, state in states.items() if state != "done"}
    for name, state in failed.items():
        print(f"{name} {state}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
