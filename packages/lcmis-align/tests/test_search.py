"""The searches on scripted scores: the published loop step by step, and what the robust one must not do."""

import math

import pytest
from lcmis_align import Probe, Rules
from lcmis_align import search as searches
from tenfold_shared.errors import UserError

T = 40
RULES = Rules()


def scripted(a, b):
    """An evaluate that reads scores off two functions of k, and the list of what was asked."""
    asked = []

    def evaluate(k, rounds=None):
        asked.append(k)
        return Probe(k, a(k), b(k), min(a(k), b(k)))

    return evaluate, asked


# Written out by hand from section 3.2's loop with lo = 1, hi = 19, first k = 10, momentum 1, patience 2, tau .72, delta .01.
HIGH, LOW = (0.9, 0.1), (0.1, 0.9)  # too much A: go earlier; too little A: go later
GOOD = (0.8, 0.8)
TABLES = [
    # accepted at once
    ({"k10": GOOD}, [10], 10),
    ({"k10": (0.73, 0.99)}, [10], 10),
    # accepted since |D| < delta although both are low
    ({"k10": (0.2, 0.205)}, [10], 10),
    ({"k10": (0.0, 0.0)}, [10], 10),
    # one turn: the direction of the turn before is 0, so no momentum yet
    ({"k10": HIGH, "k6": GOOD}, [10, 6], 6),  # hi = 10, ceil(11/2) = 6
    ({"k10": LOW, "k15": GOOD}, [10, 15], 15),  # lo = 10, ceil(29/2) = 15
    # tau is to be exceeded, not met
    ({"k10": (0.72, 0.9), "k15": GOOD}, [10, 15], 15),
    # two turns the same way: the momentum of 1 is added in that direction
    ({"k10": HIGH, "k6": HIGH, "k3": GOOD}, [10, 6, 3], 3),  # ceil(7/2) = 4, 4 - 1 = 3
    ({"k10": LOW, "k15": LOW, "k18": GOOD}, [10, 15, 18], 18),  # ceil(34/2) = 17, 17 + 1 = 18
    # two turns that differ: the *previous* direction is added
    ({"k10": HIGH, "k6": LOW, "k7": GOOD}, [10, 6, 7], 7),  # lo = 6, hi = 10: 8 - 1 = 7
    ({"k10": LOW, "k15": HIGH, "k14": GOOD}, [10, 15, 14], 14),  # lo = 10, hi = 15: 13 + 1 = 14
    # patience 2: the second use takes the momentum away, for the turn after it
    ({"k10": HIGH, "k6": HIGH, "k3": HIGH, "k1": GOOD}, [10, 6, 3, 1], 1),  # ceil(4/2) = 2, 2 - 1 = 1
    ({"k10": LOW, "k15": LOW, "k18": (0.3, 0.9)}, [10, 15, 18], 18),  # hi - lo = 1 after k = 18: closed
    # clamped at both ends, then the range is closed
    ({"k10": HIGH, "k6": HIGH, "k3": HIGH, "k1": HIGH}, [10, 6, 3, 1], 10),
    ({"k10": LOW, "k15": LOW, "k18": LOW}, [10, 15, 18], 10),
    # a k asked again: 10, 6 (hi), 7 = 8 - 1 (lo = 6), then from 6..10 with lo = 7: ceil(17/2) = 9, + 1 = 10
    ({"k10": HIGH, "k6": LOW, "k7": LOW, "k9": GOOD}, [10, 6, 7, 10, 9], 9),  # momentum gone: ceil(17/2) = 9
    ({"k10": HIGH, "k6": LOW, "k7": LOW, "k9": HIGH, "k8": GOOD}, [10, 6, 7, 10, 9, 8], 8),
    # nothing accepted: the largest min(sA, sB) of the probed
    ({"k10": (0.9, 0.3), "k6": (0.3, 0.9), "k7": (0.5, 0.7), "k9": (0.7, 0.4), "k8": (0.6, 0.45)},
     [10, 6, 7, 10, 9, 8], 7),
    # flat: B above A everywhere, so later and later
    ({f"k{k}": (0.4, 0.6) for k in range(1, 20)}, [10, 15, 18], 10),
    # reversed: A falls with k; the loop cannot know
    ({f"k{k}": (1 - k / 20, k / 20) for k in range(1, 20)}, [10], 10),
    ({f"k{k}": (1.1 - k / 20, k / 20 - 0.1) for k in range(1, 20)}, [10, 6, 3, 1], 10),
    # equal in min(sA, sB): the first probed
    ({"k10": (0.9, 0.5), "k6": (0.9, 0.5), "k3": (0.9, 0.5), "k1": (0.9, 0.5)}, [10, 6, 3, 1], 10),
]  # fmt: skip


