"""What was fired: spikes by layer and step, their signs, what was wasted, and when each layer settled."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class SpikeRecord:
    """Spikes of one run. T steps, L layers (neuron sites, each call of a shared one on its own).

    A burst of n counts as n spikes.
    """

    layers: list[str]
    positive: Tensor
    """(T, L), spikes upward."""
    negative: Tensor
    """(T, L), spikes that take one back, or go below zero."""
    moving: Tensor
    """(T, L), neurons that fired."""
    neurons: Tensor
    """(L,), neurons, all samples of the batch together."""
    samples: int
    levels: list[Tensor]
    """Final tracer S of each layer."""

    @property
    def total(self) -> int:
        """All spikes."""
        return int(self.positive.sum() + self.negative.sum())

    @property
    def needed(self) -> Tensor:
        """(L,): the sum of |q|, fewer spikes than which cannot reach the levels from rest."""
        return torch.stack([level.abs().sum(dtype=torch.float64).long().cpu() for level in self.levels])

    @property
    def wasted(self) -> Tensor:
        """(L,): spikes beyond `needed`, which cancelled each other."""
        return self.positive.sum(0) + self.negative.sum(0) - self.needed

    @property
    def rate(self) -> Tensor:
        """(T, L): share of the neurons that fired."""
        return self.moving / self.neurons

    @property
    def settled_after(self) -> Tensor:
        """(L,): steps after which the layer fired no more; 0 for one that never fired."""
        steps = torch.arange(1, len(self.moving) + 1).unsqueeze(1)
        return (steps * (self.moving > 0)).max(0).values if len(self.moving) else torch.zeros(len(self.layers))

    def histogram(self, layer: str) -> dict[int, int]:
        """Level to number of neurons, at the end of the run. Raises KeyError for an unknown layer."""
        if layer not in self.layers:
            raise KeyError(layer)
        values, counts = self.levels[self.layers.index(layer)].unique(return_counts=True)
        return {int(v): int(c) for v, c in zip(values, counts, strict=True)}

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a layer: neurons, spikes for each sample, signs, wasted, when it settled."""
        needed, settled = self.needed, self.settled_after
        rows = []
        for i, name in enumerate(self.layers):
            up, down = int(self.positive[:, i].sum()), int(self.negative[:, i].sum())
            rows.append(
                {
                    "layer": name,
                    "neurons": int(self.neurons[i]) // self.samples,
                    "spikes a sample": (up + down) / self.samples,
                    "positive": up,
                    "negative": down,
                    "needed": int(needed[i]),
                    "wasted": up + down - int(needed[i]),
                    "settled after": int(settled[i]),
                }
            )
        return rows

    def csv(self) -> str:
        """`rows` as comma-separated values."""
        rows = self.rows()
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()


def record(
    layers: Sequence[str], steps: Sequence[Sequence[Sequence[float]]], *, levels: list[Tensor], samples: int
) -> SpikeRecord:
    """A SpikeRecord from, for each step and layer, (neurons that fired, sum of |o|, sum of o)."""
    table = torch.tensor(steps, dtype=torch.float64).reshape(len(steps), len(layers), 3).round().long()
    moving, both, net = table.unbind(-1)
    neurons = torch.tensor([level.numel() for level in levels])
    return SpikeRecord(list(layers), (both + net) // 2, (both - net) // 2, moving, neurons, samples, levels)
