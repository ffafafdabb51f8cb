"""Pairs without human labels: a real face wins, the same face repainted by a diffusion model loses (2406.17100).

For each face that is large and sure enough

    m = feather(enlarge(box, 1.1)),   out = inpaint(caption, image, m, strength),   lose = (1 - m) image + m out,

so that only the face differs; `mask="landmarks"` takes the hull of the facial points instead of the box. A repainted face that is (nearly) the original is left out. Some losers are in truth fine:
the labels are noisy by construction, and `label_smoothing` in training is for that.

Winner and loser also differ in grain: a photograph's against the generator's (its VAE's, its blur), which a reward learns
before any anatomy. With `grain` the winner passes through the same pipeline at so small a strength that its anatomy stays.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from tenfold_shared.errors import UserError
from tqdm.auto import tqdm

from facescore.detectors import Detection, Detector, make_detector, to_box
from facescore.errors import InvalidBoxError, PairFormatError
from facescore.images import Box, crop_window, open_image
from facescore.pairs.dataset import FILE, PairDataset, PairRecord, line_of, parse_record, write_records

MASKS = ("box", "landmarks")
SAME = 2 / 255
"""A mean difference inside the mask below this counts as the same face."""


@dataclass
class InpaintedPair:
    """A pair before it is written."""

    record: PairRecord
    win: Image.Image
    lose: Image.Image
    mask: Image.Image


@dataclass
class _Job:
    id: str
    source: str
    prompt: str
    image: Image.Image
    detection: Detection
    strength: float
    seed: int


class InpaintPairBuilder:
    """Makes (win, lose) pairs of real pictures with an inpainting pipeline.

    pipe: any pipeline called as diffusers' inpainting ones are (`prompt, image, mask_image, strength, generator`); the
    one that is to be improved, where the pairs also feed fine-tuning. strength: one or several in (0, 1]; several give
    graded losers. mask: "box" repaints an ellipse in the face's box, "landmarks" the hull of its facial points, which the
    detector (mtcnn, yunet) or the dataset has to give. min_face: smallest side of a face in pixels. enlarge: the mask's size against the box. feather: radius
    of the mask's soft edge, as a share of the face's smaller side. longest: larger images are inpainted with their longer
    side scaled to so many pixels, and the face is scaled back. missing: what to do with a loser in which no face is
    found again, "flag", "drop" or "ignore" (do not look). grain: strength of the winner's own repainting, below the losers'; 0
    leaves it untouched. options: further arguments of every call of the pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        detector: str | Detector = "skimage-lbp",
        strength: float | Sequence[float] = 1.0,
        *,
        mask: str = "box",
        min_face: int = 64,
        confidence: float = 0.9,
        enlarge: float = 1.1,
        feather: float = 0.06,
        longest: int = 1024,
        missing: str = "flag",
        grain: float = 0.0,
        generator_id: str = "",
        seed: int = 0,
        batch_size: int = 1,
        options: Mapping[str, Any] | None = None,
    ):
        self.strengths = [float(s) for s in (strength if isinstance(strength, Sequence) else [strength])]
        if not self.strengths or not all(0 < s <= 1 for s in self.strengths):
            raise UserError(f"strength is {strength}, expected numbers in (0, 1]")
        if mask not in MASKS:
            raise UserError(f"mask is {mask!r}, expected {' or '.join(MASKS)}")
        if missing not in ("flag", "drop", "ignore"):
            raise UserError(f"missing is {missing!r}, expected flag, drop or ignore")
        if not 0 <= grain < min(self.strengths):
            raise UserError(
                f"grain is {grain}, expected 0 or more and below the losers' strength {min(self.strengths)}"
            )
        self.mask, self.grain = mask, grain
        self.pipe, self.detector = pipe, make_detector(detector)
        self.min_face, self.confidence, self.enlarge, self.feather = min_face, confidence, enlarge, feather
        self.longest = longest
        self.missing, self.generator_id = missing, generator_id or type(pipe).__name__
        self.seed, self.batch_size, self.options = seed, batch_size, dict(options or {})
        self.counts = {"pairs": 0, "same": 0, "no face in the loser": 0, "without a face": 0}

    def pairs(self, dataset: Iterable[Mapping[str, Any]], *, skip: set[str] | None = None) -> Iterator[InpaintedPair]:
        """Pairs one by one. dataset: items with `image`, and `id`, `prompt`, `boxes` and (k, 2)
        `landmarks` of each box where known. Raises UserError for a face without the landmarks that the mask needs."""
        jobs: list[_Job] = []
        for number, item in enumerate(dataset):
            for job in self._jobs(item, number):
                if job.id not in (skip or set()):
                    jobs.append(job)
            while len(jobs) >= self.batch_size:
                yield from self._run(jobs[: self.batch_size])
                jobs = jobs[self.batch_size :]
        if jobs:
            yield from self._run(jobs)

    def build(
        self, dataset: str | Path | Iterable[Mapping[str, Any]], out_dir: str | Path, *, resume: bool = True
    ) -> PairDataset:
        """Write pairs into a folder as they are made, and read it back.

        dataset: see `pairs`, or a folder of images (see `read_images`). resume: keep the pairs that are there and make
        the missing ones; without it a folder that holds pairs is an error. An interrupt leaves whole records only.
        """
        folder = Path(out_dir)
        items = read_images(dataset) if isinstance(dataset, str | Path) else dataset
        done = _mend(folder / FILE) if resume else []
        if not resume and (folder / FILE).exists():
            raise UserError(f"'{folder}' holds pairs already", hint="pass resume, or another folder")
        made = self.pairs(items, skip={r.id for r in done})
        first = next(made, None)  # what is wrong with the settings shows here, before anything is written
        if first is None and not done:
            tally = ", ".join(f"{name}: {count}" for name, count in self.counts.items())
            raise UserError(f"no pair could be made ({tally})", hint="use a smaller min_face or another detector")
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with open(folder / FILE, "a", encoding="utf-8") as stream:
            for pair in tqdm(chain([first] if first else [], made), desc="pairs", disable=None):
                for name, image in ((pair.record.win, pair.win), (pair.record.lose, pair.lose)):
                    image.save(folder / name)
                pair.mask.save(folder / str(pair.record.mask))
                # The line is the commit: it is written when the images are, and a torn one is dropped on resuming.
                stream.write(line_of(pair.record))
                stream.flush()
                os.fsync(stream.fileno())
        return PairDataset.read(folder)

    def _jobs(self, item: Mapping[str, Any], number: int) -> Iterator[_Job]:
        if "image" not in item:
            raise PairFormatError(f"item {number}: missing 'image'")
        image = open_image(item["image"])
        source = str(item.get("id", f"{number:06d}"))
        if item.get("boxes") is not None:
            marks = item.get("landmarks") or [None] * len(item["boxes"])
            found = [Detection(to_box(box), landmarks=m) for box, m in zip(item["boxes"], marks, strict=True)]
            for detection in found:
                crop_window(detection.box, image.size)  # raises for an empty or outlying box
        else:
            found = self._sure(image)
        large = [d for d in found if min(d.box[2] - d.box[0], d.box[3] - d.box[1]) >= self.min_face]
        if not large:
            self.counts["without a face"] += 1
        for face, detection in enumerate(large):
            if self.mask == "landmarks" and not detection.landmarks:
                raise UserError(
                    f"the face at {detection.box} of '{source}' has no landmarks, which the mask is asked to be made of",
                    hint="use detector mtcnn or yunet:FILE, give 'landmarks' in metadata.jsonl, or use the mask 'box'",
                )
            for strength in self.strengths:
                id = f"{source}-{face}-{round(strength * 100):03d}"
                yield _Job(id, source, str(item.get("prompt", "")), image, detection, strength, _seed(self.seed, id))

    def _sure(self, image: Image.Image) -> list[Detection]:
        found = self.detector.detect(image)
        return [d for d in found if not self.detector.calibrated or d.confidence >= self.confidence]

    def _run(self, jobs: list[_Job]) -> Iterator[InpaintedPair]:
        # One call has one strength and one size.
        groups: dict[tuple[float, tuple[int, int]], list[_Job]] = {}
        for job in jobs:
            groups.setdefault((job.strength, job.image.size), []).append(job)
        for (strength, size), group in groups.items():
            masks = [self._mask(size, j.detection) for j in group]
            outs = self._repaint(group, masks, strength, "")
            wins = [j.image for j in group]
            if self.grain:
                kept = self._repaint(group, masks, self.grain, "/win")
                wins = [_laid(j, out, m) for j, out, m in zip(group, kept, masks, strict=True)]
            for job, mask, out, win in zip(group, masks, outs, wins, strict=True):
                pair = self._finish(job, mask, out, win)
                if pair is not None:
                    yield pair

    def _mask(self, size: tuple[int, int], face: Detection) -> Image.Image:
        if self.mask == "box":
            return face_mask(size, face.box, enlarge=self.enlarge, feather=self.feather)
        side = min(face.box[2] - face.box[0], face.box[3] - face.box[1])
        return hull_mask(size, face.landmarks or (), grow=(self.enlarge - 1) * side, feather=self.feather * side)

    def _repaint(self, group: list[_Job], masks: list[Image.Image], strength: float, which: str) -> list[Image.Image]:
        canvases = [_canvas(j.image, self.longest) for j in group]
        return self.pipe(
            prompt=[j.prompt for j in group],
            image=canvases,
            mask_image=[m.resize(c.size) for m, c in zip(masks, canvases, strict=True)],
            strength=strength,
            generator=[torch.Generator().manual_seed(_seed(self.seed, j.id + which)) for j in group],
            **self._sizes(canvases[0].size),
            **self.options,
        ).images

    def _sizes(self, size: tuple[int, int]) -> dict[str, int]:
        return {"width": size[0], "height": size[1]} if hasattr(self.pipe, "vae") else {}

    def _finish(self, job: _Job, mask: Image.Image, out: Image.Image, win: Image.Image) -> InpaintedPair | None:
        lose = _laid(job, out, mask)
        inside = np.asarray(mask, dtype=np.float64) / 255
        change = np.abs(np.asarray(lose, dtype=np.float64) - np.asarray(win, dtype=np.float64)).mean(2)
        if (change * inside).sum() / inside.sum() < SAME * 255:
            self.counts["same"] += 1
            return None
        no_face = self.missing != "ignore" and not any(_overlap(d.box, job.detection.box) for d in self._sure(lose))
        if no_face:
            self.counts["no face in the loser"] += 1
            if self.missing == "drop":
                return None
        self.counts["pairs"] += 1
        win_name, lose_name, mask_name = (f"images/{job.id}.{part}.png" for part in ("win", "lose", "mask"))
        record = PairRecord(
            job.id, win_name, lose_name, job.prompt, job.detection.box, job.detection.box, mask_name,
            self.generator_id, job.seed, job.strength, job.source, no_face,
        )  # fmt: skip
        return InpaintedPair(record, win, lose, mask)


