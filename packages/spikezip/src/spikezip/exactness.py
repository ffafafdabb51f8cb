"""Where a spiking run and its QANN differ: logits to the last bit, every integer, and the first layer that is off."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikezip.encoders import checked
from spikezip.engine import RunResult, SpikingModel, integers
from spikezip.qann.calibration import call


@dataclass(frozen=True)
class Exactness:
    """Comparison of one run with the QANN at the same batch shape."""

    bitwise: bool
    """The logits are equal to the last bit."""
    error: float
    """Largest difference of a logit."""
    agreement: float
    """Share of samples with the same prediction."""
    mismatches: int
    """Neurons whose final integer is not the QANN's."""
    neurons: int
    layers: dict[str, int]
    """Mismatches by layer, in the order of the forward."""
    certificate: str

    @property
    def first(self) -> str | None:
        """The first layer with a mismatch; what comes after it may only follow from it."""
        return next((name for name, count in self.layers.items() if count), None)

    def __str__(self) -> str:
        logits = "logits bitwise equal" if self.bitwise else f"logits off by up to {self.error:.2g}"
        where = f", the first in {self.first}" if self.first else ""
        return (
            f"{logits}, {self.mismatches} of {self.neurons} integers differ{where}, "
            f"predictions agree on {100 * self.agreement:.1f} %; {self.certificate}"
        )


@torch.no_grad()
def compare(snn: SpikingModel, inputs: Any, result: RunResult | None = None, **run: Any) -> Exactness:
    """Compare a run with the QANN. result: that of the run just made on `inputs`; None makes one with the options `run`."""
    result = result or snn.run(inputs, **run)
    inputs = checked(inputs, snn.device, snn.dtype)
    logits = call(snn.qann, inputs)
    wanted = integers(snn.qann, inputs)
    layers: dict[str, int] = {}
    for name, level in zip(result.spikes.layers, result.spikes.levels, strict=True):
        path, _, index = name.partition("#")
        layers[name] = int((wanted[path][int(index or 0)] != level).sum())
    return Exactness(
        bitwise=_bits(logits, result.logits),
        error=float((logits - result.logits).abs().max()),
        agreement=float((logits.argmax(-1) == result.logits.argmax(-1)).float().mean()),
        mismatches=sum(layers.values()),
        neurons=result.certificate.neurons,
        layers=layers,
        certificate=str(result.certificate),
    )


def _bits(a: Tensor, b: Tensor) -> bool:
    # torch.equal takes 0 and -0 for equal; so does every comparison that follows the logits.
    return a.dtype == b.dtype and torch.equal(a, b)
