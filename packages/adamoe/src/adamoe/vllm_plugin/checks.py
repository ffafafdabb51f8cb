"""What the running vLLM must be and must not be asked for; each refusal names the cause and the mend.

Nothing here imports vLLM, so that it can be tested without.
"""

from dataclasses import dataclass, fields
from typing import Any

from adamoe.config import AdaMoEConfig
from adamoe.errors import PluginError
from adamoe.serving import VERSIONS

MODES = ("auto", "compact", "absent", "masked")
MAP_AWARE = ("Triton", "Marlin", "Humming", "DeepGemm", "CutlassExpertsFp8", "Aiter")
"""Parts of the names of vLLM's experts classes that skip slots whose expert is mapped to -1."""


@dataclass(frozen=True)
class Settings:
    """`additional_config={"adamoe": {...}}`."""

    nulls: str = "auto"
    """How null slots are kept from the expert kernels: "compact" on CPU, "absent" on CUDA, "masked" anywhere (no saving)."""
    null_bias: float = 0.0
    """Added to the checkpoint's; above 0 lowers the load."""
    count: bool = False
    """Count tokens and true pairs of every layer, on the device."""

    @classmethod
    def read(cls, values: dict[str, Any] | None) -> "Settings":
        """Raises PluginError for an unknown name or value."""
        values = values or {}
        if not isinstance(values, dict):
            raise PluginError(f"adamoe is {values!r}", hint="expected names and values, as nulls, null_bias, count")
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise PluginError(
                f"adamoe has no setting {', '.join(unknown)}", hint=f"there are {', '.join(sorted(names))}"
            )
        settings = cls(**values)
        if settings.nulls not in MODES:
            raise PluginError(f"adamoe nulls is '{settings.nulls}'", hint=f"take one of {', '.join(MODES)}")
        bias = settings.null_bias
        if not isinstance(bias, int | float) or isinstance(bias, bool) or bias != bias:
            raise PluginError(f"adamoe null_bias is {bias!r}", hint="expected a number")
        if not isinstance(settings.count, bool):
            raise PluginError(f"adamoe count is {settings.count!r}", hint="expected true or false")
        return settings


def check_version(version: str) -> None:
    """Raises PluginError outside the tested range: the plug-in replaces two names in vLLM's modules while it builds."""

    def parts(text: str) -> tuple[int, ...]:
        return tuple(int(p) for p in text.split("+")[0].split(".")[:3] if p.isdigit())

    low, high = VERSIONS
    if not parts(low) <= parts(version) < parts(high):
        raise PluginError(f"vLLM is {version}", hint=f"the plug-in was tested with {low}; install that")


def check_names(module: Any, names: tuple[str, ...] = ("GateLinear", "FusedMoEFactory")) -> None:
    """Raises PluginError when a family's module lacks one of the names that are replaced."""
    for name in names:
        if not hasattr(module, name):
            raise PluginError(f"{module.__name__} has no {name}", hint="install the tested vLLM version")


def check_config(config: Any, *, cuda: bool) -> AdaMoEConfig:
    """The checkpoint's settings. config: vLLM's VllmConfig. Raises PluginError for what is not supported."""
    parallel, model = config.parallel_config, config.model_config
    values = getattr(model.hf_text_config, "adamoe", None) or getattr(model.hf_config, "adamoe", None)
    if not values:
        raise PluginError(
            "the checkpoint has no null experts", hint="convert it, or leave out the architecture override"
        )
    settings = AdaMoEConfig.from_dict(dict(values))
    if settings.null_type != "zero":
        raise PluginError(f"null_type is '{settings.null_type}'", hint="only zero nulls are served")
    if parallel.data_parallel_size > 1:
        raise PluginError(f"data_parallel_size is {parallel.data_parallel_size}", hint="run one server per replica")
    if getattr(parallel, "enable_eplb", False):
        raise PluginError("expert load balancing indexes by expert", hint="leave --enable-eplb out")
    if getattr(parallel, "enable_expert_parallel", False) and not cuda:
        raise PluginError("expert parallelism on CPU", hint="use tensor parallelism")
    if getattr(model, "enable_return_routed_experts", False):
        raise PluginError("returned experts have room for the stock top-k only", hint="leave that option out")
    if getattr(config, "lora_config", None) is not None:
        raise PluginError("LoRA with null experts has not been tested", hint="merge the adapter first")
    return settings


def choose_mode(settings: Settings, *, cuda: bool) -> str:
    """How null slots are kept out on this platform. Raises PluginError for a mode that the platform cannot have."""
    mode = settings.nulls if settings.nulls != "auto" else "absent" if cuda else "compact"
    if mode == "absent" and not cuda:
        raise PluginError("CPU kernels ignore the expert map", hint="take compact or masked")
    return mode


def check_kernel(name: str, mode: str) -> None:
    """Raises PluginError when `absent` meets an experts class that does not skip mapped-out slots."""
    if mode == "absent" and not any(part.lower() in name.lower() for part in MAP_AWARE):
        raise PluginError(f"{name} does not skip absent experts", hint='set moe_backend="triton", or nulls to "masked"')
