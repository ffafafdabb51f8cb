"""How long a step takes: T = target(N_ctx, N_bat) + draft(N_ctx, B, k), in milliseconds.

N_ctx is the context tokens of all running requests, N_bat the tokens of the target's forward pass (one per request, the
drafted ones, and prefill), B the requests. The paper (2406.14066, batch execution time) fits one plane

    T_fwd = a N_ctx + g N_bat + d.

A real step is flat while it is bound by reading the weights and linear after that, so the default here is the maximum of
two planes; where captured graphs make it a staircase, a monotone table.
"""

import json
import logging
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tenfold_shared.hub import replace_atomically

from smartspec.errors import ProfileError

SCHEMA = 1
"""Version of the JSON files written by `save` and by `smartspec.profiling`."""
FEWEST = 8
"""Points below which nothing is fitted."""
HUBER = 1.345
"""Standard deviations, as the median tells them, from which on a point weighs less."""
REWEIGHTED = 2
"""Fits with such weights after the first."""
PLANE = ("n_ctx", "n_batched", "n_seqs", "constant")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepSample:
    """One timed forward pass or step.

    n_ctx: context tokens over all requests. n_batched: tokens in the target's forward pass, prefill included.
    n_seqs: running requests. draft_len: drafting steps k. n_prefill: prefill tokens among n_batched. ms: time.
    kind: "target" (one target forward), "draft" (the drafter's whole work for k tokens) or "step" (both together).
    """

    n_ctx: int
    n_batched: int
    n_seqs: int
    draft_len: int = 0
    n_prefill: int = 0
    ms: float = 0.0
    kind: str = "target"


@dataclass(frozen=True)
class DraftCost:
    """Time of drafting k tokens for B requests: k (step + per_seq B + per_ctx N_ctx) + [k > 0] overhead + idle, in ms.

    idle: what a drafter costs even when k = 0, because it must ingest the accepted tokens.
    """

    step: float = 0.0
    per_seq: float = 0.0
    per_ctx: float = 0.0
    overhead: float = 0.0
    idle: float = 0.0

    def __call__(self, n_ctx: float, n_seqs: int, draft_len: int) -> float:
        if draft_len == 0:
            return self.idle
        per_token = self.step + self.per_seq * n_seqs + self.per_ctx * n_ctx
        return draft_len * per_token + self.overhead + self.idle


@dataclass
class CostModel:
    """What every cost model has: a target part, a draft part, the profiled range, and a file format.

    fingerprint: what the profile was taken of (model, draft, device), checked by `load`.
    largest: largest profiled (n_ctx, n_batched); zeros when nothing is known.
    """

    draft_cost: DraftCost = field(default_factory=DraftCost)
    fingerprint: dict[str, str] = field(default_factory=dict)
    largest: tuple[float, float] = (0.0, 0.0)
    kind: ClassVar[str] = ""
    _warned: bool = field(default=False, repr=False, compare=False)

    def target(self, n_ctx: ArrayLike, n_batched: ArrayLike, n_seqs: ArrayLike = 0) -> Any:
        """Milliseconds of the target's forward pass; the arguments broadcast against each other, numbers give a number."""
        raise NotImplementedError

    def draft(self, n_ctx: float, n_seqs: int, draft_len: int) -> float:
        """Milliseconds of drafting `draft_len` tokens for each of `n_seqs` requests."""
        return self.draft_cost(n_ctx, n_seqs, draft_len)

    def step(self, sample: StepSample) -> float:
        """Milliseconds predicted for a sample of any kind."""
        target = 0.0 if sample.kind == "draft" else float(self.target(sample.n_ctx, sample.n_batched, sample.n_seqs))
        draft = 0.0 if sample.kind == "target" else self.draft(sample.n_ctx, sample.n_seqs, sample.draft_len)
        return target + draft

    def error(self, samples: Iterable[StepSample]) -> float:
        """Mean relative error over the samples."""
        return float(np.mean([abs(self.step(s) - s.ms) / s.ms for s in samples]))

    def within_range(self, n_ctx: float, n_batched: float) -> bool:
        """False beyond twice the profiled range, and then warns once: there the last plane is only extended."""
        outside = any(
            limit and asked > 2 * limit for asked, limit in zip((n_ctx, n_batched), self.largest, strict=True)
        )
        if outside and not self._warned:
            self._warned = True
            log.warning(
                "cost asked for %.0f context and %.0f batched tokens, profiled up to %.0f and %.0f: extrapolating",
                n_ctx, n_batched, *self.largest,
            )  # fmt: skip
        return not outside

    def _parameters(self) -> dict[str, Any]:
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the model as JSON, whole or not at all."""
        record = {
            "schema": SCHEMA,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "largest": list(self.largest),
            "draft": asdict(self.draft_cost),
            **self._parameters(),
        }
        with replace_atomically(path) as partial:
            partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path, *, fingerprint: dict[str, str] | None = None) -> "CostModel":
        """Read a model of any kind. Raises ProfileError for a damaged file, another schema, or another fingerprint."""
        record = read_json(path, "a cost model (run `smartspec fit`)")
        try:
            kind = {c.kind: c for c in (LinearCostModel, PiecewiseCostModel, TableCostModel)}[record["kind"]]
            common = {
                "draft_cost": DraftCost(**record["draft"]),
                "fingerprint": record["fingerprint"],
                "largest": tuple(record["largest"]),
            }
            model = kind._read(record, common)
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"{path} is not a cost model ({error!r})", hint="run `smartspec fit` again") from error
        check_fingerprint(model.fingerprint, fingerprint, path)
        return model

    @classmethod
    def _read(cls, record: dict[str, Any], common: dict[str, Any]) -> "CostModel":
        raise NotImplementedError


def check_fingerprint(found: dict[str, str], expected: dict[str, str] | None, path: str | Path) -> None:
    """Raise ProfileError when a file was made from another model or on another machine than expected."""
    for key, value in (expected or {}).items():
        if found.get(key, value) != value:
            raise ProfileError(
                f"{path} was profiled with {key} {found[key]}, this run has {value}", hint="profile this setting"
            )


def read_json(path: str | Path, expected: str) -> dict[str, Any]:
    """A JSON object with this schema. Raises ProfileError otherwise, FileNotFoundError when there is no file."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} is not JSON ({error}), expected {expected}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        given = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ProfileError(f"{path} has schema {given}, expected {SCHEMA}: {expected}")
    return record


