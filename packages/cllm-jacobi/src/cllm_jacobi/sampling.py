"""Which tokens a pass confirms: greedy, with a fixed Gumbel noise, or by speculative acceptance.

Greedy and Gumbel are deterministic maps from a prefix to a token, so a draft is right exactly when the map gives it:

    y_i = argmax_v [ log p(v | y_<i, x) + g_i(v) ],    g = 0 for greedy                    (2403.00835, section 3.1)

With g_i(v) standard Gumbel noise y_i is a sample from p, and as g depends on the position only, Jacobi iteration with it has
one fixed point: the sample that the autoregressive loop draws with the same noise.

Speculative acceptance draws anew instead: a draft t from q is kept with probability min(1, p(t) / q(t)), at the first refusal
a token of norm(max(p - q, 0)) takes its place, and the output is distributed as autoregressive sampling.
"""

from collections.abc import Sequence

import torch


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF


class GumbelNoise:
    """The noise of one row: a vector for each position of its output, the same whatever the block size.

    seed: seed of the run. row: index of the row. vocab_size: length of a vector.
    """

    def __init__(self, seed: int, row: int, vocab_size: int) -> None:
        self.seed, self.row, self.vocab_size = seed, row, vocab_size
        self.kept: dict[int, torch.Tensor] = {}

    def rows(self, start: int, count: int) -> torch.Tensor:
        """(count, vocabulary) float32 noise of output positions start .. start + count - 1."""
        for position in [p for p in self.kept if p < start]:
            del self.kept[position]
        for position in range(start, start + count):
            if position not in self.kept:
                generator = torch.Generator().manual_seed(mix(self.seed, self.row, position))
                uniform = torch.rand(self.vocab_size, generator=generator, dtype=torch.float64)
                self.kept[position] = (-(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()).float()
        return torch.stack([self.kept[p] for p in range(start, start + count)])


def confirmed(draft: Sequence[int], predicted: Sequence[int]) -> int:
    """Length of the longest prefix on which the draft is what the model predicts."""
    for i, (guess, token) in enumerate(zip(draft, predicted, strict=False)):
        if guess != token:
            return i
    return min(len(draft), len(predicted))


def speculate(
    draft: Sequence[int], proposals: Sequence[torch.Tensor | None], p: torch.Tensor, generator: torch.Generator
) -> tuple[list[int], int]:
    """Keep a prefix of `draft` and add one token, so that the result is distributed as p.

    draft: d tokens. proposals: for each the distribution it was drawn from, (vocabulary,), or None for a fixed guess.
    p: (d + 1, vocabulary) the model's distributions. generator: on the CPU.

    Returns the tokens, 1 to d + 1 of them, and how many are from the draft.
    """
    p = p.double().cpu()
    for i, (token, q) in enumerate(zip(draft, proposals, strict=True)):
        chance = float(p[i, token]) if q is None else float(p[i, token]) / max(float(q[token]), 1e-300)
        if float(torch.rand((), generator=generator, dtype=torch.float64)) < chance:
            continue
        if q is None:
            residual = p[i].clone()
            residual[token] = 0.0
        else:
            residual = (p[i] - q).clamp_min(0.0)
        # Equal distributions leave rounding only; p itself is then the answer.
        weights = residual if float(residual.sum()) > 0 else p[i]
        return [*draft[:i], draw(weights, generator)], i
    return [*draft, draw(p[len(draft)], generator)], len(draft)


def draw(weights: torch.Tensor, generator: torch.Generator) -> int:
    """One index with probability proportional to `weights`, (vocabulary,) on the CPU."""
    return int(torch.multinomial(weights, 1, generator=generator))
