"""Where the quantisers go (2406.03470, the QANN).

Attention's q, k, v, probabilities and context; the attention's and the MLP's output projections; every LayerNorm's output;
the patch convolution; the MLP's hidden activation, before a ReLU (unsigned) or after any other function (symmetric).
The residual stream, the embeddings and the logits are not quantised.
"""

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tenfold_shared.errors import UserError
from torch import Tensor, nn

from spikezip.errors import QuantizationError
from spikezip.qann.attention import AttentionCore, MultiheadAttention, TimmAttention, register_with_transformers
from spikezip.qann.quantizer import Quantizer, bounds, quantizers

# Linear layers whose output is quantised: the second of an MLP and the attention's output, by the libraries' names.
OUTPUT_PROJECTIONS = ("mlp.fc2", "o_proj", "out_lin", "output.dense", "ffn.lin2", "linear2", "mlp.3")
# Linear layers followed by a ReLU inside their model's forward.
BEFORE_INLINE_RELU = ("pre_classifier",)
PATCH_CONVOLUTIONS = ("patch_embed.proj", "patch_embeddings.projection", "conv_proj")
PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))


@dataclass(frozen=True)
class QuantConfig:
    """How to quantise.

    levels: L, of every quantiser but attention's. attn_levels: of q, k, v, probabilities and context; `levels` if None.
    symmetric: "auto" is the paper's choice for each place; True or False forces one for the MLP activations.
    activation: "keep", or "relu" to replace the MLP's activation as the paper does. per_channel: one step for each channel
    of LayerNorm and MLP outputs (attention's stay one a tensor). skip: patterns of module paths to leave alone.
    bounds: pattern of a quantiser's path to its own (lo, hi), for example {"*.act.1": (-3, 12)} after a GELU.
    placement: "default", or "official-roberta" for checkpoints of the official language branch: LayerNorm outputs as they are,
    an unsigned quantiser before every activation, and an unsigned one for the context, which clips negative values.

    Raises UserError for a value outside its range.
    """

    levels: int = 16
    attn_levels: int | None = None
    symmetric: bool | str = "auto"
    activation: str = "keep"
    per_channel: bool = False
    skip: Sequence[str] = ()
    bounds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    placement: str = "default"

    def __post_init__(self) -> None:
        bounds(self.levels, False)
        bounds(self.attn_levels or self.levels, True)
        if self.symmetric not in (True, False, "auto"):
            raise UserError(f"symmetric is {self.symmetric!r}, expected 'auto', True or False")
        if self.activation not in ("keep", "relu"):
            raise UserError(f"activation is {self.activation!r}, expected 'keep' or 'relu'")
        if self.placement not in ("default", "official-roberta"):
            raise UserError(f"placement is {self.placement!r}, expected 'default' or 'official-roberta'")
        for pattern, pair in self.bounds.items():
            if len(pair) != 2 or not pair[0] <= 0 < pair[1]:
                raise UserError(f"bounds of {pattern} are {tuple(pair)}, expected (lo, hi) with lo <= 0 < hi")

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "skip": list(self.skip), "bounds": {k: list(v) for k, v in self.bounds.items()}}


class Quantized(nn.Sequential):
    """A module followed by its quantiser, or a quantiser followed by its ReLU; looks like the module to those who ask."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            inner = next((m for m in modules.values() if not isinstance(m, Quantizer)), None)
            if inner is None:
                raise
            return getattr(inner, name)


class ClassificationHead(nn.Module):
    """transformers' RoBERTa and ELECTRA heads, with the activation as a module of its own. (B, N, C) to (B, classes)."""

    def __init__(self, source: Any, act: nn.Module) -> None:
        super().__init__()
        self.dense, self.dropout, self.act, self.out_proj = source.dense, source.dropout, act, source.out_proj

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        return self.out_proj(self.dropout(self.act(self.dense(self.dropout(features[:, 0])))))