@dataclass
class PiecewiseCostModel(CostModel):
    """The maximum of planes over (n_ctx, n_batched, n_seqs); the default.

    planes: (planes, 4) coefficients of n_ctx, n_batched, n_seqs and 1, in ms.
    """

    planes: NDArray[Any] = field(default_factory=lambda: np.zeros((1, 4)))
    kind: ClassVar[str] = "piecewise"
    n_planes: ClassVar[int] = 2

    def target(self, n_ctx: ArrayLike, n_batched: ArrayLike, n_seqs: ArrayLike = 0) -> Any:
        if isinstance(n_batched, int | float):
            # Decisions ask for a few single points, on which numpy would spend most of its time getting started.
            largest = -math.inf
            for a, g, b, d in self.planes.tolist():
                ms = a * n_ctx + g * n_batched + b * n_seqs + d
                if ms != ms:
                    return ms
                if ms > largest:
                    largest = ms
            return largest
        a, g, b, d = (self.planes[:, i].reshape(-1, *[1] * np.ndim(n_batched)) for i in range(4))
        return (a * np.asarray(n_ctx) + g * np.asarray(n_batched) + b * np.asarray(n_seqs) + d).max(axis=0)

    @classmethod
    def fit(cls, samples: Sequence[StepSample], *, fingerprint: dict[str, str] | None = None, rounds: int = 50) -> Self:
        """Fit target and draft to samples by least squares of the relative error, points far off weighing less (Huber).

        Points go to the plane that is larger at them, planes are refitted, until nothing moves or `rounds` are done.
        Negative slopes are refitted at zero. With samples of kind "step" both parts are fitted together.

        Raises ProfileError for fewer than 8 points, points that do not determine the planes, or times not above zero.
        """
        target, draft, extra = _check(samples)
        x = _plane_features(target)
        y = np.array([s.ms for s in target])
        _check_rank(x[:, [0, 1, 3]])
        best: tuple[float, NDArray[Any], NDArray[Any], list[float]] | None = None
        n_batched = x[:, 1]
        starts = [0.5] if cls.n_planes == 1 else [0.25, 0.4, 0.5, 0.6, 0.75, 0.9]
        for share in starts:
            member = (
                (n_batched > np.quantile(n_batched, share)).astype(int) if cls.n_planes > 1 else np.zeros(len(y), int)
            )
            planes, shared, dropped = _alternate(x, extra, y, member, cls.n_planes, rounds)
            predicted = (x @ planes.T).max(axis=1) + extra @ shared
            score = float(np.mean(np.abs(predicted - y) / y))
            if best is None or score < best[0]:
                best = (score, planes, shared, dropped)
        assert best is not None
        _, planes, shared, dropped = best
        for _ in range(REWEIGHTED):
            weight = _huber(((x @ planes.T).max(axis=1) + extra @ shared) / y - 1)
            member = (x @ planes.T).argmax(axis=1)
            planes, shared, dropped = _alternate(x, extra, y, member, cls.n_planes, rounds, weight)
        if dropped:
            # The same words every time, so that a server which refits now and then says it once.
            warnings.warn("a cost slope came out negative and was refitted at zero", stacklevel=2)
        largest = (float(x[:, 0].max()), float(x[:, 1].max()))
        cost = _fit_draft(draft) if draft else DraftCost(*shared.tolist()) if extra.shape[1] else DraftCost()
        return cls(draft_cost=cost, fingerprint=dict(fingerprint or {}), largest=largest, planes=planes)

    def _parameters(self) -> dict[str, Any]:
        return {"columns": list(PLANE), "planes": self.planes.tolist()}

    @classmethod
    def _read(cls, record: dict[str, Any], common: dict[str, Any]) -> "PiecewiseCostModel":
        planes = np.asarray(record["planes"], dtype=float)
        if planes.ndim != 2 or planes.shape[1] != 4 or not np.isfinite(planes).all():
            raise ValueError("planes must be finite rows of 4")
        return cls(planes=planes, **common)


