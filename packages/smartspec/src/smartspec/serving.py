"""What lies between a scheduler's own objects and the controller: settings, state, drafts' lengths, outcomes, counters.

The scheduler decides k at the start of a step for the drafts made at its end, which the next step verifies. Nothing here
imports vLLM: its objects are used by the attributes they have, so that everything can be tested without it.
"""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically

from smartspec.controller import (
    BatchState,
    GoodputController,
    GoodputGuard,
    Policy,
    SpecDecision,
    StepOutcome,
    paper_controller,
)
from smartspec.cost import CostModel, PiecewiseCostModel, StepSample, presets
from smartspec.errors import ProfileError, UnsupportedError
from smartspec.policies import BatchSizeTable, FixedLength, NoSpeculation
from smartspec.profiling import save_profile

log = logging.getLogger(__name__)
TESTED = ((0, 32), (0, 33))
"""vLLM versions from the first up to, not including, the second."""
HOOKS = {
    "schedule",
    "update_from_output",
    "update_draft_token_ids",
    "_update_after_schedule",
    "_free_request",
}


def check_vllm(version: str, owner: Any, hooks: Iterable[str] = HOOKS) -> None:
    """Raise UnsupportedError when this vLLM is older than the tested one or `owner` lacks a method that we build on."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    tested = ".".join(map(str, TESTED[0]))
    if found < TESTED[0]:
        raise UnsupportedError(
            f"vLLM {version} is not supported, the plug-in was tested with {tested}", hint=f"install vllm {tested}"
        )
    if missing := sorted(name for name in hooks if not hasattr(owner, name)):
        raise UnsupportedError(
            f"vLLM {version} has no {owner.__name__}.{missing[0]}, the plug-in was tested with {tested}",
            hint=f"install vllm {tested}",
        )
    if found >= TESTED[1]:
        log.warning(
            "vLLM %s is newer than the tested %s; %s has all the methods needed", version, tested, owner.__name__
        )


@dataclass(frozen=True)
class Settings:
    """`additional_config={"smartspec": {...}}`.

    policy: "goodput", "paper", "fixed" (always max), "none", or "table" with `table` rows [lowest, highest, k].
    cost: a file made by `smartspec fit`, a preset's name, or None to learn from the first `calibration` steps while serving.
    candidates: lengths to choose from. verify: "uniform" or "ragged". guard: check by measurement that speculation pays.
    profile: a file that gets the timed steps. metrics: a file that gets the counters in Prometheus' text format.
    clock: "wall", or "cpu" for the process's CPU time. every: steps between writes of these files, and up to
    the first refit; the distance to the next one doubles, up to 16 times as many.
    """

    policy: str = "goodput"
    cost: str | None = None
    candidates: tuple[int, ...] | None = None
    table: tuple[tuple[int, int, int], ...] | None = None
    objective: str = "price"
    prefill: str = "marginal"
    verify: str | None = None
    min_gain: float = 0.02
    guard: bool = True
    calibration: int = 100
    profile: str | None = None
    metrics: str | None = None
    clock: str = "wall"
    every: int = 200
    seed: int = 0

    @staticmethod
    def read(given: Mapping[str, Any] | None) -> "Settings":
        """From a mapping. Raises UserError that names an unknown key or a value of the wrong kind."""
        given = dict(given or {})
        known = {f.name: f for f in dataclasses.fields(Settings)}
        if odd := sorted(set(given) - set(known)):
            raise UserError(f"smartspec has no setting '{odd[0]}'", hint=f"there are {', '.join(sorted(known))}")
        for key in ("candidates", "table"):
            if given.get(key) is not None:
                try:
                    rows = [tuple(v) if isinstance(v, Sequence) else int(v) for v in given[key]]
                except (TypeError, ValueError) as error:
                    raise UserError(f"smartspec setting {key} is {given[key]!r}, expected a list") from error
                given[key] = tuple(rows)
        for key, kind in (("calibration", int), ("every", int), ("min_gain", int | float), ("guard", bool)):
            if key in given and not isinstance(given[key], kind):
                raise UserError(
                    f"smartspec setting {key} is {given[key]!r}, expected {getattr(kind, '__name__', 'a number')}"
                )
        settings = Settings(**given)
        for key, value, allowed in (
            ("policy", settings.policy, ("goodput", "paper", "fixed", "none", "table")),
            ("clock", settings.clock, ("wall", "cpu")),
        ):
            if value not in allowed:
                raise UserError(f"smartspec setting {key} is '{value}', expected {', '.join(allowed)}")
        if settings.policy == "table" and not settings.table:
            raise UserError(
                "smartspec policy 'table' needs the setting table", hint="rows of [lowest, highest, length]"
            )
        if settings.every < 1 or settings.calibration < 1:
            raise UserError("smartspec settings every and calibration must be 1 or more")
        return settings

    def load_cost(self) -> CostModel | None:
        """The cost model named by `cost`, None when it is to be learned."""
        if self.cost is None:
            return None
        return presets()[self.cost]() if self.cost in presets() else CostModel.load(self.cost)


class LiveCost:
    """Learns a cost model from the engine's own steps: lengths are varied for the first ones, then it is refitted on the
    latest, at growing distances, because a fit takes as long as several steps."""

    def __init__(self, calibration: int, every: int, candidates: Sequence[int], seed: int = 0) -> None:
        self.calibration, self.every = calibration, every
        self._longest = 16 * every
        self.candidates = list(candidates)
        self.model: PiecewiseCostModel | None = None
        self._rng = np.random.default_rng(seed)
        self._since = 0

    def explore(self) -> int:
        """A length to try while nothing is fitted."""
        return int(self._rng.choice(self.candidates))

    def learn(self, samples: Sequence[StepSample]) -> bool:
        """Fit when it is time; True when there is a new model."""
        self._since += 1
        due = self.calibration if self.model is None else self.every
        if self._since < due:
            return False
        self._since = 0 if self.model is not None else self._since - 10
        recent = list(samples)[-1024:]
        # A step that met a pause of the machine says nothing of the next one.
        limit = 4 * float(np.median([s.ms for s in recent]))
        try:
            model = PiecewiseCostModel.fit([s for s in recent if s.ms < limit])
        except ProfileError as error:
            log.info("not enough variety in the steps so far to fit a cost model (%s)", error)
            return False
        self._since = 0
        if self.model is not None:
            self.every = min(2 * self.every, self._longest)
        self.model = model
        return True


class Bridge:
    """The state that a scheduler keeps for the policy.

    max_draft_len: num_speculative_tokens. lookup: the drafter is prompt lookup. cuda: the device is a GPU, where all
    requests verify alike and few lengths are used, because graphs are captured for them.
    """

    def __init__(
        self, settings: Settings, max_draft_len: int, *, max_num_seqs: int, max_model_len: int, lookup: bool = False,
        cuda: bool = False, fingerprint: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.max_draft_len = max_draft_len
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.lookup = lookup
        self.fingerprint = dict(fingerprint or {})
        self.clock: Callable[[], float] = time.process_time if settings.clock == "cpu" else time.perf_counter
        default = [k for k in (0, 1, 2, 3, 5, 7) if k <= max_draft_len] if cuda else list(range(max_draft_len + 1))
        self.candidates = sorted(set(settings.candidates or default))
        if self.candidates[-1] > max_draft_len:
            raise UserError(
                f"smartspec candidates go up to {self.candidates[-1]}, num_speculative_tokens is {max_draft_len}",
                hint="raise num_speculative_tokens in speculative_config",
            )
        self.verify = settings.verify or ("uniform" if cuda else "ragged")
        self.samples: deque[StepSample] = deque(maxlen=4096)
        self.decision = SpecDecision(0, np.zeros(0, int))
        self.lens: dict[Hashable, int] = {}
        self._names: list[Hashable] = []
        self._stands = 0
        self._asked: Any = None
        self.steps = 0
        self.live: LiveCost | None = None
        cost = settings.load_cost()
        if cost is None and settings.policy in ("goodput", "paper"):
            self.live = LiveCost(settings.calibration, settings.every, self.candidates, settings.seed)
        self.policy: Policy = self._policy(cost)
        # Two steps are in flight when scheduling is asynchronous.
        self._flight: deque[tuple[int, float, int, int]] = deque(maxlen=8)

    def _policy(self, cost: CostModel | None) -> Policy:
        s = self.settings
        if s.policy == "none":
            return NoSpeculation()
        if s.policy == "table":
            return BatchSizeTable(s.table or ())
        if s.policy == "fixed" or cost is None:
            return FixedLength(self.max_draft_len)
        if s.policy == "paper":
            return paper_controller(cost, self.max_draft_len)
        return GoodputController(
            cost, self.max_draft_len, objective=s.objective, prefill=s.prefill, verify=self.verify, min_gain=s.min_gain,
            candidates=self.candidates, guard=GoodputGuard() if s.guard else None, seed=s.seed,
        )  # fmt: skip

    def decide(
        self, running: Sequence[Any], waiting: Iterable[Any] = (), *, free_tokens: int | None = None, budget: int = 0
    ) -> int:
        """Choose k for the drafts of this step, from requests as vLLM has them; keeps each request's verified length.

        waiting: requests that may start in this step. free_tokens: free cache. budget: most tokens in a step.
        """
        requests = list(running)
        for request in waiting:
            if len(requests) >= self.max_num_seqs:
                break
            requests.append(request)
        names = [r.request_id for r in requests]
        policy: Any = self.policy
        if self._stands and names == self._names and self._asked is policy:
            self._stands -= 1
            policy.repeat(self.decision)
            return self.decision.draft_len
        self._names, self._stands = names, 0
        self.decision = SpecDecision(0, np.zeros(len(requests), int))
        self.lens = {}
        if not requests:
            return 0
        context, caps, prefill = [], [], []
        worth: list[float] | None = None
        # One pass without numpy: at a few requests, getting it started would take longer than the decision.
        for i, r in enumerate(requests):
            context.append(r.num_tokens)
            cap = self.remaining(r) - 1
            if r.num_computed_tokens < r.num_prompt_tokens:
                prefill.append(r.num_prompt_tokens - r.num_computed_tokens)
            if own := _own(r):
                cap = min(cap, own.get("max_draft_len", cap))
                if "priority" in own:
                    worth = worth or [1.0] * len(requests)
                    worth[i] = own["priority"]
            caps.append(cap if cap > 0 else 0)
        n_prefill = sum(prefill)
        if budget:
            n_prefill = min(n_prefill, max(budget - (len(requests) - len(prefill)), 0))
        state = BatchState(
            names, np.array(context), caps=np.array(caps), n_prefill=n_prefill, free_tokens=free_tokens,
            weights=None if worth is None else np.array(worth), matches_unknown=self.lookup,
        )  # fmt: skip
        if self.live is not None and self.live.model is None:
            k = min(self.live.explore(), max(caps))
            self.decision = SpecDecision(k, state.limits(k), reason="calibration")
        else:
            self.decision = policy.decide(state)
            self._asked, self._stands = policy, self.decision.stands
        self.lens = dict(zip(names, self.decision.verify_lens.tolist(), strict=True))
        return self.decision.draft_len

    def remaining(self, request: Any) -> int:
        """Drafted tokens that could still be of use: the bonus token is not drafted."""
        limit = self.max_model_len - request.num_tokens
        if request.max_tokens is not None:
            limit = min(limit, request.max_tokens - request.num_output_tokens)
        return max(limit - 1, 0)

    def verified_length(self, request: Any) -> int:
        """How many of its drafted tokens a request verifies in the next step."""
        return min(self.lens.get(request.request_id, self.decision.draft_len), self.remaining(request))

    def started(self, output: Any, requests: Mapping[str, Any]) -> None:
        """A step was scheduled; `output` is vLLM's SchedulerOutput."""
        n_prefill = n_ctx = 0
        for name, n in output.num_scheduled_tokens.items():
            request = requests[name]
            computed = request.num_computed_tokens
            n_ctx += computed
            if computed < request.num_prompt_tokens:
                n_prefill += n
        self._flight.append((id(output), self.clock(), n_prefill, n_ctx))

    def finished(
        self, output: Any, sampled: Sequence[Sequence[int]], index: Mapping[str, int], given: Mapping[str, int]
    ) -> None:
        """A step's tokens are here: learn from it.

        sampled, index: tokens by row, and the row of each request. given: tokens handed out by request, after stops.
        """
        entry = next((e for e in self._flight if e[0] == id(output)), None)
        if entry is None:
            return
        self._flight.remove(entry)
        ms = 1000 * (self.clock() - entry[1])
        n_batched, n_prefill, n_ctx = int(output.total_num_scheduled_tokens), entry[2], entry[3]
        invalid = getattr(output, "num_invalid_spec_tokens", None) or {}
        drafted = output.scheduled_spec_decode_tokens
        ids, verified, accepted = list[Hashable](), list[int](), list[int]()
        tokens = 0
        for name, n in output.num_scheduled_tokens.items():
            drafts = len(drafted[name]) if name in drafted else 0
            row = index.get(name)
            got = len(sampled[row]) if row is not None and sampled else 0
            if not got or n != drafts + 1:
                continue
            checked = max(drafts - invalid.get(name, 0), 0) if invalid else drafts
            ids.append(name)
            verified.append(checked)
            accepted.append(min(got - 1, checked))
            tokens += given.get(name, 0)
        draft_len = int(output.num_spec_tokens_to_schedule)
        self.steps += 1
        if ids:
            self.samples.append(
                StepSample(n_ctx, n_batched, len(output.num_scheduled_tokens), draft_len, n_prefill, ms, "step")
            )
            matched = sum(v > 0 for v in verified) if self.lookup and self.decision.draft_len else None
            self.policy.observe(
                StepOutcome(
                    ids, np.array(verified), np.array(accepted), tokens, ms,
                    n_ctx=n_ctx, n_batched=n_batched, n_prefill=n_prefill, draft_len=draft_len, matched=matched,
                )
            )  # fmt: skip
            if self.live is not None and self.live.learn(self.samples):
                self._refitted()
        if self.steps % self.settings.every == 0:
            self.write()

    def _refitted(self) -> None:
        assert self.live is not None and self.live.model is not None
        if isinstance(self.policy, GoodputController):
            self.policy.cost = self.live.model
        else:
            self.policy = self._policy(self.live.model)
        log.info(
            "cost model fitted on %d steps, mean error %.1f %%",
            len(self.samples),
            100 * self.live.model.error(self.samples),
        )

    def forget(self, name: Hashable) -> None:
        """A request has finished; preempted ones are kept."""
        self.policy.forget(name)
        self.lens.pop(name, None)

    def counters(self) -> dict[str, float]:
        """Totals and present values by name."""
        decisions = getattr(self.policy, "counters", {})
        tracker = getattr(self.policy, "tracker", None)
        guard = getattr(self.policy, "guard", None)
        return {
            **{f'smartspec_decisions_total{{reason="{reason}"}}': float(n) for reason, n in sorted(decisions.items())},
            "smartspec_steps_total": float(self.steps),
            "smartspec_guard_trips_total": float(guard.trips if guard else 0),
            "smartspec_draft_length": float(self.decision.draft_len),
            "smartspec_acceptance": float(tracker.alpha) if tracker else float("nan"),
        }

    def write(self) -> None:
        """Write the files that the settings ask for."""
        if self.settings.profile and self.samples:
            save_profile(self.settings.profile, list(self.samples), self.fingerprint)
        if self.settings.metrics:
            lines = [f"{name} {value:g}" for name, value in self.counters().items()]
            with replace_atomically(Path(self.settings.metrics)) as partial:
                partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _own(request: Any) -> dict[str, Any]:
    """A request's own wishes: SamplingParams(extra_args={"smartspec": {"max_draft_len": 0, "priority": 2.0}})."""
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    own = extra.get("smartspec") if extra else None
    if not own or not isinstance(own, Mapping):
        return {}
    good: dict[str, Any] = {}
    for key, least in (("max_draft_len", 0), ("priority", 0.0)):
        value = own.get(key)
        # A request must not be able to stop the server: what makes no sense is left out.
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value) and value >= least:
            good[key] = int(value) if key == "max_draft_len" else float(value)
    return good


