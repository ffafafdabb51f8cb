from typing import Any

import pytest
from cllm_jacobi import augment_trajectories, clean_trajectories
from cllm_jacobi.cleaning import augment_state, longest_run
from cllm_jacobi.trajectory import FEATURES
from datasets import Dataset
from tenfold_shared.errors import UserError


class Text:
    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join("\n" if i == 10 else chr(96 + i % 26) for i in ids)


def row(
    answer: list[int], *, prompt: int = 5, truncated: bool = False, states: list[list[int]] | None = None
) -> dict[str, Any]:
    return {
        "prompt_ids": [prompt], "answer_ids": answer, "trajectories": [[*(states or []), answer]] if answer else [], "labels": [],
        "n": max(len(answer), 1), "model": "", "seed": 0, "source_row": 0, "truncated": truncated, "disagreements": 0,
    }  # fmt: skip


GOOD = [3, 4, 5, 6, 1]
LINE = [*range(11, 20), 10]


def test_every_rule_and_its_example():
    data = [
        row(GOOD, states=[[7, 7, 7, 7, 7], [3, 7, 7, 7, 7], [7, 7, 7, 7, 7]]),
        row([]),
        row([3, 4, 5], truncated=True),
        row([8, *[7] * 10, 1]),
        row([3, 4, 5, 6] * 8),
        row([*LINE, 12, *LINE, 13, *LINE, 14, *LINE, 15, *LINE]),
        row(GOOD),
        row(GOOD, prompt=6),
    ]
    data[5]["answer_ids"] = [t for k in range(4) for t in (*LINE, 30 + k, 40 + 2 * k, 50 + 3 * k, 21 + k, 10)]
    data[5]["trajectories"] = [[data[5]["answer_ids"]]]
    clean, report = clean_trajectories(Dataset.from_list(data, features=FEATURES), Text())
    assert [r["prompt_ids"][0] for r in clean] == [5, 6]
    assert report.removed == {
        "empty": 1, "truncated": 1, "token repetition": 1, "phrase repetition": 1, "line repetition": 1, "duplicate": 1,
    }  # fmt: skip
    assert report.kept == 2 and report.states_removed == 1
    assert clean[0]["trajectories"] == [[[7, 7, 7, 7, 7], [3, 7, 7, 7, 7], GOOD]]
    table = report.table()
    assert "2 of 8 rows kept" in table.title and any("cdef" in str(cells) for cells in table.rows)


def test_rules_leave_borderline_rows():
    data = Dataset.from_list(
        [row([8, *[7] * 9, 1]), row([3, 4] * 5, prompt=8), row([3, 4], truncated=True)], features=FEATURES
    )
    clean, _ = clean_trajectories(data, keep_truncated=True)
    assert len(clean) == 3


def test_nothing_left_is_an_error_with_the_counts():
    with pytest.raises(UserError, match="removed all 2 rows \\(empty 1, truncated 1\\)"):
        clean_trajectories(Dataset.from_list([row([]), row([3], truncated=True)], features=FEATURES))


def test_augmentation_puts_right_tokens_behind_the_first_wrong_one():
    import random

    target, state = list(range(10)), [0, 1, 50, 51, 52, 53, 54, 55, 56, 57]
    seen = set()
    for seed in range(50):
        out = augment_state(state, target, random.Random(seed))
        changed = [i for i in range(10) if out[i] != state[i]]
        assert out[2] == 50 and 1 <= len(changed) <= 3 and all(out[i] == target[i] for i in changed)
        seen.update(changed)
    assert seen == set(range(3, 10))
    assert augment_state(target, target, random.Random(0)) == target


def test_the_last_two_states_are_left_alone():
    states = [[50, 51, 52, 53, 54], [51, 52, 53, 54, 55], [3, 4, 9, 9, 9]]
    data = Dataset.from_list([row(GOOD, states=states)], features=FEATURES)
    (after,) = augment_trajectories(data)[0]["trajectories"]
    assert after[2:] == [states[2], GOOD] and after[:2] != states[:2]
    assert augment_trajectories(data).to_list() == augment_trajectories(data).to_list()


def test_longest_run():
    assert longest_run([]) == 0 and longest_run([1, 2, 2, 2, 1]) == 3
