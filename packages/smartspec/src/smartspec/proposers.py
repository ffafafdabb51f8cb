"""Where drafted tokens come from: a small model, the request's own text, or heads on the target.

A proposer says how many tokens it could give (`limits`), gives them (`propose`), and is told what was kept (`commit`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smartspec.acceptance import TreeTracker
from smartspec.errors import PairError
from smartspec.medusa import MedusaHeads
from smartspec.sampling import Sampling, draw
from smartspec.slots import SlotModel
from smartspec.tree import TokenTree, best_tree


@dataclass
class Request:
    """One request of the engine. tokens: prompt and output so far. slot: its row in the caches."""

    name: int
    tokens: list[int]
    prompt_len: int
    max_new_tokens: int
    sampling: Sampling
    eos: frozenset[int]
    max_draft_len: int | None = None
    weight: float = 1.0
    slot: int = -1
    prefilled: int = 0
    hidden: Tensor | None = None
    """(d,) last hidden state of the last verified position, for heads."""

    @property
    def left(self) -> int:
        """Tokens still to generate."""
        return self.max_new_tokens - (len(self.tokens) - self.prompt_len)


@dataclass
class Proposal:
    """tokens: per request its drafted tokens. q: (b, k, v) their distributions, None when there is no randomness.

    tree: how the tokens hang together, None for a chain.
    """

    tokens: list[list[int]]
    q: Tensor | None = None
    tree: TokenTree | None = None


@dataclass
class NoProposer:
    """Nothing is drafted."""

    free: bool = True

    def limits(self, requests: Sequence[Request], most: int) -> NDArray[Any]:
        return np.zeros(len(requests), int)

    def survival(self, n_seqs: int, most: int) -> NDArray[Any] | None:
        return None

    def prefill(self, requests: Sequence[Request]) -> None:
        """The prompts of these requests are in the target's cache now."""

    def propose(self, requests: Sequence[Request], lens: Sequence[int], generator: torch.Generator) -> Proposal:
        return Proposal([[] for _ in requests])

    def commit(self, request: Request, kept: int) -> None:
        """`kept` drafted tokens of a request were accepted; its tokens are already extended."""


