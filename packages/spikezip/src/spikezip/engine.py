"""From a QANN to a spiking network, and running it until it has provably settled.

drive   Every quantiser becomes a neuron that sees its summed input and sends theta * S. All other operators run on summed
        values, so none is rewritten: the SNN is the QANN with quantisers of limited slew. Exact to the last bit.
event   Tensors carry increments, as neuromorphic hardware would; operators are those of `spikezip.ops`. Rounding of summed
        increments flips integers, so a quiet network is brought up to its summed values and run on in drive form until it
        is quiet there too (`resync`).

A step in which no neuron fires, with the input constant and every neuron started, is a fixed point: the next step would
compute the same. There every tracer holds q of its summed input, by induction over the layers the QANN's own integer.
"""

import copy
import fnmatch
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from spikingjelly.activation_based import base
from tenfold_shared.errors import UserError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spikezip import ops
from spikezip.encoders import Direct, checked, difference
from spikezip.errors import ConversionError, NotConvergedWarning, StateError
from spikezip.functional import drive_step, stbif_plus_step
from spikezip.neuron import STBIFPlusNode
from spikezip.qann.attention import MaskedSoftmax, Product
from spikezip.qann.calibration import logits_of
from spikezip.qann.placement import Quantized, is_activation
from spikezip.qann.quantizer import Quantizer, levels, quantizers
from spikezip.stats import SpikeRecord, record
from spikezip.watch import forbid

STOPS = ("equilibrium", "stable", "confident", "none")
# Parameters that models add to or join with their tokens: constants, which enter at step 0 and not again.
CONSTANTS = (
    "cls_token", "dist_token", "reg_token", "class_token", "distillation_token", "mask_token", "register_tokens",
    "pos_embed", "pos_embedding", "position_embeddings",
)  # fmt: skip


