"""How a converted checkpoint is served by vLLM: which architecture, and which command line."""

from typing import Any

from adamoe.errors import PluginError

ARCHITECTURES = {
    "mixtral": ("AdaMoEMixtralForCausalLM", "mixtral", "MixtralForCausalLM"),
    "qwen2_moe": ("AdaMoEQwen2MoeForCausalLM", "qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3_moe": ("AdaMoEQwen3MoeForCausalLM", "qwen3_moe", "Qwen3MoeForCausalLM"),
    "olmoe": ("AdaMoEOlmoeForCausalLM", "olmoe", "OlmoeForCausalLM"),
}
"""Model type to (the architecture that the plug-in registers, vLLM's module of the stock one, its class)."""
TESTED = ("mixtral", "qwen3_moe")
"""Model types that have been run in the engine; the others share the code and have not."""
VERSIONS = ("0.32.0", "0.33")
"""The first vLLM version the plug-in was run with, and the first it was not."""


def architecture(model_type: str) -> str:
    """What to put into `hf_overrides={"architectures": [...]}`. Raises PluginError for a type that is not served."""
    if model_type not in ARCHITECTURES:
        raise PluginError(
            f"model type '{model_type}' is not served with null experts", hint=f"there are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type][0]


def serve_arguments(model: str, config: Any) -> list[str]:
    """The command line of vLLM for a converted model. Raises PluginError when the configuration has no null experts."""
    import json

    if not getattr(config, "adamoe", None):
        raise PluginError(f"'{model}' has no null experts", hint="convert it, or serve it without the plug-in")
    overrides = json.dumps({"architectures": [architecture(config.model_type)]})
    return ["vllm", "serve", model, "--hf-overrides", overrides]
