"""Face detectors behind one call: `detect(image) -> list[Detection]`.

The default needs nothing but scikit-image: its cascade of local binary patterns comes inside the wheel. It gives no
confidence, so 1.0 is reported and `calibrated` is False. The published reward was trained on RetinaFace crops with
confidence 0.9 or more; that threshold stays for detectors whose confidence is a probability.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps
from tenfold_shared.errors import UserError

from facescore.errors import DetectorUnavailableError, InvalidBoxError
from facescore.images import Box


@dataclass(frozen=True)
class Detection:
    """One face: its box in pixels, how sure the detector is, and facial points (k, 2) where it has them."""

    box: Box
    confidence: float = 1.0
    landmarks: tuple[tuple[float, float], ...] | None = None


@runtime_checkable
class Detector(Protocol):
    """Anything that finds faces. `calibrated`: the confidence is a probability, and the 0.9 threshold means something."""

    calibrated: bool

    def detect(self, image: Image.Image) -> list[Detection]:
        """Faces of an RGB picture, the most confident (then the largest) first."""


class SkimageLBP:
    """scikit-image's frontal-face cascade; offline, the default.

    The cascade answers with many windows around a face and with a few elsewhere, which ones depending on the sampling
    grid and on compression. So a place where `FIRST` windows meet is only a candidate, and gets a second look: cut out,
    brought to several sizes, plain and mirrored. A face is where `SECOND` windows meet in the mean of these views.
    """

    calibrated = False
    FIRST, SECOND = 3, 7
    SIDES = (52, 60, 68, 76)
    """Widths in pixels that a candidate is brought to; the cascade's own window is 24."""
    MEET = 0.4
    """Windows with at least this intersection over union are about the same face."""

    def __init__(self, *, min_face: int = 32, scale_factor: float = 1.2):
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade

        self._cascade = Cascade(lbp_frontal_face_cascade_filename())
        self._smallest, self._factor = min_face, scale_factor

    def detect(self, image: Image.Image) -> list[Detection]:
        if min(image.size) < self._smallest:
            return []
        image = image.convert("RGB")
        found = [box for box in self._candidates(image) if self._looks_again(image, box)]
        return _sorted([Detection(to_box(box)) for box in found])

    def _windows(self, image: Image.Image, smallest: int, largest: int) -> np.ndarray:
        """Every window that the cascade lets through, (n, 4), not merged."""
        found = self._cascade.detect_multi_scale(
            img=np.asarray(image), scale_factor=self._factor, step_ratio=1, min_size=(smallest, smallest),
            max_size=(largest, largest), min_neighbor_number=1, intersection_score_threshold=1.01,
        )  # fmt: skip
        rows = [(f["c"], f["r"], f["c"] + f["width"], f["r"] + f["height"]) for f in found]
        return np.array(rows, dtype=float).reshape(-1, 4)

    def _candidates(self, image: Image.Image) -> list[np.ndarray]:
        """The median box of each group of windows that meet, directly or through others."""
        from scipy.sparse.csgraph import connected_components

        windows = self._windows(image, self._smallest, min(image.size))
        if not len(windows):
            return []
        groups, label = connected_components(_shared(windows, windows) >= self.MEET)
        members = [windows[label == g] for g in range(groups)]
        return [np.median(m, axis=0) for m in members if len(m) >= self.FIRST]

    def _looks_again(self, image: Image.Image, box: np.ndarray) -> bool:
        (x, y), half = (box[:2] + box[2:]) / 2, box[2] - box[0]
        around = image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
        votes = []
        for side in self.SIDES:
            view = around.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)
            middle = np.array([[side / 2, side / 2, side * 1.5, side * 1.5]])
            for turned in (view, ImageOps.mirror(view)):
                windows = self._windows(turned, int(side * self.MEET**0.5), int(side / self.MEET**0.5) + 1)
                votes.append((_shared(windows, middle) >= self.MEET).sum())
        return bool(np.mean(votes) >= self.SECOND)


class Dlib:
    """dlib's histogram-of-gradients detector (extra `dlib`). Its score is a margin, not a probability; 0.5 is its threshold."""

    calibrated = False

    def __init__(self, *, threshold: float = 0.5, upsample: int = 0):
        try:
            import dlib
        except ImportError as error:
            raise DetectorUnavailableError(
                "dlib is not installed", hint="pip install 'facescore[dlib]', or pass detector='skimage-lbp'"
            ) from error
        self._detector, self._threshold, self._upsample = dlib.get_frontal_face_detector(), threshold, upsample

    def detect(self, image: Image.Image) -> list[Detection]:
        boxes, margins, _ = self._detector.run(np.asarray(image.convert("RGB")), self._upsample, self._threshold)
        return _sorted(
            [
                Detection((float(b.left()), float(b.top()), float(b.right() + 1), float(b.bottom() + 1)), float(m))
                for b, m in zip(boxes, margins, strict=True)
            ]
        )