def quantize(model: nn.Module, config: QuantConfig | None = None, *, inplace: bool = False) -> nn.Module:
    """The QANN of a model: a copy in evaluation mode with quantisers in place, not yet calibrated.

    model: timm ViT or DeiT, transformers ViT, DeiT, BERT, RoBERTa, DistilBERT and others that run through transformers'
    attention interface, torchvision ViT, anything built from nn.MultiheadAttention, Linear, LayerNorm and activations.
    The copy remembers the configuration as `spike_config`.

    Raises QuantizationError, naming the module path, when there is nothing to quantise or an attention is not supported.
    """
    config = config or QuantConfig()
    if quantizers(model):
        raise QuantizationError("the model is quantised already", hint="pass the original model")
    model = model if inplace else copy.deepcopy(model)
    model.spike_origin = describe(model)
    is_transformers = hasattr(getattr(model, "config", None), "_attn_implementation")
    place = _Placement(config, getattr(getattr(model, "config", None), "hidden_act", None))
    place.walk(model, "", is_transformers)
    if place.cores and is_transformers:
        register_with_transformers()
        _use_interface(model)
    for name, quantizer in quantizers(model).items():
        for pattern, (lo, hi) in config.bounds.items():
            if fnmatch.fnmatch(name, pattern):
                quantizer.lo, quantizer.hi = int(lo), int(hi)
    if not quantizers(model):
        raise QuantizationError(
            f"{type(model).__name__} has no layer to quantise",
            hint="expected attention, LayerNorm or activation modules that `skip` does not cover",
        )
    model.spike_config = config
    return model.eval()


def _use_interface(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "spikezip"


class _Placement:
    """One walk over a model's tree."""

    def __init__(self, config: QuantConfig, hidden_act: str | None):
        self.config, self.hidden_act = config, hidden_act
        self.attn_levels = config.attn_levels or config.levels
        self.official = config.placement == "official-roberta"
        self.cores = 0

    def walk(self, module: nn.Module, path: str, is_transformers: bool) -> None:
        for name, child in list(module.named_children()):
            here = f"{path}.{name}" if path else name
            if any(fnmatch.fnmatch(here, pattern) for pattern in self.config.skip):
                continue
            replacement = self.replace(child, here, is_transformers)
            if replacement is not None:
                setattr(module, name, replacement)
            elif not isinstance(child, AttentionCore):
                self.walk(child, here, is_transformers)

    def replace(self, module: nn.Module, path: str, is_transformers: bool) -> nn.Module | None:
        """What takes the module's place, if anything. An attention of transformers is given its core and kept."""
        kind = type(module).__name__
        if (own := self.attention(module, path)) is not None:
            return own
        if is_transformers and _has_projections(module):
            core = AttentionCore(self.attn_levels, context_symmetric=not self.official)
            module.add_module("spike_core", core)
            self.cores += 1
            return None
        if kind in ("RobertaClassificationHead", "ElectraClassificationHead"):
            act = nn.Tanh() if kind.startswith("Roberta") else nn.GELU()
            if self.official:
                # The official branch patched the head: its activation is the model's own.
                act = nn.ReLU() if self.hidden_act == "relu" else nn.GELU()
            return ClassificationHead(module, self.activation(act, keep=True))
        if isinstance(module, nn.LayerNorm) and not self.official:
            return Quantized(module, self.quantizer(True, module.normalized_shape[-1]))
        if isinstance(module, nn.Conv2d) and path.endswith(PATCH_CONVOLUTIONS):
            return Quantized(module, self.quantizer(True, module.out_channels, axis=1))
        if isinstance(module, nn.Linear) and path.endswith(OUTPUT_PROJECTIONS):
            return Quantized(module, self.quantizer(True, module.out_features))
        if isinstance(module, nn.Linear) and path.endswith(BEFORE_INLINE_RELU):
            return Quantized(module, self.quantizer(False, module.out_features))
        if is_activation(module):
            return self.activation(module)
        if "attention" in kind.lower() and not list(module.children()):
            return None
        if kind.lower().endswith(("attention", "attn")) and not any(
            is_supported_attention(m) or (is_transformers and _has_projections(m)) for m in module.modules()
        ):
            raise QuantizationError(
                f"{path}: attention of class {kind} is not supported",
                hint="its fused product cannot be intercepted; supported are timm's Attention, nn.MultiheadAttention and "
                "transformers' attention interface",
            )
        return None

    def attention(self, module: nn.Module, path: str) -> nn.Module | None:
        if not is_supported_attention(module):
            return None
        cls: Callable[..., nn.Module] = (
            MultiheadAttention if isinstance(module, nn.MultiheadAttention) else TimmAttention
        )
        try:
            return cls(module, levels=self.config.levels, attn_levels=self.attn_levels)
        except QuantizationError as error:
            raise QuantizationError(f"{path}: {error.message}", hint=error.hint) from error

    def quantizer(self, symmetric: bool, channels: int | None = None, axis: int = -1) -> Quantizer:
        return Quantizer(
            *bounds(self.config.levels, symmetric), channels=channels if self.config.per_channel else None, axis=axis
        )

    def activation(self, module: nn.Module, keep: bool = False) -> nn.Module:
        if self.config.activation == "relu" and not keep:
            module = nn.ReLU()
        if self.official:
            return Quantized(self.quantizer(False), module)
        auto = self.config.symmetric == "auto"
        if isinstance(module, nn.ReLU):
            return Quantized(self.quantizer(False if auto else bool(self.config.symmetric)), nn.ReLU())
        return Quantized(module, self.quantizer(True if auto else bool(self.config.symmetric)))


def is_activation(module: nn.Module) -> bool:
    """A memoryless elementwise activation, torch's or transformers' own classes of the same."""
    names = ("GELU", "QuickGELU", "ReLU", "SiLU", "Tanh", "GELUTanh", "Sigmoid", "Mish", "ELU")
    kind = type(module).__name__
    own = kind in names or kind.removesuffix("Activation") in (*names, "NewGELU", "FastGELU", "PytorchGELUTanh", "GELU")
    return own and not list(module.parameters())


def is_supported_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    kind = type(module)
    return kind.__name__ == "Attention" and kind.__module__ in (
        "timm.layers.attention",
        "timm.models.vision_transformer",
    )


def _has_projections(module: nn.Module) -> bool:
    named = any(all(isinstance(getattr(module, n, None), nn.Linear) for n in names) for names in PROJECTIONS)
    return named and hasattr(module, "is_causal")


def describe(model: nn.Module) -> dict[str, Any]:
    """What is needed to build the same architecture again: library, class and arguments; {} for a class of one's own."""
    kind = type(model)
    library = kind.__module__.split(".")[0]
    if library == "transformers":
        config = copy.deepcopy(model.config).to_dict()
        return {"library": library, "class": kind.__name__, "config": config}
    if library == "timm" and kind.__name__ in ("VisionTransformer", "VisionTransformerDistilled"):
        return {"library": library, "class": kind.__name__, "arguments": _timm_arguments(model)}
    if library == "torchvision" and kind.__name__ == "VisionTransformer":
        arguments = {
            name: getattr(model, name)
            for name in ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "representation_size")
        }
        block = model.encoder.layers[0]
        arguments |= {"num_layers": len(model.encoder.layers), "num_heads": block.num_heads}
        return {"library": library, "class": kind.__name__, "arguments": arguments}
    return {}


