"""Reading and writing converted models, and the three layouts of a checkpoint.

in place    what `save_pretrained` writes: the stock layout with `gate.null_weight` beside `gate.weight`, and `adamoe` in
            config.json; the stock library opens it as the stock model
registered  the same with the model type `adamoe_<type>`, which AutoModelForCausalLM knows after `register()`
official    `gate2.weight`, as the published Mixtral code writes the null rows
stock       without the null rows
"""

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tenfold_shared import hub

from adamoe.config import FUNCTION, AdaMoEConfig
from adamoe.conversion import PARAMETERS, attach, base_of, convert, is_converted, layer_routers, settings_of
from adamoe.errors import CheckpointError, ConversionError
from adamoe.families import FAMILIES, Family, family_of

Layout = Literal["in_place", "registered", "official", "stock"]
PREFIX = "adamoe_"
GATE2 = r"\.gate2\.weight"


@cache
def model_class(model_type: str, registered: bool = False) -> Any:
    """The causal language model of a family with null routers built in, so that loading fills their rows.

    It bears the stock class's name, which is therefore what `save_pretrained` writes as the architecture; the registered
    one is `AdaMoE...`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    family = family_of(model_type)
    stock_config = type(AutoConfig.for_model(model_type))
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]

    class Converted(stock):  # type: ignore[misc, valid-type]
        _can_set_experts_implementation_cached_value = True

        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            settings = settings_of(config)
            if settings is None:
                raise CheckpointError("the configuration has no 'adamoe' settings", hint="convert the model first")
            routers: list[Any] = [m for m in self.modules() if isinstance(m, family.router_class())]
            attach(
                self,
                settings,
                family,
                routers=routers,
                top_k=settings.resolve_top_k(routers[0].num_experts, routers[0].top_k),
            )

        @classmethod
        def from_pretrained(cls, name: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
            _check_rows(model, info["missing_keys"], name)
            return (model, info) if output_loading_info else model

    name = f"AdaMoE{stock.__name__}" if registered else stock.__name__
    Converted.__name__ = Converted.__qualname__ = name
    Converted.__module__ = __name__
    if registered:
        config_name = f"AdaMoE{stock_config.__name__}"
        Converted.config_class = type(
            config_name, (stock_config,), {"model_type": PREFIX + model_type, "__module__": __name__}
        )
        setattr(sys.modules[__name__], config_name, Converted.config_class)
    return Converted


def __getattr__(name: str) -> Any:
    """The classes above by name, as pickle looks for them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    registered = name.startswith("AdaMoE")
    if registered:
        register()
        if name in globals():  # a configuration's
            return globals()[name]
    for model_type in FAMILIES:
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) == name.removeprefix("AdaMoE"):
            return model_class(model_type, True) if registered else model_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know the model types `adamoe_<type>`, and their checkpoint layout."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    for model_type, family in list(FAMILIES.items()):
        if family.modelling is not None:
            continue
        cls = model_class(model_type, True)
        register_family(PREFIX + model_type, family)
        AutoConfig.register(PREFIX + model_type, cls.config_class)
        AutoModelForCausalLM.register(cls.config_class, cls)
        if (mapping := get_checkpoint_conversion_mapping(model_type)) is not None:
            register_checkpoint_conversion_mapping(PREFIX + model_type, mapping)


def register_family(model_type: str, family: Family) -> None:
    """The family of a registered type is that of the stock one."""
    FAMILIES[model_type] = Family(
        **{**family.__dict__, "model_type": model_type, "modelling": family.module().__name__}
    )