@dataclass
class LinearCostModel(PiecewiseCostModel):
    """The published cost model: one plane."""

    kind: ClassVar[str] = "linear"
    n_planes: ClassVar[int] = 1


@dataclass
class TableCostModel(CostModel):
    """A staircase: the time at each captured batch size, constant up to the next, plus a slope in n_ctx.

    sizes: (s,) increasing n_batched. times: (s,) non-decreasing ms. Beyond the last size the last slope goes on.
    """

    sizes: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    times: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    per_ctx: float = 0.0
    kind: ClassVar[str] = "table"

    def target(self, n_ctx: ArrayLike, n_batched: ArrayLike, n_seqs: ArrayLike = 0) -> Any:
        slope = (self.times[-1] - self.times[0]) / max(self.sizes[-1] - self.sizes[0], 1.0)
        if isinstance(n_batched, int | float):
            at = min(bisect_left(self.sizes, n_batched), len(self.sizes) - 1)
            return float(self.times[at] + slope * max(n_batched - self.sizes[-1], 0) + self.per_ctx * n_ctx)
        n = np.asarray(n_batched, dtype=float)
        step = self.times[np.minimum(np.searchsorted(self.sizes, n), len(self.sizes) - 1)]
        return step + slope * np.maximum(n - self.sizes[-1], 0) + self.per_ctx * np.asarray(n_ctx)

    @classmethod
    def fit(
        cls,
        samples: Sequence[StepSample],
        *,
        sizes: Sequence[int] | None = None,
        fingerprint: dict[str, str] | None = None,
    ) -> Self:
        """Fit a staircase to samples of kind "target" and "draft".

        sizes: the captured batch sizes; the profiled ones when not given. A point belongs to the next size above it.

        Raises ProfileError as `PiecewiseCostModel.fit`, and when only steps were timed as a whole.
        """
        target, draft, extra = _check(samples)
        if extra.shape[1]:
            raise ProfileError("a table needs the target timed alone", hint="profile with kind target and draft")
        x, y = _plane_features(target), np.array([s.ms for s in target])
        _check_rank(x[:, [0, 1, 3]])
        steps = np.asarray(sorted(set(sizes or x[:, 1].astype(int).tolist())), dtype=float)
        bucket = np.minimum(np.searchsorted(steps, x[:, 1]), len(steps) - 1)
        centred = x[:, 0] - _bucket_means(x[:, 0], bucket)[bucket]
        rise = y - _bucket_means(y, bucket)[bucket]
        per_ctx = max(float(centred @ rise / (centred @ centred)), 0.0) if centred.any() else 0.0
        flat = _bucket_means(y - per_ctx * x[:, 0], bucket)
        used = np.unique(bucket)
        return cls(
            draft_cost=_fit_draft(draft) if draft else DraftCost(),
            fingerprint=dict(fingerprint or {}),
            largest=(float(x[:, 0].max()), float(x[:, 1].max())),
            sizes=steps[used],
            times=np.maximum.accumulate(flat[used]),
            per_ctx=per_ctx,
        )

    def _parameters(self) -> dict[str, Any]:
        return {"sizes": self.sizes.tolist(), "times": self.times.tolist(), "per_ctx": self.per_ctx}

    @classmethod
    def _read(cls, record: dict[str, Any], common: dict[str, Any]) -> "TableCostModel":
        sizes, times = np.asarray(record["sizes"], dtype=float), np.asarray(record["times"], dtype=float)
        if not len(sizes) or sizes.shape != times.shape or not np.isfinite(times).all():
            raise ValueError("sizes and times must be finite and of one length")
        return cls(sizes=sizes, times=times, per_ctx=float(record["per_ctx"]), **common)


