"""What a run costs: synaptic operations counted spike by spike, beside the same network as an ANN and as int8.

A spike at the input of an operator makes as many accumulations (AC) as the operator has outputs for it:

    linear         out_features
    convolution    the kernel positions that reach it, borders included
    q k^T          N keys for a spike of q, N queries for a spike of k
    p v            head width for a spike of p, N queries for a spike of v

An input that is no spike train (the image at the patch convolution, a LayerNorm output without a quantiser) costs
multiply-accumulations (MAC) for each of its changes. Prices are spikingjelly's presets (45 nm: 4.6 pJ an fp32 MAC, 0.9 pJ
an fp32 AC, 0.23 and 0.03 pJ in int8). Biases enter once. Energy is counted in the drive engine; the spikes are those of the
event form.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from spikingjelly.activation_based.op_counter.simple_energy import SimpleEnergyCostConfig
from tenfold_shared.errors import UserError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spikezip.encoders import Direct, checked
from spikezip.engine import NeuronSite, RunResult, SpikingModel, _call
from spikezip.qann.attention import MaskedSoftmax, Product
from spikezip.qann.placement import is_activation

# Multiplications an element, of functions that are computed anew when their input changes: mean, variance, scale and
# affine of LayerNorm; shift, exponential, sum and division of softmax; a polynomial for an activation.
ELEMENT_MACS = {"layer norm": 4, "softmax": 4, "activation": 4}
# Functions through which a spike passes as it is: views, copies, and a ReLU of what is never negative.
_PASSES = {
    "view", "_unsafe_view", "_reshape_alias", "reshape", "transpose", "permute", "expand", "clone", "select", "slice",
    "unsqueeze", "squeeze", "t", "alias", "detach", "split", "split_with_sizes", "unbind", "contiguous", "relu", "unflatten",
    "flatten", "_to_copy", "lift_fresh",
}  # fmt: skip


@dataclass
class EnergyReport:
    """Operations of one run, of all its samples together; the reports give microjoule a sample."""

    samples: int
    steps: int
    ac: dict[str, int] = field(default_factory=dict)
    """Accumulations by operator."""
    mac: dict[str, int] = field(default_factory=dict)
    """Multiply-accumulations of inputs that are no spikes, by operator."""
    ann_macs: dict[str, int] = field(default_factory=dict)
    """Multiply-accumulations of one forward of the ANN, by operator."""
    bias: int = 0
    """Additions of biases, once."""
    neuron_updates: int = 0
    """Membranes touched, every neuron in every step."""
    accumulators: int = 0
    """Additions to the running sums of products and of memoryless functions."""
    elements: dict[str, int] = field(default_factory=dict)
    """Elements computed anew, by kind of memoryless function."""
    ann_elements: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    """Rows (tokens) that linear maps of spikes had to work on if every step were dense."""
    rows_touched: int = 0
    """Those of them whose input spiked, the only ones that a step has to compute anew."""
    weights: int = 0
    neurons: int = 0

    @property
    def total_ac(self) -> int:
        return sum(self.ac.values())

    @property
    def total_mac(self) -> int:
        return sum(self.mac.values())

    @property
    def total_ann_macs(self) -> int:
        return sum(self.ann_macs.values())

    @property
    def skippable(self) -> float:
        """Share of the rows of linear maps that token skipping would leave out, over the whole run."""
        return 1 - self.rows_touched / self.rows if self.rows else 0.0

    def paper(self) -> dict[str, float]:
        """Matrix products only, as papers count: microjoule a sample of ANN fp32, QANN int8 and SNN."""
        fp32, int8 = SimpleEnergyCostConfig.fp32(), SimpleEnergyCostConfig.int8()
        return self._sample(
            self.total_ann_macs * fp32.e_mac_pj,
            self.total_ann_macs * int8.e_mac_pj,
            self.total_ac * fp32.e_ac_pj + self.total_mac * fp32.e_mac_pj,
        )

    def full(self) -> dict[str, float]:
        """With biases, neuron updates, running sums, LayerNorm, softmax and activations: microjoule a sample."""
        fp32, int8 = SimpleEnergyCostConfig.fp32(), SimpleEnergyCostConfig.int8()
        again = sum(ELEMENT_MACS[kind] * n for kind, n in self.elements.items())
        once = sum(ELEMENT_MACS[kind] * n for kind, n in self.ann_elements.items())
        additions = self.total_ac + self.bias + self.neuron_updates + self.accumulators
        return self._sample(
            (self.total_ann_macs + once) * fp32.e_mac_pj + self.bias * fp32.e_ac_pj,
            # Memoryless functions stay in fp32 in an int8 network too.
            self.total_ann_macs * int8.e_mac_pj + once * fp32.e_mac_pj + self.bias * int8.e_ac_pj,
            additions * fp32.e_ac_pj + (self.total_mac + again) * fp32.e_mac_pj,
        )

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes a sample needs: weights, neuron state (fp32 membrane, int8 tracer), weights read by operations."""
        neurons = self.neurons // self.samples
        return {
            "ANN fp32": {
                "weights": 4 * self.weights,
                "state": 0,
                "weight reads": 4 * self.total_ann_macs // self.samples,
            },
            "QANN int8": {"weights": self.weights, "state": 0, "weight reads": self.total_ann_macs // self.samples},
            "SNN": {
                "weights": 4 * self.weights,
                "state": 5 * neurons,
                "weight reads": 4 * (self.total_ac + self.total_mac) // self.samples,
            },
        }

    def _sample(self, *picojoule: float) -> dict[str, float]:
        return {
            name: pj * 1e-6 / self.samples for name, pj in zip(("ANN fp32", "QANN int8", "SNN"), picojoule, strict=True)
        }


class _Sources(TorchDispatchMode):
    """Follows each site's spikes through views and copies to the operators that take them."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, NeuronSite] = {}
        self.alive: list[Tensor] = []

    def mark(self, x: Tensor, site: NeuronSite) -> None:
        self.of[id(x)] = site
        self.alive.append(x)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        source = self.of.get(id(args[0])) if args else None
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                # Kept alive, so that no other tensor takes its identity.
                self.alive.append(made)
                if source is not None and name in _PASSES and not (name == "relu" and source.lo < 0):
                    self.of[id(made)] = source
        return out


def measure(
    snn: SpikingModel, inputs: Any, *, encoder: Direct | None = None, **run: Any
) -> tuple[EnergyReport, RunResult]:
    """Run a network and count what it costs. run: options of `SpikingModel.run`.

    Raises UserError in the event engine, and for bursts of neurons with one step a channel.
    """
    if snn.engine != "drive":
        raise UserError("energy is counted in the drive engine, whose spikes are the same", hint="use engine='drive'")
    if run.get("retire"):
        raise UserError("energy is counted over whole batches", hint="leave out retire=True")
    counter = _Counter(snn)
    plain = checked(inputs, snn.device, snn.dtype)
    start = (encoder or Direct()).accumulated(plain, 0)
    counter.trace(start, (encoder or Direct()).batch(plain))
    with counter.watching():
        result = snn.run(inputs, encoder=encoder, **run)
    report = counter.report
    report.samples, report.steps = result.spikes.samples, result.steps
    report.neurons = result.certificate.neurons
    report.neuron_updates = result.certificate.neurons * result.steps
    report.weights = sum(p.numel() for n, p in snn.qann.named_parameters() if not n.endswith(".s"))
    return report, result


class _Counter:
    """Hooks on the operators of one network."""

    def __init__(self, snn: SpikingModel):
        self.snn = snn
        self.report = EnergyReport(1, 0)
        self.sources: dict[tuple[str, int, int], NeuronSite | None] = {}
        self.last: dict[tuple[str, int, int], Tensor] = {}
        self.calls: dict[str, int] = defaultdict(int)
        self.burst = snn.clock.burst > 1
        self.operators = {
            name: module
            for name, module in snn.model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | Product | nn.LayerNorm | MaskedSoftmax)
            or is_activation(module)
        }

    def trace(self, inputs: Any, batch: int) -> None:
        """One forward in which no neuron fires: where each operator's input comes from, and what it starts as."""
        snn, mode = self.snn, _Sources()
        snn.reset()
        snn.clock.held, snn.clock.batch = True, batch
        hooks = [site.register_forward_hook(lambda m, _, out: mode.mark(out, m)) for site in snn.sites]
        hooks += [
            module.register_forward_pre_hook(lambda _, args, name=name: self._note(mode, name, args))
            for name, module in self.operators.items()
        ]
        try:
            with torch.no_grad(), mode:
                _call(snn.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
            self.calls.clear()
            snn.clock.held = False
            snn.reset()

    def _note(self, mode: _Sources, name: str, args: tuple[Any, ...]) -> None:
        call = self._turn(name)
        for i, x in enumerate(args):
            if isinstance(x, Tensor):
                source = self.sources[name, call, i] = mode.of.get(id(x))
                if source is not None:
                    self.last[name, call, i] = x.detach().clone()

    def _turn(self, name: str) -> int:
        self.calls[name] += 1
        return self.calls[name] - 1

    def watching(self) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        stack.callback(self.snn.model.register_forward_pre_hook(lambda *_: self.calls.clear()).remove)
        for name, module in self.operators.items():
            hook = module.register_forward_hook(lambda m, args, out, name=name: self._count(name, m, args, out))
            stack.callback(hook.remove)
        return stack

    def _count(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        call, report = self._turn(name), self.report
        first = self.snn.clock.t == 0
        if isinstance(module, nn.Linear | nn.Conv2d | Product):
            if first:
                report.ann_macs[name] = report.ann_macs.get(name, 0) + _macs(module, args, out)
                if getattr(module, "bias", None) is not None:
                    report.bias += out.numel()
            for i, x in enumerate(args[:2] if isinstance(module, Product) else args[:1]):
                events, source = self._events(name, call, i, x)
                cost = _fan_out(module, args, i, events)
                table = report.mac if source is None else report.ac
                table[name] = table.get(name, 0) + cost
                if isinstance(module, nn.Linear) and source is not None:
                    touched = events.any(-1)
                    report.rows += touched.numel()
                    report.rows_touched += int(touched.sum())
                if isinstance(module, Product):
                    report.accumulators += int(events.sum())
            return
        kind = (
            "layer norm"
            if isinstance(module, nn.LayerNorm)
            else "softmax"
            if isinstance(module, MaskedSoftmax)
            else "activation"
        )
        if isinstance(module, nn.ReLU):
            return
        events, _ = self._events(name, call, 0, args[0])
        report.accumulators += int(events.sum())
        touched = int(events.any(-1).sum()) * events.shape[-1] if kind != "activation" else int(events.sum())
        report.elements[kind] = report.elements.get(kind, 0) + touched
        if first:
            report.ann_elements[kind] = report.ann_elements.get(kind, 0) + out.numel()

    def _events(self, name: str, call: int, i: int, x: Tensor) -> tuple[Tensor, NeuronSite | None]:
        """How many unit events each element of x had in this step."""
        key = (name, call, i)
        source = self.sources.get(key)
        before = self.last.get(key)
        change = x if before is None else x - before
        self.last[key] = x.detach().clone()
        if source is None or not self.burst:
            return (change != 0).long(), source
        if source.theta.dim():
            raise UserError(f"{source.path} has one step a channel, whose bursts cannot be counted", hint="use burst 1")
        return (change / source.theta).abs().round().long(), source


def _fan_out(module: nn.Module, args: tuple[Any, ...], i: int, events: Tensor) -> int:
    """Operations that the events at argument i of an operator cause."""
    if isinstance(module, nn.Linear):
        return int(events.sum()) * module.out_features
    if isinstance(module, nn.Conv2d):
        ones = torch.ones_like(module.weight, dtype=torch.float64)
        # Every event meets each kernel position that reaches it, once for each output channel.
        reach = F.conv2d(events.double(), ones, None, module.stride, module.padding, module.dilation, module.groups)
        return int(reach.sum().round())
    other = args[1].shape[-1] if i == 0 else args[0].shape[-2]
    return int(events.sum()) * other


def _macs(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> int:
    """Multiply-accumulations of the dense operator."""
    if isinstance(module, nn.Linear):
        return out.numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        return _fan_out(module, args, 0, torch.ones_like(args[0], dtype=torch.long))
    return out.numel() * args[0].shape[-1]
