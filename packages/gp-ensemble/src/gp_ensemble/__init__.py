"""Low-shot image classification by one exact Gaussian process over several frozen pre-trained models (arXiv
2404.00312).

The heavy names are imported when they are first used, so that `gp-ensemble --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gp_ensemble.classifier import GPEnsembleClassifier, LooResult, Posterior
    from gp_ensemble.errors import (
        CacheError,
        ClassNameError,
        EncoderMismatchError,
        FeatureError,
        NumericalError,
        OutOfMemoryError,
        PriorMissingError,
    )
    from gp_ensemble.features import FeatureTable, few_shot_indices
    from gp_ensemble.gp import SharedKernelGP
    from gp_ensemble.kernels import EnsembleKernel
    from gp_ensemble.zero_shot import ZeroShotClassifier

_HOME = {
    "classifier": ("GPEnsembleClassifier", "LooResult", "Posterior"),
    "errors": (
        "CacheError",
        "ClassNameError",
        "EncoderMismatchError",
        "FeatureError",
        "NumericalError",
        "OutOfMemoryError",
        "PriorMissingError",
    ),
    "features": ("FeatureTable", "few_shot_indices"),
    "gp": ("SharedKernelGP",),
    "kernels": ("EnsembleKernel",),
    "zero_shot": ("ZeroShotClassifier",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of use
    "GPEnsembleClassifier",
    "FeatureTable",
    "ZeroShotClassifier",
    "few_shot_indices",
    "SharedKernelGP",
    "EnsembleKernel",
    "Posterior",
    "LooResult",
    "CacheError",
    "ClassNameError",
    "EncoderMismatchError",
    "FeatureError",
    "NumericalError",
    "OutOfMemoryError",
    "PriorMissingError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'gp_ensemble' has no attribute '{name}'")
    return getattr(importlib.import_module(f"gp_ensemble.{_MODULE[name]}"), name)
