"""One sequence that holds the clean answer and a noisy state of every block, so that one pass gives every loss.

    tokens      [ x ; answer ; noisy_0 ; noisy_1 ; ... ]
    positions   0..P-1, P..P+A-1, then P + b n + (0..n-1) for noisy_b, as in the clean block
    visibility  x and answer: causal; noisy_b: x, the answer before block b, itself causally; nothing sees noisy_b

The clean part gives the teacher and the autoregressive loss, noisy_b the student. That is P + 2A tokens for an answer of A;
a pair of passes for each block takes the sum of 2 (P + b n + n). Models whose attention does not follow such a mask
(sliding windows, linear attention, learned biases by distance) get rows of their own instead, with the same indices.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tenfold_shared.errors import UserError

from cllm_jacobi.cleaning import augment_state
from cllm_jacobi.trajectory import deduplicate_states, first_wrong

LOSSES = ("global", "local")
STATES = ("trajectory", "random")
IGNORE = -100


def can_pack(config: Any) -> bool:
    """Whether a model of this config follows a packed mask: rotary positions and full attention in every layer."""
    config = config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return bool(rotary) and kinds == {"full_attention"} and window is None and not flash


def packed_mask(segments: torch.Tensor, horizons: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, 1, tokens, tokens) additive mask of zeros and the most negative number.

    segments: (rows, tokens) -1 padding, 0 clean, b + 1 and up noisy. horizons: (rows, tokens) how many clean tokens a noisy
    one sees. The clean tokens come first in every row.
    """
    at = torch.arange(segments.shape[1], device=segments.device)
    causal = at[:, None] >= at[None, :]
    same = segments[:, :, None] == segments[:, None, :]
    clean = (segments[:, None, :] == 0) & (segments[:, :, None] > 0) & (at[None, None, :] < horizons[:, :, None])
    # Padding sees padding, itself at least: softmax over nothing would be NaN.
    visible = (same & causal) | clean
    return torch.zeros(visible.shape, dtype=dtype, device=segments.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )[:, None]