@pytest.mark.parametrize(("points", "probes", "chosen"), TABLES)
def test_the_published_loop_by_hand(points, probes, chosen):
    default = LOW if "k15" in points or "k18" in points else HIGH
    a, b = (lambda k: points.get(f"k{k}", default)[0]), (lambda k: points.get(f"k{k}", default)[1])
    evaluate, asked = scripted(a, b)
    found = searches.run("binary", "paper", evaluate, T, RULES)
    assert asked == probes
    assert found.k == chosen


def official(sa, sb, total, start=0.025, end=0.475, tau=0.72, delta=0.01, momentum=1, patience=2):
    """The loop of section 3.2 again, written from its lines and not from ours."""
    lo = ceil(total * start)
    hi = ceil(total * end)
    k = ceil(total * (start + end) / 2)
    direction = used = 0
    probed, order = {}, []
    while True:
        probed[k] = (sa(k), sb(k))
        order.append(k)
        if (sa(k) > tau and sb(k) > tau) or abs(sa(k) - sb(k)) < delta:
            return k, order
        if sa(k) > sb(k):
            hi, next_direction = k, -1
        else:
            lo, next_direction = k, +1
        if hi - lo <= 1:
            break
        k = ceil((lo + hi) / 2) + direction * momentum
        if direction != 0 and momentum > 0:
            used += 1
            if used == patience:
                used, momentum = 0, momentum - 1
        k = max(ceil(total * start), min(ceil(total * end), k))
        direction = next_direction
    return min(probed, key=lambda key: max(tau - probed[key][0], tau - probed[key][1])), order


def ceil(value):
    return math.ceil(round(value, 9))


@pytest.mark.parametrize("total", [20, 30, 40, 50])
@pytest.mark.parametrize("seed", range(12))
def test_the_published_loop_on_noisy_scores(total, seed):
    def score(k, slope, salt):
        noise = math.sin((k + 1) * (seed + 1) * 12.9898 + salt) * 0.15
        return 0.5 + slope * (k / total - 0.25) + noise

    a, b = (lambda k: score(k, 1.2, 0.0)), (lambda k: score(k, -1.1, 4.0))
    evaluate, asked = scripted(a, b)
    found = searches.run("binary", "paper", evaluate, total, RULES)
    assert (found.k, asked) == official(a, b, total)


def curves(peak, width=6.0):
    """A rises and B falls with k; both are highest together at `peak`."""
    a = lambda k: 1 / (1 + math.exp(-(k - peak + width / 2) / 2))  # noqa: E731
    b = lambda k: 1 / (1 + math.exp((k - peak - width / 2) / 2))  # noqa: E731
    return a, b


@pytest.mark.parametrize("peak", range(1, 20))
@pytest.mark.parametrize("strategy", ["binary", "golden"])
def test_robust_searches_find_the_peak_and_ask_nothing_twice(peak, strategy):
    evaluate, asked = scripted(*curves(peak))
    strict = Rules(tau=2.0, floor=2.0)  # never satisfied: the whole search is seen
    found = searches.run(strategy, "robust", evaluate, T, strict)
    assert len(set(asked)) == len(asked) <= strict.max_probes
    best = max(range(1, 20), key=lambda k: min(curves(peak)[0](k), curves(peak)[1](k)))
    assert abs(found.k - best) <= (0 if strategy == "binary" else 1)
    if strategy == "binary":
        assert len(asked) <= 6


