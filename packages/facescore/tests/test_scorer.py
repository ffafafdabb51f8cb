"""Scoring: batches equal singles, faces and the lack of them, saliency, ranking, calibration."""

import numpy as np
import pytest
import torch
from facescore import FaceScorer, HeadEnsemble, ImageRewardModel, PairCalibration, TensorPairs
from facescore.detectors import Detection, FullImage
from facescore.errors import NoFaceError, TokenizerMissingError
from facescore.images import preprocess
from facescore.integrations import EarlyReject
from facescore.metric import FaceScoreMetric
from facescore.reward.checkpoint import save_reward
from PIL import Image
from tenfold_shared.errors import UserError


class Fixed:
    """A detector that gives the same faces every time."""

    calibrated = True

    def __init__(self, *found):
        self.found = list(found)

    def detect(self, image):
        return self.found


TWO = Fixed(Detection((0, 0, 10, 10), 0.99), Detection((8, 8, 28, 28), 0.95), Detection((2, 2, 9, 9), 0.5))


def test_mixed_sizes_in_one_batch_equal_single_calls(reward, picture):
    paths = [picture(f"{i}.png", size, seed=i) for i, size in enumerate([(40, 30), (17, 64), (16, 16), (90, 20)])]
    scorer = FaceScorer(reward, FullImage(), batch_size=3)
    together = [r.max for r in scorer(paths)]
    alone = [scorer(p)[0].max for p in paths]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.std(together) > 1e-4
    assert [r.max for r in scorer(paths)] == together


def test_paths_pictures_arrays_and_tensors_agree(reward, picture):
    path = picture()
    image = Image.open(path)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    scores = [r.max for r in FaceScorer(reward, FullImage())([path, str(path), image, array, tensor])]
    assert len(set(scores)) == 1


def test_several_faces_and_their_aggregates(reward, picture):
    (result,) = FaceScorer(reward, TWO)(picture())
    a, b = result.scores
    assert len(result.faces) == 2 and result.calibrated  # the third is not sure enough
    assert (result.max, result.min) == (max(a, b), min(a, b))
    assert result.mean == pytest.approx((a + b) / 2)
    assert result.area_weighted == pytest.approx((100 * a + 400 * b) / 500)
    (official,) = FaceScorer(reward, TWO, compat="official")(picture())
    assert official.scores == pytest.approx([b])  # the face at the border is lost there


def test_no_face(reward, picture):
    (result,) = FaceScorer(reward, Fixed())(picture())
    assert result.faces == [] and result.max is result.min is result.mean is result.area_weighted is None
    with pytest.raises(NoFaceError, match=r"a\.png"):
        FaceScorer(reward, Fixed(), on_no_face="raise")(picture())


def test_score_is_the_model_on_the_crop(reward, picture):
    image = Image.open(picture())
    (result,) = FaceScorer(reward, Fixed(Detection((5, 6, 20, 26))))(image)
    crop = preprocess(image.crop((4, 5, 21, 27)), 16)
    with torch.no_grad():
        expected = reward(crop[None]).item()
    assert result.max == pytest.approx(expected, abs=1e-6)
    (scaled,) = FaceScorer(reward, Fixed(Detection((5, 6, 20, 26))), normalize=True)(image)
    assert scaled.max == pytest.approx((expected - 0.16717362830052426) / 1.0333394966054072, abs=1e-6)


def test_saliency_is_gradient_times_input(reward):
    """Against central differences in float64, each channel of some pixels."""
    reward.double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    saliency = FaceScorer(reward, FullImage()).saliency(x)
    assert saliency.shape == (2, 16, 16)
    for image, row, column in ((0, 3, 4), (1, 0, 15), (1, 9, 9)):
        expected = 0.0
        for channel in range(3):
            step = torch.zeros_like(x)
            step[image, channel, row, column] = 1e-5
            with torch.no_grad():
                slope = (reward(x + step) - reward(x - step))[image].item() / 2e-5
            expected += abs(slope * x[image, channel, row, column].item())
        assert saliency[image, row, column].item() == pytest.approx(expected, rel=1e-5) and expected > 1e-6


def test_score_images_has_a_gradient_and_nan_without_a_face(reward):
    pixels = torch.rand(2, 3, 30, 40, requires_grad=True)
    scores = FaceScorer(reward, TWO).score_images(pixels)
    scores.sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert torch.isnan(FaceScorer(reward, Fixed()).score_images(pixels)).all()


def test_image_reward_ranks_and_needs_a_tokenizer(reward, picture, tmp_path):
    model = ImageRewardModel(reward)
    paths = [picture(f"{i}.png", seed=i) for i in range(3)]
    scores = model.score("A face.", paths)
    assert model.rank("A face.", paths) == [1 + sum(o > s for o in scores) for s in scores]
    with pytest.raises(TokenizerMissingError, match="needs a tokenizer"):
        model.score("a dog", paths)
    with pytest.raises(UserError, match="2 prompts for 3"):
        model.score(["A face."] * 2, paths)
    folder = save_reward(reward, tmp_path / "m").parent
    with pytest.raises(TokenizerMissingError, match="could not be loaded"):
        ImageRewardModel.from_pretrained(folder, tokenizer=tmp_path / "none")
    assert ImageRewardModel.from_pretrained(folder).score("A face.", paths) == scores


