"""Statistics against scipy and planted truths; scorers side by side."""

import numpy as np
import pytest
import torch
from facescore import (
    ImageRewardModel,
    PairDataset,
    TensorPairs,
    WholeImages,
    evaluate,
    evaluate_rankings,
    reward_scorer,
)
from facescore.detectors import Detection
from facescore.evaluation.baselines import Eigenfaces, NaturalStatistics, sharpness
from facescore.evaluation.statistics import bradley_terry, correct, paired_bootstrap, rank_correlations, roc_auc, wilson
from facescore.pairs.dataset import Ranking
from facescore.testbed import write_world
from PIL import Image, ImageFilter
from scipy.stats import binomtest, kendalltau, spearmanr
from tenfold_shared.errors import UserError


def test_ties_count_one_half():
    assert correct([1, 2, 3], [0, 2, 4]).tolist() == [1, 0.5, 0]
    with pytest.raises(UserError, match="NaN"):
        correct([float("nan")], [0])
    with pytest.raises(UserError, match="non-empty"):
        correct([], [])


def test_wilson_is_scipys():
    for k, n in ((0, 10), (7, 10), (81, 100)):
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_rank_correlations_are_scipys_with_the_sign_turned():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, ranks = rng.normal(size=6).tolist(), rng.integers(1, 5, 6).tolist()
        tau, rho = rank_correlations(scores, ranks)
        if len(set(ranks)) > 1:
            assert tau == pytest.approx(-kendalltau(scores, ranks).statistic)
            assert rho == pytest.approx(-spearmanr(scores, ranks).statistic)
    assert rank_correlations([1, 1], [1, 2]) == (0.0, 0.0)


def test_bradley_terry_recovers_planted_strengths():
    true = np.array([1.0, 0.3, -0.2, -1.1])
    wins = 5000 / (1 + np.exp(-(true[:, None] - true[None]))) * (1 - np.eye(4))
    np.testing.assert_allclose(bradley_terry(wins), true, atol=1e-6)
    with pytest.raises(UserError, match="not determined"):
        bradley_terry(np.array([[0, 3], [0, 0]]))
    with pytest.raises(UserError, match="square"):
        bradley_terry(np.zeros((2, 3)))


def test_roc_auc_counts_pairs():
    rng = np.random.default_rng(0)
    good, bad = rng.integers(0, 5, 30), rng.integers(0, 4, 20)
    assert roc_auc(good, bad) == pytest.approx(((good[:, None] > bad) + 0.5 * (good[:, None] == bad)).mean())


def test_bootstrap_interval_holds_the_mean():
    mean, low, high = paired_bootstrap(np.ones(50), np.zeros(50))
    assert (mean, low, high) == (1, 1, 1)


def _pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(n)]


def test_baselines_see_what_they_should():
    sharp = _pictures(30)
    soft = [i.filter(ImageFilter.GaussianBlur(2)) for i in sharp]
    for scorer in (sharpness, NaturalStatistics(sharp), Eigenfaces(sharp[:20], 18, size=16)):
        clean = sharp[:20]
        other = soft[20:] if scorer is sharpness or isinstance(scorer, NaturalStatistics) else sharp[20:]
        assert np.mean(scorer(clean)) > np.mean(scorer(other))
    with pytest.raises(UserError, match="components"):
        Eigenfaces(sharp[:3], 8)


def test_evaluate_compares_on_the_same_pairs(reward):
    rng = torch.Generator().manual_seed(0)
    win = torch.rand(12, 3, 16, 16, generator=rng)
    pairs = TensorPairs(win, win * 0.5, generators=["a"] * 6 + ["b"] * 6, severities=[0.5, 1.0] * 6)
    bright = lambda images: [np.asarray(i).mean() for i in images]  # noqa: E731
    first, second, third = evaluate(
        pairs, {"bright": bright, "none": lambda i: [0.0] * len(i), "r": reward_scorer(reward)}
    )
    assert first.accuracy == 1 and first.difference is None and first.by_generator == {"a": 1, "b": 1}
    assert second.accuracy == 0.5 and second.difference == pytest.approx((-0.5, -0.5, -0.5))
    assert set(third.by_severity) == {0.5, 1.0} and 0 <= third.accuracy <= 1
    with pytest.raises(UserError, match="no scorers"):
        evaluate(pairs, {})


def test_rankings(picture, tmp_path):
    files = []
    for i, level in enumerate((200, 100, 50)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    bright = lambda images: [np.asarray(i).mean() for i in images]  # noqa: E731
    full = {"detector": "full-image"}
    assert evaluate_rankings([Ranking("", files, [1, 2, 2])], bright, **full)["accuracy"] == 1
    assert evaluate_rankings([Ranking("", files, [3, 2, 1])], bright, **full)["kendall"] == -1
    assert evaluate_rankings([Ranking("", files, [1, 2, 3])], bright, **full) == {
        "accuracy": 1, "kendall": 1, "spearman": 1, "left_out": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match="no strict"):
        evaluate_rankings([Ranking("", files, [1, 1, 1])], bright, **full)
    with pytest.raises(UserError, match="with a face"):
        evaluate_rankings([Ranking("", files, [1, 2, 3])], bright)  # the cascade finds no face in them


class ByName:
    """Two faces where the picture is wide; none in a grey one."""

    calibrated = True

    def detect(self, image):
        if image.getpixel((0, 0)) == (128, 128, 128):
            return []
        return [Detection((2, 2, 6, 6)), Detection((10, 1, 19, 9), 0.95), Detection((0, 0, 20, 10), 0.3)]


def test_crops_get_the_largest_face_and_whole_images_their_prompt(reward, tmp_path):
    files = []
    for i, colour in enumerate(((10, 200, 10), (200, 10, 10), (128, 128, 128))):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    ranking = Ranking("a face.", files, [1, 2, 3])
    seen = []

    def crop_scorer(images):
        seen.extend(i.size for i in images)
        return list(range(len(images), 0, -1))

    found = evaluate_rankings([ranking], crop_scorer, detector=ByName())
    assert seen == [(11, 10), (11, 10)] and found["left_out"] == 1 and found["accuracy"] == 1
    model = ImageRewardModel(reward)
    whole = evaluate_rankings([ranking], WholeImages(model), detector=ByName())
    a, b = model.score("a face.", files[:2])
    assert whole["accuracy"] == float(a > b)


def test_whole_images_of_pairs_are_scored_under_their_prompts(make_reward, tmp_path):
    write_world(tmp_path, 3)
    pairs = PairDataset.read(tmp_path / "pairs")

    class Words:
        def __call__(self, prompts, **options):
            return {"input_ids": [[2, 5 + len(p) % 3, 3] for p in prompts]}

    model = ImageRewardModel(make_reward(), Words())
    crops, whole = evaluate(pairs, {"crops": reward_scorer(model.model), "whole": WholeImages(model)})
    wins = [pairs.images(i)[0] for i in range(3)]
    np.testing.assert_allclose(whole.win, model.score(pairs.prompts, wins), atol=1e-6)
    assert np.abs(whole.win - crops.win).min() > 1e-4
