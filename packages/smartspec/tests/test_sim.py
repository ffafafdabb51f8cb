from dataclasses import replace

import numpy as np
import pytest
from smartspec import (
    AcceptLengthEMA,
    DisableByBatchSize,
    FixedLength,
    GoodputController,
    Hardware,
    NoSpeculation,
    Oracle,
    PiecewiseCostModel,
    Workload,
    expected_length,
    paper_controller,
    simulate,
)
from smartspec.sim import read_trace
from tenfold_shared.errors import UserError

A100 = Hardware.preset("a100-7b-160m")
QUIET = replace(A100, noise=0.0)
SHORT = Workload(rate=24, requests=80, output=60)


def fitted():
    return PiecewiseCostModel.fit(A100.profile(0))


def test_three_requests_equal_the_recursion_by_hand():
    work = Workload(arrivals=(0.0, 0.005, 1.0), prompt=10, output=3, length_std=0.0)
    report = simulate(NoSpeculation(), QUIET, work)
    t = lambda ctx, n: QUIET.step_ms(ctx, n, 0, 0)  # noqa: E731
    first = t(0, 10)  # request 0 is prefilled; 1 arrives meanwhile
    both = first + t(10, 11)  # 0 decodes its second token, 1 is prefilled
    third = both + t(11 + 10, 2)  # 0 ends with its third token, 1 has two
    fourth = third + t(11, 1)
    assert report.latency[:2] == pytest.approx([third, fourth - 5.0])
    alone = t(0, 10) + t(10, 1) + t(11, 1)
    assert report.latency[2] == pytest.approx(alone)
    assert report.ttft == pytest.approx([first, both - 5.0, first])


def test_a_long_prompt_is_prefilled_in_chunks_that_take_their_time():
    report = simulate(NoSpeculation(), QUIET, Workload(arrivals=(0.0,), prompt=3000, output=2, length_std=0.0))
    t = lambda ctx, n: QUIET.step_ms(ctx, n, 0, 0)  # noqa: E731
    assert t(0, 2048) > 10 * t(0, 1)
    assert report.ttft == pytest.approx([t(0, 2048) + t(2048, 952)])
    assert report.latency == pytest.approx(report.ttft + t(3000, 1))


def test_a_step_ends_at_the_first_rejection():
    work = Workload(arrivals=(0.0,) * 64, output=400, length_std=0.0, acceptance=((0.0, 0.5),))
    trace = simulate(FixedLength(3), replace(A100, kv_tokens=10**6), work, seed=5).trace
    full = trace[trace[:, 1] == 64]
    assert (full[:, 3] / 64).mean() == pytest.approx(expected_length(0.5, 3), abs=0.03)


@pytest.mark.parametrize(
    "make",
    [
        NoSpeculation,
        lambda: FixedLength(3),
        lambda: DisableByBatchSize(5, 4),
        lambda: GoodputController(fitted()),
        lambda: GoodputController(fitted(), verify="ragged"),
        lambda: paper_controller(fitted()),
        AcceptLengthEMA,
        lambda: Oracle(A100.cost()),
    ],
)
def test_tokens_are_conserved_and_littles_law_holds(make):
    report = simulate(make(), A100, SHORT, seed=3)
    assert report.tokens == SHORT.draw(3).output.sum()
    assert np.isfinite(report.latency).all() and (report.latency >= report.ttft).all()
    arrivals_per_ms = 80 / report.duration
    assert report.mean_in_system == pytest.approx(arrivals_per_ms * report.mean_latency, rel=0.02)


def test_the_seed_decides_everything():
    a, b, c = (simulate(GoodputController(fitted()), A100, SHORT, seed=s) for s in (1, 1, 2))
    assert a.latency.tolist() == b.latency.tolist() != c.latency.tolist()


def test_perfect_and_useless_drafts():
    perfect = replace(SHORT, rate=1.0, acceptance=1.0, requests=10)
    steps = len(simulate(FixedLength(3), QUIET, perfect).trace)
    assert steps < len(simulate(NoSpeculation(), QUIET, perfect).trace) / 2
    useless = replace(perfect, acceptance=0.0)
    assert (
        simulate(FixedLength(3), QUIET, useless).mean_latency > simulate(NoSpeculation(), QUIET, useless).mean_latency
    )


