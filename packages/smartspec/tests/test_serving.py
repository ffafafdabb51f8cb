import json
import math
from itertools import pairwise
from types import SimpleNamespace as Fake

import numpy as np
import pytest
from smartspec import FixedLength, GoodputController, Hardware, PiecewiseCostModel
from smartspec.cost import StepSample
from smartspec.errors import UnsupportedError
from smartspec.profiling import load_profile
from smartspec.serving import Bridge, LiveCost, Settings, check_vllm, serve_args
from tenfold_shared.errors import UserError


def request(name, prompt=10, done=3, most=50, computed=None, **extra):
    return Fake(
        request_id=name, num_prompt_tokens=prompt, num_tokens=prompt + done, num_output_tokens=done, max_tokens=most,
        num_computed_tokens=prompt + done - 1 if computed is None else computed,
        sampling_params=Fake(extra_args=extra or None),
    )  # fmt: skip


def bridge(settings=None, **kwargs):
    options = {"max_num_seqs": 8, "max_model_len": 100, **kwargs}
    return Bridge(Settings.read(settings or {"cost": "a100-7b-160m"}), 5, **options)


def output(scheduled, drafts, k, invalid=None):
    return Fake(
        num_scheduled_tokens=scheduled, total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens=drafts, num_spec_tokens_to_schedule=k, num_invalid_spec_tokens=invalid or {},
    )  # fmt: skip


def test_a_decision_knows_what_is_left_of_every_request():
    b = bridge()
    k = b.decide([request("a"), request("b", done=48), request("c", prompt=10, done=86, most=None)])
    # One token at least comes before the drafts are verified, and one more that is not drafted.
    assert k >= 2 and b.lens == {"a": k, "b": 0, "c": 2}
    assert b.verified_length(request("b", done=49)) == 0
    assert b.verified_length(request("c", prompt=10, done=88, most=None)) == 1
    assert b.decide([]) == 0


def test_requests_that_wait_count_up_to_the_batch_limit():
    b = bridge(max_num_seqs=3)
    b.decide([request("a")], [request(str(i), done=0, computed=0) for i in range(9)], budget=2048)
    assert list(b.lens) == ["a", "0", "1"]


def test_wishes_of_requests_and_nonsense_among_them():
    b = bridge()
    none = {"smartspec": {"max_draft_len": 0}}
    odd = [{"smartspec": {"max_draft_len": v}} for v in ("much", -1, math.nan, True)]
    b.decide(
        [
            request("a", **none),
            request("b"),
            *(request(f"o{i}", **o) for i, o in enumerate(odd)),
            request("p", smartspec=7),
        ]
    )
    assert b.lens["a"] == 0 < b.lens["b"] == b.lens["o0"] == b.lens["o1"] == b.lens["o2"] == b.lens["p"]
    b.decide([request("a", smartspec={"priority": 3.0})])


def test_an_outcome_counts_decoding_requests_only():
    b, seen = bridge(), []
    b.policy.observe = seen.append
    requests = {"a": request("a"), "b": request("b"), "p": request("p", done=0, computed=0), "g": request("g")}
    b.decide(list(requests.values()))
    out = output({"a": 4, "b": 1, "p": 10, "g": 3}, {"a": [7, 7, 7], "g": [1, 2]}, 3, invalid={"g": 1})
    b.started(out, requests)
    b.finished(out, [[7, 7, 9], [4], [5], [1, 3]], {"a": 0, "b": 1, "p": 2, "g": 3}, {"a": 3, "b": 1, "g": 2, "p": 1})
    (got,) = seen
    assert got.ids == ["a", "b", "g"]
    assert got.verified.tolist() == [3, 0, 1] and got.accepted.tolist() == [2, 0, 1]
    assert (got.generated, got.n_batched, got.n_prefill, got.draft_len) == (6, 18, 10, 3)
    assert got.ms > 0 and b.samples[-1].kind == "step"


