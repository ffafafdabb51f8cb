"""Policies compared on a real engine: the same requests again and again, policies in turn, so that all meet one machine.

Two engines are served alike: `SpecEngine` here, and a vLLM that runs in this process with our scheduler. The clock is the
process's CPU time unless another is given: on a shared machine wall time says more about the neighbours.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tenfold_shared.errors import UserError

from smartspec.controller import Policy

Clock = Callable[[], float]


@dataclass
class Served:
    """outputs: new tokens by prompt. seconds: spent. mean_k: chosen. latency: (requests,) seconds from arrival to the end.

    full: (tokens, seconds) of the steps in which as many requests ran as were allowed to.
    """

    outputs: list[list[int]]
    seconds: float
    mean_k: float
    latency: np.ndarray
    full: tuple[int, float]

    @property
    def tokens(self) -> int:
        return sum(len(o) for o in self.outputs)

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def full_throughput(self) -> float:
        """Tokens per second while the concurrency held, without the drain at the end; NaN when it never did."""
        return self.full[0] / self.full[1] if self.full[1] > 0 else float("nan")


class Server(Protocol):
    """What both engines look like here."""

    clock: Clock
    generated: int
    """New tokens so far, of all requests."""

    def use(self, policy: Policy | None) -> None: ...
    def add(self, name: int, prompt: Sequence[int], new_tokens: int) -> None: ...
    def step(self) -> dict[int, list[int]]: ...
    def lengths(self) -> list[int]: ...


class EngineServer:
    """A `SpecEngine` as a server. engine: with its drafter; its policy is exchanged between runs."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.clock: Clock = engine.clock
        self._names: dict[int, int] = {}

    @property
    def generated(self) -> int:
        return int(self.engine.stats.generated)

    def use(self, policy: Policy | None) -> None:
        from smartspec.policies import NoSpeculation

        self.engine.policy = policy or NoSpeculation()
        self.engine.stats.lengths.clear()

    def add(self, name: int, prompt: Sequence[int], new_tokens: int) -> None:
        self._names[self.engine.add_request(prompt, new_tokens)] = name

    def step(self) -> dict[int, list[int]]:
        return {self._names.pop(name): tokens for name, tokens in self.engine.step().items()}

    def lengths(self) -> list[int]:
        return list(self.engine.stats.lengths)


