"""The other ways to choose a length, behind the controller's protocol: what stock engines do, and an oracle.

`BatchSizeTable` is vLLM's `num_speculative_tokens_per_batch_size`, `DisableByBatchSize` its older rule, and
`AcceptLengthEMA` the rule of SGLang's `--speculative-adaptive`, re-expressed from its description.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from tenfold_shared.errors import UserError

from smartspec.controller import BatchState, GoodputController, SpecDecision, StepOutcome
from smartspec.cost import CostModel


class FixedLength:
    """The same k in every step.

    Raises UserError when draft_len is negative.
    """

    def __init__(self, draft_len: int) -> None:
        if draft_len < 0:
            raise UserError(f"draft_len is {draft_len}, expected 0 or more")
        self.draft_len = draft_len

    def length(self, state: BatchState) -> int:
        """The wanted k, before the step's limits."""
        return self.draft_len

    def decide(self, state: BatchState) -> SpecDecision:
        k = self.length(state)
        if state.max_draft_len is not None:
            k = min(k, state.max_draft_len)
        if state.free_tokens is not None and len(state.ids):
            k = max(min(k, state.free_tokens // len(state.ids) - 1), 0)
        lens = state.limits(k)
        return SpecDecision(int(lens.max()) if len(lens) else 0, lens, reason="speculate" if k else "off")

    def observe(self, outcome: StepOutcome) -> None:
        """Nothing is learned."""

    def forget(self, name: Hashable) -> None:
        """Nothing is kept."""


class NoSpeculation(FixedLength):
    """k = 0 always."""

    def __init__(self) -> None:
        super().__init__(0)


class DisableByBatchSize(FixedLength):
    """A fixed k up to `threshold` requests, 0 above."""

    def __init__(self, draft_len: int, threshold: int) -> None:
        super().__init__(draft_len)
        self.threshold = threshold

    def length(self, state: BatchState) -> int:
        return self.draft_len if len(state.ids) <= self.threshold else 0


class BatchSizeTable(FixedLength):
    """k by batch size. rows: (lowest, highest, k), the highest one included, as vLLM's table.

    Raises UserError when rows overlap, are empty or negative.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        ordered = sorted(tuple(int(v) for v in row) for row in rows)
        if not ordered or any(len(r) != 3 or r[0] > r[1] or r[2] < 0 for r in ordered):
            raise UserError(f"table is {list(rows)}, expected rows of lowest, highest, length")
        if any(a[1] >= b[0] for a, b in pairwise(ordered)):
            raise UserError(f"table rows overlap: {ordered}")
        super().__init__(max(r[2] for r in ordered))
        self.rows = ordered

    def length(self, state: BatchState) -> int:
        return next((k for low, high, k in self.rows if low <= len(state.ids) <= high), self.rows[-1][2])


class AcceptLengthEMA(FixedLength):
    """Follows the accepted length: one step beyond what is accepted, among candidates that depend on the batch size.

    steps: batch size to candidate lengths; the largest entry not above the batch counts. Each entry keeps a moving average
    of accepted tokens and is reconsidered every `interval` steps after `warmup`: down when the average is at most half a
    token below the next lower candidate plus `down`, up when it is above half a token below the present one plus `up`.
    A candidate of 0 is left by trying the smallest other one.

    Raises UserError when an entry has no candidates or a negative one.
    """

    DEFAULT: Mapping[int, Sequence[int]] = {1: (1, 3, 7), 8: (0, 1, 3), 32: (0, 1), 64: (0,)}

    def __init__(
        self,
        steps: Mapping[int, Sequence[int]] = DEFAULT,
        *,
        ema: float = 0.2,
        interval: int = 5,
        warmup: int = 10,
        up: float = 0.0,
        down: float = -0.25,
    ) -> None:
        if not steps or any(not c or min(c) < 0 for c in steps.values()):
            raise UserError(f"steps are {dict(steps)}, expected candidate lengths for each batch size")
        super().__init__(max(max(c) for c in steps.values()))
        self.sizes = sorted(steps)
        self.candidates = {size: sorted(c) for size, c in steps.items()}
        self.ema, self.interval, self.warmup, self.up, self.down = ema, interval, warmup, up, down
        self.current = {size: c[len(c) // 2] for size, c in self.candidates.items()}
        self.accepted = {size: max(k - 1.0, 0.0) for size, k in self.current.items()}
        self.count = dict.fromkeys(self.sizes, 0)

    def _slot(self, n_seqs: int) -> int:
        return max((size for size in self.sizes if size <= n_seqs), default=self.sizes[0])

    def length(self, state: BatchState) -> int:
        return self.current[self._slot(len(state.ids))]

    def observe(self, outcome: StepOutcome) -> None:
        if not len(outcome.ids):
            return
        slot = self._slot(len(outcome.ids))
        candidates, current = self.candidates[slot], self.current[slot]
        if current:
            self.accepted[slot] += self.ema * (float(np.mean(outcome.accepted)) - self.accepted[slot])
        self.count[slot] += 1
        if self.count[slot] <= self.warmup or (self.count[slot] - self.warmup) % self.interval:
            return
        at, seen = candidates.index(current), self.accepted[slot]
        if current == 0:
            self.current[slot] = candidates[min(at + 1, len(candidates) - 1)]
            return
        start = at
        while at and seen <= max(candidates[at - 1] - 0.5, 0.5 if candidates[at - 1] == 0 else -1.0) + self.down:
            at -= 1
        if at == start:
            while at + 1 < len(candidates) and seen > candidates[at] - 0.5 + self.up:
                at += 1
        self.current[slot] = candidates[at]


class Oracle(GoodputController):
    """The controller with the true costs and the true acceptance of every request; possible in simulation only."""

    def __init__(self, cost: CostModel, max_draft_len: int = 8, *, objective: str = "price", prefill: str = "marginal"):
        super().__init__(cost, max_draft_len, objective=objective, prefill=prefill)

    def decide(self, state: BatchState) -> SpecDecision:
        if state.true_acceptance is None:
            raise UserError("the oracle needs the true acceptance, which only the simulator knows")
        return super().decide(replace(state, acceptance=state.true_acceptance))


def recommend_table(
    cost: CostModel, acceptance: float, *, context: int = 512, max_draft_len: int = 8, max_num_seqs: int = 256
) -> list[list[int]]:
    """A static table for stock vLLM: rows [lowest, highest, k] of `num_speculative_tokens_per_batch_size`.

    For each batch size the k of highest goodput at this acceptance and context length (tokens per request).

    Raises UserError when acceptance is not a probability.
    """
    if not 0 <= acceptance <= 1:
        raise UserError(f"acceptance is {acceptance}, expected a probability between 0 and 1")
    controller = GoodputController(cost, max_draft_len, objective="ratio")
    rows: list[list[int]] = []
    for n_seqs in range(1, max_num_seqs + 1):
        state = BatchState(range(n_seqs), np.full(n_seqs, context), acceptance=np.full(n_seqs, acceptance))
        k = controller.decide(state).draft_len
        if rows and rows[-1][2] == k:
            rows[-1][1] = n_seqs
        else:
            rows.append([n_seqs, n_seqs, k])
    return rows
