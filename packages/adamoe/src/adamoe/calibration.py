"""Any load from one checkpoint, without a gradient: one number added to the nulls' scores.

The r-th best true expert of a token is selected exactly when its score is at least that of the (K - r + 1)-th best null.
So each token gives min(K, n) margins, true score minus null score, and a bias b leaves selected those whose margin is at
least b. The bias of a wanted load is a quantile of the margins.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from adamoe.conversion import base_of, layer_routers, routers_by_layer, watch
from adamoe.errors import ConfigError
from adamoe.records import record_load
from adamoe.routing import Routing


def set_load(model: Any, *, null_bias: float | Iterable[float]) -> Any:
    """Set the nulls' bias, for all layers or one number each; above 0 lowers the load. Returns the model.

    It is saved with the model. Raises ConfigError when the numbers are not one, or one for every layer.
    """
    base_of(model)
    layers = routers_by_layer(model)
    values = torch.as_tensor(null_bias if hasattr(null_bias, "__float__") else list(null_bias)).double().tolist()
    values = values if isinstance(values, list) else [values] * len(layers)
    if len(values) != len(layers):
        raise ConfigError(f"null_bias has {len(values)} numbers, the model {len(layers)} layers with null experts")
    if any(b != b for b in values):
        raise ConfigError("null_bias is not a number")
    for layer, value in zip(layers, values, strict=True):
        for router in layer:
            router.null_bias.fill_(value)
    return model


def margins(scores: Tensor, num_experts: int, top_k: int) -> Tensor:
    """True-minus-null margins of each token, (T, min(K, n)), for a null bias of zero.

    scores: (T, n + m) from `selection_scores` without a bias. An expert that no null can displace has margin inf.
    """
    n, m = num_experts, scores.shape[-1] - num_experts
    true = scores[:, :n].topk(min(top_k, n), -1)[0]
    null = scores[:, n:].topk(min(top_k, m), -1)[0]
    # The r-th best true expert meets the (K - r + 1)-th best null, where there are so many.
    rivals = torch.full((len(scores), top_k), -torch.inf, device=scores.device)
    rivals[:, : null.shape[1]] = null
    return true - rivals.flip(-1)[:, : true.shape[1]]


@torch.no_grad()
def calibrate(
    model: Any, loader: Iterable[Any], *, target_load: float, per_layer: bool = False, rounds: int = 4,
    tolerance: float = 0.02,
) -> float:  # fmt: skip
    """Set the null bias so that the mean load on `loader` is `target_load`; returns the load reached.

    loader: token ids (B, S), or mappings with input_ids and attention_mask. per_layer: every layer gets the load, by a
    bias of its own; otherwise one bias serves all layers and the load is their mean. rounds: a layer's bias changes what
    later layers see, so the quantile is taken this many times.

    Raises ConfigError when the load cannot be reached. Warns when it is missed by more than `tolerance`, which happens when
    null rows are still exact copies: their margins are all zero, and no bias divides them.
    """
    settings = base_of(model).adamoe.config
    routers = list(layer_routers(model))
    settings.check_target(target_load, routers[0].num_experts, routers[0].adamoe_top_k)
    batches = [b if isinstance(b, dict) else {"input_ids": b} for b in loader]
    if not batches:
        raise ConfigError("there is nothing to calibrate on", hint="pass at least one batch of tokens")
    was_training = model.training
    model.eval()
    tried: list[tuple[float, list[float], float]] = []
    for _ in range(rounds):
        found = _margins(model, batches, routers)
        groups = found if per_layer else [torch.cat(found)]
        values = [_quantile(group, target_load) for group in groups]
        set_load(model, null_bias=values if per_layer else values[0])
        load = mean_load(model, batches)
        tried.append((abs(load - target_load), values, load))
        if tried[-1][0] <= tolerance / 10:
            break
    error, values, load = min(tried, key=lambda t: t[0])
    set_load(model, null_bias=values if per_layer else values[0])
    model.train(was_training)
    if error > tolerance:
        warnings.warn(
            f"the load is {load:.3f}, {target_load} was asked for; rows that are still copies give no load in between: "
            "train them, or convert with null_init='copy_noise'",
            stacklevel=2,
        )
    return load


def mean_load(model: Any, batches: Iterable[dict[str, Any]]) -> float:
    """Mean true experts per token over layers and batches, padding left out."""
    total, count = 0.0, 0
    for batch in batches:
        mask = batch.get("attention_mask")
        with record_load(model, token_ids=batch["input_ids"], attention_mask=mask) as record:
            model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
        tokens = int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        total, count = total + record.mean * tokens, count + tokens
    return total / max(count, 1)


def _margins(model: Any, batches: list[dict[str, Any]], routers: list[Any]) -> list[Tensor]:
    """Per layer, the margins of all tokens that are not padding, one row each."""
    kept: dict[int, list[Tensor]] = {id(router): [] for router in routers}
    mask: Tensor | None = None

    def keep(router: Any, routing: Routing) -> None:
        found = margins(router.adamoe_scores(routing.logits), router.num_experts, router.adamoe_top_k)
        kept[id(router)].append(found if mask is None else found[mask.reshape(-1).bool()])

    with watch(model, keep):
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
    # A router that PEFT keeps frozen beside the one it trains sees no token.
    return [torch.cat(store) for store in kept.values() if store]


def _quantile(found: Tensor, target: float) -> float:
    """The bias at which `target` margins per row are left."""
    values = found.flatten().sort(descending=True)[0]
    keep = round(target * len(found))
    if keep <= 0:
        finite = values[values.isfinite()]
        return float(finite[0]) + 1.0
    if keep >= len(values):
        finite = values[values.isfinite()]
        return float(finite[-1]) - 1.0 if len(finite) else 0.0
    # Between the last that stays and the first that goes, so that rounding of the sum decides nothing.
    last, first = float(values[keep - 1]), float(values[keep])
    return (last + first) / 2 if last < float("inf") and first > -float("inf") else last
