"""The ST-BIF+ neuron as functions: one step, and many.

Event form, input an increment x_t (2406.03470, the ST-BIF+ neuron):

    v <- v + x_t / theta;   o = +1 if v >= 1 and S < hi, -1 if v < 0 and S > lo, else 0;   S <- S + o;   v <- v - o

Since v(t) = 1/2 + X(t) / theta - S(t), with X the summed input, this is the same as a tracker of limited slew:

    S(t) = S(t-1) + clip(q(X(t)) - S(t-1), -1, +1)                                    (drive form, input X itself)

A `burst` of n lets a neuron send up to n unit spikes a step; 1 is the paper's neuron. The equilibrium is the same.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from spikezip.qann.quantizer import levels

BACKENDS = ("auto", "eager", "compile", "triton")
CHUNK = 8
"""Steps that are compiled together; unrolling more makes compilation slow without making the scan faster."""


class _Floor(torch.autograd.Function):
    """floor with the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.floor(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _floor(x: Tensor) -> Tensor:
    return _Floor.apply(x) if torch.is_grad_enabled() and x.requires_grad else torch.floor(x)


def stbif_plus_step(
    x: Tensor, v: Tensor, *, acc: Tensor, theta: Tensor, lo: int, hi: int, burst: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One step in event form; returns (o, v, acc), all of x's shape.

    x: increment of the input. v: membrane in units of theta, 0.5 at the start. acc: tracer S, 0 at the start.
    o: integer spikes in [-burst, burst] as floats; theta * o is what goes out.

    Differentiable with straight-through gradients.
    """
    v = v + x / theta
    spikes = torch.minimum(torch.maximum(_floor(v).clamp(-burst, burst), lo - acc), hi - acc)
    return spikes, v - spikes, acc + spikes


def drive_step(x: Tensor, acc: Tensor, *, theta: Tensor, lo: int, hi: int, burst: int = 1) -> tuple[Tensor, Tensor]:
    """One step in drive form; returns (o, acc), the spikes and the new tracer S. x: the summed input X(t)."""
    if torch.is_grad_enabled() and (x.requires_grad or acc.requires_grad or theta.requires_grad):
        spikes = (_floor(x / theta + 0.5).clamp(lo, hi) - acc).clamp(-burst, burst)
    else:
        spikes = levels(x, theta, lo, hi).sub_(acc).clamp_(-burst, burst)
    return spikes, acc + spikes


def _scan(
    x_seq: Tensor, v: Tensor, acc: Tensor, theta: Tensor, lo: int, hi: int, burst: int
) -> tuple[Tensor, Tensor, Tensor]:
    spikes = []
    for x in x_seq.unbind():
        o, v, acc = stbif_plus_step(x, v, acc=acc, theta=theta, lo=lo, hi=hi, burst=burst)
        spikes.append(o)
    return torch.stack(spikes), v, acc


def _scan_bytes(
    x_seq: Tensor, v: Tensor, acc: Tensor, theta: Tensor, lo: int, hi: int, burst: int
) -> tuple[Tensor, Tensor, Tensor]:
    spikes, v, acc = _scan(x_seq, v, acc, theta, lo, hi, burst)
    return spikes.to(spike_type(lo, hi, burst)), v, acc


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_scan_bytes, dynamic=False)


def spike_type(lo: int, hi: int, burst: int) -> torch.dtype:
    """The smallest type that holds every spike: a scan over time is bound by what it writes."""
    return torch.int8 if min(burst, hi - lo) <= 127 else torch.int16


@functools.cache
def _warn_eager(backend: str, reason: str) -> None:
    warnings.warn(f"backend {backend} is not to be had here ({reason}); going on without", stacklevel=4)


def stbif_plus_multi_step(
    x_seq: Tensor,
    v: Tensor,
    *,
    acc: Tensor,
    theta: Tensor,
    lo: int,
    hi: int,
    burst: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Many steps in event form; returns (spikes (T, ...), v, acc) with the very spikes of T single steps.

    x_seq: (T, ...) increments. backend:

        eager     step by step in torch; the only one with gradients
        compile   torch.compile in chunks of 8 steps, one fused kernel a chunk
        triton    one kernel over all steps, CUDA only
        auto      triton on CUDA when no gradient is asked for, else eager

    Spikes come in int8 (`spike_type`) from compile and triton, in x's type from eager. Where a compiler is not to be had it warns once and goes on eagerly.

    Raises UserError for no steps, a burst under 1 or an unknown backend.
    """
    if x_seq.shape[0] < 1:
        raise UserError("x_seq has no steps, expected (T, ...) with T of 1 or more")
    if burst < 1:
        raise UserError(f"burst is {burst}, expected 1 or more")
    if backend not in BACKENDS:
        raise UserError(f"backend is '{backend}', expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        learning = torch.is_grad_enabled() and (x_seq.requires_grad or v.requires_grad or theta.requires_grad)
        backend = "triton" if x_seq.is_cuda and not learning else "eager"
    fast = {"compile": _scan_compiled, "triton": _scan_triton}.get(backend)
    if fast is not None:
        try:
            with torch.no_grad():
                return fast(x_seq, v, acc, theta, lo, hi, burst)
        except (RuntimeError, ImportError, torch._dynamo.exc.BackendCompilerFailed) as error:
            _warn_eager(backend, str(error).strip().splitlines()[0][:100])
    return _scan(x_seq, v, acc, theta, lo, hi, burst)


def _scan_compiled(
    x_seq: Tensor, v: Tensor, acc: Tensor, theta: Tensor, lo: int, hi: int, burst: int
) -> tuple[Tensor, Tensor, Tensor]:
    spikes = []
    whole = len(x_seq) - len(x_seq) % CHUNK
    for chunk in x_seq[:whole].split(CHUNK) if whole else ():
        o, v, acc = _compiled()(chunk, v, acc, theta, lo, hi, burst)
        spikes.append(o)
    if whole < len(x_seq):
        o, v, acc = _scan_bytes(x_seq[whole:], v, acc, theta, lo, hi, burst)
        spikes.append(o)
    return torch.cat(spikes), v, acc


def _scan_triton(
    x_seq: Tensor, v: Tensor, acc: Tensor, theta: Tensor, lo: int, hi: int, burst: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not x_seq.is_cuda:
        raise RuntimeError(f"Triton's kernel runs on CUDA, the input is on {x_seq.device.type}")
    from spikezip.triton_scan import scan

    return scan(x_seq, v, acc, theta=theta, lo=lo, hi=hi, burst=burst)
