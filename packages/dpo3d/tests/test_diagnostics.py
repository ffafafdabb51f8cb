from typing import Any

import pytest
import torch
from datasets import Dataset
from dpo3d import testbed
from dpo3d.diagnostics import audit_pairs, ches_scores, edit_distance
from dpo3d.scoring import Row, score, tokenize_pair
from dpo3d.trl import FlexDPOConfig, FlexDPOTrainer
from tenfold_shared.errors import UserError


@pytest.fixture(scope="module")
def scenarios() -> Dataset:
    """Rows of all four scenarios, in turn: plain styles are on-policy, rare ones off."""
    rows = []
    for i, prompt in enumerate(testbed.held_out(0, 32)):
        up, down, rare_up, rare_down = testbed.known_answers(prompt)
        rows.append({"prompt": prompt, "chosen": (up, rare_up)[i % 2], "rejected": (down, rare_down)[i // 2 % 2]})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def report(sorter: Any, tokenizer: Any, scenarios: Dataset) -> Any:
    return audit_pairs(sorter, tokenizer, scenarios, max_new_tokens=9, band=True)


def test_scenarios_are_recognised(report: Any) -> None:
    expected = [("S1", "S2", "S3", "S4")[i % 4] for i in range(32)]
    right = sum(row["scenario"] == e for row, e in zip(report.rows, expected, strict=True))
    # The briefly supervised model is less sure of its styles than the benchmark's.
    assert right >= 22
    assert sum(report.summary["shares"].values()) == pytest.approx(1)


def test_ches_by_hand_and_invariant_to_padding(sorter: Any, tokenizer: Any, scenarios: Dataset) -> None:
    rows = [row for example in scenarios for row in tokenize_pair(example, tokenizer)]
    padded, single = score(sorter, rows, 0, budget=10**6, hidden=True), score(sorter, rows, 0, budget=1, hidden=True)
    for i in range(0, len(rows), 2):
        sums = []
        for row in rows[i : i + 2]:
            ids = torch.tensor([row.prompt + row.completion])
            states = sorter(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            # The states that predict the response: last prompt token to last but one response token.
            sums.append(states[len(row.prompt) - 1 : -1].sum(0))
        plus, minus = sums
        t = len(rows[i].completion), len(rows[i + 1].completion)
        for scored in (padded, single):
            found = ches_scores(scored[i], scored[i + 1])
            assert found["ches"] == pytest.approx(float(plus @ minus - plus @ plus), rel=1e-3, abs=1e-2)
            normalized = float(plus @ minus) / (t[0] * t[1]) - float(plus @ plus) / t[0] ** 2
            assert found["ches_normalized"] == pytest.approx(normalized, rel=1e-3, abs=1e-3)


def test_identical_halves_have_the_highest_ches(sorter: Any) -> None:
    row = Row([3, 4], [5, 6])
    a, b = score(sorter, [row, row], 0, hidden=True)
    assert ches_scores(a, b)["ches"] == pytest.approx(0, abs=1e-3)


def test_shape_figures(report: Any) -> None:
    assert all(0 <= row["edit_distance"] <= 1 for row in report.rows)
    assert report.rows[0]["length_ratio"] == 1.0 and report.rows[1]["length_ratio"] == 8 / 5
    assert edit_distance([1, 2, 3], [2, 3]) == 1 and edit_distance([], [1, 2]) == 2 and edit_distance([1], [1]) == 0
    assert all(row["band"]["low"] < row["band"]["high"] for row in report.rows)


def test_flags(sorter: Any, tokenizer: Any) -> None:
    rows = [
        ("3172=", "1237", "7321"),
        ("3172=", "1237", "7321"),
        ("3172=", "7321", "1237"),
        ("4410=", "0144", "0144"),
        ("4410=", "", "0144"),
        ("9981=", "1899", "9" * 30),
    ]
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])
    found = audit_pairs(sorter, tokenizer, data, max_length=20, max_new_tokens=9)
    flags = [row["flags"] for row in found.rows]
    assert flags == [
        ["conflict"],
        ["duplicate", "conflict"],
        ["conflict"],
        ["identical"],
        ["empty chosen"],
        ["truncated"],
    ]
    assert found.rows[4]["scenario"] is None
    assert found.summary["flags"] == {"conflict": 3, "duplicate": 1, "identical": 1, "empty chosen": 1, "truncated": 1}
    with pytest.raises(UserError, match="no pair passes"):
        found.filter()


def test_filter_gives_a_dataset_that_trains(report: Any, make_trainer: Any) -> None:
    kept = report.filter(max_ches_quantile=0.75, scenarios={"S1", "S2"})
    assert isinstance(kept, Dataset) and 4 <= len(kept) < 16
    assert kept.column_names == ["prompt", "chosen", "rejected"]
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, extra={"train_dataset": kept}, max_steps=1)
    trainer.train()


def test_advice_follows_the_data(sorter: Any, tokenizer: Any, scenarios: Dataset) -> None:
    off = audit_pairs(sorter, tokenizer, scenarios.select(range(1, 32, 2)), ches=False, max_new_tokens=9)
    assert off.summary["sft_gamma"] == 1.0 and "off-policy" in off.summary["advice"]
    with pytest.raises(UserError, match="no CHES"):
        off.filter(max_ches_quantile=0.5)


def test_conversational(sorter: Any, talker: Any, conversation: Dataset) -> None:
    assert len(audit_pairs(sorter, talker, conversation, max_new_tokens=4).rows) == len(conversation)


def test_errors(report: Any, sorter: Any, tokenizer: Any, digits: Dataset) -> None:
    with pytest.raises(UserError, match="no rows"):
        audit_pairs(sorter, tokenizer, digits.select([]))
    with pytest.raises(UserError, match="ref_samples is 0"):
        audit_pairs(sorter, tokenizer, digits, ref_samples=0)
    empty = Dataset.from_list([{"prompt": "1=", "chosen": "", "rejected": "1"}])
    with pytest.raises(UserError, match="every pair has an empty half"):
        audit_pairs(sorter, tokenizer, empty)
    with pytest.raises(UserError, match="no scenario 'S5'"):
        report.filter(scenarios={"S5"})
    with pytest.raises(UserError, match="max_ches_quantile is 2"):
        report.filter(max_ches_quantile=2)
    bare = score(sorter, [Row([3], [4])], 0)[0]
    with pytest.raises(UserError, match="without hidden states"):
        ches_scores(bare, bare)


def test_edit_distance_is_the_recursion() -> None:
    def slow(a: list[int], b: list[int]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        a, b = (
            torch.randint(0, 3, (int(torch.randint(0, 6, (1,), generator=generator)),), generator=generator).tolist()
            for _ in range(2)
        )
        assert edit_distance(a, b) == slow(a, b), (a, b)
