"""The goodput controller: at every step, how many tokens to draft and how many of them to verify for each request.

The paper (2406.14066, Algorithm 1) maximises goodput, the expected tokens of a step divided by its time,

    G(k) = N(k) / T(k),    N(k) = sum_i l(alpha_i, k).

Two things differ in the default:

- *marginal prefill*: a step that carries prefill is long anyway, which makes drafted tokens look cheap just when the
  machine is full. The prefill's own time is taken out: T'(k) = T(k) - [T(0 with prefill) - T(0 without)].
- *price*: over a long run the best choice in each step is argmax N(k) - rho T'(k), with rho the tokens per millisecond
  that steps have lately brought; the ratio is right only when all steps are alike.

Costs are not planes, so G has more than one peak: every k is tried.

The decision of a step depends on finished steps only, never on a token drawn in it, which keeps sampling lossless.
"""

import math
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tenfold_shared.errors import UserError

from smartspec.acceptance import CEILING, AcceptanceTracker, MatchRatioTracker
from smartspec.cost import CostModel

Row = tuple[int, float, float, float, int]
Table = list[Row]
Ranked = tuple[NDArray[Any], NDArray[Any]]
STANDS = 7
"""Steps for which a decision not to speculate stands: without drafts nothing is learned that could change it."""
PATIENCE = 3.0
"""Usual gaps between two requests after which none is expected any more."""


@dataclass
class BatchState:
    """What is known before a step.

    ids: (requests,) names of the decoding requests. context: (requests,) tokens in their caches.
    caps: (requests,) most drafted tokens worth verifying: what is left to generate minus one, and for prompt lookup the
    length of the match; no limit when not given.
    n_prefill: prefill tokens in the same target pass. free_tokens: cache tokens that drafts may take.
    max_draft_len: a limit on k for this step. weights: (requests,) worth of a token of each request, 1 when not given.
    matches_unknown: prompt lookup decides before matching; the tracked match ratio scales what is expected.
    acceptance: (requests,) alpha_i to use instead of the tracked ones; the simulator's oracle and `explain` set it.
    survival: (requests, max_draft_len) probabilities that the j-th drafted token is kept, not increasing in j; tree drafters
    give the path products of their nodes.
    true_acceptance: (requests,) known in simulation only.
    """

    ids: Sequence[Hashable]
    context: NDArray[Any]
    caps: NDArray[Any] | None = None
    n_prefill: int = 0
    free_tokens: int | None = None
    max_draft_len: int | None = None
    weights: NDArray[Any] | None = None
    matches_unknown: bool = False
    acceptance: NDArray[Any] | None = None
    survival: NDArray[Any] | None = None
    true_acceptance: NDArray[Any] | None = None

    def limits(self, draft_len: int) -> NDArray[Any]:
        """(requests,) verified lengths when every request takes what it can of a draft of `draft_len`."""
        if self.caps is None or not draft_len:
            return np.full(len(self.ids), draft_len, dtype=int)
        return np.minimum(np.maximum(self.caps, 0), draft_len).astype(int, copy=False)


@dataclass
class SpecDecision:
    """draft_len: tokens k to draft. verify_lens: (requests,) how many of them to verify, v_i <= k.

    goodput: expected tokens per ms of prefill-free time. predicted_ms: of the whole step, prefill included.
    reason: "speculate", or why not: "saturated" (even perfect drafts would not pay), "low_acceptance", "prefill",
    "kv_pressure", "capped", "invalid", "guard"; "probe" for a step that only refreshes the estimate.
    stands: steps for which the same requests, without prefill, need not ask again; `GoodputController.repeat` is told of each.
    """

    draft_len: int
    verify_lens: NDArray[Any]
    goodput: float = math.nan
    predicted_ms: float = math.nan
    reason: str = "speculate"
    stands: int = 0


@dataclass
class StepOutcome:
    """What a step brought.

    ids, verified, accepted: (requests,) names, tokens checked and tokens kept by the rule, before stops cut them.
    generated: tokens handed out, after stops. ms: time of the step.
    n_ctx, n_batched, n_prefill, draft_len: the step as `StepSample` has it.
    matched: requests for which prompt lookup found a match, None for other drafters.
    """

    ids: Sequence[Hashable]
    verified: NDArray[Any]
    accepted: NDArray[Any]
    generated: int
    ms: float
    n_ctx: int = 0
    n_batched: int = 0
    n_prefill: int = 0
    draft_len: int = 0
    matched: int | None = None


