"""Stochastic consistency distillation: few-step diffusion with SDE solvers and a LoRA discriminator (2403.01505)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from scott.adapters import AdapterStates
    from scott.config import SCottConfig
    from scott.data import LatentDataset, prepare_latents
    from scott.discriminator import LoRADiscriminator
    from scott.metrics import coverage, frechet_distance, prdc, vendi_score
    from scott.mixture import GaussianMixture
    from scott.sample import multistep, sampling_times
    from scott.schedule import NoiseSchedule
    from scott.solvers import NoiseFunction, NoiseStrength, SDESolver
    from scott.train import SCottTrainer

_HOME = {
    "AdapterStates": "adapters",
    "GaussianMixture": "mixture",
    "LatentDataset": "data",
    "LoRADiscriminator": "discriminator",
    "NoiseFunction": "solvers",
    "NoiseSchedule": "schedule",
    "NoiseStrength": "solvers",
    "SCottConfig": "config",
    "SCottTrainer": "train",
    "SDESolver": "solvers",
    "coverage": "metrics",
    "frechet_distance": "metrics",
    "multistep": "sample",
    "prdc": "metrics",
    "prepare_latents": "data",
    "sampling_times": "sample",
    "vendi_score": "metrics",
}

__all__ = [
    "AdapterStates",
    "GaussianMixture",
    "LatentDataset",
    "LoRADiscriminator",
    "NoiseFunction",
    "NoiseSchedule",
    "NoiseStrength",
    "SCottConfig",
    "SCottTrainer",
    "SDESolver",
    "coverage",
    "frechet_distance",
    "multistep",
    "prdc",
    "prepare_latents",
    "sampling_times",
    "vendi_score",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command's --help must not wait for it.
    if name not in _HOME:
        raise AttributeError(f"module 'scott' has no attribute '{name}'")
    return getattr(import_module(f"scott.{_HOME[name]}"), name)
