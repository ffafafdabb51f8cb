"""Which switch step draws both concepts.

The later the switch, the more of the first concept and the less of the second. The paper bisects on which of the two
scores is higher; scores are noisy, and where the two cross need not be where most images show both. A strategy here asks
for probes and returns the one it chooses; whoever calls it counts what the probes cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold_shared.errors import UserError

STRATEGIES = ("binary", "golden", "sweep", "successive_halving")
POLICIES = ("robust", "paper")


@dataclass(frozen=True)
class Probe:
    """What one switch step gave."""

    k: int
    a: float
    """S(M, A): how much the images show the first concept."""
    b: float
    joint: float
    """Mean over the images of the smaller of their two scores: whether both are in the *same* image."""
    latent: float | None = None
    """Share of images that show the hidden concept more than the first one, where it is known."""
    stage2: str = "full"
    images: int = 0
    calls: int = 0
    """Denoiser evaluations that this probe added; 0 for one that was asked for again."""
    seconds: float = 0.0

    @property
    def d(self) -> float:
        """D = S(M, A) - S(M, B)."""
        return self.a - self.b

    def row(self) -> dict[str, Any]:
        """For tables."""
        return {
            "stage2": self.stage2, "k": self.k, "sA": self.a, "sB": self.b, "D": self.d, "joint": self.joint,
            "latent": self.latent, "images": self.images, "calls": self.calls, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """When a switch step is good enough, and how far the search goes. The defaults are the official settings.

    start, end: the range of switch steps as shares of all steps; second_end: its end when the second stage draws the second
    concept alone, which needs more of the first. tau: what both scores must exceed. delta: |D| below which
    the scores are taken to be balanced. floor: what both must reach at the least before balance counts (policy "robust").
    momentum, patience: the official loop's. max_probes: switch steps tried at most (policy "robust").
    """

    start: float = 0.025
    end: float = 0.475
    second_end: float = 0.975
    tau: float = 0.72
    delta: float = 0.01
    floor: float = 0.65
    momentum: int = 1
    patience: int = 2
    max_probes: int = 8

    def __post_init__(self) -> None:
        for end in (self.end, self.second_end):
            if not 0 <= self.start <= end <= 1:
                raise UserError(f"the search goes from {self.start:g} to {end:g}, expected 0 <= start <= end <= 1")
        if self.delta < 0 or self.momentum < 0 or self.patience < 1 or self.max_probes < 1:
            raise UserError("delta and momentum must be 0 or more, patience and max_probes 1 or more")

    def bounds(self, total: int) -> tuple[int, int, int]:
        """Lowest, highest and first switch step of a run of `total` steps."""
        return _ceil(total * self.start), _ceil(total * self.end), _ceil(total * (self.start + self.end) / 2)


Evaluate = Callable[..., Probe]
"""`evaluate(k)`, or `evaluate(k, rounds=r)` for the first r groups of images; answers a repeated question from memory."""


def best(probes: Sequence[Probe], policy: str = "robust") -> Probe:
    """The probe to keep. "robust": the most images with both; "paper": the largest min(sA, sB). The first of equals."""
    return max(probes, key=lambda p: p.joint if policy == "robust" else min(p.a, p.b))


def paper(evaluate: Evaluate, total: int, rules: Rules) -> Probe:
    """The published search, step by step: bisection with momentum over k (official code, second version).

    It accepts balanced scores even when both are low, and it can ask for the same k again.
    """
    low, high, k = rules.bounds(total)
    bottom, top = low, high
    direction, momentum, used = 0, rules.momentum, 0
    probes: dict[int, Probe] = {}
    while True:
        probe = probes[k] = evaluate(k)
        if (probe.a > rules.tau and probe.b > rules.tau) or abs(probe.d) < rules.delta:
            return probe
        if probe.a > probe.b:
            high, following = k, -1
        else:
            low, following = k, 1
        if high - low <= 1:
            return min(probes.values(), key=lambda p: max(rules.tau - p.a, rules.tau - p.b))
        k = _ceil((low + high) / 2) + direction * momentum
        if direction != 0 and momentum > 0:
            used += 1
            if used == rules.patience:
                used, momentum = 0, momentum - 1
        k = min(max(k, bottom), top)
        direction = following


def binary(evaluate: Evaluate, total: int, rules: Rules) -> Probe:
    """From the middle of the range climb in strides of a sixth of it until the joint score falls on both sides, starting
    where bisection would go (too much of the first concept: earlier); then follow parabolas to the top between.

    Stops early at a k whose scores are both above tau, or balanced and both above the floor. Takes `max_probes` at most,
    never one twice.
    """
    bottom, top, middle = rules.bounds(total)
    probes: dict[int, Probe] = {}
    k: int | None = middle
    while k is not None and len(probes) < rules.max_probes:
        probe = probes[k] = evaluate(k)
        if _accepted(probe, rules):
            return probe
        k = _next(probes, bottom, top)
    return best(list(probes.values()))


def _next(probes: dict[int, Probe], bottom: int, top: int) -> int | None:
    """The k that `binary` asks for after `probes`; None when it has found the top."""
    centre = best(list(probes.values()))
    stride = max(1, round((top - bottom) / 6))
    left = max((k for k in probes if k < centre.k), default=None)
    right = min((k for k in probes if k > centre.k), default=None)
    down = max(bottom, centre.k - stride) if left is None and centre.k > bottom else None
    up = min(top, centre.k + stride) if right is None and centre.k < top else None
    for k in (down, up) if centre.a > centre.b else (up, down):
        if k is not None:
            return k
    if left is not None and right is not None:
        k = _vertex(probes[left], centre, probes[right])
    else:  # the best is at an end of the range, or all there is
        near = right if left is None else left
        k = centre.k if near is None else round((centre.k + near) / 2)
    return None if k in probes else k


def _vertex(left: Probe, centre: Probe, right: Probe) -> int:
    """Where the parabola through three joint scores is highest; `centre` is the best of them."""
    before, after = centre.k - left.k, right.k - centre.k
    rise, fall = after * (centre.joint - left.joint), before * (centre.joint - right.joint)
    return centre.k + round((after * rise - before * fall) / (rise + fall) / 2) if rise + fall > 0 else centre.k


def golden(evaluate: Evaluate, total: int, rules: Rules) -> Probe:
    """Golden-section search on the joint score, over whole steps."""
    low, high, _ = rules.bounds(total)
    probes: dict[int, Probe] = {}

    def at(k: int) -> Probe:
        if k not in probes:
            probes[k] = evaluate(k)
        return probes[k]

    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 2 and len(probes) < rules.max_probes:
        inner = round((high - low) * (1 - ratio))
        left, right = low + inner, max(high - inner, low + inner + 1)
        if at(left).joint >= at(right).joint:
            high = right
        else:
            low = left
    for k in range(low, high + 1):
        if len(probes) < rules.max_probes:
            at(k)
    return best(list(probes.values()))


def sweep(evaluate: Evaluate, total: int, rules: Rules, policy: str = "robust") -> Probe:
    """Every k of the range: the reference for the others."""
    low, high, _ = rules.bounds(total)
    return best([evaluate(k) for k in range(low, high + 1)], policy)


def successive_halving(evaluate: Evaluate, total: int, rules: Rules, rounds: int = 1) -> Probe:
    """Every k on the first group of images; then the better half on twice as many, `rounds` times in all."""
    low, high, _ = rules.bounds(total)
    left = list(range(low, high + 1))
    for r in range(1, rounds + 1):
        probes = sorted((evaluate(k, rounds=r) for k in left), key=lambda p: -p.joint)
        if r < rounds:
            left = sorted(p.k for p in probes[: _ceil(len(left) / 2)])
    return probes[0]


def run(strategy: str, policy: str, evaluate: Evaluate, total: int, rules: Rules, rounds: int = 1) -> Probe:
    """The named strategy. Policy "paper" makes "binary" the published loop.

    Raises UserError when there is no such strategy or policy.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"search is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if policy not in POLICIES:
        raise UserError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if strategy == "sweep":
        return sweep(evaluate, total, rules, policy)
    if strategy == "successive_halving":
        return successive_halving(evaluate, total, rules, rounds)
    if strategy == "golden":
        return golden(evaluate, total, rules)
    return paper(evaluate, total, rules) if policy == "paper" else binary(evaluate, total, rules)


