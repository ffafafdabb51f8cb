import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from mlcm import RewardLoss, make_reward
from mlcm.latent_lpips import LatentLPIPS, train_step
from mlcm.rewards import AestheticReward, ClipReward, HPSv2Reward, MissingRewardError, Mixture, clip_pixels
from mlcm.testbed import tiny_clip
from safetensors.torch import save_file
from tenfold_shared.errors import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny CLIP model in the layout of the real ones."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder)
    return str(folder)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def test_the_hinge():
    images = torch.stack([torch.full((3, 2, 2), v) for v in (0.2, 0.9)])
    assert RewardLoss(brightness, margin=0.5)(images, ["a", "b"]).tolist() == pytest.approx([0.3, 0.0])


def test_the_mismatched_term_scores_the_other_prompts():
    def length(images, prompts):
        return torch.tensor([float(len(p)) for p in prompts])

    loss = RewardLoss(length, margin=0.0, mismatched=0.5)(torch.zeros(2, 3, 2, 2), ["a", "bbb"])
    assert loss.tolist() == [1.5, 0.5]


def test_the_gradient_goes_through_the_decoder():
    latents = torch.zeros(2, 4, requires_grad=True)
    decode = lambda z: z.view(2, 1, 2, 2).expand(2, 3, 2, 2)  # noqa: E731
    RewardLoss(brightness, margin=1.0, latents_to_images=decode)(latents, ["", ""]).sum().backward()
    torch.testing.assert_close(latents.grad, torch.full((2, 4), -0.25))


def test_over_optimisation_is_noticed(caplog):
    loss = RewardLoss(brightness, held_out=lambda images, prompts: -brightness(images, prompts), window=2)
    with caplog.at_level(logging.WARNING):
        for level in (0.1, 0.1, 0.5, 0.5):
            loss(torch.full((1, 3, 2, 2), level), [""])
    assert loss.over_optimised and "over-optimisation" in caplog.text
    fine = RewardLoss(brightness, held_out=brightness, window=2)
    for level in (0.1, 0.1, 0.5, 0.5):
        fine(torch.full((1, 3, 2, 2), level), [""])
    assert not fine.over_optimised


def test_a_mixture_is_the_weighted_sum():
    images = torch.rand(3, 3, 4, 4)
    mixed = Mixture((0.5, brightness), (2.0, brightness))(images, [""] * 3)
    torch.testing.assert_close(mixed, 2.5 * brightness(images, []))


def test_clip_reward_is_the_models_own_logit(clip):
    reward = ClipReward(clip)
    images, prompts = torch.rand(2, 3, 16, 16), ["a cat", "two dogs"]
    tokens = reward.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = reward.clip(pixel_values=clip_pixels(images, 16), **tokens).logits_per_image
        torch.testing.assert_close(reward(images, prompts), logits.diagonal(), rtol=1e-4, atol=1e-4)


def test_clip_reward_has_a_gradient_in_the_image_and_cuts_long_prompts(clip):
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    make_reward("pickscore", model=clip)(images, ["word " * 200]).sum().backward()
    assert images.grad.isfinite().all() and float(images.grad.abs().sum()) > 0


def test_aesthetic_head(clip, tmp_path):
    save_file({"weight": torch.ones(1, 8), "bias": torch.tensor([2.0])}, tmp_path / "head.safetensors")
    reward = make_reward("aesthetic", model=f"{clip},{tmp_path / 'head.safetensors'}")
    features = torch.nn.functional.normalize(reward.clip.image_features(torch.ones(2, 3, 16, 16)), dim=1)
    torch.testing.assert_close(reward(torch.ones(2, 3, 16, 16), ["", ""]), features.sum(1) + 2)
    with pytest.raises(UserError, match="weight and bias"):
        AestheticReward(clip, str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="expected 'CLIP model,head"):
        make_reward("aesthetic")


