"""vLLM's own models with null gates, routers and experts in the place of the stock ones.

The expert blocks build `GateLinear` and `FusedMoEFactory` by the names in their module; these two are replaced while the
model is built, and put back.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adamoe.config import AdaMoEConfig
from adamoe.serving import ARCHITECTURES
from adamoe.vllm_plugin.checks import Settings, check_config, check_names, check_version, choose_mode


@contextmanager
def null_layers(module: Any, config: AdaMoEConfig, settings: Settings, mode: str) -> Iterator[None]:
    """Have the expert blocks of a family's module build null layers."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from adamoe.vllm_plugin.experts import AbsentRankExperts, CompactExperts, NullRunner
    from adamoe.vllm_plugin.gate import NullGate
    from adamoe.vllm_plugin.router import NullRouter

    stock_gate, stock_factory = module.GateLinear, module.FusedMoEFactory
    experts = {"compact": CompactExperts, "absent": AbsentRankExperts, "masked": RoutedExperts}[mode]
    gates: list[NullGate] = []

    def gate(input_size: int, output_size: int, **options: Any) -> NullGate:
        gates.append(NullGate(input_size, output_size, nulls=config.num_null_experts, **options))
        gates[-1].null_bias += settings.null_bias
        return gates[-1]

    def factory(**options: Any) -> Any:
        n, normalization = options["num_experts"], config.weight_normalization
        if normalization == "auto":
            normalization = "selected_true" if options.get("renormalize", True) else "all_true"
        top_k = config.resolve_top_k(n, options["top_k"])
        router = NullRouter(gates[-1], n, top_k, normalization=normalization, mode=mode, count=settings.count)
        options.update(top_k=top_k, router=router, routed_experts_cls=experts, runner_cls=NullRunner)
        return stock_factory(**options)

    module.GateLinear, module.FusedMoEFactory = gate, factory
    try:
        yield
    finally:
        module.GateLinear, module.FusedMoEFactory = stock_gate, stock_factory


def _make(name: str, module_name: str, stock_name: str) -> type:
    import vllm
    from vllm.platforms import current_platform

    check_version(vllm.__version__)
    module = importlib.import_module(f"vllm.model_executor.models.{module_name}")
    check_names(module)
    stock = getattr(module, stock_name)

    class Served(stock):  # type: ignore[misc, valid-type]
        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            cuda = current_platform.is_cuda_alike()
            config = check_config(vllm_config, cuda=cuda)
            settings = Settings.read((vllm_config.additional_config or {}).get("adamoe"))
            with null_layers(module, config, settings, choose_mode(settings, cuda=cuda)):
                super().__init__(vllm_config=vllm_config, prefix=prefix)

    Served.__name__ = Served.__qualname__ = name
    Served.__module__ = __name__
    return Served


def __getattr__(name: str) -> Any:
    for known, module_name, stock_name in ARCHITECTURES.values():
        if name == known:
            globals()[name] = _make(known, module_name, stock_name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
