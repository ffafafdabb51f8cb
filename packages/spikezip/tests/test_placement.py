import pytest
import torch
from small_models import FAMILIES, IMAGES, TEXT, timm_vit, torchvision_vit, transformers_model
from spikezip import QuantConfig, calibrate, quantize
from spikezip.errors import QuantizationError
from spikezip.qann.calibration import METHODS, call
from spikezip.qann.placement import build
from spikezip.qann.quantizer import quantizers
from tenfold_shared.errors import UserError
from torch import nn
from torch.nn import functional as F


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_enough_quantisers_give_the_model_itself(family):
    """The identity of placement: with very many levels nothing but the attention's form is left."""
    make, inputs = FAMILIES[family]
    model = make()
    qann = quantize(model, QuantConfig(levels=1 << 20))
    calibrate(qann, [inputs], method="mse")
    for quantizer in quantizers(qann).values():
        quantizer.s.data *= 1.1
    with torch.no_grad():
        wanted, got = call(model, inputs), call(qann, inputs)
    assert torch.allclose(got, wanted, atol=2e-3 * float(wanted.abs().max()) + 1e-4)


def test_the_original_is_left_alone():
    model = timm_vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantize(model)
    assert model.state_dict().keys() == before.keys() and not quantizers(model)
    text = transformers_model("Bert")
    quantize(text)
    assert text.config._attn_implementation != "spikezip"


def test_official_names_and_bounds():
    qann = quantize(timm_vit(), QuantConfig(levels=32, attn_levels=16))
    names = set(qann.state_dict())
    for name in (
        "patch_embed.proj.0.weight", "patch_embed.proj.1.s", "blocks.0.norm1.0.weight", "blocks.0.norm1.1.s",
        "blocks.0.attn.qkv.weight", "blocks.0.attn.quan_q.s", "blocks.0.attn.quan_k.s", "blocks.0.attn.quan_v.s",
        "blocks.0.attn.attn_quan.s", "blocks.0.attn.after_attn_quan.s", "blocks.0.attn.quan_proj.s", "blocks.0.mlp.act.0.s",
        "blocks.0.mlp.fc2.0.weight", "blocks.0.mlp.fc2.1.s", "norm.0.weight", "norm.1.s", "head.weight",
    ):  # fmt: skip
        assert name in names
    found = quantizers(qann)
    assert (found["blocks.0.attn.quan_q"].lo, found["blocks.0.attn.quan_q"].hi) == (-8, 7)
    assert (found["blocks.0.attn.attn_quan"].lo, found["blocks.0.attn.attn_quan"].hi) == (0, 15)
    assert (found["blocks.0.mlp.act.0"].lo, found["blocks.0.mlp.act.0"].hi) == (0, 31)
    assert (found["norm.1"].lo, found["norm.1"].hi) == (-16, 15)


def test_language_placement():
    names = [n for n in quantizers(quantize(transformers_model("Roberta"))) if "layer.0" in n or "layer" not in n]
    assert "roberta.embeddings.LayerNorm.1" in names and "classifier.act.1" in names
    assert sum("spike_core" in n for n in names) == 5
    assert sum(n.endswith(("output.dense.1", "output.LayerNorm.1", "intermediate_act_fn.1")) for n in names) == 5


def test_relu_replaces_the_activation_on_demand():
    qann = quantize(timm_vit(nn.GELU), QuantConfig(activation="relu"))
    assert isinstance(qann.blocks[0].mlp.act[1], nn.ReLU) and qann.blocks[0].mlp.act[0].lo == 0


def test_skip_leaves_modules_alone():
    qann = quantize(timm_vit(), QuantConfig(skip=["blocks.0.*"]))
    assert not any(name.startswith("blocks.0.") for name in quantizers(qann))


def test_encoder_layer_takes_no_fused_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    qann = quantize(nn.ModuleDict({"layer": layer}))["layer"]
    calls = []
    qann.self_attn.qk.register_forward_hook(lambda *a: calls.append(1))
    for quantizer in quantizers(qann).values():
        quantizer.s.data.fill_(1e-4)
        quantizer.lo, quantizer.hi = -(1 << 22), 1 << 22
    with torch.no_grad():
        got, wanted = qann(x, src_key_padding_mask=padding), layer(x, src_key_padding_mask=padding)
    assert (
        calls and torch.allclose(got[0], wanted[0], atol=2e-3) and torch.allclose(got[1, :3], wanted[1, :3], atol=2e-3)
    )


