"""What is written is read back, by us and by the stock library."""

import json
import shutil

import pytest
import torch
from adamoe import AdaMoEConfig, calibrate, convert, export, from_pretrained, register
from adamoe.conversion import is_converted, layer_routers
from adamoe.errors import CheckpointError, ConfigError, ConversionError
from safetensors.torch import load_file, save_file
from tenfold_shared.errors import UserError
from tiny_mixtures import OWN, build, converted
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_in_place_round_trip_and_the_stock_library(name, tmp_path, tokens):
    model = build(name)
    stock = model(tokens).logits
    convert(model, AdaMoEConfig(num_null_experts=16))
    for router in layer_routers(model):
        router.null_weight.add_(0.2 * torch.randn_like(router.null_weight))
        router.null_bias.fill_(0.05)
    ours = model(tokens).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(build(name)).__name__] and config["model_type"] == name
    again = from_pretrained(tmp_path)
    # Where the loader puts a tensor in memory can change the last bit of a product.
    assert torch.allclose(again(tokens).logits, ours, atol=1e-6) and again.config.adamoe["top_k"] == 4
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    again.save_pretrained(tmp_path / "twice")
    assert load_file(tmp_path / "twice/model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    assert json.loads((tmp_path / "twice/config.json").read_text())["architectures"] == config["architectures"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_converted(plain) and torch.allclose(plain(tokens).logits, stock, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
@torch.no_grad()
def test_registered_classes(name, tmp_path, tokens):
    register()
    model = converted(name, noise=0.2)
    export(model, tmp_path / "a", "registered")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert type(again).__name__.startswith("AdaMoE") and again.config.model_type == f"adamoe_{name}"
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(from_pretrained(tmp_path / "b")(tokens).logits, model(tokens).logits)
    again.set_experts_implementation("eager")
    assert torch.allclose(again(tokens).logits, model(tokens).logits, atol=1e-5)


@torch.no_grad()
def test_the_official_layout(tmp_path, tokens):
    """`gate2` is written and read, with our settings and without; from there every other layout can be written."""
    model = converted(noise=0.2, num_null_experts=16)
    ours = model(tokens).logits
    export(model, tmp_path / "official", "official")
    keys = load_file(tmp_path / "official/model.safetensors").keys()
    assert "model.layers.1.block_sparse_moe.gate2.weight" in keys and not any("null" in key for key in keys)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in keys
    config = json.loads((tmp_path / "official/config.json").read_text())
    del config["adamoe"]
    (tmp_path / "official/config.json").write_text(json.dumps(config))
    again = from_pretrained(tmp_path / "official")
    assert torch.equal(again(tokens).logits, ours) and again.config.adamoe["top_k"] == 4
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(from_pretrained(tmp_path / "ours")(tokens).logits, ours)
    export(again, tmp_path / "stock", "stock")
    left = load_file(tmp_path / "stock/model.safetensors").keys()
    assert not any("gate2" in key or "null" in key for key in left)
    assert "adamoe" not in json.loads((tmp_path / "stock/config.json").read_text())


@torch.no_grad()
def test_in_shards(tmp_path, tokens):
    model = converted(noise=0.2)
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    assert (tmp_path / "a/model.safetensors.index.json").exists()
    assert torch.equal(from_pretrained(tmp_path / "a")(tokens).logits, model(tokens).logits)


def test_a_stock_checkpoint_is_converted_on_the_way(tmp_path, mixtral, tokens):
    mixtral.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no null experts; pass adamoe_config"):
        from_pretrained(tmp_path)
    model = from_pretrained(tmp_path, adamoe_config=AdaMoEConfig())
    assert torch.allclose(model(tokens).logits, mixtral(tokens).logits, atol=1e-5)


def test_the_calibrated_bias_is_saved(tmp_path, tokens):
    model = converted(noise=0.3)
    load = calibrate(model, [tokens], target_load=1.25, tolerance=0.1)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert [float(r.null_bias) for r in layer_routers(again)] == [float(r.null_bias) for r in layer_routers(model)]
    assert load == pytest.approx(1.25, abs=0.1)


def test_a_lost_bias_is_zero_and_lost_rows_are_an_error(tmp_path, tokens):
    model = converted(noise=0.3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "null_bias" not in k}, file, metadata={"format": "pt"})
    assert torch.equal(from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    save_file(
        {k: v for k, v in tensors.items() if "layers.1" not in k or "null" not in k}, file, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="null_weight"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"num_null_experts": 16}, "num_null_experts 8, adamoe_config says 16"),
        ({"top_k": 4}, "top_k 3, adamoe_config says 4"),
        ({"null_type": "identity"}, "null_type zero"),
        ({"weight_normalization": "none"}, "weight_normalization auto"),
    ],
)
def test_settings_that_are_not_the_checkpoints(settings, cause, tmp_path):
    converted().save_pretrained(tmp_path)
    export(converted(), tmp_path / "registered", "registered")
    for folder in (tmp_path, tmp_path / "registered"):
        with pytest.raises(CheckpointError, match=cause):
            from_pretrained(folder, adamoe_config=AdaMoEConfig(**settings))
        trained = from_pretrained(folder, adamoe_config=AdaMoEConfig(aux_coef=(0.5, 0.1), target_load=1))
        assert trained.adamoe.coefficient == 0.5 and trained.config.adamoe["top_k"] == 3
    config = json.loads((tmp_path / "config.json").read_text())
    config["adamoe"]["num_null_experts"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="8 null rows a layer, the settings say 24"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ("eight", "expected names and values"),
        ([1, 2], "expected names and values"),
        ({"nulls": 3}, "no setting nulls"),
        ({"aux_coef": 3}, "aux_coef is 3"),
        ({"anneal_at": "x"}, "anneal_at is 'x'"),
        ({"top_k": [3]}, r"top_k is \[3\]"),
        ({"top_k": 99}, "top_k is 99 with 8 true and 8 null"),
    ],
)
def test_damaged_settings(values, cause, tmp_path):
    converted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["adamoe"] = {**config["adamoe"], **values} if isinstance(values, dict) else values
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=cause):
        from_pretrained(tmp_path)


