"""Null experts for a model of transformers, in place, and back.

A router keeps its class's place in the model: it becomes an instance of a subclass with the null rows beside `weight`, so
that recorded router logits, gradient checkpointing, PEFT and the checkpoint layout stay what they were. `config.adamoe`
holds the settings; `model_type`, `architectures` and `num_experts_per_tok` stay as they are, so the stock library still
opens the checkpoint, as the stock model.
"""

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import adamoe.kernels as kernels
from adamoe.config import AdaMoEConfig, preserving_top_k
from adamoe.errors import ConversionError
from adamoe.families import FAMILIES, Family, family_of
from adamoe.loss import aux_coefficient, load_balancing_loss
from adamoe.routing import Routing, route, selection_scores

logger = logging.getLogger("adamoe")
PARAMETERS = ("null_weight", "null_gate_bias", "null_correction", "null_bias")


class NullRouting(nn.Module):
    """What a stock router gains: null rows, a bias for all of them, and the selection of `adamoe.routing.route`.

    null_weight: (m, d). null_bias: a scalar buffer, added to every null's score; a lower load with a positive value.
    null_gate_bias, null_correction: (m,), where the family's router has such a vector for the true experts.
    """

    adamoe_config: AdaMoEConfig
    adamoe_family: Family
    adamoe_top_k: int
    adamoe_watchers: list[Callable[[Any, Routing], None]]
    adamoe_router: Callable[..., Routing] | None

    def adamoe_attach(self: Any, config: AdaMoEConfig, family: Family, *, top_k: int) -> None:
        """Add the null rows, uninitialised; the caller has set the class."""
        self.adamoe_config, self.adamoe_family, self.adamoe_top_k = config, family, top_k
        self.adamoe_watchers, self.adamoe_router = [], None
        m, weight = config.num_null_experts, self.weight
        self.null_weight = nn.Parameter(weight.new_zeros(m, weight.shape[1]), requires_grad=weight.requires_grad)
        self.register_buffer("null_bias", torch.zeros((), dtype=torch.float32, device=weight.device))
        if getattr(self, "bias", None) is not None:
            self.null_gate_bias = nn.Parameter(weight.new_zeros(m), requires_grad=weight.requires_grad)
        if family.correction is not None:
            self.register_buffer("null_correction", torch.zeros(m, dtype=torch.float32, device=weight.device))

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Float32 whatever the model is cast to: the load controller's steps are below bfloat16's resolution.
        before = self.null_bias
        super()._apply(fn, recurse)
        if self.null_bias.dtype != torch.float32:
            self.null_bias = before.to(self.null_bias.device) if not before.is_meta else self.null_bias.float()
        return self

    @torch.no_grad()
    def adamoe_initialise(self: Any) -> None:
        """Fill the null rows as `null_init` says."""
        config, n = self.adamoe_config, self.num_experts
        source = torch.arange(config.num_null_experts, device=self.weight.device) % n
        if config.null_init in ("copy", "copy_noise"):
            self.null_weight.copy_(self.weight[source])
            if hasattr(self, "null_gate_bias"):
                self.null_gate_bias.copy_(self.bias[source])
            if hasattr(self, "null_correction"):
                self.null_correction.copy_(self.adamoe_correction().reshape(-1)[source])
        else:
            self.null_weight.zero_()
        if config.null_init == "copy_noise":
            self.null_weight.add_(torch.randn_like(self.null_weight) * 0.01 * self.weight.std())
        self.null_bias.zero_()

    def adamoe_correction(self: Any) -> Tensor | None:
        """The family's selection bias of the true experts, (n,)."""
        found = self
        for name in (self.adamoe_family.correction or "").split("."):
            found = getattr(found, name) if name else None
        return found

    def adamoe_full_correction(self: Any) -> Tensor | None:
        """The same with the nulls', (n + m,)."""
        correction = self.adamoe_correction()
        return None if correction is None else torch.cat((correction.reshape(-1), self.null_correction.to(correction)))

    def adamoe_logits(self: Any, hidden: Tensor) -> Tensor:
        """(T, n + m), the nulls last."""
        family, bias = self.adamoe_family, getattr(self, "bias", None)
        rows, null_rows = self.weight, self.null_weight
        if family.float32:
            hidden, rows, null_rows = hidden.float(), rows.float(), null_rows.float()
        # Computed block by block of n rows, as the true ones are: only then do copies tie with them to the last bit.
        n = self.num_experts
        with torch.autocast(hidden.device.type, enabled=False) if not family.autocast else nullcontext():
            true = linear(hidden, rows, bias)
            blocks = [
                linear(hidden, null_rows[i : i + n], None if bias is None else self.null_gate_bias[i : i + n])
                for i in range(0, null_rows.shape[0], n)
            ]
        return torch.cat([true, *blocks], -1)

    def adamoe_scores(self: Any, logits: Tensor) -> Tensor:
        """What the top-K is taken of, without the null bias, (T, n + m)."""
        return selection_scores(
            logits, self.num_experts, score=self.adamoe_family.score, groups=self.adamoe_groups(),
            correction=self.adamoe_full_correction(),
        )  # fmt: skip

    def adamoe_route(self: Any, logits: Tensor) -> Routing:
        """Selection and weights for logits (T, n + m)."""
        family, config = self.adamoe_family, self.adamoe_config
        if self.adamoe_router is not None:
            return self.adamoe_router(logits, self.num_experts, self.adamoe_top_k)
        normalise = getattr(self, family.normalise) if isinstance(family.normalise, str) else family.normalise
        normalization = config.weight_normalization
        if normalization == "auto":
            normalization = ("selected_true" if normalise else "all_true") if config.null_type == "zero" else (
                "selected_all" if normalise else "none"
            )  # fmt: skip
        return route(
            logits, self.num_experts, self.adamoe_top_k, original_top_k=self.top_k, score=family.score,
            normalization=normalization, weight_gradient=config.weight_gradient, null_bias=self.null_bias,
            correction=self.adamoe_full_correction(), groups=self.adamoe_groups(), identity=config.null_type == "identity",
            scaling=getattr(self, family.scaling) if family.scaling else 1.0, floor=getattr(self, "norm_min", None), jitter=getattr(self, "router_jitter_noise", 0.0),
        )  # fmt: skip

    def adamoe_groups(self: Any) -> tuple[int, int] | None:
        """(groups, chosen groups), where the family limits selection to groups of experts."""
        if not self.adamoe_family.groups or getattr(self, "topk_method", "") == "greedy":
            return None
        return (self.num_group, self.topk_group) if self.num_group and self.num_group > 1 else None

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states: (..., d). Returns logits (T, n + m), weights (T, K) and experts (T, K), n for none."""
        if not self.null_weight.shape[0] and self.adamoe_top_k == self.top_k and self.adamoe_router is None:
            logits, weights, index = super().forward(hidden_states)
            routing = Routing(logits, weights, index, index)
        else:
            if self.training and self.adamoe_family.score == "sparsemixer":
                raise ConversionError(
                    "the router of phimoe samples experts while training, which null experts do not support",
                    hint="call model.eval(), or train the model before converting it",
                )
            hidden = hidden_states.reshape(-1, self.weight.shape[1])
            routing = self.adamoe_route(self.adamoe_logits(hidden))
            weights = routing.weights.to(hidden_states.dtype)
            logits, index = routing.logits, routing.index
        for watcher in self.adamoe_watchers:
            watcher(self, routing)
        return logits, weights, index


_SUBCLASSES: dict[type, type] = {}


def null_router_class(stock: type) -> type:
    """The subclass of a stock router class with null experts; made once."""
    if stock not in _SUBCLASSES:
        _SUBCLASSES[stock] = type(f"AdaMoE{stock.__name__}", (NullRouting, stock), {"__module__": __name__})
    return _SUBCLASSES[stock]


def __getattr__(name: str) -> Any:
    """The routers' classes by name, as pickle looks for them."""
    for family in FAMILIES.values():
        if name == f"AdaMoE{family.router}":
            return null_router_class(family.router_class())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class NullBalance:
    """The hooks of a converted model: they add alpha times eq. 6 to its loss and count the load.

    progress: share of training done, in [0, 1]; sets alpha by the annealing schedule.
    load, tokens: sums over the forward passes since `reset`, per layer, while `counting`, for the load controller.
    """

    def __init__(self, config: AdaMoEConfig):
        self.config = config
        self.progress = 0.0
        self.wants_logits = False
        self.seen: list[tuple[Any, Routing]] = []
        self.counting = config.target_load is not None
        self.load: Tensor | None = None
        self.tokens: Tensor | float = 0.0

    @property
    def coefficient(self) -> float:
        """alpha at the present progress."""
        return aux_coefficient(self.config, self.progress)

    def reset(self) -> None:
        """Forget the counted load."""
        self.load, self.tokens = None, 0.0

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Pre-hook: have the routers record, and keep the stock loss, which knows no nulls, from running.

        Raises ConversionError under torch.nn.DataParallel, whose replicas share one record.
        """
        if getattr(model, "_is_replica", False):
            raise ConversionError(
                "the balance loss does not work in torch.nn.DataParallel", hint="start the run with accelerate launch"
            )
        given = _by_name(model, args, kwargs)
        wanted = given.get("output_router_logits")
        self.wants_logits = bool(getattr(model.config, "output_router_logits", False) if wanted is None else wanted)
        if self.wants_logits or given.get("labels") is not None:
            for router in layer_routers(model):
                router.adamoe_watchers.append(self)
        if "output_router_logits" in inspect.signature(model.forward).parameters:
            kwargs["output_router_logits"] = False
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook: take the records, and add the loss in training."""
        # Ended before the backward pass, whose recomputation under gradient checkpointing must not be seen again.
        for router in layer_routers(model):
            if self in router.adamoe_watchers:
                router.adamoe_watchers.remove(self)
        routers, routings = [r for r, _ in self.seen], [routing for _, routing in self.seen]
        self.seen = []
        if output is None or not routings:
            return output
        given = _by_name(model, args, kwargs)
        mask, labels = given.get("attention_mask"), given.get("labels")
        mask = mask if mask is not None and mask.dim() == 2 and mask.numel() == routings[0].index.shape[0] else None
        trained = model.training and labels is not None
        if trained and self.coefficient and torch.is_grad_enabled():
            _check_gradient(routers, routings)
        if trained and self.counting:
            self._count(routers, routings, mask)
        if trained or self.wants_logits:
            aux = load_balancing_loss(
                [r.logits for r in routings], routers[0].num_experts, top_k=routings[0].selected.shape[-1],
                attention_mask=mask, balance=self.config.balance, aux_reduction=self.config.aux_reduction,
                selected=[r.selected for r in routings], score=routers[0].adamoe_family.score,
            )  # fmt: skip
            added = self.coefficient * _share(given) * aux if trained and self.coefficient else None
            if isinstance(output, tuple):
                return output if added is None else (output[0] + added.to(output[0].device), *output[1:])
            if added is not None and output.loss is not None:
                output["loss"] = output.loss + added.to(output.loss.device)
            if "aux_loss" in type(output).__dataclass_fields__:
                output["aux_loss"] = aux
            if self.wants_logits and "router_logits" in type(output).__dataclass_fields__:
                output["router_logits"] = tuple(r.logits for r in routings)
        return output

    def __call__(self, router: Any, routing: Routing) -> None:
        """Watcher of the routers."""
        self.seen.append((router, routing))

    @torch.no_grad()
    def _count(self, routers: list[Any], routings: list[Routing], mask: Tensor | None) -> None:
        device = routings[0].index.device
        loads = torch.stack([r.load(q.num_experts).float().to(device) for q, r in zip(routers, routings, strict=True)])
        keep = torch.ones(loads.shape[1], device=device) if mask is None else mask.reshape(-1).to(loads)
        total = (loads * keep).sum(1)
        self.load = total if self.load is None else self.load + total
        self.tokens = self.tokens + keep.sum()


