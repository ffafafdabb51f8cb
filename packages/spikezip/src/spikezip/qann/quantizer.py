"""The quantiser of the QANN: a learnable step, half rounded up, clipped to integer bounds.

    q(x) = clip(floor(x / s + 1/2), lo, hi)        output s * q(x)                    (2406.03470, the quantiser of the QANN)

The spiking neuron's tracer settles on this very integer, computed by this very function (`levels`), and its output is the
same product; that is what makes conversion exact to the last bit in floating point.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from spikezip.errors import QuantizationError, UncalibratedError

SMALLEST_STEP = 1e-6
"""Steps are kept at or above this in training."""


def levels(x: Tensor, s: Tensor, lo: int, hi: int) -> Tensor:
    """The integer level of every element, as floats of x's type. x: any shape; s: broadcastable to x."""
    # Half goes up. torch.round would send it to the even neighbour, which no threshold neuron does.
    return torch.floor(x / s + 0.5).clamp(lo, hi)


def bounds(levels: int, symmetric: bool) -> tuple[int, int]:
    """Official bounds of `levels` levels: [-(L // 2), L // 2 - 1] when symmetric, else [0, L - 1].

    Raises QuantizationError when levels is under 2.
    """
    if isinstance(levels, bool) or int(levels) != levels or levels < 2:
        raise QuantizationError(f"levels is {levels}, expected a whole number of 2 or more")
    # An odd symmetric L gets its L levels as [-(L // 2), L // 2]: the official formula would drop one.
    return (-(levels // 2), (levels - 1) // 2) if symmetric else (0, levels - 1)


class _LearnedStep(torch.autograd.Function):
    """Straight-through rounding with the learned step's own gradient (1902.08153)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, lo: int, hi: int, gain: float) -> Tensor:
        q = levels(x, s, lo, hi)
        ctx.save_for_backward(x, s, q)
        ctx.lo, ctx.hi, ctx.gain = lo, hi, gain
        return q * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, q = ctx.saved_tensors
        (grad,) = grads
        u = x / s
        inside = (u >= ctx.lo) & (u <= ctx.hi)
        grad_s = grad * torch.where(inside, q - u, q)
        return grad * inside, grad_s.sum_to_size(s.shape) * ctx.gain, None, None, None


class Quantizer(nn.Module):
    """Learned-step quantiser with integer bounds.

    lo, hi: integer bounds, lo <= 0 < hi. channels, axis: one step for each of `channels` entries of dimension `axis`
    instead of one for the tensor. parallel: works at the same depth as the quantiser before it (keys and values beside
    queries), which delay schedules need to know.

    `s` is NaN until calibrated, so that "not calibrated" survives saving and loading.
    Raises QuantizationError for bounds that do not hold 0, UncalibratedError when used before calibration.
    """

    def __init__(
        self, lo: int, hi: int, *, channels: int | None = None, axis: int = -1, parallel: bool = False
    ) -> None:
        super().__init__()
        if not lo <= 0 < hi:
            raise QuantizationError(f"bounds are [{lo}, {hi}], expected lo <= 0 < hi")
        self.lo, self.hi, self.axis, self.parallel = int(lo), int(hi), axis, parallel
        self.s = nn.Parameter(torch.full((channels,) if channels else (), math.nan))
        self.replicas = 1
        """Processes that share one batch; the gradient's gain is that of the whole batch."""
        self.observer: Any = None
        self._ready = False

    @property
    def level(self) -> int:
        """Number of levels L."""
        return self.hi - self.lo + 1

    # The names under which other converters look for a quantiser's bounds.
    @property
    def sym(self) -> bool:
        return self.lo < 0

    @property
    def pos_max(self) -> Tensor:
        return torch.tensor(float(self.hi))

    @property
    def neg_min(self) -> Tensor:
        return torch.tensor(float(self.lo))

    def step(self, x: Tensor) -> Tensor:
        """`s` in a shape that broadcasts over x."""
        if not self.s.dim():
            return self.s
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.s.view(shape)

    def check(self, name: str = "quantiser") -> None:
        """Raise UncalibratedError unless every step is set."""
        if bool(torch.isnan(self.s).any()):
            raise UncalibratedError(f"{name} has no step size yet", hint="call calibrate(qann, loader) first")

    def forward(self, x: Tensor) -> Tensor:
        """s * q(x), of x's shape."""
        if self.observer is not None:
            return self.observer(x)
        if not self._ready:
            self.check()
            self._ready = True
        s = self.step(x)
        if torch.is_grad_enabled() and (x.requires_grad or s.requires_grad):
            per_step = x.numel() * self.replicas / max(self.s.numel(), 1)
            return _LearnedStep.apply(x, s, self.lo, self.hi, 1.0 / math.sqrt(per_step * self.hi))
        return levels(x, s, self.lo, self.hi) * s

    def extra_repr(self) -> str:
        return f"[{self.lo}, {self.hi}]" + (f", {self.s.numel()} steps" if self.s.dim() else "")


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Module path to quantiser, in the order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def keep_positive(model: nn.Module) -> None:
    """Put every step that an optimiser pushed under the smallest allowed one back to it."""
    with torch.no_grad():
        for quantizer in quantizers(model).values():
            quantizer.s.clamp_(min=SMALLEST_STEP)
