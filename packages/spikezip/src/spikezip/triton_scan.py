"""Many steps of the neuron as one Triton kernel: the loop over time keeps membrane and tracer in registers.

Of memory it touches each input once and each spike once, in one byte: what a scan over time costs at least. Imports triton,
which comes with torch on Linux; `TRITON_INTERPRET=1` runs the kernel without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikezip.functional import spike_type

BLOCK = 512


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]  # Triton takes annotations for types of its own.
    x_ptr, v_ptr, acc_ptr, theta_ptr, spikes_ptr, v_end_ptr, acc_end_ptr, steps, neurons, theta_stride, lo, hi, burst,
    SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < neurons
    v = tl.load(v_ptr + at, mask=inside)
    acc = tl.load(acc_ptr + at, mask=inside)
    theta = tl.load(theta_ptr + at * theta_stride, mask=inside, other=1.0)
    here = at
    for _ in range(steps):
        x = tl.load(x_ptr + here, mask=inside)
        # The plain division of a GPU is not rounded to nearest, and a membrane on the threshold is then another spike.
        v += tl.div_rn(x, theta) if SINGLE else x / theta
        room_up, room_down = hi - acc, lo - acc
        spikes = tl.minimum(tl.maximum(tl.floor(v), -burst), burst)
        spikes = tl.minimum(tl.maximum(spikes, room_down), room_up)
        v -= spikes
        acc += spikes
        tl.store(spikes_ptr + here, spikes.to(spikes_ptr.dtype.element_ty), mask=inside)
        here += neurons
    tl.store(v_end_ptr + at, v, mask=inside)
    tl.store(acc_end_ptr + at, acc, mask=inside)


def scan(
    x_seq: Tensor, v: Tensor, acc: Tensor, *, theta: Tensor, lo: int, hi: int, burst: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes (T, ...) in `spike_type`, v, acc) of T steps. x_seq: (T, ...), float32 or float64; v, acc: (...)."""
    x_seq, v, acc = x_seq.contiguous(), v.contiguous(), acc.contiguous()
    theta = theta.to(x_seq)
    if theta.dim():
        theta = theta.expand(x_seq.shape[1:]).contiguous()
    most = min(burst, hi - lo)
    spikes = torch.empty(x_seq.shape, dtype=spike_type(lo, hi, burst), device=x_seq.device)
    v_end, acc_end, neurons = torch.empty_like(v), torch.empty_like(acc), v.numel()
    _kernel[(triton.cdiv(neurons, BLOCK),)](
        x_seq, v, acc, theta, spikes, v_end, acc_end, len(x_seq), neurons, int(theta.dim() > 0),
        float(lo), float(hi), float(most), SINGLE=x_seq.dtype == torch.float32, BLOCK=BLOCK,
    )  # fmt: skip
    return spikes, v_end, acc_end
