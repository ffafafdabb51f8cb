"""Mixture of Concept Experts: draw the first concept alone for k steps, then the whole prompt, and find k by what is seen.

from lcmis_align import CLIPScorer, MoCE, RulePlanner

moce = MoCE(pipe, CLIPScorer.from_pretrained("openai/clip-vit-base-patch32"))
result = moce("a tea cup of iced coke", seeds=range(8), guidance_scale=5.0)
result.images, result.switch_step, str(result.schedule)
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from tenfold_shared.errors import UserError

from lcmis_align import search as searches
from lcmis_align.concepts import Concept, ConceptPlan
from lcmis_align.sampling import Sampler, Warehouse
from lcmis_align.sampling.sampler import check_pipeline, check_switch
from lcmis_align.schedule import PromptSchedule
from lcmis_align.scorers.base import Scorer, concept_scores
from lcmis_align.scorers.calibration import METHODS, CalibratedScorer
from lcmis_align.search import Probe, Rules

STAGES = ("full", "second", "auto")
REFERENCE_SEED = 1_000_000
"""References are drawn from seeds of their own."""


class Planner(Protocol):
    """What MoCE needs of a planner."""

    def plan(self, prompt: str) -> ConceptPlan: ...


@dataclass
class MoCEResult:
    """What a search found."""

    plan: ConceptPlan
    images: list[Any]
    """One per seed, at the switch step found (at its own one each when `per_image`)."""
    seeds: list[int]
    switch_step: int
    stage2: str
    """What the second stage draws: "full", the whole prompt, or "second", the second concept alone."""
    scores: dict[str, float | None]
    """sA, sB, joint and latent of `images`."""
    trace: list[dict[str, Any]]
    """One row per probe: stage2, k, sA, sB, D, joint, latent, images, calls, seconds."""
    calls: int
    """Denoiser evaluations of the whole search."""
    steps: int
    switch_steps: list[int]
    """Of each image."""

    @property
    def schedule(self) -> PromptSchedule:
        """The schedule found; `str` of it is the web interfaces' notation."""
        return two_stages(self.plan, self.switch_step, self.stage2)


def two_stages(plan: ConceptPlan, switch_step: int, stage2: str = "full") -> PromptSchedule:
    """`plan.first` alone for `switch_step` steps, then the whole prompt ("full") or the second concept ("second")."""
    return PromptSchedule([(plan.first.name, switch_step), (_second_text(plan, stage2), 1.0)])


