"""Mixtures of LoRA with null experts, for dense models (2406.13233, section 4.3).

A linear layer W becomes

    y = W x + sum over the chosen true experts of w_i (alpha / r) B_i A_i x

with a router over n adapters and m nulls, routed and balanced as in a mixture of experts. A token that chose nulls only
passes through W alone. A mixture that depends on the token cannot be merged into W.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tenfold_shared import hub
from torch import Tensor, nn
from torch.nn.functional import linear

from adamoe.config import AdaMoEConfig, check_aux_coef
from adamoe.conversion import NullBalance, is_converted
from adamoe.errors import CheckpointError, ConfigError, ConversionError
from adamoe.families import Family
from adamoe.routing import Routing, route, selection_scores

FAMILY = Family("molora", "MoLoRALinear")


@dataclass(frozen=True)
class MoLoRAConfig:
    """Settings; checked when made (ConfigError). The defaults are the paper's m5k4 on every projection of Llama."""

    num_experts: int = 4
    """Adapters n per layer."""
    num_null_experts: int = 5
    """Nulls m per layer."""
    top_k: int = 4
    """Selected over both."""
    r: int = 8
    """Rank."""
    lora_alpha: float = 16.0
    """Scale: the adapters are multiplied by lora_alpha / r."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Last names of the linear layers that get a mixture."""
    aux_coef: tuple[float, float] = (1e-3, 1e-3)
    """Coefficient of eq. 6, before and after annealing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "aux_coef", check_aux_coef(self.aux_coef))
        for name, least in (("num_experts", 1), ("num_null_experts", 0), ("top_k", 1), ("r", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}, expected a whole number of {least} or more")
        if not isinstance(self.lora_alpha, int | float) or not 0 < self.lora_alpha < float("inf"):
            raise ConfigError(f"lora_alpha is {self.lora_alpha!r}, expected a number above 0")
        if self.top_k > self.num_experts + self.num_null_experts:
            raise ConfigError(
                f"top_k is {self.top_k} with {self.num_experts} adapters and {self.num_null_experts} nulls",
                hint=f"take 1 to {self.num_experts + self.num_null_experts}",
            )
        if isinstance(self.target_modules, str):
            raise ConfigError(
                f"target_modules is {self.target_modules!r}, expected a list", hint="write it in brackets"
            )
        if not self.target_modules:
            raise ConfigError("target_modules is empty", hint="name the linear layers, as q_proj")


class MoLoRALinear(nn.Module):
    """A frozen linear layer with a mixture of adapters. Input and output (..., d), as the linear layer's own.

    weight: (n, d) and null_weight: (m, d) are the router's rows, lora_A: (n, r, d), lora_B: (n, d_out, r).
    """

    def __init__(self, base: nn.Linear, config: MoLoRAConfig):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adamoe_watchers: list[Any] = []
        self.num_experts, self.adamoe_top_k, self.scale = config.num_experts, config.top_k, config.lora_alpha / config.r
        self.adamoe_family = FAMILY
        new = base.weight.new_empty
        self.weight = nn.Parameter(new(config.num_experts, base.in_features))
        self.null_weight = nn.Parameter(new(config.num_null_experts, base.in_features))
        self.lora_A = nn.Parameter(new(config.num_experts, config.r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(config.num_experts, base.out_features, config.r))
        self.register_buffer("null_bias", torch.zeros((), dtype=torch.float32, device=base.weight.device))
        for rows in (self.weight, self.null_weight, *self.lora_A):
            if len(rows):
                nn.init.kaiming_uniform_(rows, a=math.sqrt(5))

    def adamoe_scores(self, logits: Tensor) -> Tensor:
        """What the top-K is taken of, without the null bias, (T, n + m)."""
        return selection_scores(logits, self.num_experts)

    def route(self, hidden: Tensor) -> Routing:
        """hidden: (T, d)."""
        logits = linear(hidden, torch.cat((self.weight, self.null_weight)))
        return route(logits, self.num_experts, self.adamoe_top_k, null_bias=self.null_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., d)."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        routing = self.route(rows)
        for watcher in self.adamoe_watchers:
            watcher(self, routing)
        output = self.base(rows)
        K = self.adamoe_top_k
        flat, weights = routing.index.reshape(-1), routing.weights.reshape(-1, 1).to(output.dtype)
        for e, (down, up) in enumerate(zip(self.lora_A.unbind(0), self.lora_B.unbind(0), strict=True)):
            place = (flat == e).nonzero().squeeze(-1)
            # An adapter without a token still runs on zero rows, so that it has a gradient for DistributedDataParallel.
            added = self.scale * linear(linear(rows[place // K], down), up) * weights[place]
            output = output.index_add(0, place // K, added)
        return output.view(*hidden.shape[:-1], output.shape[-1])


def inject(model: Any, config: MoLoRAConfig) -> Any:
    """Put mixtures beside the named linear layers of a dense model, in place, and freeze everything else; returns it.

    Raises ConversionError when no layer bears one of the names, or the model has mixtures or null experts already.
    """
    found = _targets(model, config)
    model.requires_grad_(False)
    for name, child in found.items():
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], MoLoRALinear(child, config))
    model.molora = config
    model.adamoe = NullBalance(
        AdaMoEConfig(num_null_experts=config.num_null_experts, top_k=config.top_k, aux_coef=config.aux_coef)
    )
    model.adamoe_handles = (
        model.register_forward_pre_hook(model.adamoe.before, with_kwargs=True),
        model.register_forward_hook(model.adamoe.after, with_kwargs=True, always_call=True),
    )
    return model


def _targets(model: Any, config: MoLoRAConfig) -> dict[str, nn.Linear]:
    """The linear layers that get a mixture, by name."""
    if is_converted(model):
        raise ConversionError(
            "the model already has null experts or mixtures of LoRA", hint="load the dense model anew"
        )
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in config.target_modules and isinstance(module, nn.Linear)
    }
    if not found:
        raise ConversionError(
            f"no linear layer is called {', '.join(config.target_modules)}", hint="name some of the model's own"
        )
    return found


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The adapters' and routers' tensors by their names in the model."""
    mixtures = [name for name, m in model.named_modules() if isinstance(m, MoLoRALinear)]
    state = model.state_dict()
    return {k: v for k, v in state.items() if any(k.startswith(f"{m}.") and ".base." not in k for m in mixtures)}


