import json
import pickle

import pytest
import torch
from small_models import COLOUR, IMAGES, TEXT, calibrated, timm_vit, torchvision_vit, transformers_model
from spikezip import QuantConfig, convert, load, load_official, load_quantized, quantize, save
from spikezip.errors import CheckpointError, ExportError
from spikezip.export import DriveStep, export_nir, export_onnx
from spikezip.qann.calibration import call
from spikezip.qann.quantizer import quantizers
from tenfold_shared.errors import UserError
from torch import nn


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (timm_vit, IMAGES),
        (lambda: timm_vit(nn.GELU, init_values=0.2), IMAGES),
        (torchvision_vit, COLOUR),
        (lambda: transformers_model("Roberta"), TEXT),
        (lambda: transformers_model("DistilBert"), TEXT),
    ],
)
def test_saved_and_loaded_networks_give_the_same_bits(tmp_path, make, inputs):
    snn = convert(calibrated(make(), inputs, levels=8))
    snn.set_schedule(delay=1)
    snn.set_burst(2)
    snn.save_pretrained(tmp_path / "snn")
    again = load(tmp_path / "snn")
    first, second = snn.run(inputs, max_steps=300), again.run(inputs, max_steps=300)
    assert torch.equal(first.logits, second.logits) and first.spikes.total == second.spikes.total
    assert (again.clock.delay, again.clock.burst) == (1, 2)


def test_a_qann_alone_and_a_class_of_ones_own(tmp_path):
    torch.manual_seed(0)

    def own():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    x = torch.randn(5, 4)
    qann = calibrated(own(), x)
    save(qann, tmp_path / "own")
    with pytest.raises(UserError, match="class of one's own"):
        load_quantized(tmp_path / "own")
    assert torch.equal(call(load_quantized(tmp_path / "own", model=own()), x), call(qann, x))
    assert load(tmp_path / "own", model=own()).engine == "drive"


def test_float64_and_event_engine_come_back(tmp_path, small_qann):
    convert(small_qann, engine="event", dtype=torch.float64, resync=False).save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    assert (again.engine, again.dtype, again.resync) == ("event", torch.float64, False)


def test_damaged_folders(tmp_path, small_qann):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing")
    folder = tmp_path / "snn"
    save(small_qann, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="does not fit"):
        load(folder)
    save(small_qann, folder)
    record = json.loads((folder / "spikezip.json").read_text())
    record["origin"]["arguments"]["embed_dim"] = 64
    (folder / "spikezip.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="does not fit"):
        load(folder)
    (folder / "spikezip.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a spikezip configuration"):
        load(folder)
    with pytest.raises(CheckpointError, match="neither a quantised"):
        save(timm_vit(), tmp_path / "x")


# Official checkpoints

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}


def official_vit(path, qann, **change):
    """A checkpoint as the official code writes it: a pickle with "model" and other things."""
    state = {k: (v.reshape(1) if k.endswith(".s") else v) for k, v in qann.state_dict().items()}
    torch.save({"model": {**state, **change}, "epoch": 99, "optimizer": {"lr": 1e-4}}, path)


def test_official_vit_layout_matches_a_network_built_by_hand(tmp_path):
    import functools

    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    hand = VisionTransformer(
        **SMALL, num_classes=7, act_layer=nn.ReLU, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6)
    )
    qann = calibrated(hand, IMAGES, levels=32)
    official_vit(tmp_path / "q32.pth", qann)
    loaded = load_official(tmp_path / "q32.pth", arch="vit_small", levels=32, architecture=SMALL)
    assert torch.equal(call(loaded, IMAGES), call(qann, IMAGES))
    result = convert(loaded).run(IMAGES, max_steps=200)
    assert result.converged and torch.equal(result.logits, call(qann, IMAGES))


def official_roberta(path):
    """The language branch's names, by hand: quantisers on the attention, before activations, after dense layers."""
    torch.manual_seed(0)
    plain = transformers_model("Roberta", hidden_act="relu")
    steps = iter(torch.rand(100) * 0.2 + 0.05)
    state = {}
    for name, value in plain.state_dict().items():
        if ".output.dense." in name:
            stem, last = name.rsplit(".", 1)
            state[f"bert.{stem}.0.{last}"] = value
        else:
            state[f"bert.{name}"] = value
    for i in range(2):
        layer = f"bert.roberta.encoder.layer.{i}"
        for name in ("query_quan", "key_quan", "value_quan", "attn_quan", "after_attn_quan"):
            state[f"{layer}.attention.self.{name}.s"] = next(steps)
        for name in ("attention.output.dense.1", "intermediate.intermediate_act_fn.0", "output.dense.1"):
            state[f"{layer}.{name}.s"] = next(steps)
    state["bert.classifier.act.0.s"] = next(steps)
    torch.save({"model": state}, path)
    return plain, state