class Policy(Protocol):
    """What drives an engine, the simulator and vLLM alike."""

    def decide(self, state: BatchState) -> SpecDecision: ...
    def observe(self, outcome: StepOutcome) -> None: ...
    def forget(self, name: Hashable) -> None: ...


class GoodputGuard:
    """Checks by measurement that speculation pays: never worse than off, even when the cost model is wrong.

    While predicted and realised goodput agree within `tolerance` nothing happens. After `patience` steps of disagreement
    speculation pauses for `trial` steps; what both brought in this region of batch sizes is then compared, and the
    better one is kept for `hold` steps.
    """

    def __init__(self, *, tolerance: float = 0.15, patience: int = 200, trial: int = 50, hold: int = 1000) -> None:
        self.tolerance, self.patience, self.trial, self.hold = tolerance, patience, trial, hold
        self.trips = 0
        self._predicted = self._realised = 0.0
        self._apart = 0
        self._pause = 0
        self._holding = False
        self._quiet = 0
        self._rates: dict[tuple[int, bool], tuple[float, float]] = {}

    @property
    def paused(self) -> bool:
        """Speculation is held off."""
        return self._pause > 0

    def observe(self, n_seqs: int, draft_len: int, tokens: float, ms: float, predicted: float) -> None:
        """Take in a finished decode step; `predicted` is the expected tokens per ms."""
        if ms <= 0 or not math.isfinite(ms):
            return
        key = (n_seqs.bit_length(), draft_len > 0)
        old_tokens, old_ms = self._rates.get(key, (0.0, 0.0))
        self._rates[key] = (0.99 * old_tokens + tokens, 0.99 * old_ms + ms)
        if self._pause:
            self._pause -= 1
            if not self._pause and not self._holding:
                self._judge(key[0])
            elif not self._pause:
                self._holding = False
            return
        self._quiet = max(self._quiet - 1, 0)
        if not math.isfinite(predicted) or draft_len == 0:
            return
        self._predicted = 0.98 * self._predicted + predicted * ms
        self._realised = 0.98 * self._realised + tokens
        apart = abs(self._predicted / max(self._realised, 1e-9) - 1) > self.tolerance
        self._apart = self._apart + 1 if apart else 0
        if self._apart >= self.patience and not self._quiet:
            self.trips += 1
            self._apart, self._pause, self._holding = 0, self.trial, False

    def _judge(self, size: int) -> None:
        tokens, ms = self._rates.get((size, True), (0.0, 0.0))
        plain_tokens, plain_ms = self._rates.get((size, False), (0.0, 0.0))
        if ms and plain_ms and plain_tokens / plain_ms > tokens / ms:
            self._pause, self._holding = self.hold, True
        else:
            self._quiet = self.hold


