"""The reward model against an implementation of 2406.17100's architecture in plain torch, written here."""

import math

import pytest
import torch
from facescore.reward.checkpoint import official_state
from facescore.reward.model import RewardHead, RewardModelConfig, normalize_reward
from tenfold_shared.errors import UserError
from torch.nn import functional as F


def layer_norm(x, state, name, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attend(q, k, v, heads, mask=None):
    def split(t):
        return t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2)

    scores = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (scores.softmax(-1) @ split(v)).transpose(1, 2).reshape(q.shape)


def plain_vision(s, pixels, config):
    p = "blip.visual_encoder."
    x = F.conv2d(pixels, s[p + "patch_embed.proj.weight"], s[p + "patch_embed.proj.bias"], stride=config.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([s[p + "cls_token"].expand(len(x), -1, -1), x], 1) + s[p + "pos_embed"]
    for i in range(config.vision_depth):
        b = f"{p}blocks.{i}."
        q, k, v = linear(layer_norm(x, s, b + "norm1", 1e-6), s, b + "attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, config.vision_heads), s, b + "attn.proj")
        x = x + linear(F.gelu(linear(layer_norm(x, s, b + "norm2", 1e-6), s, b + "mlp.fc1")), s, b + "mlp.fc2")
    return layer_norm(x, s, p + "norm", 1e-6)


def plain_text(s, ids, mask, seen, config):
    p = "blip.text_encoder."
    x = s[p + "embeddings.word_embeddings.weight"][ids] + s[p + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = layer_norm(x, s, p + "embeddings.LayerNorm", 1e-12)
    for i in range(config.text_depth):
        b = f"{p}encoder.layer.{i}."
        for kind, source, m in (("attention", None, mask), ("crossattention", seen, None)):
            other = x if source is None else source
            q, k, v = (linear(o, s, f"{b}{kind}.self.{n}") for o, n in ((x, "query"), (other, "key"), (other, "value")))
            out = linear(attend(q, k, v, config.text_heads, m), s, f"{b}{kind}.output.dense")
            x = layer_norm(out + x, s, f"{b}{kind}.output.LayerNorm", 1e-12)
        out = linear(F.gelu(linear(x, s, b + "intermediate.dense")), s, b + "output.dense")
        x = layer_norm(out + x, s, b + "output.LayerNorm", 1e-12)
    return x


def test_forward_equals_plain_torch_in_float64(reward):
    reward.double()
    state, config = official_state(reward), reward.config
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    ids, mask = reward.tokens([config.prompt_ids] * 3)
    seen = plain_vision(state, pixels, config)
    states = plain_text(state, ids, mask, seen, config)
    x = states[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = linear(x, state, f"mlp.layers.{i}")
    with torch.no_grad():
        assert (reward.vision_tokens(pixels) - seen).abs().max() < 1e-10
        assert (reward.feature(seen) - states[:, 0]).abs().max() < 1e-10
        rewards = reward(pixels)
    assert (rewards - x[:, 0]).abs().max() < 1e-10
    assert rewards.std() > 1e-3  # the comparison would mean nothing if the reward did not see the image


def test_collapsed_head_is_the_head(reward):
    feature = torch.randn(50, 24)
    weight, bias = reward.collapse_head()
    torch.testing.assert_close(feature @ weight + bias, reward.head(feature), rtol=1e-5, atol=1e-5)


def test_padding_does_not_change_the_reward(make_reward):
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(make_reward()(pixels), make_reward(pad_to=5)(pixels), rtol=1e-5, atol=1e-6)


def test_new_heads_start_as_the_original_ones():
    torch.manual_seed(0)
    head = RewardHead(768, (1024, 128, 64, 16, 1))
    for layer in (head.layers[i] for i in (0, 2, 4, 6)):
        assert layer.weight.std().item() == pytest.approx(1 / 769, rel=0.1)
        assert not layer.bias.any()


def test_prompt_changes_the_reward_and_half_precision_gives_float32(reward):
    pixels = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(reward(pixels), reward(pixels, [[2, 9, 9, 3]] * 2))
    assert reward.bfloat16().feature(torch.randn(1, 17, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_image_reward_scale():
    assert normalize_reward(torch.tensor(0.16717362830052426)).item() == pytest.approx(0, abs=1e-7)
    assert normalize_reward(torch.tensor(1.2005131247969)).item() == pytest.approx(1, abs=1e-6)


def test_errors(reward):
    with pytest.raises(UserError, match=r"expected \(batch, 3, 16, 16\)"):
        reward(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="do not divide"):
        RewardModelConfig(vision_width=10, vision_heads=3)
    with pytest.raises(UserError, match=r"unknown fields.*colour"):
        RewardModelConfig.from_dict({"colour": 1})