def test_two_steps_in_flight_meet_their_own_times():
    b = bridge()
    clock = iter([0.0, 1.0, 5.0, 7.0])
    b.clock = lambda: next(clock)
    requests = {"a": request("a")}
    one, two = output({"a": 1}, {}, 2), output({"a": 3}, {"a": [1, 2]}, 2)
    b.decide(list(requests.values()))
    b.started(one, requests)
    b.started(two, requests)
    b.finished(one, [[4]], {"a": 0}, {"a": 1})
    b.finished(two, [[1, 2, 3]], {"a": 0}, {"a": 3})
    assert [s.ms for s in b.samples] == [5000.0, 6000.0]
    b.finished(output({"a": 1}, {}, 0), [[4]], {"a": 0}, {"a": 1})
    assert len(b.samples) == 2


def test_a_decision_not_to_speculate_stands_while_the_batch_is_the_same():
    b, asked = bridge(), []
    for _ in range(100):
        b.policy.tracker.update("ab", [2, 2], [0, 0])
    decide = b.policy.decide
    b.policy.decide = lambda state: asked.append(state.ids) or decide(state)
    both = [request("a"), request("b")]
    assert [b.decide(both) for _ in range(16)] == [0] * 16
    assert len(asked) == 2 and b.policy.counters["low_acceptance"] == 16 == b.policy._zeros
    b.decide([request("a"), request("c")])
    b.decide([request("a")], [request("c")])
    b.decide(both, [request("d", done=0, computed=0)], budget=2048)
    b.decide(both)
    assert len(asked) == 5
    b.policy = FixedLength(3)
    assert b.decide(both) == 3


def test_a_length_is_decided_anew_in_every_step():
    b, asked = bridge(), []
    decide = b.policy.decide
    b.policy.decide = lambda state: asked.append(state.ids) or decide(state)
    assert all(b.decide([request("a"), request("b")]) > 0 for _ in range(8)) and len(asked) == 8


def test_refits_become_rarer():
    rng = np.random.default_rng(0)
    samples, fitted = [], []
    live = LiveCost(20, 10, range(6))
    for step in range(1000):
        n, k = int(rng.integers(1, 9)), int(rng.integers(0, 6))
        context = int(rng.integers(10, 90)) * n
        samples.append(StepSample(context, n * (k + 1), n, k, 0, 5 + 0.01 * context + 0.3 * n * (k + 1) + k, "step"))
        if live.learn(samples):
            fitted.append(step)
    assert np.diff(fitted).tolist() == [10, 20, 40, 80, 160, 160, 160, 160, 160]


def test_lookup_learns_how_often_it_matches():
    b = bridge(lookup=True)
    requests = {n: request(n) for n in "ab"}
    for _ in range(30):
        b.decide(list(requests.values()))
        out = output({"a": 2, "b": 1}, {"a": [1]}, 1)
        b.started(out, requests)
        b.decision.draft_len = 1
        b.finished(out, [[1, 2], [3]], {"a": 0, "b": 1}, {"a": 2, "b": 1})
    assert b.policy.matches.ratio == pytest.approx(0.5, abs=0.01)


def test_costs_are_learned_from_live_steps(tmp_path):
    """Lengths vary until a model fits; afterwards the controller rules, and files are written."""
    settings = {"calibration": 40, "every": 20, "metrics": str(tmp_path / "m.txt"), "profile": str(tmp_path / "p.json")}
    b = bridge(settings, fingerprint={"target": "t"})
    now = [0.0]
    b.clock = lambda: now[0]
    assert isinstance(b.policy, FixedLength)
    rng, last, lengths = np.random.default_rng(0), 0, []
    for step in range(120):
        n = 1 + step % 7
        requests = {str(i): request(str(i), prompt=10 + step % 11, done=5) for i in range(n)}
        k = b.decide(list(requests.values()))
        lengths.append(k)
        out = output({r: last + 1 for r in requests}, {r: [1] * last for r in requests} if last else {}, k)
        b.started(out, requests)
        now[0] += (9 + 0.05 * n * (last + 1) + 1.1 * k + 1e-3 * n * 14) / 1000
        kept = rng.integers(0, last + 1, n)
        b.finished(
            out,
            [[1] * (a + 1) for a in kept],
            {str(i): i for i in range(n)},
            {str(i): int(a) + 1 for i, a in enumerate(kept)},
        )
        last = k
    assert set(lengths[:35]) == set(range(6))
    assert isinstance(b.policy, GoodputController) and b.policy.cost.error(list(b.samples)) < 0.02
    samples, found = load_profile(tmp_path / "p.json")
    assert len(samples) == 120 and found == {"target": "t"}
    text = (tmp_path / "m.txt").read_text()
    assert "smartspec_steps_total 120" in text and 'reason="' in text
    assert PiecewiseCostModel.fit(samples).draft(0, 4, 2) == pytest.approx(2.2, rel=0.2)


