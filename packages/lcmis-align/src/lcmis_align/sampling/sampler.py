"""Sampling in two stages: the first concept's text up to the switch step, the whole prompt from there on.

The first stage does not depend on the switch step, so it is run once and what it passes through is kept: the warehouse.
With switch steps k_1..k_m a search costs max(k) + sum(T - k_j) denoiser calls an image where it would cost m T.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tenfold_shared.errors import UserError

from lcmis_align.errors import UnsupportedPipelineError
from lcmis_align.sampling.encoding import MixedPrompt, check_used, encodings
from lcmis_align.sampling.window import Stretch, scheduler_state

NEEDED = ("prompt", "latents", "generator", "num_inference_steps", "num_images_per_prompt", "output_type")
Weights = tuple[tuple[str, float], ...]
"""Texts with their weights, which sum to 1."""


@dataclass(frozen=True)
class Snapshot:
    """A run after `step` steps: all that is needed to go on exactly as if it had not been stopped."""

    step: int
    latents: torch.Tensor
    """As the pipeline itself holds them, (images, ...)."""
    scheduler: dict[str, Any]
    random: tuple[torch.Tensor, ...]
    """State of each image's generator."""


class Sampler:
    """A run of a pipeline for some seeds, one image each, that can be stopped after any step and gone on with.

    pipe: a diffusers pipeline whose call takes prompt, latents, generator, num_inference_steps, num_images_per_prompt and
    output_type, and which steps its scheduler once per timestep: Stable Diffusion, SDXL, SD3, FLUX, PixArt, Sana and others.
    seeds: one per image. arguments: passed on to the pipeline (guidance_scale, negative_prompt, height ...).
    stage2_pipeline: the pipeline that `advance(..., second=True)` runs, such as the SDXL refiner; `pipe` when None.

    `calls` counts denoiser evaluations: one per image, step and text. (Guidance evaluates the empty text beside each.)

    Raises UnsupportedPipelineError when the pipeline lacks what it takes.
    """

    def __init__(
        self,
        pipe: Any,
        seeds: Sequence[int],
        *,
        num_inference_steps: int = 40,
        stage2_pipeline: Any = None,
        stage2_arguments: dict[str, Any] | None = None,
        **arguments: Any,
    ):
        for candidate in (pipe, stage2_pipeline):
            if candidate is not None:
                check_pipeline(candidate, image=candidate is stage2_pipeline)
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps is {num_inference_steps}, expected 1 or more")
        if not seeds:
            raise UserError("no seeds given, expected one per image")
        self.pipe, self.seeds, self.steps = pipe, list(seeds), num_inference_steps
        self.stage2_pipeline, self.stage2_arguments = stage2_pipeline, stage2_arguments or {}
        self.arguments = arguments
        self.calls = 0
        self._begun: Snapshot | None = None

    def begin(self) -> Snapshot:
        """The run before its first step: noise drawn, schedule laid out."""
        if self._begun is None:
            generators = self._generators()
            stretch = Stretch(0, 0)
            latents = self._run(self.pipe, "", stretch, generators=generators)
            assert stretch.timesteps is not None
            state = scheduler_state(self._last)
            state["timesteps"] = stretch.timesteps
            self._begun = Snapshot(0, latents, state, _states(generators))
        return self._begun

    @property
    def length(self) -> int:
        """Steps of the whole run: `num_inference_steps`, or what the scheduler makes of it."""
        return len(self.begin().scheduler["timesteps"])

    def advance(
        self, start: Snapshot, stop: int, weights: Weights, *, mix: str = "embedding", second: bool = False,
        keep: Callable[[Snapshot], None] | None = None,
    ) -> Snapshot:  # fmt: skip
        """Go on from `start` to step `stop` and return the run as it is there.

        weights: the text, or the texts to be mixed. mix: "embedding" mixes what the texts are encoded to, "score" mixes
        what the denoiser answers to each. second: run the second-stage pipeline. keep: called with every step's snapshot.
        """
        pipe = self._pipe(second)
        snapshot = start
        for last, prompts in self._parts(start.step, stop, weights, mix):
            answers: list[torch.Tensor] = []
            for prompt in prompts[:-1]:
                # Answers are gathered without a step: `append` returns None.
                stretch = Stretch(snapshot.step, last, state=snapshot.scheduler, answer=answers.append)
                self._run(pipe, prompt, stretch, snapshot)
            snapshot = self._go_on(pipe, prompts[-1], snapshot, last, _blend(answers, weights), keep)
            self.calls += (last - start.step) * len(prompts) * len(self.seeds)
            start = snapshot
        return snapshot

    def _go_on(
        self, pipe: Any, prompt: str, start: Snapshot, stop: int,
        answer: Callable[[torch.Tensor], torch.Tensor | None] | None, keep: Callable[[Snapshot], None] | None,
    ) -> Snapshot:  # fmt: skip
        generators, reached = self._generators(start.random), start

        def store(done: int, latents: torch.Tensor, scheduler: Any) -> None:
            nonlocal reached
            if keep is not None or done == stop:
                reached = Snapshot(done, latents, scheduler_state(scheduler), _states(generators))
            if keep is not None:
                keep(reached)

        stretch = Stretch(start.step, stop, state=start.scheduler, answer=answer, keep=store)
        self._run(pipe, prompt, stretch, start, generators)
        return reached

    def decode(self, snapshot: Snapshot, *, second: bool = False, output_type: str = "pil") -> Any:
        """The images of a snapshot, as the pipeline returns them."""
        stretch = Stretch(snapshot.step, snapshot.step, state=snapshot.scheduler)
        return self._run(self._pipe(second), "", stretch, snapshot, output_type=output_type)

    def _pipe(self, second: bool) -> Any:
        return self.stage2_pipeline if second and self.stage2_pipeline is not None else self.pipe

    @contextmanager
    def remembering(self) -> Any:
        """While it lasts, no text is encoded twice."""
        with ExitStack() as stack:
            for pipe in (self.pipe, self.stage2_pipeline):
                if pipe is not None:
                    stack.enter_context(encodings(pipe))
            yield self

    def _parts(self, start: int, stop: int, weights: Weights, mix: str) -> list[tuple[int, list[str]]]:
        """(to, prompts) of the pipeline calls; several prompts are answered in turn and blended."""
        if start == stop:
            return []
        if len(weights) == 1:
            return [(stop, [weights[0][0]])]
        if mix == "embedding":
            return [(stop, [MixedPrompt(weights)])]
        return [(step + 1, [text for text, _ in weights]) for step in range(start, stop)]

    def _arguments(self, pipe: Any) -> dict[str, Any]:
        if pipe is self.pipe:
            return self.arguments
        accepted = inspect.signature(pipe.__call__).parameters
        kept = {name: value for name, value in self.arguments.items() if name in accepted}
        return {**kept, **self.stage2_arguments}

    def _generators(self, states: Sequence[torch.Tensor] | None = None) -> list[torch.Generator]:
        generators = [torch.Generator().manual_seed(int(seed)) for seed in self.seeds]
        for generator, state in zip(generators, states or (), strict=False):
            generator.set_state(state)
        return generators

    def _run(
        self, pipe: Any, prompt: str, stretch: Stretch, start: Snapshot | None = None,
        generators: list[torch.Generator] | None = None, output_type: str = "latent",
    ) -> Any:  # fmt: skip
        arguments = dict(self._arguments(pipe))
        if start is not None:
            arguments["latents"] = start.latents
            generators = generators or self._generators(start.random)
            if "image" in inspect.signature(pipe.__call__).parameters:
                # An image-to-image pipeline takes unfinished latents as its image when told that they are.
                arguments |= {"image": start.latents, "denoising_start": 1e-6}
        original = pipe.scheduler
        pipe.scheduler = self._last = stretch.scheduler(original)
        try:
            with encodings(pipe):
                result = pipe(
                    prompt=prompt, generator=generators, num_inference_steps=self.steps,
                    num_images_per_prompt=len(self.seeds), output_type=output_type, **arguments,
                )  # fmt: skip
        finally:
            pipe.scheduler = original
        expected = stretch.start + len(stretch.timesteps[stretch.start : stretch.stop])  # type: ignore[index]
        if stretch.done != expected:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} stepped its scheduler {stretch.done - stretch.start} times for "
                f"{expected - stretch.start} timesteps",
                hint=SUPPORTED,
            )
        check_used(prompt, pipe)
        return result.images


