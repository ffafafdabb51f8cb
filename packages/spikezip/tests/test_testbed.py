import random

import torch
from spikezip.testbed import digits, roll, sentence, sentiment, sentiment_roberta, tokenizer, train


def test_digits_are_split_in_proportion_and_by_the_seed():
    a, b, c = digits(0), digits(0), digits(1)
    assert len(a.train) == 1437 and len(a.test) == 360
    assert torch.equal(a.test, b.test) and not torch.equal(a.test, c.test)
    assert a.test_labels.bincount().min() >= 34


def test_roll_keeps_every_pixel():
    x = torch.randn(12, 1, 8, 8)
    torch.manual_seed(0)
    moved = roll(x)
    assert torch.equal(moved.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    assert torch.equal(moved[6:], x[6:])


def test_the_grammar_by_hand():
    rng = random.Random(0)
    seen = set()
    for _ in range(400):
        text, verdict = sentence(rng, 0.0)
        clauses = [
            c.strip() for c in text.replace("although", "").replace(" still ", "|").replace(" also ", "|").split("|")
        ]
        if " still " in text:
            last = clauses[-1]
            good = any(w in last.split() for w in ("good", "great", "fine", "lovely", "bright", "warm", "clever", "moving",
                                                   "fresh", "honest", "funny", "sharp"))  # fmt: skip
            assert verdict == int(good != ("not" in last.split()))
        seen.add(verdict)
    assert seen == {0, 1}


def test_rare_words_are_unknown_and_common_ones_are_not():
    words = tokenizer()
    assert words("the plot was superb")["input_ids"][-2] == words.unk_token_id
    assert words.unk_token_id not in words("although the plot was not good , the cast was dull")["input_ids"]


def test_sentences_are_padded_and_learnable():
    data = sentiment(0, train=256, test=32)
    assert data.train["input_ids"].shape == (256, 24) and bool((data.train["attention_mask"].sum(1) < 24).any())
    model = train(sentiment_roberta(data.vocabulary), data.loader(32), epochs=1)
    assert not model.training