def test_masks_mean_what_the_libraries_mean():
    """Boolean masks mark what is seen in timm and what is hidden in torch; causal ones hide what comes later."""
    from spikezip.qann.attention import MultiheadAttention, TimmAttention
    from timm.layers.attention import Attention

    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 8), torch.eye(5).roll(1, 1).bool() | torch.eye(5).bool()
    ours, theirs = Attention(8, num_heads=2).eval(), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    fine = {"levels": 1 << 20, "attn_levels": 1 << 20}
    timm_like, torch_like = TimmAttention(ours, **fine).eval(), MultiheadAttention(theirs, **fine).eval()
    for quantizer in (*quantizers(timm_like).values(), *quantizers(torch_like).values()):
        quantizer.s.data.fill_(1e-4)
    with torch.no_grad():
        assert torch.allclose(timm_like(x, attn_mask=mask), ours(x, attn_mask=mask), atol=2e-3)
        assert torch.allclose(timm_like(x, is_causal=True), ours(x, is_causal=True), atol=2e-3)
        assert torch.allclose(torch_like(x, x, x, attn_mask=~mask)[0], theirs(x, x, x, attn_mask=~mask)[0], atol=2e-3)
        assert not torch.allclose(ours(x, attn_mask=mask), ours(x), atol=1e-2), "or the masks show nothing"


@pytest.mark.parametrize("make", [timm_vit, torchvision_vit, lambda: transformers_model("DistilBert")])
def test_an_architecture_is_rebuilt_from_its_description(make):
    model = make()
    again = build(quantize(model).spike_origin)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_calibration_sets_every_step_and_reports(method, per_channel):
    qann = quantize(timm_vit(), QuantConfig(per_channel=per_channel))
    report = calibrate(qann, [IMAGES, (IMAGES, torch.zeros(3))], method=method)
    assert [c.name for c in report] == list(quantizers(qann))
    assert all(bool((q.s > 0).all()) for q in quantizers(qann).values())
    assert all(0 <= c.clipped < 0.8 and c.error < 1.5 and c.step > 0 for c in report)


def test_calibration_rules_by_hand():
    qann = quantize(timm_vit())
    with torch.no_grad():
        conv = timm_vit().patch_embed.proj(IMAGES)
    calibrate(qann, [IMAGES], method="lsq")
    assert qann.patch_embed.proj[1].s.item() == pytest.approx(2 * conv.abs().mean().item() / 7**0.5, rel=1e-5)
    errors = {c.name: c.error for c in calibrate(qann, [IMAGES], method="lsq")}
    better = {c.name: c.error for c in calibrate(qann, [IMAGES], method="mse")}
    assert sum(better.values()) < sum(errors.values())


def test_percentile_clips_an_outlier_and_says_so():
    x = torch.randn(20, 1, 8, 8)
    x[0, 0, 0, 0] = 1e4
    qann = quantize(timm_vit())
    report = {c.name: c for c in calibrate(qann, [x], method="percentile")}
    wide = {c.name: c for c in calibrate(quantize(timm_vit()), [x], method="mse")}
    assert 0 < report["patch_embed.proj.1"].clipped < 0.05
    assert report["patch_embed.proj.1"].step < wide["patch_embed.proj.1"].step


# Errors


def test_nothing_to_quantise_and_quantised_already():
    with pytest.raises(QuantizationError, match="Linear has no layer"):
        quantize(nn.Linear(2, 2))
    with pytest.raises(QuantizationError, match="already"):
        quantize(quantize(timm_vit()))


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Mixer(FusedAttention):
    """The same under a name that does not give it away."""


def test_unsupported_attention_is_named():
    model = nn.Sequential(nn.LayerNorm(8), nn.ModuleDict({"self": FusedAttention()})["self"])
    with pytest.raises(QuantizationError, match="1: attention of class FusedAttention"):
        quantize(model)


def test_a_fused_product_is_found_out_at_calibration():
    qann = quantize(nn.Sequential(nn.LayerNorm(8), Mixer()))
    with pytest.raises(QuantizationError, match=r"1 \(Mixer\).*scaled_dot_product_attention"):
        calibrate(qann, [torch.randn(2, 3, 8)])


def test_cross_attention_is_refused():
    from spikezip.qann.attention import MultiheadAttention

    attention = MultiheadAttention(nn.MultiheadAttention(8, 2), levels=16, attn_levels=16)
    x = torch.randn(3, 1, 8)
    with pytest.raises(QuantizationError, match="cross-attention"):
        attention(x, x + 1, x)
    with pytest.raises(QuantizationError, match=r"0: nn\.MultiheadAttention with kdim"):
        quantize(nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=4)))


def test_calibration_errors():
    qann = quantize(timm_vit())
    with pytest.raises(UserError, match="method"):
        calibrate(qann, [IMAGES], method="max")
    with pytest.raises(UserError, match="no batch"):
        calibrate(qann, [])
    with pytest.raises(QuantizationError, match="no quantisers"):
        calibrate(timm_vit(), [IMAGES])
    with pytest.raises(QuantizationError, match="not finite"):
        calibrate(qann, [IMAGES * float("nan")])
    assert qann.patch_embed.proj[1].observer is None, "observers are gone after an error"
    assert TEXT["input_ids"].shape == (3, 9)
