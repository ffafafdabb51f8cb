"""Features of a set of images under several encoders, with a cache that survives interruption.

One safetensors file per encoder holds all images; its name is a digest of what the features depend on: the model, its
weights
and transform, the images and the number of views. While it grows it is a folder of shards, each written whole or not
at all.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from tqdm.auto import tqdm

from gp_ensemble.errors import CacheError, FeatureError
from gp_ensemble.features import FeatureTable
from gp_ensemble.vision.extractors import Extractor
from gp_ensemble.vision.images import ImageSet, open_images

SHARD = 256
"""Images per shard."""


def extract_features(
    dataset: Any,
    extractors: Sequence[Extractor],
    *,
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
    views: int = 1,
    seed: int = 0,
) -> FeatureTable:
    """Features of every image under every encoder.

    dataset: an `ImageSet`, or what `open_images` takes. cache_dir: where features are kept; nowhere when None.
    views: random crops whose features are averaged before anything else; for training images only.

    Raises UserError before any long work when an image cannot be decoded, CacheError naming a damaged cache file.
    """
    images = dataset if isinstance(dataset, ImageSet) else open_images(dataset)
    names = [extractor.name for extractor in extractors]
    if not names or len(set(names)) < len(names):
        raise UserError(f"encoders are {', '.join(names) or 'none'}, expected at least one and each name once")
    if views < 1 or batch_size < 1:
        raise UserError(f"views is {views} and batch_size {batch_size}, expected 1 or more")
    images.check()
    keys = {e.name: cache_key(e, images, views, seed) for e in extractors}
    scratch = None
    if cache_dir is None:
        scratch = tempfile.TemporaryDirectory()
        cache_dir = scratch.name
    try:
        caches = {e.name: _Cache(Path(cache_dir), e.name, keys[e.name], len(images)) for e in extractors}
        _fill(images, extractors, caches, batch_size, views, seed)
        features = {name: cache.read() for name, cache in caches.items()}
    finally:
        if scratch is not None:
            scratch.cleanup()
    return FeatureTable(features, images.labels, images.names, class_names=images.classes(), fingerprint=keys)


def cache_key(extractor: Extractor, images: ImageSet, views: int, seed: int) -> str:
    """Digest of everything that the features depend on."""
    crops = f"{views} {seed}" if views > 1 else "1"
    return hashlib.sha256(f"{extractor.fingerprint}\0{images.fingerprint}\0{crops}".encode()).hexdigest()[:24]


def _fill(
    images: ImageSet,
    extractors: Sequence[Extractor],
    caches: dict[str, "_Cache"],
    batch_size: int,
    views: int,
    seed: int,
) -> None:
    starts = range(0, len(images), SHARD)
    missing = {start: [e for e in extractors if not caches[e.name].has(start)] for start in starts}
    with tqdm(total=sum(map(len, missing.values())), desc="extract", unit="shard", leave=False) as bar:
        for start, wanting in missing.items():
            if not wanting:
                continue
            rows = range(start, min(start + SHARD, len(images)))
            found: dict[str, list[np.ndarray]] = {e.name: [] for e in wanting}
            for first in range(0, len(rows), batch_size):
                index = rows[first : first + batch_size]
                pictures = [images.read(i) for i in index]
                for extractor in wanting:
                    found[extractor.name].append(_features(extractor, pictures, index, views, seed))
            for extractor in wanting:
                caches[extractor.name].write(start, np.concatenate(found[extractor.name]))
                bar.update()


def _features(
    extractor: Extractor, pictures: Sequence[Image.Image], index: Sequence[int], views: int, seed: int
) -> np.ndarray:
    if views == 1:
        result = extractor(pictures)
    else:
        crops = [[_crop(p, seed, i, v) for p, i in zip(pictures, index, strict=True)] for v in range(views)]
        result = np.mean([extractor(crop) for crop in crops], axis=0)
    if result.ndim != 2 or len(result) != len(pictures) or not np.isfinite(result).all():
        raise FeatureError(
            f"encoder '{extractor.name}' gave features of shape {result.shape} for {len(pictures)} images, "
            "or values that are not finite"
        )
    return result.astype(np.float32)


def _crop(picture: Image.Image, seed: int, image: int, view: int) -> Image.Image:
    """A random crop and flip that depends on nothing but the seed, the image and the view."""
    from torchvision.transforms import v2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash((seed, image, view)) % 2**31)
        size = (picture.height, picture.width)
        return v2.Compose([v2.RandomResizedCrop(size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()])(picture)


class _Cache:
    """The features of one encoder: a file when complete, a folder of shards until then."""

    def __init__(self, folder: Path, name: str, key: str, count: int):
        self.file = folder / f"{name}-{key}.safetensors"
        self.shards = folder / f"{name}-{key}.shards"
        self.key, self.count = key, count

    def has(self, start: int) -> bool:
        return self.file.exists() or self._shard(start).exists()

    def write(self, start: int, rows: np.ndarray) -> None:
        with replace_atomically(self._shard(start)) as partial:
            save_file({"features": rows}, partial, {"digest": _digest(rows)})

    def read(self) -> np.ndarray:
        if not self.file.exists():
            whole = np.concatenate([_read(self._shard(start)) for start in range(0, self.count, SHARD)])
            with replace_atomically(self.file) as partial:
                save_file({"features": whole}, partial, {"digest": _digest(whole)})
            shutil.rmtree(self.shards)
        rows = _read(self.file)
        if len(rows) != self.count:
            raise CacheError(
                f"feature cache '{self.file}' has {len(rows)} rows, expected {self.count}", hint="remove it"
            )
        return rows

    def _shard(self, start: int) -> Path:
        return self.shards / f"{start:08d}.safetensors"


def _read(path: Path) -> np.ndarray:
    try:
        with safe_open(path, framework="np") as file:
            rows, digest = file.get_tensor("features"), (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError) as error:
        raise CacheError(f"feature cache '{path}' is damaged ({error})", hint="remove it and extract again") from error
    if digest != _digest(rows):
        raise CacheError(f"feature cache '{path}' does not match its digest", hint="remove it and extract again")
    return rows


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
