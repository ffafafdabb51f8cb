import json

import pytest
import torch
from adamoe import LoadController, calibrate, convert, export, load_balancing_loss, molora, record_load, revert, routers
from adamoe.conversion import layer_routers
from adamoe.errors import CheckpointError, ConfigError, ConversionError
from adamoe.molora import MoLoRAConfig, MoLoRALinear, inject, load_adapter, save_adapter
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


def dense(**settings):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()


def noisy(model):
    for layer in model.modules():
        if isinstance(layer, MoLoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


@torch.no_grad()
def test_with_b_zero_it_is_the_model(tokens):
    model = dense()
    before = model(tokens).logits
    inject(model, MoLoRAConfig())
    assert torch.equal(model(tokens).logits, before)
    assert sum(isinstance(m, MoLoRALinear) for m in model.modules()) == 14


@torch.no_grad()
def test_a_layer_against_the_formula():
    layer = MoLoRALinear(
        torch.nn.Linear(6, 5), MoLoRAConfig(num_experts=3, num_null_experts=2, top_k=3, r=2, lora_alpha=4)
    )
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 6)
    expected = []
    for row in x.view(-1, 6):
        z = torch.cat((layer.weight, layer.null_weight)) @ row
        chosen = [i for i in z.topk(3)[1].tolist() if i < 3]
        y = layer.base(row)
        for i in chosen:
            share = z[i].exp() / sum(z[j].exp() for j in chosen)
            y = y + share * 2.0 * layer.lora_B[i] @ (layer.lora_A[i] @ row)
        expected.append(y)
    assert torch.allclose(layer(x), torch.stack(expected).view(2, 4, 5), atol=1e-5)


def test_the_loss_reaches_the_router(tokens):
    """With B = 0 the adapters move no logit, and still the router's rows, the nulls' too, have a gradient: eq. 6's."""
    model = inject(dense(), MoLoRAConfig(aux_coef=(0.1, 0.1)))
    plain = float(model(tokens, labels=tokens).loss)
    model.train()
    output = model(tokens, labels=tokens)
    output.loss.backward()
    layers = [m for m in model.modules() if isinstance(m, MoLoRALinear)]
    assert all(m.weight.grad.any() and m.null_weight.grad.any() for m in layers)
    assert all(p.grad is None for name, p in model.named_parameters() if ".base." in name)
    logits = []
    for m in layers:
        m.register_forward_pre_hook(
            lambda m, args: logits.append(m.route(args[0].reshape(-1, args[0].shape[-1])).logits)
        )
    model.eval()(tokens)
    aux = load_balancing_loss(logits, 4, top_k=4)
    assert float(output.loss) - plain == pytest.approx(0.1 * float(aux), rel=1e-3)


def test_load_and_record(tokens):
    model = inject(dense(), MoLoRAConfig(num_null_experts=12))
    with record_load(model, token_ids=tokens) as record, torch.no_grad():
        model(tokens)
    assert record.per_token.shape == (14, 2, 12) and 0 < record.mean < 4


@torch.no_grad()
def test_all_null_is_the_base_model(tokens):
    model = noisy(inject(dense(), MoLoRAConfig()))
    before = dense()(tokens).logits
    assert not torch.allclose(model(tokens).logits, before)
    for m in model.modules():
        if isinstance(m, MoLoRALinear):
            m.null_bias.fill_(torch.inf)
            m.adamoe_top_k = 4
    assert torch.equal(model(tokens).logits, before)


@torch.no_grad()
def test_adapters_are_saved_and_loaded(tmp_path, tokens):
    model = noisy(inject(dense(), MoLoRAConfig(r=4, target_modules=["q_proj", "up_proj"])))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(dense(), tmp_path / "adapter")
    assert torch.equal(again(tokens).logits, model(tokens).logits) and again.molora == model.molora


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"top_k": 10}, "top_k is 10"),
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, r"r is 2\.5"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_null_experts": -1}, "num_null_experts is -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"aux_coef": (-1, 0)}, "aux_coef"),
        ({"target_modules": []}, "empty"),
        ({"target_modules": "q_proj"}, "expected a list"),
    ],
)
def test_settings(settings, cause):
    with pytest.raises(ConfigError, match=cause):
        MoLoRAConfig(**settings)


def test_one_knob_for_all_models(tokens):
    """Calibration, the controller and an empty batch, as for a mixture of experts."""
    model = inject(dense(), MoLoRAConfig(num_null_experts=12))
    assert calibrate(model, [tokens], target_load=1.5, tolerance=0.1) == pytest.approx(1.5, abs=0.1)
    controller = LoadController(model.train(), 1.0)
    model(tokens, labels=tokens)
    before = [float(r.null_bias) for r in layer_routers(model)]
    loads = controller.step()
    after = [float(r.null_bias) for r in layer_routers(model)]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx(
        [0.05 * (v - 1) for v in loads], abs=1e-6
    )
    layer = model.model.layers[0].self_attn.q_proj
    assert layer(torch.zeros(0, 3, 32)).shape == (0, 3, 32)


def test_what_is_not_for_mixtures_of_lora(tmp_path, tokens):
    """Each refusal leaves the model as it was."""
    model = noisy(inject(dense(), MoLoRAConfig()))
    before = model(tokens).logits
    for action, cause in (
        (convert, "nulls of their own"),
        (revert, "load the dense model anew"),
        (lambda m: routers.use(m, routers.top_p), "no null routers"),
        (lambda m: export(m, tmp_path / "x"), "save_adapter"),
    ):
        with pytest.raises(ConversionError, match=cause):
            action(model)
    assert torch.equal(model(tokens).logits, before) and not (tmp_path / "x").exists()


def test_errors(tmp_path):
    with pytest.raises(ConversionError, match="no linear layer is called wings"):
        inject(dense(), MoLoRAConfig(target_modules=["wings"]))
    with pytest.raises(ConversionError, match="no mixtures"):
        save_adapter(dense(), tmp_path / "x")
    model = inject(dense(), MoLoRAConfig())
    with pytest.raises(ConversionError, match="already"):
        inject(model, MoLoRAConfig())
    with pytest.raises(CheckpointError, match=r"no molora\.json"):
        load_adapter(dense(), tmp_path)
    save_adapter(model, tmp_path / "a")
    other = dense(hidden_size=16)
    with pytest.raises(CheckpointError, match="of another model"):
        load_adapter(other, tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter.safetensors")
    key = next(k for k in tensors if k.endswith("lora_B"))
    save_file({**tensors, key: tensors[key] * float("nan")}, tmp_path / "a/adapter.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_adapter(other := dense(), tmp_path / "a")
    assert not any(isinstance(m, MoLoRALinear) for m in other.modules()), "and nothing was put into the model"
    record = json.loads((tmp_path / "a/molora.json").read_text())
    (tmp_path / "a/molora.json").write_text(json.dumps({**record, "wings": 2}))
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(dense(), tmp_path / "a")
    assert molora.FAMILY.score == "softmax"
