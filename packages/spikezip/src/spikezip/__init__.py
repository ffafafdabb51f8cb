"""SpikeZIP-TF: stock transformers into spiking networks, exactly.

    quantize -> calibrate -> QATTrainer.fit -> convert -> run

The names below load torch when they are first used, so that `import spikezip` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "QuantConfig": "spikezip.qann.placement",
    "quantize": "spikezip.qann.placement",
    "calibrate": "spikezip.qann.calibration",
    "QATTrainer": "spikezip.qann.training",
    "convert": "spikezip.engine",
    "SpikingModel": "spikezip.engine",
    "RunResult": "spikezip.engine",
    "load": "spikezip.storage",
    "load_quantized": "spikezip.storage",
    "save": "spikezip.storage",
    "load_official": "spikezip.official",
    "compare": "spikezip.exactness",
}

if TYPE_CHECKING:
    from spikezip.engine import RunResult, SpikingModel, convert
    from spikezip.exactness import compare
    from spikezip.official import load_official
    from spikezip.qann.calibration import calibrate
    from spikezip.qann.placement import QuantConfig, quantize
    from spikezip.qann.training import QATTrainer
    from spikezip.storage import load, load_quantized, save

__all__ = [
    "QATTrainer",
    "QuantConfig",
    "RunResult",
    "SpikingModel",
    "calibrate",
    "compare",
    "convert",
    "load",
    "load_official",
    "load_quantized",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spikezip' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
