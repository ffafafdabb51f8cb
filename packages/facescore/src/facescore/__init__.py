"""A reward model for generated faces, its training on inpainting pairs, and diffusion fine-tuning with it (2406.17100).

The heavy names are imported when they are first used, so that `facescore --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from facescore.detectors import Detection, make_detector
    from facescore.errors import (
        CheckpointError,
        DetectorUnavailableError,
        ImageError,
        InvalidBoxError,
        NoFaceError,
        PairFormatError,
        TokenizerMissingError,
        TrainingError,
    )
    from facescore.evaluation.compare import WholeImages, evaluate, evaluate_rankings, reward_scorer
    from facescore.integrations import EarlyReject
    from facescore.metric import FaceScoreMetric
    from facescore.pairs.builder import InpaintPairBuilder
    from facescore.pairs.dataset import PairDataset, TensorPairs
    from facescore.refine.tuner import FaceTuner, TuneConfig, best_and_worst
    from facescore.reward.checkpoint import load_reward, save_reward
    from facescore.reward.ensemble import HeadEnsemble
    from facescore.reward.model import RewardModel, RewardModelConfig
    from facescore.reward.scorer import FaceRecord, FaceScorer, FaceScoreResult, ImageRewardModel, PairCalibration
    from facescore.reward.training import RewardConfig, RewardTrainer

_HOME = {
    "detectors": ("Detection", "make_detector"),
    "errors": (
        "CheckpointError",
        "DetectorUnavailableError",
        "ImageError",
        "InvalidBoxError",
        "NoFaceError",
        "PairFormatError",
        "TokenizerMissingError",
        "TrainingError",
    ),
    "evaluation.compare": ("WholeImages", "evaluate", "evaluate_rankings", "reward_scorer"),
    "integrations": ("EarlyReject",),
    "metric": ("FaceScoreMetric",),
    "pairs.builder": ("InpaintPairBuilder",),
    "pairs.dataset": ("PairDataset", "TensorPairs"),
    "refine.tuner": ("FaceTuner", "TuneConfig", "best_and_worst"),
    "reward.checkpoint": ("load_reward", "save_reward"),
    "reward.ensemble": ("HeadEnsemble",),
    "reward.model": ("RewardModel", "RewardModelConfig"),
    "reward.scorer": ("FaceRecord", "FaceScoreResult", "FaceScorer", "ImageRewardModel", "PairCalibration"),
    "reward.training": ("RewardConfig", "RewardTrainer"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of use
    "FaceScorer",
    "FaceScoreResult",
    "FaceRecord",
    "ImageRewardModel",
    "PairCalibration",
    "make_detector",
    "Detection",
    "PairDataset",
    "TensorPairs",
    "InpaintPairBuilder",
    "RewardModel",
    "RewardModelConfig",
    "RewardConfig",
    "RewardTrainer",
    "HeadEnsemble",
    "load_reward",
    "save_reward",
    "evaluate",
    "evaluate_rankings",
    "reward_scorer",
    "WholeImages",
    "FaceTuner",
    "TuneConfig",
    "best_and_worst",
    "FaceScoreMetric",
    "EarlyReject",
    "CheckpointError",
    "DetectorUnavailableError",
    "ImageError",
    "InvalidBoxError",
    "NoFaceError",
    "PairFormatError",
    "TokenizerMissingError",
    "TrainingError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'facescore' has no attribute '{name}'")
    return getattr(importlib.import_module(f"facescore.{_MODULE[name]}"), name)
