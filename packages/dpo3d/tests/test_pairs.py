from typing import Any

import pytest
from datasets import Dataset
from dpo3d import testbed
from dpo3d.pairs import build_pairs, iterate
from dpo3d.scoring import Row, sample, score
from tenfold_shared.errors import UserError


def test_memory_is_bounded_by_the_budget(sorter: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 5 tokens and 7 new ones: a budget of 40 takes three sequences at once, one of 5 a single one."""
    prompts = [tokenizer(p)["input_ids"] for p in testbed.held_out(0, 7)]
    generate, seen = sorter.generate, []
    monkeypatch.setattr(sorter, "generate", lambda **given: seen.append(len(given["input_ids"])) or generate(**given))
    assert [len(group) for group in sample(sorter, prompts, tokenizer, max_new_tokens=7, budget=40)] == [1] * 7
    sample(sorter, prompts[:2], tokenizer, max_new_tokens=7, budget=5)
    assert seen == [3, 3, 1, 1, 1]


def length(prompt: Any, answer: str) -> float:
    return float(len(answer))


def test_best_against_worst_with_exact_provenance(sorter: Any, tokenizer: Any) -> None:
    prompts = testbed.held_out(0, 12)
    pairs = build_pairs(sorter, tokenizer, prompts, testbed.is_right, n=8, max_new_tokens=9)
    assert 6 <= len(pairs) <= 12
    for row in pairs:
        assert testbed.is_right(row["prompt"], row["chosen"]) == row["score_chosen"] == 1
        assert testbed.is_right(row["prompt"], row["rejected"]) == row["score_rejected"] == 0
        answer = tokenizer(row["chosen"] + testbed.EOS)["input_ids"]
        (scored,) = score(sorter, [Row(tokenizer(row["prompt"])["input_ids"], answer)], 0)
        # An answer cut at max_new_tokens has no end token, and is more likely by as much.
        assert row["logp_chosen"] == pytest.approx(scored.total, abs=1e-4) or row["logp_chosen"] > scored.total
    again = build_pairs(sorter, tokenizer, prompts, testbed.is_right, n=8, max_new_tokens=9)
    assert again.to_list() == pairs.to_list()


def test_random_selection_and_ties(sorter: Any, tokenizer: Any) -> None:
    prompts = testbed.held_out(0, 6)
    pairs = build_pairs(sorter, tokenizer, prompts, testbed.is_right, select="random", max_new_tokens=9)
    assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)
    tied = build_pairs(sorter, tokenizer, prompts, lambda *_: 1.0, drop_ties=False, max_new_tokens=9)
    assert len(tied) == 6 and set(tied["score_chosen"]) == {1.0}


def test_conversational_prompts_give_conversational_pairs(sorter: Any, talker: Any, conversation: Dataset) -> None:
    pairs = build_pairs(sorter, talker, conversation["prompt"][:3], lambda p, a: hash(a) % 97, max_new_tokens=4)
    assert pairs[0]["chosen"][0]["role"] == "assistant" and pairs[0]["prompt"][0]["role"] == "user"


def test_rounds(sorter: Any, tokenizer: Any) -> None:
    seen: list[int] = []

    def train(model: Any, pairs: Dataset, number: int) -> Any:
        seen.append(number)
        return model

    rounds = list(
        iterate(sorter, tokenizer, testbed.held_out(0, 4), testbed.is_right, train, rounds=2, max_new_tokens=9)
    )
    assert seen == [0, 1] and rounds[0][1].to_list() != rounds[1][1].to_list()


def test_errors(sorter: Any, tokenizer: Any) -> None:
    prompts = testbed.held_out(0, 3)
    with pytest.raises(UserError, match="no prompts"):
        build_pairs(sorter, tokenizer, [], length)
    with pytest.raises(UserError, match="n is 1"):
        build_pairs(sorter, tokenizer, prompts, length, n=1)
    with pytest.raises(UserError, match="select is 'first'"):
        build_pairs(sorter, tokenizer, prompts, length, select="first")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the scorer gave nan"):
        build_pairs(sorter, tokenizer, prompts, lambda *_: float("nan"), max_new_tokens=2)
    with pytest.raises(UserError, match="no pair survives: 3 prompts with all-good and 0 with all-bad"):
        build_pairs(sorter, tokenizer, prompts, lambda *_: 1.0, max_new_tokens=2)
    with pytest.raises(UserError, match="no pair survives: 0 prompts with all-good and 3 with all-bad"):
        build_pairs(sorter, tokenizer, prompts, lambda *_: 0.0, max_new_tokens=2)
