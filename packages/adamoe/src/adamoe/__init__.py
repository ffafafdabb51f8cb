"""Token-adaptive mixture-of-experts routing with null experts (arXiv 2406.13233).

The heavy names are imported when they are first used, so that `adamoe --help` answers at once.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from adamoe.config import AdaMoEConfig, preserving_top_k
from adamoe.flops import count_flops, flops_reduction, measure_flops

if TYPE_CHECKING:
    from adamoe import families, molora, routers
    from adamoe.calibration import calibrate, set_load
    from adamoe.checkpoints import export, from_pretrained, register
    from adamoe.conversion import convert, revert
    from adamoe.loss import aux_coefficient, load_balancing_loss
    from adamoe.records import LoadRecord, record_load
    from adamoe.routing import Routing, expert_load, route
    from adamoe.training import AnnealCallback, LoadController, TargetLoadCallback, set_progress

__version__ = "0.1.0"

_HOME = {
    "calibration": ("calibrate", "set_load"),
    "checkpoints": ("export", "from_pretrained", "register"),
    "conversion": ("convert", "revert"),
    "loss": ("aux_coefficient", "load_balancing_loss"),
    "records": ("LoadRecord", "record_load"),
    "routing": ("Routing", "expert_load", "route"),
    "training": ("AnnealCallback", "LoadController", "TargetLoadCallback", "set_progress"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
_ROOMS = ("families", "molora", "routers")

__all__ = [  # noqa: RUF022 - in the order of use
    "AdaMoEConfig",
    "convert",
    "revert",
    "from_pretrained",
    "export",
    "register",
    "record_load",
    "LoadRecord",
    "calibrate",
    "set_load",
    "load_balancing_loss",
    "aux_coefficient",
    "route",
    "Routing",
    "expert_load",
    "count_flops",
    "flops_reduction",
    "measure_flops",
    "preserving_top_k",
    "AnnealCallback",
    "TargetLoadCallback",
    "LoadController",
    "set_progress",
    "families",
    "molora",
    "routers",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"adamoe.{name}")
    if name not in _MODULE:
        raise AttributeError(f"module 'adamoe' has no attribute '{name}'")
    return getattr(importlib.import_module(f"adamoe.{_MODULE[name]}"), name)


# AutoModel's registry needs torch, which this import must not pull in; a program that has it already gets it here.
if "torch" in sys.modules and "transformers.models.auto.modeling_auto" in sys.modules:
    from adamoe.checkpoints import register

    register()