class GoodputController:
    """Chooses k and v_i by predicted goodput.

    cost: times of target and draft. max_draft_len: largest k >= 1.
    objective: "price" (N - rho T', default) or "ratio" (N / T').
    prefill: "marginal" (default, prefill's own time taken out), "included" (as published), "disable" (no speculation in
    steps that carry prefill).
    verify: "uniform" (v_i = k up to the caps) or "ragged" (slots ranked by survival, the best n admitted).
    min_gain: k > 0 must beat k = 0 by this share. interval: steps between decisions.
    probe_every: zero steps after which k = 1 is tried once, 0 for never. candidates: the k to choose from, all when
    not given. stop_early: stop at the first k that is worse than the one before, as published.
    kv_headroom: a draft must fit this many times into the free cache. tracker: acceptance estimate.
    guard: an online check by measurement, or None.

    Raises UserError for max_draft_len < 1, an unknown option, or candidates outside 0..max_draft_len.
    """

    def __init__(
        self,
        cost: CostModel,
        max_draft_len: int = 8,
        *,
        objective: str = "price",
        prefill: str = "marginal",
        verify: str = "uniform",
        min_gain: float = 0.02,
        interval: int = 1,
        probe_every: int = 64,
        candidates: Sequence[int] | None = None,
        stop_early: bool = False,
        window_ms: float = 400.0,
        kv_headroom: float = 1.1,
        tracker: AcceptanceTracker | None = None,
        guard: GoodputGuard | None = None,
        seed: int = 0,
    ) -> None:
        if max_draft_len < 1:
            raise UserError(f"max_draft_len is {max_draft_len}, expected 1 or more", hint="use NoSpeculation for 0")
        for name, value, known in (
            ("objective", objective, ("price", "ratio")),
            ("prefill", prefill, ("marginal", "included", "disable")),
            ("verify", verify, ("uniform", "ragged")),
        ):
            if value not in known:
                raise UserError(f"{name} is '{value}', expected {' or '.join(known)}")
        chosen = sorted({0, *(range(max_draft_len + 1) if candidates is None else candidates)})
        if chosen[0] < 0 or chosen[-1] > max_draft_len or len(chosen) < 2:
            raise UserError(f"candidates are {candidates}, expected lengths from 0 to {max_draft_len}")
        if interval < 1:
            raise UserError(f"interval is {interval}, expected 1 or more")
        self.cost = cost
        self.max_draft_len = max_draft_len
        self.objective = objective
        self.prefill = prefill
        self.verify = verify
        self.min_gain = min_gain
        self.interval = interval
        self.probe_every = probe_every
        self.candidates = chosen
        self.stop_early = stop_early
        self.window_ms = window_ms
        self.kv_headroom = kv_headroom
        self._positions = np.arange(1, max_draft_len + 1)
        self.tracker = tracker or AcceptanceTracker()
        self.matches = MatchRatioTracker()
        self.guard = guard
        self.counters: Counter[str] = Counter()
        """Decisions by reason, and "probe"."""
        self._rng = np.random.default_rng(seed)
        self._tokens = self._ms = 0.0
        self._zeros = 0
        self._why: tuple[int, bool, str] = (0, False, "")
        self._known: frozenset[Hashable] = frozenset()
        self._quiet_ms = 0.0
        self._gap_ms = window_ms / PATIENCE
        self._next_probe = probe_every
        self._age = 0
        self._kept = 0
        # vLLM has two steps in flight; each outcome meets its own prediction.
        self._predictions: deque[tuple[int, float]] = deque(maxlen=4)

    @property
    def rho(self) -> float:
        """Price of time: tokens per predicted ms of prefill-free time lately; 0 before the first step."""
        return self._tokens / self._ms if self._ms > 0 else 0.0

    def decide(self, state: BatchState) -> SpecDecision:
        """Choose k and (requests,) v_i for this step. Never raises on a NaN: it answers k = 0 and counts "invalid"."""
        if not len(state.ids):
            return SpecDecision(0, np.zeros(0, int), reason="capped")
        self._age += 1
        present = frozenset(state.ids)
        if fresh := len(present - self._known):
            self._gap_ms += 0.2 * (min(self._quiet_ms, self.window_ms) / fresh - self._gap_ms)
            self._quiet_ms = 0.0
        self._known = present
        decision = self._decide(state)
        if decision.reason in ("low_acceptance", "saturated") and not state.n_prefill:
            decision.stands = STANDS
        self._count(decision)
        return decision

    def repeat(self, decision: SpecDecision) -> None:
        """A decision that stands was used for one more step."""
        self._age += 1
        self._count(decision)

    def _count(self, decision: SpecDecision) -> None:
        self.counters[decision.reason] += 1
        if decision.draft_len == 0:
            self._zeros += 1
        else:
            self._zeros = 0
        self._predictions.append((decision.draft_len, decision.goodput))

    def _decide(self, state: BatchState) -> SpecDecision:
        options, blocked = self._allowed(state)
        table, ranked = self._evaluate(state, options)
        if not all(math.isfinite(v) for row in table for v in row[1:4]):
            return SpecDecision(0, np.zeros(len(state.ids), int), reason="invalid")
        if blocked:
            return self._made(state, table[0], blocked, ranked)
        if self.interval > 1 and self._age % self.interval != 1 and self._kept in options:
            row = next(r for r in table if r[0] == self._kept)
            return self._made(state, row, "speculate" if self._kept else self._why_not(state), ranked)
        best = self._best(table)
        self._kept = best[0]
        if best[0]:
            return self._made(state, best, "speculate", ranked)
        if self._should_probe(table):
            return self._made(state, next(r for r in table if r[0] > 0), "probe", ranked)
        return self._made(state, best, self._why_not(state), ranked)

    def _allowed(self, state: BatchState) -> tuple[list[int], str]:
        """Candidate lengths for this step, and the reason when only 0 is left."""
        limit = self.max_draft_len if state.max_draft_len is None else min(state.max_draft_len, self.max_draft_len)
        if state.caps is not None:
            limit = min(limit, int(state.caps.max()))
        if state.survival is not None:
            limit = min(limit, np.shape(state.survival)[1])
        if limit <= 0:
            return [0], "capped"
        if self.guard is not None and self.guard.paused:
            return [0], "guard"
        if self.prefill == "disable" and state.n_prefill:
            return [0], "prefill"
        if state.free_tokens is not None:
            # k drafted tokens and the bonus token for each request must fit without preempting anyone.
            limit = min(limit, int(state.free_tokens / (self.kv_headroom * len(state.ids))) - 1)
            if limit <= 0:
                return [0], "kv_pressure"
        return [k for k in self.candidates if k <= limit] or [0], ""

    def _evaluate(self, state: BatchState, options: list[int]) -> tuple[Table, Ranked | None]:
        """For each k: (k, N(k), T'(k), T(k), admitted slots n); with ragged lengths the slots by rank, too."""
        n_seqs, longest = len(state.ids), options[-1]
        n_ctx = float(sum(state.context.tolist()))
        base = float(n_seqs) if state.weights is None else float(np.sum(state.weights))
        share = self.matches.ratio if state.matches_unknown else 1.0
        full = n_seqs + state.n_prefill
        own = 0.0
        if self.prefill != "included" and state.n_prefill:
            own = float(self.cost.target(n_ctx, full, n_seqs)) - float(self.cost.target(n_ctx, n_seqs, n_seqs))
        if self.verify == "ragged":
            return self._evaluate_ragged(state, options, own, n_ctx, base, share)
        gains, slots = self._uniform(state, longest)
        table = []
        for k in options:
            n = slots[k]
            ms = float(self.cost.target(n_ctx, full + share * n, n_seqs)) + self.cost.draft(n_ctx, n_seqs, k)
            table.append((k, base + share * gains[k], ms - own, ms, n))
        self.cost.within_range(n_ctx, full + slots[longest])
        return table, None

    def _uniform(self, state: BatchState, longest: int) -> tuple[list[float], list[int]]:
        """For k = 0..longest: accepted tokens that are expected when all verify k of them, and the slots that takes."""
        n_seqs = len(state.ids)
        if state.survival is not None:
            survival, within = self._survival(state, longest)
            counts = [n_seqs] * longest if within is None else np.add.reduce(within, axis=0, dtype=int).tolist()
            return [0.0, *np.cumsum(survival.sum(axis=0)).tolist()], [0, *accumulate(counts)]
        # Numpy takes longer to get started than these loops take, most of all after a model has emptied the caches.
        alphas = self.tracker.rates(state.ids) if state.acceptance is None else state.acceptance.tolist()
        ratios = self.tracker.ratios(longest) if state.acceptance is None else None
        caps = None if state.caps is None else state.caps.tolist()
        weights = None if state.weights is None else state.weights.tolist()
        kept, counts = [0.0] * (longest + 1), [0] * (longest + 1)
        for i, alpha in enumerate(alphas):
            most = longest if caps is None or caps[i] > longest else caps[i]
            survives = 1.0 if weights is None else weights[i]
            for j in range(1, most + 1):
                survives *= alpha if ratios is None else min(alpha * ratios[j - 1], CEILING)
                kept[j] += survives
            counts[max(most, 0)] += 1
        # Requests that stop at j take a slot at each position up to it.
        at_least = list(accumulate(reversed(counts)))[::-1]
        return list(accumulate(kept)), [0, *accumulate(at_least[1:])]

    def _evaluate_ragged(
        self, state: BatchState, options: list[int], own: float, n_ctx: float, base: float, share: float
    ) -> tuple[Table, Ranked]:
        """Slots (i, j) in the order of survival; for each k the best number n of them."""
        survival, within = self._survival(state, options[-1])
        n_seqs, longest = survival.shape
        real = np.arange(survival.size) if within is None else np.flatnonzero(within)
        worth = survival.ravel()[real]
        # Slots of equal survival may change places: a request verifies as many of its first ones as are admitted.
        order = np.argsort(-worth)
        slots = real[order]
        requests, position = np.divmod(slots, longest) if longest else (slots, slots)
        worth = share * worth[order]
        times = np.atleast_1d(
            self.cost.target(n_ctx, n_seqs + state.n_prefill + share * np.arange(len(worth) + 1), n_seqs)
        )
        table: Table = []
        for k in options:
            chosen = worth if k == longest else worth[position < k]
            tokens = np.empty(len(chosen) + 1)
            tokens[0] = base
            np.add.accumulate(chosen, out=tokens[1:])
            tokens[1:] += base
            net = times[: len(tokens)] + (self.cost.draft(n_ctx, n_seqs, k) - own)
            n = int(self._score(tokens, net).argmax()) if k else 0
            # What is not a number sorts last; it has to be seen.
            last = float(tokens[-1])
            table.append((k, float(tokens[n]) if math.isfinite(last) else last, float(net[n]), float(net[n] + own), n))
        self.cost.within_range(n_ctx, n_seqs + state.n_prefill + len(worth))
        return table, (requests, position)

    @property
    def _by_ratio(self) -> bool:
        # When requests have ceased to come, no other work waits for the time that is saved, so it has no price.
        ceased = self._quiet_ms > min(self.window_ms, PATIENCE * self._gap_ms)
        return self.objective == "ratio" or self.rho <= 0 or ceased

    def _score(self, tokens: Any, ms: Any) -> Any:
        if self._by_ratio:
            return tokens / np.maximum(ms, 1e-9)
        return tokens - self.rho * ms

    def _survival(self, state: BatchState, draft_len: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """(requests, draft_len) weighted survival, 0 beyond the caps; and what is within them, None when all is."""
        position = self._positions[:draft_len]
        if state.survival is not None:
            survival = np.asarray(state.survival, dtype=float)[:, :draft_len]
        elif state.acceptance is None:
            survival = self.tracker.survival(state.ids, draft_len)
        else:
            survival = np.asarray(state.acceptance, dtype=float)[:, None] ** position
        within = None
        if state.caps is not None and int(state.caps.min()) < draft_len:
            within = position <= state.caps[:, None]
            survival = survival * within
        return (survival if state.weights is None else survival * np.asarray(state.weights)[:, None]), within

    def _best(self, table: Table) -> Row:
        ratio, rho = self._by_ratio, self.rho
        zero = best = table[0]
        floor = top = last = zero[1] / max(zero[2], 1e-9) if ratio else zero[1] - rho * zero[2]
        for row in table[1:]:
            score = row[1] / max(row[2], 1e-9) if ratio else row[1] - rho * row[2]
            if score > top:
                top, best = score, row
            if self.stop_early and score < last:
                break
            last = score
        gain = self.min_gain * (floor if ratio else zero[1])
        return best if top > floor + gain else zero

    def _should_probe(self, table: Table) -> bool:
        if not self.probe_every or len(table) < 2 or self._zeros < self._next_probe:
            return False
        zero, one = table[0], table[1]
        # What the probe costs beyond what it brings, as a share of a plain step.
        loss = (one[2] - zero[2]) / zero[2] - (one[1] - zero[1]) / zero[1]
        if loss >= 0.25:
            return False
        self._next_probe = int(self.probe_every * self._rng.uniform(0.75, 1.25))
        return True

    def _why_not(self, state: BatchState) -> str:
        """Would perfect drafts pay? Asked again every 16 steps and when the batch changes; it takes as long as a decision."""
        n_seqs, prefilling = len(state.ids), state.n_prefill > 0
        if self._zeros % 16 and self._why[:2] == (n_seqs, prefilling):
            return self._why[2]
        options, _ = self._allowed(state)
        perfect = BatchState(
            state.ids, state.context, caps=state.caps, n_prefill=state.n_prefill, weights=state.weights,
            acceptance=np.ones(n_seqs),
        )  # fmt: skip
        reason = "low_acceptance" if self._best(self._evaluate(perfect, options)[0])[0] else "saturated"
        self._why = (n_seqs, prefilling, reason)
        return reason

    def _made(self, state: BatchState, row: Row, reason: str, ranked: Ranked | None) -> SpecDecision:
        k, tokens, net, ms, n = row
        if ranked is None or not k or reason == "probe":
            lens = state.limits(k)
        else:
            requests, position = ranked
            lens = np.bincount(requests[position < k][:n], minlength=len(state.ids))
        return SpecDecision(k, lens, tokens / net if net > 0 else math.nan, ms, reason)

    def explain(self, state: BatchState) -> list[dict[str, float]]:
        """Tokens, ms, goodput and score for every allowed k; changes nothing.

        Raises UserError when acceptance or cost is not finite.
        """
        options, _ = self._allowed(state)
        table, _ = self._evaluate(state, options)
        if not all(math.isfinite(v) for row in table for v in row[1:4]):
            raise UserError("acceptance or cost is not a finite number for this state")
        return [
            {
                "k": k,
                "tokens": tokens,
                "ms": ms,
                "ms_without_prefill": net,
                "goodput_per_s": 1000 * tokens / net,
                "score": float(self._score(tokens, net)),
                "verified": n,
            }
            for k, tokens, net, ms, n in table
        ]

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a finished step: acceptance, match ratio, the price of time, the guard."""
        n_seqs = len(outcome.ids)
        predicted = self._predictions.popleft() if self._predictions and n_seqs else (0, math.nan)
        if not n_seqs:
            return
        self.tracker.update(outcome.ids, outcome.verified, outcome.accepted)
        if outcome.matched is not None:
            self.matches.update(outcome.matched, n_seqs)
        if not (math.isfinite(outcome.ms) and outcome.ms > 0):
            self.counters["invalid"] += 1
            return
        # The price is in the cost model's own milliseconds: a model that is off by a factor then still ranks lengths alike.
        n_ctx, n_batched = float(outcome.n_ctx), float(outcome.n_batched)
        whole = float(self.cost.target(n_ctx, n_batched, n_seqs))
        plain = whole
        if outcome.n_prefill:
            plain = float(self.cost.target(n_ctx, n_batched - outcome.n_prefill, n_seqs))
        believed = whole if self.prefill == "included" else plain
        believed += self.cost.draft(n_ctx, n_seqs, outcome.draft_len)
        if math.isfinite(believed) and believed > 0:
            keep = math.exp(-believed / self.window_ms)
            self._tokens = keep * self._tokens + outcome.generated
            self._ms = keep * self._ms + believed
            self._quiet_ms += believed
        if self.guard is not None:
            own = whole - plain
            net = max(outcome.ms - own, 0.05 * outcome.ms) if math.isfinite(own) else outcome.ms
            self.guard.observe(n_seqs, outcome.draft_len, outcome.generated, net, predicted[1])

    def forget(self, name: Hashable) -> None:
        """A request has finished."""
        self.tracker.forget(name)

    @property
    def probes(self) -> int:
        """Steps that only refreshed the estimate."""
        return self.counters["probe"]


def paper_controller(
    cost: CostModel, max_draft_len: int = 8, *, as_released: bool = False, seed: int = 0
) -> GoodputController:
    """The published settings: ratio, prefill counted in, global moving average, search stopped at the first decrease.

    as_released: also what the authors' fork adds: a decision every 20 steps, and speculation must promise 10 % more.
    """
    return GoodputController(
        cost,
        max_draft_len,
        objective="ratio",
        prefill="included",
        verify="uniform",
        min_gain=0.1 if as_released else 0.0,
        interval=20 if as_released else 1,
        probe_every=0,
        stop_early=True,
        tracker=AcceptanceTracker("ema", per_request=False),
        seed=seed,
    )
