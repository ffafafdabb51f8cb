import json
from pathlib import Path

from cllm_jacobi import demo, testbed


def test_the_demo_runs_without_shipped_weights(tmp_path: Path, monkeypatch, capsys):
    """Trains its own models, cut short here; table, summary and picture are there."""
    monkeypatch.setattr(testbed, "ASSETS", tmp_path / "none")
    monkeypatch.setattr(testbed.load, "__defaults__", (tmp_path / "none",))
    monkeypatch.setattr(demo, "SHORT", {"steps": 4, "prompts": 8, "consistency": 2})
    monkeypatch.setattr(demo, "QUESTIONS", 3)
    monkeypatch.setattr(demo, "SHOWN", 1)
    table = demo.run(tmp_path / "out", 0)
    record = json.loads((tmp_path / "out/summary.json").read_text())
    assert record["rows"] and any("trained here" in note for note in record["notes"])
    assert (tmp_path / "out" / record["figures"][0]["file"]).stat().st_size > 5000
    assert all(row["equal output"] for row in table.records())
    shown = capsys.readouterr().err
    assert "target" in shown and "trained model" in shown and "passes, done" in shown
