import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from adamoe import AdaMoEConfig, convert, families, record_load, register, revert, set_load
from adamoe.config import preserving_top_k
from adamoe.conversion import layer_routers
from adamoe.errors import ConfigError, ConversionError, UnknownFamilyError
from tiny_mixtures import OWN, TIER_1, build, converted

PRESERVED = 1e-4


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_without_nulls_it_is_the_stock_model_bit_for_bit(name, tokens):
    model = build(name)
    before = model(tokens).logits
    convert(model, AdaMoEConfig(num_null_experts=0))
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_conversion_keeps_the_function_and_revert_every_bit(name, tokens):
    model = build(name)
    state, before = copy.deepcopy(model.state_dict()), model(tokens).logits
    for m in (8, 16, 24):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(model, AdaMoEConfig(num_null_experts=m))
        assert model.config.adamoe["top_k"] == preserving_top_k(8, m, 2)[0]
        assert (model(tokens).logits - before).abs().max() < PRESERVED
        with record_load(model) as record:
            model(tokens)
        assert record.mean == 2
        revert(model)
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
        assert torch.equal(model(tokens).logits, before) and not hasattr(model.config, "adamoe")


@pytest.mark.parametrize("name", TIER_1)
@pytest.mark.parametrize(
    "kernel", ["adamoe_loop", "adamoe_grouped", "adamoe_static", "eager", "grouped_mm", "batched_mm"]
)
@torch.no_grad()
def test_every_kernel_keeps_the_function(name, kernel, tokens):
    k0s = (2,) if name == "phimoe" else (1, 2, 4, 8)  # phimoe's own router is written for two
    for k0 in k0s:
        model = build(name, num_experts_per_tok=k0)
        before = model(tokens).logits
        for r in (1, 2, 3):
            convert(model, AdaMoEConfig(num_null_experts=8 * r, experts_implementation=kernel))
            assert (model(tokens).logits - before).abs().max() < PRESERVED, (k0, r)
            revert(model)


def router_outputs(model, tokens):
    """(logits, weights, index) of every router in one pass."""
    found = []
    routers = [m for m in model.modules() if "TopK" in type(m).__name__ or "Topk" in type(m).__name__]
    handles = [r.register_forward_hook(lambda module, args, output: found.append(output)) for r in routers]
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_ties_in_bfloat16_go_as_the_stock_router_has_them_go(name):
    """Two true experts often tie there, and which of them stock takes is no rule: the first layer's choice is the same."""
    tokens = torch.randint(3, 40, (8, 37), generator=torch.Generator().manual_seed(1))
    model = build(name)
    for parameter in model.parameters():
        parameter.copy_((parameter * 8).round() / 8)  # coarse weights tie more often
    model.bfloat16()
    before = router_outputs(model, tokens)[0][2]
    for m in (8, 16):
        convert(model, AdaMoEConfig(num_null_experts=m))
        index = router_outputs(model, tokens)[0][2]
        assert [sorted(i for i in row if i < 8) for row in index.tolist()] == [sorted(row) for row in before.tolist()]
        revert(model)