class MoCE:
    """Draws a prompt in two stages and searches the step between them.

    pipe: a diffusers text-to-image pipeline (see `Sampler`). scorer: what the images are compared with the concepts by.
    planner: splits prompts that are given as text; the rule planner when None.
    search: "binary", "golden", "sweep" or "successive_halving". policy: "robust", or "paper" for the published loop.
    stage2: the second stage draws the "full" prompt, the "second" concept alone, or whichever is better ("auto").
        With real models that is an empirical question: alone, the second concept may bring the hidden one back.
    stage2_pipeline: runs the second stage, such as the SDXL refiner; stage2_arguments: its own arguments.
    rules: range, thresholds and budget of the search. per_image: keep for every seed the best probed step of its own.
    normalise: "zscore" or "rank" sets each concept's scores against `references` images of each concept alone; `rules` are
        then on that scale. batch_size: images drawn at a time.

    Raises UnsupportedPipelineError, UserError for an unknown option.
    """

    def __init__(
        self,
        pipe: Any,
        scorer: Scorer,
        *,
        planner: Planner | None = None,
        search: str = "binary",
        policy: str = "robust",
        stage2: str = "full",
        stage2_pipeline: Any = None,
        stage2_arguments: dict[str, Any] | None = None,
        rules: Rules | None = None,
        per_image: bool = False,
        normalise: str | None = None,
        references: int = 8,
        batch_size: int = 4,
    ):
        choices = (
            ("search", search, searches.STRATEGIES), ("policy", policy, searches.POLICIES), ("stage2", stage2, STAGES),
            ("normalise", normalise, (None, *METHODS)),
        )  # fmt: skip
        for name, value, known in choices:
            if value not in known:
                raise UserError(f"{name} is {value!r}, expected one of {', '.join(map(str, known))}")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected 1 or more")
        check_pipeline(pipe)
        self.pipe, self.scorer, self.planner = pipe, scorer, planner
        self.search, self.policy, self.stage2 = search, policy, stage2
        self.stage2_pipeline, self.stage2_arguments = stage2_pipeline, stage2_arguments
        self.rules, self.per_image, self.batch_size = rules or Rules(), per_image, batch_size
        self.normalise, self.references = normalise, references

    def __call__(
        self,
        plan: ConceptPlan | str,
        *,
        num_images: int | None = None,
        num_inference_steps: int = 40,
        seeds: Sequence[int] | None = None,
        **arguments: Any,
    ) -> MoCEResult:
        """Search, and return the images at the best switch step.

        num_images: seeds 0..num_images-1 when no `seeds` are given; 4 by default. arguments: the pipeline's own, such as
        guidance_scale, negative_prompt, height; they are the same in both stages.

        Raises PlanError, ScorerError.
        """
        plan = self.plan(plan)
        numbers = list(range(4 if num_images is None else num_images)) if seeds is None else list(seeds)
        if num_images is not None and len(numbers) != num_images:
            raise UserError(f"num_images is {num_images} but {len(numbers)} seeds are given")
        if not numbers:
            raise UserError("num_images is 0, expected 1 or more")
        runs = _Runs(self, plan, numbers, num_inference_steps, arguments)
        chosen = [self._search(runs, stage2) for stage2 in self._stages()]
        probe = searches.best(chosen, self.policy)
        # Only halving leaves images of the chosen step undrawn.
        probe = runs.evaluate(probe.k, stage2=probe.stage2, again=True)
        images, at = runs.images(probe), [probe.k] * len(numbers)
        scores: dict[str, float | None] = {"sA": probe.a, "sB": probe.b, "joint": probe.joint, "latent": probe.latent}
        if self.per_image:
            images, at, scores = runs.best_each()
        rows = [probe.row() for probe in runs.trace]
        return MoCEResult(
            plan, images, numbers, probe.k, probe.stage2, scores, rows, runs.calls, num_inference_steps, at
        )  # fmt: skip

    def plan(self, prompt: ConceptPlan | str) -> ConceptPlan:
        """The plan of a prompt; a plan is returned as it is."""
        if isinstance(prompt, ConceptPlan):
            return prompt
        if self.planner is None:
            from lcmis_align.planners.rule import RulePlanner

            self.planner = RulePlanner()
        return self.planner.plan(prompt)

    def draw(
        self, plan: ConceptPlan | str, *, switch_step: int, seeds: Sequence[int] = (0,), num_inference_steps: int = 40,
        **arguments: Any,
    ) -> list[Any]:  # fmt: skip
        """Draw without a search. switch_step 0 is the plain pipeline, num_inference_steps the first concept alone.

        Raises UserError when switch_step is outside 0..num_inference_steps.
        """
        plan, images = self.plan(plan), []
        stage2 = "full" if self.stage2 == "auto" else self.stage2
        for first in range(0, len(seeds), self.batch_size):
            sampler = self._sampler(list(seeds)[first : first + self.batch_size], num_inference_steps, arguments)
            check_switch(switch_step, sampler.length)
            with sampler.remembering():
                images += _finish(sampler, Warehouse(sampler, plan.first.name), plan, switch_step, stage2)
        return images

    def estimate(self, num_images: int, num_inference_steps: int = 40) -> tuple[int, int]:
        """Least and most denoiser calls of a search, references included. Equal where they do not depend on scores."""
        least = most = 0
        for i, stage2 in enumerate(self._stages()):
            rules = self._rules(stage2)
            groups = self._groups(num_images, num_inference_steps, rules)
            low, high = searches.calls_bounds(self.search, self.policy, num_inference_steps, rules, groups)
            if i > 0:  # the first stage is shared: of two searches, what one has run the other need not
                low = max(0, low - num_images * rules.bounds(num_inference_steps)[1])
            least, most = least + low, most + high
            if self.search == "sweep" and i > 0:
                shared = num_images * self._rules("full").bounds(num_inference_steps)[1]
                least = most = most - shared
        references = 2 * self.references * num_inference_steps if self.normalise else 0
        return least + references, most + references

    def _stages(self) -> tuple[str, ...]:
        return ("full", "second") if self.stage2 == "auto" else (self.stage2,)

    def _rules(self, stage2: str) -> Rules:
        return replace(self.rules, end=self.rules.second_end) if stage2 == "second" else self.rules

    def _groups(self, images: int, steps: int, rules: Rules) -> list[int]:
        """How many images each round adds: all at once, but for halving, where each round doubles them."""
        if self.search != "successive_halving":
            return [images]
        low, high, _ = rules.bounds(steps)
        rounds = max(1, min((high - low).bit_length(), images.bit_length()))
        groups = [-(-images // 2 ** (rounds - 1))]
        while sum(groups) < images:
            groups.append(min(sum(groups), images - sum(groups)))
        return groups

    def _search(self, runs: "_Runs", stage2: str) -> Probe:
        rules = self._rules(stage2)

        def evaluate(k: int, rounds: int | None = None) -> Probe:
            return runs.evaluate(k, stage2=stage2, rounds=rounds)

        return searches.run(self.search, self.policy, evaluate, runs.length, rules, runs.rounds)

    def _sampler(self, seeds: Sequence[int], steps: int, arguments: dict[str, Any]) -> Sampler:
        return Sampler(
            self.pipe, seeds, num_inference_steps=steps, stage2_pipeline=self.stage2_pipeline,
            stage2_arguments=self.stage2_arguments, **arguments,
        )  # fmt: skip


@dataclass
class _Drawn:
    """Images of one (k, stage2) and their scores (images, concepts), group by group."""

    images: list[Any]
    groups: int


class _Runs:
    """Everything that one search has computed: nothing outlives it, so that no search depends on the one before."""

    def __init__(self, moce: MoCE, plan: ConceptPlan, seeds: list[int], steps: int, arguments: dict[str, Any]):
        self.moce, self.plan = moce, plan
        self.stores: list[list[Warehouse]] = []
        at = 0
        for size in moce._groups(len(seeds), steps, moce._rules(moce._stages()[-1])):
            group, at = seeds[at : at + size], at + size
            batches = [group[i : i + moce.batch_size] for i in range(0, size, moce.batch_size)]
            samplers = [moce._sampler(batch, steps, arguments) for batch in batches]
            self.stores.append([Warehouse(sampler, plan.first.name) for sampler in samplers])
        self.rounds, self.length = len(self.stores), self.stores[0][0].sampler.length
        self.drawn: dict[tuple[int, str], _Drawn] = {}
        self.probes: dict[tuple[int, str, int], tuple[Probe, torch.Tensor]] = {}
        self.trace: list[Probe] = []
        self.concepts = [plan.first, plan.second, *([Concept(plan.latent)] if plan.latent else [])]
        self.extra_calls = 0
        self.scorer = moce.scorer
        if moce.normalise:
            self.scorer = CalibratedScorer(moce.scorer, self._references(steps, arguments), method=moce.normalise)

    @property
    def calls(self) -> int:
        return self.extra_calls + sum(store.sampler.calls for group in self.stores for store in group)

    def evaluate(self, k: int, *, stage2: str, rounds: int | None = None, again: bool = False) -> Probe:
        """The probe of k; from memory when it was asked for before. again: without a row in the trace."""
        rounds = self.rounds if rounds is None else rounds
        key = (k, stage2, rounds)
        if key in self.probes:
            if not again:
                self.trace.append(replace(self.probes[key][0], calls=0, seconds=0.0))
            return self.probes[key][0]
        before, started = self.calls, time.monotonic()
        drawn = self.drawn.setdefault((k, stage2), _Drawn([], 0))
        for group in self.stores[drawn.groups : rounds]:
            for store in group:
                with store.sampler.remembering():
                    drawn.images += _finish(store.sampler, store, self.plan, k, stage2)
        drawn.groups = rounds
        scores = concept_scores(self.scorer, drawn.images, self.concepts)
        a, b = scores[:, 0], scores[:, 1]
        latent = float((scores[:, 2] > a).float().mean()) if self.plan.latent else None
        probe = Probe(
            k, float(a.mean()), float(b.mean()), float(torch.minimum(a, b).mean()), latent, stage2, len(drawn.images),
            self.calls - before, time.monotonic() - started,
        )  # fmt: skip
        self.probes[key] = (probe, scores)
        self.trace.append(probe)
        return probe

    def images(self, probe: Probe) -> list[Any]:
        return self.drawn[probe.k, probe.stage2].images

    def best_each(self) -> tuple[list[Any], list[int], dict[str, float | None]]:
        """For each seed the image of the probe with the largest min(sA, sB), its k, and the scores of these images."""
        whole = [(key, scores) for key, (_, scores) in self.probes.items() if key[2] == self.rounds]
        each = torch.stack([torch.minimum(scores[:, 0], scores[:, 1]) for _, scores in whole]).argmax(0).tolist()
        images = [self.drawn[whole[j][0][:2]].images[i] for i, j in enumerate(each)]
        scores = torch.stack([whole[j][1][i] for i, j in enumerate(each)])
        a, b = scores[:, 0], scores[:, 1]
        summary: dict[str, float | None] = {
            "sA": float(a.mean()), "sB": float(b.mean()), "joint": float(torch.minimum(a, b).mean()),
            "latent": float((scores[:, 2] > a).float().mean()) if self.plan.latent else None,
        }  # fmt: skip
        return images, [whole[j][0][0] for j in each], summary

    def _references(self, steps: int, arguments: dict[str, Any]) -> list[Any]:
        """Images of each concept alone."""
        images, size = [], self.moce.references
        for concept in (self.plan.first, self.plan.second):
            for at in range(0, size, self.moce.batch_size):
                seeds = [REFERENCE_SEED + i for i in range(at, min(size, at + self.moce.batch_size))]
                sampler = self.moce._sampler(seeds, steps, arguments)
                with sampler.remembering():
                    images += list(sampler.decode(Warehouse(sampler, concept.name).at(sampler.length)))
                self.extra_calls += sampler.calls
        return images


def _second_text(plan: ConceptPlan, stage2: str) -> str:
    return plan.prompt if stage2 == "full" else plan.second.name


def _finish(sampler: Sampler, store: Warehouse, plan: ConceptPlan, k: int, stage2: str) -> list[Any]:
    """The images of a run that leaves the warehouse at step k."""
    text = ((_second_text(plan, stage2), 1.0),)
    last = sampler.advance(store.at(k), sampler.length, text, second=True)
    return list(sampler.decode(last, second=k < sampler.length))
