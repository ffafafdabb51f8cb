import pytest
import torch
from small_models import IMAGES, TEXT, calibrated, timm_vit, transformers_model
from spikezip import convert
from spikezip.energy import ELEMENT_MACS, _fan_out, measure
from spikezip.schedules import _beats, search
from spikezip.testbed import count_by_hand
from tenfold_shared.errors import UserError
from torch import nn


def tiny():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=4,
        patch_size=2,
        in_chans=1,
        num_classes=3,
        embed_dim=8,
        depth=1,
        num_heads=2,
        mlp_ratio=2,
        act_layer=nn.ReLU,
    ).eval()


def test_totals_equal_a_count_that_follows_every_event():
    x = IMAGES[:1, :, :4, :4]
    qann = calibrated(tiny(), x, levels=8)
    report, result = measure(convert(qann, dtype=torch.float64), x, max_steps=100)
    assert result.converged
    assert report.total_ac == count_by_hand(qann, x, steps=result.steps) > 0


def test_ann_macs_and_biases_by_hand():
    x = IMAGES[:2, :, :4, :4]
    report, _ = measure(convert(calibrated(tiny(), x)), x, max_steps=100)
    n, c, h, d = 5, 8, 2, 4
    block = n * c * 3 * c + h * n * n * d * 2 + n * c * c + 2 * n * c * 16
    assert report.total_ann_macs == 2 * (4 * 4 * c + block + c * 3)
    assert report.bias == 2 * (4 * c + n * (3 * c + c + 16 + c) + 3), "once, not every step"
    assert report.mac.keys() == {"patch_embed.proj.0"} and report.total_mac == 2 * 4 * 4 * c
    assert report.neuron_updates == report.neurons * report.steps


def test_attention_costs_tokens_and_head_width():
    a, b = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 4, 7)
    one = torch.zeros_like(a, dtype=torch.long)
    one[0, 1, 3, 2] = 1
    assert _fan_out(nn.Identity(), (a, b), 0, one) == 7
    one = torch.zeros_like(b, dtype=torch.long)
    one[0, 0, 1, 6] = 3
    assert _fan_out(nn.Identity(), (a, b), 1, one) == 3 * 5


def test_convolution_borders():
    conv = nn.Conv2d(1, 2, 3, padding=1)
    events = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    events[0, 0, 0, 0] = 1
    assert _fan_out(conv, (events,), 0, events) == 2 * 4
    events[0, 0, 0, 0], events[0, 0, 1, 1] = 0, 1
    assert _fan_out(conv, (events,), 0, events) == 2 * 9


def test_spikes_and_accumulations_agree_where_each_spike_has_one_reader(small_qann):
    report, result = measure(convert(small_qann), IMAGES)
    spikes = dict(
        zip(result.spikes.layers, (result.spikes.positive + result.spikes.negative).sum(0).tolist(), strict=True)
    )
    assert report.ac["blocks.0.attn.qkv"] == spikes["blocks.0.norm1.1"] * 96
    assert report.ac["blocks.0.attn.proj"] == spikes["blocks.0.attn.after_attn_quan"] * 32
    assert report.ac["blocks.1.mlp.fc2.0"] == spikes["blocks.1.mlp.act.0"] * 32
    n = 17
    qk = spikes["blocks.0.attn.quan_q"] * n + spikes["blocks.0.attn.quan_k"] * n
    pv = spikes["blocks.0.attn.attn_quan"] * 8 + spikes["blocks.0.attn.quan_v"] * n
    assert (report.ac["blocks.0.attn.qk"], report.ac["blocks.0.attn.pv"]) == (qk, pv)


def test_a_burst_counts_every_unit(small_qann):
    snn = convert(small_qann)
    snn.set_burst(3)
    report, result = measure(snn, IMAGES)
    both = (result.spikes.positive + result.spikes.negative).sum(0)
    spikes = dict(zip(result.spikes.layers, both.tolist(), strict=True))
    assert report.ac["blocks.0.attn.qkv"] == spikes["blocks.0.norm1.1"] * 96
    assert spikes["blocks.0.norm1.1"] > int(
        result.spikes.moving[:, result.spikes.layers.index("blocks.0.norm1.1")].sum()
    )


def test_a_warm_start_is_not_counted_as_spikes(small_qann):
    snn = convert(small_qann)
    cold, _ = measure(snn, IMAGES)
    snn.warm_start(IMAGES)
    snn.set_burst(100)
    warm, result = measure(snn, IMAGES)
    both = (result.spikes.positive + result.spikes.negative).sum(0)
    spikes = dict(zip(result.spikes.layers, both.tolist(), strict=True))
    assert warm.ac["blocks.0.attn.qkv"] == spikes["blocks.0.norm1.1"] * 96 < cold.ac["blocks.0.attn.qkv"]


def test_reports_have_all_three_and_the_prices_are_right(small_qann):
    report, _ = measure(convert(small_qann), IMAGES)
    paper, full = report.paper(), report.full()
    assert paper.keys() == full.keys() == report.memory().keys() == {"ANN fp32", "QANN int8", "SNN"}
    assert paper["ANN fp32"] == pytest.approx(report.total_ann_macs * 4.6e-6 / 3)
    assert paper["QANN int8"] == pytest.approx(report.total_ann_macs * 0.23e-6 / 3)
    assert paper["SNN"] == pytest.approx((report.total_ac * 0.9 + report.total_mac * 4.6) * 1e-6 / 3)
    assert full["SNN"] > paper["SNN"] and full["ANN fp32"] > paper["ANN fp32"]
    assert set(report.elements) <= set(ELEMENT_MACS)
    assert report.elements["layer norm"] > report.ann_elements["layer norm"]


