"""Cleaning: what is removed from trajectories before training, why, and how much (2403.00835, section 3.2.1).

A model that learns to jump ahead learns repetition first, so answers that repeat themselves are removed. Augmentation puts
right tokens behind a wrong one, a pattern that a target's own trajectories rarely show.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from tenfold_shared.cli import Table
from tenfold_shared.errors import UserError

from cllm_jacobi.metrics import repetition
from cllm_jacobi.trajectory import deduplicate_states, first_wrong

RULES = {
    "empty": "no answer",
    "truncated": "cut by the token budget",
    "token repetition": "a run of equal tokens",
    "phrase repetition": "most n-grams occurred before",
    "line repetition": "one line several times",
    "duplicate": "the same prompt and answer as an earlier row",
}


@dataclass
class CleaningReport:
    """What cleaning did."""

    rows: int
    kept: int
    removed: dict[str, int]
    """Rule to the number of rows that it removed; a row counts for the first rule that it breaks."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Rule to the beginnings of up to three answers."""
    states_removed: int = 0
    """Repeated states within blocks."""

    def table(self) -> Table:
        """Rules, counts and examples."""
        rows = [[rule, RULES[rule], n, " | ".join(self.examples.get(rule, []))] for rule, n in self.removed.items()]
        title = f"{self.kept} of {self.rows} rows kept, {self.states_removed} repeated states removed"
        return Table(title, ["rule", "what", "rows removed", "examples"], rows)


def clean_trajectories(
    dataset: Dataset,
    tokenizer: Any = None,
    *,
    max_run: int = 10,
    max_repetition: float = 0.5,
    ngram: int = 4,
    min_tokens: int = 24,
    max_lines: int = 3,
    keep_truncated: bool = False,
) -> tuple[Dataset, CleaningReport]:
    """Remove rows that would teach repetition, duplicates, and repeated states; returns the rest and the report.

    tokenizer: shows examples and finds lines; without one the line rule does not apply. max_run: longest allowed run of one token, less
    one. max_repetition: largest share of n-grams (of `ngram` tokens) that occurred before, for answers of at least
    `min_tokens`. max_lines: how often one line may occur.

    Raises UserError when nothing is left; its text holds the counts.
    """
    removed = dict.fromkeys(RULES, 0)
    examples: dict[str, list[str]] = {rule: [] for rule in RULES}
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    kept, states_removed = [], 0
    for row in dataset:
        text = tokenizer.decode(row["answer_ids"], skip_special_tokens=True) if tokenizer is not None else None
        key = (tuple(row["prompt_ids"]), tuple(row["answer_ids"]))
        rule = _broken(row, text, max_run, max_repetition, ngram, min_tokens, max_lines, keep_truncated)
        rule = rule or ("duplicate" if key in seen else None)
        if rule:
            removed[rule] += 1
            if len(examples[rule]) < 3:
                examples[rule].append((text if text is not None else str(row["answer_ids"]))[:60])
            continue
        seen.add(key)
        blocks = [deduplicate_states(states) for states in row["trajectories"]]
        states_removed += sum(map(len, row["trajectories"])) - sum(map(len, blocks))
        kept.append({**row, "trajectories": blocks})
    report = CleaningReport(len(dataset), len(kept), removed, examples, states_removed)
    if not kept:
        counts = ", ".join(f"{rule} {n}" for rule, n in removed.items() if n)
        raise UserError(f"cleaning removed all {len(dataset)} rows ({counts})", hint="collect with a larger budget, or look at the target's answers")  # fmt: skip
    return Dataset.from_list(kept, features=dataset.features), report


def _broken(
    row: dict[str, Any],
    text: str | None,
    max_run: int,
    most: float,
    ngram: int,
    least: int,
    lines: int,
    keep_truncated: bool,
) -> str | None:
    answer = row["answer_ids"]
    if not answer or (text is not None and not text.strip()):
        return "empty"
    if longest_run(answer) >= max_run:
        return "token repetition"
    if len(answer) >= least and repetition(answer, n=ngram) > most:
        return "phrase repetition"
    if text is not None:
        counts = Counter(line.strip() for line in text.splitlines() if len(line.strip()) >= 8)
        if counts and max(counts.values()) > lines:
            return "line repetition"
    if row["truncated"] and not keep_truncated:
        return "truncated"
    return None


def longest_run(tokens: Sequence[int]) -> int:
    """Length of the longest run of one token."""
    best = run = 0
    last: int | None = None
    for token in tokens:
        run = run + 1 if token == last else 1
        best, last = max(best, run), token
    return best


def augment_state(state: Sequence[int], target: Sequence[int], rng: random.Random) -> list[int]:
    """Put right tokens at random wrong positions, never at the first wrong one (2403.00835, section 3.2.1).

    Half as many draws, with replacement, as there are wrong positions.
    """
    start = first_wrong(state, target)
    wrong = [i for i, (a, b) in enumerate(zip(state, target, strict=True)) if a != b and i != start]
    out = list(state)
    for _ in range(len(wrong) // 2):
        i = rng.choice(wrong)
        out[i] = target[i]
    return out


def augment_trajectories(dataset: Dataset, *, seed: int = 0) -> Dataset:
    """Augment every state except the last two of each block."""

    def augmented(row: dict[str, Any], i: int) -> dict[str, Any]:
        rng = random.Random(f"augment-{seed}-{i}")
        blocks = [
            [augment_state(s, states[-1], rng) for s in states[:-2]] + [list(s) for s in states[-2:]]
            for states in row["trajectories"]
        ]
        return {"trajectories": blocks}

    rows = [{**row, **augmented(row, i)} for i, row in enumerate(dataset)]
    return Dataset.from_list(rows, features=dataset.features)
