"""What is counted: confirmed tokens, stationary tokens, repetition, and the plain loop that speed is measured against.

A block's trajectory is its list of states, each with the same number of ids; the last state is the fixed point y*.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

States = Sequence[Sequence[int]]


def right_prefix(state: Sequence[int], target: Sequence[int]) -> int:
    """How many leading tokens of `state` are those of `target`."""
    for i, (a, b) in enumerate(zip(state, target, strict=True)):
        if a != b:
            return i
    return len(target)


def fast_forwarded(states: States) -> float:
    """Tokens confirmed beyond the guaranteed one, averaged over the iterations of a block (2403.00835, section 4.2)."""
    runs = [right_prefix(state, states[-1]) for state in states]
    gains = [max(after - before - 1, 0) for before, after in pairwise(runs)]
    return sum(gains) / len(gains) if gains else 0.0


def stationary(states: States) -> int:
    """Positions that were right while an earlier one was wrong, and stayed right to the end (2403.00835, section 4.2)."""
    target = states[-1]
    found = 0
    for i in range(len(target)):
        wrong = [j for j, state in enumerate(states) if state[i] != target[i]]
        since = wrong[-1] + 1 if wrong else 0
        found += since < len(states) and right_prefix(states[since], target) < i
    return found


def confirmed_map(states: States) -> list[list[bool]]:
    """(iterations + 1, n) whether each position's whole prefix and itself are right in each state; rows of a heat map."""
    target = states[-1]
    return [[i < right_prefix(state, target) for i in range(len(target))] for state in states]


def repetition(tokens: Sequence[int], *, n: int = 4) -> float:
    """Share of n-grams that occurred before in the same sequence, 0 to 1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def greedy_loop(model: Any, input_ids: torch.Tensor, *, max_new_tokens: int, eos: Sequence[int] = ()) -> list[int]:
    """The leanest autoregressive loop for one prompt, (1, tokens): a forward pass and an argmax for each token."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ends = frozenset(eos)
    tokens: list[int] = []
    feed = input_ids
    while len(tokens) < max_new_tokens:
        logits = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        tokens.append(token)
        if token in ends:
            break
        feed = torch.tensor([[token]], device=input_ids.device)
    return tokens
