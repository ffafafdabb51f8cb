"""Fixed lengths against the controller on a running server; what `smartspec bench` and the benchmarks call."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smartspec.controller import GoodputController, Policy
from smartspec.cost import CostModel, PiecewiseCostModel, StepSample
from smartspec.measure import EngineServer, Served, interleave, serve
from smartspec.policies import FixedLength


class _Explore:
    """Random lengths, whose steps are kept as samples: a profile made by serving."""

    def __init__(self, most: int, seed: int = 0) -> None:
        self.rng, self.most = np.random.default_rng(seed), most
        self.samples: list[StepSample] = []

    def decide(self, state: Any) -> Any:
        from smartspec.controller import SpecDecision

        k = int(self.rng.integers(0, self.most + 1))
        lens = state.limits(k)
        return SpecDecision(int(lens.max()), lens)

    def observe(self, outcome: Any) -> None:
        n = len(outcome.ids)
        self.samples.append(
            StepSample(outcome.n_ctx, outcome.n_batched, n, outcome.draft_len, outcome.n_prefill, outcome.ms, "step")
        )

    def forget(self, name: Any) -> None:
        """Nothing is kept."""


def learn_cost(
    server: Any, prompts: Sequence[Sequence[int]], sizes: Sequence[int], most: int, new_tokens: int
) -> PiecewiseCostModel:
    """A cost model fitted on steps of random lengths at these concurrencies; the slowest 2 % are left out.

    Raises ProfileError when the steps do not determine it.
    """
    explore = _Explore(most)
    for turn in range(20):
        for size in sizes:
            serve(server, explore, prompts[: 2 * size], new_tokens, concurrency=size)
        if turn and len(explore.samples) >= 200:
            break
    steps = explore.samples[5:]
    limit = float(np.quantile([s.ms for s in steps], 0.98))
    return PiecewiseCostModel.fit([s for s in steps if s.ms <= limit])


def compare(
    server: Any, prompts: Sequence[Sequence[int]], sizes: Sequence[int], lengths: Sequence[int], *, new_tokens: int = 48,
    rounds: int = 5, cost: CostModel | None = None, progress: Callable[[int, int], None] | None = None,
) -> list[list[Any]]:  # fmt: skip
    """Rows (concurrency, policy, median tokens per second, ratio to the best fixed length, mean k, same tokens as k = 0).

    sizes: concurrencies. lengths: fixed k. cost: of the controller; learned from steps of random lengths when not given.
    """
    most = max([*lengths, 1])
    if isinstance(server, EngineServer):
        server.engine.max_draft_len = most
    model = cost or learn_cost(server, prompts, sizes, most, new_tokens)
    rows: list[list[Any]] = []
    for size in sizes:
        policies: dict[str, Policy] = {f"k={k}": FixedLength(k) for k in lengths}
        policies["goodput"] = GoodputController(model, most)
        runs = interleave(
            server, policies, prompts[: 2 * size], new_tokens, rounds=rounds, concurrency=size, progress=progress
        )
        best = best_fixed(runs)
        base = runs[f"k={lengths[0]}"][0].outputs
        for name, served in runs.items():
            median = float(np.median([s.throughput for s in served]))
            paired = float(np.median([a.throughput / b.throughput for a, b in zip(served, runs[best], strict=True)]))
            same = all(s.outputs == base for s in served)
            rows.append([size, name, median, paired, float(np.mean([s.mean_k for s in served])), same])
    return rows


def best_fixed(runs: dict[str, list[Served]]) -> str:
    """The name of the fixed length with the highest median throughput."""
    fixed = [name for name in runs if name.startswith("k=")]
    return max(fixed, key=lambda name: float(np.median([s.throughput for s in runs[name]])))
