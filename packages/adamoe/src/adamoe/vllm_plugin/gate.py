"""The gate with true and null rows in one matrix."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import GateLinear

from adamoe.errors import PluginError


class NullGate(GateLinear):
    """vLLM's GateLinear with n + m outputs, and the nulls' bias beside it. A gate is never quantised here."""

    def __init__(self, input_size: int, output_size: int, *, nulls: int, **options: Any):
        super().__init__(input_size, output_size + nulls, **{**options, "quant_config": None})
        self.true, self.nulls = output_size, nulls
        self.register_buffer("null_bias", torch.zeros((), dtype=torch.float32), persistent=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        """Rows of `weight` and `null_weight`, and `null_bias`. Raises PluginError when either rows are missing."""
        found = dict(weights)
        if missing := {"weight", "null_weight"} - found.keys():
            raise PluginError(f"the gate has no {', '.join(sorted(missing))}", hint="serve a converted checkpoint")
        if foreign := found.keys() - {"weight", "null_weight", "null_bias"}:
            raise PluginError(
                f"the gate's {', '.join(sorted(foreign))} cannot be served", hint="use an unquantised gate"
            )
        shapes = found["weight"].shape[0], found["null_weight"].shape[0]
        if shapes != (self.true, self.nulls):
            raise PluginError(f"the gate has {shapes} true and null rows, expected {(self.true, self.nulls)}")
        with torch.no_grad():
            self.weight[: self.true].copy_(found["weight"])
            self.weight[self.true :].copy_(found["null_weight"])
            self.null_bias += found.get("null_bias", torch.zeros(())).to(self.null_bias)
        yield "weight"
