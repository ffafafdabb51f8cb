"""The router: `adamoe.routing.route` behind vLLM's interface."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from adamoe.config import Normalization
from adamoe.routing import route
from adamoe.vllm_plugin.slots import mask_slots


class NullRouter(BaseRouter):
    """Chooses K of n + m experts; a null slot has expert n and weight 0, or in masked mode some expert and weight 0.

    gate: the NullGate whose bias is used. count: keep `tokens` and `pairs` on the device.
    """

    def __init__(
        self, gate: Any, num_experts: int, top_k: int, *, normalization: Normalization, mode: str, count: bool
    ):
        super().__init__(top_k=top_k, global_num_experts=num_experts)
        self.gate, self.normalization, self.mode, self.count = gate, normalization, mode, count
        self.tokens: int = 0
        self.pairs: Tensor | int = 0

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """Custom: read when the kernel is chosen, so that none is taken that routes by itself."""
        return RoutingMethodType.Custom

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        routing = route(
            router_logits,
            self.global_num_experts,
            self.top_k,
            normalization=self.normalization,
            null_bias=self.gate.null_bias,
        )
        weights, index = routing.weights.float(), routing.index
        if self.count:
            self.tokens += len(index)
            self.pairs = self.pairs + (index < self.global_num_experts).sum()
        if self.mode == "masked":
            index = mask_slots(weights, index, self.global_num_experts)
        return weights, index.to(indices_type or torch.int32)