def test_phases_bursts_and_traces(tmp_path):
    work = Workload(rate=((10.0, 2.0), (10.0, 20.0), (10.0, 2.0)), requests=240)
    at = work.draw(0).arrival / 1000
    counts = [(at < 10).sum(), ((at >= 10) & (at < 20)).sum()]
    assert counts[0] == pytest.approx(20, abs=14) and counts[1] == pytest.approx(200, abs=45)
    late = at[at >= 20]
    assert late[0] < 23 and np.diff(late).mean() == pytest.approx(0.5, abs=0.3)
    gaps = lambda b: np.diff(Workload(rate=10, requests=3000, burstiness=b).draw(0).arrival)  # noqa: E731
    assert gaps(1.0).std() / gaps(1.0).mean() == pytest.approx(1, abs=0.1)
    assert gaps(0.25).std() / gaps(0.25).mean() == pytest.approx(2, abs=0.3)
    (tmp_path / "trace.txt").write_text("0.5\n0.1\n")
    assert read_trace(tmp_path / "trace.txt").draw(0).arrival.tolist() == [100.0, 500.0]


def test_preemption_loses_nothing():
    small = replace(A100, kv_tokens=2500)
    report = simulate(NoSpeculation(), small, Workload(rate=50, requests=30, prompt=200, output=300), seed=0)
    assert (
        report.preemptions > 0
        and report.tokens == Workload(rate=50, requests=30, prompt=200, output=300).draw(0).output.sum()
    )


def test_a_preempted_request_is_prefilled_with_what_it_had():
    """One token takes one millisecond and there is no other cost, so the run's time counts the tokens computed."""
    tokens_only = replace(QUIET, weights=0.0, per_ctx=0.0, per_token=1.0, fixed=0.0, kv_tokens=100)
    report = simulate(NoSpeculation(), tokens_only, Workload(arrivals=(0.0, 0.0), prompt=40, output=30, length_std=0.0))
    # Eleven steps after both prefills the cache is over: the second request has 12 tokens and starts again with them.
    assert report.preemptions == 1
    assert report.trace[:, 4].sum() == pytest.approx(2 * 40 + 2 * 29 + (40 + 12))


def test_drafting_takes_its_time():
    assert A100.step_ms(0, 1, 1, 3) - A100.step_ms(0, 1, 1, 0) == pytest.approx(3.3)
    idle = replace(A100, draft_idle=0.4)
    assert idle.step_ms(0, 1, 1, 0) - A100.step_ms(0, 1, 1, 0) == pytest.approx(0.4)
    assert idle.cost().draft(0, 1, 0) == pytest.approx(0.4)


def test_the_default_is_not_behind_in_a_saturated_cell():
    work = Workload(rate=32, requests=200, acceptance=0.85)
    none, fixed, ours = (
        np.mean([simulate(make(), A100, work, seed=s).mean_latency for s in (11, 12)])
        for make in (NoSpeculation, lambda: FixedLength(3), lambda: GoodputController(fitted()))
    )
    assert ours < none and ours <= 1.03 * fixed


def test_a_fitted_model_is_hardware_too():
    model = fitted()
    hardware = Hardware.from_cost(model)
    assert hardware.step_ms(1000, 20, 10, 2) == pytest.approx(model.target(1000, 20, 10) + model.draft(1000, 10, 2))
    assert simulate(NoSpeculation(), hardware, replace(SHORT, requests=10)).tokens > 0


def test_bad_workloads(tmp_path):
    for change, cause in (
        ({"requests": 0}, "0 requests"), ({"rate": 0.0}, "rate"), ({"acceptance": 1.5}, "acceptance"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=cause):
            replace(SHORT, **change).draw(0)
    with pytest.raises(UserError, match="cache holds"):
        simulate(NoSpeculation(), replace(A100, kv_tokens=50), SHORT)
    with pytest.raises(UserError, match="no hardware preset"):
        Hardware.preset("tpu")
    (tmp_path / "t").write_text("soon")
    with pytest.raises(UserError, match="arrival times"):
        read_trace(tmp_path / "t")
    (tmp_path / "t").write_text("")
    with pytest.raises(UserError, match="no usable"):
        read_trace(tmp_path / "t")
