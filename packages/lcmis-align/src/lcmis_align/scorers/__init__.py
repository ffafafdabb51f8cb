"""How much an image shows a concept: one number per image and text, higher is more."""

from lcmis_align.scorers.base import CallableScorer, ImageRewardScorer, Scorer, checked, concept_scores
from lcmis_align.scorers.calibration import CalibratedScorer
from lcmis_align.scorers.clip import CLIPScorer
from lcmis_align.scorers.vqa import VQAScorer

__all__ = [
    "CLIPScorer", "CalibratedScorer", "CallableScorer", "ImageRewardScorer", "Scorer", "VQAScorer", "checked",
    "concept_scores",
]  # fmt: skip