def test_hpsv2_is_open_clips_cosine(tmp_path, monkeypatch):
    """A checkpoint in the layout of the released one, for a small architecture."""
    import open_clip

    settings = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}}  # fmt: skip
    (tmp_path / "tiny-hps.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path / "tiny-hps.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps").eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "hps.pt")
    reward = HPSv2Reward(str(tmp_path / "hps.pt"), architecture="tiny-hps")
    images, prompts = torch.rand(2, 3, 48, 48, requires_grad=True), ["a cat", "two dogs"]
    with torch.no_grad():
        answers = model(clip_pixels(images, 32), open_clip.get_tokenizer("tiny-hps")(prompts))
    torch.testing.assert_close(reward(images, prompts), 100 * (answers[0] * answers[1]).sum(1), rtol=1e-4, atol=1e-4)
    reward(images, prompts).sum().backward()
    assert float(images.grad.abs().sum()) > 0
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="no checkpoint of HPS v2"):
        HPSv2Reward(str(tmp_path / "bad.pt"), architecture="tiny-hps")
    with pytest.raises(UserError, match=r"file '\./no\.pt' does not exist"):
        make_reward("hpsv2", model="./no.pt")
    with pytest.raises(UserError, match="neither a file here nor reachable"):
        make_reward("hpsv2")


def test_image_reward_goes_through_its_library(monkeypatch):
    """The library is not installed: a stand-in with its interface (tokenizer, score_gard) sees what is passed."""
    seen = {}

    class Tokens:
        input_ids, attention_mask = torch.zeros(2, 35), torch.ones(2, 35)

        def to(self, device):
            return self

    def score_gard(ids, mask, images):
        seen.update(ids=ids.shape, images=images.shape)
        return images.mean((1, 2, 3))[:, None]

    blip = SimpleNamespace(tokenizer=lambda prompts, **more: Tokens())
    library = SimpleNamespace(load=lambda name, device: SimpleNamespace(blip=blip, score_gard=score_gard))
    monkeypatch.setitem(sys.modules, "ImageReward", library)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    score = make_reward("image-reward")(images, ["a", "b"])
    assert score.shape == (2,) and seen == {"ids": (2, 35), "images": (2, 3, 224, 224)}
    score.sum().backward()
    assert float(images.grad.abs().sum()) > 0


def test_missing_libraries_say_what_to_install(monkeypatch):
    for name, module in (("hpsv2", "open_clip"), ("image-reward", "ImageReward")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"needs the library {module}.*mlcm\[rewards\]"):
            make_reward(name)
    assert issubclass(MissingRewardError, UserError)


def test_refusals():
    with pytest.raises(UserError, match="reward is 'beauty'"):
        make_reward("beauty")
    with pytest.raises(UserError, match="one score for each of 2"):
        RewardLoss(lambda images, prompts: torch.zeros(3))(torch.zeros(2, 3, 2, 2), ["", ""])
    with pytest.raises(UserError, match="does not exist"):
        make_reward("clip", model="./nowhere")


def test_latent_lpips_is_a_distance_and_trains(tmp_path):
    torch.manual_seed(0)
    network = LatentLPIPS(width=0.05)
    a, b = torch.randn(6, 4, 16, 16), torch.randn(6, 4, 16, 16)
    assert network(a, a).tolist() == [0.0] * 6
    torch.testing.assert_close(network(a, b), network(b, a))
    assert (network(a, b) > 0).all()
    near, judge = a + 0.1 * b, torch.zeros(6)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = [train_step(network, optimizer, (a, near, b), judge) for _ in range(8)]
    assert losses[-1] < losses[0]
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    again = LatentLPIPS.load(tmp_path / "w.safetensors", width=0.05)
    assert torch.equal(again(a, b), network(a, b))
    with pytest.raises(UserError, match="no latent LPIPS"):
        LatentLPIPS.load(tmp_path / "w.safetensors")


def test_latent_lpips_is_vgg16():
    network = LatentLPIPS()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 13 and convolutions[0].in_channels == 4
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in network.modules()) == 1
