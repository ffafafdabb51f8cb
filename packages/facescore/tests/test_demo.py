"""The demo, small."""

import json

from facescore.demo import run


def test_demo_leaves_its_pictures_and_its_record(tmp_path):
    table = run(tmp_path, 0, pairs=24, reward_steps=2, tune_steps=1, samples=36)
    record = json.loads((tmp_path / "summary.json").read_text())
    assert [row[0] for row in table.rows] == ["before", "after"] and record["package"] == "facescore"
    for figure in record["figures"]:
        assert (tmp_path / figure["file"]).stat().st_size > 5000
