"""Scoring: faces of images by `FaceScorer`, whole images under a prompt by `ImageRewardModel`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError
from torch import Tensor

from facescore.detectors import Detector, make_detector
from facescore.errors import NoFaceError, TokenizerMissingError
from facescore.images import Box, crop_window, differentiable_crops, open_image, preprocess
from facescore.reward.checkpoint import load_reward
from facescore.reward.model import RewardModel, normalize_reward

CONFIDENCE = 0.9
"""A calibrated detector's faces below this are left out, as in the original."""


@dataclass(frozen=True)
class FaceRecord:
    """One scored face. `box`: as the detector gave it."""

    score: float
    box: Box
    confidence: float
    landmarks: tuple[tuple[float, float], ...] | None = None

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class FaceScoreResult:
    """The faces of one image, and ways to make one number of them; each is None when there is no face."""

    faces: list[FaceRecord] = field(default_factory=list)
    source: str = ""
    calibrated: bool = True
    """The detector's confidence is a probability."""

    @property
    def scores(self) -> list[float]:
        return [face.score for face in self.faces]

    @property
    def max(self) -> float | None:
        return max(self.scores, default=None)

    @property
    def min(self) -> float | None:
        return min(self.scores, default=None)

    @property
    def mean(self) -> float | None:
        return sum(self.scores) / len(self.faces) if self.faces else None

    @property
    def area_weighted(self) -> float | None:
        total = sum(face.area for face in self.faces)
        return sum(face.score * face.area for face in self.faces) / total if self.faces else None


class FaceScorer:
    """Detects the faces of images and scores each.

    model: a `RewardModel`. detector: a name or an object, see `facescore.detectors`. crop, margin: see `crop_window`.
    compat: "fixed", or "official" to lose faces at the left and top border as the original does. normalize: ImageReward's
    scale. on_no_face: "empty" gives a result without faces, "raise" a NoFaceError.
    """

    def __init__(
        self,
        model: RewardModel,
        detector: str | Detector = "skimage-lbp",
        *,
        device: str = "cpu",
        crop: str = "box",
        margin: float = 0.0,
        compat: str = "fixed",
        confidence: float = CONFIDENCE,
        normalize: bool = False,
        batch_size: int = 32,
        on_no_face: str = "empty",
    ):
        for name, value, allowed in (
            ("crop", crop, ("box", "square")),
            ("compat", compat, ("fixed", "official")),
            ("on_no_face", on_no_face, ("empty", "raise")),
        ):
            if value not in allowed:
                raise UserError(f"{name} is {value!r}, expected {' or '.join(allowed)}")
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self.detector = make_detector(detector)
        self.crop, self.margin, self.compat, self.confidence = crop, margin, compat, confidence
        self.normalize, self.batch_size, self.on_no_face = normalize, batch_size, on_no_face

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, detector: str | Detector = "skimage-lbp", device: str = "cpu", **options: Any
    ) -> "FaceScorer":
        """name: hub id ("AIGCer-OPPO/FaceScore"), folder, `FS_model.pt` or safetensors file. options: see the class."""
        return cls(load_reward(name), detector, device=device, **options)

    def __call__(self, images: Any) -> list[FaceScoreResult]:
        """One result per image. images: one or a list of paths, PIL images, uint8 arrays (H, W, 3) or tensors (3, H, W)."""
        given = images if isinstance(images, list | tuple) else [images]
        found: list[list[tuple[Box, float, Any]]] = []
        pixels: list[Tensor] = []
        for item in given:
            image = load_named(item)
            kept = []
            for detection in self.detector.detect(image):
                if self.detector.calibrated and detection.confidence < self.confidence:
                    continue
                window = crop_window(detection.box, image.size, crop=self.crop, margin=self.margin, compat=self.compat)
                if window is None:
                    continue
                kept.append((detection.box, detection.confidence, detection.landmarks))
                pixels.append(preprocess(image.crop(window), self.model.config.image_size))
            if not kept and self.on_no_face == "raise":
                raise NoFaceError(f"no face in {source_of(item)}", hint="try another detector")
            found.append(kept)
        with torch.inference_mode():
            scores = (
                [s for batch in torch.stack(pixels).split(self.batch_size) for s in self.score_crops(batch).tolist()]
                if pixels
                else []
            )
        stream = iter(scores)
        return [
            FaceScoreResult(
                [FaceRecord(next(stream), box, confidence, marks) for box, confidence, marks in kept],
                source_of(item),
                self.detector.calibrated,
            )
            for item, kept in zip(given, found, strict=True)
        ]

    def score_crops(self, pixel_values: Tensor) -> Tensor:
        """Scores (n,) of normalised crops (n, 3, S, S), differentiable."""
        weight = self.model.head.layers[0].weight
        reward = self.model(pixel_values.to(device=self.device, dtype=weight.dtype))
        return normalize_reward(reward) if self.normalize else reward

    def score_images(self, pixels: Tensor) -> Tensor:
        """The best face's score of each image, (n,), from pixels (n, 3, H, W) in [0, 1]; NaN where no face is found.

        Differentiable in the pixels; the boxes count as constants.
        """
        rows, boxes = [], []
        for i, image in enumerate(pixels):
            for detection in self.detector.detect(open_image(image)):
                if not self.detector.calibrated or detection.confidence >= self.confidence:
                    rows.append(i)
                    boxes.append(detection.box)
        best = pixels.new_full((len(pixels),), float("nan"))
        if not rows:
            return best
        crops = differentiable_crops(pixels[rows], boxes, self.model.config.image_size)
        scores = self.score_crops(crops).to(pixels)
        index = torch.tensor(rows, device=pixels.device)
        for i in sorted(set(rows)):
            best = best.index_put((torch.tensor([i], device=pixels.device),), scores[index == i].max()[None])
        return best

    def saliency(self, pixel_values: Tensor) -> Tensor:
        """How much each pixel matters: |gradient x input| summed over channels, (n, S, S), of normalised crops."""
        x = pixel_values.detach().to(self.device).requires_grad_()
        (gradient,) = torch.autograd.grad(self.score_crops(x).sum(), x)
        return (gradient * x).abs().sum(1).detach()


