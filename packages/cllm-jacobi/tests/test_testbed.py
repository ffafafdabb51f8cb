"""The world is what it says: disjoint splits, a judge that judges, recipes that run."""

import random
from pathlib import Path

import pytest
import torch
from cllm_jacobi import testbed
from tenfold_shared.errors import UserError


def test_splits_are_disjoint_by_construction():
    train = {q for seed in range(3) for q, _ in testbed.questions(400, seed=seed)}
    test = {q for q, _ in testbed.questions(400, split="test", seed=0)}
    assert not train & test
    assert all(testbed.in_test_split(q) for q in test) and not any(map(testbed.in_test_split, train))
    with pytest.raises(UserError, match="split is 'dev'"):
        testbed.questions(1, split="dev")


def test_questions_are_the_seeds():
    assert testbed.questions(20, seed=4) == testbed.questions(20, seed=4) != testbed.questions(20, seed=5)


def test_every_reference_runs_and_fits():
    judge, words = testbed.Database(), set(testbed.vocabulary())
    for question, query in testbed.questions(300):
        assert judge.run(query) is not None
        assert set(question.split()) | set(query.split()) <= words
        assert len(query.split()) + 1 <= testbed.MAX_NEW_TOKENS


def test_every_test_question_finds_something():
    judge = testbed.Database()
    for _, query in testbed.questions(300, split="test", seed=3):
        assert judge.finds(query)
    count = "SELECT COUNT ( * ) FROM staff WHERE age "
    assert judge.finds(count + "> 40") and not judge.finds(count + "> 99")
    assert not judge.finds("SELECT MAX ( age ) FROM staff WHERE age > 99") and not judge.finds("SELECT")


def test_the_judge_goes_by_rows():
    judge = testbed.Database()
    query = "SELECT COUNT ( * ) FROM staff WHERE age > 40 AND city = oslo"
    assert judge.same("SELECT COUNT ( * ) FROM staff WHERE city = oslo AND age > 40", query)
    assert not judge.same("SELECT COUNT ( * ) FROM staff WHERE age > 41", query)
    assert not judge.same("SELECT COUNT (", query) and not judge.same("", query)
    # Where the reference finds nothing, only a query that finds nothing either is right.
    nothing = "SELECT city , age FROM staff WHERE age > 99"
    assert judge.run(nothing) == [] and not judge.same(nothing, query)
    assert judge.same(nothing.replace("99", "98 AND age > 99"), nothing)
    for no_query in (
        "",
        " ",
        ";",
        "BEGIN",
        "COMMIT",
        "PRAGMA query_only = OFF",
        "SELECT city , age FROM staff WHERE >",
    ):
        assert not judge.same(no_query, nothing), no_query
    listed = "SELECT city FROM staff WHERE age > 90 ORDER BY salary DESC LIMIT 5"
    assert not judge.same(listed.replace("DESC", "ASC"), listed)
    # What a model writes cannot change the tables.
    assert judge.run("DELETE FROM staff") is None
    assert testbed.accuracy([query], [("", query)]) == [True]


def test_the_tokenizer_goes_round():
    words = testbed.tokenizer()
    for question, query in testbed.questions(20):
        text = f"{testbed.prompt(question)} {query}"
        assert words.decode(words(text)["input_ids"]) == text


def test_batches_hold_every_pair_once_with_its_like():
    stream = testbed.questions(100)
    found = list(testbed._batches(stream, 8, random.Random(0)))
    assert [len(batch) for batch in found].count(8) == 12 and sorted(
        pair for batch in found for pair in batch
    ) == sorted(stream)

    def spread(batch):
        lengths = [len(question.split()) + len(query.split()) for question, query in batch]
        return max(lengths) - min(lengths)

    assert sum(map(spread, found)) < 0.5 * sum(spread(stream[i : i + 8]) for i in range(0, 100, 8))
    assert found == list(testbed._batches(stream, 8, random.Random(0)))


def test_the_recipe_runs(tmp_path: Path):
    """The rebuild command, cut short; what it stores loads."""
    testbed.rebuild(tmp_path, steps=3, prompts=6, consistency_steps=2)
    for kind in ("target", "consistent"):
        model = testbed.load(kind, tmp_path)
        pairs = testbed.questions(3, split="test")
        texts, speeds = testbed.answer(model, pairs)
        assert len(texts) == 3 and (speeds >= 1).all()
    with pytest.raises(UserError, match="no model 'draft'"):
        testbed.load("draft", tmp_path)


def test_the_weights_that_come_with_the_package():
    """Right on most unseen questions, and the trained one confirms several tokens a pass with the same weights' greedy output."""
    pairs = testbed.questions(60, split="test", seed=77)
    figures = {}
    for kind in ("target", "consistent"):
        model = testbed.load(kind)
        greedy, _ = testbed.answer(model, pairs, block_size=1)
        texts, speed = testbed.answer(model, pairs)
        assert texts == greedy
        figures[kind] = (sum(testbed.accuracy(texts, pairs)) / 60, float(speed.mean()))
    assert figures["target"][0] > 0.8 and figures["consistent"][0] > 0.8
    assert figures["target"][1] < 1.2 and figures["consistent"][1] > 2.0


def test_float16_storage_is_the_model(tmp_path: Path):
    model = testbed.untrained(seed=3)
    testbed.store(model, "target", tmp_path)
    again = testbed.load("target", tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(model(ids).logits, again(ids).logits, atol=2e-2)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_files_of_another_shape_and_broken_ones_are_named(tmp_path: Path):
    testbed.store(testbed.untrained(layers=1), "target", tmp_path)
    state = tmp_path / "target.safetensors"
    state.rename(tmp_path / "consistent.safetensors").write_bytes(b"nothing")
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(7)}, state)
    for kind in ("target", "consistent"):
        with pytest.raises(UserError, match=f"{kind}.safetensors' does not hold weights"):
            testbed.load(kind, tmp_path)
