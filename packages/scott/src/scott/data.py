"""Latents and captions on disk: images are encoded once, in shards that are read a row at a time.

A folder holds `latents-00000.safetensors`, ... (tensor `latents`, float16, (rows, channels, height, width), scaled as the
U-Net wants them) and `index.json` with the shards' lengths and the captions.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor

INDEX = "index.json"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class LatentDataset:
    """Pairs of a latent (channels, height, width), float32, and its caption (text or class label).

    folder: made by `prepare_latents`. Raises UserError when it is not one, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise UserError(f"'{folder}' holds no latents ({INDEX} is missing)", hint="make it with prepare-latents")
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._shards = [(str(s["file"]), int(s["rows"])) for s in index["shards"]]
            self.captions: list[str | int] = list(index["captions"])
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"'{folder / INDEX}' is damaged ({error})", hint="run prepare-latents again") from error
        if sum(rows for _, rows in self._shards) != len(self.captions) or not self.captions:
            raise UserError(f"'{folder}' has {len(self.captions)} captions for another number of latents")
        for name, _ in self._shards:
            # A name from a file must not lead out of the folder.
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"shard '{name}' is not in '{folder}'", hint="run prepare-latents again")
        self._folder: Path | None = folder
        self._memory: Tensor | None = None
        self._open: dict[str, Any] = {}
        self[0]

    @classmethod
    def of(cls, latents: Tensor, captions: Sequence[str | int] | None = None) -> "LatentDataset":
        """A dataset in memory. latents: (rows, channels, height, width); captions: one each, empty when not given.

        Raises UserError for a wrong shape, NaN, or another number of captions.
        """
        captions = list(captions) if captions is not None else [""] * len(latents)
        if latents.dim() != 4 or not len(latents):
            raise UserError(f"latents have shape {tuple(latents.shape)}, expected (rows, channels, height, width)")
        if len(captions) != len(latents):
            raise UserError(f"{len(captions)} captions for {len(latents)} latents")
        if not bool(torch.isfinite(latents).all()):
            raise UserError("latents hold NaN or infinity")
        self = cls.__new__(cls)
        self.captions, self._memory, self._folder, self._shards, self._open = captions, latents, None, [], {}
        return self

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator[tuple[Tensor, str | int]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> tuple[Tensor, str | int]:
        if self._memory is not None:
            return self._memory[i].float(), self.captions[i]
        row = i
        for name, rows in self._shards:
            if row < rows:
                latent = self._shard(name)[row : row + 1][0].float()
                if not bool(torch.isfinite(latent).all()):
                    raise UserError(f"latent {row} of '{name}' holds NaN or infinity", hint="run prepare-latents again")
                return latent, self.captions[i]
            row -= rows
        raise IndexError(i)

    def _shard(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self._open:
            assert self._folder is not None
            try:
                self._open[name] = safe_open(self._folder / name, "pt").get_slice("latents")
            except (SafetensorError, OSError) as error:
                raise UserError(f"shard '{name}' is damaged ({error})", hint="run prepare-latents again") from error
        return self._open[name]


def prepare_latents(
    images: Iterable[tuple[Any, str | int]],
    vae: Any,
    folder: str | Path,
    *,
    size: int,
    batch_size: int = 8,
    shard: int = 4096,
) -> LatentDataset:
    """Encode images and write them as a LatentDataset, whole or not at all.

    images: (PIL image, caption) pairs. vae: an AutoencoderKL; the mode of its posterior is kept, times its scaling factor.
    size: pixels of the side; images are scaled and cropped about the middle. batch_size: images of one pass.

    Raises UserError when there are no images.
    """
    from safetensors.torch import save_file

    captions: list[str | int] = []
    shards: list[dict[str, Any]] = []
    waiting: list[Tensor] = []
    with replace_atomically(folder) as partial:
        partial.mkdir()

        def flush(everything: bool) -> None:
            nonlocal waiting
            while sum(map(len, waiting)) >= (1 if everything else shard):
                joined = torch.cat(waiting)
                name = f"latents-{len(shards):05d}.safetensors"
                save_file({"latents": joined[:shard].contiguous()}, partial / name)
                shards.append({"file": name, "rows": len(joined[:shard])})
                waiting = [joined[shard:]] if len(joined) > shard else []

        for group in _groups(images, batch_size):
            pixels = torch.stack([_pixels(image, size) for image, _ in group])
            waiting.append(encode(vae, pixels).half().cpu())
            captions += [caption for _, caption in group]
            flush(False)
        flush(True)
        if not captions:
            raise UserError("no images to encode")
        (partial / INDEX).write_text(json.dumps({"shards": shards, "captions": captions}), encoding="utf-8")
    return LatentDataset(folder)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Latents of images (batch, 3, height, width) in [−1, 1], as the U-Net wants them."""
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    if not bool(torch.isfinite(latents).all()):
        raise UserError("the VAE gave NaN or infinity", hint="load it in float32")
    shift = vae.config.get("shift_factor") or 0.0
    return (latents - shift) * vae.config.scaling_factor


def read_images(source: str | Path) -> Iterator[tuple[Any, str | int]]:
    """(PIL image, caption) pairs of a folder, a webdataset tar, or a data set of the hub.

    A folder's captions are in `metadata.jsonl` (file_name, text), as the `imagefolder` of datasets has them, or in a .txt
    file beside each image; without either they are empty. Tars and hub ids need the extra `scott[datasets]`.

    Raises UserError when there is nothing to read, or an image is damaged.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".tar" and not path.exists():
        raise UserError(f"'{path}' does not exist")
    if path.is_file() and path.suffix != ".tar":
        raise UserError(f"'{path}' is neither a folder of images nor a webdataset tar")
    return _read_datasets(str(source))


def _read_folder(folder: Path) -> Iterator[tuple[Any, str | int]]:
    from PIL import Image, UnidentifiedImageError

    captions: dict[str, str] = {}
    if (folder / "metadata.jsonl").exists():
        try:
            for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
                record = json.loads(line) if line.strip() else {"file_name": ""}
                captions[record["file_name"]] = str(record.get("text", ""))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"'{folder / 'metadata.jsonl'}' is damaged ({error})", hint='expected lines {"file_name":, "text":}'
            ) from error
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not files:
        raise UserError(f"'{folder}' holds no images", hint=f"expected {', '.join(IMAGES)}")
    for file in files:
        beside = file.with_suffix(".txt")
        caption = captions.get(file.relative_to(folder).as_posix(), "")
        if not caption and beside.exists():
            caption = beside.read_text(encoding="utf-8").strip()
        try:
            with Image.open(file) as image:
                yield image.convert("RGB"), caption
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"'{file}' is not a readable image", hint="remove it or replace it") from error


def _read_datasets(source: str) -> Iterator[tuple[Any, str | int]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"'{source}' is no folder here", hint="for tars and hub ids: pip install scott[datasets]"
        ) from error
    try:
        if source.endswith(".tar"):
            rows = datasets.load_dataset("webdataset", data_files=source, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(source, split="train", streaming=True)
        for row in rows:
            image = next((row[k] for k in ("image", "jpg", "png", "jpeg", "webp") if k in row), None)
            caption = next((row[k] for k in ("text", "txt", "caption", "label") if k in row), "")
            if image is None:
                raise UserError(f"'{source}' has no column of images", hint=f"its columns: {', '.join(row)}")
            yield image.convert("RGB"), caption if isinstance(caption, int) else str(caption)
    except UserError:
        raise
    except Exception as error:
        # datasets raises a class of its own for each builder and file system.
        raise UserError(
            f"'{source}' is neither a folder here nor a data set that could be read ({_first(error)})"
        ) from error


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _pixels(image: Any, size: int) -> Tensor:
    """(3, size, size) in [−1, 1]."""
    import numpy as np
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
