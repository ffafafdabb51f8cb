import io
import json
from pathlib import Path

import pytest
from cllm_jacobi import demo, testbed
from rich.console import Console
from tenfold_shared.errors import UserError


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
    printed, shown = capsys.readouterr()
    assert not printed  # stdout is for the table
    assert "target" in shown and "trained model" in shown and "passes, done" in shown


@pytest.mark.parametrize("width", [80, 140])
def test_both_models_are_shown_beside_each_other_to_their_end(monkeypatch, width):
    """Frame by frame on a terminal; the last frame has both answers whole, no line longer than the screen."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(demo, "console", screen)
    model = testbed.untrained(layers=1)
    demo.watch(model, model, testbed.questions(1)[0][0], pause=0)
    frames = screen.file.getvalue().split("\x1b[2K")
    last = frames[-1].split("╭", 1)[1]
    assert last.count(f"{testbed.MAX_NEW_TOKENS} tokens in") == 2 and last.count("passes, done") == 2
    assert len(frames) > testbed.MAX_NEW_TOKENS and max(map(len, last.splitlines())) <= width
    tops = [frame[frame.index("╭") :].splitlines()[0] for frame in frames if "╭" in frame]
    assert len({top.rindex("╭") for top in tops}) == 1
    assert last.splitlines()[0].count("─ target ─") == last.splitlines()[0].count("─ trained model ─") == 1


@pytest.mark.parametrize("broken", [0, 1])
def test_a_mistake_in_one_of_the_two_comes_out(monkeypatch, broken):
    monkeypatch.setattr(demo, "console", Console(file=io.StringIO(), force_terminal=True, width=100))
    models = [testbed.untrained(layers=1) for _ in range(2)]
    models[broken].model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        demo.watch(*models, testbed.questions(1)[0][0], pause=0)
    assert "done" in demo.console.file.getvalue()  # the other one went to its end
