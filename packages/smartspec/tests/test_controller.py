import itertools
import math

import numpy as np
import pytest
from smartspec import (
    AcceptanceTracker,
    BatchState,
    GoodputController,
    GoodputGuard,
    PiecewiseCostModel,
    StepOutcome,
    TableCostModel,
    expected_length,
    paper_controller,
)
from smartspec.cost import DraftCost
from tenfold_shared.errors import UserError


def roofline(draft=1.1):
    planes = np.array([[3.3e-4, 0, 0, 9.4], [0, 0.072, 0, 1.0]])
    return PiecewiseCostModel(planes=planes, draft_cost=DraftCost(step=draft))


def plane(slope=0.5, draft=0.2):
    return PiecewiseCostModel(planes=np.array([[0, slope, 0, 5.0]]), draft_cost=DraftCost(step=draft))


def state(alpha, **kwargs):
    alpha = np.asarray(alpha, dtype=float)
    return BatchState(list(range(len(alpha))), np.full(len(alpha), 100), acceptance=alpha, **kwargs)


def primed(rho=0.0, cost=None, **kwargs):
    controller = GoodputController(cost or roofline(), kwargs.pop("max_draft_len", 4), min_gain=0.0, **kwargs)
    controller._tokens, controller._ms = rho, 1.0 if rho else 0.0
    return controller


@pytest.mark.parametrize("rho", [0.0, 0.25])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("prefill", [0, 40])
def test_ragged_decisions_equal_brute_force(seed, rho, prefill):
    rng = np.random.default_rng(seed)
    n, k_max = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    alpha, caps = rng.random(n), rng.integers(0, 5, n)
    cost = [roofline(), plane(), TableCostModel(sizes=np.array([2, 4, 8, 16.0]), times=np.array([5, 6, 9, 20.0]))][
        seed % 3
    ]
    controller = primed(rho, cost, max_draft_len=k_max, verify="ragged")
    s = state(alpha, caps=caps, n_prefill=prefill)
    own = float(cost.target(100 * n, n + prefill, n) - cost.target(100 * n, n, n))

    def score(v, k):
        tokens = sum(expected_length(a, x) for a, x in zip(alpha, v, strict=True))
        ms = float(cost.target(100 * n, n + prefill + sum(v), n)) + cost.draft(100 * n, n, k) - own
        return tokens - rho * ms if rho else tokens / ms

    ways = [v for v in itertools.product(*[range(min(c, k_max) + 1) for c in caps])]
    best = max(score(v, max(v)) for v in ways)
    decision = controller.decide(s)
    assert (decision.verify_lens <= np.minimum(caps, decision.draft_len)).all()
    assert score(decision.verify_lens.tolist(), decision.draft_len) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(6))
def test_uniform_decisions_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 5))
    alpha, caps = rng.random(n), rng.integers(1, 5, n)
    cost = roofline()

    def goodput(k):
        v = np.minimum(k, caps)
        tokens = sum(expected_length(a, int(x)) for a, x in zip(alpha, v, strict=True))
        return tokens / (float(cost.target(100 * n, n + v.sum(), n)) + cost.draft(100 * n, n, k))

    decision = primed().decide(state(alpha, caps=caps))
    assert goodput(decision.draft_len) == pytest.approx(max(goodput(k) for k in range(5)))
    assert decision.goodput == pytest.approx(goodput(decision.draft_len))


def test_edges_of_acceptance():
    assert primed(max_draft_len=8).decide(state([0.0])).draft_len == 0
    assert primed(max_draft_len=8).decide(state([1.0])).draft_len == 8


