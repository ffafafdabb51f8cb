"""Time of an expert layer against its load, beside the stock paths and the dense floor.

The floor is one pair of dense products with as many rows as there are true pairs: no expert layer can be faster. All paths
are timed in turn in one process; of the repeats the second best counts, which neither a busy machine nor one lucky call
moves. CPU seconds on CPU, wall seconds after a synchronisation elsewhere.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from tenfold_shared.cli import Table
from torch import Tensor

import adamoe.kernels  # noqa: F401 - registers the kernels
from adamoe.errors import ConfigError

STOCK = ("eager", "grouped_mm")
OURS = ("adamoe", "adamoe_loop", "adamoe_grouped")
CASES = ((2, 2.0), (3, 5 / 3), (3, 1.0))
"""(slots K, true experts per token) of the table."""


def routing(tokens: int, experts: int, top_k: int, load: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random routing with exactly round(load * tokens) true pairs, at most `top_k` a token: index and weights (T, K)."""
    if not 0 <= load <= top_k:
        raise ConfigError(f"load is {load}, expected 0 to top_k = {top_k}")
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k].clone()
    whole, extra = divmod(round(load * tokens), tokens)
    kept = torch.full((tokens,), whole)
    kept[torch.randperm(tokens, generator=g)[:extra]] += 1
    index[torch.arange(top_k) >= kept.unsqueeze(-1)] = experts
    weights = torch.rand(tokens, top_k, generator=g) * (index < experts)
    return index, weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)


def second_best(calls: dict[str, Callable[[], Any]], repeats: int, *, cuda: bool = False) -> dict[str, float]:
    """Seconds of each call, timed in turn."""

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                seconds[name].append(clock() - start)
    return {name: sorted(values)[min(1, len(values) - 1)] for name, values in seconds.items()}


@torch.no_grad()
def layer_seconds(
    *, hidden: int = 512, inner: int = 1024, experts: int = 8, tokens: int = 1024, repeats: int = 6, seed: int = 0,
    dtype: torch.dtype = torch.float32, device: str = "cpu", cases: tuple[tuple[int, float], ...] = CASES,
) -> dict[tuple[str, float], float]:  # fmt: skip
    """Seconds of a forward pass for (path, load): the stock paths, ours, LongCat-Flash's experts, and the floor."""
    from transformers import LongcatFlashConfig, MixtralConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(seed)
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    layer = MixtralExperts(config).to(device, dtype)
    layer._is_expert_parallel = True
    cat_config = LongcatFlashConfig(
        hidden_size=hidden, expert_ffn_hidden_size=inner, n_routed_experts=experts, zero_expert_num=experts
    )
    cat = LongcatFlashExperts(cat_config).to(device, dtype)
    for p in (*layer.parameters(), *cat.parameters()):
        p.normal_(std=0.02)
    x = torch.randn(tokens, hidden).to(device, dtype)
    up, down = layer.gate_up_proj[0], layer.down_proj[0]

    def run(path: str, index: Tensor, weights: Tensor) -> Callable[[], Any]:
        def call() -> Any:
            config._experts_implementation = path
            return layer(x, index, weights)

        return call

    def floor(rows: Tensor) -> Callable[[], Any]:
        def call() -> Any:
            gate, value = torch.nn.functional.linear(rows, up).chunk(2, -1)
            return torch.nn.functional.linear(layer.act_fn(gate) * value, down)

        return call

    calls: dict[str, Callable[[], Any]] = {}
    names: dict[str, tuple[str, float]] = {}
    for top_k, load in cases:
        index, weights = routing(tokens, experts, top_k, load, seed=seed)
        index, weights = index.to(device), weights.to(device, dtype)
        pairs = int((index < experts).sum())
        rows = x.repeat(-(-pairs // tokens), 1)[:pairs].contiguous()
        own = {path: run(path, index, weights) for path in (*STOCK, *OURS)}
        own["longcat"] = lambda index=index, weights=weights: cat(x, index, weights)  # type: ignore[misc]
        own["dense floor"] = floor(rows)
        for path, call in own.items():
            key = f"{path} {load}"
            calls[key], names[key] = call, (path, load)
    seconds = second_best(calls, repeats, cuda=torch.device(device).type == "cuda")
    return {names[key]: value for key, value in seconds.items()}


def layer_table(
    *,
    hidden: int = 512,
    inner: int = 1024,
    tokens: int = 1024,
    repeats: int = 6,
    dtype: str = "float32",
    device: str = "cpu",
) -> Table:
    """Milliseconds by load and path. Raises ConfigError for an unknown dtype."""
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype is '{dtype}'", hint="take float32 or bfloat16")
    found = layer_seconds(
        hidden=hidden, inner=inner, tokens=tokens, repeats=repeats, dtype=getattr(torch, dtype), device=device
    )
    paths = list(dict.fromkeys(path for path, _ in found))
    rows = [[f"{load:.2f}", *(1000 * found[path, load] for path in paths)] for _, load in CASES]
    return Table(
        f"milliseconds of a layer: {tokens} tokens, d {hidden}, I {inner}, {dtype}, {device}", ["load", *paths], rows
    )


def training_table(make: Callable[[], Any], tokens: Tensor, *, repeats: int = 5) -> Table:
    """Milliseconds of a training step: stock, converted, and converted with a lower load.

    make: gives a fresh stock model. tokens: (B, S).
    """
    from adamoe.calibration import set_load
    from adamoe.config import AdaMoEConfig
    from adamoe.conversion import convert
    from adamoe.records import record_load

    models = {"stock top-2": make(), "AdaMoE": convert(make(), AdaMoEConfig(null_init="copy_noise"))}
    models["AdaMoE, null bias 0.05"] = set_load(convert(make(), AdaMoEConfig(null_init="copy_noise")), null_bias=0.05)
    loads = {}
    for name, model in models.items():
        model.train()
        loads[name] = 2.0
        if name != "stock top-2":
            with record_load(model) as record, torch.no_grad():
                model(tokens)
            loads[name] = record.mean

    def step(model: Any) -> Callable[[], Any]:
        return lambda: model(tokens, labels=tokens).loss.backward()

    seconds = second_best({name: step(model) for name, model in models.items()}, repeats)
    rows = [[name, round(loads[name], 3), 1000 * value] for name, value in seconds.items()]
    return Table(
        f"milliseconds of a training step, forward and backward, {tokens.shape[0]} x {tokens.shape[1]} tokens",
        ["model", "load", "ms"],
        rows,
    )
