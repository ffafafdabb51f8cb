"""Sets of labelled images: a folder, a split file in CoOp's layout, a `datasets.Dataset`, or arrays."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tenfold_shared.errors import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class ImageSet:
    """n images that are read one by one.

    read: index to an RGB image. names: one per image. labels: class names, or None. fingerprint: changes with the
    images.
    """

    read: Callable[[int], Image.Image]
    names: list[str]
    labels: np.ndarray | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    def check(self) -> None:
        """Decode every image once. Raises UserError naming the first that cannot be."""
        for i in range(len(self)):
            self.read(i)

    def classes(self) -> list[str]:
        """The names of the classes, sorted."""
        return [] if self.labels is None else sorted({str(label) for label in self.labels})


def open_images(source: Any, *, image_column: str = "image", label_column: str = "label") -> ImageSet:
    """An image set from what a user has.

    source: a folder with one sub-folder per class (or with images only, unlabelled), a `datasets.Dataset` with an
    image and
        a label column, or an array (n, height, width[, 3]) of uint8 or of floats in [0, 1].

    Raises UserError when the folder is missing or holds no image.
    """
    if isinstance(source, str | Path):
        return _open_folder(Path(source))
    if isinstance(source, np.ndarray):
        return _open_array(source)
    if hasattr(source, "features") and hasattr(source, "column_names"):
        return _open_dataset(source, image_column, label_column)
    raise UserError(f"images are given as {type(source).__name__}, expected a folder, a datasets.Dataset or an array")


def open_split(split: str | Path, part: str, *, root: str | Path) -> ImageSet:
    """Images of a split file in CoOp's layout: {"train"|"val"|"test": [[path, label, class name], ...]}.

    root: folder that the paths are relative to; a path that leaves it is refused.
    """
    split, root = Path(split), Path(root).resolve()
    if not split.is_file():
        raise UserError(f"split file '{split}' does not exist")
    try:
        rows = json.loads(split.read_text(encoding="utf-8"))[part]
        entries = [(str(path), str(name)) for path, _, name in rows]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"'{split}' has no part '{part}' of rows [path, label, class name]", hint="parts are train, val and test"
        ) from error
    paths = [(root / path).resolve() for path, _ in entries]
    for path, (given, _) in zip(paths, entries, strict=True):
        if not path.is_relative_to(root):
            raise UserError(f"'{split}' names '{given}', which is outside of '{root}'")
    return _from_paths(paths, root, np.asarray([name for _, name in entries]))


def _open_folder(folder: Path) -> ImageSet:
    if not folder.is_dir():
        raise UserError(f"image folder '{folder}' does not exist", hint="pass a folder with one sub-folder per class")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"image folder '{folder}' holds no image", hint=f"images end in {', '.join(sorted(SUFFIXES))}")
    parts = [p.relative_to(folder).parts for p in paths]
    labels = np.asarray([p[0] for p in parts]) if all(len(p) > 1 for p in parts) else None
    return _from_paths(paths, folder, labels)


def _from_paths(paths: Sequence[Path], root: Path, labels: np.ndarray | None) -> ImageSet:
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise UserError(f"image '{path}' does not exist")
        state = path.stat()
        digest.update(f"{path.relative_to(root)}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())

    def read(i: int) -> Image.Image:
        try:
            with Image.open(paths[i]) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"image '{paths[i]}' cannot be read ({' '.join(str(error).split())})", hint="remove or replace it"
            ) from error

    return ImageSet(read, [str(p.relative_to(root)) for p in paths], labels, digest.hexdigest()[:24])


def _open_dataset(dataset: Any, image_column: str, label_column: str) -> ImageSet:
    if image_column not in dataset.column_names:
        raise UserError(f"no column '{image_column}'", hint=f"columns are {', '.join(dataset.column_names)}")
    labels = None
    if label_column in dataset.column_names:
        raw = np.asarray(dataset[label_column])
        names = getattr(dataset.features[label_column], "names", None)
        labels = np.asarray(names)[raw] if names else raw.astype(str)

    def read(i: int) -> Image.Image:
        return dataset[i][image_column].convert("RGB")

    return ImageSet(read, [f"row {i}" for i in range(len(dataset))], labels, str(dataset._fingerprint))


def _open_array(array: np.ndarray) -> ImageSet:
    if array.ndim not in (3, 4) or len(array) == 0:
        raise UserError(f"images of shape {array.shape}, expected (n, height, width) or (n, height, width, 3)")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise UserError("images of floats outside [0, 1] or not finite", hint="scale them, or give uint8")
        array = (array * 255).round().astype(np.uint8)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:24]

    def read(i: int) -> Image.Image:
        return Image.fromarray(array[i]).convert("RGB")

    return ImageSet(read, [f"image {i}" for i in range(len(array))], None, digest)