def serve_args(
    target: str,
    draft: str | None,
    *,
    max_draft_len: int = 5,
    settings: Mapping[str, Any] | None = None,
    rest: bool = False,
) -> list[str]:
    """The arguments of `vllm serve` that run this controller in a stock vLLM.

    draft: a model, or None for prompt lookup. settings: as `Settings`. rest: a draft model runs only in steps that draft,
    for which scheduling has to be synchronous (`smartspec.vllm_drafter`).

    Raises UserError for settings that do not exist, and for rest without a draft model.
    """
    import json

    chosen = Settings.read(settings)
    lengths = chosen.candidates or tuple(k for k in (0, 1, 2, 3, 5, 7) if k <= max_draft_len)
    speculative: dict[str, Any] = {"num_speculative_tokens": max_draft_len}
    if draft is None:
        speculative.update(method="ngram", prompt_lookup_max=4, prompt_lookup_min=2)
    else:
        speculative.update(method="draft_model", model=draft)
    # Graphs are captured for the lengths in this table; the scheduler then chooses among them.
    spread = sorted({k for k in lengths if k > 0}, reverse=True)
    speculative["num_speculative_tokens_per_batch_size"] = [
        [i + 1, i + 1 if i + 1 < len(spread) else 4096, k] for i, k in enumerate(spread)
    ]
    if rest and draft is None:
        raise UserError("prompt lookup has no draft model that could rest", hint="pass a draft model")
    return [
        "vllm", "serve", target,
        "--scheduler-cls", "smartspec.vllm_plugin.SmartSpecScheduler",
        *(("--worker-cls", "smartspec.vllm_drafter.SmartSpecWorker", "--no-async-scheduling") if rest else ()),
        "--speculative-config", json.dumps(speculative),
        "--additional-config", json.dumps({"smartspec": dict(settings or {})}),
    ]  # fmt: skip
