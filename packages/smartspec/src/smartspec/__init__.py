"""Speculative decoding that picks its own length at every step (2406.14066), for servers that must never be slower.

The controller, the cost models and the simulator need numpy only. `SpecEngine` needs the extra `engine`.
"""

from typing import TYPE_CHECKING, Any

from smartspec.acceptance import AcceptanceTracker, MatchRatioTracker, expected_length, expected_tree_length
from smartspec.controller import (
    BatchState,
    GoodputController,
    GoodputGuard,
    Policy,
    SpecDecision,
    StepOutcome,
    paper_controller,
)
from smartspec.cost import CostModel, LinearCostModel, PiecewiseCostModel, StepSample, TableCostModel, presets
from smartspec.policies import (
    AcceptLengthEMA,
    BatchSizeTable,
    DisableByBatchSize,
    FixedLength,
    NoSpeculation,
    Oracle,
    recommend_table,
)
from smartspec.sim import Hardware, Report, Workload, simulate
from smartspec.tree import TokenTree, best_tree

if TYPE_CHECKING:
    from smartspec.engine import SpecEngine

__version__ = "0.1.0"
__all__ = [
    "AcceptLengthEMA",
    "AcceptanceTracker",
    "BatchSizeTable",
    "BatchState",
    "CostModel",
    "DisableByBatchSize",
    "FixedLength",
    "GoodputController",
    "GoodputGuard",
    "Hardware",
    "LinearCostModel",
    "MatchRatioTracker",
    "NoSpeculation",
    "Oracle",
    "PiecewiseCostModel",
    "Policy",
    "Report",
    "SpecDecision",
    "SpecEngine",
    "StepOutcome",
    "StepSample",
    "TableCostModel",
    "TokenTree",
    "Workload",
    "best_tree",
    "expected_length",
    "expected_tree_length",
    "paper_controller",
    "presets",
    "recommend_table",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "SpecEngine":
        from smartspec.engine import SpecEngine

        return SpecEngine
    raise AttributeError(f"module 'smartspec' has no attribute '{name}'")
