"""A small continuous-batching engine on plain transformers models, driven by any policy.

Requests are admitted first come first served while there are free slots; prompts are prefilled in chunks in a pass of their
own; then one decode step drafts, verifies and rolls back for all requests together, each with its own length. Whatever the
policy decides, greedy output is the target's own and sampled output is distributed as the target's own.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from smartspec.controller import BatchState, Policy, StepOutcome
from smartspec.cost import StepSample
from smartspec.errors import PairError
from smartspec.medusa import MedusaHeads
from smartspec.policies import NoSpeculation
from smartspec.proposers import DraftModel, MedusaProposer, NoProposer, PromptLookup, Proposal, Request
from smartspec.sampling import Sampling, verify_greedy, verify_sampling, verify_tree
from smartspec.slots import SlotModel
from smartspec.tree import TokenTree

__all__ = ["EngineStats", "Sampling", "SpecEngine", "check_tokenizers"]


@dataclass
class EngineStats:
    """Running totals; `samples` are the decode steps' timings when the engine records them."""

    steps: int = 0
    generated: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    lengths: list[int] = field(default_factory=list)
    samples: list[StepSample] = field(default_factory=list)

    @property
    def mean_draft_len(self) -> float:
        return float(np.mean(self.lengths)) if self.lengths else 0.0


def check_tokenizers(target: Any, draft: Any) -> None:
    """Raise PairError when two tokenizers do not give the same ids to the same tokens."""
    a, b = target.get_vocab(), draft.get_vocab()
    if a == b:
        return
    odd = next((t for t in sorted(a) if b.get(t) != a[t]), None) or next(t for t in sorted(b) if t not in a)
    raise PairError(
        f"the tokenizers differ: '{odd}' is {a.get(odd)} for the target and {b.get(odd)} for the draft",
        hint="use a draft that was trained with the target's tokenizer",
    )


