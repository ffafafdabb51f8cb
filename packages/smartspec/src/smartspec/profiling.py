"""Timing a target/draft pair on its machine, and the file that keeps the samples.

Schema 1: {"schema": 1, "fingerprint": {target, draft, device, dtype}, "samples": [{n_ctx, n_batched, ...}, ...]}.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically

from smartspec.cost import SCHEMA, StepSample, check_fingerprint, read_json
from smartspec.errors import ProfileError


def save_profile(path: str | Path, samples: Sequence[StepSample], fingerprint: dict[str, str]) -> None:
    """Write samples as JSON, whole or not at all."""
    record = {"schema": SCHEMA, "fingerprint": fingerprint, "samples": [asdict(s) for s in samples]}
    with replace_atomically(path) as partial:
        partial.write_text(json.dumps(record, indent=0, allow_nan=False) + "\n", encoding="utf-8")


def load_profile(
    path: str | Path, *, fingerprint: dict[str, str] | None = None
) -> tuple[list[StepSample], dict[str, str]]:
    """Read samples and what they were taken of.

    Raises ProfileError for a damaged file, another schema, or another fingerprint than expected.
    """
    record = read_json(path, "a profile (run `smartspec profile`)")
    try:
        samples = [StepSample(**sample) for sample in record["samples"]]
        found = {str(k): str(v) for k, v in record["fingerprint"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ProfileError(f"{path} is not a profile ({error!r})", hint="run `smartspec profile` again") from error
    check_fingerprint(found, fingerprint, path)
    return samples, found


def fingerprint_of(target: Any, draft: Any = None) -> dict[str, str]:
    """What a profile depends on: both models by type and size, the device and the number format."""
    import torch

    def name(model: Any) -> str:
        if model is None or isinstance(model, str):
            return str(model)
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        return f"{kind}, {sum(p.numel() for p in model.parameters()):,} parameters"

    first = next(target.parameters())
    device = (
        torch.cuda.get_device_name(first.device)
        if first.is_cuda
        else f"{first.device.type}, {torch.get_num_threads()} threads"
    )
    return {
        "target": name(target),
        "draft": name(draft),
        "device": device,
        "dtype": str(first.dtype).removeprefix("torch."),
    }


def profile_engine(
    target: Any,
    draft: Any = None,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    contexts: Sequence[int] = (32, 128),
    draft_lens: Sequence[int] = (0, 1, 2, 4, 7),
    repeats: int = 3,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> list[StepSample]:
    """Time target and drafter of a `SpecEngine` on a grid; each point is the fastest of `repeats` interleaved rounds.

    batch_sizes: requests. contexts: tokens of each. draft_lens: k. clock: seconds. progress: called with (done, all).

    Raises UserError when a grid is empty or holds values below their least, and what SpecEngine raises.
    """
    from smartspec.engine import SpecEngine

    if (
        not batch_sizes
        or not contexts
        or not draft_lens
        or min(batch_sizes) < 1
        or min(contexts) < 2
        or min(draft_lens) < 0
    ):
        raise UserError("the grid needs batch sizes >= 1, contexts >= 2 and draft lengths >= 0")
    if repeats < 1:
        raise UserError(f"repeats is {repeats}, expected 1 or more")
    most = max(max(draft_lens), 1)
    engine = SpecEngine(
        target, draft, max_num_seqs=max(batch_sizes), max_len=max(contexts) + most + 2, max_draft_len=most, seed=seed
    )
    points = [(b, c, k) for b in batch_sizes for c in contexts for k in draft_lens]
    best = np.full((len(points), 2), np.inf)
    # The first round warms up and is not counted.
    for turn in range(repeats + 1):
        for i, (b, c, k) in enumerate(points):
            spent = _time_point(engine, b, c, k, clock)
            if turn:
                best[i] = np.minimum(best[i], spent)
            if progress is not None:
                progress(turn * len(points) + i + 1, (repeats + 1) * len(points))
    samples = []
    for (b, c, k), (target_ms, draft_ms) in zip(points, 1000 * best, strict=True):
        samples.append(StepSample(b * c, b * (k + 1), b, k, ms=float(target_ms)))
        if draft is not None and k and draft_ms > 0:
            samples.append(StepSample(b * c, 0, b, k, ms=float(draft_ms), kind="draft"))
    return samples


def _time_point(engine: Any, b: int, c: int, k: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the target's pass and of drafting for b requests of c tokens."""
    import torch

    from smartspec.proposers import DraftModel, Request
    from smartspec.sampling import Sampling

    rng = np.random.default_rng(c)
    requests = [
        Request(i, rng.integers(0, engine.target.vocab_size, c).tolist(), c, k + 2, Sampling(), frozenset(), slot=i)
        for i in range(b)
    ]
    width = engine.target.model.config.get_text_config().hidden_size
    for r in requests:
        r.hidden = torch.zeros(width, device=engine.target.device)
    if isinstance(engine.proposer, DraftModel):
        engine.proposer.have[:b] = [c - 1] * b
    _synchronize(engine)
    start = clock()
    engine.proposer.limits(requests, max(k, 1))
    engine.proposer.propose(requests, [k] * b, engine.generator)
    _synchronize(engine)
    drafted = clock()
    engine.target.forward(list(range(b)), [c - 1] * b, [[1] * (k + 1)] * b)
    _synchronize(engine)
    return clock() - drafted, drafted - start


def _synchronize(engine: Any) -> None:
    import torch

    if engine.target.device.type == "cuda":
        torch.cuda.synchronize(engine.target.device)


def profile_vllm(llm: Any, path: str | Path | None = None) -> list[StepSample]:
    """The steps that a vLLM engine with our scheduler has timed while serving, as samples of kind "step".

    llm: a `vllm.LLM` whose engine core runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0); a server in processes of
    its own writes the same file with the setting {"profile": path}. path: where to save them.

    Raises UserError when the engine runs elsewhere or has another scheduler.
    """
    core = getattr(getattr(llm, "llm_engine", llm), "engine_core", None)
    scheduler = getattr(getattr(core, "engine_core", None), "scheduler", None)
    bridge = getattr(scheduler, "smartspec", None)
    if bridge is None:
        raise UserError(
            "no SmartSpecScheduler runs in this process",
            hint="set VLLM_ENABLE_V1_MULTIPROCESSING=0 and scheduler_cls, or the setting {'profile': PATH}",
        )
    samples = list(bridge.samples)
    if path is not None:
        save_profile(path, samples, bridge.fingerprint)
    return samples
