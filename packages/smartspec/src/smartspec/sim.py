"""A simulated server: requests arrive, are prefilled in chunks and decoded in a continuous batch, on hardware whose
step time is a roofline. The policy is the real one; it sees what an engine would show it, and nothing else.

    T = fixed + max(weights + per_ctx N_ctx, per_token N_bat) + draft_step k        (ms, times log-normal noise)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenfold_shared.errors import UserError

from smartspec.controller import BatchState, Policy, StepOutcome
from smartspec.cost import CostModel, DraftCost, PiecewiseCostModel, StepSample


@dataclass(frozen=True)
class Hardware:
    """A machine that serves one target/draft pair; times in ms, sizes in tokens.

    weights: reading the target's weights once. per_ctx: per context token. per_token: per batched token.
    fixed: per step. draft_step: per drafted position. draft_idle: what the drafter costs at k = 0.
    noise: standard deviation of the log of step times. kv_tokens: cache capacity. chunk: most tokens in a target pass.
    """

    name: str
    weights: float
    per_ctx: float
    per_token: float
    fixed: float
    draft_step: float
    draft_idle: float = 0.0
    noise: float = 0.03
    kv_tokens: int = 120_000
    chunk: int = 2048
    max_num_seqs: int = 256

    @staticmethod
    def preset(name: str) -> "Hardware":
        """ "a100-7b-160m" or "h100x4-70b-eagle". Raises UserError for another name."""
        if name not in PRESETS:
            raise UserError(f"no hardware preset '{name}'", hint=f"use one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def cost(self) -> PiecewiseCostModel:
        """The true cost model, without noise."""
        planes = [[self.per_ctx, 0.0, 0.0, self.weights + self.fixed], [0.0, self.per_token, 0.0, self.fixed]]
        return PiecewiseCostModel(
            planes=np.array(planes), draft_cost=DraftCost(step=self.draft_step, idle=self.draft_idle)
        )

    @staticmethod
    def from_cost(
        cost: CostModel, name: str = "profile", *, kv_tokens: int = 120_000, max_num_seqs: int = 256
    ) -> "Hardware":
        """Hardware that behaves as a fitted cost model says, for capacity planning from a profile."""
        return _Fitted(name, 0, 0, 0, 0, 0, kv_tokens=kv_tokens, max_num_seqs=max_num_seqs, model=cost)

    def step_ms(self, n_ctx: float, n_batched: float, n_seqs: int, draft_len: int) -> float:
        """Milliseconds of a step, without noise."""
        memory, compute = self.weights + self.per_ctx * n_ctx, self.per_token * n_batched
        draft = self.draft_step * draft_len if draft_len else self.draft_idle
        return self.fixed + max(memory, compute) + draft

    def profile(self, seed: int = 0) -> list[StepSample]:
        """Noisy timed passes on a grid of batch sizes 1..256, k 0..7 and context lengths, as a profiling run sees them."""
        rng = np.random.default_rng(seed)
        samples = []
        for n_seqs in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            for context in (64, 256, 1024):
                n_ctx = n_seqs * context
                if n_ctx > self.kv_tokens:
                    continue
                for k in range(8):
                    ms = self.step_ms(n_ctx, n_seqs * (k + 1), n_seqs, 0) - self.draft_idle
                    noise = np.exp(rng.normal(0, self.noise, 2))
                    samples.append(StepSample(n_ctx, n_seqs * (k + 1), n_seqs, ms=ms * noise[0]))
                    draft = self.draft_step * k if k else self.draft_idle
                    if draft > 0:
                        samples.append(StepSample(n_ctx, 0, n_seqs, k, ms=draft * noise[1], kind="draft"))
        return samples


@dataclass(frozen=True)
class _Fitted(Hardware):
    model: CostModel = field(default_factory=CostModel)

    def step_ms(self, n_ctx: float, n_batched: float, n_seqs: int, draft_len: int) -> float:
        return float(self.model.target(n_ctx, n_batched, n_seqs)) + self.model.draft(n_ctx, n_seqs, draft_len)

    def cost(self) -> PiecewiseCostModel:
        raise UserError("hardware made from a fitted model has no truth apart from it; use the model itself")


PRESETS = {
    "a100-7b-160m": Hardware("a100-7b-160m", 8.4, 3.3e-4, 0.072, 1.0, 1.1),
    "h100x4-70b-eagle": Hardware("h100x4-70b-eagle", 15.0, 6.2e-5, 0.064, 3.0, 0.85, kv_tokens=450_000),
}


@dataclass(frozen=True)
class Workload:
    """Requests and when they come.

    rate: requests per second, or (seconds, rate) pairs that hold one after the other. burstiness: shape of the Gamma
    inter-arrival times, 1 for Poisson, smaller for bursts. arrivals: seconds, instead of rates (a trace).
    prompt, output: median tokens, spread by a log-normal of deviation `length_std`.
    acceptance: mean of the requests' alpha_i ~ Beta(mean c, (1 - mean) c) with c = concentration; or (seconds, alpha)
    pairs: every request has that alpha from then on.
    """

    rate: float | Sequence[tuple[float, float]] = 8.0
    requests: int = 300
    acceptance: float | Sequence[tuple[float, float]] = 0.7
    prompt: float = 180.0
    output: float = 180.0
    length_std: float = 0.4
    burstiness: float = 1.0
    concentration: float = 6.0
    arrivals: Sequence[float] | None = None

    def draw(self, seed: int) -> "Requests":
        """Draw the requests. Raises UserError for rates, counts or probabilities that make no sense."""
        rng = np.random.default_rng(seed)
        n = self.requests if self.arrivals is None else len(self.arrivals)
        if n < 1:
            raise UserError(f"the workload has {n} requests, expected 1 or more")
        prompt, output = (
            np.maximum(np.round(mean * np.exp(rng.normal(0, self.length_std, n))), 1).astype(int)
            for mean in (self.prompt, self.output)
        )
        if isinstance(self.acceptance, Sequence):
            alpha = np.full(n, np.nan)
            means = [a for _, a in self.acceptance]
        else:
            means = [self.acceptance]
            c, mean = self.concentration, self.acceptance
            alpha = rng.beta(mean * c, (1 - mean) * c, n) if 0 < mean < 1 else np.full(n, float(mean))
        if not all(0 <= m <= 1 for m in means):
            raise UserError(f"acceptance is {self.acceptance}, expected probabilities between 0 and 1")
        return Requests(self._arrivals(rng, n), prompt, output, alpha)

    def _arrivals(self, rng: np.random.Generator, n: int) -> NDArray[Any]:
        if self.arrivals is not None:
            return np.sort(np.asarray(self.arrivals, dtype=float)) * 1000
        phases = [(np.inf, float(self.rate))] if isinstance(self.rate, int | float) else list(self.rate)
        if not all(rate > 0 for _, rate in phases) or not self.burstiness > 0:
            raise UserError(f"rate is {self.rate}, expected requests per second above zero")
        # Unit-rate arrivals, then time is bent so that each phase has its own rate.
        unit = np.cumsum(rng.gamma(self.burstiness, 1 / self.burstiness, n))
        out, start, used = np.empty(n), 0.0, 0.0
        for i, (seconds, rate) in enumerate(phases):
            last = i == len(phases) - 1
            inside = (unit > used) if last else (unit > used) & (unit <= used + seconds * rate)
            out[inside] = start + (unit[inside] - used) / rate
            if not last:
                start, used = start + seconds, used + seconds * rate
        return out * 1000


@dataclass
class Requests:
    """(requests,) arrival in ms, prompt and output tokens, alpha_i (NaN where the workload's schedule rules)."""

    arrival: NDArray[Any]
    prompt: NDArray[Any]
    output: NDArray[Any]
    alpha: NDArray[Any]


@dataclass
class Report:
    """What a simulated run brought; times in ms.

    latency, ttft: (requests,) from arrival to the last and to the first token. trace: (steps, 5) columns time, decoding
    requests, k, tokens, step ms.
    """

    latency: NDArray[Any]
    ttft: NDArray[Any]
    trace: NDArray[Any]
    tokens: int
    duration: float
    mean_in_system: float
    preemptions: int
    counters: dict[str, int]

    @property
    def mean_latency(self) -> float:
        return float(self.latency.mean())

    @property
    def p50(self) -> float:
        return float(np.quantile(self.latency, 0.5))

    @property
    def p95(self) -> float:
        return float(np.quantile(self.latency, 0.95))

    @property
    def throughput(self) -> float:
        """Tokens per second, from the first arrival to the last token."""
        return 1000 * self.tokens / self.duration

    @property
    def goodput(self) -> float:
        """Tokens per second of batch execution."""
        return float(1000 * self.trace[:, 3].sum() / self.trace[:, 4].sum())

    @property
    def mean_draft_len(self) -> float:
        decoding = self.trace[self.trace[:, 1] > 0]
        return float(decoding[:, 2].mean()) if len(decoding) else 0.0

    def summary(self) -> dict[str, float]:
        """The figures by name."""
        return {
            "mean_ms": self.mean_latency,
            "p50_ms": self.p50,
            "p95_ms": self.p95,
            "ttft_ms": float(self.ttft.mean()),
            "tokens_per_s": self.throughput,
            "goodput_per_s": self.goodput,
            "mean_k": self.mean_draft_len,
            "probes": self.counters.get("probe", 0),
        }


def simulate(policy: Policy, hardware: Hardware, workload: Workload, seed: int = 0) -> Report:
    """Serve a workload; the same seed gives every policy the same requests and the same luck with each token.

    Raises UserError when a request cannot fit into the cache.
    """
    requests = workload.draw(seed)
    rng = np.random.default_rng([seed, 1])
    arrival, prompt, output = requests.arrival, requests.prompt, requests.output
    n = len(arrival)
    if (prompt + output).max() > hardware.kv_tokens:
        raise UserError(f"a request needs {(prompt + output).max()} tokens, the cache holds {hardware.kv_tokens}")
    schedule = list(workload.acceptance) if isinstance(workload.acceptance, Sequence) else []
    # Whether the draft agrees with the target at a position is a property of the text, alike for every policy.
    luck = np.random.default_rng([seed, 2]).random((n, int(output.max()) + 40))

    done: NDArray[Any] = np.zeros(n, int)
    prefilled: NDArray[Any] = np.zeros(n, int)
    to_prefill = prompt.copy()
    first, finish = np.full(n, np.nan), np.full(n, np.nan)
    running: list[int] = []
    waiting: list[int] = []
    coming, now, finished, preemptions = 0, 0.0, 0, 0
    occupancy, last_time = 0.0, float(arrival[0])
    trace: list[tuple[float, int, int, int, float]] = []
    now = float(arrival[0])
    while finished < n:
        while coming < n and arrival[coming] <= now:
            waiting.append(coming)
            coming += 1
        if not running and not waiting:
            now = last_time = float(arrival[coming])
            continue
        used = int(prefilled[running].sum()) if running else 0
        while waiting and len(running) < hardware.max_num_seqs:
            reserved = sum(int(to_prefill[r] - prefilled[r]) for r in running if prefilled[r] < to_prefill[r])
            if running and used + reserved + to_prefill[waiting[0]] > 0.95 * hardware.kv_tokens:
                break
            running.append(waiting.pop(0))
        ready = np.array([prefilled[r] >= to_prefill[r] for r in running], bool)
        decoding = np.array(running)[ready]
        budget, chunks = hardware.chunk - len(decoding), {}
        for r in np.array(running)[~ready]:
            chunk = min(int(to_prefill[r] - prefilled[r]), max(budget, 0))
            if chunk:
                chunks[int(r)] = chunk
                budget -= chunk
        n_prefill = sum(chunks.values())
        n_ctx = used
        verified: NDArray[Any] = np.zeros(len(decoding), int)
        draft_len = 0
        if len(decoding):
            alpha = requests.alpha[decoding]
            if schedule:
                alpha = np.full(len(decoding), [a for t, a in schedule if now >= 1000 * t][-1])
            state = BatchState(
                ids=decoding.tolist(),
                context=prefilled[decoding],
                caps=output[decoding] - done[decoding] - 1,
                n_prefill=n_prefill,
                free_tokens=hardware.kv_tokens - used - n_prefill,
                true_acceptance=alpha,
            )
            decision = policy.decide(state)
            draft_len = decision.draft_len
            verified = (
                np.minimum(decision.verify_lens, np.maximum(state.caps, 0)) if state.caps is not None else verified
            )
        n_batched = int(len(decoding) + verified.sum() + n_prefill)
        ms = hardware.step_ms(n_ctx, n_batched, len(decoding), draft_len)
        if hardware.noise:
            ms *= float(np.exp(rng.normal(0, hardware.noise)))
        now += ms
        generated = 0
        accepted: NDArray[Any] = np.zeros(len(decoding), int)
        if len(decoding):
            width = int(verified.max())
            if width:
                at = done[decoding][:, None] + np.arange(width)
                agree = (luck[decoding[:, None], at] < alpha[:, None]) & (np.arange(width) < verified[:, None])
                accepted = np.cumprod(agree, axis=1).sum(axis=1)
            gain = np.minimum(accepted + 1, output[decoding] - done[decoding])
            done[decoding] += gain
            prefilled[decoding] += gain
            generated = int(gain.sum())
        for r, chunk in chunks.items():
            prefilled[r] += chunk
            if prefilled[r] >= to_prefill[r] and done[r] == 0:
                done[r], first[r] = 1, now
        policy.observe(
            StepOutcome(
                decoding.tolist(), verified, accepted, generated, ms,
                n_ctx=n_ctx, n_batched=n_batched, n_prefill=n_prefill, draft_len=draft_len,
            )
        )  # fmt: skip
        trace.append((now, len(decoding), draft_len, generated, ms))
        # Integrate the number in the system piece by piece, so that arrivals inside the step count from their moment.
        inside = arrival[(arrival > last_time) & (arrival <= now)]
        present = coming - finished
        occupancy += present * (now - last_time) + float((now - inside).sum())
        last_time = now
        for r in [r for r in running if done[r] >= output[r]]:
            finish[r] = now
            running.remove(r)
            policy.forget(r)
            finished += 1
        while running and int(prefilled[running].sum()) > hardware.kv_tokens:
            victim = running.pop()
            to_prefill[victim], prefilled[victim] = prompt[victim] + done[victim], 0
            waiting.insert(0, victim)
            preemptions += 1
    return Report(
        latency=finish - arrival,
        ttft=first - arrival,
        trace=np.array(trace, dtype=float),
        tokens=int(done.sum()),
        duration=now - float(arrival[0]),
        mean_in_system=occupancy / (now - float(arrival[0])),
        preemptions=preemptions,
        counters=dict(getattr(policy, "counters", {})),
    )


def read_trace(path: str | Path, workload: Workload | None = None) -> Workload:
    """A workload whose arrivals are the numbers (seconds) in a text file, one a line.

    Raises UserError when the file is empty or holds anything else.
    """
    try:
        arrivals = [float(line) for line in Path(path).read_text(encoding="utf-8").split()]
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a list of arrival times ({error})", hint="one number of seconds a line"
        ) from error
    if not arrivals or not np.isfinite(arrivals).all() or min(arrivals) < 0:
        raise UserError(f"{path} holds no usable arrival times", hint="one number of seconds a line")
    return replace(workload or Workload(), arrivals=tuple(arrivals), requests=len(arrivals))