@dataclass
class DataCollatorForConsistency:
    """Rows of a trajectory dataset to the tensors of one step.

    pad_token_id: fills rows; masks come from lengths, so it may be the EOS id. loss: "global" compares with the fixed point,
    "local" with the next state. packed: one row an answer, or rows of their own for every block. augment: put right tokens
    behind wrong ones. states: "trajectory" draws a state of the trajectory, "random" corrupts the answer from a random
    place on. use_labels: the autoregressive loss is over `labels`, the true answer. mask_prompt: no autoregressive loss on
    the prompt. max_length: answers are cut behind the last block that fits.

    A draw depends on the seed, the epoch and the row's own ids: not on its batch, its process or what was drawn before.

    Gives `input_ids`, `position_ids`, `segments`, `horizons` (rows, tokens), `shift_labels` (rows, tokens; -100 for none), and
    `student`, `teacher` (pairs,) indices into the flattened (rows x tokens) logits.
    """

    pad_token_id: int = 0
    loss: str = "global"
    packed: bool = True
    augment: bool = False
    states: str = "trajectory"
    use_labels: bool = False
    mask_prompt: bool = True
    max_length: int | None = None
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss is '{self.loss}', expected {' or '.join(LOSSES)}")
        if self.states not in STATES:
            raise UserError(f"states is '{self.states}', expected {' or '.join(STATES)}")
        if self.loss == "local" and (self.augment or self.states == "random"):
            raise UserError(
                "the local loss follows a trajectory step by step", hint="leave augmentation and random states out"
            )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        built: list[_Sequence] = []
        pairs: list[tuple[int, int, int, int]] = []  # sequence and index of the student, then of the teacher
        for row in rows:
            self._add(row, built, pairs)
        width = max(len(s.ids) for s in built)

        def padded(values: Sequence[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([v + [fill] * (width - len(v)) for v in values])

        return {
            "input_ids": padded([s.ids for s in built], self.pad_token_id),
            "position_ids": padded([s.positions for s in built], 0),
            "segments": padded([s.segments for s in built], -1),
            "horizons": padded([s.horizons for s in built], 0),
            "shift_labels": padded([s.labels for s in built], IGNORE),
            "student": torch.tensor([s * width + i for s, i, _, _ in pairs], dtype=torch.long),
            "teacher": torch.tensor([t * width + i for _, _, t, i in pairs], dtype=torch.long),
        }

    def _add(self, row: dict[str, Any], built: list["_Sequence"], pairs: list[tuple[int, int, int, int]]) -> None:
        prompt, n = list(row["prompt_ids"]), int(row["n"])
        answer = [t for states in row["trajectories"] for t in states[-1]]
        if self.max_length is not None:
            answer = answer[: max(self.max_length - len(prompt), 0) // n * n]
        rng = random.Random(f"{self.seed}-{self.epoch}-{zlib.crc32(repr((prompt, answer)).encode())}")
        clean = _Sequence(prompt + answer)
        home = len(built)
        built.append(clean)
        truth = answer
        if self.use_labels:
            truth = list(row["labels"])[: None if self.max_length is None else max(self.max_length - len(prompt), 0)]
        if self.use_labels and truth != answer:
            clean_labels = _Sequence(prompt + truth)
            clean_labels.learn(0 if not self.mask_prompt else len(prompt) - 1)
            built.append(clean_labels)
        else:
            clean.learn(0 if not self.mask_prompt else len(prompt) - 1)
        for b, states in enumerate(row["trajectories"]):
            start = b * n
            if start >= len(answer):
                break
            for segment in self._noisy(states, rng, prompt):
                student, teacher, first = segment
                base = len(prompt) + start
                where = self._place(student, clean, home, built, base, prompt + answer[:start])
                if teacher is None:
                    origin = (home, base)
                else:
                    origin = self._place(teacher, clean, home, built, base, prompt + answer[:start])
                # The logits behind token i speak of token i + 1; behind the block's last they speak of the next block.
                pairs += [(where[0], where[1] + i, origin[0], origin[1] + i) for i in range(first, len(student) - 1)]

    def _noisy(
        self, states: list[list[int]], rng: random.Random, prompt: list[int]
    ) -> list[tuple[list[int], list[int] | None, int]]:
        """At most one noisy state of a block, with the state that teaches it (None for y*) and its first wrong index."""
        states = deduplicate_states(states)
        target = states[-1]
        if self.states == "random":
            cut = rng.randrange(len(target))
            noisy = target[:cut] + [rng.choice(prompt) for _ in target[cut:]]
            j = 0
        elif len(states) < 2:
            return []
        else:
            j = rng.randrange(len(states) - 1)
            # The last state before y* stays as it is, as published.
            noisy = augment_state(states[j], target, rng) if self.augment and j < len(states) - 2 else states[j]
        teacher = states[j + 1] if self.loss == "local" else target
        first = first_wrong(noisy, teacher)
        if first is None:
            return []
        return [(noisy, None if teacher == target else teacher, first)]

    def _place(
        self, state: list[int], clean: "_Sequence", home: int, built: list["_Sequence"], base: int, prefix: list[int]
    ) -> tuple[int, int]:
        """Put a noisy block where the mask lets it be; gives its sequence and the index of its first token."""
        if self.packed:
            at = len(clean.ids)
            clean.append(state, base)
            return home, at
        built.append(_Sequence(prefix + state))
        return len(built) - 1, base


class _Sequence:
    """One row in the making."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = list(ids)
        self.positions = list(range(len(ids)))
        self.segments = [0] * len(ids)
        self.horizons = [0] * len(ids)
        self.labels = [IGNORE] * len(ids)

    def learn(self, start: int) -> None:
        """Autoregressive labels from index `start` on, shifted: the label at t is the token behind t."""
        length = self.segments.count(0)
        for t in range(max(start, 0), length - 1):
            self.labels[t] = self.ids[t + 1]

    def append(self, state: list[int], base: int) -> None:
        """A noisy block at position `base`, which sees the first `base` clean tokens."""
        segment = max(self.segments) + 1
        self.ids += state
        self.positions += range(base, base + len(state))
        self.segments += [segment] * len(state)
        self.horizons += [base] * len(state)
        self.labels += [IGNORE] * len(state)