def face_mask(size: tuple[int, int], box: Box, *, enlarge: float = 1.1, feather: float = 0.06) -> Image.Image:
    """A mask (L, 255 inside) of an ellipse in the enlarged box with a soft edge; exactly 0 outside the enlarged box."""
    x1, y1, x2, y2 = box
    cx, cy, half_x, half_y = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2 * enlarge, (y2 - y1) / 2 * enlarge
    outer = (max(0, round(cx - half_x)), max(0, round(cy - half_y)), round(cx + half_x), round(cy + half_y))
    outer = (outer[0], outer[1], min(size[0], outer[2]), min(size[1], outer[3]))
    mask = Image.new("L", size, 0)
    radius = feather * min(half_x, half_y) * 2
    ImageDraw.Draw(mask).ellipse(
        (cx - half_x + radius, cy - half_y + radius, cx + half_x - radius, cy + half_y - radius), fill=255
    )
    blurred = mask.filter(ImageFilter.GaussianBlur(radius / 2)) if radius > 0 else mask
    clean = Image.new("L", size, 0)
    clean.paste(blurred.crop(outer), outer[:2])
    return clean


def hull_mask(
    size: tuple[int, int], points: Sequence[tuple[float, float]], *, grow: float, feather: float
) -> Image.Image:
    """A mask (L) of the convex hull of facial points: 255 up to `grow` pixels from it, exactly 0 from `feather` further on.

    Eyes and mouth corners are points of the hull itself, so it has to grow to hold them. Raises InvalidBoxError when
    there are fewer than three points, all on one line, or the hull holds nothing of the image.
    """
    from scipy.ndimage import distance_transform_edt
    from scipy.spatial import ConvexHull, QhullError

    try:
        corners = np.asarray(points, dtype=float)
        corners = corners[ConvexHull(corners).vertices]
    except (QhullError, ValueError, IndexError) as error:
        raise InvalidBoxError(f"landmarks {list(points)} span no area", hint="give three points or more") from error
    hull = Image.new("L", size, 0)
    ImageDraw.Draw(hull).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    if hull.getbbox() is None:
        raise InvalidBoxError(f"landmarks {list(points)} lie outside the image of {size[0]} x {size[1]}")
    distance = distance_transform_edt(np.asarray(hull) == 0)
    share = 1 - (distance - grow) / feather if feather > 0 else distance <= grow
    return Image.fromarray((np.clip(share, 0, 1) * 255).astype(np.uint8))


