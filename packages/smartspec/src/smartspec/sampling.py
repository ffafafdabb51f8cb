"""Verification that changes nothing about the target's output: chains, one-hot proposals, and trees.

A drafted token x ~ q is kept with probability min(1, p(x) / q(x)); after a rejection the token is drawn from
norm(max(p - q, 0)); when all are kept one more is drawn from p. p and q are what is left after temperature, top-k, top-p
and penalties, the same ones on both sides. A proposal without randomness (greedy draft, prompt lookup, the top ranks of a
head) is q = 1 at its token: kept with p(x), the residual is p without x.

Which drafted positions are verified may depend on finished steps and on the draft's distribution, never on the token
drawn there or later in the same request: such a trim shifts the output (`trimmed by the drawn token` in the tests).

Legend: b requests, k drafted positions, n tree nodes, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from smartspec.tree import TokenTree


@dataclass(frozen=True)
class Sampling:
    """How a request draws its tokens; temperature 0 is greedy. Applied alike to target and draft.

    Raises UserError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not self.repetition_penalty > 0:
            raise UserError(f"{self} is out of range", hint="temperature >= 0, top_k >= 0, 0 < top_p <= 1, penalty > 0")

    def probabilities(self, logits: Tensor, contexts: Sequence[Sequence[int]]) -> Tensor:
        """(positions, v) logits to (positions, v) probabilities, with transformers' own processors.

        contexts: for each position the tokens before it, which penalties look at.
        """
        from transformers import (
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        scores = logits.float()
        unused = torch.zeros(1, 1, dtype=torch.long)
        if self.repetition_penalty != 1.0:
            penalty = RepetitionPenaltyLogitsProcessor(self.repetition_penalty)
            rows = [
                penalty(torch.tensor([context], device=scores.device), row[None])
                for context, row in zip(contexts, scores, strict=True)
            ]
            scores = torch.cat(rows)
        if self.temperature == 0:
            return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()
        if self.temperature != 1:
            scores = TemperatureLogitsWarper(float(self.temperature))(unused, scores)
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(unused, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(unused, scores)
        return scores.softmax(-1)


def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(b,) tokens from (b, v) probabilities."""
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def verify_greedy(logits: Tensor, draft: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Keep drafted tokens while they are the target's argmax.

    logits: (b, k + 1, v) of the target. draft: (b, k) tokens. lens: (b,) verified lengths v_i <= k.
    Returns (b,) how many are kept, and (b,) the target's own next token.
    """
    best = logits.argmax(-1)
    kept = _run(best[:, :-1] == draft, lens)
    return kept, best.gather(1, kept[:, None])[:, 0]


def verify_sampling(
    p: Tensor, draft: Tensor, lens: Tensor, q: Tensor | None = None, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Keep drafted tokens so that what comes out is distributed as the target alone would draw it.

    p: (b, k + 1, v) target probabilities. draft: (b, k). lens: (b,) v_i <= k. q: (b, k, v) draft probabilities, None for
    proposals without randomness.
    Returns (b,) how many are kept, and (b,) the next token.
    """
    b, k = draft.shape
    p_draft = p[:, :k].gather(2, draft[..., None])[..., 0]
    q_draft = torch.ones_like(p_draft) if q is None else q.gather(2, draft[..., None])[..., 0]
    u = torch.rand(b, k, generator=generator, device=p.device)
    kept = _run(u * q_draft < p_draft, lens)
    rows = torch.arange(b, device=p.device)
    final = p[rows, kept]
    rejected = kept < lens
    if k and bool(rejected.any()):
        at = kept.clamp(max=k - 1)
        proposal = torch.nn.functional.one_hot(draft[rows, at], p.shape[-1]).float() if q is None else q[rows, at]
        residual = _without(final, proposal, one_hot=q is None)
        final = torch.where(rejected[:, None], residual, final)
    return kept, draw(final, generator)


def verify_tree(
    p: Tensor, tokens: Tensor, tree: TokenTree, q: Tensor | None = None, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Walk down a tree of proposals without changing the target's distribution.

    p: (b, n + 1, v) target probabilities, index 0 after the last accepted token, i + 1 after node i.
    tokens: (b, n) tokens of the nodes. q: (b, n + 1, v) distributions from which the children were drawn independently,
    None for children without randomness, which must differ among siblings to be of use.
    At each node its children are tried in the order of their ranks, each against what the earlier ones left of p.
    Returns (b, levels) indices of the taken nodes, -1 beyond the last, and (b,) the next token.
    """
    b = tokens.shape[0]
    device = p.device
    children = _children(tree).to(device)
    rows = torch.arange(b, device=device)
    at = torch.zeros(b, dtype=torch.long, device=device)  # 0 is the root, i + 1 node i
    left = p[:, 0]
    levels = int(max(tree.depths, default=0))
    path = torch.full((b, levels), -1, dtype=torch.long, device=device)
    walking = torch.ones(b, dtype=torch.bool, device=device)
    for level in range(levels):
        moved = torch.zeros_like(walking)
        start = at.clone()
        for rank in range(children.shape[1]):
            child = children[start, rank]
            trying = walking & ~moved & (child >= 0)
            if not bool(trying.any()):
                continue
            token = tokens[rows, child.clamp(min=0)]
            p_token = left[rows, token]
            q_token = torch.ones_like(p_token) if q is None else q[rows, start, token]
            u = torch.rand(b, generator=generator, device=device)
            taken = trying & (u * q_token < p_token)
            path[taken, level] = child[taken]
            at = torch.where(taken, child + 1, at)
            moved |= taken
            missed = trying & ~taken
            if bool(missed.any()):
                proposal = torch.nn.functional.one_hot(token, p.shape[-1]).float() if q is None else q[rows, start]
                left = torch.where(missed[:, None], _without(left, proposal, one_hot=q is None), left)
        left = torch.where(moved[:, None], p[rows, at], left)
        walking &= moved
    return path, draw(left, generator)


def _run(kept: Tensor, lens: Tensor) -> Tensor:
    """Length of the unbroken run of kept positions before lens."""
    inside = torch.arange(kept.shape[1], device=kept.device) < lens[:, None]
    return (kept & inside).long().cumprod(1).sum(1)


def _without(p: Tensor, q: Tensor, *, one_hot: bool) -> Tensor:
    """norm(max(p - q, 0)); for a one-hot q this is p without its token."""
    residual = p * (1 - q) if one_hot else (p - q).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    # Rounding can leave nothing where p and q agree; p itself is then right.
    return torch.where(total > 0, residual / total.clamp(min=1e-30), p)


def _children(tree: TokenTree) -> Tensor:
    """(n + 1, ranks) node index of each child of the root (row 0) and of node i (row i + 1), -1 for none."""
    ranks = max((path[-1] + 1 for path in tree.paths), default=1)
    table = torch.full((len(tree.paths) + 1, ranks), -1, dtype=torch.long)
    for i, (path, parent) in enumerate(zip(tree.paths, tree.parents, strict=True)):
        table[int(parent) + 1, path[-1]] = i
    return table