def test_finished_requests_are_forgotten():
    b = bridge()
    b.decide([request("a")])
    b.policy.tracker.update(["a"], [2], [2])
    b.forget("a")
    assert b.lens == {} and not b.policy.tracker._requests


def test_gpus_get_few_lengths_and_uniform_verification():
    assert bridge(cuda=True).candidates == [0, 1, 2, 3, 5] and bridge(cuda=True).verify == "uniform"
    assert bridge().candidates == [0, 1, 2, 3, 4, 5] and bridge().verify == "ragged"


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"speed": 1}, "no setting 'speed'"),
        ({"policy": "luck"}, "policy is 'luck'"),
        ({"policy": "table"}, "needs the setting table"),
        ({"candidates": 3}, "candidates is 3"),
        ({"min_gain": "much"}, "min_gain is 'much'"),
        ({"guard": "no"}, "guard is 'no'"),
        ({"clock": "sun"}, "clock is 'sun'"),
        ({"every": 0}, "must be 1 or more"),
    ],
)
def test_bad_settings(given, cause):
    with pytest.raises(UserError, match=cause):
        Settings.read(given)


def test_settings_reach_the_policy():
    assert bridge({"policy": "none"}).decide([request("a")]) == 0
    assert bridge({"policy": "fixed"}).decide([request("a")]) == 5
    assert bridge({"policy": "table", "table": [[1, 4, 2]]}).decide([request("a")]) == 2
    paper = bridge({"policy": "paper", "cost": "a100-7b-160m"}).policy
    assert paper.objective == "ratio"
    with pytest.raises(UserError, match="num_speculative_tokens is 5"):
        bridge({"cost": "a100-7b-160m", "candidates": [0, 9]})


def test_a_cost_file(tmp_path):
    PiecewiseCostModel.fit(Hardware.preset("a100-7b-160m").profile(0)).save(tmp_path / "c.json")
    assert bridge({"cost": str(tmp_path / "c.json")}).decide([request("a")]) > 0
    with pytest.raises(FileNotFoundError):
        bridge({"cost": str(tmp_path / "none.json")})


def test_unsupported_versions_name_what_is_missing(caplog):
    names = ("schedule", "update_from_output", "update_draft_token_ids", "_update_after_schedule", "_free_request")
    whole = type("Scheduler", (), {n: None for n in names})
    check_vllm("0.32.0+cpu", whole)
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.31\.2 is not supported.*0\.32"):
        check_vllm("0.31.2", whole)
    with pytest.raises(UnsupportedError, match=r"no Part\.update_draft_token_ids"):
        check_vllm("0.32.1", type("Part", (), {n: None for n in names if "draft" not in n}))
    check_vllm("0.40.0", whole)
    assert "newer" in caplog.text


def test_serve_args_are_json_that_vllm_reads():
    words = serve_args("big", "small", max_draft_len=5, settings={"cost": "cost.json"})
    speculative = json.loads(words[words.index("--speculative-config") + 1])
    assert speculative["model"] == "small" and speculative["method"] == "draft_model"
    table = speculative["num_speculative_tokens_per_batch_size"]
    assert sorted(k for *_, k in table) == [1, 2, 3, 5]
    assert all(a[1] + 1 == b[0] for a, b in pairwise(table))
    assert json.loads(words[words.index("--additional-config") + 1]) == {"smartspec": {"cost": "cost.json"}}
    assert "ngram" in " ".join(serve_args("big", None))
    with pytest.raises(UserError, match="no setting"):
        serve_args("big", None, settings={"x": 1})
    resting = serve_args("big", "small", rest=True)
    assert resting[resting.index("--worker-cls") + 1] == "smartspec.vllm_drafter.SmartSpecWorker"
    assert "--no-async-scheduling" in resting and "--worker-cls" not in words
    with pytest.raises(UserError, match="no draft model"):
        serve_args("big", None, rest=True)
