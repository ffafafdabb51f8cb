import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
from smartspec import CostModel, Hardware, LinearCostModel, PiecewiseCostModel, StepSample, TableCostModel, presets
from smartspec.cost import DraftCost
from smartspec.errors import ProfileError


def grid(time, kind="target"):
    return [
        StepSample(b * c, b * (k + 1), b, k if kind == "step" else 0, ms=time(b * c, b * (k + 1), b, k), kind=kind)
        for b in (1, 4, 16, 64)
        for c in (64, 256)
        for k in (0, 1, 3, 7)
    ]


def test_a_planted_plane_is_recovered():
    model = LinearCostModel.fit(grid(lambda c, n, b, k: 2e-4 * c + 0.05 * n + 7))
    assert model.planes[0] == pytest.approx([2e-4, 0.05, 0, 7], rel=1e-6)


def test_two_planted_planes_are_recovered():
    model = PiecewiseCostModel.fit(grid(lambda c, n, b, k: max(3e-4 * c + 9, 0.2 * n + 1)))
    planes = model.planes[np.argsort(model.planes[:, 1])]
    assert planes[0] == pytest.approx([3e-4, 0, 0, 9], abs=1e-6)
    assert planes[1] == pytest.approx([0, 0.2, 0, 1], abs=1e-6)


def test_whole_steps_give_both_parts():
    samples = grid(lambda c, n, b, k: 16 + 0.7 * n + k * (0.3 + 0.02 * b) + 1e-4 * c, kind="step")
    model = LinearCostModel.fit(samples)
    assert model.error(samples) < 1e-6
    assert model.draft(0, 10, 3) == pytest.approx(3 * 0.5, rel=1e-3)


def test_the_draft_part_is_recovered_with_its_idle_cost():
    draft = [
        StepSample(b * c, 0, b, k, ms=0.9 + k * (1.1 + 0.01 * b), kind="draft")
        for b in (1, 8, 64) for c in (10, 100) for k in (0, 1, 2, 5)
    ]  # fmt: skip
    cost = PiecewiseCostModel.fit(grid(lambda c, n, b, k: 9 + 0.1 * n + 1e-4 * c) + draft).draft_cost
    assert (cost.idle, cost.step, cost.per_seq) == pytest.approx((0.9, 1.1, 0.01), rel=1e-6)
    assert cost(5, 8, 0) == pytest.approx(0.9) and cost(5, 8, 2) == pytest.approx(0.9 + 2 * 1.18)


@pytest.mark.parametrize("name", ["a100-7b-160m", "h100x4-70b-eagle"])
def test_two_planes_fit_a_roofline_where_one_does_not(name):
    profile = Hardware.preset(name).profile(0)
    two, one = PiecewiseCostModel.fit(profile).error(profile), LinearCostModel.fit(profile).error(profile)
    assert two < 0.035 < 0.06 < one


def test_a_staircase():
    model = TableCostModel.fit(grid(lambda c, n, b, k: 10.0 if n <= 16 else 15.0 if n <= 64 else 40.0))
    assert model.target(0, np.array([1, 5, 16, 17, 64, 65])).tolist() == [10, 10, 10, 15, 15, 40]
    assert (np.diff(model.target(0, np.arange(1, 2000))) >= 0).all()
    assert model.target(0, 5120) > 40


def test_a_staircase_never_falls():
    model = TableCostModel.fit(grid(lambda c, n, b, k: 12.0 if n == 8 else 10.0 if n <= 16 else 15.0))
    assert model.target(0, np.array([4, 8, 16, 32])).tolist() == [10, 12, 12, 15]


def test_a_negative_slope_is_refitted_at_zero_with_a_warning():
    with pytest.warns(UserWarning, match="negative"):
        model = LinearCostModel.fit(grid(lambda c, n, b, k: 60 - 0.1 * n + 1e-4 * c))
    assert model.planes[0, 1] == 0 and (model.planes >= 0).all()


@pytest.mark.parametrize("cls", [LinearCostModel, PiecewiseCostModel, TableCostModel])
def test_round_trip(tmp_path, cls):
    model = cls.fit(Hardware.preset("a100-7b-160m").profile(1), fingerprint={"target": "t"})
    model.save(tmp_path / "cost.json")
    back = CostModel.load(tmp_path / "cost.json", fingerprint={"target": "t"})
    assert type(back) is cls
    n = np.arange(1, 400)
    assert back.target(900, n, 3).tolist() == model.target(900, n, 3).tolist()
    assert back.draft(100, 4, 3) == model.draft(100, 4, 3)


