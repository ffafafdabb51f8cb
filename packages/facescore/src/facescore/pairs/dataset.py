"""Pairs on disk: a folder with `pairs.jsonl` and its images.

    {"id", "prompt", "win", "lose", "win_box", "lose_box", "mask", "generator", "seed", "strength", "source"}

Paths are relative to the folder and never leave it; boxes are x1 y1 x2 y2 in pixels of the stored image, and a box that is
null means the whole image. `source` is the image that both members come from: splits go by it, never by pair.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor

from facescore.errors import InvalidBoxError, PairFormatError
from facescore.images import Box, crop_window, open_image, preprocess

FILE = "pairs.jsonl"


@dataclass(frozen=True)
class PairRecord:
    """One line of `pairs.jsonl`."""

    id: str
    win: str
    lose: str
    prompt: str = ""
    win_box: Box | None = None
    lose_box: Box | None = None
    mask: str | None = None
    generator: str = ""
    seed: int = 0
    strength: float | None = None
    """How far the loser was repainted, in (0, 1]: the severity of `evaluate`."""
    source: str = ""
    no_face: bool = False
    """No face was found again in the loser."""


class Pairs(Protocol):
    """What training and evaluation need of a set of pairs."""

    ids: list[str]
    sources: list[str]
    generators: list[str]
    severities: list[float | None]
    prompts: list[str]

    def __len__(self) -> int: ...

    def images(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Both whole images, winner first."""

    def crops(self, index: int) -> tuple[Image.Image, Image.Image]:
        """The two face crops of a pair, winner first."""

    def pixels(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """The same, as the model sees them: (3, size, size) each."""

    def select(self, rows: Sequence[int]) -> "Pairs":
        """Some of the pairs."""


class PairDataset:
    """The pairs of a folder (see the module). Indexing gives `PairRecord`s.

    Raises PairFormatError with the line number for a line that is not JSON, lacks a field or names a file that is not
    there or lies outside the folder.
    """

    def __init__(self, root: str | Path, records: Sequence[PairRecord]):
        self.root, self.records = Path(root), list(records)
        self.ids = [r.id for r in self.records]
        self.sources = [r.source or r.id for r in self.records]
        self.generators = [r.generator for r in self.records]
        self.severities = [r.strength for r in self.records]
        self.prompts = [r.prompt for r in self.records]

    @classmethod
    def read(cls, path: str | Path) -> "PairDataset":
        """path: the folder, or its `pairs.jsonl`."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise PairFormatError(f"pair file '{path}' does not exist", hint="make one with facescore build-pairs")
        records: list[PairRecord] = []
        seen: dict[str, int] = {}
        for number, values in _json_lines(path):
            record = parse_record(values, number)
            for file in (record.win, record.lose, record.mask):
                if file is not None:
                    _inside(path.parent, file, number)
            if record.id in seen:
                raise PairFormatError(f"line {number}: id '{record.id}' is there already, on line {seen[record.id]}")
            seen[record.id] = number
            records.append(record)
        if not records:
            raise PairFormatError(f"pair file '{path}' holds no pairs")
        return cls(path.parent, records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> PairRecord:
        return self.records[index]

    def images(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Both whole images, winner first."""
        record = self.records[index]
        return open_image(self.root / record.win), open_image(self.root / record.lose)

    def mask(self, index: int) -> Image.Image | None:
        """What differs between the two, 255 inside; from the file, or drawn from the winner's box."""
        record = self.records[index]
        if record.mask is not None:
            return open_image(self.root / record.mask).convert("L")
        if record.win_box is None:
            return None
        canvas = np.zeros(self.images(index)[0].size[::-1], dtype=np.uint8)
        left, top, right, bottom = (round(v) for v in record.win_box)
        canvas[max(top, 0) : bottom, max(left, 0) : right] = 255
        return Image.fromarray(canvas)

    def crops(self, index: int) -> tuple[Image.Image, Image.Image]:
        record = self.records[index]
        boxes = (record.win_box, record.lose_box)
        win, lose = (_crop(image, box) for image, box in zip(self.images(index), boxes, strict=True))
        return win, lose

    def pixels(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        win, lose = self.crops(index)
        return preprocess(win, size), preprocess(lose, size)

    def select(self, rows: Sequence[int]) -> "PairDataset":
        return PairDataset(self.root, [self.records[i] for i in rows])

    def to_datasets(self) -> Any:
        """A `datasets.Dataset` with image columns (extra `datasets`)."""
        import datasets

        rows = [asdict(r) for r in self.records]
        for row in rows:
            for column in ("win", "lose", "mask"):
                row[column] = str(self.root / row[column]) if row[column] else None
        table = datasets.Dataset.from_list(rows)
        for column in ("win", "lose", "mask"):
            table = table.cast_column(column, datasets.Image())
        return table

    def to_webdataset(self, path: str | Path) -> None:
        """One WebDataset shard, whole or not at all (extra `datasets`)."""
        import webdataset

        with replace_atomically(path) as partial:
            with webdataset.TarWriter(str(partial)) as sink:
                for record in self.records:
                    sample: dict[str, Any] = {"__key__": record.id, "json": asdict(record)}
                    for column in ("win", "lose", "mask"):
                        if (file := getattr(record, column)) is not None:
                            sample[f"{column}.png"] = _png(open_image(self.root / file))
                    sink.write(sample)


class TensorPairs:
    """Pairs in memory: win and lose are (n, 3, h, w) in [0, 1].

    The reward takes them as crops. The tuner takes them as whole images, with `prompts` and `masks` (n, 1, h, w).
    """

    def __init__(
        self,
        win: Tensor,
        lose: Tensor,
        *,
        ids: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        generators: Sequence[str] | None = None,
        severities: Sequence[float | None] | None = None,
        prompts: Sequence[str] | None = None,
        masks: Tensor | None = None,
    ):
        if win.shape != lose.shape or win.ndim != 4 or win.shape[1] != 3:
            raise UserError(f"pairs of shapes {tuple(win.shape)} and {tuple(lose.shape)}, expected (n, 3, h, w) twice")
        self.win, self.lose = win, lose
        self.ids = list(ids) if ids is not None else [str(i) for i in range(len(win))]
        self.sources = list(sources) if sources is not None else self.ids
        self.generators = list(generators) if generators is not None else [""] * len(win)
        self.severities: list[float | None] = list(severities) if severities is not None else [None] * len(win)
        self.prompts = list(prompts) if prompts is not None else ["a face"] * len(win)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.win)

    def images(self, index: int) -> tuple[Image.Image, Image.Image]:
        return open_image(self.win[index]), open_image(self.lose[index])

    crops = images

    def mask(self, index: int) -> Image.Image | None:
        """What differs between the two, 255 inside."""
        return None if self.masks is None else Image.fromarray((self.masks[index, 0] * 255).round().byte().numpy())

    def pixels(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        from facescore.images import normalise

        if self.win.shape[-2:] == (size, size):
            return normalise(self.win[index]), normalise(self.lose[index])
        win, lose = self.crops(index)
        return preprocess(win, size), preprocess(lose, size)

    def select(self, rows: Sequence[int]) -> "TensorPairs":
        index = torch.as_tensor(list(rows), dtype=torch.long)
        return TensorPairs(
            self.win[index],
            self.lose[index],
            ids=[self.ids[i] for i in rows],
            sources=[self.sources[i] for i in rows],
            generators=[self.generators[i] for i in rows],
            severities=[self.severities[i] for i in rows],
            prompts=[self.prompts[i] for i in rows],
            masks=self.masks[index] if self.masks is not None else None,
        )


def split_by_source(pairs: Pairs, share: float, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Row numbers of two parts; about `share` of the sources are in the second, and no source is in both."""
    if not 0 <= share < 1:
        raise UserError(f"share is {share}, expected 0 <= share < 1")
    sources = sorted(set(pairs.sources))
    shuffled = np.random.default_rng(seed).permutation(len(sources))
    held = {sources[i] for i in shuffled[: round(share * len(sources))]}
    rows = range(len(pairs))
    return [i for i in rows if pairs.sources[i] not in held], [i for i in rows if pairs.sources[i] in held]


def parse_record(values: Any, line: int) -> PairRecord:
    """One checked record. Raises PairFormatError with the line number."""
    if not isinstance(values, Mapping):
        raise PairFormatError(f"line {line}: not a JSON object")
    for name in ("id", "win", "lose"):
        if not isinstance(values.get(name), str) or not values[name]:
            raise PairFormatError(f"line {line}: missing '{name}'")
    known = {f.name for f in fields(PairRecord)}
    if unknown := sorted(set(values) - known):
        raise PairFormatError(f"line {line}: unknown field '{unknown[0]}', expected some of {', '.join(sorted(known))}")
    checked = dict(values)
    for name in ("win_box", "lose_box"):
        box = values.get(name)
        if box is None:
            continue
        numbers = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
        if not numbers or not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
            raise PairFormatError(f"line {line}: '{name}' is {box}, expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        checked[name] = tuple(float(v) for v in box)
    strength = values.get("strength")
    if strength is not None and not (isinstance(strength, int | float) and 0 < strength <= 1):
        raise PairFormatError(f"line {line}: 'strength' is {strength}, expected a number in (0, 1]")
    return PairRecord(**checked)


def write_records(path: Path, records: Iterable[PairRecord]) -> None:
    """Write a whole `pairs.jsonl`, or none of it."""
    with replace_atomically(path) as partial:
        partial.write_text("".join(line_of(r) for r in records), encoding="utf-8")


def line_of(record: PairRecord) -> str:
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"


def import_pickapic(rows: Iterable[Mapping[str, Any]], folder: str | Path) -> PairDataset:
    """Pick-a-Pic style rows (`jpg_0`, `jpg_1` as bytes, `label_0`, `caption`) as a pair folder; ties are left out."""
    found = []
    for i, row in enumerate(rows):
        try:
            images = [Image.open(io.BytesIO(row[name])) for name in ("jpg_0", "jpg_1")]
            label = float(row["label_0"])
        except (KeyError, TypeError, OSError) as error:
            raise PairFormatError(f"row {i}: not a Pick-a-Pic row ({error})") from error
        if label != 0.5:
            win, lose = images if label > 0.5 else images[::-1]
            found.append((str(row.get("caption", "")), win, lose))
    return _import(found, folder, "pick-a-pic")


def import_imagereward(rows: Iterable[Mapping[str, Any]], folder: str | Path) -> PairDataset:
    """ImageRewardDB style rows (`prompt`, `generations` as images or paths, `ranking` with 1 the best), every strict pair."""
    found = []
    for i, row in enumerate(rows):
        try:
            generations, ranking = list(row["generations"]), list(row["ranking"])
        except (KeyError, TypeError) as error:
            raise PairFormatError(f"row {i}: not an ImageRewardDB row ({error})") from error
        if len(generations) != len(ranking):
            raise PairFormatError(f"row {i}: {len(generations)} generations and {len(ranking)} ranks")
        images = [open_image(g) for g in generations]
        for a in range(len(images)):
            for b in range(len(images)):
                if ranking[a] < ranking[b]:
                    found.append((str(row.get("prompt", "")), images[a], images[b]))
    return _import(found, folder, "imagereward")


def _import(found: list[tuple[str, Image.Image, Image.Image]], folder: str | Path, generator: str) -> PairDataset:
    folder = Path(folder)
    with replace_atomically(folder) as partial:
        (partial / "images").mkdir(parents=True)
        records = []
        for i, (prompt, win, lose) in enumerate(found):
            id, files = f"{i:06d}", {part: f"images/{i:06d}.{part}.png" for part in ("win", "lose")}
            for part, image in (("win", win), ("lose", lose)):
                open_image(image).save(partial / files[part])
            source = prompt or id
            records.append(
                PairRecord(id, files["win"], files["lose"], prompt=prompt, generator=generator, source=source)
            )
        write_records(partial / FILE, records)
    return PairDataset.read(folder)


@dataclass(frozen=True)
class Ranking:
    """Images of one prompt with human ranks, 1 the best, ties allowed."""

    prompt: str
    images: list[str]
    rank: list[float]


def read_rankings(path: str | Path) -> list[Ranking]:
    """A file of lines `{"prompt", "images": [...], "rank": [...]}`. Raises PairFormatError with the line number."""
    path = Path(path)
    if not path.is_file():
        raise PairFormatError(f"ranking file '{path}' does not exist")
    found = []
    for number, values in _json_lines(path):
        images, rank = (values.get(k) if isinstance(values, Mapping) else None for k in ("images", "rank"))
        if not isinstance(images, list) or not isinstance(rank, list) or len(images) != len(rank) or len(rank) < 2:
            raise PairFormatError(f"line {number}: expected 'images' and 'rank' of one length, two or more")
        if not all(isinstance(r, int | float) for r in rank):
            raise PairFormatError(f"line {number}: 'rank' holds something that is not a number")
        files = [str(_inside(path.parent, i, number)) for i in images]
        found.append(Ranking(str(values.get("prompt", "")), files, [float(r) for r in rank]))
    if not found:
        raise PairFormatError(f"ranking file '{path}' is empty")
    return found


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PairFormatError(f"'{path}' is not a text file") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise PairFormatError(f"line {number}: not JSON ({error.msg})") from error


def _inside(root: Path, name: Any, line: int) -> Path:
    path = (root / str(name)).resolve()
    if not path.is_relative_to(root.resolve()):
        raise PairFormatError(f"line {line}: '{name}' lies outside the folder of the file")
    if not path.is_file():
        raise PairFormatError(f"line {line}: image '{name}' does not exist")
    return path


def _crop(image: Image.Image, box: Box | None) -> Image.Image:
    if box is None:
        return image
    window = crop_window(box, image.size)
    if window is None:
        raise InvalidBoxError(f"box {box} holds nothing of the image")
    return image.crop(window)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
