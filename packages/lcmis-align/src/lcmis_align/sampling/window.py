"""A scheduler that runs a stretch of its schedule, from one step to another.

A pipeline asks its scheduler for timesteps, loops over what it gets, and calls `step` once for each. So a scheduler that
gives a part of its timesteps makes the pipeline run that part, with the pipeline's own text encoding, guidance and
decoding, whatever family it is of. Multi-step schedulers look at their whole schedule and at earlier outputs inside
`step`; there they find both.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput


class Stretch:
    """Steps `start` (inclusive) to `stop` (exclusive, None: to the end) of a run.

    state: the scheduler's attributes after step `start`; None when the run begins here.
    answer: given the denoiser's output, the output to step with, or None to leave the sample as it is.
    keep: called with (steps done, latents, scheduler) after every step.
    """

    def __init__(
        self,
        start: int,
        stop: int | None,
        *,
        state: dict[str, Any] | None = None,
        answer: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
        keep: Callable[[int, torch.Tensor, Any], None] | None = None,
    ):
        self.start, self.stop, self.state, self.answer, self.keep = start, stop, state, answer, keep
        self.done = start
        self.timesteps: torch.Tensor | None = None

    def scheduler(self, original: Any) -> Any:
        """A scheduler of the class of `original`, confined to this stretch. `original` is left alone."""
        kind: Any = type(original)
        confined: Any = object.__new__(_confined(kind))
        vars(confined).update(scheduler_state(original) if self.state is None else self.state_copy())
        vars(confined)["_stretch"] = self
        if self.state is not None:
            self.timesteps = confined.timesteps
        return confined

    def state_copy(self) -> dict[str, Any]:
        return _copied(self.state or {})


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """A copy of everything that the scheduler remembers: its timesteps, position and earlier outputs."""
    return _copied({name: value for name, value in vars(scheduler).items() if name != "_stretch"})


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    # The configuration never changes; rebuilding a scheduler from it would lose what the pipeline mended in it.
    return {n: value if n == "_internal_dict" else copy.deepcopy(value) for n, value in state.items()}


@functools.cache
def _confined(base: Any) -> Any:
    """The class of `base`'s schedulers that are confined to a stretch."""

    # Pipelines read the signatures of these two to know what they may pass; `wraps` keeps them readable.
    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        stretch = self._stretch
        if stretch.state is None:
            base.set_timesteps(self, *args, **kwargs)
            stretch.timesteps = self.timesteps
        self.timesteps = stretch.timesteps[stretch.start : stretch.stop]

    @functools.wraps(base.step)
    def step(self: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any) -> Any:
        stretch = self._stretch
        self.timesteps = stretch.timesteps
        if stretch.answer is not None:
            model_output = stretch.answer(model_output)
        stretch.done += 1
        if model_output is None:
            return SchedulerOutput(prev_sample=sample) if kw.get("return_dict", True) else (sample,)
        result = base.step(self, model_output, timestep, sample, *args, **kw)
        if stretch.keep is not None:
            stretch.keep(stretch.done, result[0], self)
        return result

    def init_noise_sigma(self: Any) -> Any:
        # Latents that come from a snapshot are scaled already.
        if self._stretch.state is not None:
            return 1.0
        # A property of some schedulers' classes, an attribute of others' instances, which this property hides.
        return vars(self)["init_noise_sigma"] if "init_noise_sigma" in vars(self) else base.init_noise_sigma.fget(self)

    members = {
        "set_timesteps": set_timesteps,
        "step": step,
        "init_noise_sigma": property(init_noise_sigma),
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), members)