@dataclass
class PromptLookup(NoProposer):
    """The continuation of the latest earlier occurrence of the last n tokens, longest n first.

    longest, shortest: sizes n of the matched ending. window: tokens looked back on.
    """

    longest: int = 3
    shortest: int = 1
    window: int = 4096
    _found: dict[int, list[int]] = field(default_factory=dict)

    def match(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the last earlier occurrence of the present ending."""
        text = np.asarray(tokens[-self.window :])
        for n in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
            hits = np.flatnonzero((windows == text[-n:]).all(axis=1))
            if len(hits):
                return [int(t) for t in text[hits[-1] + n : hits[-1] + n + most]]
        return []

    def limits(self, requests: Sequence[Request], most: int) -> NDArray[Any]:
        self._found = {r.name: self.match(r.tokens, most) for r in requests}
        return np.array([len(self._found[r.name]) for r in requests], int)

    def propose(self, requests: Sequence[Request], lens: Sequence[int], generator: torch.Generator) -> Proposal:
        return Proposal([self._found[r.name][:k] for r, k in zip(requests, lens, strict=True)])


class DraftModel(NoProposer):
    """A small causal model of the same vocabulary, with a cache of its own that follows the accepted tokens.

    Steps without speculation do not run it, nor does prefill; what it missed is taken in when it is used.
    Raises PairError when its vocabulary differs from the target's.
    """

    chunk = 8
    """Missing tokens that are taken in together with the first drafted one; more go in a pass of their own."""

    def __init__(self, model: Any, target: SlotModel) -> None:
        super().__init__(free=False)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", target.max_len)
        self.slots = SlotModel(model, target.max_num_seqs, min(target.max_len, limit))
        if self.slots.vocab_size != target.vocab_size:
            raise PairError(
                f"the draft has {self.slots.vocab_size} tokens in its vocabulary, the target {target.vocab_size}",
                hint="use a draft made for this target",
            )
        self.have = [0] * target.max_num_seqs

    def limits(self, requests: Sequence[Request], most: int) -> NDArray[Any]:
        room = np.array([self.slots.max_len - len(r.tokens) for r in requests], int)
        return np.clip(room, 0, most)

    def prefill(self, requests: Sequence[Request]) -> None:
        for r in requests:
            self.have[r.slot] = 0

    def _catch_up(self, requests: Sequence[Request], allowed: int) -> None:
        behind = [r for r in requests if len(r.tokens) - 1 - self.have[r.slot] > allowed]
        fits = [r for r in behind if len(r.tokens) <= self.slots.max_len]
        if fits:
            starts = [self.have[r.slot] for r in fits]
            self.slots.forward(
                [r.slot for r in fits], starts, [r.tokens[s:-1] for r, s in zip(fits, starts, strict=True)]
            )
            for r in fits:
                self.have[r.slot] = len(r.tokens) - 1

    def propose(self, requests: Sequence[Request], lens: Sequence[int], generator: torch.Generator) -> Proposal:
        out: list[list[int]] = [[] for _ in requests]
        active = [i for i, k in enumerate(lens) if k > 0]
        if not active:
            return Proposal(out)
        self._catch_up([requests[i] for i in active], self.chunk)
        width = max(lens)
        sampled = any(requests[i].sampling.temperature > 0 for i in active)
        q = torch.zeros(len(requests), width, self.slots.vocab_size, device=self.slots.device) if sampled else None
        feed = [requests[i].tokens[self.have[requests[i].slot] :] for i in active]
        for step in range(width):
            starts = [self.have[requests[i].slot] for i in active]
            logits, _ = self.slots.forward([requests[i].slot for i in active], starts, feed)
            last = torch.stack([logits[row, len(t) - 1] for row, t in enumerate(feed)])
            for row, i in enumerate(active):
                self.have[requests[i].slot] += len(feed[row])
            if q is None and all(requests[i].sampling.repetition_penalty == 1 for i in active):
                tokens = last.argmax(-1).tolist()
            else:
                p = torch.cat(
                    [
                        requests[i].sampling.probabilities(last[row : row + 1], [requests[i].tokens + out[i]])
                        for row, i in enumerate(active)
                    ]
                )
                tokens = draw(p, generator).tolist()
                if q is not None:
                    q[active, step] = p
            for i, token in zip(active, tokens, strict=True):
                out[i].append(token)
            active = [i for i in active if lens[i] > step + 1]
            feed = [[out[i][-1]] for i in active]
            if not active:
                break
        return Proposal(out, q)

    def commit(self, request: Request, kept: int) -> None:
        # The last token was the target's own, so at least that one is still missing here.
        self.have[request.slot] = min(self.have[request.slot], len(request.tokens) - 1)


class MedusaProposer(NoProposer):
    """A tree of the best ranks of each head; which nodes are worth it is learned from what is taken.

    ranks: guesses looked at of each head. nodes: size of the largest tree.
    """

    def __init__(self, heads: MedusaHeads, *, ranks: int = 3, nodes: int = 16) -> None:
        super().__init__(free=False)
        self.heads = heads.eval()
        self.levels, self.ranks = len(heads.heads), ranks
        self.nodes = min(nodes, sum(ranks**j for j in range(1, self.levels + 1)))
        self.tracker = TreeTracker(self.levels, ranks)
        self._tree, self._products = best_tree(self.tracker.acceptance, self.nodes)

    def limits(self, requests: Sequence[Request], most: int) -> NDArray[Any]:
        return np.array([min(self.nodes, most) if r.hidden is not None else 0 for r in requests], int)

    def survival(self, n_seqs: int, most: int) -> NDArray[Any] | None:
        self._tree, self._products = best_tree(self.tracker.acceptance, self.nodes)
        return np.tile(self._products[:most], (n_seqs, 1))

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], lens: Sequence[int], generator: torch.Generator) -> Proposal:
        size = max(lens)
        if not size:
            return Proposal([[] for _ in requests])
        tree = self._tree.first(size)
        width = int(self.heads.heads[0][-1].weight.shape[1])
        hidden = torch.stack([r.hidden if r.hidden is not None else torch.zeros(width) for r in requests])
        weight = self.heads.heads[0][-1].weight
        top = self.heads(hidden.to(weight.dtype).to(weight.device)).topk(self.ranks, dim=-1).indices
        index = [(len(path) - 1, path[-1]) for path in tree.paths]
        rows = [[int(top[i, level, rank]) for level, rank in index[: lens[i]]] for i in range(len(requests))]
        return Proposal(rows, tree=tree)

    def learn(self, tree: TokenTree, size: int, path: Sequence[int]) -> None:
        """What was taken at each visited node of a tree of `size` nodes; path: node indices."""
        at: tuple[int, ...] = ()
        for level in range(self.levels):
            offered = [p[-1] for p in tree.paths[:size] if p[:-1] == at]
            taken = tree.paths[path[level]][-1] if level < len(path) and path[level] >= 0 else None
            self.tracker.update(level, offered, taken)
            if taken is None:
                return
            at = (*at, taken)