def test_rows_without_a_spike_are_counted(small_qann):
    """Token skipping's share, against the trains of the spikes themselves."""
    snn = convert(calibrated(tiny(), IMAGES[..., :4, :4]))
    snn.clock.keep_trains = "*"
    report, result = measure(snn, IMAGES[..., :4, :4])
    before = {"blocks.0.norm1.1": 1, "blocks.0.attn.after_attn_quan": 0, "blocks.0.norm2.1": 1, "blocks.0.mlp.act.0": 1}
    touched = 0
    for name in before:
        train = torch.stack(snn.model.get_submodule(name).calls[0].train)
        if name.endswith("after_attn_quan"):
            train = train.transpose(2, 3).flatten(3)
        touched += int((train != 0).any(-1).sum())
    head = torch.stack(snn.model.get_submodule("norm.1").calls[0].train)[:, :, 0]
    assert report.rows == result.steps * 3 * (4 * 5 + 1)
    assert report.rows_touched == touched + int((head != 0).any(-1).sum())
    assert 0 < report.skippable < 1
    unquantised = convert(calibrated(tiny(), IMAGES[..., :4, :4], skip=["blocks.0.norm1"]))
    report, result = measure(unquantised, IMAGES[..., :4, :4])
    assert report.rows == result.steps * 3 * (3 * 5 + 1), "rows of inputs that are no spikes do not count"


def test_the_search_of_schedules_marks_the_front(small_qann):
    snn = convert(small_qann)
    snn.set_schedule(delay=3)
    found = search(snn, IMAGES, delays=(0, 1), bursts=(1, 4))
    assert {(s.delay, s.burst) for s in found} == {(0, 1), (0, 4), (1, 1), (1, 4)} and snn.clock.delay == 3
    assert [s.steps for s in found] == sorted(s.steps for s in found) and found[0].best
    for s in found:
        better = [o for o in found if o.steps <= s.steps and o.accumulations <= s.accumulations and o != s]
        assert s.best == (not better)
    assert any(not s.best for s in found), "or the marking shows nothing"
    snn.set_schedule(delay=0)
    report, result = measure(snn, IMAGES, max_steps=200)
    plain = next(s for s in found if (s.delay, s.burst) == (0, 1))
    assert (plain.steps, plain.accumulations) == (result.steps, report.total_ac // 3)
    with pytest.raises(UserError, match="no schedule settled within 2 steps"):
        search(snn, IMAGES, max_steps=2)


def test_memory_by_hand(small_qann):
    report, _ = measure(convert(small_qann), IMAGES)
    memory, weights = report.memory(), sum(p.numel() for n, p in small_qann.named_parameters() if not n.endswith(".s"))
    assert memory["ANN fp32"] == {"weights": 4 * weights, "state": 0, "weight reads": 4 * report.total_ann_macs // 3}
    assert memory["QANN int8"] == {"weights": weights, "state": 0, "weight reads": report.total_ann_macs // 3}
    reads = 4 * (report.total_ac + report.total_mac) // 3
    assert memory["SNN"] == {"weights": 4 * weights, "state": 5 * report.neurons // 3, "weight reads": reads}


@pytest.mark.parametrize(
    ("one", "other", "beats"),
    [
        ((4, 9), (5, 9), True),
        ((5, 8), (5, 9), True),
        ((5, 9), (5, 9), False),
        ((4, 10), (5, 9), False),
        ((4, 8), (5, 9), True),
    ],
)
def test_a_schedule_beats_another(one, other, beats):
    assert _beats(one, other) is beats


def test_language_models_are_counted():
    report, result = measure(convert(calibrated(transformers_model("Roberta"), TEXT)), TEXT)
    assert report.total_ac > 0 and not report.mac, "with LayerNorms quantised every matrix product takes spikes"
    assert report.elements["activation"] > 0 and result.converged


def test_statistics_add_up(small_qann):
    result = convert(small_qann).run(IMAGES)
    record = result.spikes
    assert record.total == sum(row["positive"] + row["negative"] for row in record.rows())
    assert bool((record.wasted >= 0).all()) and bool((record.positive - record.negative).sum(0).eq(
        torch.stack([level.sum() for level in record.levels]).long()).all())  # fmt: skip
    assert int(record.settled_after.max()) == result.steps - 1
    layer = record.layers[3]
    assert sum(record.histogram(layer).values()) == int(record.neurons[3])
    assert record.csv().count("\n") == len(record.layers) + 1
    assert bool((record.rate <= 1).all())
    with pytest.raises(KeyError):
        record.histogram("no such layer")


def test_energy_errors(small_qann):
    with pytest.raises(UserError, match="drive engine"):
        measure(convert(small_qann, engine="event"), IMAGES)
    with pytest.raises(UserError, match="retire"):
        measure(convert(small_qann), IMAGES, retire=True)
    snn = convert(calibrated(timm_vit(), IMAGES, per_channel=True))
    snn.set_burst(2)
    with pytest.raises(UserError, match="one step a channel"):
        measure(snn, IMAGES)