def _timm_arguments(model: Any) -> dict[str, Any]:
    block, patch = model.blocks[0], model.patch_embed
    extra = {}
    if type(model).__name__ == "VisionTransformer":
        extra = {
            "class_token": model.cls_token is not None,
            "reg_tokens": model.num_reg_tokens,
            "no_embed_class": model.no_embed_class,
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        }
    return {
        "img_size": tuple(patch.img_size),
        "patch_size": tuple(patch.patch_size),
        "in_chans": patch.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": 1.0 if hasattr(block.ls1, "gamma") else None,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "act_layer": type(block.mlp.act).__name__.lower(),
        "layer_norm_eps": block.norm1.eps,
        **extra,
    }


def build(origin: Mapping[str, Any]) -> nn.Module:
    """The architecture that `describe` described, with random weights. Raises UserError when it is of no known library."""
    if not origin:
        raise UserError(
            "the checkpoint is of a class of one's own, which cannot be rebuilt by name",
            hint="pass model=<an instance>",
        )
    library, name = origin["library"], origin["class"]
    if library == "transformers":
        import transformers

        cls = getattr(transformers, name)
        return cls(cls.config_class.from_dict(origin["config"]))
    arguments = dict(origin["arguments"])
    if library == "torchvision":
        from torchvision.models import VisionTransformer

        return VisionTransformer(**arguments)
    import functools

    from timm.layers import LayerNorm
    from timm.models import deit, vision_transformer

    module = deit if name == "VisionTransformerDistilled" else vision_transformer
    arguments["norm_layer"] = functools.partial(LayerNorm, eps=arguments.pop("layer_norm_eps"))
    return getattr(module, name)(**arguments)