class ImageRewardModel:
    """ImageReward: how well an image does what its prompt asks, on the published scale.

    tokenizer: one of transformers', needed for prompts other than the model's own.
    """

    def __init__(self, model: RewardModel, tokenizer: Any = None, *, device: str = "cpu", normalize: bool = True):
        self.device = pick_device(device)
        self.model, self.tokenizer, self.normalize = model.to(self.device).eval(), tokenizer, normalize

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, tokenizer: str | Path | None = None, device: str = "cpu", normalize: bool = True
    ) -> "ImageRewardModel":
        """name: see `FaceScorer.from_pretrained`. tokenizer: hub id or folder; the checkpoint's own folder, then
        bert-base-uncased when not given. Raises TokenizerMissingError when a given one cannot be loaded."""
        return cls(load_reward(name), find_tokenizer(name, tokenizer), device=device, normalize=normalize)

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids, cut to the model's length. Raises TokenizerMissingError without tokenizer files."""
        if self.tokenizer is None:
            if all(p.strip().lower() == "a face." for p in prompts):
                return [list(self.model.config.prompt_ids)] * len(prompts)
            raise TokenizerMissingError(
                f"the prompt {prompts[0]!r} needs a tokenizer, and there is none here",
                hint="pass tokenizer='bert-base-uncased' or a folder with its files; 'A face.' works without",
            )
        return self.tokenizer(list(prompts), truncation=True, max_length=self.model.config.pad_to)["input_ids"]

    def score(self, prompt: str | Sequence[str], images: Any) -> list[float]:
        """Rewards of images under one prompt, or under one prompt each."""
        given = images if isinstance(images, list | tuple) else [images]
        prompts = [prompt] * len(given) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(given):
            raise UserError(f"{len(prompts)} prompts for {len(given)} images")
        ids = self.ids(prompts)
        scores = []
        with torch.inference_mode():
            for start in range(0, len(given), 32):
                pixels = torch.stack(
                    [preprocess(load_named(i), self.model.config.image_size) for i in given[start : start + 32]]
                )
                scores += self.score_pixels(pixels, ids[start : start + 32]).tolist()
        return scores

    def score_pixels(self, pixel_values: Tensor, ids: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Rewards (n,) of normalised images (n, 3, S, S), differentiable."""
        weight = self.model.head.layers[0].weight
        reward = self.model(pixel_values.to(device=self.device, dtype=weight.dtype), ids)
        return normalize_reward(reward) if self.normalize else reward

    def rank(self, prompt: str, images: Any) -> list[int]:
        """Rank of each image, 1 the best; equal rewards share the better rank."""
        scores = self.score(prompt, images)
        return [1 + sum(other > s for other in scores) for s in scores]


def find_tokenizer(name: str | Path, tokenizer: str | Path | None) -> Any:
    """The tokenizer asked for, else the one beside the checkpoint, else bert-base-uncased, else None."""
    from tenfold_shared.hub import load_tokenizer

    folder = Path(name).expanduser()
    folder = folder.parent if folder.is_file() else folder
    if tokenizer is not None:
        try:
            return load_tokenizer(tokenizer)
        except UserError as error:
            raise TokenizerMissingError(f"tokenizer '{tokenizer}' could not be loaded", hint=error.hint) from error
    for candidate in (folder if folder.is_dir() and any(folder.glob("*token*")) else None, "bert-base-uncased"):
        if candidate is not None:
            try:
                return load_tokenizer(candidate)
            except UserError:
                continue
    return None


def load_named(item: Any) -> Image.Image:
    """The image, remembering the file it came from for detectors that know boxes by name."""
    image = open_image(item)
    image.info["facescore_source"] = source_of(item)
    return image


def source_of(item: Any) -> str:
    if isinstance(item, str | Path):
        return str(item)
    return str(getattr(item, "filename", "") or type(item).__name__)


@dataclass(frozen=True)
class PairCalibration:
    """P(A better than B) = sigmoid((r_A - r_B) / temperature): the temperature that fits held-out pairs best."""

    temperature: float

    @classmethod
    def fit(cls, differences: Sequence[float]) -> "PairCalibration":
        """differences: r_win - r_lose of held-out pairs. Raises UserError when there are none or they are not finite."""
        from scipy.optimize import minimize_scalar

        d = np.asarray(differences, dtype=float)
        if d.size == 0 or not np.isfinite(d).all():
            raise UserError("calibration needs at least one finite difference of rewards")
        scale = float(np.abs(d).max()) or 1.0
        found = minimize_scalar(
            lambda log_t: float(np.logaddexp(0, -d / math.exp(log_t)).mean()),
            bounds=(math.log(scale * 1e-3), math.log(scale * 1e3)),
            method="bounded",
        )
        return cls(math.exp(found.x))

    def probability(self, first: float, second: float) -> float:
        """That `first` is the better one."""
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, (first - second) / self.temperature))))