class SpecEngine:
    """Speculative serving of a causal transformers model.

    target: the model. draft: None, "prompt_lookup", a causal model of the same vocabulary, or MedusaHeads.
    policy: what chooses the lengths; no speculation when not given. max_num_seqs: requests decoded together.
    max_len: most tokens of a request, prompt included. max_draft_len: most drafted tokens of a step (tree nodes for heads).
    chunk: prompt tokens of a prefill pass. clock: seconds, `time.process_time` to count CPU time.
    record: keep a StepSample of every pass in `stats.samples`.

    Raises PairError for differing vocabularies, UnsupportedError for models that cannot be rolled back.
    """

    def __init__(
        self,
        target: Any,
        draft: Any = None,
        *,
        policy: Policy | None = None,
        max_num_seqs: int = 8,
        max_len: int = 1024,
        max_draft_len: int = 8,
        chunk: int = 512,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        record: bool = False,
    ) -> None:
        if max_num_seqs < 1:
            raise UserError(f"max_num_seqs is {max_num_seqs}, expected 1 or more")
        self.target = SlotModel(target, max_num_seqs, max_len)
        self.proposer = self._proposer(draft)
        self.policy: Policy = policy or NoSpeculation()
        self.max_draft_len = max_draft_len
        self.chunk = chunk
        self.clock = clock
        self.record = record
        self.stats = EngineStats()
        self.generator = torch.Generator(device=self.target.device).manual_seed(seed)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._free = list(range(max_num_seqs))[::-1]
        self._count = 0

    def _proposer(self, draft: Any) -> NoProposer:
        if draft is None:
            return NoProposer()
        if draft == "prompt_lookup":
            return PromptLookup()
        if isinstance(draft, NoProposer):
            return draft
        if isinstance(draft, MedusaHeads):
            vocab = int(draft.heads[0][-1].weight.shape[0])
            if vocab != self.target.vocab_size:
                raise PairError(
                    f"the heads have {vocab} tokens in their vocabulary, the target {self.target.vocab_size}"
                )
            return MedusaProposer(draft)
        if isinstance(draft, torch.nn.Module):
            return DraftModel(draft, self.target)
        raise UserError(f"draft is {draft!r}", hint="pass None, 'prompt_lookup', a causal model or MedusaHeads")

    def add_request(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 128,
        *,
        sampling: Sampling | None = None,
        eos: int | Iterable[int] | None = None,
        max_draft_len: int | None = None,
        weight: float = 1.0,
    ) -> int:
        """Queue a request and return its name.

        prompt: token ids, at least one. eos: ids that end it. max_draft_len: a limit of its own, 0 for no speculation.
        weight: worth of its tokens to the controller.

        Raises UserError for an empty prompt, ids outside the vocabulary, or more tokens than max_len.
        """
        tokens = [int(t) for t in prompt]
        if not tokens:
            raise UserError("the prompt is empty, expected at least one token")
        if not 0 <= min(tokens) <= max(tokens) < self.target.vocab_size:
            raise UserError(f"the prompt holds ids outside 0..{self.target.vocab_size - 1}")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        if len(tokens) + max_new_tokens > self.target.max_len:
            raise UserError(
                f"prompt and output need {len(tokens) + max_new_tokens} tokens, max_len is {self.target.max_len}",
                hint="raise max_len or shorten the request",
            )
        ends = frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
        request = Request(
            self._count, tokens, len(tokens), max_new_tokens, sampling or Sampling(), ends, max_draft_len, weight
        )
        self._count += 1
        self._waiting.append(request)
        return request.name

    @property
    def pending(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 128, **kwargs: Any) -> list[list[int]]:
        """Run prompts to their end; returns the new tokens of each. kwargs: as `add_request`."""
        names = [self.add_request(prompt, max_new_tokens, **kwargs) for prompt in prompts]
        done: dict[int, list[int]] = {}
        while self.pending:
            done.update(self.step())
        return [done[name] for name in names]

    def step(self) -> dict[int, list[int]]:
        """One turn: admit, one prefill pass, one decode step. Returns the new tokens of requests that ended."""
        while self._waiting and self._free:
            request = self._waiting.popleft()
            request.slot = self._free.pop()
            self._running.append(request)
        fresh = [r for r in self._running if r.prefilled < r.prompt_len]
        ready = [r for r in self._running if r.prefilled >= r.prompt_len]
        if fresh:
            self._prefill(fresh)
        if ready:
            self._decode(ready)
        ended = [r for r in self._running if self._ended(r)]
        for r in ended:
            self._running.remove(r)
            self._free.append(r.slot)
            self.policy.forget(r.name)
        return {r.name: r.tokens[r.prompt_len :] for r in ended}

    @staticmethod
    def _ended(r: Request) -> bool:
        return len(r.tokens) > r.prompt_len and (r.left <= 0 or r.tokens[-1] in r.eos)

    def _prefill(self, fresh: Sequence[Request]) -> None:
        budget, batch, parts = self.chunk, [], []
        for r in fresh:
            size = min(r.prompt_len - r.prefilled, budget)
            if size:
                batch.append(r)
                parts.append(r.tokens[r.prefilled : r.prefilled + size])
                budget -= size
        wants = isinstance(self.proposer, MedusaProposer)
        logits, hidden = self.target.forward([r.slot for r in batch], [r.prefilled for r in batch], parts, hidden=wants)
        complete = []
        for row, (r, part) in enumerate(zip(batch, parts, strict=True)):
            r.prefilled += len(part)
            if r.prefilled == r.prompt_len:
                p = r.sampling.probabilities(logits[row, len(part) - 1 : len(part)], [r.tokens])
                token = int(torch.multinomial(p, 1, generator=self.generator))
                if hidden is not None:
                    r.hidden = hidden[row, len(part) - 1].clone()
                r.tokens.append(token)
                self.stats.generated += 1
                complete.append(r)
        if complete:
            self.proposer.prefill(complete)

    def _state(self, ready: Sequence[Request]) -> BatchState:
        most = self.max_draft_len
        caps = np.minimum([r.left - 1 for r in ready], self.proposer.limits(ready, most))
        own = [r.max_draft_len if r.max_draft_len is not None else most for r in ready]
        weights = np.array([r.weight for r in ready])
        return BatchState(
            ids=[r.name for r in ready],
            context=np.array([len(r.tokens) for r in ready]),
            caps=np.maximum(np.minimum(caps, own), 0),
            max_draft_len=most,
            weights=None if (weights == 1).all() else weights,
            survival=self.proposer.survival(len(ready), most),
        )

    def _decode(self, ready: Sequence[Request]) -> None:
        started = self.clock()
        state = self._state(ready)
        decision = self.policy.decide(state)
        assert state.caps is not None
        lens = np.minimum(decision.verify_lens, state.caps).astype(int)
        drafted = np.minimum(decision.draft_len, state.caps).astype(int)
        proposal = self.proposer.propose(ready, drafted.tolist(), self.generator)
        lens = np.minimum(lens, [len(t) for t in proposal.tokens])
        drafting = self.clock() - started
        before = self.stats.generated
        n_ctx = int(state.context.sum())
        if proposal.tree is None:
            kept = self._verify_chain(ready, proposal, lens)
            verified = lens
        else:
            # A tree's outcome is learned node by node; it says nothing of a chain.
            self._verify_tree(ready, proposal, lens, proposal.tree)
            verified = kept = np.zeros(len(ready), int)
        seconds = self.clock() - started
        width = int(lens.max()) + 1
        self.stats.steps += 1
        self.stats.lengths.append(decision.draft_len)
        self.stats.drafted += int(drafted.sum())
        self.stats.verified += int(lens.sum())
        if self.record:
            b, k = len(ready), int(drafted.max())
            if not self.proposer.free and k:
                self.stats.samples.append(StepSample(n_ctx, 0, b, k, ms=1000 * drafting, kind="draft"))
            self.stats.samples.append(StepSample(n_ctx, b * width, b, k, ms=1000 * (seconds - drafting)))
        self.policy.observe(
            StepOutcome(
                state.ids, verified, kept, self.stats.generated - before, 1000 * seconds,
                n_ctx=n_ctx, n_batched=len(ready) * width, draft_len=decision.draft_len,
            )
        )  # fmt: skip

    def _verify_chain(self, ready: Sequence[Request], proposal: Proposal, lens: np.ndarray) -> np.ndarray:
        checked = [tokens[:n] for tokens, n in zip(proposal.tokens, lens, strict=True)]
        feed = [[r.tokens[-1], *tokens] for r, tokens in zip(ready, checked, strict=True)]
        logits, _ = self.target.forward([r.slot for r in ready], [len(r.tokens) - 1 for r in ready], feed)
        width = int(lens.max())
        draft = torch.zeros(len(ready), width, dtype=torch.long)
        for row, tokens in enumerate(checked):
            draft[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        draft, limit = draft.to(self.target.device), torch.tensor(lens, device=self.target.device)
        if all(r.sampling == Sampling() for r in ready):
            kept, last = verify_greedy(logits, draft, limit)
        else:
            p = self._probabilities(ready, logits, [[r.tokens + t[:j] for j in range(width + 1)] for r, t in zip(ready, checked, strict=True)])  # fmt: skip
            q = None if proposal.q is None else proposal.q[:, :width]
            if q is not None and any(r.sampling.temperature == 0 for r in ready):
                q = q.clone()
                for row, r in enumerate(ready):
                    if r.sampling.temperature == 0:
                        q[row] = torch.nn.functional.one_hot(draft[row], q.shape[-1]).float()
            kept, last = verify_sampling(p, draft, limit, q, generator=self.generator)
        for row, (r, n, token) in enumerate(zip(ready, kept.tolist(), last.tolist(), strict=True)):
            self._extend(r, [*checked[row][:n], token])
            self.proposer.commit(r, n)
        self.stats.accepted += int(kept.sum())
        return kept.cpu().numpy()

    def _verify_tree(self, ready: Sequence[Request], proposal: Proposal, lens: np.ndarray, tree: TokenTree) -> None:
        assert isinstance(self.proposer, MedusaProposer)
        size = int(lens.max())
        tree = tree.first(size)
        # Rows that verify fewer nodes see the same tree; nodes beyond their length hold a token that is never kept.
        nodes = [[*t[:n], *[0] * (size - n)] for t, n in zip(proposal.tokens, lens, strict=True)]
        ancestors = torch.eye(size + 1, dtype=torch.bool)
        ancestors[:, 0] = True
        ancestors[1:, 1:] = torch.from_numpy(tree.ancestors())
        starts = [len(r.tokens) - 1 for r in ready]
        feed = [[r.tokens[-1], *t] for r, t in zip(ready, nodes, strict=True)]
        logits, hidden = self.target.forward([r.slot for r in ready], starts, feed, ancestors=ancestors, hidden=True)
        assert hidden is not None
        above = tree.ancestors()
        contexts = [
            [r.tokens, *(r.tokens + [t[j] for j in np.flatnonzero(above[i])] for i in range(size))]
            for r, t in zip(ready, nodes, strict=True)
        ]
        p = self._probabilities(ready, logits, contexts)
        for row, r in enumerate(ready):
            own = tree.first(int(lens[row]))
            tokens = torch.tensor([nodes[row][: len(own.paths)]], dtype=torch.long, device=p.device).reshape(1, -1)
            path, last = verify_tree(p[row : row + 1, : len(own.paths) + 1], tokens, own, generator=self.generator)
            taken = [i for i in path[0].tolist() if i >= 0]
            self.target.move(r.slot, [starts[row] + 1 + i for i in taken], starts[row] + 1)
            r.hidden = hidden[row, taken[-1] + 1 if taken else 0].clone()
            self.proposer.learn(own, len(own.paths), taken)
            self._extend(r, [*(nodes[row][i] for i in taken), int(last)])
            self.stats.accepted += len(taken)

    def _probabilities(self, ready: Sequence[Request], logits: Tensor, contexts: list[list[list[int]]]) -> Tensor:
        """(b, w, v) target probabilities; contexts: the tokens before each position."""
        return torch.stack(
            [r.sampling.probabilities(row, context) for r, row, context in zip(ready, logits, contexts, strict=True)]
        )

    def _extend(self, r: Request, tokens: Sequence[int]) -> None:
        for token in tokens:
            r.tokens.append(token)
            self.stats.generated += 1
            if self._ended(r):
                break