def test_monotone_in_batch_and_acceptance_under_a_plane():
    by_batch = [primed(cost=plane()).decide(state([0.7] * n)).draft_len for n in (1, 2, 4, 8, 16, 32, 64)]
    assert by_batch == sorted(by_batch, reverse=True) and by_batch[0] > by_batch[-1]
    by_alpha = [primed(cost=plane()).decide(state([a] * 4)).draft_len for a in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert by_alpha == sorted(by_alpha) and by_alpha[-1] > by_alpha[0]


def test_a_staircase_needs_the_global_best():
    stairs = TableCostModel(sizes=np.array([8.0, 16, 48]), times=np.array([5.0, 11.0, 11.2]))
    full = GoodputController(stairs, 5, objective="ratio", min_gain=0)
    early = GoodputController(stairs, 5, objective="ratio", min_gain=0, stop_early=True)
    s = state([0.9] * 8)
    assert full.decide(s).draft_len == 5 and early.decide(s).draft_len < 5


def test_prefill_is_charged_to_itself():
    s = state([0.8] * 128, n_prefill=1500)
    marginal = primed(max_draft_len=8, objective="ratio").decide(s).draft_len
    included = primed(max_draft_len=8, objective="ratio", prefill="included").decide(s).draft_len
    assert marginal < included
    off = primed(prefill="disable").decide(s)
    assert off.draft_len == 0 and off.reason == "prefill"


def test_caps_weights_and_memory():
    assert primed().decide(state([0.9, 0.9], caps=np.array([0, 0]))).reason == "capped"
    assert primed().decide(state([0.9], max_draft_len=1)).draft_len == 1
    tight = primed().decide(state([0.9] * 4, free_tokens=10))
    assert tight.draft_len == 1
    assert primed().decide(state([0.9] * 4, free_tokens=3)).reason == "kv_pressure"
    heavy = primed(0.25, plane(3.0), verify="ragged").decide(state([0.6, 0.6], weights=np.array([8.0, 0.1])))
    assert heavy.verify_lens[0] > heavy.verify_lens[1]


def test_reasons_of_zero():
    assert primed().decide(state([0.01] * 4)).reason == "low_acceptance"
    assert primed(cost=plane(50.0, 60.0)).decide(state([0.9] * 4)).reason == "saturated"


def test_nan_falls_back_is_counted_and_serving_goes_on():
    controller = primed()
    assert controller.decide(state([math.nan, 0.5])).draft_len == 0
    broken = primed(cost=PiecewiseCostModel(planes=np.array([[0, math.nan, 0, 1]])))
    decision = broken.decide(state([0.9]))
    assert decision.draft_len == 0 and decision.reason == "invalid"
    controller.observe(StepOutcome([0, 1], np.zeros(2), np.zeros(2), 2, math.nan))
    assert controller.counters["invalid"] == 2
    assert controller.decide(state([0.9, 0.9])).draft_len > 0


def feed(controller, alpha, steps, n=8, cost=None, rng=None):
    rng = rng or np.random.default_rng(0)
    cost = cost or roofline()
    lengths = []
    for _ in range(steps):
        s = BatchState(list(range(n)), np.full(n, 100))
        d = controller.decide(s)
        kept = (
            (np.cumprod(rng.random((n, max(d.draft_len, 1))) < alpha, axis=1).sum(axis=1))
            if d.draft_len
            else np.zeros(n)
        )
        kept = np.minimum(kept, d.verify_lens).astype(int)
        ms = float(cost.target(100 * n, n + d.verify_lens.sum(), n)) + cost.draft(100 * n, n, d.draft_len)
        controller.observe(StepOutcome(s.ids, d.verify_lens, kept, int(kept.sum()) + n, ms, 100 * n, n, 0, d.draft_len))
        lengths.append(d.draft_len)
    return lengths


def test_it_finds_the_length_and_probes_out_of_the_dead_zone():
    controller = GoodputController(roofline(), 8)
    assert np.mean(feed(controller, 0.9, 200)[-50:]) > 4
    assert np.mean(feed(controller, 0.02, 300)[-50:]) < 0.2
    assert controller.probes > 0
    assert np.mean(feed(controller, 0.9, 300)[-50:]) > 4


def test_the_same_seed_decides_the_same():
    runs = [feed(GoodputController(roofline(), 8, seed=3), 0.1, 400) for _ in range(2)]
    assert runs[0] == runs[1]


def test_interval_keeps_the_length():
    lengths = feed(GoodputController(roofline(), 8, interval=20), 0.8, 100)
    assert all(len(set(lengths[i : i + 20])) == 1 for i in range(0, 100, 20))


def test_the_price_equals_the_ratio_in_a_steady_state():
    price, ratio = (GoodputController(roofline(), 8, objective=o) for o in ("price", "ratio"))
    last = [feed(c, 0.8, 400, rng=np.random.default_rng(5))[-100:] for c in (price, ratio)]
    assert np.mean(last[0]) == pytest.approx(np.mean(last[1]), abs=0.7)


def test_the_guard_turns_a_wrong_model_off():
    """The model believes that drafting is nearly free; in truth it costs five times a plain step."""
    believed, true = roofline(0.01), roofline(50.0)
    guarded = GoodputController(believed, 4, guard=GoodputGuard(patience=50, trial=20, hold=2000))
    blind = GoodputController(believed, 4)
    lengths = feed(guarded, 0.5, 600, cost=true)
    assert guarded.guard.trips >= 1 and guarded.counters["guard"] > 300
    assert np.mean(lengths[-300:]) == 0 < np.mean(feed(blind, 0.5, 600, cost=true)[-300:])


def test_the_guard_keeps_what_pays():
    """Costs are all twice as high as believed, so speculation still pays: it is paused for the trial only."""
    believed = roofline()
    true = PiecewiseCostModel(planes=2 * believed.planes, draft_cost=DraftCost(step=2.2))
    guarded = GoodputController(believed, 4, guard=GoodputGuard(patience=50, trial=20, hold=10_000))
    lengths = feed(guarded, 0.8, 800, cost=true)
    assert guarded.guard.trips == 1 and guarded.counters["guard"] == 20 and np.mean(lengths[-300:]) > 2


def test_the_published_settings():
    paper = paper_controller(roofline(), 7)
    assert (paper.objective, paper.prefill, paper.stop_early, paper.min_gain) == ("ratio", "included", True, 0.0)
    assert isinstance(paper.tracker, AcceptanceTracker) and paper.tracker.mode == "ema"
    released = paper_controller(roofline(), as_released=True)
    assert (released.interval, released.min_gain) == (20, 0.1)


def test_unknown_matches_scale_what_is_expected():
    controller = primed()
    controller.matches.ratio = 0.25
    rows = controller.explain(state([0.8] * 4, matches_unknown=True))
    assert rows[1]["tokens"] == pytest.approx(4 + 0.25 * 4 * 0.8)


@pytest.mark.parametrize(
    ("kwargs", "cause"),
    [
        ({"max_draft_len": 0}, "max_draft_len is 0"),
        ({"objective": "luck"}, "objective is 'luck'"),
        ({"prefill": "no"}, "prefill is 'no'"),
        ({"verify": "all"}, "verify is 'all'"),
        ({"candidates": [0, 99]}, "candidates"),
        ({"interval": 0}, "interval is 0"),
    ],
)
def test_bad_settings(kwargs, cause):
    with pytest.raises(UserError, match=cause):
        GoodputController(roofline(), **kwargs)


def test_explain_refuses_nan():
    with pytest.raises(UserError, match="not a finite"):
        primed().explain(state([math.nan]))


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_model_off_by_a_factor_decides_alike(factor):
    true = roofline()
    wrong = PiecewiseCostModel(planes=factor * true.planes, draft_cost=DraftCost(step=factor * 1.1))
    options = {"max_draft_len": 6, "window_ms": 1e9}
    right, off = (feed(GoodputController(c, **options), 0.8, 150, cost=true) for c in (true, wrong))
    assert right == off


def test_time_has_no_price_when_nobody_comes():
    """A lone straggler after a full batch is not held to the full batch's rate."""
    controller = GoodputController(roofline(), 8, window_ms=100.0)
    feed(controller, 0.8, 60, n=32)
    alone = BatchState([0], np.array([100]), acceptance=np.array([0.8]))
    assert controller._by_ratio and controller.decide(alone).draft_len > 2
    newcomer = BatchState(["new"], np.array([100]), acceptance=np.array([0.8]))
    controller.decide(newcomer)
    assert not controller._by_ratio


def test_time_has_a_price_while_requests_keep_coming():
    """Three usual gaps without a newcomer are enough to expect none; the window is the longest wait."""
    controller = GoodputController(roofline(), 8, window_ms=1e6)
    for step in range(40):
        ids = [step // 4]
        d = controller.decide(BatchState(ids, np.array([100]), acceptance=np.array([0.8])))
        controller.observe(
            StepOutcome(ids, d.verify_lens, d.verify_lens, 1, 10.0, 100, 1 + d.draft_len, 0, d.draft_len)
        )
    gap = controller._gap_ms
    assert not controller._by_ratio
    quiet = []
    while not controller._by_ratio:
        controller.observe(StepOutcome(ids, d.verify_lens, d.verify_lens, 1, 10.0, 100, 1, 0, 0))
        quiet.append(controller._quiet_ms)
    assert quiet[-2] <= 3 * gap < quiet[-1] < 1e6


def test_the_reason_is_looked_at_again_when_the_batch_changes():
    planes = np.array([[0, 0, 0, 10.0], [0, 3.0, 0, 0]])
    controller = primed(cost=PiecewiseCostModel(planes=planes, draft_cost=DraftCost(step=1.0)))
    assert controller.decide(state([0.01])).reason == "low_acceptance"
    assert controller.decide(state([0.01] * 8)).reason == "saturated"
    assert controller.decide(state([0.01])).reason == "low_acceptance"


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_a_gain_below_the_least_one_is_not_worth_it(rho):
    """At k = 1 this brings 1.01 times the goodput of k = 0."""
    cost = PiecewiseCostModel(planes=np.array([[0, 0, 0, 10.0]]), draft_cost=DraftCost(step=(1.5 / 1.01 - 1) * 10))
    for min_gain, k in ((0.0, 1), (0.005, 1), (0.02, 0)):
        controller = primed(rho, cost, max_draft_len=1)
        controller.min_gain = min_gain
        assert controller.decide(state([0.5])).draft_len == k


def test_a_probe_that_costs_too_much_is_left_out():
    """Only what a probe loses beyond what it is sure to bring counts: below a quarter of a step."""
    cheap, dear = (GoodputController(roofline(draft), 8, seed=1) for draft in (2.0, 12.0))
    for controller, draft in ((cheap, 2.0), (dear, 12.0)):
        feed(controller, 0.0, 400, cost=roofline(draft))
    assert cheap.probes > 1 and dear.probes == 0


def test_the_price_leaves_prefill_out():
    outcome = StepOutcome([0, 1], np.array([2, 2]), np.array([2, 1]), 5, 90.0, 200, 1006, 1000, 2)
    cost = roofline()
    for prefill, tokens in (("marginal", 6), ("included", 1006)):
        controller = GoodputController(cost, 4, prefill=prefill)
        controller.observe(outcome)
        assert controller.rho == pytest.approx(5 / (float(cost.target(200, tokens, 2)) + cost.draft(200, 2, 2)))
