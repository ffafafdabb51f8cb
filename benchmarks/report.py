"""Render benchmarks/results/*.json into benchmarks/report.html and the measured tables of the README files.

python benchmarks/report.py            write the page and the tables
python benchmarks/report.py --check    exit 1 when a README's table and the results disagree
"""

import argparse
import base64
import html
import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from tenfold_shared.claims import Claim, cli_digest, folder_digest, read_claims
from tenfold_shared.cli import cell
from tenfold_shared.hub import replace_atomically

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- claims:start -->", "<!-- claims:end -->"
REAL_MODELS = "On real models"
VERDICTS = ("passed", "failed", "reported", "not run here")


@dataclass
class Results:
    """What one package measured."""

    name: str
    description: str
    claims: list[Claim]
    source: str
    """Digest of the package as it is now, its command line apart."""
    cli: str
    """Digest of its command line, on which the rows that name one depend too."""
    real_models: str = ""
    """Markdown: the commands and settings that reproduce the paper's own figures on its own models."""

    def stale(self, claim: Claim) -> bool:
        """What the claim depends on has changed since it was measured."""
        measured = (claim.environment.get("source"), claim.environment.get("cli", self.cli))
        return claim.verdict != "not run here" and measured != (self.source, self.cli)

    def tally(self) -> dict[str, int]:
        found = [claim.verdict for claim in self.claims]
        return {verdict: found.count(verdict) for verdict in VERDICTS}


def collect(root: Path = ROOT) -> list[Results]:
    """The results of every package of the workspace, in the packages' order; a package without results has no claims."""
    found = []
    for file in sorted(root.glob("packages/*/pyproject.toml")):
        name = file.parent.name
        results = root / "benchmarks" / "results" / f"{name}.json"
        source = file.parent / "src" / name.replace("-", "_")
        found.append(
            Results(
                name,
                tomllib.loads(file.read_text(encoding="utf-8"))["project"]["description"],
                read_claims(results) if results.exists() else [],
                folder_digest(source),
                cli_digest(source),
                section(file.parent / "README.md", REAL_MODELS),
            )
        )
    return found


def section(readme: Path, heading: str) -> str:
    """The text under a heading of a README; empty when there is none."""
    _, _, rest = f"\n{readme.read_text(encoding='utf-8')}".partition(f"\n## {heading}\n")
    return rest.split("\n## ")[0].strip()


def interval(claim: Claim) -> str:
    """Ours with what is known of its spread."""
    text = cell(claim.ours)
    if {"low", "high"} <= set(claim.spread):
        return f"{text} [{cell(claim.spread['low'])}, {cell(claim.spread['high'])}]"
    return f"{text} ± {cell(claim.spread['std'])}" if "std" in claim.spread else text


def peers(claim: Claim, most: int | None = None) -> str:
    """The peers with their figures; when there are more than `most`, how many are left out."""
    shown = [f"{name} {cell(value)}" for name, value in list(claim.peers.items())[:most]]
    left = len(claim.peers) - len(shown)
    return ", ".join([*shown, *([f"and {left} more"] if left else [])]) or "-"


def verdict(results: Results, claim: Claim) -> str:
    stale = f" (stale: `make bench-{results.name}`)" if results.stale(claim) else ""
    return (f"**{claim.verdict}**" if claim.verdict == "failed" else claim.verdict) + stale


