"""Training with nulls: the coefficient's schedule and the load controller, for Trainer and for plain loops."""

from typing import Any

import torch
from transformers import TrainerCallback

from adamoe.conversion import base_of, layer_routers, routers_by_layer
from adamoe.errors import ConfigError


def set_progress(model: Any, progress: float) -> None:
    """Tell a converted model how much of training is done, in [0, 1]; other models are left alone."""
    for module in model.modules():
        if "adamoe" in vars(module):
            module.adamoe.progress = progress


class LoadController:
    """Moves every layer's null bias until the layer's load is the target: bias += rate (load - target).

    model: a converted model. target: true experts per token; the settings' `target_load` when not given. rate: the step.
    bound: largest absolute bias. Call `step` after each optimizer step; with torch.distributed all ranks must.
    """

    def __init__(self, model: Any, target: float | None = None, *, rate: float = 0.05, bound: float = 20.0):
        self.model, self.rate, self.bound = model, rate, bound
        self.balance = base_of(model).adamoe
        wanted = self.balance.config.target_load if target is None else target
        if wanted is None:
            raise ConfigError("the load controller has no target", hint="set target_load in the settings")
        first = next(layer_routers(model))
        self.balance.config.check_target(wanted, first.num_experts, first.adamoe_top_k)
        self.target = wanted
        self.balance.counting = True

    @torch.no_grad()
    def step(self) -> list[float]:
        """Use the tokens counted since the last step; returns their load per layer."""
        if self.balance.load is None:
            return []
        totals = torch.cat((self.balance.load, torch.as_tensor(self.balance.tokens).to(self.balance.load).reshape(1)))
        self.balance.reset()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            totals = totals.to(next(layer_routers(self.model)).null_bias.device)
            torch.distributed.all_reduce(totals)
        loads = (totals[:-1] / totals[-1].clamp_min(1)).tolist()
        for layer, load in zip(routers_by_layer(self.model), loads, strict=True):
            for router in layer:
                router.null_bias.add_(self.rate * (load - self.target)).clamp_(-self.bound, self.bound)
        return loads


class AnnealCallback(TrainerCallback):
    """Follows Trainer's progress with the loss coefficient."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the progress before the step's first forward pass."""
        set_progress(kwargs["model"], state.global_step / max(state.max_steps, 1))


class TargetLoadCallback(TrainerCallback):
    """Runs a `LoadController` after every optimizer step of Trainer. target, rate: as there."""

    def __init__(self, target: float | None = None, *, rate: float = 0.05):
        self.target, self.rate = target, rate
        self.controller: LoadController | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the biases."""
        if self.controller is None:
            self.controller = LoadController(kwargs["model"], self.target, rate=self.rate)
        self.controller.step()
