"""Jacobi decoding in stock vLLM, no fork, no patch: two dotted names in the engine's arguments.

    LLM(model, speculative_config={"method": "custom_class", "model": "cllm_jacobi.vllm_plugin.JacobiProposer",
        "num_speculative_tokens": n - 1}, worker_cls="cllm_jacobi.vllm_plugin.JacobiWorker")

vLLM verifies n - 1 drafted tokens a pass and throws the refused tail away. But what the model said behind the refusal is
the next guess of Jacobi iteration, and the whole of the gain. The proposer sees accepted tokens only; the worker hooks
the rejection sampler, whose logits hold that tail, and keeps its argmax. Drafts never change a greedy output, so every
doubt (a request that moved, a pass without drafts) is answered with fresh guesses.

This module imports without vLLM; `JacobiWorker` is built when it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold_shared.errors import UserError

REFILLS = ("prompt", "repeat")
PROPOSER = "cllm_jacobi.vllm_plugin.JacobiProposer"
WORKER = "cllm_jacobi.vllm_plugin.JacobiWorker"
NEEDED = ("rejection_sampler", "input_batch", "drafter", "effective_drafter_max_model_len")
"""What the plug-in reads of vLLM's model runner (0.32)."""


def next_drafts(
    predicted: Sequence[int], drafted: int, sampled: int, count: int, source: Sequence[int], start: int = 0
) -> list[int]:
    """The next draft of one request, exactly `count` tokens.

    predicted: the argmax of its verified rows, drafted + 1 of them; the one at i speaks of the token behind draft i.
    sampled: tokens that came out, accepted drafts and the correction. source: tokens to fill up from, in turn from `start`.
    """
    rest = list(predicted[sampled : drafted + 1])[:count] if sampled else []
    return rest + [source[(start + i) % len(source)] for i in range(count - len(rest))]


def engine_args(block_size: int = 16, *, refill: str = "prompt", reuse: bool = True) -> dict[str, Any]:
    """Arguments for `vllm.LLM` that decode with blocks of `block_size`.

    refill: where fresh guesses come from, the prompt or the last token. reuse: False throws the tail away, to see what it is
    worth.

    Raises UserError for a block size under 2 and an unknown refill.
    """
    if block_size < 2:
        raise UserError(f"block_size is {block_size}; vLLM needs at least one drafted token", hint="pass 2 or more")
    _known_refill(refill)
    return {
        "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": block_size - 1},
        "worker_cls": WORKER,
        "additional_config": {"cllm_jacobi": {"refill": refill, "reuse": reuse}},
    }


def serve_args(model: str, block_size: int = 16, *, refill: str = "prompt") -> list[str]:
    """The words of a `vllm serve` command line."""
    import json

    found = engine_args(block_size, refill=refill)
    return [
        "vllm", "serve", model, "--speculative-config", json.dumps(found["speculative_config"]), "--worker-cls", WORKER,
        "--additional-config", json.dumps(found["additional_config"]),
    ]  # fmt: skip


def _known_refill(refill: str) -> None:
    if refill not in REFILLS:
        raise UserError(f"refill is '{refill}', expected {' or '.join(REFILLS)}")


@dataclass
class Stats:
    """Counted since the worker started, or since the last `jacobi_stats`."""

    passes: int = 0
    verified: int = 0
    accepted: int = 0
    reused: int = 0
    """Drafted tokens that came from a kept tail."""