def _by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name: a mask or labels may be given by position."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def _check_gradient(routers: list[Any], routings: list[Routing]) -> None:
    """Raises ConversionError when routers that are trained gave logits without a gradient."""
    for router, routing in zip(routers, routings, strict=True):
        if router.null_weight.requires_grad and not routing.logits.requires_grad:
            raise ConversionError(
                "reentrant gradient checkpointing gives the balance loss no gradient",
                hint="pass gradient_checkpointing_kwargs={'use_reentrant': False}",
            )


def _share(kwargs: dict[str, Any]) -> Tensor | float:
    """This micro-batch's part of the step, where the trainer divides by the step's token count and not by the batches."""
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    labels = kwargs["shift_labels"] if kwargs.get("shift_labels") is not None else kwargs["labels"][..., 1:]
    return labels.ne(-100).sum() / items


def layer_routers(model: nn.Module) -> Iterator[Any]:
    """The routers with null experts, in the order of the layers. PEFT keeps a frozen original before the copy it trains."""
    for module in model.modules():
        # Not hasattr: PEFT's wrappers answer for the module inside them.
        if "adamoe_watchers" in vars(module):
            yield module


def routers_by_layer(model: nn.Module) -> list[list[Any]]:
    """The same, one list a layer: the router, or PEFT's frozen original and the copies of it."""
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if "adamoe_watchers" in vars(module):
            place = name.partition(".original_module")[0].partition(".modules_to_save.")[0]
            found.setdefault(place, []).append(module)
    return list(found.values())


