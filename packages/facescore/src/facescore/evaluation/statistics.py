"""Agreement of scores with preferences.

Pairwise accuracy counts a tie one half. Intervals are Wilson's for one share and the paired bootstrap's for a difference.
"""

import math
from collections.abc import Sequence

import numpy as np
from tenfold_shared.errors import UserError

Array = np.ndarray


def correct(win: Sequence[float] | Array, lose: Sequence[float] | Array) -> Array:
    """Per pair 1 where the winner scores higher, 0 where it does not, 1/2 for a tie. Raises UserError on NaN."""
    a, b = np.asarray(win, dtype=float), np.asarray(lose, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UserError(f"scores of shapes {a.shape} and {b.shape}, expected two equal non-empty rows")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("a score is NaN or infinite")
    return (a > b) + 0.5 * (a == b)


def wilson(successes: float, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); `successes` may hold halves."""
    if n < 1:
        raise UserError("an interval needs at least one pair")
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def paired_bootstrap(first: Array, second: Array, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of first - second over pairs and its 95 % interval, resampling pairs."""
    d = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(d), (draws, len(d)))
    low, high = np.quantile(d[picks].mean(1), [0.025, 0.975])
    return float(d.mean()), float(low), float(high)


def rank_correlations(scores: Sequence[float], ranks: Sequence[float]) -> tuple[float, float]:
    """Kendall's tau-b and Spearman's rho between scores and human ranks (1 the best), so that +1 is full agreement.

    Both are 0 when either side has no order at all.
    """
    from scipy.stats import kendalltau, spearmanr

    if len(set(scores)) < 2 or len(set(ranks)) < 2:
        return 0.0, 0.0
    order = [-r for r in ranks]
    return float(kendalltau(scores, order).statistic), float(spearmanr(scores, order).statistic)


def bradley_terry(wins: Array, *, iterations: int = 10000, tolerance: float = 1e-10) -> Array:
    """Log strengths (k,), mean 0, from wins[i, j] = how often i beat j, with P(i beats j) = sigma(s_i - s_j).

    By Hunter's minorise-maximise iteration. Raises UserError when some model never met another or never won or lost, since
    then no finite strength is the most likely.
    """
    wins = np.asarray(wins, dtype=float)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or (wins < 0).any():
        raise UserError(f"wins of shape {wins.shape}, expected a square table of counts")
    wins = wins - np.diag(np.diag(wins))
    if not _connected(wins > 0):
        raise UserError("the strengths are not determined: some models never lost, or never met the others")
    games, strength = wins + wins.T, np.ones(len(wins))
    for _ in range(iterations):
        new = wins.sum(1) / (games / (strength[:, None] + strength[None])).sum(1)
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / strength)).max() < tolerance:
            strength = new
            break
        strength = new
    return np.log(strength)


def _connected(beats: Array) -> bool:
    """Every model can be reached from every other along wins."""
    reach = beats | np.eye(len(beats), dtype=bool)
    for _ in range(len(beats)):
        reach = reach | ((reach.astype(int) @ reach.astype(int)) > 0)
    return bool(reach.all())


def roc_auc(good: Sequence[float] | Array, bad: Sequence[float] | Array) -> float:
    """Chance that a good one scores above a bad one, ties one half: the area under the ROC curve."""
    from scipy.stats import rankdata

    g, b = np.asarray(good, dtype=float), np.asarray(bad, dtype=float)
    if not g.size or not b.size:
        raise UserError("the area under the curve needs at least one good and one bad score")
    ranks = rankdata(np.concatenate([g, b]))
    return float((ranks[: g.size].sum() - g.size * (g.size + 1) / 2) / (g.size * b.size))
