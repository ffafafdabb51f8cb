"""Consistency large language models (2403.00835): exact Jacobi decoding of any causal model, and the training that makes it fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllm_jacobi.cleaning import CleaningReport, augment_trajectories, clean_trajectories
    from cllm_jacobi.export import export_custom_generate
    from cllm_jacobi.jacobi import JacobiConfig, JacobiDecoder, JacobiOutput, jacobi_generate
    from cllm_jacobi.packing import DataCollatorForConsistency
    from cllm_jacobi.trainer import ConsistencyConfig, ConsistencyTrainer
    from cllm_jacobi.trajectory import (
        collect_trajectories,
        load_trajectories,
        read_official,
        save_trajectories,
        write_official,
    )

__version__ = "0.1.0"

_HOME = {
    "jacobi": ("jacobi_generate", "JacobiConfig", "JacobiDecoder", "JacobiOutput"),
    "trajectory": ("collect_trajectories", "load_trajectories", "save_trajectories", "read_official", "write_official"),
    "cleaning": ("clean_trajectories", "augment_trajectories", "CleaningReport"),
    "packing": ("DataCollatorForConsistency",),
    "trainer": ("ConsistencyTrainer", "ConsistencyConfig"),
    "export": ("export_custom_generate",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of use
    "jacobi_generate",
    "JacobiConfig",
    "JacobiDecoder",
    "JacobiOutput",
    "collect_trajectories",
    "load_trajectories",
    "save_trajectories",
    "read_official",
    "write_official",
    "clean_trajectories",
    "augment_trajectories",
    "CleaningReport",
    "DataCollatorForConsistency",
    "ConsistencyTrainer",
    "ConsistencyConfig",
    "export_custom_generate",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f"cllm_jacobi.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'cllm_jacobi' has no attribute '{name}'")
