import itertools

import pytest
from tenfold_shared.errors import UserError
from tenfold_shared.timing import compare


def test_sides_take_turns_and_the_ratio_is_peer_over_ours() -> None:
    now, calls = [0.0], []

    def work(name: str, seconds: float):
        def call() -> None:
            calls.append(name)
            now[0] += seconds

        return call

    result = compare(work("a", 1.0), work("b", 3.0), repeats=5, warmup=1, clock=lambda: now[0])
    assert calls == ["a", "b"] * 6
    assert (result.ours, result.peer, result.ratio, result.interval) == (1.0, 3.0, 3.0, (3.0, 3.0))


def test_one_disturbed_pair_does_not_move_the_ratio() -> None:
    now, slow = [0.0], itertools.chain([1, 1, 100], itertools.repeat(1))

    def ours() -> None:
        now[0] += next(slow)

    def peer() -> None:
        now[0] += 2.0

    assert compare(ours, peer, repeats=7, warmup=0, clock=lambda: now[0]).ratio == 2.0


def test_two_repeats_are_refused() -> None:
    with pytest.raises(UserError, match="repeats is 2"):
        compare(int, int, repeats=2)