@contextmanager
def watch(model: nn.Module, watcher: Callable[[Any, Routing], None]) -> Iterator[None]:
    """Have every router tell `watcher(router, routing)` of each decision inside the context."""
    routers = list(layer_routers(model))
    for router in routers:
        router.adamoe_watchers.append(watcher)
    try:
        yield
    finally:
        for router in routers:
            router.adamoe_watchers.remove(watcher)


def is_converted(model: nn.Module) -> bool:
    """Whether `model` has null experts."""
    return any(True for _ in layer_routers(model))


def convert(model: Any, config: AdaMoEConfig | None = None, *, top_k: int | None = None) -> Any:
    """Give a mixture-of-experts model null experts, in place; returns it.

    model: a model of transformers of a supported family, bare or wrapped by PEFT, on any device, meta included; before
    it is wrapped for DDP or FSDP. config: the settings. top_k: K, instead of the settings'.

    With `top_k="preserve"` and copied rows the function stays the same. A K that changes it is warned about.
    Raises ConversionError for a converted, dense or quantised model, UnknownFamilyError, ConfigError.
    """
    config = config or AdaMoEConfig()
    if top_k is not None:
        config = AdaMoEConfig.from_dict({**config.to_dict(), "top_k": top_k})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "config"):
        raise ConversionError(
            f"{type(base).__name__} is not a model of transformers", hint="convert the model before it is wrapped"
        )
    if hasattr(base, "molora"):
        raise ConversionError("the model has mixtures of LoRA, which have nulls of their own")
    if is_converted(base):
        raise ConversionError("the model already has null experts", hint="call revert first")
    if getattr(base, "hf_quantizer", None) is not None or getattr(base.config, "quantization_config", None):
        raise ConversionError(
            f"the model is quantised ({type(base).__name__}); its fused experts would be trained in 16 bit by surprise",
            hint="load it without a quantization_config",
        )
    family = family_of(_text_config(base).model_type) if _has_experts(base) else None
    routers: list[Any] = [] if family is None else [m for m in base.modules() if isinstance(m, family.router_class())]
    if family is None or not routers:
        raise ConversionError(
            f"no mixture-of-experts layers found in {type(base).__name__}", hint="use adamoe.molora for a dense model"
        )
    if config.experts_implementation == "eager" and not family.eager:
        raise ConversionError(
            f"the eager path of {family.model_type} knows no empty slot", hint="leave experts_implementation at auto"
        )
    n, k0 = routers[0].num_experts, routers[0].top_k
    K = config.resolve_top_k(n, k0)
    if config.target_load is not None:
        config.check_target(config.target_load, n, K)
    kept = preserving_top_k(n, config.num_null_experts, k0)
    if config.null_init == "copy" and (kept is None or K not in kept):
        where = (
            f"K from {kept[0]} to {kept[-1]} would keep it"
            if kept
            else f"only multiples of {n} null experts can keep it"
        )
        warnings.warn(
            f"top_k {K} with {config.num_null_experts} null experts changes the function; {where}", stacklevel=2
        )
    attach(base, config, family, routers=routers, top_k=K)
    for router in routers:
        router.adamoe_initialise()
    logger.info("%d layers have %d null experts; K is %d", len(routers), config.num_null_experts, K)
    return model