def markdown(rows: list[list[str]], columns: list[str]) -> str:
    lines = [
        columns,
        ["---"] * len(columns),
        *([c.replace("|", "\\|").replace("\n", " ") for c in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def package_table(results: Results) -> str:
    """The table of one package's README: every claim."""
    rows = [
        [c.statement, c.metric, interval(c), peers(c), c.bar, f"{len(c.seeds)}", verdict(results, c)]
        for c in results.claims
    ]
    return markdown(rows, ["claim", "metric", "ours", "peers, same run", "bar", "seeds", "result"])


def workspace_table(all_results: list[Results]) -> str:
    """The table of the workspace's README: the tally, then headline claims and every failure."""
    tally = [
        [f"[{r.name}](packages/{r.name})", *(str(n) for n in r.tally().values()), f"`make bench-{r.name}`"]
        for r in all_results
    ]
    shown = [
        [r.name, c.statement, c.metric, interval(c), peers(c, most=4), c.bar, verdict(r, c)]
        for r in all_results
        for c in r.claims
        if c.headline or c.passed is False
    ]
    return "\n\n".join(
        [
            markdown(tally, ["package", "claims passed", *VERDICTS[1:], "command"]),
            "The headline claims, and every claim that failed:",
            markdown(shown, ["package", "claim", "metric", "ours", "peers, same run", "bar", "result"]),
        ]
    )


def fill(text: str, table: str) -> str:
    """Put a table between the two markers; a text without markers is returned as it is."""
    if START not in text or END not in text:
        return text
    head, rest = text.split(START, 1)
    return f"{head}{START}\n{table}\n{END}{rest.split(END, 1)[1]}"


def readmes(all_results: list[Results], root: Path = ROOT) -> dict[Path, str]:
    """README path to the text it should have."""
    wanted = {root / "README.md": workspace_table(all_results)}
    for results in all_results:
        wanted[root / "packages" / results.name / "README.md"] = package_table(results)
    return {path: fill(path.read_text(encoding="utf-8"), table) for path, table in wanted.items() if path.exists()}


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tenfold: what was measured</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #e6e6e6; overflow-wrap: anywhere; }
th { background: #f6f6f4; } td.n { white-space: nowrap; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
.claims { table-layout: fixed; min-width: 1000px; } .claims * { box-sizing: border-box; } .claims td.n { white-space: normal; }
.claims th:nth-child(1) { width: 27%; } .claims th:nth-child(2) { width: 14%; } .claims th:nth-child(3) { width: 10%; }
.claims th:nth-child(4) { width: 23%; } .claims th:nth-child(6) { width: 6%; } .claims th:nth-child(7) { width: 7%; }
ul.peers { margin: 0; padding: 0; list-style: none; } ul.peers b { font-weight: 600; white-space: nowrap; }
.passed { color: #2c6e31; } .failed { color: #b3261e; font-weight: 600; } .none { color: #777; } .stale { color: #9a6a00; }
figure { display: inline-block; margin: 1rem 1rem 0 0; max-width: 100%; vertical-align: top; } img { max-width: 100%; }
figcaption, .note, details { color: #555; font-size: 13px; } code { background: #f3f3f1; padding: 0 .25em; }
h3 { font-weight: 600; margin-top: 2rem; } pre { background: #f3f3f1; padding: .7rem; overflow-x: auto; } pre code { padding: 0; }
nav a { margin-right: 1rem; }
</style>
"""


def page(all_results: list[Results], root: Path = ROOT) -> str:
    """The self-contained report: per package the claims, the figures inline, the environment and the commands."""
    esc = html.escape
    parts = [PAGE, "<h1>Tenfold: what was measured</h1>"]
    parts.append(
        "<p>One section per paper. Ours and the peers were measured in the same run; square brackets are 95&nbsp;% intervals. "
        "A claim that failed stays in its table.</p>"
    )
    parts.append("<nav>" + " ".join(f'<a href="#{r.name}">{esc(r.name)}</a>' for r in all_results) + "</nav>")
    tally = [[r.name, *(str(n) for n in r.tally().values())] for r in all_results]
    head = "".join(f"<th>{h}</th>" for h in ("package", *VERDICTS))
    body = "".join("<tr>" + "".join(f'<td class="n">{esc(x)}</td>' for x in row) + "</tr>" for row in tally)
    parts.append(f"<table><tr>{head}</tr>{body}</table>")
    for r in all_results:
        papers = sorted({c.paper for c in r.claims})
        cited = "".join(f" · arXiv {esc(paper)}" for paper in papers)
        parts.append(f'<h2 id="{r.name}">{esc(r.name)}</h2><p>{esc(r.description)}{cited}</p>')
        if not r.claims:
            parts.append(f"<p class=none>No results yet: <code>make bench-{r.name}</code>.</p>")
            continue
        parts.append(f"<p>Measured by <code>make bench-{r.name}</code>.</p><div class=scroll><table class=claims><tr>")
        parts.append(
            "".join(f"<th>{h}</th>" for h in ("claim", "metric", "ours", "peers, same run", "bar", "seeds", "result"))
        )
        parts.append("</tr>")
        for c in r.claims:
            kind = c.verdict if c.passed is not None else "none"
            stale = f"<br><span class=stale>stale: <code>make bench-{r.name}</code></span>" if r.stale(c) else ""
            note = f"<br><span class=note>{esc(c.note)}</span>" if c.note else ""
            others = "".join(f"<li>{esc(k)} <b>{cell(v)}</b></li>" for k, v in c.peers.items())
            others = f"<ul class=peers>{others}</ul>" if others else "-"
            parts.append(
                f"<tr><td>{esc(c.statement)}{note}</td><td>{esc(c.metric)}</td><td class=n>{esc(interval(c))}</td>"
                f"<td>{others}</td><td>{esc(c.bar)}</td><td class=n>{esc(', '.join(map(str, c.seeds)))}</td>"
                f'<td class="n {kind}">{c.verdict}{stale}</td></tr>'
            )
        parts.append("</table></div>")
        for figure in dict.fromkeys(f for c in r.claims for f in c.figures):
            file = root / "benchmarks" / "results" / figure
            if file.exists():
                data = base64.b64encode(file.read_bytes()).decode()
                name = esc(file.stem.replace("-", " ").replace("_", " "))
                parts.append(
                    f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
                )
        if r.real_models:
            parts.append(
                f"<h3>{REAL_MODELS}</h3>{MarkdownIt('commonmark', {'html': False}).enable('table').render(r.real_models)}"
            )
        environments = {
            json.dumps({k: v for k, v in c.environment.items() if k != "seconds"}, sort_keys=True) for c in r.claims
        }
        lines = "<br>".join(esc(", ".join(f"{k}: {v}" for k, v in json.loads(e).items())) for e in sorted(environments))
        parts.append(f"<details><summary>Environment</summary><p>{lines}</p></details>")
    return "\n".join(parts) + "\n</html>\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when a README disagrees with the results"
    )
    options = parser.parse_args(arguments)
    all_results = collect()
    wanted = readmes(all_results)
    if options.check:
        wrong = [str(p.relative_to(ROOT)) for p, text in wanted.items() if p.read_text(encoding="utf-8") != text]
        if wrong:
            print(
                f"the table in {', '.join(wrong)} is not what benchmarks/results holds; run make report",
                file=sys.stderr,
            )
        return bool(wrong)
    for path, text in {**wanted, ROOT / "benchmarks" / "report.html": page(all_results)}.items():
        with replace_atomically(path) as partial:
            partial.write_text(text, encoding="utf-8")
    total = {key: sum(r.tally()[key] for r in all_results) for key in VERDICTS}
    print("benchmarks/report.html: " + ", ".join(f"{n} {key}" for key, n in total.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