@dataclass
class Kept:
    """What the last pass said: argmax rows of all requests, in batch order."""

    predicted: Any = None
    drafted: list[int] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class JacobiProposer:
    """The drafter that vLLM calls after every pass.

    Raises UserError when the worker is not `JacobiWorker`, with pipeline parallelism, with vLLM's second model runner asked
    for, and for unknown settings.
    """

    def __init__(self, vllm_config: Any, *_: Any, **__: Any) -> None:
        import os

        parallel = vllm_config.parallel_config
        if str(getattr(parallel, "worker_cls", "")) != WORKER and not _is_ours(getattr(parallel, "worker_cls", None)):
            raise UserError(
                "the proposer cannot see logits without its worker", hint=f"add --worker-cls {WORKER} (worker_cls=)"
            )
        if parallel.pipeline_parallel_size > 1:
            raise UserError(
                f"pipeline_parallel_size is {parallel.pipeline_parallel_size}; vLLM drafts on the last rank only", hint="use tensor parallelism"
            )  # fmt: skip
        if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
            raise UserError("VLLM_USE_V2_MODEL_RUNNER=1 refuses custom proposers", hint="unset it")
        settings = dict((vllm_config.additional_config or {}).get("cllm_jacobi") or {})
        if unknown := sorted(settings.keys() - {"refill", "reuse"}):
            raise UserError(f"no setting '{unknown[0]}'", hint="known are refill and reuse")
        self.refill = settings.get("refill", "prompt")
        _known_refill(self.refill)
        self.reuse = bool(settings.get("reuse", True))
        self.count = vllm_config.speculative_config.num_speculative_tokens
        self.limit = self.count
        self.kept = Kept()
        self.stats = Stats()
        self.runner: Any = None

    def bind(self, runner: Any) -> None:
        """Meet the model runner. Raises UserError naming what this vLLM lacks."""
        missing = [name for name in NEEDED if not hasattr(runner, name)]
        if missing:
            raise UserError(f"this vLLM's model runner has no {', '.join(missing)}", hint="use vllm>=0.32,<0.33")
        self.runner = runner
        # Near its length limit vLLM would stop asking for drafts for the whole batch; the scheduler trims them anyway.
        runner.effective_drafter_max_model_len += self.count + 1

    def load_model(self, *_: Any, **__: Any) -> None:
        """Nothing to load: the model is its own drafter."""

    def dummy_run(self, *_: Any, **__: Any) -> None:
        """Nothing to warm up."""

    def start(self, limit: int | None) -> None:
        """Before a pass: what the last one said is stale, and this one may verify fewer tokens."""
        self.kept = Kept()
        self.limit = self.count if limit is None else min(limit, self.count)
        self.stats.passes += 1

    def keep(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Before the rejection sampler: keep the argmax of the verified rows. No synchronisation here."""
        metadata, _, logits = inputs[:3]
        if logits is None or not len(logits):
            return
        drafted = list(metadata.num_draft_tokens)
        self.kept = Kept(logits.argmax(-1), drafted, list(self.runner.input_batch.req_ids)[: len(drafted)])

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any = None,
        token_ids_cpu: Any = None,
        *_: Any,
        **__: Any,
    ) -> list[list[int]]:
        """A draft for each request; none for a prompt that is not read whole yet."""
        today = list(self.runner.input_batch.req_ids) if self.runner is not None else []
        kept, rows = self.kept, {}
        if self.reuse and kept.predicted is not None:
            predicted = kept.predicted.tolist()
            offset = 0
            for name, drafted in zip(kept.requests, kept.drafted, strict=True):
                # Requests without drafts have a row of their own too.
                rows[name] = (predicted[offset : offset + drafted + 1], drafted)
                offset += drafted + 1
        drafts: list[list[int]] = []
        for i, sampled in enumerate(sampled_token_ids):
            if not len(sampled):
                drafts.append([])
                continue
            predicted_row, drafted = rows.get(today[i] if i < len(today) else "", ([], 0))
            # Rows that do not fit what came out belong to another state of the request.
            fits = len(predicted_row) == drafted + 1 >= len(sampled) and predicted_row[len(sampled) - 1] == sampled[-1]
            length = int(num_tokens_no_spec[i])
            source = [int(sampled[-1])] if self.refill == "repeat" else self._source(token_ids_cpu[i], length)
            draft = next_drafts(predicted_row if fits else [], drafted, len(sampled), self.limit, source, length)
            self.stats.verified += drafted
            self.stats.accepted += len(sampled) - 1
            self.stats.reused += max(drafted + 1 - len(sampled), 0) if fits else 0
            drafts.append([int(t) for t in draft])
        return drafts

    @staticmethod
    def _source(tokens: Any, length: int) -> list[int]:
        """Tokens to guess from: the beginning of the sequence, which is its prompt."""
        return tokens[: min(length, 64)].tolist() or [0]


def _is_ours(worker: Any) -> bool:
    return isinstance(worker, type) and worker.__name__ == "JacobiWorker"


def _build_worker() -> type:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    else:
        from vllm.v1.worker.gpu_worker import Worker as Base

    class JacobiWorker(Base):
        """vLLM's own worker, which shows the proposer what every pass said."""

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            result = super().load_model(*args, **kwargs)
            drafter = getattr(self.model_runner, "drafter", None)
            if isinstance(drafter, JacobiProposer):
                drafter.bind(self.model_runner)
                self.model_runner.rejection_sampler.register_forward_pre_hook(drafter.keep)
                if current_platform.is_cpu():
                    from vllm.logger import init_logger

                    init_logger("vllm.cllm_jacobi").warning(
                        "vLLM's CPU back-end samples wrongly with any speculation; use temperature 0"
                    )
            return result

        def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            drafter = getattr(self.model_runner, "drafter", None)
            if isinstance(drafter, JacobiProposer):
                if current_platform.is_cpu():
                    _refuse_sampling(scheduler_output)
                if scheduler_output.total_num_scheduled_tokens:
                    drafter.start(getattr(scheduler_output, "num_spec_tokens_to_schedule", None))
            return super().execute_model(scheduler_output, *args, **kwargs)

        def jacobi_stats(self) -> dict[str, int]:
            """Counters since the last call; ask with `llm.collective_rpc("jacobi_stats")`."""
            import dataclasses

            drafter = self.model_runner.drafter
            found = dataclasses.asdict(drafter.stats)
            drafter.stats = Stats()
            return found

    JacobiWorker.__module__ = __name__
    JacobiWorker.__qualname__ = "JacobiWorker"
    return JacobiWorker


def _refuse_sampling(scheduler_output: Any) -> None:
    for request in scheduler_output.scheduled_new_reqs:
        params = request.sampling_params
        if params is not None and params.temperature:
            raise UserError(
                f"temperature is {params.temperature}; vLLM's CPU back-end samples wrongly with any speculation", hint="use temperature=0, or a GPU"
            )  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "JacobiWorker":
        globals()[name] = _build_worker()
        return globals()[name]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