def presets() -> dict[str, Callable[[], CostModel]]:
    """Published and typical cost models by name, each made anew when called.

    "llama70b-tp4-h100" holds the constants of the authors' fork (Llama-70B, 4 x H100); the other two are the rooflines of
    the simulator's hardware.
    """

    def fork() -> CostModel:
        # The fork charges drafting 4 % and overhead 5 % of the target's base time.
        base = 18.35
        return LinearCostModel(
            planes=np.array([[6.24e-5, 6.40e-2, -3.97e-2, base]]),
            draft_cost=DraftCost(step=0.04 * base, overhead=0.05 * base),
            fingerprint={"preset": "llama70b-tp4-h100"},
        )

    def roofline(weights: float, per_ctx: float, per_token: float, fixed: float, draft: float) -> CostModel:
        planes = np.array([[per_ctx, 0.0, 0.0, weights + fixed], [0.0, per_token, 0.0, fixed]])
        return PiecewiseCostModel(planes=planes, draft_cost=DraftCost(step=draft))

    return {
        "a100-7b-160m": lambda: roofline(8.4, 3.3e-4, 0.072, 1.0, 1.1),
        "h100x4-70b-eagle": lambda: roofline(15.0, 6.2e-5, 0.064, 3.0, 0.85),
        "llama70b-tp4-h100": fork,
    }


def _check(samples: Sequence[StepSample]) -> tuple[list[StepSample], list[StepSample], NDArray[Any]]:
    """Split into target-like and draft samples; third, the draft features (n, 0 or 5) of whole steps."""
    for sample in samples:
        if sample.kind not in ("target", "draft", "step"):
            raise ProfileError(f"a sample is of kind '{sample.kind}', expected target, draft or step")
        values = (sample.n_ctx, sample.n_batched, sample.n_seqs, sample.draft_len, sample.n_prefill, sample.ms)
        if not np.isfinite(values).all() or min(values) < 0 or sample.ms <= 0:
            raise ProfileError(f"a sample holds {asdict(sample)}, expected finite counts and a time above zero")
    target = [s for s in samples if s.kind != "draft"]
    if len(target) < FEWEST:
        raise ProfileError(f"the profile has {len(target)} points of the target, expected {FEWEST} or more")
    whole = np.array([s.kind == "step" for s in target])
    extra = np.zeros((len(target), 0))
    if any(whole & np.array([s.draft_len > 0 for s in target])):
        extra = _draft_features(target)[:, :4] * whole[:, None]
    return target, [s for s in samples if s.kind == "draft"], extra


def _check_rank(x: NDArray[Any]) -> None:
    scaled = x / np.maximum(np.abs(x).max(axis=0), 1e-12)
    if np.linalg.matrix_rank(scaled, tol=1e-6 * len(x)) == x.shape[1]:
        return
    flat = [name for name, column in zip(("n_ctx", "n_batched"), x.T, strict=False) if np.ptp(column) == 0]
    cause = f"{' and '.join(flat)} never varies" if flat else "n_ctx and n_batched vary only together"
    raise ProfileError(
        f"the profile does not determine the cost (rank deficient): {cause}",
        hint="profile several batch sizes, context lengths and draft lengths",
    )


def _plane_features(samples: Sequence[StepSample]) -> NDArray[Any]:
    return np.array([(s.n_ctx, s.n_batched, s.n_seqs, 1.0) for s in samples], dtype=float)


def _draft_features(samples: Sequence[StepSample]) -> NDArray[Any]:
    """(n, 5) columns of DraftCost: step, per_seq, per_ctx, overhead, idle."""
    rows = [(s.draft_len, s.draft_len * s.n_seqs, s.draft_len * s.n_ctx, s.draft_len > 0, 1.0) for s in samples]
    return np.array(rows, dtype=float)


