"""Initial guesses: what stands in a block's place before the model has said anything about it.

The choice never changes the output, only the number of passes. Guesses have a random source of their own.
"""

from collections.abc import Callable, Sequence

import torch
from tenfold_shared.errors import UserError

Init = str | Callable[[Sequence[int], int], Sequence[int]]
"""A name of `INITS`, or a function from the row's tokens so far and a count to that many guesses."""

INITS = ("prompt", "random", "repeat", "pad", "ngram")
POOL = 4096


class Drafter:
    """Guesses for one row.

    init: "prompt" draws from the prompt's tokens (as published), "random" from the vocabulary, "repeat" repeats the last
    token, "pad" takes `pad`, "ngram" continues the last token as an earlier rejected guess did, or a callable.
    prompt: the row's prompt. vocab_size, pad: ids allowed and the id of padding.

    Raises UserError for an unknown name, and when a callable gives a wrong count or ids outside the vocabulary.
    """

    def __init__(self, init: Init, prompt: Sequence[int], *, vocab_size: int, pad: int = 0, seed: int = 0) -> None:
        if not callable(init) and init not in INITS:
            raise UserError(f"init is '{init}', expected {', '.join(INITS)} or a callable")
        self.init, self.prompt, self.vocab_size, self.pad = init, list(prompt), vocab_size, pad
        self.generator = torch.Generator().manual_seed(seed)
        self.pool: dict[int, list[int]] = {}

    def fill(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` guesses for what follows `tokens`."""
        if count <= 0:
            return []
        if callable(self.init):
            guesses = [int(t) for t in self.init(tokens, count)]
            if len(guesses) != count or any(not 0 <= t < self.vocab_size for t in guesses):
                raise UserError(f"the draft function gave {guesses}, expected {count} ids below {self.vocab_size}")
            return guesses
        last = tokens[-1] if tokens else self.prompt[-1]
        if self.init == "repeat":
            return [last] * count
        if self.init == "pad":
            return [self.pad] * count
        if self.init == "ngram" and last in self.pool:
            found = self.pool[last][:count]
            return found + self._draw(count - len(found))
        return self._draw(count)

    def remember(self, rejected: Sequence[int]) -> None:
        """Keep a rejected tail: each of its tokens points to what followed it there."""
        if self.init != "ngram":
            return
        for i, token in enumerate(rejected[:-1]):
            self.pool.pop(token, None)
            self.pool[token] = list(rejected[i + 1 :])
        while len(self.pool) > POOL:
            del self.pool[next(iter(self.pool))]

    def _draw(self, count: int) -> list[int]:
        if not count:
            return []
        source = [] if self.init == "random" else self.prompt
        drawn = torch.randint(len(source) or self.vocab_size, (count,), generator=self.generator).tolist()
        return [source[i] for i in drawn] if source else drawn
