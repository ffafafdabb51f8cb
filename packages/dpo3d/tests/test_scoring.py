import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from dpo3d import testbed
from dpo3d.scoring import Row, batches, evaluating, preserved_rng, sample, score, tokenize_pair
from dpo3d.trl import FlexDPOConfig, FlexDPOTrainer
from tenfold_shared.errors import UserError


def rows_of(digits: Dataset, tokenizer: Any) -> list[Row]:
    return [row for example in digits for row in tokenize_pair(example, tokenizer)]


@pytest.mark.parametrize("form", ["standard", "conversational", "implicit prompt"])
def test_rows_are_cut_as_trl_cuts_them(
    form: str, digits: Dataset, conversation: Dataset, tokenizer: Any, talker: Any, make_trainer: Any
) -> None:
    data, words = digits, tokenizer
    if form == "conversational":
        data, words = conversation, talker
    elif form == "implicit prompt":
        data = Dataset.from_list(
            [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in digits]
        )
    extra = {"train_dataset": data, "processing_class": words}
    prepared = make_trainer(FlexDPOTrainer, FlexDPOConfig, extra=extra).train_dataset
    for example, theirs in zip(data, prepared, strict=True):
        chosen, rejected = tokenize_pair(example, words)
        assert chosen.prompt == rejected.prompt == theirs["prompt_ids"]
        assert chosen.completion == theirs["chosen_ids"] and rejected.completion == theirs["rejected_ids"]


def test_scores_are_trls_log_probabilities(base: Any, digits: Dataset, tokenizer: Any, make_trainer: Any) -> None:
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    theirs = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    ours = score(base, rows_of(digits.select(range(6)), tokenizer), 0)
    torch.testing.assert_close(torch.tensor([s.total for s in ours[::2]]), theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor([s.total for s in ours[1::2]]), theirs[1], rtol=1e-5, atol=1e-5)


def test_batches_do_not_matter(base: Any, digits: Dataset, tokenizer: Any) -> None:
    rows = rows_of(digits, tokenizer)
    whole = score(base, rows, 0, budget=10**6, entropy=True, hidden=True)
    single = score(base, rows, 0, budget=1, entropy=True, hidden=True)
    for a, b in zip(whole, single, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-5)
        assert a.entropy == pytest.approx(b.entropy, abs=1e-5) and a.greedy == b.greedy
        torch.testing.assert_close(a.hidden_sum, b.hidden_sum, rtol=1e-4, atol=1e-4)
    assert sorted(i for batch in batches(rows, 60) for i in batch) == list(range(len(rows)))


def test_entropy_of_a_uniform_model_is_log_of_the_vocabulary(base: Any, digits: Dataset, tokenizer: Any) -> None:
    import copy
    import math

    flat = copy.deepcopy(base)
    torch.nn.init.zeros_(flat.lm_head.weight)
    (scored,) = score(flat, rows_of(digits, tokenizer)[:1], 0, entropy=True)
    assert scored.entropy == pytest.approx(math.log(15)) and scored.per_token == pytest.approx(-math.log(15))


def test_samples_follow_the_model(sorter: Any, tokenizer: Any) -> None:
    prompt = testbed.held_out(0, 1)[0]
    ids = tokenizer(prompt)["input_ids"]
    (drawn,) = sample(sorter, [ids], tokenizer, n=400, max_new_tokens=9)
    answer = tokenizer(testbed.known_answers(prompt)[1] + testbed.EOS)["input_ids"]
    share = sum(d == answer for d in drawn) / 400
    (scored,) = score(sorter, [Row(ids, answer)], 0)
    p = 2.718281828**scored.total
    assert abs(share - p) < 4 * (p * (1 - p) / 400) ** 0.5 + 1e-3
    assert drawn == sample(sorter, [ids], tokenizer, n=400, max_new_tokens=9)[0]


def test_random_states_and_modes_come_back(base: Any, tokenizer: Any) -> None:
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    base.train()
    base.model.layers[0].eval()
    with preserved_rng(), evaluating(base):
        sample(base, [[3, 4]], tokenizer, max_new_tokens=3, seed=9)
        random.random()
        np.random.rand()  # noqa: NPY002
        assert not base.training
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all()
    assert base.training and not base.model.layers[0].training and base.model.layers[1].training
    base.eval()


def test_errors(base: Any, conversation: Dataset, tokenizer: Any) -> None:
    import copy

    with pytest.raises(UserError, match="row 0 has an empty completion"):
        score(base, [Row([1], [])], 0)
    with pytest.raises(UserError, match="temperature is 0"):
        sample(base, [[1]], tokenizer, temperature=0)
    with pytest.raises(UserError, match="no column rejected"):
        tokenize_pair({"chosen": "a"}, tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        tokenize_pair(conversation[0], tokenizer)
    broken = copy.deepcopy(base)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="row 0 is not finite"):
        score(broken, [Row([3], [4])], 0)
