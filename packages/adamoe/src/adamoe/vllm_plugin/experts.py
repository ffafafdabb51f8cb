"""Expert layers that multiply no row for a null slot.

On CPU the kernels ignore the expert map and do not check ids, so the true pairs are gathered first. On CUDA nulls are
experts of an absent rank: the kernels drop such slots while they sort, with shapes that do not depend on the routing.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from adamoe.errors import PluginError
from adamoe.vllm_plugin.checks import check_kernel
from adamoe.vllm_plugin.slots import extended_map, true_pairs


class CompactExperts(RoutedExperts):
    """The stock kernel on the gathered true pairs, one expert a row; results are added up in float32.

    rows: rows given to the kernel so far.
    """

    rows = 0

    def forward_modular(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> Tensor:
        """x: (T, d). topk_weights, topk_ids: (T, K), n for no expert."""
        if shared_experts is not None:
            raise PluginError("shared experts inside the expert kernel", hint='set nulls to "masked"')
        token, weights, index = true_pairs(topk_weights, topk_ids, self.global_num_experts)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        self.rows += len(token)
        if len(token):
            result = super().forward_modular(x[token], weights.contiguous(), index.contiguous())
            total.index_add_(0, token, result.float())
        return total.to(x.dtype)


class AbsentRankExperts(RoutedExperts):
    """The stock kernel with an expert n that lives on no rank."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.true_experts: int = self.moe_config.num_experts
        self.global_num_experts = self.true_experts + 1

    @property
    def expert_map(self) -> Tensor:
        """(n + 1,) int32."""
        kernel = getattr(self.quant_method, "moe_kernel", None)
        if kernel is not None:
            check_kernel(type(kernel.fused_experts).__name__, "absent")
        return extended_map(self._expert_map, self.true_experts, self.w13_weight.device)


class NullRunner(MoERunner):
    """The stock runner; its work is an opaque operation for torch.compile on CPU too, as the gathering needs."""

    def _select_forward(self) -> Any:
        operations = torch.ops.vllm
        return operations.moe_forward if self._shared_experts is None else operations.moe_forward_shared
