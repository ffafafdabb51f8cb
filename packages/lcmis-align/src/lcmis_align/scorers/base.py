"""The scorer protocol, scorers around a function, and the score of a concept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from tenfold_shared.errors import UserError

from lcmis_align.concepts import Concept
from lcmis_align.errors import ScorerError


@runtime_checkable
class Scorer(Protocol):
    """`score(images, texts)` gives a tensor (images, texts); higher is more."""

    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor: ...


class CallableScorer:
    """A function `(images, texts) -> (images, texts)` of numbers as a scorer."""

    def __init__(self, function: Callable[[list[Image.Image], list[str]], Any]):
        self.function = function

    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """(images, texts). Raises ScorerError when the function returns no numbers."""
        scores = self.function(images, texts)
        try:
            return torch.as_tensor(scores, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScorerError(f"scorer returned no array of numbers ({error})") from error


class ImageRewardScorer:
    """A reward model with ImageReward's own call, `model.score(prompt, image) -> number`."""

    def __init__(self, model: Any):
        if not callable(getattr(model, "score", None)):
            raise ScorerError(f"{type(model).__name__} has no score(prompt, image)")
        self.model = model

    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """(images, texts)."""
        return torch.tensor([[float(self.model.score(text, image)) for text in texts] for image in images])


def checked(scorer: Scorer, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """The scores (images, texts) on the CPU, in float32.

    Raises ScorerError when their shape is another or one of them is not finite: NaN compares as false with everything,
    so a search would go on without noticing.
    """
    scores = torch.as_tensor(scorer.score(images, texts)).detach().float().cpu()
    expected = (len(images), len(texts))
    if tuple(scores.shape) != expected:
        raise ScorerError(f"scorer returned shape {tuple(scores.shape)}, expected {expected}")
    if not bool(torch.isfinite(scores).all()):
        image, text = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ScorerError(f"scorer returned {scores[image, text].item()} for image {image} and text {texts[text]!r}")
    return scores


def concept_scores(scorer: Scorer, images: list[Image.Image], concepts: list[Concept]) -> torch.Tensor:
    """Each image's score of each concept, (images, concepts).

    S(M, A) = max(mean S(M, A), mean S(M, A's description)): of a concept's texts the one with the higher *mean* counts,
    for all images alike (official code).
    """
    texts = [text for concept in concepts for text in concept.texts]
    scores, at, columns = checked(scorer, images, texts), 0, []
    for concept in concepts:
        mine = scores[:, at : at + len(concept.texts)]
        columns.append(mine[:, mine.mean(0).argmax()])
        at += len(concept.texts)
    return torch.stack(columns, dim=1)


def load_processor(name: str | Path) -> Any:
    """`AutoProcessor.from_pretrained(name)` of a folder or a hub id. Raises UserError when it cannot be loaded."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(str(name))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"no processor could be loaded from '{name}' ({reason})", hint="save it beside the model"
        ) from error