def paste(image: Image.Image, out: Image.Image, mask: Image.Image) -> Image.Image:
    """`out` where the mask is 255, `image` where it is 0 (byte for byte), and a mixture between."""
    m = np.asarray(mask, dtype=np.float64)[..., None] / 255
    mixed = np.asarray(image) * (1 - m) + np.asarray(out) * m
    return Image.fromarray(np.where(m == 0, np.asarray(image), mixed.round()).astype(np.uint8))


def _laid(job: _Job, out: Image.Image, mask: Image.Image) -> Image.Image:
    return paste(job.image, out.convert("RGB").resize(job.image.size), mask)


def read_images(folder: str | Path) -> list[dict[str, Any]]:
    """Items of a folder of images: `metadata.jsonl` with lines {"file_name", "prompt", "boxes", "landmarks"} where
    there is one (the last three as far as they are known; landmarks are a list of [x, y] per box), else every image file with an empty prompt. Raises UserError when there is nothing, PairFormatError for a broken line."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"image folder '{folder}' does not exist")
    listing = folder / "metadata.jsonl"
    items: list[dict[str, Any]] = []
    if listing.is_file():
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                name, prompt = str(values["file_name"]), str(values.get("prompt", values.get("text", "")))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise PairFormatError(f"line {number} of {listing}: expected an object with 'file_name'") from error
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise PairFormatError(f"line {number} of {listing}: '{name}' lies outside the folder")
            if not (folder / name).is_file():
                raise PairFormatError(f"line {number} of {listing}: '{name}' does not exist")
            boxes, marks = values.get("boxes"), values.get("landmarks")
            try:
                if boxes is not None:
                    boxes = [to_box(box) for box in boxes]
                if marks is not None:
                    marks = [tuple((float(x), float(y)) for x, y in points) for points in marks]
            except (TypeError, ValueError, InvalidBoxError) as error:
                raise PairFormatError(
                    f"line {number} of {listing}: 'boxes' is {boxes!r} and 'landmarks' is {marks!r} ({error})",
                    hint="boxes are [[x1, y1, x2, y2], ...] and landmarks [[[x, y], ...], ...]",
                ) from error
            if marks is not None and len(marks) != len(boxes or []):
                raise PairFormatError(f"line {number} of {listing}: {len(marks)} landmarks, {len(boxes or [])} boxes")
            items.append(
                {"id": _id(name), "image": folder / name, "prompt": prompt, "boxes": boxes, "landmarks": marks}
            )
    else:
        kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds)
        items = [{"id": _id(p.name), "image": p, "prompt": ""} for p in files]
    if not items:
        raise UserError(f"image folder '{folder}' holds no images")
    return items


def _id(name: str) -> str:
    """The suffix stays in it, since a.png and a.jpg are two images."""
    return name.replace("/", "_").replace(".", "_")


def _mend(path: Path) -> list[PairRecord]:
    """The whole records of a file that an interrupt may have left with a torn last line, which is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith("\n"):
                break
            records.append(parse_record(json.loads(line), number))
        except json.JSONDecodeError as error:
            raise PairFormatError(f"line {number} of {path}: not JSON", hint="start in a new folder") from error
    write_records(path, records)
    return records


def _seed(seed: int, id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}".encode()).digest()[:4], "big")


def _canvas(image: Image.Image, longest: int, of: int = 8) -> Image.Image:
    """What the pipeline gets: at most `longest`, and sides that are multiples of 8, as a VAE takes them."""
    scale = min(1.0, longest / max(image.size))
    size = tuple(max(of, int(side * scale) // of * of) for side in image.size)
    return image if size == image.size else image.resize(size)


def _overlap(a: Box, b: Box) -> bool:
    """The boxes share more than a fifth of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width > 0 and height > 0 and width * height > 0.2 * smaller
