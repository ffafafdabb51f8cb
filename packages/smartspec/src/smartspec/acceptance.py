"""How many tokens a speculative step yields, and how likely a drafted token is to be accepted.

If each drafted token is accepted with probability alpha, independently, a draft of length k yields on average

    l(alpha, k) = 1 + alpha + alpha^2 + ... + alpha^k                   (2406.14066, goodput definition)

tokens, the target's own token included. With hazards beta_j = P(j accepted | j - 1 accepted) the powers become products.
A verification stops at its first rejection, so what lies behind it was never tried: only tried positions are counted.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tenfold_shared.errors import UserError

CEILING = 0.9999
"""Largest acceptance that is believed; an estimate of exactly 1 would never look for a rejection."""
CHANGE = 2.5
"""Standard errors by which recent trials must differ for the common acceptance to have changed."""
SPREAD_KEPT = 0.98
"""What an ended request still counts after the next one, where the spread among requests is estimated."""
SPREAD_EVERY = 16
"""Updates between two looks at the running requests."""
PRIOR_SPREAD = 1000.0
"""Weight of the prior spread: that of about five requests of thirty trials."""


def expected_length(acceptance: float | Sequence[float], draft_length: int) -> float:
    """Average tokens per verification, the target's own token included.

    acceptance: probability in [0, 1] for every position, or one hazard per position (at least draft_length of them).
    draft_length: drafted tokens k >= 0; 0 means no speculation and gives exactly 1.

    Raises UserError when a probability is outside [0, 1] or NaN, or draft_length is negative or beyond the hazards.
    """
    if draft_length < 0:
        raise UserError(f"draft_length is {draft_length}, expected 0 or more")
    hazards = np.asarray(acceptance, dtype=float)
    if hazards.ndim == 0:
        hazards = np.full(draft_length, float(hazards)) if draft_length else hazards.reshape(1)
    if not np.all((hazards >= 0) & (hazards <= 1)):
        raise UserError(f"acceptance is {acceptance}, expected probabilities", hint="pass values between 0 and 1")
    if len(hazards) < draft_length:
        raise UserError(f"{len(hazards)} hazards for a draft of {draft_length}, expected one per position")
    return 1.0 + float(np.cumprod(hazards[:draft_length]).sum())  # the closed form divides by zero at 1


def expected_tree_length(paths: Iterable[Sequence[float]]) -> float:
    """Average tokens of a verified tree: 1 + the sum over its nodes of the product of acceptances root -> node.

    paths: for each node but the root, the conditional acceptances on its path from the root. A chain of length k is
    the paths (a,), (a, a), ... and gives `expected_length(a, k)`.

    Raises UserError when a probability is outside [0, 1] or NaN.
    """
    total = 1.0
    for path in paths:
        values = np.asarray(path, dtype=float)
        if not np.all((values >= 0) & (values <= 1)):
            raise UserError(f"a path holds {list(path)}, expected probabilities between 0 and 1")
        total += float(values.prod())
    return total


class AcceptanceTracker:
    """Running estimate of alpha, of alpha_i per request, and of the hazards beta_j, from finished verifications.

    mode:
        "counts" (default): decayed sums of accepted and tried positions with a half-life in *trials*, so that one
        request and 256 requests smooth alike. Unbiased under censoring.
        "hazard": the same sums per position, shrunk to the common one where they are thin.
        "ema": alpha <- 0.85 alpha + 0.15 observed, once per step, as the authors' fork does.
    per_request: alpha_i = (n0 alpha + accepted_i) / (n0 + tried_i); otherwise every request has the common alpha.
    initial: the estimate before anything is seen, worth `prior` trials (the prior decays like everything else).
    half_life: trials after which an observation counts half; `request_half_life` likewise inside one request.
    memory: the common alpha remembers this many times longer while nothing changes. As soon as the sums of the short
    half-life tell another acceptance, by more than chance, it starts anew from that with the weight of `prior` trials;
    1 for the short half-life alone.
    request_prior: n0 at first. Later n0 is what the spread among requests tells: accepted trials of a request vary by
    1 + (tried - 1) / (n0 + 1) times the variance of independent ones (beta-binomial, method of moments), so requests that
    are alike share one estimate and requests that differ keep their own.

    Raises UserError for an unknown mode or an initial value outside [0, 1].
    """

    def __init__(
        self,
        mode: str = "counts",
        per_request: bool = True,
        *,
        initial: float = 0.7,
        prior: float = 20.0,
        half_life: float = 150.0,
        memory: float = 20.0,
        request_prior: float = 6.0,
        request_half_life: float = 60.0,
        ema: float = 0.15,
        positions: int = 16,
    ) -> None:
        if mode not in ("counts", "hazard", "ema"):
            raise UserError(f"tracker mode is '{mode}', expected counts, hazard or ema")
        if not 0.0 <= initial <= 1.0:
            raise UserError(f"initial acceptance is {initial}, expected a probability between 0 and 1")
        self.mode = mode
        self.per_request = per_request and mode != "ema"
        self.half_life = half_life
        self.memory = memory
        self.prior = prior
        self.request_half_life = request_half_life
        self.ema = ema
        self.ignored = 0
        """Updates left out because they held NaN or impossible counts."""
        self._average = initial
        self._recent = self._common = (initial * prior, prior)
        self._position_accepted = np.zeros(positions)
        self._position_tried = np.zeros(positions)
        self._requests: dict[Hashable, list[float]] = {}
        # Sums over requests of the variance beyond that of independent trials, and of what full correlation would give.
        self._ended = self._spread = (PRIOR_SPREAD / (request_prior + 1), PRIOR_SPREAD)
        self._updates = 0

    @property
    def alpha(self) -> float:
        """The common acceptance probability."""
        return self._average if self.mode == "ema" else self._common[0] / self._common[1]

    @property
    def request_prior(self) -> float:
        """n0: how many trials of its own outweigh half of what all requests together tell of one."""
        excess, most = self._spread
        return min(max(most / max(excess, 1e-9) - 1, 2.0), 500.0)

    def update(self, ids: Sequence[Hashable], verified: ArrayLike, accepted: ArrayLike) -> None:
        """Take in one finished step.

        ids: (requests,) names. verified: (requests,) drafted tokens v_i that the target checked.
        accepted: (requests,) how many of them it kept, 0 <= accepted_i <= v_i.
        """
        v: list[float] = np.asarray(verified).tolist()
        a: list[float] = np.asarray(accepted).tolist()
        if not all(0 <= hit <= length < math.inf for hit, length in zip(a, v, strict=True)):
            self.ignored += 1
            return
        tried = [hit + (hit < length) for hit, length in zip(a, v, strict=True)]
        hits, trials = float(sum(a)), float(sum(tried))
        if not trials:
            return
        if self.mode == "ema":
            self._average += self.ema * (hits / trials - self._average)
            return
        self._recent = _decayed(*self._recent, hits, trials, self.half_life)
        self._common = _decayed(*self._common, hits, trials, self.half_life * self.memory)
        if self.memory > 1:
            self._notice()
        if self.mode == "hazard":
            for j in range(min(int(max(v)), len(self._position_tried))):
                at = float(sum(t > j for t in tried))
                if at:
                    kept = float(sum(hit > j for hit in a))
                    before = float(self._position_accepted[j]), float(self._position_tried[j])
                    self._position_accepted[j], self._position_tried[j] = _decayed(*before, kept, at, self.half_life)
        if self.per_request:
            for name, hit, attempt in zip(ids, a, tried, strict=True):
                if attempt:
                    own = self._requests.setdefault(name, [0.0, 0.0, 0.0, 0.0])
                    keep = 0.5 ** (attempt / self.request_half_life)
                    own[0] = own[0] * keep + hit
                    own[1] = own[1] * keep + attempt
                    own[2] += hit
                    own[3] += attempt
            self._updates += 1
            if self._updates % SPREAD_EVERY == 0:
                self._compare()

    def _notice(self) -> None:
        """Start the long memory anew when the recent trials differ from it by more than chance."""
        recent, common = self._recent[0] / self._recent[1], self.alpha
        # A decayed sum of n trials varies as the mean of 2 n equally weighted ones.
        variance = max(common * (1 - common), 0.02) / (2 * self._recent[1])
        if (recent - common) ** 2 > CHANGE**2 * variance:
            # Most of the recent trials may be older than the change: what comes next weighs more.
            self._common = self._recent = (recent * self.prior, self.prior)

    def rates(self, ids: Sequence[Hashable]) -> list[float]:
        """Acceptance alpha_i of these requests, in [0, CEILING]."""
        alpha = self.alpha
        if not self.per_request or not self._requests:
            return [min(alpha, CEILING)] * len(ids)
        n0, known = self.request_prior, self._requests
        common = min(alpha, CEILING)
        rates = []
        for name in ids:
            own = known.get(name)
            rates.append(common if own is None else min((n0 * alpha + own[0]) / (n0 + own[1]), CEILING))
        return rates

    def acceptance(self, ids: Sequence[Hashable]) -> NDArray[Any]:
        """(requests,) acceptance alpha_i, in [0, CEILING]."""
        return np.array(self.rates(ids), dtype=float)

    def ratios(self, draft_length: int) -> list[float] | None:
        """beta_j / alpha for positions 1..draft_length; None where all positions are alike."""
        if self.mode != "hazard":
            return None
        n = min(draft_length, len(self._position_tried))
        alpha, weight = self.alpha, 4 * self.request_prior
        beta = (self._position_accepted[:n] + weight * alpha) / (self._position_tried[:n] + weight)
        known: list[float] = (beta / max(alpha, 1e-9)).tolist()
        return known + known[-1:] * (draft_length - n)

    def survival(self, ids: Sequence[Hashable], draft_length: int) -> NDArray[Any]:
        """(requests, draft_length) probability S_ij that positions 1..j of request i are all accepted."""
        hazards = np.repeat(self.acceptance(ids)[:, None], draft_length, axis=1)
        ratios = self.ratios(draft_length)
        if ratios is not None:
            hazards = np.minimum(hazards * np.array(ratios), CEILING)
        return np.cumprod(hazards, axis=1)

    def _compare(self) -> None:
        """Take the running requests into the spread; a few of them are too near to the mean of them all."""
        excess, most = self._ended
        if len(self._requests) >= 4:
            for own in self._requests.values():
                more, full = self._deviation(own)
                excess, most = excess + more, most + full
        self._spread = excess, most

    def _deviation(self, own: Sequence[float]) -> tuple[float, float]:
        alpha, (_, _, hit, tried) = self.alpha, own
        variance = alpha * (1 - alpha)
        return (hit - alpha * tried) ** 2 - tried * variance, tried * (tried - 1) * variance

    def forget(self, name: Hashable) -> None:
        """A request has finished: what it tells of the spread among requests stays."""
        own = self._requests.pop(name, None)
        if own is not None and own[3]:
            excess, most = self._deviation(own)
            self._ended = SPREAD_KEPT * self._ended[0] + excess, SPREAD_KEPT * self._ended[1] + most


def _decayed(hits: float, trials: float, new_hits: float, new_trials: float, half_life: float) -> tuple[float, float]:
    """Decay by trials; inside one large step the new trials age too, so they weigh their average age."""
    keep = 0.5 ** (new_trials / half_life)
    weight = (1 - keep) / (math.log(2) * new_trials / half_life)
    return hits * keep + new_hits * weight, trials * keep + new_trials * weight


class MatchRatioTracker:
    """Which share of the requests finds an n-gram match, for prompt lookup when k is chosen before matching.

    ratio <- 0.85 ratio + 0.15 observed, starting at 0.5.
    """

    def __init__(self, *, initial: float = 0.5, ema: float = 0.15) -> None:
        self.ratio = initial
        self.ema = ema

    def update(self, matched: int, total: int) -> None:
        """matched of total requests had a match in this step."""
        if total > 0:
            self.ratio += self.ema * (matched / total - self.ratio)


class TreeTracker:
    """Running estimate of beta[j][r], "the guess of rank r is the one taken at level j", for tree-style drafters.

    levels, ranks: size of the largest tree. initial: acceptance of the first rank before anything is seen; each further
    rank starts at `fall` times the one before.
    """

    def __init__(
        self,
        levels: int,
        ranks: int,
        *,
        initial: float = 0.6,
        fall: float = 0.3,
        prior: float = 10.0,
        half_life: float = 300.0,
    ) -> None:
        start = initial * fall ** np.arange(ranks)
        self._taken = prior * np.tile(start, (levels, 1))
        self._tried = np.full((levels, ranks), prior)
        self.half_life = half_life

    @property
    def acceptance(self) -> NDArray[Any]:
        """(levels, ranks) probabilities, each row summing to at most CEILING."""
        beta = self._taken / self._tried
        return beta * np.minimum(CEILING / np.maximum(beta.sum(axis=1, keepdims=True), 1e-9), 1.0)

    def update(self, level: int, offered: Sequence[int], taken: int | None) -> None:
        """At a visited node of `level` (0 for the root) the ranks `offered` were tried; `taken` is the rank that was kept."""
        ranks = list(offered)
        if not ranks:
            return
        keep = 0.5 ** (1 / self.half_life)
        self._taken[level, ranks] *= keep
        self._tried[level, ranks] = self._tried[level, ranks] * keep + 1
        if taken is not None:
            self._taken[level, taken] += 1
