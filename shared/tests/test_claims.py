import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tenfold_shared.claims import Claim, cli_digest, folder_digest, read_claims, run_benchmark, spread, write_claims
from tenfold_shared.errors import UserError


def claim(id: str = "a", **changes) -> Claim:
    fields = {
        "id": id, "paper": "2406.14066", "statement": "s", "metric": "m", "ours": 1.0, "peers": {}, "bar": "b",
        "passed": True, "seeds": [0, 1, 2],
    }  # fmt: skip
    return Claim(**{**fields, **changes})


def test_interval_is_scipys() -> None:
    values = [1.0, 2.0, 4.0, 3.5]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert spread(values) == pytest.approx({"std": np.std(values, ddof=1), "low": low, "high": high})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    claims = [
        claim("a", ours=np.float32(0.5), peers={"x": math.nan}, spread={"std": 0.1}),
        claim("b", passed=None, seeds=[]),
    ]
    write_claims(tmp_path / "r.json", claims)
    assert read_claims(tmp_path / "r.json") == claims
    assert json.loads((tmp_path / "r.json").read_text())[0]["peers"] == {"x": None}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 seeds, expected 3"):
        claim(seeds=[0, 1])
    with pytest.raises(UserError, match="same id: a"):
        write_claims(tmp_path / "r.json", [claim(), claim()])
    (tmp_path / "r.json").write_text("[{]")
    with pytest.raises(UserError, match="not a list of claims"):
        read_claims(tmp_path / "r.json")


def test_digest_follows_code_data_and_names_but_not_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "cli.py").write_text("help = 'one'")
    digests = [(folder_digest(tmp_path), cli_digest(tmp_path))]

    def changed() -> tuple[bool, bool]:
        digests.append((folder_digest(tmp_path), cli_digest(tmp_path)))
        return digests[-1][0] != digests[-2][0], digests[-1][1] != digests[-2][1]

    (tmp_path / "cli.py").write_text("help = 'two'")
    assert changed() == (False, True)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/a.cpython-311.pyc").write_bytes(b"compiled")
    assert changed() == (False, False)
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    assert changed() == (True, False)
    (tmp_path / "a.py").write_text("x = 2")
    assert changed() == (True, False)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert changed() == (True, False)
    (tmp_path / "room").mkdir()
    (tmp_path / "b.py").rename(tmp_path / "room/cli.py")
    assert changed() == (True, False)


def test_a_stopped_benchmark_goes_on_where_it_was(tmp_path: Path, capsys) -> None:
    calls = []

    def one(seeds: list[int]) -> list[Claim]:
        calls.append("one")
        return [claim("one", seeds=seeds)]

    def two(seeds: list[int]) -> list[Claim]:
        calls.append("two")
        if calls.count("two") == 1:
            raise KeyboardInterrupt
        return [claim("two", seeds=seeds, passed=False)]

    def run(*arguments: str) -> list[Claim]:
        return run_benchmark("tenfold-shared", [one, two], results=tmp_path, arguments=arguments)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "tenfold-shared.json").exists()
    assert [c.id for c in run()] == ["one", "two"]
    assert calls == ["one", "two", "two"]
    run("--only", "one")
    assert calls[3:] == ["one"]
    written = read_claims(tmp_path / "tenfold-shared.json")
    assert written[1].passed is False
    assert {"python", "machine", "source", "seconds"} <= set(written[0].environment)
    assert "two failed" in capsys.readouterr().err


def test_a_measured_claim_without_a_bar_is_reported() -> None:
    found = [claim("a", passed=passed, ours=ours).verdict for passed in (True, False, None) for ours in (1.0, None)]
    assert found == ["passed", "passed", "failed", "failed", "reported", "not run here"]
