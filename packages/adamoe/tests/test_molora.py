import json

import pytest
import torch
from adamoe import load_balancing_loss, molora, record_load
from adamoe.errors import CheckpointError, ConfigError, ConversionError
from adamoe.molora import MoLoRAConfig, MoLoRALinear, inject, load_adapter, save_adapter
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
        ({"r": 0}, "r 0"),
        ({"num_experts": 0}, "num_experts 0"),
        ({"target_modules": []}, "empty"),
    ],
)
def test_settings(settings, cause):
    with pytest.raises(ConfigError, match=cause):
        MoLoRAConfig(**settings)


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
    with pytest.raises(CheckpointError, match="of another model"):
        load_adapter(dense(hidden_size=16), tmp_path / "a")
    record = json.loads((tmp_path / "a/molora.json").read_text())
    (tmp_path / "a/molora.json").write_text(json.dumps({**record, "wings": 2}))
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(dense(), tmp_path / "a")
    assert molora.FAMILY.score == "softmax"
