"""The report and the README tables are made of the results and of nothing else."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from tenfold_shared.claims import Claim, cli_digest, folder_digest, write_claims

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("report", HERE / "report.py")
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report
spec.loader.exec_module(report)


REAL = "## On real models\n\n```\ntoy run org/<model> --steps 4\n```\n\n## Scale\n"
HEADINGS = ["Command line", "Measured", "On real models", "Scale", "Limits", "Citation"]


def claim(id: str, **changes) -> Claim:
    fields = {
        "id": id, "paper": "2404.00312", "statement": f"statement of {id}", "metric": "accuracy, %", "ours": 91.25,
        "peers": {"a|b": 88.5}, "bar": "ours > peer", "passed": True, "seeds": [0, 1, 2], "spread": {"low": 90.0, "high": 92.0},
    }  # fmt: skip
    return Claim(**{**fields, **changes})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    source = tmp_path / "packages/toy/src/toy"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("__version__ = '0.1.0'\n")
    (source / "cli.py").write_text("app = None\n")
    (tmp_path / "packages/toy/pyproject.toml").write_text("[project]\nname = 'toy'\ndescription = 'a <toy>'\n")
    for readme in (tmp_path / "README.md", tmp_path / "packages/toy/README.md"):
        readme.write_text(f"above\n{report.START}\nold\n{report.END}\n{REAL}below\n")
    fresh = {"source": folder_digest(source)}
    claims = [
        claim("one", environment={**fresh, "cli": cli_digest(source)}, headline=True),
        claim("two", environment=fresh, passed=False),
        claim("three", environment=fresh),
        claim("four", passed=None, ours=None, peers={}, seeds=[], spread={}),
        claim("five", environment=fresh, passed=None, bar="none"),
    ]
    write_claims(tmp_path / "benchmarks/results/toy.json", claims)
    return tmp_path


def test_committed_readmes_agree_with_committed_results() -> None:
    assert report.main(["--check"]) == 0


def test_package_table_has_every_claim_and_the_workspace_table_headlines_and_failures(tree: Path) -> None:
    texts = report.readmes(report.collect(tree), tree)
    package, workspace = texts[tree / "packages/toy/README.md"], texts[tree / "README.md"]
    assert all(f"statement of {name}" in package for name in ("one", "two", "three", "four", "five"))
    assert "statement of one" in workspace
    assert "**failed**" in workspace
    assert "statement of three" not in workspace
    assert workspace.startswith("above\n") and workspace.endswith("below\n") and "old" not in workspace
    assert "| 2 | 1 | 1 | 1 |" in workspace


def test_filling_twice_changes_nothing(tree: Path) -> None:
    text = (tree / "README.md").read_text()
    once = report.fill(text, "table")
    assert report.fill(once, "table") == once
    assert report.fill("no markers", "table") == "no markers"


def test_a_pipe_in_a_name_does_not_break_the_table(tree: Path) -> None:
    row = next(line for line in report.package_table(report.collect(tree)[0]).splitlines() if "of one" in line)
    assert row.replace("\\|", "").count("|") == 8


def test_the_workspace_table_says_how_many_peers_it_leaves_out() -> None:
    row = claim("one", peers={name: 1.0 for name in "abcdef"})
    assert report.peers(row, most=4) == "a 1, b 1, c 1, d 1, and 2 more"
    assert report.peers(row) == "a 1, b 1, c 1, d 1, e 1, f 1"
    assert report.peers(claim("two", peers={}), most=4) == "-"


def test_changed_sources_make_a_row_stale(tree: Path) -> None:
    assert "stale" not in report.package_table(report.collect(tree)[0])
    (tree / "packages/toy/src/toy/cli.py").write_text("app = 1\n")
    table = report.package_table(report.collect(tree)[0])
    assert table.count("stale: `make bench-toy`") == 1  # the row that is about the command line
    (tree / "packages/toy/src/toy/new.py").write_text("x = 1\n")
    table = report.package_table(report.collect(tree)[0])
    assert table.count("stale: `make bench-toy`") == 4  # what was not run cannot be stale


def test_page_is_self_contained_and_escapes(tree: Path) -> None:
    picture = tree / "benchmarks/results/toy/curve.png"
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG")
    path = tree / "benchmarks/results/toy.json"
    records = json.loads(path.read_text())
    records[0]["figures"] = ["toy/curve.png"]
    records[0]["statement"] = "<script>"
    path.write_text(json.dumps(records))
    text = report.page(report.collect(tree), tree)
    assert "data:image/png;base64," in text
    assert "<script>" not in text and "a &lt;toy&gt;" in text
    assert 'src="http' not in text and 'href="http' not in text


def test_page_has_the_commands_for_the_real_models_and_no_more_of_the_readme(tree: Path) -> None:
    text = report.page(report.collect(tree), tree)
    assert "<h3>On real models</h3><pre><code>toy run org/&lt;model&gt; --steps 4\n</code></pre>" in text
    assert "Scale" not in text and "below" not in text
    assert report.section(tree / "packages/toy/README.md", "No such heading") == ""


@pytest.mark.parametrize("name", [r.name for r in report.collect()])
def test_readmes_have_the_same_sections_and_real_models_a_command(name: str) -> None:
    lines = (report.ROOT / "packages" / name / "README.md").read_text(encoding="utf-8").splitlines()
    found = [line[3:] for line in lines if line.startswith("## ")]
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS
    real = report.section(report.ROOT / "packages" / name / "README.md", report.REAL_MODELS)
    assert re.search(rf"(^|\s|`){name} [a-z]", real)
