"""ST-BIF+ as a spikingjelly neuron: bipolar integrate-and-fire with a spike tracer (2406.03470)."""

import math
from typing import Any

import torch
from spikingjelly.activation_based import neuron, surrogate
from tenfold_shared.errors import UserError
from torch import Tensor, nn

from spikezip.errors import ConversionError, StateError
from spikezip.functional import drive_step, stbif_plus_multi_step, stbif_plus_step
from spikezip.qann.quantizer import Quantizer


class STBIFPlusNode(neuron.BaseNode):
    """Sends theta, nothing, or -theta a step, until the tracer equals the quantiser's integer.

    theta: threshold and spike height, a positive number or a tensor with one step a channel. lo, hi: tracer bounds with
    lo <= 0 <= hi. axis: the channels' dimension when theta has several entries. burst: unit spikes a step at most.

    input_form "event": x is the increment of the input, the output is theta * o_t.
    input_form "drive": x is the summed input X(t), the output is theta * S(t); the spikes are S(t) - S(t-1).

    Memories: `v`, membrane in units of theta, 0.5 at reset (event form only; in drive form it is 1/2 + X/theta - S and
    not kept); `acc`, the tracer S. Both input forms support step modes "s", x of any shape, and "m", x of shape (T, ...).
    Gradients are straight-through; `theta` is a parameter that does not require a gradient until asked to.

    Raises ConversionError for a theta that is not finite and positive, UserError for bounds without 0, a burst under 1 or
    an unknown form, StateError when the input's shape changes without a reset.
    """

    def __init__(
        self,
        theta: float | Tensor,
        lo: int,
        hi: int,
        *,
        axis: int = -1,
        input_form: str = "event",
        step_mode: str = "s",
        burst: int = 1,
        store_v_seq: bool = False,
    ) -> None:
        super().__init__(
            v_threshold=1.0,
            v_reset=None,
            surrogate_function=surrogate.Sigmoid(),
            detach_reset=False,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        theta = torch.as_tensor(theta)
        if not theta.is_floating_point():
            raise ConversionError(f"theta has type {theta.dtype}, expected a floating-point number")
        if not bool((torch.isfinite(theta) & (theta > 0)).all()):
            raise ConversionError(f"theta is {theta.detach().min().item():g}, expected a finite number above 0")
        if not lo <= 0 <= hi:
            raise UserError(f"bounds are [{lo}, {hi}], expected lo <= 0 <= hi")
        if burst < 1:
            raise UserError(f"burst is {burst}, expected 1 or more")
        if input_form not in ("event", "drive"):
            raise UserError(f"input_form is '{input_form}', expected event or drive")
        self.theta = nn.Parameter(theta.detach().clone(), requires_grad=False)
        self.lo, self.hi, self.axis, self.burst, self.input_form = int(lo), int(hi), axis, int(burst), input_form
        self.v = 0.5
        self.set_reset_value("v", 0.5)
        self.register_memory("acc", 0.0)

    @classmethod
    def from_quantizer(cls, quantizer: Quantizer, *, name: str = "quantiser", **kwargs: Any) -> "STBIFPlusNode":
        """The neuron whose equilibrium is this quantiser. Raises ConversionError, naming `name`, for a bad step."""
        quantizer.check(name)
        try:
            return cls(quantizer.s.detach(), quantizer.lo, quantizer.hi, axis=quantizer.axis, **kwargs)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error.message}", hint="calibrate or train the quantised model") from error

    @property
    def accumulated(self) -> Tensor:
        """theta * S, the sum of all that was sent. Raises StateError before the first step."""
        if not isinstance(self.acc, Tensor):
            raise StateError("the neuron has no state yet", hint="run a step first")
        return self.acc * self.threshold(self.acc)

    def threshold(self, x: Tensor) -> Tensor:
        """theta in a shape that broadcasts over x."""
        if not self.theta.dim():
            return self.theta
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.theta.view(shape)

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], step_mode: str
    ) -> tuple[object, ...]:
        """Fill states of x's shape, or check that those there are fit x."""
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        filled = []
        for state in states:
            if not isinstance(state, Tensor):
                state = torch.full_like(x, float(state), requires_grad=False)  # type: ignore[arg-type]
            elif state.shape != x.shape or state.dtype != x.dtype:
                raise StateError(
                    f"the state is {state.dtype} of shape {tuple(state.shape)}, the input {x.dtype} of {tuple(x.shape)}",
                    hint="call reset first",
                )
            filled.append(state)
        return tuple(filled)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        x, (v, acc) = inputs[0], states
        theta = self.threshold(x)
        limits: dict[str, Any] = {"theta": theta, "lo": self.lo, "hi": self.hi, "burst": self.burst}
        if self.input_form == "drive":
            _, acc = drive_step(x, acc, **limits)
            return (acc * theta,), (v, acc)
        spikes, v, acc = stbif_plus_step(x, v, acc=acc, **limits)
        return (spikes * theta,), (v, acc)

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        if self.input_form == "drive":
            return super().multi_step_functional_forward(inputs, states, **kwargs)
        theta = self.threshold(inputs[0][0])
        spikes, v, acc = stbif_plus_multi_step(
            inputs[0],
            states[0],
            acc=states[1],
            theta=theta,
            lo=self.lo,
            hi=self.hi,
            burst=self.burst,
        )
        return (spikes * theta,), (v, acc)

    def extra_repr(self) -> str:
        theta = self.theta.detach().double().mean().item()
        shown = f"{theta:.3g}" if math.isfinite(theta) else "?"
        return f"theta={shown}, [{self.lo}, {self.hi}], {self.input_form}, step_mode={self.step_mode}"
