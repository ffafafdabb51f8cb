"""Operators in event form: tensors carry increments, and each operator's summed output is the plain operator of its summed
input (2406.03470, the spike-equivalent operators).

    linear       y_t = W x_t, and the bias once
    product      y_t = a_t B(t) + A(t-1) b_t          two products; A, B the running sums
    memoryless   y_t = f(X(t)) - f(X(t-1)), f(X(-1)) := 0         softmax, LayerNorm, GELU, any f

All are spikingjelly `MemoryModule`s with step modes "s" and "m". With `form = "drive"` an operator takes and gives summed
values instead and brings its memory up to them: that is how an engine clears away what rounding left (resync).
"""

from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import base
from tenfold_shared.errors import UserError
from torch import Tensor, nn
from torch.nn import functional as F

from spikezip.qann.attention import masked_softmax, product

States = tuple[Any, ...]


class SpikeOperator(base.MemoryModule):
    """What the operators share: the form, plain numbers as initial memories, and a state for each call in a step.

    An operator that a network calls several times a step (shared layers) needs to hear where a step begins: `begin_step`.
    Without it there is one state, and every call is a step.
    """

    form = "event"

    def __init__(self) -> None:
        super().__init__()
        self.called: int | None = None
        self.states: list[States] = []

    def begin_step(self) -> None:
        """The next call is the first of a step."""
        self.called = 0

    def reset(self) -> None:
        super().reset()
        self.called, self.states = None, []

    def single_step_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.called is None:
            return super().single_step_forward(*args, **kwargs)
        index = self.called
        self.called += 1
        if index == len(self.states):
            self.states.append(tuple(self._memories_rv.values()))
        self._memories.update(zip(self._memories, self.states[index], strict=True))
        out = super().single_step_forward(*args, **kwargs)
        self.states[index] = tuple(self._memories.values())
        return out

    def _fill(self, state: Any, like: Tensor) -> Tensor:
        return state if isinstance(state, Tensor) else torch.zeros_like(like)


class SpikeLinear(SpikeOperator):
    """nn.Linear on increments; the bias at step 0, or in equal parts over `bias_steps` steps."""

    def __init__(self, source: nn.Linear | nn.Conv2d, *, bias_steps: int = 1) -> None:
        super().__init__()
        if bias_steps < 1:
            raise UserError(f"bias_steps is {bias_steps}, expected 1 or more")
        self.source, self.bias_steps = source, bias_steps
        self.register_memory("t", 0)

    @property
    def weight(self) -> Tensor:
        return self.source.weight

    def apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.source.weight, bias)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: States, **kwargs: object
    ) -> tuple[tuple[Tensor, ...], States]:
        (x,), (t,) = inputs, states
        if self.form == "drive":
            return (self.apply_weight(x, self.source.bias),), (self.bias_steps,)
        whole, bias = self.source.bias, None
        if whole is not None and t < self.bias_steps:
            share = whole / self.bias_steps
            # The last part is what is missing, so that the parts sum to the bias.
            bias = share if t < self.bias_steps - 1 else whole - share * (self.bias_steps - 1)
        return (self.apply_weight(x, bias),), (t + 1,)


class SpikeConv2d(SpikeLinear):
    """nn.Conv2d on increments, the bias as in `SpikeLinear`."""

    def apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.source._conv_forward(x, self.source.weight, bias)


class SpikeEmbedding(SpikeOperator):
    """nn.Embedding: all of it at step 0, zeros while the indices stay, the difference when they change (streams)."""

    def __init__(self, source: nn.Embedding) -> None:
        super().__init__()
        self.embedding = source
        self.register_memory("y_last", 0.0)

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: States, **kwargs: object
    ) -> tuple[tuple[Tensor, ...], States]:
        y = self.embedding(inputs[0])
        return (y if self.form == "drive" else y - self._fill(states[0], y),), (y,)


class SpikeMatmul(SpikeOperator):
    """Product of two spike streams, (..., M, K) by (..., K, P), with the scale folded into the first (SESA)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("a_sum", 0.0)
        self.register_memory("b_sum", 0.0)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: States, **kwargs: object
    ) -> tuple[tuple[Tensor, ...], States]:
        a, b = inputs[:2]
        scale = float(inputs[2]) if len(inputs) > 2 else 1.0
        if self.form == "drive":
            return (product(a, b, scale),), (a, b)
        before, b_sum = self._fill(states[0], a), self._fill(states[1], b) + b
        return (product(a, b_sum, scale) + product(before, b, scale),), (before + a, b_sum)

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        b_seq, scale = args[0], args[1:]
        return torch.stack([self.single_step_forward(a, b, *scale) for a, b in zip(x_seq, b_seq, strict=True)])


class SpikeFn(SpikeOperator):
    """Any memoryless function of one tensor; further inputs (a softmax's mask) are constants, never summed."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_memory("x_sum", 0.0)
        self.register_memory("y_last", 0.0)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: States, **kwargs: object
    ) -> tuple[tuple[Tensor, ...], States]:
        x = inputs[0] if self.form == "drive" else self._fill(states[0], inputs[0]) + inputs[0]
        y = self.function(x, *inputs[1:])
        return (y if self.form == "drive" else y - self._fill(states[1], y),), (x, y)

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([self.single_step_forward(x, *args) for x in x_seq])


class SpikeSoftmax(SpikeFn):
    """softmax over the last dimension; the mask stays inside, since differences of -inf are not numbers."""

    def __init__(self) -> None:
        super().__init__(masked_softmax)


class SpikeLayerNorm(SpikeFn):
    """nn.LayerNorm, with the source's own eps and affine."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__(source)

    @property
    def weight(self) -> Tensor:
        return self.function.weight  # type: ignore[attr-defined]


class SpikeAdd(SpikeOperator):
    """Sum of increments, for residual connections; it has no memory."""

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: States, **kwargs: object
    ) -> tuple[tuple[Tensor, ...], States]:
        return (inputs[0] + inputs[1],), states
