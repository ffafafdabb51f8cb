"""The consistency losses and their distances (2403.00835, section 3.2.2, Algorithm 2).

    L_GC = E [ sum_i D( q_sg(. | y*_<i, x) || q(. | y_<i, x) ) ]             global: the teacher reads the fixed point
    L_LC = E [ sum_i D( q_sg(. | y^(j+1)_<i, x) || q(. | y^(j)_<i, x) ) ]    local: the teacher reads the next state
    L_AR = E [ - sum_i log q(l_i | l_<i, x) ]
    L    = L_consistency + w L_AR

sg is stop-gradient: the teacher is the current model itself. Where student and teacher read the same tokens both sides are the
same numbers, so sums start at the first wrong token. Every mean is over the kept tokens of the whole batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tenfold_shared.errors import UserError

from cllm_jacobi.packing import IGNORE, packed_mask
from cllm_jacobi.trajectory import first_wrong

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def divergence(
    teacher: torch.Tensor, student: torch.Tensor, *, kind: str = "forward_kl", beta: float = 0.5
) -> torch.Tensor:
    """(tokens,) distance of next-token distributions in nats, 0 when they agree.

    teacher, student: (tokens, vocabulary) logits; gradients flow into the student only. kind: "forward_kl" KL(t || s),
    "reverse_kl" KL(s || t), "jsd" beta KL(t || m) + (1 - beta) KL(s || m) with m = beta t + (1 - beta) s.

    Raises UserError for another kind, and a beta outside (0, 1).
    """
    t, s = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    if kind == "forward_kl":
        return (t.exp() * (t - s)).sum(-1)
    if kind == "reverse_kl":
        return (s.exp() * (s - t)).sum(-1)
    if kind != "jsd":
        raise UserError(f"divergence is '{kind}', expected {', '.join(DIVERGENCES)}")
    if not 0 < beta < 1:
        raise UserError(f"jsd_beta is {beta}, expected a number between 0 and 1")
    m = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
    return beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)


def _pair(
    model: Any, prefix: torch.Tensor, teacher: list[int], student: list[int], first: int, **kind: Any
) -> torch.Tensor:
    def logits(state: list[int]) -> torch.Tensor:
        ids = torch.cat([prefix, torch.tensor(state, device=prefix.device)])[None]
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prefix) :]

    with torch.no_grad():
        taught = logits(teacher)
    return divergence(taught[first:-1], logits(student)[first:-1], **kind)


def global_consistency_loss(
    model: Any, prefix: torch.Tensor, states: list[list[int]], j: int, **kind: Any
) -> torch.Tensor:
    """(kept tokens,) terms of L_GC for one block in two passes: state j of `states` against the fixed point.

    prefix: (tokens,) prompt and earlier blocks. kind: as `divergence`. The trainer computes the same from a packed pass.
    """
    first = first_wrong(states[j], states[-1])
    if first is None:
        return torch.zeros(0)
    return _pair(model, prefix, states[-1], states[j], first, **kind)


def local_consistency_loss(
    model: Any, prefix: torch.Tensor, states: list[list[int]], j: int, **kind: Any
) -> torch.Tensor:
    """(kept tokens,) terms of L_LC for one block in two passes: state j of `states` against state j + 1."""
    first = first_wrong(states[j], states[j + 1])
    if first is None:
        return torch.zeros(0)
    return _pair(model, prefix, states[j + 1], states[j], first, **kind)


@dataclass
class ConsistencyTerms:
    """Sums over a batch and their counts; a mean over several batches is the sum of sums over the sum of counts."""

    consistency: torch.Tensor
    pairs: int
    autoregressive: torch.Tensor
    labels: int

    def total(self, ar_weight: float) -> torch.Tensor:
        """The loss of this batch alone."""
        return self.consistency / max(self.pairs, 1) + ar_weight * self.autoregressive / max(self.labels, 1)


def forward(model: Any, batch: dict[str, torch.Tensor], *, packed: bool) -> torch.Tensor:
    """(rows, tokens, vocabulary) logits of a collated batch."""
    segments = batch["segments"]
    if packed:
        dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
        mask = packed_mask(segments, batch["horizons"], dtype)
    else:
        mask = (segments >= 0).long()
    # Without a cache; a model in training would build one.
    return model(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"], use_cache=False
    ).logits


def consistency_terms(
    logits: torch.Tensor,
    batch: dict[str, torch.Tensor],
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    teacher_logits: torch.Tensor | None = None,
) -> ConsistencyTerms:
    """The losses of one batch from the logits of one pass.

    logits: (rows, tokens, vocabulary). batch: what the collator gave. teacher_logits: of a frozen teacher, same shape; the
    model's own, without gradient, when not given.
    """
    # Losses in the precision of the optimizer, as transformers does.
    flat = logits.flatten(0, 1)
    flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    taught = flat if teacher_logits is None else teacher_logits.flatten(0, 1).to(flat.dtype)
    gaps = divergence(taught[batch["teacher"]], flat[batch["student"]], kind=kind, beta=beta)
    labels = batch["shift_labels"].flatten()
    kept = labels != IGNORE
    # Only the rows with a label: the vocabulary is the widest dimension.
    entropy = F.cross_entropy(flat[kept], labels[kept], reduction="sum", label_smoothing=label_smoothing)
    return ConsistencyTerms(gaps.sum(), len(gaps), entropy, int(kept.sum()))
