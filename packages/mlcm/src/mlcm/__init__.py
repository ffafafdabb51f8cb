"""Multistep latent consistency models: one student for 2 to 8 sampling steps, distilled without data (arXiv 2406.05768).

The heavy names are imported when they are first used, so that `mlcm --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlcm.conditioners import ClassCondition, NoCondition, PromptCondition, read_prompts
    from mlcm.config import MLCMConfig, TrainConfig, read_config
    from mlcm.lora import export_lora, load_lora, load_official_lora
    from mlcm.network import Condition, Denoiser
    from mlcm.rewards import RewardLoss, RewardModel, make_reward
    from mlcm.sampling import sample
    from mlcm.schedule import NoiseSchedule, inference_times, milestones
    from mlcm.scheduler import MLCMScheduler
    from mlcm.train import MLCMTrainer, TrainingDivergedError
    from mlcm.trajectory import TeacherTrajectory, TrajectoryBank

_HOME = {
    "conditioners": ("ClassCondition", "NoCondition", "PromptCondition", "read_prompts"),
    "config": ("MLCMConfig", "TrainConfig", "read_config"),
    "lora": ("export_lora", "load_lora", "load_official_lora"),
    "network": ("Condition", "Denoiser"),
    "rewards": ("RewardLoss", "RewardModel", "make_reward"),
    "sampling": ("sample",),
    "schedule": ("NoiseSchedule", "inference_times", "milestones"),
    "scheduler": ("MLCMScheduler",),
    "train": ("MLCMTrainer", "TrainingDivergedError"),
    "trajectory": ("TeacherTrajectory", "TrajectoryBank"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of use
    "MLCMConfig",
    "MLCMTrainer",
    "MLCMScheduler",
    "milestones",
    "TeacherTrajectory",
    "RewardLoss",
    "load_official_lora",
    "export_lora",
    "ClassCondition",
    "NoCondition",
    "PromptCondition",
    "read_prompts",
    "TrainConfig",
    "read_config",
    "load_lora",
    "Condition",
    "Denoiser",
    "RewardModel",
    "make_reward",
    "sample",
    "NoiseSchedule",
    "inference_times",
    "TrainingDivergedError",
    "TrajectoryBank",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'mlcm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mlcm.{_MODULE[name]}"), name)