def test_presets_are_fresh_and_finite():
    for make in presets().values():
        assert np.isfinite(make().target(1000, np.arange(100), 4)).all() and make() is not make()
    fork = presets()["llama70b-tp4-h100"]()
    assert fork.target(1000, 10, 5) == pytest.approx(6.24e-5 * 1000 + 0.64 - 3.97e-2 * 5 + 18.35)


def test_too_few_flat_and_broken_profiles():
    good = grid(lambda c, n, b, k: 5 + 0.1 * n + 1e-3 * c)
    with pytest.raises(ProfileError, match="7 points"):
        LinearCostModel.fit(good[:7])
    with pytest.raises(ProfileError, match="n_batched never varies"):
        LinearCostModel.fit([StepSample(c, 4, 1, ms=5) for c in range(10, 20)])
    with pytest.raises(ProfileError, match="only together"):
        LinearCostModel.fit([StepSample(100 * b, b, b, ms=5) for b in range(10, 20)])
    with pytest.raises(ProfileError, match="expected finite"):
        LinearCostModel.fit([*good, StepSample(1, 1, 1, ms=float("nan"))])
    with pytest.raises(ProfileError, match="kind 'other'"):
        LinearCostModel.fit([*good, StepSample(1, 1, 1, ms=1, kind="other")])
    with pytest.raises(ProfileError, match="timed alone"):
        TableCostModel.fit(grid(lambda c, n, b, k: 5 + n, kind="step"))


def test_files_that_are_no_cost_models(tmp_path):
    path = tmp_path / "cost.json"
    for text, cause in (
        ("", "not JSON"),
        ("[]", "schema list"),
        ('{"schema": 9}', "schema 9"),
        ('{"schema": 1}', "kind"),
    ):
        path.write_text(text)
        with pytest.raises(ProfileError, match=cause):
            CostModel.load(path)
    model = LinearCostModel.fit(grid(lambda c, n, b, k: 5 + 0.1 * n + 1e-3 * c), fingerprint={"device": "a"})
    model.save(path)
    with pytest.raises(ProfileError, match="device a, this run has b"):
        CostModel.load(path, fingerprint={"device": "b"})
    record = json.loads(path.read_text())
    record["planes"] = [[1, 2]]
    path.write_text(json.dumps(record))
    with pytest.raises(ProfileError, match="rows of 4"):
        CostModel.load(path)


def test_far_outside_the_profile_warns_once(caplog):
    model = LinearCostModel(planes=np.ones((1, 4)), largest=(100.0, 10.0))
    with caplog.at_level(logging.WARNING):
        assert model.within_range(100, 10) and not model.within_range(100, 21) and not model.within_range(900, 1)
    assert len(caplog.records) == 1


def test_draft_cost_of_nothing():
    assert DraftCost()(100, 4, 0) == 0


@pytest.mark.parametrize("name", ["two planes", "staircase"])
def test_a_number_gives_what_an_array_gives(name):
    model = {
        "two planes": PiecewiseCostModel(planes=np.array([[3e-4, 0, 0.01, 9.4], [0, 0.07, 0, 1.0]])),
        "staircase": TableCostModel(sizes=np.array([8.0, 16, 48]), times=np.array([5.0, 7.0, 11.0]), per_ctx=1e-3),
    }[name]
    points = [1.0, 8.0, 9.0, 40.0, 48.0, 500.0]
    whole = model.target(300.0, np.array(points), 4)
    assert [model.target(300.0, n, 4) for n in points] == pytest.approx(whole.tolist())


@pytest.mark.parametrize("row", [0, 1])
def test_a_number_is_not_finite_where_a_plane_is_not(row):
    planes = np.array([[0, 0, 0, 5.0], [0, 1.0, 0, 0]])
    planes[row, 3] = math.nan
    assert math.isnan(PiecewiseCostModel(planes=planes).target(1.0, 4.0))


def test_pauses_of_the_machine_do_not_move_the_fit():
    """One step in seven takes up to twice as long as it should."""
    true = PiecewiseCostModel(planes=np.array([[2e-3, 0, 0, 9.0], [0, 0.3, 0, 6.0]]), draft_cost=DraftCost(step=0.8))
    rng = np.random.default_rng(0)
    clean = []
    for _ in range(300):
        n, k = int(rng.choice([1, 4, 16])), int(rng.integers(0, 7))
        clean.append(StepSample(int(n * rng.integers(24, 60)), n * (k + 1), n, k, 0, 1.0, "step"))
    clean = [replace(s, ms=true.step(s)) for s in clean]
    slow = [replace(s, ms=s.ms * (1 + (rng.random() < 1 / 7) * rng.random())) for s in clean]
    assert PiecewiseCostModel.fit(slow).error(clean) < 0.01