def from_pretrained(name: str | Path, *, adamoe_config: AdaMoEConfig | None = None, **kwargs: Any) -> Any:
    """Load a model with null experts.

    name: folder or hub id of a converted model, of one in the published layout (`gate2`), or, with `adamoe_config`, of a
    stock mixture of experts, which is converted. adamoe_config of a converted model may change how it is trained, not what
    it computes. kwargs: as for AutoModelForCausalLM.from_pretrained.

    Raises CheckpointError when the null rows are missing or their number is not that of the settings, or `adamoe_config`
    contradicts the checkpoint; UserError when the files or the settings in them cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    kernel = kwargs.pop("experts_implementation", None)
    config = hub.load_model(AutoConfig, name, use_safetensors=None)
    found, saved = _null_rows(Path(name)), settings_of(config)
    if saved is None and found is None:
        if adamoe_config is None:
            raise CheckpointError(f"'{name}' has no null experts", hint="pass adamoe_config to convert it")
        if kernel is not None:
            adamoe_config = AdaMoEConfig.from_dict({**adamoe_config.to_dict(), "experts_implementation": kernel})
        return convert(hub.load_model(AutoModelForCausalLM, name, **kwargs), adamoe_config)
    settings = saved or adamoe_config or AdaMoEConfig(num_null_experts=found[0])  # type: ignore[index]
    if found is not None and found[0] != settings.num_null_experts:
        raise CheckpointError(
            f"'{name}' has {found[0]} null rows a layer, the settings say {settings.num_null_experts}",
            hint="correct num_null_experts",
        )
    if saved is not None and adamoe_config is not None:
        for setting in FUNCTION:
            given, kept = getattr(adamoe_config, setting), getattr(saved, setting)
            if given != kept and (setting, given) != ("top_k", "preserve"):
                raise CheckpointError(
                    f"'{name}' has {setting} {kept}, adamoe_config says {given}",
                    hint="leave adamoe_config out, or revert and convert again",
                )
        settings = AdaMoEConfig.from_dict({**adamoe_config.to_dict(), "top_k": saved.top_k})
    config.adamoe = settings.to_dict()
    if found is not None and found[1]:
        kwargs["key_mapping"] = {GATE2: ".gate.null_weight", **(kwargs.get("key_mapping") or {})}
    registered = config.model_type.startswith(PREFIX)
    loader = AutoModelForCausalLM if registered else model_class(config.model_type)
    model = hub.load_model(loader, name, config=config, **kwargs)
    if kernel is not None:
        model.set_experts_implementation(kernel)
    # Saving would undo the renaming and write gate2 again; `export` does that when it is asked for.
    kept = [c for c in getattr(model, "_weight_conversions", None) or [] if c.target_patterns != [".gate.null_weight"]]
    model._weight_conversions = kept
    return model


def _check_rows(model: Any, missing: set[str], name: Any) -> None:
    """What a checkpoint lacks the loader leaves as it finds the memory: no bias means 0, no rows is an error."""
    absent = sorted(key for key in missing if key.rpartition(".")[2] in PARAMETERS and not key.endswith("null_bias"))
    if absent:
        raise CheckpointError(
            f"'{name}' lacks {absent[0]} ({len(absent)} such)", hint="convert the stock model instead"
        )
    for key in missing:
        if key.endswith("null_bias"):
            model.get_buffer(key).zero_()
    for router in layer_routers(model):
        # A bias may be infinite: no true expert, or no null.
        if not router.null_weight.is_meta and (not router.null_weight.isfinite().all() or router.null_bias.isnan()):
            raise CheckpointError(f"'{name}' has null rows that are not numbers", hint="convert the stock model again")


def _null_rows(folder: Path) -> tuple[int, bool] | None:
    """(null rows a layer, whether they are called gate2) of a local checkpoint; None without any, or for a hub id."""
    from safetensors import safe_open

    counts = set()
    for file in sorted(folder.expanduser().glob("*.safetensors")) if folder.expanduser().is_dir() else []:
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dictionary
                    if key.endswith(("gate.null_weight", "router.null_weight", ".gate2.weight")):
                        counts.add((tensors.get_slice(key).get_shape()[0], key.endswith(".gate2.weight")))
        except Exception as error:
            raise CheckpointError(f"'{file}' is damaged ({error})", hint="save or download it again") from error
    if len(counts) > 1:
        raise CheckpointError(
            f"'{folder}' has layers with {sorted(c[0] for c in counts)} null rows, expected one number"
        )
    return counts.pop() if counts else None


def export(model: Any, folder: str | Path, layout: Layout = "in_place") -> Path:
    """Write a converted model to `folder` in a layout, whole or not at all.

    Raises CheckpointError when the layout is unknown, or "official" is asked for another family than Mixtral or for a model
    whose null bias is not zero, which that layout cannot hold; ConversionError when the model has no null experts, or has
    LoRA in it, single or as mixtures.
    """
    base = base_of(model)
    if hasattr(base, "molora"):
        raise ConversionError("the model has mixtures of LoRA", hint="call molora.save_adapter")
    if any(".base_layer." in name for name, _ in base.named_parameters()):
        raise ConversionError("the model has LoRA in it", hint="export model.merge_and_unload()")
    if layout not in ("in_place", "registered", "official", "stock"):
        raise CheckpointError(f"layout is '{layout}'", hint="take in_place, registered, official or stock")
    family = next(layer_routers(base)).adamoe_family
    if layout == "official":
        if not family.model_type.endswith("mixtral"):
            raise CheckpointError(f"the official layout is Mixtral's, the model is {family.model_type}")
        if any(float(r.null_bias) for r in layer_routers(base)):
            raise CheckpointError(
                "the official layout has no place for a null bias", hint="set_load(model, null_bias=0)"
            )
    folder = Path(folder)
    with hub.replace_atomically(folder) as partial:
        base.save_pretrained(partial)
        if (layout == "registered") != base.config.model_type.startswith(PREFIX) or layout in ("official", "stock"):
            _rewrite(partial, layout, base.config.model_type.removeprefix(PREFIX))
    return folder


def _rewrite(folder: Path, layout: Layout, model_type: str) -> None:
    """Rename or drop the null rows and correct config.json; `folder` holds what save_pretrained wrote."""
    from safetensors.torch import load_file, save_file

    def renamed(key: str) -> str | None:
        part = key.rpartition(".")[2]
        if layout in ("in_place", "registered") or not part.startswith("null_"):
            return key
        if layout == "stock" or part != "null_weight":
            return None
        return key.replace(".gate.null_weight", ".gate2.weight")

    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        save_file({new: t for key, t in tensors.items() if (new := renamed(key))}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        record = json.loads(index.read_text(encoding="utf-8"))
        record["weight_map"] = {new: f for key, f in record["weight_map"].items() if (new := renamed(key))}
        index.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    stock = model_class(model_type)
    if layout == "registered":
        config.update(model_type=PREFIX + model_type, architectures=[f"AdaMoE{stock.__name__}"])
    else:
        config.update(model_type=model_type, architectures=[stock.__name__])
        config.pop("adamoe", None) if layout == "stock" else None
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Take the tokenizer's files along, where `source` is a folder that has them."""
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "generation_config.json",
    ):
        file = Path(source) / name
        if file.is_file() and not (target / name).exists():
            shutil.copyfile(file, target / name)


def stock_model(name: str | Path, **kwargs: Any) -> Any:
    """A checkpoint as the stock library opens it, nulls ignored."""
    from transformers import AutoModelForCausalLM

    model = hub.load_model(AutoModelForCausalLM, name, **kwargs)
    if is_converted(model):
        raise ConversionError(f"'{name}' is in the registered layout", hint="export it as in_place or stock")
    return model