class FacenetMTCNN:
    """facenet-pytorch's MTCNN, where it is installed; its weights come in the wheel and its confidence is a probability."""

    calibrated = True

    def __init__(self, *, device: str = "cpu"):
        try:
            from facenet_pytorch import MTCNN
        except ImportError as error:
            raise DetectorUnavailableError(
                "mtcnn: facenet-pytorch is not installed",
                hint="pip install --no-deps facenet-pytorch, or pass detector='skimage-lbp'",
            ) from error
        self._net = MTCNN(keep_all=True, device=device)

    def detect(self, image: Image.Image) -> list[Detection]:
        boxes, confidences, points = self._net.detect(image, landmarks=True)
        if boxes is None:
            return []
        return _sorted(
            [
                Detection(to_box(b), float(p), tuple((float(x), float(y)) for x, y in marks))
                for b, p, marks in zip(boxes, confidences, points, strict=True)
            ]
        )


class YuNet:
    """OpenCV's FaceDetectorYN with an ONNX file of the user's; the confidence is a probability."""

    calibrated = True

    def __init__(self, model: str | Path | None = None):
        try:
            import cv2
        except ImportError as error:
            raise DetectorUnavailableError(
                "yunet: opencv is not installed",
                hint="pip install opencv-python-headless, or pass detector='skimage-lbp'",
            ) from error
        if model is None or not Path(model).is_file():
            raise DetectorUnavailableError(
                f"yunet: no model file '{model or ''}'",
                hint="pass yunet:PATH with OpenCV zoo's face_detection_yunet ONNX file, or detector='skimage-lbp'",
            )
        self._net = cv2.FaceDetectorYN.create(str(model), "", (320, 320))

    def detect(self, image: Image.Image) -> list[Detection]:
        self._net.setInputSize(image.size)
        _, found = self._net.detect(np.asarray(image.convert("RGB"))[..., ::-1].copy())
        if found is None:
            return []
        return _sorted(
            [
                Detection(
                    (float(f[0]), float(f[1]), float(f[0] + f[2]), float(f[1] + f[3])),
                    float(f[14]),
                    tuple((float(f[i]), float(f[i + 1])) for i in range(4, 14, 2)),
                )
                for f in found
            ]
        )


class FullImage:
    """The image is the face."""

    calibrated = True

    def detect(self, image: Image.Image) -> list[Detection]:
        return [Detection((0.0, 0.0, float(image.width), float(image.height)))]


class Boxes:
    """Boxes that are known already: a mapping, or a JSON file of one, from file name to a list of x1 y1 x2 y2.

    `detect` looks an image up by the name of the file it was read from. Raises InvalidBoxError for a broken file.
    """

    calibrated = True

    def __init__(self, boxes: str | Path | Mapping[str, Any]):
        if not isinstance(boxes, Mapping):
            path = Path(boxes)
            if not path.is_file():
                raise DetectorUnavailableError(f"box file '{path}' does not exist")
            try:
                boxes = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise InvalidBoxError(f"box file '{path}' is not JSON ({error})") from error
        if not isinstance(boxes, Mapping):
            raise InvalidBoxError("a box file is an object from file name to a list of [x1, y1, x2, y2]")
        self._boxes = {str(name): [to_box(b) for b in found] for name, found in boxes.items()}

    def detect(self, image: Image.Image) -> list[Detection]:
        name = str(image.info.get("facescore_source", ""))
        found = self._boxes.get(name, self._boxes.get(Path(name).name, []))
        return [Detection(box) for box in found]


NAMES = ("skimage-lbp", "dlib", "mtcnn", "yunet:FILE", "full-image", "boxes:FILE")


def make_detector(detector: "str | Detector") -> Detector:
    """A detector from its name (one of `NAMES`) or from itself. Raises DetectorUnavailableError and UserError."""
    if not isinstance(detector, str):
        if not isinstance(detector, Detector):
            raise UserError(f"a detector of {type(detector).__name__} has no detect(image) and no `calibrated`")
        return detector
    name, _, argument = detector.partition(":")
    if name == "skimage-lbp":
        return SkimageLBP()
    if name == "dlib":
        return Dlib()
    if name == "mtcnn":
        return FacenetMTCNN()
    if name == "yunet":
        return YuNet(argument or None)
    if name == "full-image":
        return FullImage()
    if name == "boxes" and argument:
        return Boxes(argument)
    if name in ("retinaface", "mediapipe"):
        raise DetectorUnavailableError(
            f"{name}: its model is a download of its own",
            hint="run it yourself and pass boxes:FILE, or pass detector='skimage-lbp'",
        )
    raise UserError(f"detector is {detector!r}, expected one of {', '.join(NAMES)}")


def to_box(values: Any) -> Box:
    """Four numbers as a box. Raises InvalidBoxError."""
    try:
        x1, y1, x2, y2 = (float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise InvalidBoxError(f"box {values!r} is not four numbers") from error
    return x1, y1, x2, y2


def _sorted(found: list[Detection]) -> list[Detection]:
    return sorted(found, key=lambda d: (-d.confidence, -(d.box[2] - d.box[0]) * (d.box[3] - d.box[1]), d.box))


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) and (m, 4), as (n, m)."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    common = sides.clip(min=0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return common / (area_a[:, None] + area_b[None] - common)
