"""Latent concept misalignment (2408.00230): find the hidden concept that spoils a prompt, and draw what was asked."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lcmis_align.concepts import Concept as Concept
    from lcmis_align.concepts import ConceptPair as ConceptPair
    from lcmis_align.concepts import ConceptPlan as ConceptPlan
    from lcmis_align.dataset import LCMisDataset as LCMisDataset
    from lcmis_align.errors import DataError as DataError
    from lcmis_align.errors import IncompatiblePromptLength as IncompatiblePromptLength
    from lcmis_align.errors import PlanError as PlanError
    from lcmis_align.errors import PlannerError as PlannerError
    from lcmis_align.errors import ScheduleError as ScheduleError
    from lcmis_align.errors import ScorerError as ScorerError
    from lcmis_align.errors import UnsupportedPipelineError as UnsupportedPipelineError
    from lcmis_align.levels import LevelReport as LevelReport
    from lcmis_align.levels import ScoreJudge as ScoreJudge
    from lcmis_align.levels import judge as judge
    from lcmis_align.levels import rate_level as rate_level
    from lcmis_align.levels import wilson as wilson
    from lcmis_align.mining import Mined as Mined
    from lcmis_align.mining import mine as mine
    from lcmis_align.moce import MoCE as MoCE
    from lcmis_align.moce import MoCEResult as MoCEResult
    from lcmis_align.moce import two_stages as two_stages
    from lcmis_align.planners import ConceptPlanner as ConceptPlanner
    from lcmis_align.planners import FilePlanner as FilePlanner
    from lcmis_align.planners import OpenAICompatiblePlanner as OpenAICompatiblePlanner
    from lcmis_align.planners import RulePlanner as RulePlanner
    from lcmis_align.planners import TransformersPlanner as TransformersPlanner
    from lcmis_align.sampling import Sampler as Sampler
    from lcmis_align.sampling import Snapshot as Snapshot
    from lcmis_align.sampling import Warehouse as Warehouse
    from lcmis_align.schedule import PromptSchedule as PromptSchedule
    from lcmis_align.schedule import Ramp as Ramp
    from lcmis_align.scorers import CalibratedScorer as CalibratedScorer
    from lcmis_align.scorers import CallableScorer as CallableScorer
    from lcmis_align.scorers import CLIPScorer as CLIPScorer
    from lcmis_align.scorers import ImageRewardScorer as ImageRewardScorer
    from lcmis_align.scorers import Scorer as Scorer
    from lcmis_align.scorers import VQAScorer as VQAScorer
    from lcmis_align.search import Probe as Probe
    from lcmis_align.search import Rules as Rules

_HOMES = {
    "concepts": ("Concept", "ConceptPair", "ConceptPlan"),
    "dataset": ("LCMisDataset",),
    "errors": (
        "DataError", "IncompatiblePromptLength", "PlanError", "PlannerError", "ScheduleError", "ScorerError",
        "UnsupportedPipelineError",
    ),
    "levels": ("LevelReport", "ScoreJudge", "judge", "rate_level", "wilson"),
    "mining": ("Mined", "mine"),
    "moce": ("MoCE", "MoCEResult", "two_stages"),
    "planners": ("ConceptPlanner", "FilePlanner", "OpenAICompatiblePlanner", "RulePlanner", "TransformersPlanner"),
    "sampling": ("Sampler", "Snapshot", "Warehouse"),
    "schedule": ("PromptSchedule", "Ramp"),
    "scorers": ("CLIPScorer", "CalibratedScorer", "CallableScorer", "ImageRewardScorer", "Scorer", "VQAScorer"),
    "search": ("Probe", "Rules"),
}  # fmt: skip
_MODULES = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "__version__",
    *_MODULES,
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lcmis_align' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lcmis_align.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
