"""Held-out answers whose likelihood is watched: the pair's two halves, and answers that are in no pair.

The lost mass goes to unseen answers (2406.07327, property 3: dispersion), so they are probed in three kinds: samples of
the policy at step 0, the chosen answers of other prompts (where the toy's mass goes), and the chosen answer with one
token changed.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold_shared.errors import UserError

from dpo3d.scoring import Row, tokenize_pair

PAIR = ("chosen", "rejected")
UNSEEN = ("ref_samples", "shuffled_chosen", "perturbed")


@dataclass
class ProbeSet:
    """Prompts with answers of several kinds, in token ids.

    answers: kind to one list of completions per prompt; `chosen` and `rejected` have one each. `known`, where given,
    enumerates every answer the task knows, so that the mass outside it is exact.
    """

    tokenizer: Any
    prompts: list[list[int]]
    answers: dict[str, list[list[list[int]]]]
    k: int = 4
    """Samples of the step-0 policy per prompt."""
    seed: int = 0
    wanted: tuple[str, ...] = field(default=UNSEEN)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        tokenizer: Any,
        *,
        n: int = 64,
        unseen: Sequence[str] = UNSEEN,
        k: int = 4,
        columns: Sequence[str] = (),
        enumerator: Callable[[Any], Iterable[str]] | None = None,
        seed: int = 0,
    ) -> "ProbeSet":
        """Draw `n` pairs and make their unseen answers.

        dataset: preference data in any of TRL's formats; better not the training pairs. unseen: kinds to make. columns:
        text columns with unseen answers of your own. enumerator: prompt to every answer the task knows.

        Raises UserError for no rows, n or k under 1, an unknown kind, a missing column, an enumerator without a column
        `prompt`, or fewer than two different chosen answers when `shuffled_chosen` is wanted.
        """
        if n < 1 or k < 1:
            raise UserError(f"n is {n} and k is {k}, expected 1 or more")
        if unknown := sorted(set(unseen) - set(UNSEEN)):
            raise UserError(f"no unseen kind '{unknown[0]}'", hint=f"there are {', '.join(UNSEEN)}; or pass columns")
        if len(dataset) == 0:
            raise UserError("the probe's dataset has no rows")
        if missing := sorted(set(columns) - set(dataset.column_names)):
            raise UserError(f"the probe's dataset has no column {', '.join(missing)}")
        rng = random.Random(seed)
        examples = [dataset[i] for i in sorted(rng.sample(range(len(dataset)), min(n, len(dataset))))]
        pairs = [tokenize_pair(example, tokenizer) for example in examples]
        answers = {
            "chosen": [[chosen.completion] for chosen, _ in pairs],
            "rejected": [[rejected.completion] for _, rejected in pairs],
        }
        if "shuffled_chosen" in unseen:
            answers["shuffled_chosen"] = _shuffled(answers, rng)
        if "perturbed" in unseen:
            answers["perturbed"] = _perturbed(answers, tokenizer, rng)
        for column in columns:
            answers[column] = [[_end(tokenizer, text) for text in _texts(e[column])] for e in examples]
        if enumerator:
            if "prompt" not in dataset.column_names:
                raise UserError("the enumerator needs a column prompt", hint="split the prompt off the answers first")
            answers["known"] = [[_end(tokenizer, text) for text in enumerator(e["prompt"])] for e in examples]
        return cls(tokenizer, [chosen.prompt for chosen, _ in pairs], answers, k, seed, tuple(unseen))

    @property
    def unseen(self) -> list[str]:
        """Kinds that are in no pair and enumerate nothing."""
        return [kind for kind in self.answers if kind not in (*PAIR, "known")]

    @property
    def longest(self) -> int:
        """Tokens of the longest answer of a pair."""
        return max(len(answer) for kind in PAIR for group in self.answers[kind] for answer in group)

    def rows(self) -> tuple[list[Row], list[tuple[str, int]]]:
        """Every answer as a row, and beside it its kind and its prompt's index."""
        rows, where = [], []
        for kind, groups in self.answers.items():
            for i, group in enumerate(groups):
                for answer in group:
                    rows.append(Row(self.prompts[i], answer))
                    where.append((kind, i))
        return rows, where

    def add_reference_samples(self, drawn: list[list[list[int]]]) -> None:
        """Take up samples of the step-0 policy, a list per prompt; those equal to a half of the pair are left out."""
        halves = [[self.answers[kind][i][0] for kind in PAIR] for i in range(len(self.prompts))]
        self.answers["ref_samples"] = [
            [answer for answer in group if answer not in pair] for group, pair in zip(drawn, halves, strict=True)
        ]


def _shuffled(answers: dict[str, list[list[list[int]]]], rng: random.Random) -> list[list[list[int]]]:
    """For each prompt the chosen answer of another, different from its own two."""
    pool = [group[0] for group in answers["chosen"]]
    shuffled = []
    for i, own in enumerate(pool):
        others = [answer for answer in pool if answer not in (own, answers["rejected"][i][0])]
        if not others:
            raise UserError(
                "shuffled_chosen needs two different chosen answers", hint="more rows, or unseen=('ref_samples',)"
            )
        shuffled.append([rng.choice(others)])
    return shuffled


def _perturbed(answers: dict[str, list[list[list[int]]]], tokenizer: Any, rng: random.Random) -> list[list[list[int]]]:
    """The chosen answer with one token, not the end, replaced by another of the probe's own tokens."""
    special = set(tokenizer.all_special_ids)
    used = sorted({t for kind in PAIR for group in answers[kind] for t in group[0]} - special)
    perturbed = []
    for i, (chosen,) in enumerate(answers["chosen"]):
        places = [j for j, token in enumerate(chosen) if token not in special]
        options = [(j, t) for j in places for t in used if t != chosen[j]]
        rng.shuffle(options)
        made = ([*chosen[:j], t, *chosen[j + 1 :]] for j, t in options)
        perturbed.append([next((m for m in made if m != answers["rejected"][i][0]), chosen)])
    return perturbed


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _end(tokenizer: Any, text: str) -> list[int]:
    ended = text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
    return tokenizer(ended, add_special_tokens=False)["input_ids"]
