"""Features of several encoders: the table they are kept in, and the unit vectors that the kernels see.

Each encoder i gives one vector per image, u_i in R^{d_i}. Before a kernel sees it, it is scaled to unit length, the
mean of
the *training* vectors is subtracted, and it is scaled to unit length again. Network features lie in a narrow cone, so
without the second step all cosines would be near one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor

from gp_ensemble.errors import CacheError, EncoderMismatchError, FeatureError

Features = dict[str, Tensor]
"""Encoder name to unit vectors (n, d_i)."""


@dataclass
class FeatureTable(Mapping[str, np.ndarray]):
    """Features of n images under several encoders, with what is known of the images.

    A mapping from encoder to array (n, d_i), and an indexable of n rows, so that scikit-learn's splitters can cut it:
    `table["clip"]` is an array, `table[rows]` a table.
    """

    features: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    """(n,) class names or numbers."""
    paths: list[str] = field(default_factory=list)
    prior_logits: np.ndarray | None = None
    """(n, C) zero-shot logits, columns in the order of `class_names`."""
    class_names: list[str] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)
    """Encoder to the digest of what made its features (model, weights, transform)."""

    def __post_init__(self) -> None:
        rows = {name: len(array) for name, array in self.features.items()}
        rows |= {} if self.labels is None else {"labels": len(self.labels)}
        rows |= {"paths": len(self.paths)} if self.paths else {}
        rows |= {} if self.prior_logits is None else {"prior_logits": len(self.prior_logits)}
        if len(set(rows.values())) > 1:
            raise UserError(f"a feature table with different numbers of rows: {rows}")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.features[key]
        if isinstance(key, tuple):  # scikit-learn asks for [rows, ...]
            key = key[0]
        rows = np.arange(len(self))[key]
        if rows.ndim == 0:
            rows = rows[None]
        return FeatureTable(
            {name: array[rows] for name, array in self.features.items()},
            None if self.labels is None else self.labels[rows],
            [self.paths[i] for i in rows] if self.paths else [],
            None if self.prior_logits is None else self.prior_logits[rows],
            self.class_names,
            self.fingerprint,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.features)

    def __len__(self) -> int:
        """Rows, not encoders: what scikit-learn takes for the number of samples."""
        return next((len(array) for array in self.features.values()), 0)

    def __contains__(self, name: object) -> bool:
        return name in self.features

    def keys(self) -> Any:
        return self.features.keys()

    def items(self) -> Any:
        return self.features.items()

    def values(self) -> Any:
        return self.features.values()

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, sum of the dimensions)."""
        return len(self), sum(array.shape[1] for array in self.features.values())

    def concatenated(self) -> np.ndarray:
        """(n, sum of d_i): every encoder's unit vectors side by side."""
        return np.concatenate([unit_rows(array) for array in self.features.values()], axis=1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {f"features/{name}": np.ascontiguousarray(array) for name, array in self.features.items()}
        if self.prior_logits is not None:
            tensors["prior_logits"] = np.ascontiguousarray(self.prior_logits)
        record = {
            "format": "gp-ensemble feature table 1",
            "encoders": json.dumps(list(self.features)),
            "labels": json.dumps(None if self.labels is None else np.asarray(self.labels).tolist()),
            "paths": json.dumps(self.paths),
            "class_names": json.dumps(self.class_names),
            "fingerprint": json.dumps(self.fingerprint),
        }
        with replace_atomically(path) as partial:
            save_file(tensors, partial, record)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureTable":
        """Read what `save` wrote. Raises CacheError naming the file when it is damaged or something else."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if path.is_dir():
            path = path / "features.safetensors"
        if not path.is_file():
            raise CacheError(f"feature file '{path}' does not exist", hint="make one with gp-ensemble extract")
        try:
            with safe_open(path, framework="np") as file:
                record = file.metadata() or {}
                names = json.loads(record["encoders"])
                labels = json.loads(record["labels"])
                return cls(
                    {name: file.get_tensor(f"features/{name}") for name in names},
                    None if labels is None else np.asarray(labels),
                    json.loads(record["paths"]),
                    file.get_tensor("prior_logits") if "prior_logits" in file.keys() else None,  # noqa: SIM118
                    json.loads(record["class_names"]),
                    json.loads(record["fingerprint"]),
                )
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise CacheError(
                f"feature file '{path}' is damaged ({error})", hint="extract the features again"
            ) from error


def unit_rows(array: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length; a zero row stays zero."""
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    return array / np.where(norms > 0, norms, 1.0)


class Normaliser:
    """Unit vectors, centred with the mean of the training set (2404.00312 leaves the normalisation open; this is ours).

    means: encoder to the training mean (d_i,), or None where it is not centred: one training image only, all its images
        alike, or `center=False`.
    dims: encoder to d_i.
    """

    def __init__(self, means: dict[str, Tensor | None], dims: dict[str, int]):
        self.means = means
        self.dims = dims

    @classmethod
    def fit(
        cls, raw: Mapping[str, Any], center: bool = True, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple["Normaliser", Features]:
        """The normaliser of the training features, and those features normalised.

        raw: encoder to (n, d_i) array or tensor. Raises FeatureError on NaN, infinite or zero rows and when the
        numbers of rows differ.
        """
        units = {name: _unit(name, _tensor(array, dtype, device)) for name, array in raw.items()}
        rows = {name: len(unit) for name, unit in units.items()}
        if len(set(rows.values())) != 1:
            raise FeatureError(
                f"encoders with different numbers of rows: {rows}", hint="give one row per image to each"
            )
        means: dict[str, Tensor | None] = {}
        for name, unit in units.items():
            mean = unit.mean(0)
            # A centred row may vanish (one image, or equal images); then centring would throw the feature away.
            useful = center and len(unit) > 1 and bool(((unit - mean).norm(dim=1) > 1e-6).all())
            means[name] = mean if useful else None
        result = cls(means, {name: unit.shape[1] for name, unit in units.items()})
        return result, {name: result._center(name, unit) for name, unit in units.items()}

    def __call__(self, raw: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Features:
        """Normalise other images' features with the training means. Raises EncoderMismatchError and FeatureError."""
        given = {name: int(np.shape(array)[-1]) for name, array in raw.items()}
        if given != self.dims:
            raise EncoderMismatchError(
                f"features of {_sizes(given)}, fitted with {_sizes(self.dims)}",
                hint=f"missing: {_names(self.dims, given)}; extra: {_names(given, self.dims)}; "
                "give the same encoders with the same dimensions",
            )
        units = {name: self._center(name, _unit(name, _tensor(raw[name], dtype, device))) for name in self.dims}
        rows = {name: len(unit) for name, unit in units.items()}
        if len(set(rows.values())) != 1:
            raise FeatureError(
                f"encoders with different numbers of rows: {rows}", hint="give one row per image to each"
            )
        return units

    def _center(self, name: str, unit: Tensor) -> Tensor:
        mean = self.means[name]
        if mean is None:
            return unit
        unit -= mean.to(unit)
        return unit.div_(unit.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(unit.dtype).tiny))

    def uncentred(self, name: str, centred: Tensor) -> Tensor:
        """The unit vectors before centring: x = mean + t u with |x| = 1 has one positive root t, as |mean| < 1."""
        mean = self.means[name]
        if mean is None:
            return centred
        mean = mean.to(centred)
        along = centred @ mean
        t = -along + (along**2 + 1 - mean @ mean).sqrt()
        return mean + t[:, None] * centred


def _tensor(array: Any, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().to(device=device, dtype=dtype, copy=True)
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device=device)


def _unit(name: str, rows: Tensor) -> Tensor:
    if rows.ndim != 2 or 0 in rows.shape:
        raise FeatureError(f"features of '{name}' have shape {tuple(rows.shape)}, expected (images, dimensions)")
    norms = rows.norm(dim=1)
    if not torch.isfinite(norms).all():
        # The norm of finite float32 values may overflow; only the values themselves are to blame.
        bad = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
        if bad:
            raise FeatureError(
                f"features of '{name}' hold NaN or infinity (inf) in row {bad[0]} ({len(bad)} rows in all)"
            )
        rows = rows / rows.abs().amax(1, keepdim=True)
        norms = rows.norm(dim=1)
    if not (norms > 0).all():
        bad = (norms == 0).nonzero().flatten().tolist()
        raise FeatureError(
            f"features of '{name}' are all zero in row {bad[0]} ({len(bad)} rows in all)",
            hint="a zero vector has no direction; drop the row or the encoder",
        )
    return rows.div_(norms[:, None])


def _sizes(dims: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({d})" for name, d in dims.items()) or "no encoder"


def _names(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    return ", ".join(name for name in ours if name not in theirs) or "none"


def few_shot_indices(y: Sequence[Any] | np.ndarray, shots: int, *, seed: int = 0) -> np.ndarray:
    """Indices of `shots` images per class, drawn without replacement, sorted.

    y: (n,) labels. Warns when a class has fewer images and takes them all. Raises UserError when shots is under 1.
    """
    import warnings

    if shots < 1:
        raise UserError(f"shots is {shots}, expected 1 or more")
    rng = np.random.default_rng(seed)
    y = np.asarray(y)
    chosen: list[int] = []
    few = []
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        if len(rows) < shots:
            few.append(f"{label} ({len(rows)})")
        chosen.extend(rows[:shots].tolist())
    if few:
        warnings.warn(f"fewer than {shots} images in class {', '.join(few)}; all of them are taken", stacklevel=2)
    return np.sort(np.asarray(chosen))