def test_a_real_tokenizer_beside_the_checkpoint_is_used(reward, picture, tmp_path):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "face", ".", "dog"]
    folder = save_reward(reward, tmp_path / "m").parent
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    model = ImageRewardModel.from_pretrained(folder)
    assert model.ids(["a dog."]) == [[2, 5, 8, 7, 3]]
    path = picture()
    assert model.score("a dog.", [path]) != model.score("a face.", [path])


def test_calibration_recovers_the_temperature():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 3, 20000)
    flipped = np.where(rng.random(20000) < 1 / (1 + np.exp(-gaps / 2)), gaps, -gaps)
    fitted = PairCalibration.fit(flipped)
    assert fitted.temperature == pytest.approx(2, rel=0.1)
    assert fitted.probability(1, 1) == 0.5 and fitted.probability(3, 1) + fitted.probability(1, 3) == pytest.approx(1)
    with pytest.raises(UserError):
        PairCalibration.fit([])


def test_head_ensemble_knows_what_it_was_fitted_on(reward):
    torch.manual_seed(0)
    pairs = TensorPairs(torch.rand(20, 3, 16, 16), torch.rand(20, 3, 16, 16))
    ensemble = HeadEnsemble.fit(reward, pairs, members=4)
    win, lose = (torch.stack([pairs.pixels(i, 16)[side] for i in range(20)]) for side in (0, 1))
    (a, spread), (b, _) = ensemble.score_crops(win), ensemble.score_crops(lose)
    assert (a > b).float().mean() >= 0.75 and (spread > 0).all()
    # Pairs do not fix the height of a score: at their mean feature all members say what the model's own head says.
    features = reward.feature(reward.vision_tokens(torch.cat([win, lose]))).detach()
    heights = features.mean(0) @ ensemble.weights.T + ensemble.bias
    torch.testing.assert_close(heights, reward.head(features).mean().detach().expand(4), rtol=1e-4, atol=1e-4)


def test_head_ensemble_is_least_sure_where_the_pairs_say_nothing(reward):
    torch.manual_seed(0)
    pairs = TensorPairs(torch.rand(12, 3, 16, 16), torch.rand(12, 3, 16, 16))
    ensemble = HeadEnsemble.fit(reward, pairs, members=32, ridge=1e-3)
    with torch.no_grad():
        features = torch.stack(
            [reward.feature(reward.vision_tokens(torch.stack(pairs.pixels(i, 16)))) for i in range(12)]
        )
    basis = torch.linalg.svd(features[:, 0] - features[:, 1])[2]
    along, across = ((ensemble.weights @ part.T).std(0).mean() for part in (basis[:6], basis[12:]))
    assert across > along
    with pytest.raises(UserError, match="2 or more members"):
        HeadEnsemble.fit(reward, pairs, members=1)


def test_members_without_bootstrap_noise_or_prior_are_the_own_head(reward):
    torch.manual_seed(0)
    pairs = TensorPairs(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16))
    ensemble = HeadEnsemble.fit(reward, pairs, members=3, ridge=1e6)  # a prior this narrow leaves no room
    weight, bias = reward.collapse_head()
    torch.testing.assert_close(ensemble.weights, weight.expand(3, -1), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(ensemble.bias, bias.expand(3), rtol=1e-3, atol=2e-2)


def test_metric_and_early_reject(reward):
    metric = FaceScoreMetric(FaceScorer(reward, FullImage()))
    images = torch.rand(4, 3, 20, 20)
    metric.update(images[:3])
    metric.update(images[3:])
    expected = np.mean([r.mean for r in FaceScorer(reward, FullImage())(list(images))])
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6) and metric.share_with_face == 1
    lost = FaceScoreMetric(FaceScorer(reward, Fixed()))
    lost.update(images)
    assert torch.isnan(lost.compute()) and lost.share_with_face == 0
    half = FaceScoreMetric(FaceScorer(reward, FullImage()), aggregate="max")
    half.update(images[:1])
    # What torchmetrics adds up over processes are the sums.
    metric.reset()
    metric.update(images[1:])
    both = {name: getattr(metric, name) + getattr(half, name) for name in ("total", "counted", "images")}
    assert (both["total"] / both["counted"]).item() == pytest.approx(expected, abs=1e-6) and both["images"] == 4
    with pytest.raises(UserError, match="aggregate"):
        FaceScoreMetric(FaceScorer(reward, FullImage()), aggregate="sum")

    class Vae(torch.nn.Module):
        dtype = torch.float32

        class config:
            scaling_factor, shift_factor = 1.0, None

        def decode(self, latents):
            self.sample = latents
            return self

    class Pipe:
        vae, _interrupt = Vae(), False

    reject, pipe = EarlyReject(FaceScorer(reward, FullImage()), at=1, threshold=1e6), Pipe()
    for step in range(2):
        reject(pipe, step, None, {"latents": torch.rand(1, 3, 16, 16)})
    assert reject.rejected and pipe._interrupt
    keep = EarlyReject(FaceScorer(reward, FullImage()), at=0, threshold=-1e6)
    keep(pipe, 0, None, {"latents": torch.rand(1, 3, 16, 16)})
    assert not keep.rejected


def test_bad_options(reward):
    for option in ("crop", "compat", "on_no_face"):
        with pytest.raises(UserError, match=option):
            FaceScorer(reward, FullImage(), **{option: "?"})
    with pytest.raises(UserError, match="device 'nonsense'"):
        FaceScorer(reward, FullImage(), device="nonsense")
