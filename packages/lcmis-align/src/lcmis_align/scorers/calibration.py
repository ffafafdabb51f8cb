"""Scores of two different concepts on one scale.

CLIP gives some texts higher scores than others whatever the image, so A's score cannot be compared with B's as it is. Each
text's scores are set against its scores on reference images: some that show A alone, some that show B alone.
"""

import torch
from PIL import Image
from tenfold_shared.errors import UserError

from lcmis_align.scorers.base import Scorer, checked

METHODS = ("zscore", "rank")


class CalibratedScorer:
    """A scorer whose scores are set against reference images.

    method: "zscore" gives (score - mean) / deviation over the references, "rank" the share of references that score lower,
    half of the equal ones included.
    """

    def __init__(self, scorer: Scorer, references: list[Image.Image], *, method: str = "zscore"):
        if method not in METHODS:
            raise UserError(f"normalise is {method!r}, expected one of {', '.join(METHODS)}")
        if len(references) < 2:
            raise UserError(f"{len(references)} reference images given, expected 2 or more")
        self.scorer, self.references, self.method = scorer, references, method
        self._known: dict[str, torch.Tensor] = {}

    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """(images, texts), calibrated text by text."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= dict(zip(new, checked(self.scorer, self.references, new).T, strict=True))
        raw = checked(self.scorer, images, texts)
        known = torch.stack([self._known[text] for text in texts], dim=1)
        if self.method == "zscore":
            return (raw - known.mean(0)) / known.std(0).clamp(min=1e-6)
        below = (known[:, None] < raw[None]).float() + 0.5 * (known[:, None] == raw[None]).float()
        return below.mean(0)