def test_rows_that_are_not_numbers(tmp_path):
    model = converted()
    next(layer_routers(model)).null_weight.data[2, 3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not numbers"):
        from_pretrained(tmp_path)


@torch.no_grad()
def test_every_layout_from_the_registered_one(tmp_path, tokens):
    model = converted(noise=0.2)
    ours = model(tokens).logits
    export(model, tmp_path / "a", "registered")
    again = from_pretrained(tmp_path / "a")
    for layout in ("in_place", "official", "registered"):
        export(again, tmp_path / layout, layout)
        assert torch.equal(from_pretrained(tmp_path / layout)(tokens).logits, ours)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "in_place")
    assert not is_converted(plain) and type(plain).__name__ == "MixtralForCausalLM"


@torch.no_grad()
def test_the_kernel_that_is_asked_for_on_loading(tmp_path, mixtral, tokens):
    mixtral.save_pretrained(tmp_path / "stock")
    export(converted(noise=0.2), tmp_path / "ours")
    for folder, config in ((tmp_path / "ours", None), (tmp_path / "stock", AdaMoEConfig())):
        model = from_pretrained(folder, adamoe_config=config, experts_implementation="eager")
        assert model.config._experts_implementation == "eager" and model(tokens).logits.isfinite().all()


def test_a_model_with_lora_in_it_is_merged_first(tmp_path, tokens):
    from adamoe.finetuning import with_lora

    model = with_lora(converted(noise=0.2)).eval()
    with pytest.raises(ConversionError, match="merge_and_unload"):
        export(model, tmp_path / "x")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
        ours = model(input_ids=tokens).logits
        export(model.merge_and_unload(), tmp_path / "x")
        assert torch.allclose(from_pretrained(tmp_path / "x")(tokens).logits, ours, atol=1e-4)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        from_pretrained(tmp_path / "empty")
    converted().save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="damaged"):
        from_pretrained(tmp_path / "cut")
    with pytest.raises(UserError, match="neither a folder here nor a model"):
        from_pretrained("nobody/nothing")


def test_layouts_that_cannot_hold_the_model(tmp_path, mixtral):
    with pytest.raises(ConversionError, match="no null experts"):
        export(mixtral, tmp_path / "x")
    model = convert(mixtral)
    with pytest.raises(CheckpointError, match="layout is 'zip'"):
        export(model, tmp_path / "x", "zip")
    next(layer_routers(model)).null_bias.fill_(1.0)
    with pytest.raises(CheckpointError, match="no place for a null bias"):
        export(model, tmp_path / "x", "official")
    with pytest.raises(CheckpointError, match="is Mixtral's"):
        export(converted("olmoe"), tmp_path / "x", "official")
    assert not (tmp_path / "x").exists()


def test_export_replaces_a_folder_whole(tmp_path):
    model = converted()
    export(model, tmp_path / "out")
    shutil.copy(tmp_path / "out/config.json", tmp_path / "out/stray.json")
    export(model, tmp_path / "out", "stock")
    assert not (tmp_path / "out/stray.json").exists()
