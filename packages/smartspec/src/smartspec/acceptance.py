"""How many tokens a speculative step yields, and how likely a drafted token is to be accepted.

If each drafted token is accepted with probability alpha, independently, a draft of length k yields on average

    l(alpha, k) = 1 + alpha + alpha^2 + ... + alpha^k                   (2406.14066, goodput definition)

tokens, the target's own token included. With hazards beta_j = P(j accepted | j - 1 accepted) the powers become products.
A verification stops at its first rejection, so what lies behind it was never tried: only tried positions are counted.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tenfold_shared.errors import UserError

CEILING = 0.9999
"""Largest acceptance that is believed; an estimate of exactly 1 would never look for a rejection."""


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
        self.request_prior = request_prior
        self.request_half_life = request_half_life
        self.ema = ema
        self.ignored = 0
        """Updates left out because they held NaN or impossible counts."""
        self._average = initial
        self._accepted = initial * prior
        self._tried = prior
        self._position_accepted = np.zeros(positions)
        self._position_tried = np.zeros(positions)
        self._requests: dict[Hashable, list[float]] = {}

    @property
    def alpha(self) -> float:
        """The common acceptance probability."""
        return self._average if self.mode == "ema" else self._accepted / self._tried

    def update(self, ids: Sequence[Hashable], verified: ArrayLike, accepted: ArrayLike) -> None:
        """Take in one finished step.

        ids: (requests,) names. verified: (requests,) drafted tokens v_i that the target checked.
        accepted: (requests,) how many of them it kept, 0 <= accepted_i <= v_i.
        """
        v = np.asarray(verified, dtype=float)
        a = np.asarray(accepted, dtype=float)
        if not (np.isfinite(v).all() and np.isfinite(a).all() and (a >= 0).all() and (a <= v).all()):
            self.ignored += 1
            return
        tried = a + (a < v)
        trials = float(tried.sum())
        if not trials:
            return
        hits = float(a.sum())
        if self.mode == "ema":
            self._average += self.ema * (hits / trials - self._average)
            return
        self._accepted, self._tried = self._decay(self._accepted, self._tried, hits, trials)
        if self.mode == "hazard":
            for j in range(min(int(v.max()), len(self._position_tried))):
                at = float((tried > j).sum())
                if at:
                    self._position_accepted[j], self._position_tried[j] = self._decay(
                        float(self._position_accepted[j]), float(self._position_tried[j]), float((a > j).sum()), at
                    )
        if self.per_request:
            for name, hit, attempt in zip(ids, a.tolist(), tried.tolist(), strict=True):
                if attempt:
                    own = self._requests.setdefault(name, [0.0, 0.0])
                    keep = 0.5 ** (attempt / self.request_half_life)
                    own[0] = own[0] * keep + hit
                    own[1] = own[1] * keep + attempt

    def _decay(self, hits: float, trials: float, new_hits: float, new_trials: float) -> tuple[float, float]:
        """Decay by trials; inside one large step the new trials age too, so they weigh their average age."""
        keep = 0.5 ** (new_trials / self.half_life)
        rate = np.log(2) * new_trials / self.half_life
        weight = (1 - keep) / rate
        return hits * keep + new_hits * weight, trials * keep + new_trials * weight

    def acceptance(self, ids: Sequence[Hashable]) -> NDArray[Any]:
        """(requests,) acceptance alpha_i, in [0, CEILING]."""
        alpha = self.alpha
        if not self.per_request or not self._requests:
            return np.full(len(ids), min(alpha, CEILING))
        known, none = self._requests, (0.0, 0.0)
        own = np.array([known.get(name, none) for name in ids], dtype=float).reshape(-1, 2)
        return np.minimum((self.request_prior * alpha + own[:, 0]) / (self.request_prior + own[:, 1]), CEILING)

    def survival(self, ids: Sequence[Hashable], draft_length: int) -> NDArray[Any]:
        """(requests, draft_length) probability S_ij that positions 1..j of request i are all accepted."""
        alpha_i = self.acceptance(ids)
        hazards = np.repeat(alpha_i[:, None], draft_length, axis=1)
        if self.mode == "hazard" and draft_length:
            n = min(draft_length, len(self._position_tried))
            beta = np.full(draft_length, self.alpha)
            weight = 4 * self.request_prior
            beta[:n] = (self._position_accepted[:n] + weight * self.alpha) / (self._position_tried[:n] + weight)
            if draft_length > n:
                beta[n:] = beta[n - 1]
            hazards = np.minimum(hazards * beta / max(self.alpha, 1e-9), CEILING)
        return np.cumprod(hazards, axis=1)

    def forget(self, name: Hashable) -> None:
        """Drop what is known of a finished request."""
        self._requests.pop(name, None)


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