def attach(base: Any, config: AdaMoEConfig, family: Family, *, routers: list[Any], top_k: int) -> None:
    """Turn stock routers into null routers without filling the rows; set kernels, hooks and `config.adamoe`."""
    for router in routers:
        router.__class__ = null_router_class(type(router))
        router.adamoe_attach(config, family, top_k=top_k)
    for module in _expert_modules(base):
        # The stock kernels honour "no expert" only with this flag; without it they read uninitialised rows.
        module._is_expert_parallel = True
        if config.null_type == "identity":
            module.adamoe_hook = module.register_forward_hook(kernels.add_identity, with_kwargs=True)
    base.adamoe_before = getattr(base.config, "_experts_implementation", None)
    implementation = config.experts_implementation
    if implementation == "auto":
        unchanged = not config.num_null_experts and top_k == routers[0].top_k
        implementation = base.adamoe_before if unchanged else "adamoe"
    _set_experts(base, implementation)
    resolved = AdaMoEConfig.from_dict({**config.to_dict(), "top_k": top_k})
    base.config.adamoe = resolved.to_dict()
    base.adamoe = NullBalance(resolved)
    base.adamoe_handles = (
        base.register_forward_pre_hook(base.adamoe.before, with_kwargs=True),
        base.register_forward_hook(base.adamoe.after, with_kwargs=True, always_call=True),
    )