def test_official_roberta_layout_matches_a_network_built_by_hand(tmp_path):
    plain, state = official_roberta(tmp_path / "r.pth")
    sizes = {k: getattr(plain.config, k) for k in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
        "type_vocab_size", "layer_norm_eps")}  # fmt: skip
    loaded = load_official(tmp_path / "r.pth", arch="roberta", levels=8, architecture=sizes)
    hand = quantize(plain, QuantConfig(levels=8, placement="official-roberta"))
    found = quantizers(hand)
    assert len(found) == 2 * 8 + 1 and not any("LayerNorm" in name for name in found)
    for name, quantizer in found.items():
        official = name.replace("spike_core.quan_q", "query_quan").replace("spike_core.quan_k", "key_quan")
        official = official.replace("spike_core.quan_v", "value_quan").replace("spike_core.", "")
        quantizer.s.data = state[f"bert.{official}.s"]
        symmetric = name.endswith(("quan_q", "quan_k", "quan_v", "dense.1"))
        assert (quantizer.lo, quantizer.hi) == ((-4, 3) if symmetric else (0, 7)), "the context is unsigned there"
    assert torch.equal(call(loaded, TEXT), call(hand, TEXT))
    result = convert(loaded).run(TEXT, max_steps=200)
    assert result.converged and torch.equal(result.logits, call(hand, TEXT))
    save(loaded, tmp_path / "folder")
    assert torch.equal(call(load_quantized(tmp_path / "folder"), TEXT), call(hand, TEXT))


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_official_errors(tmp_path, capsys):
    qann = calibrated(timm_vit(), IMAGES)
    file = tmp_path / "q.pth"
    official_vit(file, qann)
    for arguments, words in (
        ({"arch": "vit_tiny", "levels": 16}, "arch is"),
        ({"arch": "vit_small"}, "levels are not given"),
        ({"arch": "vit_small", "levels": 16}, "lacks|shape"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_official(file, **arguments)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_official(tmp_path / "no.pth", arch="vit_small", levels=16)
    torch.save({"model": timm_vit().state_dict()}, file)
    with pytest.raises(CheckpointError, match=r"\.s"):
        load_official(file, arch="vit_small", levels=16)
    official_vit(file, qann, **{"norm.1.s": torch.tensor(-0.1)})
    with pytest.raises(CheckpointError, match=r"norm\.1\.s is -0\.1"):
        load_official(file, arch="vit_small", levels=16, architecture=SMALL)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="read safely"):
        load_official(file, arch="vit_small", levels=16)
    torch.save({"model": Harmful()}, file)
    with pytest.raises(CheckpointError, match="read safely"):
        load_official(file, arch="vit_small", levels=16)
    file.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match="read safely"):
        load_official(file, arch="vit_small", levels=16)
    assert "executed" not in capsys.readouterr().out


# Export


def test_one_step_with_explicit_state_settles_on_the_same(small_qann):
    snn = convert(small_qann)
    step = DriveStep(snn, IMAGES)
    tracers = step.tracers
    with torch.no_grad():
        for _ in range(60):
            logits, *tracers = step(IMAGES, *tracers)
    assert torch.equal(logits, call(small_qann, IMAGES))


def test_onnx_step_settles_on_the_same_integers(tmp_path, small_qann):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the runtime is in the test group only")
    snn = convert(small_qann)
    file = export_onnx(snn, tmp_path / "step.onnx", inputs=IMAGES)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    values = [IMAGES.numpy(), *(t.numpy() for t in DriveStep(snn, IMAGES).tracers)]
    for _ in range(60):
        logits, *tracers = session.run(None, dict(zip(names, values, strict=True)))
        values = [values[0], *tracers]
    wanted = snn.run(IMAGES)
    assert torch.allclose(torch.tensor(logits), wanted.logits, atol=1e-4)
    assert not list(tmp_path.glob(".step*"))


def test_nir_of_a_feed_forward_network(tmp_path):
    import nir

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)
    )
    snn = convert(calibrated(model, IMAGES))
    export_nir(snn, tmp_path / "net.nir", input_shape=(1, 8, 8))
    graph = nir.read(str(tmp_path / "net.nir"))
    kinds = sorted(type(n).__name__ for n in graph.nodes.values())
    assert kinds == sorted(["Input", "Conv2d", "IF", "Flatten", "Affine", "IF", "Linear", "Output"])
    neuron = next(n for n in graph.nodes.values() if type(n).__name__ == "IF")
    assert neuron.v_threshold.flat[0] == pytest.approx(snn.sites[0].theta.item())


def test_export_errors(tmp_path, small_qann):
    with pytest.raises(ExportError, match=r"norm1\.0 \(LayerNorm\)"):
        export_nir(convert(small_qann), tmp_path / "x.nir", input_shape=(1, 8, 8))
    with pytest.raises(UserError, match="drive engine"):
        export_onnx(convert(small_qann, engine="event"), tmp_path / "x.onnx", inputs=IMAGES)
    assert not list(tmp_path.iterdir())
