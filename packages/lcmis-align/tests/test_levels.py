"""Levels and their intervals, judging and mining."""

import json
import math

import pytest
import torch
from lcmis_align import (
    CallableScorer,
    ConceptPair,
    DataError,
    FilePlanner,
    LevelReport,
    RulePlanner,
    ScoreJudge,
    judge,
    mine,
    rate_level,
    wilson,
)
from lcmis_align.mining import read_mined, report
from lcmis_align.worlds import exact
from tenfold_shared.errors import UserError


def test_the_papers_table():
    table = [5] + [4] * 5 + [3] * 5 + [2] * 5 + [1] * 5
    assert [rate_level(n, 20) for n in range(21)] == table


def test_other_numbers_of_images():
    assert [rate_level(n, 64) for n in (0, 1, 16, 17, 32, 33, 48, 49, 64)] == [5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert [rate_level(n, 1) for n in (0, 1)] == [5, 1]
    for total in range(1, 50):
        for n in range(1, total + 1):
            r = n / total
            assert rate_level(n, total) == (4 if r <= 0.25 else 3 if r <= 0.5 else 2 if r <= 0.75 else 1)


@pytest.mark.parametrize(("n", "total"), [(-1, 20), (21, 20), (0, 0)])
def test_impossible_counts(n, total):
    with pytest.raises(UserError, match="images correct"):
        rate_level(n, total)


@pytest.mark.parametrize(("n", "total"), [(0, 10), (3, 10), (10, 10), (26, 173)])
def test_wilson_solves_its_equation(n, total):
    z = 1.959963984540054
    p = n / total
    for bound in wilson(n, total):
        if 0 < bound < 1:
            assert abs(abs(p - bound) - z * math.sqrt(bound * (1 - bound) / total)) < 1e-12


def test_wilson_at_the_edges():
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    with pytest.raises(UserError):
        wilson(1, 0)


def test_a_report_counts():
    found = LevelReport(["a", "b", "c"], [0, 20, 3], [20, 20, 20])
    assert found.counts == {1: 1, 2: 0, 3: 0, 4: 1, 5: 1}
    assert found.rows()[4][:3] == (5, 1, 1 / 3)


def test_judging():
    pipe, plan = exact.load(), exact.plan("square")
    images = pipe(["square", "checker"], num_inference_steps=10, guidance_scale=1.0,
                  generator=[torch.Generator().manual_seed(0) for _ in range(2)]).images  # fmt: skip
    judging = ScoreJudge(CallableScorer(exact.exact_scores))
    scores = exact.exact_scores(images, ["square", "checker"])
    assert judge(images, plan, judging) == (scores.min(dim=1).values > 0.5).tolist()


class Pairs(RulePlanner):
    """Proposes squares with textures, and remembers what it is told."""

    def __init__(self):
        self.told = []

    def propose_pairs(self, pattern, n, *, positives=(), negatives=()):
        self.told.append((len(positives), len(negatives)))
        return [ConceptPair("square", "checker", "checker square", pattern), ConceptPair("cross", "bars", "bars cross", pattern),
                ConceptPair("The Checker", "square", "again", pattern)][:n]  # fmt: skip


def test_mining_rates_and_goes_on(tmp_path):
    planner, path, done = Pairs(), tmp_path / "pairs.jsonl", []
    settings = {"pipe": exact.load(), "judge_image": ScoreJudge(CallableScorer(exact.exact_scores)), "images": 6,
                "num_inference_steps": 20, "guidance_scale": 1.0, "output": path}  # fmt: skip
    found = mine(planner, "shapes", n=1, progress=done.append, **settings)
    assert [m.prompt for m in found] == ["checker square"] == [m.prompt for m in done]
    assert found[0].level == rate_level(found[0].correct, 6)
    assert found[0].interval == wilson(found[0].correct, 6)
    done.clear()
    more = mine(planner, "shapes", n=3, rounds=2, progress=done.append, **settings)
    assert [m.prompt for m in done] == ["bars cross"]  # the first is known, the third is the first again
    assert more == read_mined(path)
    assert sum(planner.told[-1]) == 2
    assert sum(report(more).counts.values()) == 2


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    """Also with a planner that proposes other pairs to whoever knows the first ones."""
    plans = tmp_path / "plans.json"
    fields = {"first_describe": "", "second_describe": ""}
    plans.write_text(json.dumps([{"prompt": f"{t} {s}", "first_prompt": s, "second_prompt": t, **fields}
                                 for s in ("square", "cross") for t in ("checker", "bars")]))  # fmt: skip
    settings = {"pipe": exact.load(), "judge_image": ScoreJudge(CallableScorer(exact.exact_scores)), "images": 2, "n": 1,
                "num_inference_steps": 4, "guidance_scale": 1.0, "output": tmp_path / "pairs.jsonl"}  # fmt: skip
    first, done = mine(FilePlanner(plans), "x", rounds=2, **settings), []
    assert [m.prompt for m in first] == ["checker square", "bars square"]
    assert mine(FilePlanner(plans), "x", rounds=2, progress=done.append, **settings) == first
    assert done == []
    # Killed after the first of two, it goes on with the second.
    lines = settings["output"].read_text().splitlines(keepends=True)
    settings["output"].write_text(lines[0])
    assert mine(FilePlanner(plans), "x", rounds=2, progress=done.append, **settings) == first
    assert [m.prompt for m in done] == ["bars square"]
    # What is in the file and not proposed is kept.
    assert mine(FilePlanner(plans), "x", rounds=1, **settings) == first


def test_mining_errors(tmp_path):
    with pytest.raises(UserError, match="expected 1 or more"):
        mine(Pairs(), "x", pipe=None, judge_image=None, n=0)
    (tmp_path / "pairs.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="line 1 is no rated pair"):
        read_mined(tmp_path / "pairs.jsonl")
