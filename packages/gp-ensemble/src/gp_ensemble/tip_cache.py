"""Features that others saved: Tip-Adapter's cache files.

keys_<k>shots.pt    (d, n) unit columns          values_<k>shots.pt   (n, C) one-hot
test_f.pt           (n, d)                       test_l.pt            (n,) class numbers
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gp_ensemble.errors import CacheError
from gp_ensemble.features import FeatureTable


def read_tip_cache(folder: str | Path, *, shots: int | None = None, encoder: str = "clip") -> dict[str, FeatureTable]:
    """The training table and, where its files are there, the test table: {"train": ..., "test": ...}.

    shots: which cache; the only one there when None. encoder: what to call the encoder.
    Raises CacheError naming the file that is missing, damaged or of another shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CacheError(f"cache folder '{folder}' does not exist")
    if shots is None:
        there = sorted(int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"keys_(\d+)shots\.pt", p.name)))
        if len(there) != 1:
            found = ", ".join(map(str, there)) or "no"
            raise CacheError(f"'{folder}' holds caches of {found} shots", hint="say which with --shots")
        shots = there[0]
    keys, values = _read(folder / f"keys_{shots}shots.pt"), _read(folder / f"values_{shots}shots.pt")
    if keys.ndim != 2 or values.ndim != 2 or keys.shape[1] != len(values):
        raise CacheError(
            f"'{folder}' has keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}, "
            "expected (d, n) and (n, C)"
        )
    tables = {"train": _table(encoder, keys.mT, values.argmax(1))}
    if (folder / "test_f.pt").exists() and (folder / "test_l.pt").exists():
        features, labels = _read(folder / "test_f.pt"), _read(folder / "test_l.pt")
        if features.ndim != 2 or features.shape != (len(labels), keys.shape[0]):
            raise CacheError(
                f"'{folder}' has test features of shape {tuple(features.shape)}, expected (n, {len(keys)})"
            )
        tables["test"] = _table(encoder, features, labels)
    return tables


def _table(encoder: str, features: Tensor, labels: Tensor) -> FeatureTable:
    numbers = labels.long().cpu().numpy()
    return FeatureTable({encoder: np.ascontiguousarray(features.float().cpu().numpy())}, np.asarray(numbers))


def _read(path: Path) -> Tensor:
    if not path.is_file():
        raise CacheError(f"cache file '{path}' does not exist")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Unpickling and zip errors have no class in common.
        raise CacheError(f"cache file '{path}' cannot be read ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(tensor, Tensor):
        raise CacheError(f"cache file '{path}' holds a {type(tensor).__name__}, expected a tensor")
    return tensor
