import itertools
import math

import numpy as np
import pytest
from smartspec import AcceptanceTracker, MatchRatioTracker, expected_length, expected_tree_length
from tenfold_shared.errors import UserError


def enumerated(alpha, k):
    total = 0.0
    for kept in itertools.product((True, False), repeat=k):
        run = next((j for j, ok in enumerate(kept) if not ok), k)
        total += (run + 1) * math.prod(alpha if ok else 1 - alpha for ok in kept)
    return total


@pytest.mark.parametrize("k", range(7))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 0.99, 1.0])
def test_expected_length_equals_enumeration(alpha, k):
    assert expected_length(alpha, k) == pytest.approx(enumerated(alpha, k), abs=1e-12)


def test_expected_length_closed_form_limits_and_hazards():
    assert expected_length(0.7, 5) == pytest.approx((1 - 0.7**6) / 0.3)
    assert expected_length(1.0, 9) == 10 and expected_length(0.0, 9) == 1 and expected_length(0.4, 0) == 1
    assert expected_length([0.9, 0.5, 0.2], 2) == pytest.approx(1 + 0.9 + 0.45)


def test_a_chain_is_a_tree_of_one_rank():
    assert expected_tree_length([(0.6,) * j for j in (1, 2, 3)]) == pytest.approx(expected_length(0.6, 3))


@pytest.mark.parametrize("bad", [(-0.1, 2), (1.1, 2), (math.nan, 2), (0.5, -1), ([0.5], 2)])
def test_expected_length_refuses(bad):
    with pytest.raises(UserError):
        expected_length(*bad)


def censored(rng, alpha, k, size):
    kept = rng.random((size, k)) < alpha
    return np.cumprod(kept, axis=1).sum(axis=1)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("mode", ["counts", "hazard"])
def test_tracker_is_unbiased_on_censored_runs(alpha, mode):
    estimates, survivals = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tracker = AcceptanceTracker(mode, per_request=False, half_life=1e5, prior=1)
        for _ in range(100):
            tracker.update(range(50), np.full(50, 5), censored(rng, alpha, 5, 50))
        estimates.append(tracker.alpha)
        survivals.append(tracker.survival([0], 3)[0])
    assert abs(np.mean(estimates) - alpha) < 0.005 and np.max(np.abs(np.array(estimates) - alpha)) < 0.03
    assert np.mean(survivals, axis=0) == pytest.approx([alpha, alpha**2, alpha**3], abs=0.01)


def test_dividing_by_the_drafted_length_would_be_biased():
    accepted = censored(np.random.default_rng(0), 0.7, 5, 20000)
    assert accepted.mean() / 5 == pytest.approx(0.39, abs=0.01)


def test_one_request_and_many_smooth_alike():
    one, many = (AcceptanceTracker(per_request=False, initial=0.2, memory=1) for _ in range(2))
    for _ in range(256):
        one.update([0], [1], [1])
    many.update(range(256), np.ones(256), np.ones(256))
    assert many.alpha == pytest.approx(one.alpha, abs=2e-3)


def test_a_steady_acceptance_is_told_better_by_a_long_memory_and_a_change_as_soon_as_by_a_short_one():
    errors, after = {1.0: [], 20.0: []}, {1.0: [], 20.0: []}
    for memory in errors:
        for seed in range(20):
            rng = np.random.default_rng(seed)
            tracker = AcceptanceTracker(per_request=False, memory=memory)
            for _ in range(400):
                tracker.update(range(4), np.full(4, 4), censored(rng, 0.7, 4, 4))
            errors[memory].append(abs(tracker.alpha - 0.7))
            for _ in range(60):
                tracker.update(range(4), np.full(4, 4), censored(rng, 0.3, 4, 4))
            after[memory].append(abs(tracker.alpha - 0.3))
    assert np.mean(errors[20.0]) < 0.6 * np.mean(errors[1.0])
    assert np.mean(after[20.0]) < np.mean(after[1.0]) + 0.05 < 0.15


