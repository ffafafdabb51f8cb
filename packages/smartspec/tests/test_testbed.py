import numpy as np
import pytest
import torch
from smartspec import testbed
from tenfold_shared.errors import UserError


def test_the_language_repeats_itself_by_seed():
    text = testbed.corpus(3000)
    assert text.tolist() == testbed.corpus(3000).tolist() != testbed.corpus(3000, seed=1).tolist()
    assert text.min() >= 2 and text.max() < testbed.VOCAB
    assert [len(p) for p in testbed.prompts(5, 7)] == [7] * 5


def test_the_shipped_pair_has_learned_it():
    target, draft = testbed.load("target"), testbed.load("draft")
    text = torch.from_numpy(testbed.corpus(1500, seed=77)).reshape(-1, 50)
    with torch.inference_mode():
        right = (target(text).logits[:, 8:-1].argmax(-1) == text[:, 9:]).float().mean()
    assert right > 0.6
    assert testbed.agreement(target, draft) > 0.7


def test_ballast_changes_nothing_but_the_price():
    target = testbed.load("target")
    heavy = testbed.with_ballast(target, layers=2, width=1024)
    text = torch.from_numpy(testbed.corpus(100)).reshape(2, 50)
    with torch.inference_mode():
        assert torch.equal(heavy(text).logits, target(text).logits) or torch.allclose(
            heavy(text).logits, target(text).logits, atol=1e-5
        )
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert size(heavy) > 2 * size(target)


def test_noise_lowers_the_agreement():
    target, draft = testbed.load("target"), testbed.load("draft")
    before, after = testbed.agreement(target, draft), testbed.agreement(target, testbed.with_noise(draft, 6.0))
    assert after < before - 0.2


def test_the_recipe_runs_and_its_files_load(tmp_path, monkeypatch):
    testbed.rebuild(tmp_path, steps=2)
    monkeypatch.setattr(testbed, "ASSETS", tmp_path)
    a, b = testbed.load("draft"), testbed.train("draft", steps=2)
    difference = max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert difference < 2e-3


def test_saved_models_load_like_any_other(tmp_path):
    from tenfold_shared.hub import load_model, load_tokenizer
    from transformers import AutoModelForCausalLM

    testbed.save(testbed.load("draft"), tmp_path / "draft")
    model, words = load_model(AutoModelForCausalLM, tmp_path / "draft"), load_tokenizer(tmp_path / "draft")
    ids = words("w5 w17 w9")["input_ids"]
    assert ids == [5, 17, 9] and words.decode(ids) == "w5 w17 w9"
    text = torch.tensor([ids])
    with torch.inference_mode():
        assert torch.equal(model(text).logits, testbed.load("draft")(text).logits)
    assert np.isfinite(model(text).logits.detach().numpy()).all()


def test_unknown_models():
    with pytest.raises(UserError, match="target or draft"):
        testbed.untrained("giant")
