"""One network as teacher and student: predictions as x̂, guidance in one call, a LoRA that switches on and off."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor, nn

from mlcm.schedule import NoiseSchedule

Arguments = dict[str, Any]
"""Keyword arguments of a network: tensors with one row per sample, in dictionaries that may be nested."""

SDXL_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""The layers that the authors' LoRA adapts."""


@dataclass(frozen=True)
class Condition:
    """What a batch is conditioned on."""

    given: Arguments = field(default_factory=dict)
    """Arguments of the conditional call."""
    null: Arguments = field(default_factory=dict)
    """Arguments of the unconditional call; the same names."""

    def rows(self, index: Tensor) -> "Condition":
        """The condition of some rows. index: long or bool (batch,)."""
        return Condition(_map(lambda x: x[index], self.given), _map(lambda x: x[index], self.null))

    @staticmethod
    def cat(parts: "Sequence[Condition]") -> "Condition":
        """Batches one after the other."""
        return Condition(_cat([p.given for p in parts]), _cat([p.null for p in parts]))


Student = Callable[[Tensor, Tensor, Condition], Tensor]
"""(z, t, condition) to x̂."""
Teacher = Callable[[Tensor, Tensor, Condition, float | Tensor], Tensor]
"""(z, t, condition, guidance scale) to the guided x̂. A scale of 1 means no guidance."""


def _map(function: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in arguments.items()}


def _cat(parts: Sequence[Arguments]) -> Arguments:
    return {
        k: _cat([p[k] for p in parts]) if isinstance(v, dict) else torch.cat([p[k] for p in parts])
        for k, v in parts[0].items()
    }


def guide(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: u + w (c - u). In x̂ it is the same as in the noise, which is affine in x̂ at fixed (z, t)."""
    if isinstance(scale, Tensor):
        scale = scale.view(-1, *[1] * (conditional.ndim - 1))
    return unconditional + scale * (conditional - unconditional)


class Denoiser:
    """x̂ of a network that predicts noise, v, the sample or a velocity.

    network: called as network(z, t, **arguments), answers a tensor or an object with `.sample`.
    """

    def __init__(self, network: Callable[..., Any], schedule: NoiseSchedule):
        self.network, self.schedule = network, schedule
        self.calls = 0
        """Rows the network has seen, the two halves of guidance counted apart."""

    def x0(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The conditional prediction. z: (batch, ...); t: long (batch,)."""
        return self._predict(z, t, condition.given)

    def guided(self, z: Tensor, t: Tensor, condition: Condition, scale: float | Tensor) -> Tensor:
        """The guided prediction, both halves as one batched call; at scale 1 the conditional call alone."""
        if not isinstance(scale, Tensor) and scale == 1:
            return self._predict(z, t, condition.given)
        both = self._predict(torch.cat([z, z]), torch.cat([t, t]), _cat([condition.null, condition.given]))
        unconditional, conditional = both.chunk(2)
        return guide(unconditional, conditional, scale)

    def _predict(self, z: Tensor, t: Tensor, arguments: Arguments) -> Tensor:
        self.calls += len(z)
        parameter = next(self.network.parameters(), None) if isinstance(self.network, nn.Module) else None
        dtype = parameter.dtype if parameter is not None else z.dtype
        arguments = _map(lambda x: x.to(dtype) if x.is_floating_point() else x, arguments)
        answer = self.network(z.to(dtype), self.schedule.network_time(t), **arguments)
        return self.schedule.predict_x0(answer.sample if hasattr(answer, "sample") else answer, z, t)


def add_lora(
    network: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    targets: Sequence[str] = SDXL_TARGETS,
    name: str = "default",
) -> None:
    """Freeze a network and put a trainable LoRA into it; its answers do not change until it is trained.

    alpha: scale times rank; the rank when not given. Raises UserError when no layer matches `targets`.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
    network.requires_grad_(False)
    try:
        if hasattr(network, "add_adapter"):
            network.add_adapter(config, adapter_name=name)
        else:
            from peft import inject_adapter_in_model

            inject_adapter_in_model(config, network, adapter_name=name)
    except ValueError as error:
        if any(isinstance(m, BaseTunerLayer) for m in network.modules()):
            raise
        kinds = ", ".join(targets)
        raise UserError(f"no layer of {type(network).__name__} matches the LoRA targets {kinds}") from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The network as it was before `add_lora`: the teacher's pass."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        # The public switch also turns off requires_grad, which would unhook a distributed network's gradients.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