@pytest.mark.parametrize(("concentration", "least", "most"), [(None, 40, 500), (6.0, 3, 14), (1.0, 2, 4)])
@pytest.mark.parametrize("ends", [True, False])
def test_the_weight_of_a_request_of_its_own_follows_the_spread_among_requests(concentration, least, most, ends):
    """Requests of one acceptance share it; those of a Beta distribution give its concentration back."""
    rng, priors = np.random.default_rng(0), []
    for _ in range(10):
        tracker = AcceptanceTracker()
        for group in range(10):
            n = 16
            alpha = np.full(n, 0.7)
            if concentration:
                alpha = rng.beta(0.7 * concentration, 0.3 * concentration, n)
            names = [(group, i) for i in range(n)]
            for _ in range(20):
                kept = np.cumprod(rng.random((n, 4)) < alpha[:, None], axis=1).sum(axis=1)
                tracker.update(names, np.full(n, 4), kept)
            for name in names if ends else ():
                tracker.forget(name)
        priors.append(tracker.request_prior)
    assert least <= np.median(priors) <= most


@pytest.mark.parametrize("mode", ["counts", "hazard", "ema"])
def test_survival_is_the_product_of_the_rates_and_their_ratios_by_position(mode):
    tracker = AcceptanceTracker(mode, positions=4)
    rng = np.random.default_rng(2)
    for _ in range(50):
        tracker.update("ab", [4, 2], [rng.integers(0, 5), rng.integers(0, 3)])
    rates, ratios = np.array(tracker.rates("abc")), tracker.ratios(6) or [1.0] * 6
    expected = np.cumprod(np.minimum(rates[:, None] * np.array(ratios), 0.9999), axis=1)
    assert tracker.survival("abc", 6) == pytest.approx(expected)
    assert tracker.acceptance("abc") == pytest.approx(rates) and tracker.survival("abc", 0).shape == (3, 0)


def test_hazards_follow_positions():
    tracker = AcceptanceTracker("hazard", per_request=False, half_life=1e4)
    rng = np.random.default_rng(1)
    for _ in range(400):
        first = rng.random(20) < 0.9
        tracker.update(range(20), np.full(20, 2), first.astype(int) + (first & (rng.random(20) < 0.3)))
    survival = tracker.survival([0], 2)[0]
    assert survival[0] == pytest.approx(0.9, abs=0.03) and survival[1] == pytest.approx(0.27, abs=0.03)


def test_requests_differ_and_are_forgotten():
    tracker = AcceptanceTracker()
    for _ in range(30):
        tracker.update(["good", "bad"], [3, 3], [3, 0])
    good, bad, new = tracker.acceptance(["good", "bad", "new"])
    assert good > 0.9 > new > bad
    tracker.forget("good")
    assert tracker.acceptance(["good"])[0] == pytest.approx(min(tracker.alpha, 0.9999))


def test_the_moving_average_is_the_published_one():
    tracker = AcceptanceTracker("ema")
    tracker.update([0], [4], [1])
    assert tracker.alpha == pytest.approx(0.85 * 0.7 + 0.15 * 0.5)


def test_nan_and_impossible_counts_are_left_out_and_counted():
    tracker = AcceptanceTracker()
    before = tracker.alpha
    tracker.update([0], [2], [math.nan])
    tracker.update([0], [2], [3])
    assert tracker.ignored == 2 and tracker.alpha == before


def test_match_ratio():
    ratio = MatchRatioTracker()
    ratio.update(4, 4)
    ratio.update(0, 0)
    assert ratio.ratio == pytest.approx(0.85 * 0.5 + 0.15)


def test_unknown_mode_and_initial():
    with pytest.raises(UserError, match="mode"):
        AcceptanceTracker("guess")
    with pytest.raises(UserError, match="initial"):
        AcceptanceTracker(initial=1.5)