class VllmServer:
    """A vLLM on this machine, in this process; one per process.

    target, draft: folders or hub ids; draft may be "prompt_lookup", or None for an engine without any drafter.
    rest: a draft model runs only in steps that draft (`smartspec.vllm_drafter`). settings: of the plug-in. kwargs: of
    `vllm.LLM`.

    Raises UserError when vLLM is not installed.
    """

    def __init__(
        self, target: str, draft: str | None, *, max_draft_len: int = 6, max_num_seqs: int = 16,
        rest: bool = True, settings: dict[str, Any] | None = None, clock: Clock = time.process_time, **kwargs: Any,
    ) -> None:  # fmt: skip
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported ({error})", hint="run this in the environment of `make vllm`"
            ) from error
        options: dict[str, Any] = {
            "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 512,
            "disable_log_stats": True, "enable_prefix_caching": False, **kwargs,
        }  # fmt: skip
        if draft is not None:
            speculative: dict[str, Any] = {"num_speculative_tokens": max_draft_len}
            if draft == "prompt_lookup":
                speculative.update(method="ngram", prompt_lookup_max=3, prompt_lookup_min=1)
            else:
                speculative.update(method="draft_model", model=draft)
                if rest:
                    options["worker_cls"] = "smartspec.vllm_drafter.SmartSpecWorker"
            options.update(
                speculative_config=speculative,
                scheduler_cls="smartspec.vllm_plugin.SmartSpecScheduler",
                additional_config={"smartspec": settings or {}},
            )
        self.llm = LLM(target, max_num_seqs=max_num_seqs, **options)
        self.engine = self.llm.llm_engine
        self.clock = clock
        self.generated = 0
        self._params = SamplingParams
        core = getattr(self.engine.engine_core, "engine_core", None)
        self.bridge = getattr(core.scheduler, "smartspec", None) if core else None
        self._lengths: list[int] = []
        self._given: dict[int, int] = {}

    def use(self, policy: Policy | None) -> None:
        self._lengths.clear()
        self._given.clear()
        if policy is not None:
            if self.bridge is None:
                raise UserError("this engine has no drafter, so no policy can be used")
            self.bridge.policy, self.bridge.live = policy, None

    def add(self, name: int, prompt: Sequence[int], new_tokens: int) -> None:
        params = self._params(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        self.engine.add_request(str(name), {"prompt_token_ids": [int(t) for t in prompt]}, params)

    def step(self) -> dict[int, list[int]]:
        done: dict[int, list[int]] = {}
        for o in self.engine.step():
            name, tokens = int(o.request_id), list(o.outputs[0].token_ids)
            self.generated += len(tokens) - self._given.get(name, 0)
            self._given[name] = len(tokens)
            if o.finished:
                done[name] = tokens
        if self.bridge is not None:
            self._lengths.append(self.bridge.decision.draft_len)
        return done

    def lengths(self) -> list[int]:
        return list(self._lengths)


def serve(
    server: Server,
    policy: Policy | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    concurrency: int | None = None,
) -> Served:
    """Serve prompts, `concurrency` of them at any time: the next one comes when one has ended. All at once when not given."""
    return serve_online(
        server, policy, prompts, new_tokens, arrivals=[0.0] * len(prompts), concurrency=concurrency or len(prompts)
    )


def serve_online(
    server: Server,
    policy: Policy | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    arrivals: Sequence[float],
    concurrency: int = 1 << 30,
) -> Served:
    """Serve prompts as they arrive, on a virtual clock that the server's own clock advances.

    arrivals: seconds, not decreasing. concurrency: most requests in the system. While nothing runs the clock jumps to the next arrival, so `seconds` counts work only.
    """
    server.use(policy)
    done: dict[int, list[int]] = {}
    finish = np.zeros(len(prompts))
    now = spent = 0.0
    coming = 0
    full_tokens, full_seconds = 0, 0.0
    while len(done) < len(prompts):
        if coming == len(done) and arrivals[coming] > now:
            now = float(arrivals[coming])
        while coming < len(prompts) and arrivals[coming] <= now and coming - len(done) < concurrency:
            server.add(coming, prompts[coming], new_tokens)
            coming += 1
        full, before = coming - len(done) == concurrency, server.generated
        start = server.clock()
        ended = server.step()
        took = server.clock() - start
        if full:
            full_tokens += server.generated - before
            full_seconds += took
        now += took
        spent += took
        for name, tokens in ended.items():
            done[name] = tokens
            finish[name] = now
    lengths = server.lengths()
    return Served(
        [done[i] for i in range(len(prompts))], spent, float(np.mean(lengths)) if lengths else 0.0,
        finish - np.asarray(arrivals, dtype=float), (full_tokens, full_seconds),
    )  # fmt: skip


def interleave(
    server: Server, policies: dict[str, Policy], prompts: Sequence[Sequence[int]], new_tokens: int, *, rounds: int = 5,
    warmup: int = 1, concurrency: int | None = None, progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Served]]:  # fmt: skip
    """Every policy serves the prompts once in each round, in an order that turns; policies keep what they have learned.

    warmup: rounds before the first that is kept. concurrency: as `serve`.

    Raises UserError for no policies or rounds < 1.
    """
    if not policies or rounds < 1:
        raise UserError("interleaved rounds need at least one policy and one round")
    names = list(policies)
    kept: dict[str, list[Served]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for i, name in enumerate(order):
            run = serve(server, policies[name], prompts, new_tokens, concurrency=concurrency)
            if turn >= warmup:
                kept[name].append(run)
            if progress is not None:
                progress(turn * len(names) + i + 1, (warmup + rounds) * len(names))
    return kept


def ratio(ours: Sequence[Served], theirs: Sequence[Served]) -> float:
    """Median over the rounds of our throughput by theirs."""
    return float(np.median([a.throughput / b.throughput for a, b in zip(ours, theirs, strict=True)]))