@dataclass
class Clock:
    """What all neurons of one network share."""

    form: str = "drive"
    t: int = 0
    delay: int = 0
    burst: int = 1
    batch: int = 1
    stage: int = -1
    """Depth of the neurons met last in the first step."""
    unrolled: int = 0
    """Steps that one forward holds in its batch dimension; 0 for one step."""
    tallies: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Of this step: for each site and call (neurons that fired, sum of |o|, sum of o), each (B,)."""
    opened: int = 0
    """Calls met so far in the first step, which gives them their order."""
    held: bool = False
    """No neuron fires: a forward only to see what is connected to what."""
    keep_v: bool = False
    """Keep membranes in drive form too, for event steps that may follow."""
    keep_trains: str | None = None
    """Pattern of sites whose spike trains are kept."""
    unsigned: list[Tensor] = field(default_factory=list)
    """Of this step, event form: what neurons with lo = 0 sent, which a ReLU must let pass."""


@dataclass
class Call:
    """State of a site at one of its calls in a forward."""

    acc: Tensor
    v: Tensor
    stage: int
    order: int
    """Place among all calls of a forward."""
    fresh: bool
    """Its start value has not been sent yet (event form)."""
    train: list[Tensor] = field(default_factory=list)


class NeuronSite(STBIFPlusNode):
    """The neurons in a quantiser's place: one state for each call in a forward, a clock shared by the whole network."""

    calls: list[Call]
    start: list[Tensor]

    @classmethod
    def place(cls, quantizer: Quantizer, *, name: str, clock: Clock) -> "NeuronSite":
        site = cls.from_quantizer(quantizer, name=name)
        site.path, site.clock, site.parallel = name, clock, quantizer.parallel
        site.calls, site.start, site.called = [], [], 0
        # Tracers handed in and out by an exported step, which has no memory.
        site.explicit = None
        return site

    def reset(self) -> None:
        super().reset()
        self.calls, self.called = [], 0

    def detach(self) -> None:
        super().detach()
        for call in self.calls:
            call.acc, call.v = call.acc.detach(), call.v.detach()

    def forward(self, x: Tensor) -> Tensor:
        clock, index = self.clock, self.called
        self.called += 1
        if self.explicit is not None:
            theta = self.threshold(x)
            _, acc = drive_step(x, self.explicit[index], theta=theta, lo=self.lo, hi=self.hi, burst=clock.burst)
            self.explicit[index] = acc
            return acc * theta
        if index == len(self.calls):
            self._open(x, index)
        call = self.calls[index]
        if not clock.unrolled:
            self._fits(x, call)
            out = self._advance(x, call, clock.t)
            if clock.form == "event" and self.lo == 0:
                clock.unsigned.append(out)
            return out
        seq = x.reshape(clock.unrolled, x.shape[0] // clock.unrolled, *x.shape[1:])
        return torch.cat([self._advance(step, call, clock.t + i) for i, step in enumerate(seq)])

    def _open(self, x: Tensor, index: int) -> None:
        clock = self.clock
        if clock.t > 0:
            raise StateError(f"{self.path} is called more often than in the first step", hint="call reset first")
        clock.stage += not self.parallel
        if clock.unrolled:
            x = x[: x.shape[0] // clock.unrolled]
        acc = torch.zeros_like(x)
        if index < len(self.start):
            try:
                acc = acc + self.start[index].to(x)
            except RuntimeError as error:
                raise StateError(
                    f"{self.path}: the warm start has shape {tuple(self.start[index].shape)}, the input {tuple(x.shape)}",
                    hint="warm-start with inputs of the same size",
                ) from error
        self.calls.append(Call(acc, 0.5 - acc, max(clock.stage, 0), clock.opened, fresh=True))
        clock.opened += 1

    def _fits(self, x: Tensor, call: Call) -> None:
        if call.acc.shape != x.shape or call.acc.dtype != x.dtype:
            raise StateError(
                f"{self.path}: the state is {call.acc.dtype} of shape {tuple(call.acc.shape)}, the input {x.dtype} of "
                f"{tuple(x.shape)}",
                hint="call reset first",
            )

    def _advance(self, x: Tensor, call: Call, t: int) -> Tensor:
        clock, theta = self.clock, self.threshold(x)
        waiting = clock.held or t < clock.delay * call.stage
        before = call.acc
        limits: dict[str, Any] = {"theta": theta, "lo": self.lo, "hi": self.hi, "burst": clock.burst}
        if clock.form == "event":
            if waiting:
                fired, call.v = torch.zeros_like(before), call.v + x / theta
            else:
                fired, call.v, call.acc = stbif_plus_step(x, call.v, acc=before, **limits)
            sent = call.acc if call.fresh else fired
        else:
            if waiting:
                fired = torch.zeros_like(before)
            else:
                fired, call.acc = drive_step(x, before, **limits)
            call.v = x / theta + 0.5 - call.acc if clock.keep_v else call.v
            sent = call.acc
        call.fresh = False
        clock.tallies.append(self._tally(fired.detach()))
        if clock.keep_trains and fnmatch.fnmatch(self.path, clock.keep_trains):
            call.train.append(fired.detach().to(torch.int8))
        return sent * theta

    def _tally(self, fired: Tensor) -> tuple[Tensor, ...]:
        """(neurons that fired, sum of |o|, sum of o) of each sample; equal shares where samples cannot be told apart."""
        batch = self.clock.batch
        if len(fired) != batch:
            fired = fired.reshape(batch if len(fired) % batch == 0 else 1, -1)
        inner = tuple(range(1, fired.dim()))
        # Sums of whole numbers under 2^24 are exact in float32.
        exact = torch.float64 if fired.dtype == torch.float64 else torch.float32
        both, net = fired.abs().sum(inner, dtype=exact), fired.sum(inner, dtype=exact)
        moving = both if self.clock.burst == 1 else fired.count_nonzero(inner)
        if len(fired) == batch:
            return moving, both, net
        return tuple(x.double().expand(batch) / batch for x in (moving, both, net))


@dataclass(frozen=True)
class Certificate:
    """Whether a run reached its fixed point, and how that is known."""

    settled: bool
    step: int
    """Steps that were run."""
    neurons: int
    """Of all samples together."""
    moving: int
    """Neurons that fired in the last step, or had not started."""
    moving_by_layer: dict[str, int]
    exact: bool
    """The last step was computed from summed values, so no rounding of increments is in it."""

    def __str__(self) -> str:
        if self.settled:
            how = "from summed values" if self.exact else "from increments, rounding included"
            return (
                f"settled: none of {self.neurons} neurons fired in step {self.step}, computed {how}; the state is final"
            )
        return f"not settled: {self.moving} of {self.neurons} neurons still move after {self.step} steps"


@dataclass
class RunResult:
    """What a run gives. B samples, C classes, T steps."""

    logits: Tensor
    """(B, C): after the last step; with stop="confident" those of each sample's own exit."""
    trajectory: Tensor | None
    """(T, B, C): the logits after each step, if asked for."""
    steps: int
    converged: bool
    converged_samples: Tensor
    """(B,), bool."""
    per_sample_steps: Tensor
    """(B,): the step after which no neuron of the sample fired; with stop="confident" the step of its exit."""
    moving: int
    """Neurons that still moved in the last step; 0 when converged."""
    certificate: Certificate
    spikes: SpikeRecord


class SpikingModel(nn.Module):
    """A converted network. `forward` is one step; `run` goes on to equilibrium.

    engine: "drive" or "event". resync: event engine only, see the module's text. `qann` is the network it equals.
    """

    def __init__(self, qann: nn.Module, *, engine: str, resync: bool) -> None:
        super().__init__()
        self.qann, self.engine, self.resync = qann, engine, resync
        # Weights are shared with the QANN; thresholds are the neurons' own.
        self.model = copy.deepcopy(qann, {id(p): p for n, p in qann.named_parameters() if not n.endswith(".s")})
        self.clock = Clock(form=engine, keep_v=engine == "event")
        self._place_neurons()
        self.constants: dict[str, Tensor] = {}
        if engine == "event":
            self.constants = dict(_event_operators(self.model, ""))
        self.sites: list[NeuronSite] = [m for m in self.model.modules() if isinstance(m, NeuronSite)]
        """The neurons' sites, in the order of registration."""
        self.operators: list[ops.SpikeOperator] = [m for m in self.model.modules() if isinstance(m, ops.SpikeOperator)]
        """The operators on increments; none in the drive engine."""
        self._guarded, self._inline_relu = engine != "event", False
        self._stale = False
        self._logits: Tensor | None = None
        self._last_input: Any = None

    def _place_neurons(self) -> None:
        made: dict[int, NeuronSite] = {}
        for name, quantizer in quantizers(self.model).items():
            made[id(quantizer)] = NeuronSite.place(quantizer, name=name, clock=self.clock)
        # A quantiser can hang in several places of the tree (shared layers).
        for module in list(self.model.modules()):
            for name, child in list(module._modules.items()):
                if id(child) in made:
                    module._modules[name] = made[id(child)]

    @property
    def dtype(self) -> torch.dtype:
        return next(p for p in self.qann.parameters() if p.is_floating_point()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.qann.parameters()).device

    def reset(self) -> None:
        """Back to rest, or to the warm start if there is one. spikingjelly's `functional.reset_net` does the same."""
        for module in self.model.modules():
            if isinstance(module, base.MemoryModule):
                module.reset()
        clock = self.clock
        clock.t, clock.stage, clock.opened, clock.form = 0, -1, 0, self.engine
        self._logits, self._last_input, self._stale = None, None, False

    def set_schedule(self, *, delay: int) -> None:
        """Each stage of neurons starts `delay` steps after the one before: later answers, fewer spikes that cancel."""
        if delay < 0:
            raise UserError(f"delay is {delay}, expected 0 or more steps")
        self.clock.delay = int(delay)
        self._stale = self.clock.t > 0

    def set_burst(self, burst: int) -> None:
        """Let a neuron send up to `burst` unit spikes a step. 1 is the paper's neuron."""
        if burst < 1:
            raise UserError(f"burst is {burst}, expected 1 or more")
        self.clock.burst = int(burst)
        self._stale = self.clock.t > 0

    def warm_start(self, reference_inputs: Any | None) -> None:
        """Start from the mean state of reference inputs instead of from rest; None goes back to rest.

        The equilibrium is the same, the way to it shorter. Inputs must have the size of those to be run.
        """
        for site in self.sites:
            site.start = []
        if reference_inputs is not None:
            for name, found in integers(self.qann, checked(reference_inputs, self.device, self.dtype)).items():
                site = self.model.get_submodule(name)
                # Half goes to zero: a tie is worth no spike.
                site.start = [q.mean(0, keepdim=True).round() for q in found]
        self.reset()

    def forward(self, inputs: Any) -> Tensor:
        """One step; logits (B, C) so far. inputs: summed up to this step, as an encoder gives them.

        Raises StateError after a change of schedule, burst or shape without `reset`, ConversionError under autocast.
        """
        if self._stale:
            raise StateError("schedule or burst was changed in the middle of a run", hint="call reset first")
        if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
            raise ConversionError("autocast is active; it rounds what has to be exact", hint="leave the autocast block")
        clock = self.clock
        clock.tallies, clock.unsigned = [], []
        for site in self.sites:
            site.called = 0
        for operator in self.operators:
            operator.begin_step()
        if clock.form == "drive":
            self._set_form("drive")
            self._logits = logits_of(_call(self.model, inputs))
        else:
            self._logits = self._increment(inputs)
        if clock.t > 0 and any(site.called != len(site.calls) for site in self.sites):
            odd = next(site for site in self.sites if site.called != len(site.calls))
            raise StateError(f"{odd.path} was called {odd.called} times, in the first step {len(odd.calls)} times")
        self._last_input = inputs
        clock.t += max(clock.unrolled, 1)
        return self._logits

    def _set_form(self, form: str) -> None:
        for operator in self.operators:
            operator.form = form

    def _increment(self, inputs: Any) -> Tensor:
        self._set_form("event")
        first = self._logits is None
        if not first:
            inputs = difference(inputs, self._last_input)
        zeros = {} if first else {name: torch.zeros_like(value) for name, value in self.constants.items()}
        passing = _PassRelu(self.clock)
        if self._guarded:
            with passing if self._inline_relu else nullcontext():
                out = _call(self.model, inputs, zeros)
        else:
            message = "applies a nonlinear function to single increments"
            guard = forbid(self.model, _NONLINEAR, ConversionError, message, allowed=(ops.SpikeOperator, NeuronSite))
            with guard, passing:
                out = _call(self.model, inputs, zeros)
            self._guarded, self._inline_relu = True, passing.used
        out = logits_of(out)
        return out if self._logits is None else self._logits + out

    @torch.no_grad()
    def run(
        self,
        inputs: Any,
        *,
        max_steps: int = 64,
        stop: str = "equilibrium",
        patience: int = 3,
        confidence: float = 0.9,
        return_trajectory: bool = False,
        encoder: Direct | None = None,
        reset: bool = True,
        retire: bool = False,
    ) -> RunResult:
        """Run until the network has settled, or for `max_steps` steps.

        inputs: (B, ...), or what the encoder takes. stop: "equilibrium", no neuron fires; "stable", no prediction has
        changed for `patience` steps; "confident", each sample leaves with the logits at which its largest probability has
        been `confidence` or more for `patience` steps; "none". encoder: how the input enters in time, at once if not
        given. reset: False goes on from the present state, for streams whose frames are alike. retire: take settled
        samples out of the batch (drive engine); a smaller batch may give other last bits in the matrix products.

        Raises UserError for values out of range or an input with NaN or infinity, StateError when the state does not fit.
        Warns NotConvergedWarning when stop is "equilibrium" and max_steps was not enough.
        """
        if max_steps < 1 or patience < 1:
            raise UserError(f"max_steps is {max_steps} and patience {patience}, expected 1 or more")
        if stop not in STOPS:
            raise UserError(f"stop is '{stop}', expected one of {', '.join(STOPS)}")
        if retire and self.engine == "event":
            raise UserError("samples retire in the drive engine only", hint="convert with engine='drive'")
        encoder = encoder or Direct()
        inputs = checked(inputs, self.device, self.dtype)
        batch = encoder.batch(inputs)
        if reset:
            self.reset()
        elif self.clock.t and self.clock.batch != batch:
            raise StateError(f"the state holds {self.clock.batch} samples, the input {batch}", hint="call reset first")
        run = _Run(self, batch, stop, patience, confidence)
        trajectory = []
        # A stream goes on with its clock; the encoder starts anew.
        self.clock.form = self.engine
        for t in range(max_steps):
            self.clock.batch = len(run.active)
            logits = run.observe(self.forward(_rows(encoder.accumulated(inputs, t), run)), t)
            constant = t + 1 >= encoder.steps and self.clock.t > self.clock.delay * max(self.clock.stage, 0)
            if return_trajectory:
                trajectory.append(logits.clone())
            if constant and not run.moving and self.clock.form == "event" and self.resync:
                self.clock.form = "drive"
                continue
            if run.finished(constant, exact=self.clock.form == "drive" or not self.resync):
                break
            if retire and constant:
                run.retire()
        result = run.result(torch.stack(trajectory) if return_trajectory else None)
        self.clock.batch = batch
        if stop == "equilibrium" and not result.converged:
            warnings.warn(NotConvergedWarning(str(result.certificate)), stacklevel=2)
        return result

    @torch.no_grad()
    def run_multi_step(self, inputs: Any, steps: int) -> Tensor:
        """The logits (T, B, C) of T steps from rest, computed layer by layer on T * B rows (step mode "m"); drive engine.

        Matrix products of T * B rows may give other last bits than those of B rows: compare in float64, or with a QANN at
        that batch.
        """
        if steps < 1:
            raise UserError(f"steps is {steps}, expected 1 or more")
        if self.engine != "drive":
            raise UserError("layer by layer runs in the drive engine only", hint="convert with engine='drive'")
        self.reset()
        inputs = checked(inputs, self.device, self.dtype)
        self.clock.batch = Direct().batch(inputs)
        self.clock.unrolled = steps
        try:
            logits = self.forward(_repeat(inputs, steps))
        finally:
            self.clock.unrolled = 0
        return logits.reshape(steps, -1, *logits.shape[1:])

    def save_pretrained(self, folder: Any) -> None:
        """Write the network to a folder; `spikezip.load` reads it."""
        from spikezip.storage import save

        save(self, folder)


class _Run:
    """The bookkeeping of one run."""

    def __init__(self, snn: SpikingModel, batch: int, stop: str, patience: int, confidence: float):
        self.snn, self.batch, self.stop, self.patience, self.confidence = snn, batch, stop, patience, confidence
        self.active = torch.arange(batch)
        self.last_fired = torch.zeros(batch, dtype=torch.long)
        self.exits = torch.zeros(batch, dtype=torch.long)
        self.same = torch.zeros(batch, dtype=torch.long)
        self.settled = torch.zeros(batch, dtype=torch.bool)
        self.logits: Tensor | None = None
        self.exit_logits: Tensor | None = None
        self.counts: list[list[list[float]]] = []
        self.moving, self.t, self.exact, self.constant = 0, 0, True, False

    def observe(self, logits: Tensor, t: int) -> Tensor:
        clock = self.snn.clock
        moving, both, net = (torch.stack(rows) for rows in zip(*clock.tallies, strict=True))
        moved = (both > 0).any(0).cpu()
        counts = torch.stack([rows.sum(1, dtype=torch.float64) for rows in (moving, both, net)], dim=1)
        self.counts.append(counts.tolist())
        self.moving = round(sum(row[0] for row in self.counts[-1]))
        self.t = t + 1
        self.last_fired[self.active[moved]] = self.t
        self.quiet = ~moved
        before = self.logits
        if before is None:
            self.logits = logits.clone()
            self.exit_logits = logits.clone()
        else:
            self.logits = before.clone()
            self.logits[self.active] = logits
        if self.stop == "stable":
            alike = before is not None and (before.argmax(-1) == self.logits.argmax(-1)).cpu()
            self.same = (self.same + 1) * alike
        elif self.stop == "confident":
            sure = (self.logits.softmax(-1).amax(-1) >= self.confidence).cpu()
            self.same = (self.same + 1) * sure
            leaving = (self.same >= self.patience) & (self.exits == 0)
            self.exits[leaving] = self.t
            self.exit_logits[leaving] = self.logits[leaving]  # type: ignore[index]
        return self.logits

    def finished(self, constant: bool, exact: bool) -> bool:
        self.exact, self.constant = exact, constant
        if constant and exact:
            self.settled[self.active] = self.quiet
        if self.stop == "none":
            return False
        if constant and exact and bool(self.settled.all()):
            return True
        if self.stop == "stable":
            return bool((self.same >= self.patience).all())
        return self.stop == "confident" and bool((self.exits > 0).all())

    def retire(self) -> None:
        """Keep only the samples that still move."""
        keep = ~self.quiet
        if bool(keep.all()) or not bool(keep.any()):
            return
        for site in self.snn.sites:
            for call in site.calls:
                if call.acc.shape[0] != len(self.active):
                    raise StateError(f"{site.path}: samples cannot be told apart in shape {tuple(call.acc.shape)}")
                site_keep = keep.to(call.acc.device)
                call.acc, call.v = call.acc[site_keep], call.v[site_keep]
        self.active = self.active[keep]

    def result(self, trajectory: Tensor | None) -> RunResult:
        snn, clock = self.snn, self.snn.clock
        calls = [(site.path if len(site.calls) == 1 else f"{site.path}#{i}", site, call)
                 for site in snn.sites for i, call in enumerate(site.calls)]  # fmt: skip
        order = _call_order(snn)
        calls = [calls[i] for i in order]
        names = [name for name, _, _ in calls]
        spikes = record(names, self.counts, levels=[call.acc for _, _, call in calls], samples=self.batch)
        waiting = [clock.t <= clock.delay * call.stage for _, _, call in calls]
        last = [round(row[0]) for row in self.counts[-1]]
        by_layer = {
            name: call.acc.numel() if late else moved
            for (name, _, call), late, moved in zip(calls, waiting, last, strict=True)
            if moved or late
        }
        converged = bool(self.settled.all())
        moving = 0 if converged else sum(by_layer.values())
        certificate = Certificate(
            converged, self.t, sum(call.acc.numel() for _, _, call in calls), moving,
            {} if converged else by_layer, self.exact and (snn.clock.form == "drive"),
        )  # fmt: skip
        logits = self.logits
        assert logits is not None
        steps = self.last_fired.clone()
        if self.stop == "confident":
            left = self.exits > 0
            logits = torch.where(left.unsqueeze(-1).to(logits.device), self.exit_logits, logits)
            steps = torch.where(left, self.exits, self.t)
        return RunResult(
            logits,
            trajectory,
            self.t,
            converged,
            self.settled,
            steps,
            moving,
            certificate,
            spikes,
        )


def _call_order(snn: SpikingModel) -> list[int]:
    """Positions, in the list of all sites' calls, in the order in which a forward reaches them."""
    flat = [call for site in snn.sites for call in site.calls]
    return sorted(range(len(flat)), key=lambda i: flat[i].order)


_RELU = {torch.relu, torch.Tensor.relu, nn.functional.relu}
_NONLINEAR = {
    *_RELU, torch.tanh, torch.sigmoid, torch.softmax, torch.Tensor.softmax, torch.Tensor.tanh, torch.Tensor.sigmoid,
    nn.functional.gelu, nn.functional.silu, nn.functional.softmax, nn.functional.tanh, nn.functional.sigmoid,
    nn.functional.layer_norm, nn.functional.scaled_dot_product_attention,
}  # fmt: skip


class _PassRelu(TorchFunctionMode):
    """Lets increments pass a ReLU that is written into a forward, where what they sum to is never negative."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.used = clock, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _RELU and any(args[0] is sent for sent in self.clock.unsigned):
            self.used = True
            return args[0]
        return function(*args, **(kwargs or {}))


def convert(
    qann: nn.Module, *, engine: str = "drive", dtype: torch.dtype | None = None, resync: bool = True
) -> SpikingModel:
    """The spiking network of a calibrated QANN; the QANN itself is left as it is.

    engine: "drive" or "event", see the module's text. dtype: the QANN's own if not given. resync: event engine only;
    False trusts summed increments, which in float32 end in wrong integers.

    Raises ConversionError, naming the module path, for a step that is not finite and positive, a module in training mode,
    active dropout or autocast, and in the event engine for constants and functions that increments cannot go through;
    UncalibratedError for a quantiser without a step.
    """
    if engine not in ("drive", "event"):
        raise UserError(f"engine is '{engine}', expected drive or event")
    if not quantizers(qann):
        raise ConversionError("the model has no quantisers", hint="call quantize and calibrate first")
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        raise ConversionError("autocast is active; it rounds what has to be exact", hint="leave the autocast block")
    for name, module in qann.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ConversionError(f"{name}: dropout is active", hint="call qann.eval() first")
        if module.training:
            raise ConversionError(f"{name or 'the model'} is in training mode", hint="call qann.eval() first")
    for name, quantizer in quantizers(qann).items():
        STBIFPlusNode.from_quantizer(quantizer, name=name)
    qann = copy.deepcopy(qann)
    if dtype is not None:
        qann = qann.to(dtype)
    for parameter in qann.parameters():
        parameter.requires_grad_(False)
    return SpikingModel(qann, engine=engine, resync=resync)


def _event_operators(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Put event operators in place of plain ones below `module`; yields the constants' names and values."""
    for name, value in module.named_parameters(recurse=False):
        here = f"{path}.{name}" if path else name
        if name in CONSTANTS:
            yield here, value
        elif type(module).__name__ != "LayerScale":
            raise ConversionError(
                f"{here}: the event engine does not know how {type(module).__name__} uses this parameter",
                hint="use engine='drive'",
            )
    for name, child in list(module.named_children()):
        here = f"{path}.{name}" if path else name
        if isinstance(child, NeuronSite):
            continue
        follows_unsigned = isinstance(module, Quantized) and isinstance(module[0], NeuronSite) and module[0].lo == 0
        replacement = _event_operator(child, follows_unsigned)
        if replacement is not None:
            module._modules[name] = replacement
        else:
            yield from _event_operators(child, here)


def _event_operator(module: nn.Module, follows_unsigned: bool) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return ops.SpikeLinear(module)
    if isinstance(module, nn.Conv2d):
        return ops.SpikeConv2d(module)
    if isinstance(module, nn.Embedding):
        return ops.SpikeEmbedding(module)
    if isinstance(module, nn.LayerNorm):
        return ops.SpikeLayerNorm(module)
    if isinstance(module, Product):
        return ops.SpikeMatmul()
    if isinstance(module, MaskedSoftmax):
        return ops.SpikeSoftmax()
    if is_activation(module):
        # A ReLU of what cannot be negative passes every increment, the negative ones too.
        return nn.Identity() if follows_unsigned and isinstance(module, nn.ReLU) else ops.SpikeFn(module)
    return None


@torch.no_grad()
def integers(qann: nn.Module, inputs: Any) -> dict[str, list[Tensor]]:
    """The integer levels of every quantiser of a QANN, a list by calls, for inputs as the model takes them."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, quantizer in quantizers(qann).items():
        kept = found.setdefault(name, [])

        def keep(module: Any, args: Any, kept: list[Tensor] = kept) -> None:
            kept.append(levels(args[0], module.step(args[0]), module.lo, module.hi))

        hooks.append(quantizer.register_forward_pre_hook(keep))
    try:
        _call(qann, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _call(model: nn.Module, inputs: Any, replaced: dict[str, Tensor] | None = None) -> Any:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, dict):
        kwargs = inputs
    else:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
    if replaced:
        return torch.func.functional_call(model, replaced, args, kwargs, tie_weights=False)
    return model(*args, **kwargs)


def _rows(inputs: Any, run: _Run) -> Any:
    """The rows of the samples that have not retired."""
    if len(run.active) == run.batch:
        return inputs
    if isinstance(inputs, dict):
        return {k: _rows(v, run) for k, v in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_rows(x, run) for x in inputs)
    return inputs[run.active.to(inputs.device)] if isinstance(inputs, Tensor) else inputs


def _repeat(inputs: Any, times: int) -> Any:
    if isinstance(inputs, dict):
        return {k: _repeat(v, times) for k, v in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_repeat(x, times) for x in inputs)
    return inputs.repeat(times, *[1] * (inputs.dim() - 1)) if isinstance(inputs, Tensor) else inputs
