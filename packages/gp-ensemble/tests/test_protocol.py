import json
from pathlib import Path

import pytest
from gp_ensemble import GPEnsembleClassifier
from gp_ensemble.errors import UserError
from gp_ensemble.protocol import METHODS, mean_of, read_records, run, run_grid, summarise, write_tables
from gp_ensemble.testbed import load_world

CHOSEN = {name: METHODS[name] for name in ("GP ensemble", "zero-shot", "Tip-Adapter, test-tuned")}


def test_a_grid_goes_on_where_it_was(tmp_path: Path) -> None:
    world, file = load_world("digits"), tmp_path / "records.jsonl"
    settings = {"shots": [1, 2], "seeds": [0], "data": "digits", "elsewhere": world.elsewhere}
    whole = run_grid(world.draw, CHOSEN, records=file, **settings)
    assert len(whole) == 6 == len(read_records(file))
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # as a kill leaves it
    drawn = []

    def counted(shots: int, seed: int):
        drawn.append(shots)
        return world.draw(shots, seed)

    again = run_grid(counted, CHOSEN, records=file, **settings)
    assert len(drawn) == 3

    def without_time(records: list[dict]) -> list[dict]:
        return sorted(({k: v for k, v in r.items() if k != "seconds"} for r in records), key=json.dumps)

    assert without_time(again) == without_time(whole)
    file.write_text("junk\n" + lines[0] + "\n")
    with pytest.raises(UserError, match="damaged in line 1"):
        read_records(file)


def test_each_row_says_which_data_chose() -> None:
    world = load_world("digits")
    records = run_grid(world.draw, CHOSEN, shots=[1, 4], seeds=[0], data="digits")
    table = summarise(records)
    chooser = {row[0]: row[-1] for row in table.rows}
    assert chooser["GP ensemble"] == "training images (ml) / training images (loo_ce)"
    assert chooser["Tip-Adapter, test-tuned"] == "the test set" and chooser["zero-shot"] == "nothing (fixed defaults)"
    assert table.columns == ["method", "1 shot", "4 shots", "chosen by"]


def test_the_scores_are_the_models_own() -> None:
    world = load_world("digits")
    train, test = world.draw(2, 0)
    record = run(METHODS["GP ensemble"], train, test, elsewhere=world.elsewhere)
    model = GPEnsembleClassifier().fit(train, train.labels)
    assert record["accuracy"] == pytest.approx(model.score(test, test.labels)) and record["accuracy"] > 0.7
    assert record["auroc_variance"] > 0.8 and "auroc_max_prob" in record
    assert mean_of([record, {"accuracy": 0.0}], "accuracy") == pytest.approx(record["accuracy"] / 2)
    with pytest.raises(UserError, match="without a training image"):
        run(METHODS["GP ensemble"], train[train.labels != "nine"], test)


def test_tables_are_written(tmp_path: Path) -> None:
    world = load_world("digits")
    records = run_grid(world.draw, CHOSEN, shots=[1], seeds=[0, 1], data="digits")
    write_tables(records, tmp_path)
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 7
    text = (tmp_path / "tables.md").read_text()
    assert "digits: accuracy %, 2 seeds" in text and "| zero-shot |" in text and "digits: ece, 2 seeds" in text