def calls_bounds(strategy: str, policy: str, total: int, rules: Rules, images: Sequence[int]) -> tuple[int, int]:
    """Least and most denoiser calls of a search. images: the number in each round (one round but for halving).

    The first stage is run once as far as the last switch step, the second from every probed one. Equal for "sweep".
    """
    low, high, _ = rules.bounds(total)
    everything = list(range(low, high + 1))
    if strategy == "sweep":
        exact = sum(images) * (high + sum(total - k for k in everything))
        return exact, exact
    if strategy == "successive_halving":
        least = most = 0
        left = len(everything)
        for n in images:
            early, late = everything[:left], everything[-left:]
            least += n * (early[-1] + sum(total - k for k in late))
            most += n * (late[-1] + sum(total - k for k in early))
            left = _ceil(left / 2)
        return least, most
    # The published loop may ask again for a k it knows, which costs nothing; every k is new at the most.
    probes = len(everything) if policy == "paper" and strategy == "binary" else min(rules.max_probes, len(everything))
    n = sum(images)
    stops_at_once = strategy == "binary"
    least = n * total if stops_at_once else n * sum(total - k for k in everything[-min(2, probes):])  # fmt: skip
    return least, n * (high + sum(total - k for k in everything[:probes]))


def _accepted(probe: Probe, rules: Rules) -> bool:
    both = min(probe.a, probe.b)
    return both > rules.tau or (abs(probe.d) < rules.delta and both >= rules.floor)


def _ceil(value: float) -> int:
    # 0.475 * 40 is a hair above 19 in floating point.
    return math.ceil(round(value, 9))
