"""Out of Python: one drive step as ONNX with explicit state, and feed-forward parts as NIR.

ONNX holds the whole network of any architecture that torch.export takes: inputs are the network's own and one tracer for
each neuron site, outputs the logits and the new tracers. Feed the tracers back until none changes.

NIR has linear maps, convolutions and neurons, but no products of two spike streams, LayerNorm or softmax: networks with
those are refused, with the list of what has no counterpart.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor, nn

from spikezip.encoders import checked
from spikezip.engine import NeuronSite, SpikingModel, _call
from spikezip.errors import ExportError
from spikezip.qann.calibration import logits_of


class DriveStep(nn.Module):
    """(inputs, *tracers) to (logits, *new tracers): one step of a drive engine without memory."""

    def __init__(self, snn: SpikingModel, inputs: Any):
        super().__init__()
        if snn.engine != "drive":
            raise UserError("one step with explicit state exists in the drive engine only", hint="use engine='drive'")
        inputs = checked(inputs, snn.device, snn.dtype)
        snn.reset()
        with torch.no_grad():
            snn(inputs)
        self.snn, self.sites = snn.eval(), snn.sites
        self.eval()
        self.names = list(inputs) if isinstance(inputs, dict) else None
        self.inputs = tuple(inputs.values()) if isinstance(inputs, dict) else (inputs,)
        self.tracers = tuple(torch.zeros_like(call.acc) for site in self.sites for call in site.calls)
        self.counts = [len(site.calls) for site in self.sites]
        snn.reset()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(self.inputs)
        inputs, tracers = tensors[:n], list(tensors[n:])
        for site, count in zip(self.sites, self.counts, strict=True):
            site.called, site.explicit, tracers = 0, tracers[:count], tracers[count:]
        try:
            out = _call(self.snn.model, dict(zip(self.names, inputs, strict=True)) if self.names else inputs)
            return logits_of(out), *(acc for site in self.sites for acc in site.explicit)
        finally:
            for site in self.sites:
                site.explicit = None


def export_onnx(snn: SpikingModel, path: str | Path, *, inputs: Any) -> Path:
    """Write one drive step as ONNX, for inputs of this shape; returns the path.

    Needs the `onnx` extra. Raises UserError in the event engine, ExportError when torch cannot export the architecture.
    """
    step = DriveStep(snn, inputs)
    names = step.names or ["input"]
    tracers = [f"tracer_{i}" for i in range(len(step.tracers))]
    path = Path(path)
    with replace_atomically(path) as partial:
        try:
            torch.onnx.export(
                step, (*step.inputs, *step.tracers), str(partial), dynamo=True, verbose=False, external_data=False,
                input_names=[*names, *tracers], output_names=["logits", *(f"{name}_next" for name in tracers)],
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = " ".join(str(error).split())[:200]
            raise ExportError(f"{type(snn.qann).__name__} cannot be exported to ONNX ({reason})") from error
    return path


def export_nir(snn: SpikingModel, path: str | Path, *, input_shape: tuple[int, ...]) -> Path:
    """Write a feed-forward network (a chain of Linear, Conv2d, Flatten and neurons) as NIR; returns the path.

    input_shape: of one sample. NIR's integrate-and-fire node has no tracer: the bounds, the start value and the bipolar
    spikes are in each neuron's metadata under "st_bif_plus". Needs the `nir` extra.

    Raises ExportError with every node that has no counterpart.
    """
    import nir
    import numpy as np

    nodes: dict[str, Any] = {"input": nir.Input(np.array(input_shape))}
    unsupported, shape = [], torch.zeros(1, *input_shape, dtype=snn.dtype)
    for name, module in _chain(snn.model):
        if isinstance(module, NeuronSite):
            size = tuple(shape.shape[1:])
            theta = np.broadcast_to(
                module.threshold(shape).cpu().numpy()[0] if module.theta.dim() else module.theta.item(), size
            )
            node = nir.IF(r=np.ones(size), v_threshold=theta.copy(), v_reset=np.zeros(size))
            node.metadata = {"st_bif_plus": {"lo": module.lo, "hi": module.hi, "v_start": 0.5, "reset": "subtract"}}
        elif isinstance(module, nn.Linear):
            weight, bias = module.weight.detach().cpu().numpy(), module.bias
            node = nir.Linear(weight) if bias is None else nir.Affine(weight, bias.detach().cpu().numpy())
        elif isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            bias = np.zeros(module.out_channels) if module.bias is None else module.bias.detach().cpu().numpy()
            node = nir.Conv2d(
                tuple(shape.shape[2:]), module.weight.detach().cpu().numpy(), module.stride, module.padding,
                module.dilation, module.groups, bias,
            )  # fmt: skip
        elif isinstance(module, nn.Flatten):
            node = nir.Flatten({"input": np.array(shape.shape[1:])}, start_dim=0, end_dim=-1)
        elif isinstance(module, nn.Identity | nn.Dropout) or (isinstance(module, nn.ReLU) and _after_unsigned(nodes)):
            continue
        else:
            unsupported.append(f"{name} ({type(module).__name__})")
            continue
        nodes[name.replace(".", "_")] = node
        if not unsupported and not isinstance(module, NeuronSite):
            shape = module(shape)
    if unsupported:
        raise ExportError(
            f"NIR has no counterpart for {', '.join(unsupported[:8])}" + (" ..." if len(unsupported) > 8 else "")
        )
    nodes["output"] = nir.Output(np.array(shape.shape[1:]))
    order = list(nodes)
    graph = nir.NIRGraph(nodes, list(itertools.pairwise(order)))
    with replace_atomically(path) as partial:
        nir.write(str(partial), graph)
    return Path(path)


def _chain(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The leaves, in the order of registration, which in a chain is that of the forward."""
    found: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, path: str) -> None:
        if isinstance(module, NeuronSite) or not list(module.children()):
            found.append((path, module))
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def _after_unsigned(nodes: dict[str, Any]) -> bool:
    last = list(nodes.values())[-1]
    return (getattr(last, "metadata", None) or {}).get("st_bif_plus", {}).get("lo") == 0