def test_the_climb_by_hand():
    strict = Rules(tau=2.0, floor=2.0)
    # Range 1..19, so strides of 3 from 10. A above B: earlier first; 7 is better, 4 is worse; the parabola through
    # (4, .2), (7, .6), (10, .4) is highest at 7.5, which is rounded to 8; then it is highest at 8 again.
    joint = {10: 0.4, 7: 0.6, 4: 0.2, 8: 0.65}
    evaluate, asked = scripted(lambda k: 0.9, lambda k: joint[k])
    assert searches.run("binary", "robust", evaluate, T, strict).k == 8
    assert asked == [10, 7, 4, 8]
    # B above A: later first; worse, so the other side; worse too and alike: 10 it is.
    evaluate, asked = scripted(lambda k: {10: 0.5, 13: 0.3, 7: 0.3}[k], lambda k: 0.9)
    assert searches.run("binary", "robust", evaluate, T, strict).k == 10
    assert asked == [10, 13, 7]
    # Better and better to the end of the range: halfway between the last two, then between the best two.
    evaluate, asked = scripted(lambda k: k / 20, lambda k: 0.99)
    assert searches.run("binary", "robust", evaluate, T, strict).k == 19
    assert asked == [10, 13, 16, 19, 18]
    # Flat: no side is better, so the first.
    evaluate, asked = scripted(lambda k: 0.0, lambda k: 0.0)
    assert searches.run("binary", "robust", evaluate, T, strict).k == 10
    assert asked == [10, 13, 7]
    evaluate, asked = scripted(lambda k: k / 20, lambda k: 0.99)
    assert searches.run("binary", "robust", evaluate, T, Rules(tau=2.0, floor=2.0, max_probes=2)).k == 13
    evaluate, asked = scripted(lambda k: 0.1, lambda k: 0.1)
    assert searches.run("binary", "robust", evaluate, T, Rules(start=0.25, end=0.25)).k == 10
    assert asked == [10]


def test_robust_does_not_accept_balance_at_the_bottom():
    evaluate, _ = scripted(lambda k: 0.2 if k == 10 else 0.8, lambda k: 0.2 if k == 10 else 0.8)
    assert searches.run("binary", "paper", evaluate, T, RULES).k == 10
    found = searches.run("binary", "robust", evaluate, T, RULES)
    assert found.k != 10
    assert found.a == 0.8
    evaluate, _ = scripted(lambda k: 0.7, lambda k: 0.695)
    assert searches.run("binary", "robust", evaluate, T, RULES).k == 10  # balanced, and above the floor


def test_sweep_asks_for_all_and_halving_for_half():
    a, b = curves(9)
    evaluate, asked = scripted(a, b)
    assert searches.run("sweep", "robust", evaluate, T, RULES).k == 9
    assert asked == list(range(1, 20))
    evaluate, asked = scripted(a, b)
    assert searches.run("successive_halving", "robust", evaluate, T, RULES, rounds=3).k == 9
    assert len(asked) == 19 + 10 + 5


def test_policies_differ_in_what_is_best():
    separate = Probe(5, a=0.6, b=0.6, joint=0.1)  # half of the images show A, the other half B
    together = Probe(7, a=0.55, b=0.55, joint=0.5)
    assert searches.best([separate, together], "robust").k == 7
    assert searches.best([separate, together], "paper").k == 5


def test_bounds_are_the_official_ones():
    assert RULES.bounds(40) == (1, 19, 10)
    assert RULES.bounds(30) == (1, 15, 8)
    assert RULES.bounds(50) == (2, 24, 13)


def test_calls_of_a_sweep_by_hand():
    least, most = searches.calls_bounds("sweep", "robust", 40, RULES, [8])
    assert least == most == 8 * (19 + sum(40 - k for k in range(1, 20)))


@pytest.mark.parametrize("strategy", ["golden", "binary", "successive_halving"])
@pytest.mark.parametrize("policy", ["robust", "paper"])
@pytest.mark.parametrize("peak", [3, 9, 17])
def test_calls_lie_between_the_bounds(strategy, policy, peak):
    images = [2, 2, 4] if strategy == "successive_halving" else [8]
    a, b = curves(peak)
    seen = {}

    def evaluate(k, rounds=None):
        seen.setdefault(k, set()).update(range(rounds or len(images)))
        return Probe(k, a(k), b(k), min(a(k), b(k)))

    searches.run(strategy, policy, evaluate, T, RULES, rounds=len(images))
    calls = 0
    for r, n in enumerate(images):
        at = [k for k, groups in seen.items() if r in groups]
        calls += n * (max(at) + sum(T - k for k in at))
    least, most = searches.calls_bounds(strategy, policy, T, RULES, images)
    assert least <= calls <= most


def test_errors():
    evaluate, _ = scripted(*curves(9))
    with pytest.raises(UserError, match="search is 'random'"):
        searches.run("random", "robust", evaluate, T, RULES)
    with pytest.raises(UserError, match="policy is 'bold'"):
        searches.run("binary", "bold", evaluate, T, RULES)
    with pytest.raises(UserError, match=r"0 <= start <= end <= 1"):
        Rules(start=0.5, end=0.2)
    with pytest.raises(UserError, match="patience"):
        Rules(patience=0)
