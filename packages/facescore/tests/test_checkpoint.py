"""Both layouts, both ways, strictly."""

import json

import pytest
import torch
from facescore.errors import CheckpointError
from facescore.reward.checkpoint import from_official, load_reward, official_state, save_reward, to_official, to_ours
from tenfold_shared.errors import UserError

HEADS = {"vision_heads": 2, "text_heads": 2, "prompt_ids": (2, 5, 6, 7, 3), "pad_to": 12, "text_dropout": 0.0}


@pytest.fixture
def state(reward):
    """A random official state dict, unused projections and all."""
    found = official_state(reward)
    for key in found:
        if "_proj." in key and "attn" not in key:
            found[key] = torch.randn_like(found[key])
    return {k: v.detach() for k, v in found.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_official_state_loads_and_exports_back_exactly(state, reward):
    model = from_official(state, **HEADS)
    assert model.config == reward.config
    assert same(official_state(model), state)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(pixels), reward(pixels))


def test_key_names_are_those_of_the_published_files(state):
    assert {
        "blip.visual_encoder.cls_token", "blip.visual_encoder.blocks.2.attn.qkv.weight", "blip.visual_encoder.norm.bias",
        "blip.text_encoder.encoder.layer.1.crossattention.self.query.weight", "blip.vision_proj.weight",
        "blip.text_encoder.embeddings.position_ids", "mlp.layers.7.bias",
    } <= set(state)  # fmt: skip
    for key in state:
        name = to_ours(key)
        assert name is None or to_official(name) == key or key.endswith("position_ids")


def test_files_round_trip_both_ways(state, reward, tmp_path):
    model = from_official(state, **HEADS)
    a = load_reward(save_reward(model, tmp_path / "a", layout="official"))
    b = load_reward(save_reward(a, tmp_path / "b").parent)
    c = load_reward(save_reward(b, tmp_path / "c", layout="official").parent)
    assert same(official_state(c), state)
    assert json.loads((tmp_path / "a/med_config.json").read_text())["num_attention_heads"] == 2
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(c(pixels), model(pixels))


def test_text_heads_come_from_med_config_alone(make_reward, tmp_path):
    save_reward(make_reward(vision_width=64, vision_heads=1), tmp_path / "a", layout="official")
    (tmp_path / "a/config.json").unlink()
    loaded = load_reward(tmp_path / "a/FS_model.pt")
    assert (loaded.config.text_heads, loaded.config.vision_heads) == (2, 1)


def test_missing_extra_and_ill_shaped_keys_are_listed(state):
    broken = dict(state)
    del broken["blip.visual_encoder.blocks.1.norm1.weight"]
    broken["blip.something.weight"] = torch.zeros(1)
    broken["mlp.layers.0.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        from_official(broken, **HEADS)
    text = str(caught.value)
    assert "1 missing: blip.visual_encoder.blocks.1.norm1.weight" in text
    assert "1 unexpected: blip.something.weight" in text
    assert "mlp.layers.0.bias (3,) instead of (20,)" in text
    with pytest.raises(CheckpointError, match=r"not a reward checkpoint: .* keys are missing"):
        from_official({"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 1 tensors: mlp.layers.7.bias"):
        from_official({**state, "mlp.layers.7.bias": torch.tensor([float("nan")])}, **HEADS)


@pytest.mark.parametrize(
    ("name", "folder", "weights"),
    [
        ("AIGCer-OPPO/FaceScore", "", "FS_model.pt"),
        ("OPPOer/FaceScore", "FaceScore_model", "FS_model.pt"),
        ("THUDM/ImageReward", "", "ImageReward.pt"),
        ("someone/converted", "", "model.safetensors"),
    ],
)
def test_hub_layouts(name, folder, weights, make_reward, tmp_path, monkeypatch):
    """A cache as huggingface_hub keeps it, filled with a small model in the published layouts."""
    import huggingface_hub.constants

    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    model = make_reward(vision_width=64, vision_heads=1, text_width=64, text_heads=1)  # 64 wide heads, as published
    layout = "safetensors" if weights.endswith("safetensors") else "official"
    saved = save_reward(model, tmp_path / "made", layout=layout)
    (snapshot / folder).mkdir(parents=True)
    for file in saved.parent.iterdir():
        if file.name in (saved.name, "med_config.json" if layout == "official" else "config.json"):
            file.rename(snapshot / folder / (weights if file == saved else file.name))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_reward(name)
    assert same({k: v.detach() for k, v in official_state(loaded).items()}, official_state(model))
    pixels, ids = torch.randn(2, 3, 16, 16), [list(model.config.prompt_ids)] * 2
    torch.testing.assert_close(loaded(pixels, ids), model(pixels, ids), rtol=1e-5, atol=1e-6)


class Unsafe:
    def __reduce__(self):
        return print, ("executed",)


def test_damaged_and_unsafe_files(tmp_path, reward, capsys):
    torch.save({"a": Unsafe()}, tmp_path / "unsafe.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    path = save_reward(reward, tmp_path / "ours")
    for name in ("unsafe.pt", "empty.pt", "list.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_reward(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_reward(path)
    (tmp_path / "void").mkdir()
    with pytest.raises(CheckpointError, match="holds neither"):
        load_reward(tmp_path / "void")
    with pytest.raises(UserError, match="does not exist"):
        load_reward(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="neither a file here nor a reward model on the hub"):
        load_reward("nobody/nothing-of-this-name")
    with pytest.raises(UserError, match="layout is 'zip'"):
        save_reward(reward, tmp_path / "x", layout="zip")
    bare = save_reward(reward, tmp_path / "bare")
    (bare.parent / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_reward(bare)
