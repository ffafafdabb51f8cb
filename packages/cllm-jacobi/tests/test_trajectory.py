"""Trajectories: the published algorithm, its invariants, its files."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from cllm_jacobi import collect_trajectories, load_trajectories, read_official, save_trajectories, write_official
from cllm_jacobi.metrics import confirmed_map, fast_forwarded, repetition, right_prefix, stationary
from cllm_jacobi.trajectory import FEATURES, deduplicate_states
from datasets import Dataset
from tenfold_shared.errors import UserError

N = 6


class Words:
    """A tokenizer of numbers, one token each."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(w) for w in text.split()]}

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return " ".join(map(str, ids))


PROMPTS = ["5 9 12 33", "7 8", "40", "3 4 5 6 7 8 9"]


def gather(model: Any, prompts: Any = PROMPTS, **settings: Any) -> Dataset:
    return collect_trajectories(
        model, Words(), prompts, **{"block_size": N, "max_new_tokens": 20, "batch_size": 3, **settings}
    )


@pytest.fixture(scope="module")
def found(tiny):
    return gather(tiny("llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
def test_every_state_follows_from_the_one_before(tiny, name):
    """Algorithm 1 written out: a full pass without cache over prompt, earlier blocks and state gives the next state."""
    model = tiny(name)
    # An EOS that the model says makes a short last block.
    said = model.generate(torch.tensor([[7, 8]]), max_new_tokens=20, do_sample=False)[0, 2:].tolist()
    model.generation_config.eos_token_id = [1, said[8]]
    try:
        data = gather(model)
        for row in data:
            greedy = model.generate(torch.tensor([row["prompt_ids"]]), max_new_tokens=20, do_sample=False)[0]
            assert greedy.tolist() == row["prompt_ids"] + row["answer_ids"]
            assert row["disagreements"] == 0
            fixed = list(row["prompt_ids"])
            for states in row["trajectories"]:
                for state, after in pairwise(states):
                    logits = model(torch.tensor([fixed + state])).logits[0]
                    assert logits[len(fixed) - 1 : -1].argmax(-1).tolist() == after
                assert len(states) - 1 <= len(states[-1])
                fixed += states[-1]
            assert fixed == row["prompt_ids"] + row["answer_ids"]
        assert {row["truncated"] for row in data} == {True, False}
        assert any(len(row["trajectories"][-1][-1]) < N for row in data)
    finally:
        model.generation_config.eos_token_id = 1


def test_batch_equals_singles(tiny, found):
    for i, row in enumerate(gather(tiny("llama"), batch_size=1)):
        assert row == found[i]


def test_what_is_no_fixed_point_is_counted(tiny, found, monkeypatch):
    """An answer that the block passes do not confirm, as after a near-tie, is kept as it was given."""
    from cllm_jacobi import trajectory

    answers = trajectory._Collector.answers

    def other(self, ids, mask):
        given = answers(self, ids, mask)
        given[0][2] = 60 if given[0][2] != 60 else 59
        return given

    monkeypatch.setattr(trajectory._Collector, "answers", other)
    rows = gather(tiny("llama"))
    assert rows[0]["disagreements"] > 0 and rows[1].items() == found[1].items()
    for b, states in enumerate(rows[0]["trajectories"]):
        assert states[-1] == rows[0]["answer_ids"][b * N : (b + 1) * N]
        assert states.count(states[-1]) == 1


def test_a_row_that_arrived_stays(tiny, monkeypatch):
    """A row that is there waits for its batch; what a block pass then says about it, as in a near-tie, is counted only."""
    model = tiny("llama")
    prompts = [[7, 8, 20, 21], [40, 41, 42, 43]]
    answers = [model.generate(torch.tensor([p]), max_new_tokens=N, do_sample=False)[0, 4:].tolist() for p in prompts]
    guesses = iter([answers[0], [60] * N, answers[0], [60] * N])
    forward = type(model).forward

    def flipped(self: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = forward(self, input_ids, position_ids=position_ids, **kwargs)
        # A tie at the first row's third token, which block passes break the other way than one-token passes.
        at = position_ids[0] == 4 - 1 + 2
        if input_ids.shape[1] > 1 and at.any():
            out.logits[0, at, (answers[0][2] + 1) % 61] = 1e4
        return out

    monkeypatch.setattr(type(model), "forward", flipped)
    first, second = gather(model, prompts, max_new_tokens=N, batch_size=2, init=lambda tokens, n: next(guesses))
    assert first["answer_ids"] == answers[0] and first["trajectories"] == [[answers[0]]]
    assert first["disagreements"] == 1 and second["disagreements"] == 0
    assert len(second["trajectories"][0]) > 2 and second["trajectories"][0][-1] == answers[1]
    # Nothing to iterate: the last pass alone sees it.
    (row,) = gather(model, prompts[:1], max_new_tokens=N, init=lambda tokens, n: next(guesses))
    assert row["trajectories"] == [[answers[0]]] and row["disagreements"] == 1
    # Not there yet: behind a right prefix the answer's token stands, and the tokens behind it build on that.
    (row,) = gather(model, prompts[:1], max_new_tokens=N, init=lambda tokens, n: next(guesses))
    assert row["trajectories"][0][-2][:4] == answers[0][:4] and row["disagreements"] == 1


def test_a_stopped_collection_goes_on(tiny, found, tmp_path):
    model = tiny("llama")

    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(model, shards=tmp_path, progress=stop)
    assert len(list(tmp_path.glob("part-*"))) == 1
    assert gather(model, shards=tmp_path).to_list() == found.to_list()
    with pytest.raises(UserError, match="other prompts or settings"):
        gather(model, shards=tmp_path, seed=3)


def test_the_file_is_checked(found, tmp_path):
    file = save_trajectories(found, tmp_path / "t.parquet")
    assert load_trajectories(file, block_size=N, vocab_size=61).to_list() == found.to_list()
    with pytest.raises(UserError, match=f"made with n = {N}, asked for is 16"):
        load_trajectories(file, block_size=16)
    with pytest.raises(UserError, match="the model has 20 tokens"):
        load_trajectories(file, vocab_size=20)
    broken = found.to_list()
    broken[2]["trajectories"][1][-1][0] += 1
    save_trajectories(Dataset.from_list(broken, features=FEATURES), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="row 2, block 1: the last state is not the answer's block"):
        load_trajectories(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="does not exist"):
        load_trajectories(tmp_path / "nowhere.parquet")
    (tmp_path / "empty.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is no trajectory file"):
        load_trajectories(tmp_path / "empty.parquet")


def test_official_json_both_ways(found, tmp_path):
    file = write_official(found, tmp_path / "official.json")
    records = json.loads(file.read_text())
    first = records[0]
    assert first["data_id"] == "data_0" and first["jacobian_itr_id"] == "itr_0"
    assert first["prompt_ids"] == [found[0]["prompt_ids"]] and first["prompt_ids_len"] == 4
    assert all(len(state) == N for r in records for state in r["answer_trajectory_ids"])
    assert records[1]["prompt_ids"][0] == first["teacher_output_ids"][0]
    back = read_official(file, eos_token_id=1)
    for a, b in zip(back, found, strict=True):
        assert a["prompt_ids"] == b["prompt_ids"] and a["n"] == N
        # Without an EOS the filling of a short last block cannot be told from tokens.
        whole = len(b["answer_ids"]) // N
        assert a["trajectories"][:whole] == [deduplicate_states(s) for s in b["trajectories"][:whole]]


def test_official_json_ends_at_eos(tmp_path):
    record = {
        "data_id": "data_7", "jacobian_itr_id": "itr_0", "prompt_ids_len": 2, "prompt_ids": [[5, 6]],
        "answer_trajectory_ids": [[9, 9, 9, 9], [3, 9, 1, 9], [3, 4, 1, 9]],
        "teacher_output_ids": [[5, 6, 3, 4, 1, 9]], "complete_teacher_output_ids": [3, 4, 1], "labels_ids": [5, 6, 8, 1],
    }  # fmt: skip
    (tmp_path / "o.json").write_text(json.dumps([record]))
    (row,) = read_official(tmp_path / "o.json", eos_token_id=[1])
    assert row["answer_ids"] == [3, 4, 1] and row["labels"] == [8, 1] and not row["truncated"]
    assert row["trajectories"] == [[[9, 9, 9], [3, 9, 1], [3, 4, 1]]]
    for text, cause in (("{", "not in the published layout"), ("[{}]", "record 0"), ("[]", "holds no records")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=cause):
            read_official(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [({"prompts": []}, "no prompts"), ({"prompts": ["5", ""]}, "prompt 1 is empty"), ({"block_size": 0}, "block_size is 0"), ({"labels": ["3"]}, "1 labels for 4")],
)  # fmt: skip
def test_what_cannot_be_collected(tiny, settings, cause):
    with pytest.raises(UserError, match=cause):
        gather(tiny("llama"), **settings)


# Counting.

STATES = [[9, 9, 9, 9], [1, 9, 3, 9], [1, 2, 3, 9], [1, 2, 3, 4]]


def test_counts():
    """Position 2 was right from state 1 on while position 1 was wrong: stationary. No pass confirmed two... but one did."""
    assert [right_prefix(s, STATES[-1]) for s in STATES] == [0, 1, 3, 4]
    assert fast_forwarded(STATES) == pytest.approx(1 / 3)
    assert stationary(STATES) == 1
    assert stationary([[9, 2], [1, 9], [1, 2]]) == 0  # it did not stay
    assert stationary([[1, 2]]) == 0 and fast_forwarded([[1, 2]]) == 0
    assert confirmed_map(STATES)[1] == [True, False, False, False]
    assert repetition([1, 2, 3, 4, 5]) == 0 and repetition([7] * 13) == pytest.approx(0.9)
