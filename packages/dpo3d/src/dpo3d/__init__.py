"""See, explain and mend what direct preference optimisation does to likelihoods (arXiv 2406.07327).

Losses and closed forms, Flex-DPO and the other remedies on TRL, a monitor for any TRL trainer, an audit of preference
data, on-policy pairs, and the paper's toy. Names load their module, and with it torch, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dpo3d.alarms import Alarm, Alarms
    from dpo3d.diagnostics import AuditReport, audit_pairs
    from dpo3d.losses import LossOutput, PairLogps, preference_loss, register_loss
    from dpo3d.monitor import ThreeDMonitor
    from dpo3d.pairs import build_pairs, iterate
    from dpo3d.probe import ProbeSet
    from dpo3d.theory import beta_rejected_peak, displacement_band, grad_wrt_likelihood
    from dpo3d.trl import FlexDPOConfig, FlexDPOTrainer

_HOMES = {
    "alarms": ["Alarm", "Alarms"],
    "diagnostics": ["AuditReport", "audit_pairs"],
    "losses": ["LossOutput", "PairLogps", "preference_loss", "register_loss"],
    "monitor": ["ThreeDMonitor"],
    "pairs": ["build_pairs", "iterate"],
    "probe": ["ProbeSet"],
    "theory": ["beta_rejected_peak", "displacement_band", "grad_wrt_likelihood"],
    "trl": ["FlexDPOConfig", "FlexDPOTrainer"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Alarm",
    "Alarms",
    "AuditReport",
    "FlexDPOConfig",
    "FlexDPOTrainer",
    "LossOutput",
    "PairLogps",
    "ProbeSet",
    "ThreeDMonitor",
    "audit_pairs",
    "beta_rejected_peak",
    "build_pairs",
    "displacement_band",
    "grad_wrt_likelihood",
    "iterate",
    "preference_loss",
    "register_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpo3d' has no attribute '{name}'")
    return getattr(import_module(f"dpo3d.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
