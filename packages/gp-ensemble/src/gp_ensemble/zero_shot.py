"""The zero-shot classifier of a contrastive model: class names as text embeddings, logits as scaled cosines.

z_c(x) = scale * f(x).t_c + bias, with f(x) and t_c of unit length; t_c is the mean of a class's embedded captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tenfold_shared.errors import UserError

from gp_ensemble.errors import ClassNameError
from gp_ensemble.features import unit_rows

TEMPLATES = ("a photo of a {}.", "a blurry photo of a {}.", "a close-up photo of a {}.", "a drawing of a {}.")
"""Captions used when none are given; open_clip has the eighty of ImageNet as `OPENAI_IMAGENET_TEMPLATES`."""


@dataclass(eq=False)
class ZeroShotClassifier:
    """Text embeddings of C classes.

    class_names: C different names; columns are matched to a classifier's classes by these, never by position.
    weights: (d, C), columns of unit length. scale, bias: of the logits. encoder: whose image features they belong to.

    Raises ClassNameError when a name is there twice, UserError when the shapes disagree.
    """

    class_names: Sequence[str]
    weights: np.ndarray
    scale: float = 100.0
    encoder: str = "clip"
    bias: float = 0.0

    def __post_init__(self) -> None:
        self.class_names = [str(name) for name in self.class_names]
        self.weights = np.asarray(self.weights, dtype=np.float32)
        if twice := sorted({n for n in self.class_names if self.class_names.count(n) > 1}):
            raise ClassNameError(f"class names that are there twice: {', '.join(twice)}")
        if self.weights.ndim != 2 or self.weights.shape[1] != len(self.class_names):
            raise UserError(
                f"text embeddings of shape {self.weights.shape} for {len(self.class_names)} class names, "
                "expected (dimensions, classes)"
            )
        if not np.isfinite(self.weights).all():
            raise UserError("text embeddings hold NaN or infinity")

    def logits(self, features: Any, classes: Sequence[Any] | None = None) -> np.ndarray:
        """z (n, C) of image features (n, d); columns in the order of `classes` (default `class_names`).

        Raises ClassNameError when a class has no embedding.
        """
        features = np.asarray(features, dtype=np.float32)
        if features.ndim != 2 or features.shape[1] != len(self.weights):
            raise UserError(
                f"image features of shape {features.shape} for text embeddings of {len(self.weights)} dimensions",
                hint=f"pass the features of the encoder '{self.encoder}' that the text tower belongs to",
            )
        z = self.scale * unit_rows(features) @ self.weights + self.bias
        return z if classes is None else z[:, self.columns(classes)]

    def columns(self, classes: Sequence[Any]) -> list[int]:
        """The column of each class, by name. Raises ClassNameError naming those that are missing."""
        return columns_by_name(self.class_names, classes)

    def predict(self, features: Any) -> np.ndarray:
        """Class names (n,)."""
        return np.asarray(self.class_names)[self.logits(features).argmax(1)]

    @classmethod
    def from_open_clip(
        cls,
        model: Any,
        tokenizer: Callable[[list[str]], Any],
        *,
        names: Sequence[str],
        templates: Sequence[str | Callable[[str], str]] | None = None,
        encoder: str = "clip",
    ) -> "ZeroShotClassifier":
        """Embed the names with an open_clip model and its tokenizer (extra `vision`)."""
        import open_clip

        functions = [t if callable(t) else t.format for t in (templates or TEMPLATES)]
        device = next(model.parameters()).device
        weights = open_clip.build_zero_shot_classifier(model, tokenizer, list(names), functions, device=device)
        bias = getattr(model, "logit_bias", None)
        return cls(
            names,
            weights.float().cpu().numpy(),
            float(model.logit_scale.detach().exp()),
            encoder,
            0.0 if bias is None else float(bias.detach()),
        )

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        processor: Any,
        *,
        names: Sequence[str],
        templates: Sequence[str] | None = None,
        encoder: str = "clip",
    ) -> "ZeroShotClassifier":
        """Embed the names with a CLIP or SigLIP model of transformers (extra `vision`).

        processor: the model's processor or tokenizer. SigLIP's scale and bias are kept.
        """
        import torch

        columns = []
        tokenizer = getattr(processor, "tokenizer", processor)
        padding = "max_length" if hasattr(model, "logit_bias") else True  # SigLIP was trained on full length
        with torch.inference_mode():
            for name in names:
                captions = [t.format(name) for t in (templates or TEMPLATES)]
                tokens = tokenizer(captions, padding=padding, truncation=True, return_tensors="pt").to(model.device)
                text = projected(model.get_text_features(**tokens)).float()
                mean = torch.nn.functional.normalize(text, dim=-1).mean(0)
                columns.append(torch.nn.functional.normalize(mean, dim=0).cpu())
        bias = getattr(model, "logit_bias", None)
        return cls(
            names,
            torch.stack(columns, dim=1).numpy(),
            float(model.logit_scale.detach().exp()),
            encoder,
            0.0 if bias is None else float(bias.detach()),
        )


def columns_by_name(names: Sequence[str], classes: Any) -> list[int]:
    """Position in `names` of each class. Raises ClassNameError naming those that are missing."""
    position = {str(name): i for i, name in enumerate(names)}
    if missing := [str(c) for c in classes if str(c) not in position]:
        raise ClassNameError(
            f"no zero-shot column for class {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}",
            hint=f"columns are for {', '.join(list(position)[:5])}{' ...' if len(position) > 5 else ''}",
        )
    return [position[str(c)] for c in classes]


def projected(output: Any) -> Any:
    """The embedding of `get_text_features` or `get_image_features`: a tensor, or in transformers 5 the field
    of an output."""
    return output if not hasattr(output, "pooler_output") else output.pooler_output