@torch.no_grad()
def test_experts_outside_the_chosen_groups_stay_out():
    """Also where K is more than true and null experts in the groups: 8 of 16 in one of two groups, K is 12."""
    model = build("deepseek_v3")
    with pytest.warns(UserWarning, match="changes the function"):
        convert(model, AdaMoEConfig(top_k=12))
    tokens = torch.arange(3, 39).view(2, 18)
    for _, weights, index in router_outputs(model, tokens):
        groups = [{i // 4 for i in row if i < 8} for row in index.tolist()]
        assert all(len(g) == 1 for g in groups) and weights.isfinite().all()
    with record_load(model) as record:
        model(tokens)
    assert record.mean == 4


def test_one_expert(tokens):
    model = build("qwen2_moe", num_experts=1, num_experts_per_tok=1)
    before = model(tokens).logits
    assert torch.equal(convert(model, AdaMoEConfig(num_null_experts=3))(tokens).logits, before)
    assert model.config.adamoe["top_k"] == 1


def test_a_converted_model_is_pickled(tmp_path, tokens):
    """As whole models are sent between processes; loaded models and the registered class too."""
    from adamoe import export, from_pretrained

    model = converted(noise=0.3)
    export(model, tmp_path / "a")
    export(model, tmp_path / "b", "registered")
    for one in (model, from_pretrained(tmp_path / "a"), from_pretrained(tmp_path / "b")):
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is type(one) and torch.equal(again(tokens).logits, one(tokens).logits)


def test_the_null_bias_keeps_its_digits():
    """The controller's steps, 0.05 times a small difference, would be lost in bfloat16."""
    model = set_load(converted(), null_bias=0.123456)
    model.bfloat16()
    for router in layer_routers(model):
        assert router.weight.dtype == torch.bfloat16
        assert router.null_bias.dtype == torch.float32 and float(router.null_bias) == pytest.approx(0.123456, abs=1e-7)


def test_float32_routers_stay_float32_under_autocast(tokens):
    """Ernie switches autocast off in its router; so do its null rows."""
    model = build("ernie4_5_moe")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = router_outputs(model, tokens)[0][0]
        convert(model)
        after = router_outputs(model, tokens)[0][0]
    assert before.dtype == after.dtype == torch.float32 and torch.equal(after[:, :8], before)


def test_which_k_keeps_the_function(mixtral, tokens):
    """Both ends of the interval keep it, one beyond does not, and that is said."""
    before = mixtral(tokens).logits
    assert [preserving_top_k(8, 8 * r, 2)[0] for r in range(1, 7)] == [3, 4, 5, 6, 7, 8]
    for m, k, same in (
        (8, 2, False),
        (8, 3, True),
        (8, 4, True),
        (8, 5, False),
        (32, 4, False),
        (32, 6, True),
        (40, 8, True),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            convert(mixtral, AdaMoEConfig(num_null_experts=m, top_k=k))
        assert bool([w for w in said if "changes the function" in str(w.message)]) is not same
        assert bool((mixtral(tokens).logits - before).abs().max() < PRESERVED) is same, (m, k)
        revert(mixtral)


@torch.no_grad()
def test_nulls_that_never_win_leave_the_stock_router(mixtral, tokens):
    before = mixtral(tokens).logits
    with pytest.warns(UserWarning, match="changes the function"):
        convert(mixtral, AdaMoEConfig(top_k=2))
    for router in layer_routers(mixtral):
        router.null_bias.fill_(-torch.inf)
    assert (mixtral(tokens).logits - before).abs().max() < 1e-6


def test_the_chosen_k_is_named(mixtral, caplog):
    with caplog.at_level("INFO", logger="adamoe"):
        convert(mixtral, AdaMoEConfig(num_null_experts=16))
    assert "2 layers have 16 null experts; K is 4" in caplog.text and mixtral.config.adamoe["top_k"] == 4


@pytest.mark.parametrize("init", ["copy_noise", "zeros", "bias"])
def test_other_initialisations(init, mixtral, tokens):
    convert(mixtral, AdaMoEConfig(null_init=init))
    with record_load(mixtral) as record:
        mixtral(tokens)
    assert 0 <= record.mean <= 3
    rows = next(layer_routers(mixtral)).null_weight
    assert bool(rows.any()) is (init == "copy_noise")


@torch.no_grad()
def test_identity_nulls_return_the_token(tokens):
    """With every slot a null, a layer gives the sum of the weights, 1, times its input."""
    model = converted(null_type="identity")
    for router in layer_routers(model):
        router.null_bias.fill_(torch.inf)
    layer = model.model.layers[0].mlp
    hidden = torch.randn(1, 5, 32)
    assert torch.allclose(layer(hidden), hidden, atol=1e-6)
    revert(model)
    assert not torch.allclose(layer(hidden), hidden)


def test_causal(tokens):
    """Later tokens change no earlier load."""
    model = converted(noise=0.3)
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 7) % 37 + 3
    loads = []
    for ids in (tokens, other):
        with record_load(model, token_ids=ids) as record, torch.no_grad():
            model(ids)
        loads.append(record.per_token)
    assert torch.equal(loads[0][:, :, :6], loads[1][:, :, :6])
    assert not torch.equal(loads[0], loads[1])


@pytest.mark.parametrize("kernel", ["adamoe", "adamoe_grouped", "grouped_mm", "eager"])
def test_cached_and_uncached_greedy_decoding_agree(kernel, tokens):
    model = converted(noise=0.3, experts_implementation=kernel)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        cached, uncached = (model.generate(tokens, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, uncached)


def test_on_the_meta_device():
    from transformers import AutoModelForCausalLM

    config = build().config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    convert(model)
    assert {r.null_weight.device.type for r in layer_routers(model)} == {"meta"}


def test_compiled_without_a_break(tokens):
    """ "adamoe" is static while compiling; one graph gives what the loop gives."""
    model = converted(noise=0.3)
    layer = model.model.layers[0].mlp
    hidden = torch.randn(2, 6, 32)
    with torch.no_grad():
        plain = layer(hidden)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")(hidden)
    assert torch.allclose(plain, compiled, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"num_null_experts": -1}, "num_null_experts is -1"),
        ({"num_null_experts": 2.5}, "num_null_experts is 2.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 17}, "top_k is 17 with 8 true and 8 null"),
        ({"num_null_experts": 9}, "take a multiple of 8"),
        ({"num_null_experts": 0, "top_k": 9}, "take at most 8"),
        ({"null_init": "ones"}, "null_init is 'ones'"),
        ({"aux_coef": (0.1,)}, "aux_coef"),
        ({"aux_coef": (float("nan"), 0)}, "aux_coef"),
        ({"anneal_at": 2}, "anneal_at is 2"),
        ({"aux_coef": 3}, "aux_coef is 3"),
        ({"aux_coef": ("a", "b")}, "aux_coef"),
        ({"anneal_at": "half"}, "anneal_at is 'half'"),
        ({"target_load": -1}, "target_load is -1"),
        ({"target_load": "low"}, "target_load is 'low'"),
        ({"target_load": 9}, "target_load is 9, the model can have 0 to 3"),
        ({"top_k": 12, "target_load": 1}, "the model can have 4 to 8"),
    ],
)
def test_settings_out_of_range(settings, cause, mixtral):
    with pytest.raises(ConfigError, match=cause):
        convert(mixtral, AdaMoEConfig(**settings))
    assert not hasattr(mixtral.config, "adamoe")


def test_an_unknown_setting():
    with pytest.raises(ConfigError, match="no setting nulls"):
        AdaMoEConfig.from_dict({"nulls": 3})
    with pytest.raises(ConfigError, match="expected names and values"):
        AdaMoEConfig.from_dict("nulls")


def test_models_that_cannot_be_converted(mixtral):
    from transformers import LlamaConfig, LlamaForCausalLM

    convert(mixtral)
    with pytest.raises(ConversionError, match="already has null experts; call revert"):
        convert(mixtral)
    revert(mixtral)
    with pytest.raises(ConversionError, match="no null experts"):
        revert(mixtral)
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ConversionError, match=r"use adamoe\.molora"):
        convert(dense)
    with pytest.raises(ConversionError, match="Linear is not a model of transformers"):
        convert(torch.nn.Linear(2, 2))
    mixtral.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConversionError, match="quantised"):
        convert(mixtral)
    del mixtral.config.quantization_config
    mixtral.config.model_type = "martian_moe"
    register()
    with pytest.raises(UnknownFamilyError, match=r"'martian_moe'.*mixtral.*adamoe.families.register") as said:
        convert(mixtral)
    assert "adamoe_mixtral" not in str(said.value)


def test_a_family_of_ones_own(mixtral, tokens):
    """A subclass of another type is a family as soon as it is registered."""
    mixtral.config.model_type = "cousin"
    module = "transformers.models.mixtral.modeling_mixtral"
    families.register(families.Family("cousin", "MixtralTopKRouter", modelling=module))
    try:
        before = mixtral(tokens).logits
        assert (convert(mixtral)(tokens).logits - before).abs().max() < PRESERVED
    finally:
        del families.FAMILIES["cousin"]


def test_phimoe_does_not_train_with_nulls(tokens):
    model = converted("phimoe")
    model.train()
    with pytest.raises(ConversionError, match="samples experts while training"):
        model(tokens)


def test_import_is_light():
    code = "import sys, adamoe, adamoe.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_names_of_the_interface():
    code = "from adamoe import AdaMoEConfig, convert, revert, load_balancing_loss, count_flops, record_load, calibrate, from_pretrained"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
