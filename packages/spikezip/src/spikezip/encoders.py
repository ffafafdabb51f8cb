"""How an input enters in time. In drive form a network sees the summed input; after `steps` steps it stays as it is.

Direct        all of it at step 0: the paper's analog input
Rate          x / n at each of the first n steps
EventFrames   one frame of an event camera at each step
"""

from collections.abc import Mapping
from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor


class Direct:
    """Everything at step 0. inputs: a tensor (B, ...), a mapping of keyword arguments, or a tuple of tensors."""

    steps = 1

    def batch(self, inputs: Any) -> int:
        """Number of samples B."""
        return len(_first(inputs))

    def accumulated(self, inputs: Any, t: int) -> Any:
        """The input summed over steps 0 to t."""
        return inputs


class Rate(Direct):
    """x / n at each of the first n steps. inputs: a tensor (B, ...) of floats. Raises UserError for n under 1."""

    def __init__(self, n: int):
        if n < 1:
            raise UserError(f"n is {n}, expected 1 or more steps")
        self.steps = n

    def accumulated(self, inputs: Any, t: int) -> Any:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise UserError("rate encoding needs one tensor of floats", hint="tokens enter by Direct()")
        # At the end it is the input itself, to the last bit.
        return inputs if t >= self.steps - 1 else inputs * ((t + 1) / self.steps)


class EventFrames(Direct):
    """Frame t at step t; the network settles on their sum. inputs: (T, B, ...)."""

    def __init__(self, steps: int):
        if steps < 1:
            raise UserError(f"steps is {steps}, expected 1 or more")
        self.steps = steps

    def batch(self, inputs: Any) -> int:
        if not isinstance(inputs, Tensor) or len(inputs) != self.steps:
            raise UserError(f"expected one tensor of {self.steps} frames, (T, B, ...)")
        return inputs.shape[1]

    def accumulated(self, inputs: Any, t: int) -> Any:
        return inputs[: min(t, self.steps - 1) + 1].sum(0)


def difference(new: Any, old: Any) -> Any:
    """new - old of what `accumulated` gives, where it is made of floats; token ids and masks stay as they are."""
    if isinstance(new, Mapping):
        return {k: difference(v, old[k]) for k, v in new.items()}
    if isinstance(new, tuple | list):
        return tuple(difference(a, b) for a, b in zip(new, old, strict=True))
    return new - old if isinstance(new, Tensor) and new.is_floating_point() else new


def checked(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The inputs on a device, floats in dtype, labels left out. Raises UserError for NaN, infinity or no samples."""
    if isinstance(inputs, Mapping):
        return {k: checked(v, device, dtype) for k, v in inputs.items() if k not in ("labels", "label")}
    if isinstance(inputs, tuple | list):
        return tuple(checked(x, device, dtype) for x in inputs)
    if not isinstance(inputs, Tensor):
        return inputs
    if not inputs.numel():
        raise UserError(f"the input is empty, of shape {tuple(inputs.shape)}")
    if inputs.is_floating_point():
        if not bool(torch.isfinite(inputs).all()):
            raise UserError("the input holds NaN or infinity, expected finite numbers")
        return inputs.to(device, dtype)
    return inputs.to(device)


def _first(inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    found = next((v for v in values if isinstance(v, Tensor)), None)
    if found is None:
        raise UserError(f"the input is a {type(inputs).__name__} without a tensor")
    return found
