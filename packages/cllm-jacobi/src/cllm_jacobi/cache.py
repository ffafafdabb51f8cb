"""Taking back keys and values: what a Jacobi pass wrote for tokens that turned out wrong.

Every pass feeds a block and keeps a prefix of it. A dynamic cache is cropped; a static one moves its write position back,
since stale slots are overwritten and hidden by causality. In a batch, rows keep different counts: either all keep the
smallest ("lockstep"), or all keep the largest and what a row refused becomes a hole in its attention mask ("holes").
"""

from typing import Any

import torch
from tenfold_shared.errors import UserError
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer


def open_cache(model: Any, *, kind: str = "dynamic", capacity: int = 0) -> Any:
    """An empty cache of `model` that can roll back.

    kind: "dynamic" or "static" (constant shapes, for torch.compile). capacity: slots of a static cache.

    Raises UserError, naming the layer class, when a layer cannot roll back; for encoder-decoder and stateful models too.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder model", hint="use a decoder-only model")
    if getattr(model, "_is_stateful", False):
        raise UserError(
            f"{type(model).__name__} keeps a recurrent state that cannot roll back", hint="use an attention model"
        )
    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=capacity) if kind == "static" else DynamicCache(config=config)
    check(cache)
    return cache


def check(cache: Any) -> None:
    """Raises UserError naming the first layer class of `cache` that cannot roll back."""
    for layer in cache.layers:
        if type(layer) is not StaticLayer and not layer.is_croppable:
            raise UserError(
                f"a cache layer of class {type(layer).__name__} cannot roll back", hint="use a dynamic cache of full or sliding attention"
            )  # fmt: skip


def is_static(cache: Any) -> bool:
    """Whether the cache has a constant shape."""
    return any(isinstance(layer, StaticLayer) for layer in cache.layers)


def allows_holes(cache: Any) -> bool:
    """Whether every layer is plain full attention; a sliding window would count a hole as a token."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def take_back(cache: Any, count: int) -> None:
    """Forget the last `count` tokens, 0 or more. Sliding layers also shrink to their window here."""
    if is_static(cache):
        for layer in cache.layers:
            # In place: a compiled graph holds this very tensor.
            layer.cumulative_length.sub_(count)
    else:
        cache.crop(-count)


def compact(cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    """Remove holes: every row's visible slots move to the right end. mask: (batch, slots) of 0 and 1.

    Returns the new mask, (batch, most visible slots). Keys carry their positions, so moving them changes nothing.
    """
    width = int(mask.sum(1).max())
    # A stable sort by visibility keeps the order of the visible slots.
    order = mask.argsort(dim=1, stable=True)[:, -width:]
    for layer in cache.layers:
        at = order[:, None, :, None].to(layer.keys.device)
        layer.keys = layer.keys.gather(2, at.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, at.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
    return mask.gather(1, order)