class Warehouse:
    """The first stage's way, kept: `at(k)` is the run after k steps under `text`, computed as far as was asked for."""

    def __init__(self, sampler: Sampler, text: str):
        self.sampler, self.text = sampler, text
        self.snapshots: list[Snapshot] = [sampler.begin()]

    def at(self, step: int) -> Snapshot:
        """Raises UserError when `step` is outside 0..T."""
        check_switch(step, self.sampler.length)
        if step >= len(self.snapshots):
            self.sampler.advance(self.snapshots[-1], step, ((self.text, 1.0),), keep=self.snapshots.append)
        return self.snapshots[step]


SUPPORTED = "supported are text-to-image pipelines such as Stable Diffusion, SDXL, SD3, FLUX, PixArt and Sana"


def check_pipeline(pipe: Any, *, image: bool = False) -> None:
    """Raise UnsupportedPipelineError when `pipe` cannot be stopped and gone on with. image: it may start from an image."""
    name, call = type(pipe).__name__, getattr(pipe, "__call__", None)  # noqa: B004
    accepted = inspect.signature(call).parameters if call is not None else {}
    if missing := [parameter for parameter in NEEDED if parameter not in accepted]:
        raise UnsupportedPipelineError(f"{name} takes no {', '.join(missing)}", hint=SUPPORTED)
    scheduler = getattr(pipe, "scheduler", None)
    if not (hasattr(scheduler, "step") and hasattr(scheduler, "set_timesteps")):
        raise UnsupportedPipelineError(f"{name} has no scheduler with timesteps", hint=SUPPORTED)
    if "image" in accepted and not image:
        raise UnsupportedPipelineError(
            f"{name} starts from an image", hint=f"{SUPPORTED}; this one can be a stage2_pipeline"
        )


def check_switch(step: int, total: int) -> int:
    """Raise UserError when `step` is outside 0..total."""
    if not 0 <= step <= total:
        raise UserError(f"switch_step {step} is outside 0..{total}")
    return step


def _blend(answers: list[torch.Tensor], weights: Weights) -> Callable[[torch.Tensor], torch.Tensor | None] | None:
    """What turns the last text's answer into the weighted sum of all; None where there is one text."""
    if not answers:
        return None
    return lambda last: sum(a * weight for a, (_, weight) in zip([*answers, last], weights, strict=True))


def _states(generators: Sequence[torch.Generator]) -> tuple[torch.Tensor, ...]:
    return tuple(generator.get_state() for generator in generators)
