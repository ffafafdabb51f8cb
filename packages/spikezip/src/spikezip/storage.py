"""Saving and loading: a folder with `model.safetensors` (weights and steps) and `spikezip.json` (how to build the rest)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from tenfold_shared.hub import replace_atomically
from torch import nn

from spikezip.engine import SpikingModel, convert
from spikezip.errors import CheckpointError
from spikezip.qann.placement import QuantConfig, build, quantize
from spikezip.qann.quantizer import quantizers

CONFIG, WEIGHTS = "spikezip.json", "model.safetensors"


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a QANN or a SpikingModel to a folder, whole or not at all. Raises CheckpointError for any other model."""
    qann = model.qann if isinstance(model, SpikingModel) else model
    if not quantizers(qann):
        raise CheckpointError(f"{type(model).__name__} is neither a quantised nor a spiking model")
    record: dict[str, Any] = {
        "format": 1,
        "origin": qann.spike_origin,
        "quantization": qann.spike_config.record(),
    }
    if isinstance(model, SpikingModel):
        record["spiking"] = {
            "engine": model.engine, "resync": model.resync, "delay": model.clock.delay, "burst": model.clock.burst,
            "dtype": str(model.dtype).removeprefix("torch."),
        }  # fmt: skip
    with replace_atomically(folder) as partial:
        partial.mkdir()
        save_model(qann, str(partial / WEIGHTS))
        (partial / CONFIG).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def load_quantized(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """The QANN of a folder. model: the plain architecture, needed when it is a class of one's own.

    Raises CheckpointError when a file is missing, damaged or does not fit, UserError when the architecture is unknown.
    """
    return _read(Path(folder), model)[0]


def load(folder: str | Path, *, model: nn.Module | None = None) -> SpikingModel:
    """The SpikingModel of a folder written by `save_pretrained`, or the drive-engine one of a saved QANN."""
    qann, record = _read(Path(folder), model)
    spiking = record.get("spiking", {})
    dtype = getattr(torch, spiking.get("dtype", "float32"))
    snn = convert(qann, engine=spiking.get("engine", "drive"), resync=spiking.get("resync", True), dtype=dtype)
    snn.set_schedule(delay=spiking.get("delay", 0))
    snn.set_burst(spiking.get("burst", 1))
    return snn


def _read(folder: Path, model: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} does not exist", hint="pass a folder that save_pretrained wrote")
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = QuantConfig(**record["quantization"])
        origin = record["origin"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not a spikezip configuration ({error})") from error
    qann = quantize(model if model is not None else build(origin), config)
    try:
        load_model(qann.to(getattr(torch, record.get("spiking", {}).get("dtype", "float32"))), str(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit its configuration ({' '.join(reason)[:200]})"
        ) from error
    return qann.eval(), record
