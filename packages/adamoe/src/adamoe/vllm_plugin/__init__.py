"""Null experts in stock vLLM, by a general plug-in: no fork, no patch of its files.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process. It only names
classes; nothing heavy is imported. A checkpoint is served with the overrides that `adamoe serve-args` prints; ordinary
checkpoints are not touched.
"""

from adamoe.serving import ARCHITECTURES


def register() -> None:
    """Register the architectures with vLLM; may be called more than once."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, _, _ in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, f"adamoe.vllm_plugin.models:{name}")
