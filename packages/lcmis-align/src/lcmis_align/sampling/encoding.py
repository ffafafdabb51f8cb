"""Text encodings: each text is encoded once in a run, and a weighted mixture of texts is encoded as the mixture of theirs."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lcmis_align.errors import IncompatiblePromptLength, UnsupportedPipelineError


class MixedPrompt(str):
    """A prompt that stands for a weighted mixture of the encodings of several texts."""

    weights: tuple[tuple[str, float], ...]
    used: bool

    def __new__(cls, weights: tuple[tuple[str, float], ...]) -> "MixedPrompt":
        self = super().__new__(cls, " + ".join(f"{weight:g}*{text!r}" for text, weight in weights))
        self.weights, self.used = weights, False
        return self


@contextmanager
def encodings(pipe: Any) -> Iterator[None]:
    """While it lasts, `pipe` remembers what it encoded and understands `MixedPrompt`."""
    original = getattr(pipe, "encode_prompt", None)
    if original is None or "encode_prompt" in vars(pipe):  # nothing to remember, or remembering already
        yield
        return
    pipe.encode_prompt = _remembering(original)
    try:
        yield
    finally:
        del pipe.encode_prompt


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    memory: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(original)
    def encode(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        prompt = bound.arguments.get("prompt")
        if isinstance(prompt, MixedPrompt):
            prompt.used = True
            parts = []
            for text, _ in prompt.weights:
                bound.arguments["prompt"] = text
                parts.append(encode(*bound.args, **bound.kwargs))
            return _mixed(parts, prompt)
        key = tuple((name, _plain(value)) for name, value in bound.arguments.items())
        if any(value is None for _, value in key):
            return original(*args, **kwargs)
        if key not in memory:
            memory[key] = original(*args, **kwargs)
        return memory[key]

    return encode


def _plain(value: Any) -> str | None:
    """A key of `value`, or None where it is a tensor or another thing without one."""
    if isinstance(value, str | int | float | bool | torch.device | torch.dtype | type(None)):
        return f"{type(value).__name__}:{value}"
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return None if any(part is None for part in parts) else f"{type(value).__name__}:{parts}"
    return None


def _mixed(parts: list[Any], prompt: MixedPrompt) -> Any:
    """The weighted sum of encodings, output by output; what is the same for all texts stays as it is."""
    if isinstance(parts[0], tuple | list):
        return type(parts[0])(_mixed(list(outputs), prompt) for outputs in zip(*parts, strict=True))
    if not torch.is_tensor(parts[0]):
        return parts[0]
    if any(part.shape != parts[0].shape for part in parts):
        raise IncompatiblePromptLength(
            f"the encodings of {', '.join(repr(text) for text, _ in prompt.weights)} have shapes "
            f"{', '.join(str(tuple(part.shape)) for part in parts)} and cannot be mixed",
            hint="pass one max_sequence_length, or mix scores instead of encodings",
        )
    if all(torch.equal(part, parts[0]) for part in parts[1:]):
        return parts[0]
    if not parts[0].is_floating_point():  # attention masks: a word of any text is seen
        return torch.stack(parts).amax(0)
    return sum(part * weight for part, (_, weight) in zip(parts, prompt.weights, strict=True))


def check_used(prompt: str, pipe: Any) -> None:
    """Raise UnsupportedPipelineError when `prompt` is a mixture that the pipeline did not encode as one."""
    if isinstance(prompt, MixedPrompt) and not prompt.used:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} does not encode its prompt through `encode_prompt`, so encodings cannot be mixed",
            hint="mix scores instead",
        )
