"""How many true experts each token got: a record per layer and position, and its tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adamoe.conversion import layer_routers, watch
from adamoe.errors import ConversionError
from adamoe.routing import Routing


@dataclass
class LoadRecord:
    """Loads of the forward passes inside `record_load`.

    tokens: (B, S) token ids, where given. mask: (B, S), False at padding.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    num_experts: int = 0
    layers: list[list[Tensor]] = field(default_factory=list)

    @property
    def per_token(self) -> Tensor:
        """True experts per layer and token: (L, B, S) when the tokens are known and one pass was made, else (L, T)."""
        if not self.layers or not self.layers[0]:
            raise ConversionError("no forward pass was recorded", hint="run the model inside record_load")
        flat = torch.stack([torch.cat(layer) for layer in self.layers])
        if self.tokens is not None and self.tokens.numel() == flat.shape[1]:
            return flat.view(len(flat), *self.tokens.shape)
        return flat

    def _check(self, given: Tensor | None, name: str) -> None:
        """Raises ConversionError when `given` is of other tokens than were recorded."""
        recorded = self.per_token[0].numel()
        if given is not None and given.numel() != recorded:
            raise ConversionError(
                f"{name} has {given.numel()} places, {recorded} tokens were recorded",
                hint="make one pass inside record_load, of the tokens it was given",
            )

    def _kept(self) -> Tensor:
        loads = self.per_token.flatten(1)
        self._check(self.mask, "attention_mask")
        if self.mask is not None:
            loads = loads[:, self.mask.reshape(-1).bool()]
        return loads

    @property
    def mean(self) -> float:
        """Mean load over layers and tokens that are not padding."""
        return float(self._kept().float().mean())

    def histogram(self) -> Tensor:
        """Share of (layer, token) pairs with 0, 1, ... true experts."""
        counts = torch.bincount(self._kept().flatten())
        return counts / counts.sum()

    def by_layer(self) -> Tensor:
        """Mean load of each layer, (L,)."""
        return self._kept().float().mean(1)

    def by_token(self) -> dict[int, tuple[float, int]]:
        """Token id to (mean load over layers and occurrences, occurrences). Needs `token_ids`."""
        if self.tokens is None:
            raise ConversionError("the record knows no tokens", hint="pass token_ids to record_load")
        self._check(self.tokens, "token_ids")
        loads, ids = self._kept().float().mean(0), self.tokens.reshape(-1)
        if self.mask is not None:
            ids = ids[self.mask.reshape(-1).bool()]
        result = {}
        for token in ids.unique().tolist():
            here = loads[ids == token]
            result[token] = (float(here.mean()), len(here))
        return result

    def to_dataframe(self) -> Any:
        """A pandas table of (layer, row, position, token, load), one line per layer and token (extra `pandas`)."""
        try:
            import pandas
        except ImportError as error:
            raise ConversionError("to_dataframe needs pandas", hint="pip install adamoe[pandas]") from error
        self._check(self.tokens, "token_ids")
        loads = self.per_token
        loads = loads if loads.dim() == 3 else loads.unsqueeze(1)
        layer, row, position = torch.meshgrid(*(torch.arange(n) for n in loads.shape), indexing="ij")
        table = pandas.DataFrame(
            {"layer": layer.flatten(), "row": row.flatten(), "position": position.flatten(), "load": loads.flatten()}
        )
        if self.tokens is not None:
            table.insert(3, "token", self.tokens[row.flatten(), position.flatten()])
        return table


@contextmanager
def record_load(
    model: Any, *, token_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Iterator[LoadRecord]:
    """Record the load of every forward pass inside the context.

    model: a converted model, or a wrapper around one. token_ids, attention_mask: (B, S) of the pass, for the tables.
    Raises ConversionError when the model has no null experts.
    """
    routers = list(layer_routers(model))
    if not routers:
        raise ConversionError("the model has no null experts to record", hint="call convert first")
    mask = None if attention_mask is None else attention_mask.bool().cpu()
    record = LoadRecord(None if token_ids is None else token_ids.cpu(), mask, routers[0].num_experts)
    places: dict[int, list[Tensor]] = {}

    def count(router: Any, routing: Routing) -> None:
        if id(router) not in places:
            places[id(router)] = []
            record.layers.append(places[id(router)])
        places[id(router)].append(routing.load(router.num_experts).cpu())

    with watch(model, count):
        yield record