def revert(model: Any) -> Any:
    """Take the null experts away, in place: the stock router with its rows as they are now. Returns the model.

    Raises ConversionError when there are none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    routers = list(layer_routers(base))
    if not routers:
        raise ConversionError("the model has no null experts to take away")
    if hasattr(base, "molora"):
        raise ConversionError("mixtures of LoRA are not taken away", hint="load the dense model anew")
    for router in routers:
        drop_extra(router)
        for name in PARAMETERS:
            if hasattr(router, name):
                delattr(router, name)
        for name in ("adamoe_config", "adamoe_family", "adamoe_top_k", "adamoe_watchers", "adamoe_router"):
            delattr(router, name)
        router.__class__ = next(c for c in type(router).__mro__[1:] if c is not NullRouting)
    for module in _expert_modules(base):
        module._is_expert_parallel = False
        if hasattr(module, "adamoe_hook"):
            module.adamoe_hook.remove()
            del module.adamoe_hook
    for handle in base.adamoe_handles:
        handle.remove()
    _set_experts(base, base.adamoe_before)
    del base.adamoe, base.adamoe_handles, base.adamoe_before, base.config.adamoe
    return model


def drop_extra(router: Any) -> None:
    """Take away what `adamoe.routers.moepp` gave a router and its experts."""
    if hasattr(router, "adamoe_constants"):
        router.adamoe_constants.remove()
        del router.adamoe_constants, router.constant, router.constant_gate


def base_of(model: Any) -> Any:
    """The converted model of transformers inside PEFT, DDP or FSDP. Raises ConversionError when there is none."""
    for module in model.modules():
        if "adamoe" in vars(module):
            return module
    raise ConversionError("the model has no null experts", hint="call convert first")


def _set_experts(base: Any, implementation: str | None) -> None:
    for part in base.modules():
        if hasattr(part, "_is_expert_parallel") and hasattr(part, "config"):
            part.config._experts_implementation = implementation
    if hasattr(base, "config"):
        base.config._experts_implementation = implementation


def _expert_modules(base: Any) -> list[Any]:
    return [m for m in base.modules() if hasattr(m, "_is_expert_parallel")]


def _text_config(base: Any) -> Any:
    return base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config


def _has_experts(base: Any) -> bool:
    known = _text_config(base).model_type in FAMILIES
    return known or bool(_expert_modules(base))


def settings_of(config: Any) -> AdaMoEConfig | None:
    """The settings in a model's configuration, or None."""
    values = getattr(config, "adamoe", None)
    return AdaMoEConfig.from_dict(copy.deepcopy(values)) if values else None
