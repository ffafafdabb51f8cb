"""Consistency large language models (2403.00835): exact Jacobi decoding of any causal model, and the training that makes it fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllm_jacobi.jacobi import JacobiConfig, JacobiDecoder, JacobiOutput, jacobi_generate

__version__ = "0.1.0"

_HOME = {
    "jacobi": ("jacobi_generate", "JacobiConfig", "JacobiDecoder", "JacobiOutput"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of use
    "jacobi_generate",
    "JacobiConfig",
    "JacobiDecoder",
    "JacobiOutput",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f"cllm_jacobi.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'cllm_jacobi' has no attribute '{name}'")
