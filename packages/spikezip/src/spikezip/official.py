"""Checkpoints of the paper's own implementation, read with `weights_only`: a pickle from elsewhere is never executed.

ViT       timm's names, with wrappers: `blocks.i.norm1.{0.weight,1.s}`, `blocks.i.attn.quan_q.s`, `blocks.i.mlp.act.0.s` ...
RoBERTa   transformers' names, with `attention.self.query_quan.s`, `output.dense.{0.weight,1.s}` ...

The number of levels is not in the checkpoint; the caller must know it.
"""

import functools
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikezip.errors import CheckpointError
from spikezip.qann.placement import QuantConfig, quantize
from spikezip.qann.quantizer import quantizers

VIT = {
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
ROBERTA = ("roberta",)
# Ours for the language branch's names.
_RENAMED = {
    "query_quan": "spike_core.quan_q", "key_quan": "spike_core.quan_k", "value_quan": "spike_core.quan_v",
    "attn_quan": "spike_core.attn_quan", "after_attn_quan": "spike_core.after_attn_quan",
}  # fmt: skip


def load_official(
    path: str | Path,
    *,
    arch: str,
    levels: int | None = None,
    activation: str = "relu",
    architecture: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The QANN of an official checkpoint, in evaluation mode.

    arch: "vit_small", "vit_base", "vit_large" (patch 16, 224 x 224) or "roberta". levels: L of the checkpoint, which does
    not say it ("q32" in a name is 32). activation: "relu" or "gelu", language branch only. architecture: arguments of
    timm's VisionTransformer or of RobertaConfig that differ from the arch's.

    Raises CheckpointError when the file is missing or no such checkpoint, levels are not given, or steps (`.s` keys) or
    weights are missing or do not fit.
    """
    if arch not in (*VIT, *ROBERTA):
        raise CheckpointError(f"arch is '{arch}', expected one of {', '.join((*VIT, *ROBERTA))}")
    if levels is None:
        raise CheckpointError(
            "levels are not given, and the checkpoint does not hold them", hint="pass levels=32 for a q32"
        )
    state = _read(Path(path))
    if not any(name.endswith(".s") for name in state):
        raise CheckpointError(
            f"{path} has no step sizes (keys that end in .s)", hint="pass a QANN checkpoint, not an ANN's"
        )
    own = dict(architecture or {})
    qann = _roberta(state, levels, activation, own) if arch in ROBERTA else _vit(state, levels, {**VIT[arch], **own})
    # Registered numbers that the official files do not hold, such as token positions, are no parameters.
    wanted = {name for name, _ in qann.named_parameters()}
    missing = sorted(wanted - set(state))
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} entries, the first is {missing[0]}")
    wrong = [name for name, p in qann.named_parameters() if state[name].shape != p.shape]
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{path}: {first} has shape {tuple(state[first].shape)}, {arch} needs {tuple(qann.get_parameter(first).shape)}",
            hint="pass the arch that the checkpoint was made for",
        )
    qann.load_state_dict({name: value for name, value in state.items() if name in wanted}, strict=False)
    for name, quantizer in quantizers(qann).items():
        if not bool((quantizer.s > 0).all()):
            raise CheckpointError(
                f"{path}: the step {name}.s is {quantizer.s.min().item():g}, expected a number above 0"
            )
    return qann


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", hint="pass the checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely ({reason})") from error
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no dictionary of tensors")
    # A step may be stored as a number or as one entry.
    return {
        re.sub(r"^(module\.)?(bert\.(?=roberta|classifier))?", "", name): value.squeeze()
        if name.endswith(".s")
        else value
        for name, value in content.items()
    }


def _vit(state: dict[str, Tensor], levels: int, arguments: dict[str, Any]) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    pooled = any(name.startswith("fc_norm.") for name in state)
    head = state.get("head.weight")
    settings = {
        "num_classes": len(head) if head is not None else 1000,
        "global_pool": "avg" if pooled else "token",
        "act_layer": nn.ReLU,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
        **arguments,
    }
    return quantize(VisionTransformer(**settings), QuantConfig(levels=levels), inplace=True)


def _roberta(state: dict[str, Tensor], levels: int, activation: str, arguments: dict[str, Any]) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    if activation not in ("relu", "gelu"):
        raise CheckpointError(f"activation is '{activation}', expected relu or gelu")
    for name in list(state):
        stem, _, last = name.rpartition(".")
        before, _, quantizer = stem.rpartition(".")
        if last == "s" and quantizer in _RENAMED:
            state[f"{before}.{_RENAMED[quantizer]}.s"] = state.pop(name)
    head = state.get("classifier.out_proj.weight")
    defaults = {
        "num_labels": len(head) if head is not None else 2, "vocab_size": 50265, "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    config = RobertaConfig(**{**defaults, "hidden_act": activation, **arguments})
    plain = RobertaForSequenceClassification(config)
    return quantize(plain, QuantConfig(levels=levels, placement="official-roberta"), inplace=True)