def save_adapter(model: Any, folder: str | Path) -> Path:
    """Write the mixtures to `folder`, whole or not at all: adapter.safetensors and molora.json."""
    from safetensors.torch import save_file

    if not hasattr(model, "molora"):
        raise ConversionError("the model has no mixtures of LoRA", hint="call molora.inject first")
    folder = Path(folder)
    with hub.replace_atomically(folder) as partial:
        partial.mkdir()
        save_file({k: v.contiguous() for k, v in adapter_state(model).items()}, partial / "adapter.safetensors")
        (partial / "molora.json").write_text(json.dumps(asdict(model.molora), indent=2) + "\n", encoding="utf-8")
    return folder


def load_adapter(model: Any, folder: str | Path) -> Any:
    """Put the mixtures in `folder` into a dense model; returns it.

    Raises CheckpointError when the files are missing, damaged, or of another model.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "molora.json").is_file():
        raise CheckpointError(f"'{folder}' holds no molora.json", hint="pass a folder written by molora.save_adapter")
    try:
        config = MoLoRAConfig(**json.loads((folder / "molora.json").read_text(encoding="utf-8")))
        tensors = load_file(folder / "adapter.safetensors")
    except ConfigError:
        raise
    except Exception as error:  # safetensors' own class among them
        raise CheckpointError(f"'{folder}' is damaged ({error})", hint="save the adapter again") from error
    with torch.device("meta"):
        expected = {
            f"{name}.{key}": tensor.shape
            for name, layer in _targets(model, config).items()
            for key, tensor in MoLoRALinear(nn.Linear(layer.in_features, layer.out_features), config)
            .state_dict()
            .items()
            if not key.startswith("base.")
        }
    if wrong := sorted(
        k for k in expected.keys() | tensors.keys() if getattr(tensors.get(k), "shape", None) != expected.get(k)
    ):
        raise CheckpointError(f"'{folder}' is of another model ({wrong[0]})")
    if bad := sorted(k for k, t in tensors.items() if not k.endswith("null_bias") and not t.isfinite().all()):
        raise CheckpointError(f"'{folder}' holds numbers that are not finite ({bad[0]})", hint="save the adapter again")
    inject(model, config)
    model.load_state_dict(tensors, strict=False)
    return model
