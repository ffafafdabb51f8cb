"""Decoders side by side: the same prompts, in turn, in one process; what each costs and whether it says the same.

The bar for speed is the leanest autoregressive loop, which is faster than `generate` on small models.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cllm_jacobi.jacobi import JacobiConfig, jacobi_generate
from cllm_jacobi.metrics import greedy_loop

LEAN = "autoregressive, lean loop"


@dataclass
class DecoderFigures:
    """One decoder over all prompts and rounds."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Of each prompt in each round."""
    tokens: int = 0
    passes: int = 0
    tokens_per_forward: list[float] = field(default_factory=list)
    """Of each prompt."""
    equal: int = 0
    """Prompts on which its output is that of the lean loop."""
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second."""
        return self.tokens / max(sum(self.seconds), 1e-9)


def decoders(
    model: Any,
    config: JacobiConfig,
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    pad: int,
    lookup: int = 10,
    assistant: Any = None,
) -> dict[str, Callable[[torch.Tensor], list[int]]]:
    """Name to a function from (1, tokens) prompt ids to the new tokens."""
    import dataclasses

    wanted: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": pad,
        "eos_token_id": list(eos) or None,
    }

    def generate(**extra: Any) -> Callable[[torch.Tensor], list[int]]:
        return lambda ids: model.generate(ids, attention_mask=torch.ones_like(ids), **wanted, **extra)[
            0, ids.shape[1] :
        ].tolist()

    def jacobi(window: str) -> Callable[[torch.Tensor], list[int]]:
        decoder = dataclasses.replace(config, window=window).decoder()
        return lambda ids: jacobi_generate(model, ids, attention_mask=torch.ones_like(ids), decoder=decoder, **wanted)[
            0, ids.shape[1] :
        ].tolist()

    found = {
        LEAN: lambda ids: greedy_loop(model, ids, max_new_tokens=max_new_tokens, eos=eos),
        "generate": generate(),
        "prompt lookup": generate(prompt_lookup_num_tokens=lookup),
        "Jacobi, block": jacobi("block"),
        "Jacobi, rolling": jacobi("rolling"),
    }
    if assistant is not None:
        found["assisted generation"] = generate(assistant_model=assistant)
    return found


def compare_decoders(
    model: Any,
    prompts: Sequence[torch.Tensor],
    contestants: dict[str, Callable[[torch.Tensor], list[int]]],
    *,
    repeats: int = 1,
    warmup: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, DecoderFigures]:
    """Run every decoder on every prompt in turn, `repeats` rounds; forward passes are counted on the model itself.

    prompts: (1, tokens) each. contestants: from `decoders`, the lean loop among them. warmup: prompts run before, untimed.
    """
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    figures = {name: DecoderFigures(name) for name in contestants}
    for ids in prompts[:warmup]:
        for decode in contestants.values():
            decode(ids)
    hook = model.register_forward_pre_hook(count)
    try:
        for turn in range(repeats):
            for i, ids in enumerate(prompts):
                for name, decode in contestants.items():
                    row = figures[name]
                    passes = 0
                    start = time.perf_counter()
                    out = decode(ids)
                    if ids.device.type == "cuda":
                        torch.cuda.synchronize(ids.device)
                    row.seconds.append(time.perf_counter() - start)
                    row.tokens += len(out)
                    row.passes += passes
                    if turn == 0:
                        row.tokens_per_forward.append(len(out) / max(passes, 1))
                        row.outputs.append(out)
                progress(turn * len(prompts) + i + 1, repeats * len(prompts))
    finally:
        hook.remove()
    for row in figures.values():
        row.equal = sum(a == b for a, b in zip(row.outputs, figures[LEAN].outputs, strict=True))
    return figures


def share_right(texts: Sequence[str], expected: Sequence[str], *, final_number: bool = False) -> float:
    """Share of answers that are the expected text; with `final_number`, whose last number is its last number (GSM8K)."""

    def key(text: str) -> str:
        if not final_number:
            return text.strip()
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return str(float(numbers[-1].replace(",", ""))) if numbers else ""

    right = [key(text) == key(answer) != "" for text, answer in zip(texts, expected, strict=True)]
    return sum(right) / len(right)


def speed_ratio(ours: DecoderFigures, peer: DecoderFigures) -> float:
    """How many times faster ours is: seconds of the peer over ours, on the same prompts and rounds."""
    return sum(peer.seconds) / max(sum(ours.seconds), 1e-12)
