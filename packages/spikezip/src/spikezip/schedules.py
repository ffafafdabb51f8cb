"""Which schedules are worth it: every pair of delay and burst reaches the same logits, some with less work or in fewer steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tenfold_shared.errors import UserError

from spikezip.energy import measure
from spikezip.engine import SpikingModel


@dataclass(frozen=True)
class Schedule:
    """One setting and what it costs to equilibrium."""

    delay: int
    burst: int
    """1 is the paper's neuron."""
    steps: int
    """Until the slowest sample has settled."""
    accumulations: int
    """For each sample; a burst of n counts as n."""
    best: bool
    """No other schedule has both fewer steps and fewer accumulations."""


def search(
    snn: SpikingModel,
    inputs: Any,
    *,
    delays: Iterable[int] = (0, 1, 2),
    bursts: Iterable[int] = (1, 2, 4),
    max_steps: int = 512,
) -> list[Schedule]:
    """Run every pair of `delays` and `bursts` to equilibrium and mark the Pareto front of steps and accumulations.

    Sorted by steps. The network's own schedule is put back. Pairs that have not settled after `max_steps` are left out.

    Raises UserError in the event engine, for values out of range, and when no pair settled.
    """
    before, found = (snn.clock.delay, snn.clock.burst), []
    try:
        for delay in delays:
            for burst in bursts:
                snn.set_schedule(delay=delay)
                snn.set_burst(burst)
                # "none" would go on for nothing, "equilibrium" would warn where leaving out is the answer.
                report, result = measure(snn, inputs, max_steps=max_steps, stop="stable", patience=max_steps)
                if result.converged:
                    found.append((result.steps, report.total_ac // report.samples, delay, burst))
    finally:
        snn.set_schedule(delay=before[0])
        snn.set_burst(before[1])
        snn.reset()
    if not found:
        raise UserError(f"no schedule settled within {max_steps} steps", hint="allow more steps")
    return [
        Schedule(delay, burst, steps, cost, best=not any(_beats((s, c), (steps, cost)) for s, c, _, _ in found))
        for steps, cost, delay, burst in sorted(found)
    ]


def _beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
