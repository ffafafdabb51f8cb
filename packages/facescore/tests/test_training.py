"""Training the reward: the loss, what freezes, resuming, two processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from facescore import RewardConfig, RewardTrainer, TensorPairs, load_reward
from facescore.errors import CheckpointError, TrainingError
from facescore.reward.training import freeze, pair_loss
from tenfold_shared.errors import UserError
from torch.nn import functional as F

PLAIN = {"lr": 2e-3, "batch_size": 4, "fix_rate": 0.0, "validation": 0.0, "dropout": False}


def random_pairs(n=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return TensorPairs(*(torch.rand(n, 3, 16, 16, generator=g).to(dtype) for _ in range(2)))


def exact_pairs(n=8):
    """In float64: in single precision Adam makes whole steps of rounding noise where a gradient is zero."""
    return random_pairs(n, dtype=torch.float64)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moved(model, start):
    return (weights(model) - weights(start)).abs().max().item()


def test_loss_is_cross_entropy_of_the_two_rewards():
    r = torch.randn(10, 2)
    torch.testing.assert_close(pair_loss(r), -F.logsigmoid(r[:, 0] - r[:, 1]).mean())
    smooth = 0.9 * -F.logsigmoid(r[:, 0] - r[:, 1]) + 0.1 * -F.logsigmoid(r[:, 1] - r[:, 0])
    torch.testing.assert_close(pair_loss(r, label_smoothing=0.2), smooth.mean())
    torch.testing.assert_close(pair_loss(r, l2_reward=0.5), pair_loss(r) + 0.5 * r.square().mean())


def test_fix_rate_freezes_exactly_the_documented_tensors(make_reward):
    model = make_reward(vision_depth=12, text_depth=3)
    frozen = freeze(model, 0.7)  # int(12 x 0.7) = 8 blocks, int(3 x 0.7) = 2 layers
    expected = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(("vision.embeddings", "text.embeddings"))
        or any(name.startswith(f"vision.encoder.layers.{i}.") for i in range(8))
        or any(name.startswith(f"text.encoder.layer.{i}.") for i in range(2))
    ]
    assert frozen == expected  # layers.1 is frozen, and so layers.10 and layers.11 must not be
    assert freeze(model, 0.0) == []
    left = {n for n, p in model.named_parameters() if n not in freeze(model, 1.0)}
    assert all(n.startswith("head.") for n in left)


def test_two_updates_equal_a_plain_loop(make_reward):
    pairs = exact_pairs(4)
    trained, plain = make_reward().double(), make_reward().double()
    RewardTrainer(trained, pairs, RewardConfig(**PLAIN, max_steps=2)).train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=2e-3)
    for step in range(2):
        order = np.random.default_rng([0, step]).permutation(4)
        pixels = torch.stack([torch.stack(pairs.pixels(i, 16)) for i in order])
        rewards = plain(pixels.flatten(0, 1)).view(4, 2)
        loss = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + np.cos(np.pi * step / 2))
        optimizer.step()
    torch.testing.assert_close(weights(trained), weights(plain), rtol=0, atol=1e-8)
    assert moved(trained, make_reward()) > 1e-3


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulation_equals_one_batch(make_reward, parts):
    one, several = make_reward().double(), make_reward().double()
    for model, accumulation in ((one, 1), (several, parts)):
        config = RewardConfig(**PLAIN, max_steps=2, accumulation=accumulation, label_smoothing=0.1, l2_reward=0.01)
        RewardTrainer(model, exact_pairs(), config).train()
    torch.testing.assert_close(weights(one), weights(several), rtol=0, atol=1e-8)
    assert moved(one, make_reward()) > 1e-3


def test_augmentation_gives_each_picture_its_own_grain(make_reward):
    pixels = torch.randn(200, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def augmented(**changes):
        trainer = RewardTrainer(make_reward(), random_pairs(), RewardConfig(**PLAIN, **changes))
        return trainer._augment(pixels, torch.Generator().manual_seed(1))

    assert torch.equal(augmented(), pixels)
    level = (augmented(noise=1.5) - pixels).std((2, 3, 4))
    assert level.max() <= 1.6 and level.min() < 0.1 and level.mean() == pytest.approx(0.75, abs=0.1)
    # Of a pair either member may be the blurrier or the noisier one, so neither says who won.
    for found in (level, augmented(blur=1.0).std((2, 3, 4))):
        assert 0.4 < (found[:, 0] > found[:, 1]).float().mean() < 0.6
        assert abs(np.corrcoef(found.T.numpy())[0, 1]) < 0.25
    torch.testing.assert_close(augmented(blur=1.0).mean(), pixels.mean(), atol=1e-2, rtol=0)  # a blur keeps the mean
    assert augmented(blur=1.0).std() < 0.8 * pixels.std()


def test_overfits_eight_pairs(make_reward):
    report = RewardTrainer(make_reward(), random_pairs(), RewardConfig(**{**PLAIN, "lr": 3e-3}, epochs=60)).train()
    assert report.history[-1]["accuracy"] == 1 and report.history[-1]["loss"] < 0.1


def test_head_only_uses_cached_features_and_gives_the_same(make_reward, monkeypatch):
    config = RewardConfig(**{**PLAIN, "fix_rate": 1.0}, max_steps=6)
    cached, plain = make_reward().double(), make_reward().double()
    trainer = RewardTrainer(cached, exact_pairs(), config)
    trainer.train()
    assert len(trainer._cache) == 8
    slow = RewardTrainer(plain, exact_pairs(), config)
    monkeypatch.setattr(slow, "_features", lambda rows, pixels: plain.feature(
        plain.vision_tokens(pixels.flatten(0, 1))).view(len(rows), 2, -1))  # fmt: skip
    slow.train()
    torch.testing.assert_close(weights(cached), weights(plain), rtol=0, atol=1e-8)
    assert moved(cached, make_reward()) > 1e-3


def test_best_validation_weights_are_kept_and_patience_stops(make_reward, tmp_path):
    config = RewardConfig(**{**PLAIN, "validation": 0.25, "lr": 0.02}, epochs=40, patience=2)
    model = make_reward()
    trainer = RewardTrainer(model, random_pairs(16), config, output=tmp_path)
    report = trainer.train()
    assert report.steps < 40 * 3 and report.best_loss == min(h["loss"] for h in report.history)
    assert trainer.validate()["loss"] == pytest.approx(report.best_loss, rel=1e-4)
    torch.testing.assert_close(weights(load_reward(tmp_path / "model")), weights(model))


def test_interrupted_and_resumed_ends_with_the_same_weights(make_reward, tmp_path):
    config = RewardConfig(lr=2e-3, batch_size=4, fix_rate=0.0, validation=0.25, epochs=4, save_every=1, noise=0.1)
    whole = make_reward()
    RewardTrainer(whole, random_pairs(12), config).train()

    class Interrupted(Exception):
        pass

    broken = make_reward()
    trainer = RewardTrainer(broken, random_pairs(12), config, output=tmp_path)
    update, calls = trainer._update, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise Interrupted
        update(*args)

    trainer._update = dies  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = make_reward(seed=9)
    RewardTrainer(resumed, random_pairs(12), config, output=tmp_path).train(resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    with pytest.raises(UserError, match=r"another .*lr"):
        RewardTrainer(make_reward(), random_pairs(12), RewardConfig(lr=1), output=tmp_path).train(resume=True)
    (tmp_path / "training.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        RewardTrainer(make_reward(), random_pairs(12), config, output=tmp_path).train(resume=True)


SCRIPT = """
import sys, torch
from conftest import TINY, randomise
from test_training import PLAIN, exact_pairs, weights
from facescore import RewardConfig, RewardModel, RewardTrainer
torch.set_num_threads(1)
model = randomise(RewardModel(TINY)).double()
RewardTrainer(model, exact_pairs(), RewardConfig(**PLAIN, max_steps=2, accumulation=2)).train()
torch.save(weights(model), sys.argv[1])
"""


def test_two_processes_equal_one(make_reward, tmp_path):
    one = make_reward().double()
    RewardTrainer(one, exact_pairs(), RewardConfig(**PLAIN, max_steps=2)).train()
    (tmp_path / "two.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", "0", "--standalone", str(tmp_path / "two.py"), str(tmp_path / "w.pt")]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "w.pt"), weights(one), rtol=0, atol=1e-8)


def test_not_finite_stops_with_the_ids_and_bad_settings(make_reward):
    pairs = random_pairs()
    pairs.win[:] = float("nan")
    with pytest.raises(TrainingError, match=r"at update 0; pairs \d"):
        RewardTrainer(make_reward(), pairs, RewardConfig(**PLAIN)).train()
    for name, value in (("lr", 0), ("fix_rate", 2), ("validation", 1.0), ("label_smoothing", -1), ("batch_size", 0),
                        ("noise", -1), ("blur", -0.1)):  # fmt: skip
        with pytest.raises(UserError, match=name):
            RewardConfig(**{name: value})
    with pytest.raises(UserError, match="no pairs"):
        RewardTrainer(make_reward(), random_pairs().select([]), RewardConfig())
    with pytest.raises(UserError, match="needs the output"):
        RewardTrainer(make_reward(), random_pairs(), RewardConfig()).train(resume=True)
