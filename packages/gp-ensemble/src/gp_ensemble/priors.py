"""Positive hyper-parameters: stored as logarithms, with a normal prior on the logarithm that also says where
tuning starts."""

import math

import gpytorch
import torch
from gpytorch.priors import NormalPrior
from torch import Tensor


class _Get:
    """Reads a parameter off its module; an object with a name, so that the module can be pickled."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, module: gpytorch.Module) -> Tensor:
        return getattr(module, self.name)


def positive(module: gpytorch.Module, name: str, start: float, *, width: float, count: int | None = None) -> None:
    """Give `module` the parameter `log_<name>`, starting at log(start), with the prior log <name> ~ N(log(start),
    width).

    count: length of the parameter; a scalar when None.
    """
    free(module, f"log_{name}", math.log(start), width=width, count=count)


def free(module: gpytorch.Module, name: str, start: float, *, width: float, count: int | None = None) -> None:
    """Give `module` an unconstrained parameter with the prior N(start, width)."""
    value = torch.full(() if count is None else (count,), start, dtype=torch.float64)
    module.register_parameter(name, torch.nn.Parameter(value))
    module.register_prior(f"{name}_prior", NormalPrior(start, width), _Get(name))


def log_prior(module: gpytorch.Module) -> Tensor:
    """Sum of the log prior densities of all parameters under `module` that have one."""
    return sum(
        (prior.log_prob(closure(owner)).sum() for _, owner, prior, closure, _ in module.named_priors()),
        start=torch.zeros((), dtype=torch.float64),
    )