def _huber(residual: NDArray[Any]) -> NDArray[Any]:
    """Weights of points: 1 near the fit, falling with the distance beyond it. A pause of the machine is not a slow step."""
    distance = np.abs(residual)
    limit = HUBER * 1.4826 * float(np.median(distance))
    return np.minimum(1.0, limit / np.maximum(distance, 1e-12)) if limit > 1e-9 else np.ones(len(residual))


def _relative_fit(
    x: NDArray[Any], y: NDArray[Any], dropped: list[float] | None = None, weight: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Least squares of (x w - y) / y with w >= 0; negative ones are dropped and the rest refitted.

    dropped: gets the negative slopes that mattered, more than a fifth of a typical time at the end of the profile.
    """
    active = np.abs(x).max(axis=0) > 0
    w = np.zeros(x.shape[1])
    scale = np.maximum(np.abs(x).max(axis=0), 1e-12)
    root = np.ones(len(y)) if weight is None else np.sqrt(weight)
    for _ in range(x.shape[1] + 1):
        a = (x[:, active] / scale[active]) * (root / y)[:, None]
        w[:] = 0.0
        w[active] = np.linalg.lstsq(a, root, rcond=1e-10)[0] / scale[active]
        negative = active & (w < 0)
        if not negative.any():
            return w
        worst = int(np.argmin(np.where(negative, w * scale / np.median(y), np.inf)))
        if dropped is not None and w[worst] * scale[worst] < -0.2 * np.median(y):
            dropped.append(float(w[worst]))
        active[worst] = False
    return w


def _alternate(
    x: NDArray[Any], extra: NDArray[Any], y: NDArray[Any], member: NDArray[Any], n_planes: int, rounds: int,
    weight: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any], list[float]]:  # fmt: skip
    """Fit planes and reassign points in turn. n_seqs has no slope of its own: n_batched carries it.

    Returns (planes, 4), the draft coefficients, and the negative slopes that the last round refitted at zero.
    """
    use = [0, 1, 3]
    planes = np.zeros((n_planes, 4))
    shared = np.zeros(extra.shape[1])
    dropped: list[float] = []
    for _ in range(rounds):
        dropped = []
        blocks = np.zeros((len(y), 3 * n_planes))
        for p in range(n_planes):
            rows = member == p
            if rows.sum() < 4:
                rows = np.ones(len(y), bool)
            blocks[rows, 3 * p : 3 * p + 3] = x[rows][:, use]
        if extra.shape[1] or n_planes == 1:
            w = _relative_fit(np.hstack([blocks, extra]), y, dropped, weight)
        else:
            w = np.zeros(3 * n_planes)
            for p in range(n_planes):
                rows = np.abs(blocks[:, 3 * p : 3 * p + 3]).max(axis=1) > 0
                w[3 * p : 3 * p + 3] = _relative_fit(
                    x[rows][:, use], y[rows], dropped, None if weight is None else weight[rows]
                )
        planes[:, use] = w[: 3 * n_planes].reshape(n_planes, 3)
        shared = w[3 * n_planes :]
        moved = (x @ planes.T).argmax(axis=1)
        if (moved == member).all():
            break
        member = moved
    return planes, shared, dropped


def _fit_draft(samples: Sequence[StepSample]) -> DraftCost:
    """Fit the drafter's own samples; columns that the profile cannot tell apart are left at zero, the last ones first."""
    x, y = _draft_features(samples), np.array([s.ms for s in samples])
    keep: list[int] = []
    for column in (0, 1, 2, 4, 3):
        tried = x[:, [*keep, column]]
        scaled = tried / np.maximum(np.abs(tried).max(axis=0), 1e-12)
        if np.linalg.matrix_rank(scaled, tol=1e-6 * len(x)) == len(keep) + 1:
            keep.append(column)
    w = np.zeros(5)
    w[keep] = _relative_fit(x[:, keep], y)
    for _ in range(REWEIGHTED):
        w[keep] = _relative_fit(x[:, keep], y, weight=_huber(x @ w / y - 1))
    return DraftCost(*(float(v) for v in w))


def _bucket_means(values: NDArray[Any], bucket: NDArray[Any]) -> NDArray[Any]:
    count = np.bincount(bucket)
    return np.bincount(bucket, weights=values) / np.maximum(count, 1)
