"""Two callables timed in turn in one process, A B A B ..., so that both meet the same machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold_shared.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Seconds of both sides and how many times faster ours is."""

    ours: float
    """Median seconds of one call of ours."""
    peer: float
    """Median seconds of one call of the peer."""
    ratio: float
    """peer / ours: above 1 ours is faster. The median of the ratios of neighbouring calls."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the ratio."""
    repeats: int


def compare(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    repeats: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time `ours` and `peer` in turn and compare neighbours.

    repeats: pairs of calls, 3 or more. clock: a function that gives seconds; `time.process_time` counts CPU time.
    Work on an accelerator must be synchronised inside the callables. Raises UserError when repeats is under 3.
    """
    if repeats < 3:
        raise UserError(f"repeats is {repeats}, expected 3 or more", hint="an interval needs at least three pairs")
    for _ in range(warmup):
        ours()
        peer()
    seconds = np.empty((repeats, 2))
    for pair in seconds:
        for side, call in enumerate((ours, peer)):
            start = clock()
            call()
            pair[side] = clock() - start
    ratios = seconds[:, 1] / seconds[:, 0]
    draws = np.random.default_rng(0).integers(0, repeats, (2000, repeats))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    a, b = np.median(seconds, axis=0)
    return Comparison(float(a), float(b), float(np.median(ratios)), (float(low), float(high)), repeats)
