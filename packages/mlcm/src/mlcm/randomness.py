"""Random rows that do not depend on how a batch is cut.

Every process draws the whole global batch from the same generator and keeps its own rows, so two processes train on what
one process would. Generators are seeded by (seed, stage, step): a resumed run needs no generator state.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class RowNoise:
    """Draws with one row per sample.

    generators: each draws `rows` rows; several of them lie one after the other. keep: this process's part of all rows.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        rows: int,
        *,
        keep: slice | Tensor = slice(None),
        device: torch.device | str = "cpu",
    ):
        self.generators, self.rows, self.keep, self.device = generators, rows, keep, device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, (kept rows, *shape)."""
        drawn = torch.cat([torch.randn(self.rows, *shape, generator=g) for g in self.generators])
        return drawn[self.keep].to(self.device)

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), (kept rows,)."""
        drawn = torch.cat([torch.rand(self.rows, generator=g) for g in self.generators])
        return drawn[self.keep].to(self.device)

    def integers(self, low: Tensor | int, high: Tensor | int) -> Tensor:
        """Uniform whole numbers from low to high, both included, long (kept rows,)."""
        u = self.uniform()
        low, high = torch.as_tensor(low, device=self.device), torch.as_tensor(high, device=self.device)
        return (low + (u * (high - low + 1)).floor().long()).minimum(high).long()


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on every one of the numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 0x9E3779B9) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


@contextmanager
def initialised_from(seed: int) -> Iterator[None]:
    """New layers get the same weights in every process and run; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
