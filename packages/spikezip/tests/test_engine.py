import warnings

import pytest
import torch
from small_models import FAMILIES, IMAGES, TEXT, as_type, calibrated, timm_vit
from spikezip import compare, convert
from spikezip.encoders import EventFrames, Rate
from spikezip.engine import integers
from spikezip.errors import ConversionError, NotConvergedWarning, StateError, UncalibratedError
from spikezip.qann.calibration import call
from spikezip.qann.placement import quantize
from spikingjelly.activation_based import functional
from tenfold_shared.errors import UserError
from torch import nn


@pytest.mark.parametrize("levels", [8, 16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_drive_engine_is_bitwise_exact(family, levels):
    make, inputs = FAMILIES[family]
    found = compare(convert(calibrated(make(), inputs, levels=levels)), inputs, max_steps=300)
    assert found.bitwise and found.mismatches == 0 and found.agreement == 1 and found.error == 0
    assert found.neurons > 100 and "settled" in found.certificate


def test_a_trained_network_is_exact_too(learned):
    model, data = learned
    for levels in (8, 32):
        qann = calibrated(model, data.train[:128], levels=levels)
        found = compare(convert(qann), data.test[:40], max_steps=300)
        assert found.bitwise and not found.mismatches


def test_per_channel_steps_and_own_bounds_are_exact():
    qann = calibrated(timm_vit(nn.GELU), IMAGES, per_channel=True, bounds={"*.act.1": (-3, 12)})
    for engine in ("drive", "event"):
        found = compare(convert(qann, engine=engine), IMAGES, max_steps=300)
        assert found.bitwise and not found.mismatches


def test_depth_twelve():
    qann = calibrated(timm_vit(depth=12), IMAGES, levels=32)
    found = compare(convert(qann), IMAGES, max_steps=600)
    assert found.bitwise and not found.mismatches


@pytest.mark.parametrize("family", FAMILIES)
def test_event_engine_in_float64_and_with_resync(family):
    make, inputs = FAMILIES[family]
    qann = calibrated(make(), inputs)
    double = compare(convert(qann, engine="event", dtype=torch.float64, resync=False), inputs, max_steps=300)
    assert double.mismatches == 0 and double.error < 1e-12
    single = compare(convert(qann, engine="event"), inputs, max_steps=300)
    assert single.mismatches == 0 and single.bitwise


def test_both_engines_send_the_same_spikes(small_qann):
    trains = []
    for engine in ("drive", "event"):
        snn = convert(small_qann, engine=engine, dtype=torch.float64, resync=False)
        snn.clock.keep_trains = "*"
        snn.run(IMAGES, max_steps=60)
        trains.append({site.path: torch.stack(site.calls[0].train) for site in snn.sites})
    assert all(torch.equal(trains[0][name], trains[1][name]) for name in trains[0])


def test_the_number_of_steps_is_bounded_by_depth_times_levels(small_qann):
    snn = convert(small_qann)
    result = snn.run(IMAGES, max_steps=1000)
    assert result.converged and result.steps <= len(snn.sites) * 15 + 1


def test_per_sample_steps_and_the_certificate(small_qann):
    result = convert(small_qann).run(IMAGES)
    assert result.converged and bool(result.converged_samples.all()) and result.moving == 0
    assert result.steps == int(result.per_sample_steps.max()) + 1, "the last step is the one in which nothing fires"
    assert result.certificate.settled and result.certificate.exact and "settled: none of" in str(result.certificate)
    for i in range(len(IMAGES)):
        alone = convert(small_qann).run(IMAGES[i : i + 1])
        assert abs(alone.steps - 1 - int(result.per_sample_steps[i])) <= 1


def test_an_early_stop_says_how_many_neurons_still_move(small_qann):
    snn = convert(small_qann)
    with pytest.warns(NotConvergedWarning, match="still move after 3 steps"):
        result = snn.run(IMAGES, max_steps=3)
    assert not result.converged and result.moving > 0
    assert result.moving == sum(result.certificate.moving_by_layer.values())
    before = [call.acc.clone() for site in snn.sites for call in site.calls]
    two = convert(small_qann)
    two.run(IMAGES, max_steps=2, stop="none")
    earlier = [call.acc for site in two.sites for call in site.calls]
    assert result.moving == sum(int((a != b).sum()) for a, b in zip(before, earlier, strict=True))


def test_a_stop_without_equilibrium_does_not_warn(small_qann):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConvergedWarning)
        result = convert(small_qann).run(IMAGES, max_steps=4, stop="none", return_trajectory=True)
    assert result.trajectory.shape == (4, 3, 10) and torch.equal(result.trajectory[-1], result.logits)


def test_stable_and_confident_stops(small_qann):
    snn = convert(small_qann)
    stable = snn.run(IMAGES, stop="stable", patience=2)
    assert stable.steps <= snn.run(IMAGES).steps
    patient = snn.run(IMAGES, stop="stable", patience=4, return_trajectory=True)
    assert patient.steps >= 5 and len(patient.trajectory[-5:].argmax(-1).unique(dim=0)) == 1
    sure = snn.run(IMAGES, stop="confident", confidence=0.01, patience=2, return_trajectory=True)
    assert sure.steps == 2 and sure.per_sample_steps.tolist() == [2, 2, 2]
    assert torch.equal(sure.logits, sure.trajectory[1])


@pytest.mark.parametrize("change", [{"delay": 1}, {"delay": 2}, {"burst": 2}, {"burst": 100}, {"warm": True}])
@pytest.mark.parametrize("engine", ["drive", "event"])
def test_schedules_keep_the_equilibrium(small_qann, change, engine):
    snn = convert(small_qann, engine=engine)
    plain = snn.run(IMAGES, max_steps=200)
    if "delay" in change:
        snn.set_schedule(delay=change["delay"])
    elif "burst" in change:
        snn.set_burst(change["burst"])
    else:
        snn.warm_start(IMAGES.flip(0))
    snn.reset()
    changed = snn.run(IMAGES, max_steps=400)
    assert changed.converged and torch.equal(changed.logits, plain.logits)
    assert changed.spikes.total != plain.spikes.total
    if "delay" in change:
        assert changed.steps > plain.steps
    if "burst" in change:
        assert changed.steps < plain.steps


@pytest.mark.parametrize("engine", ["drive", "event"])
def test_streaming_goes_on_from_the_last_frame(small_qann, engine):
    snn = convert(small_qann, engine=engine)
    first = snn.run(IMAGES, max_steps=200)
    near = IMAGES + 0.02
    following = snn.run(near, max_steps=200, reset=False)
    assert following.converged and torch.equal(following.logits, call(snn.qann, near))
    assert following.spikes.total < 0.7 * first.spikes.total


def test_a_stream_of_sentences_goes_on_too():
    """Token indices change without a reset; the embeddings send the difference."""
    snn = convert(calibrated(FAMILIES["bert"][0](), TEXT), engine="event", dtype=torch.float64, resync=False)
    snn.run(TEXT, max_steps=200)
    other = {**TEXT, "input_ids": TEXT["input_ids"].flip(0).roll(1, 1)}
    following = snn.run(other, max_steps=200, reset=False)
    assert following.converged and torch.allclose(following.logits, call(snn.qann, other), atol=1e-12)
    assert not torch.allclose(following.logits, call(snn.qann, TEXT), atol=1e-3)


@pytest.mark.parametrize("engine", ["drive", "event"])
def test_encoders_end_in_the_same_state(small_qann, engine):
    snn = convert(small_qann, engine=engine)
    wanted = call(small_qann, IMAGES)
    assert torch.equal(snn.run(IMAGES, encoder=Rate(5), max_steps=200).logits, wanted)
    assert torch.equal(Rate(4).accumulated(IMAGES, 1), IMAGES * 0.5)
    frames = torch.stack([IMAGES / 2, IMAGES / 4, IMAGES / 4])
    assert torch.equal(snn.run(frames, encoder=EventFrames(3), max_steps=200).logits, call(small_qann, frames.sum(0)))


def test_nothing_settles_before_the_input_has_ended(small_qann):
    """A network that is quiet while it waits for its input is not at rest."""
    frames = torch.zeros(60, *IMAGES.shape)
    frames[59] = IMAGES
    result = convert(small_qann).run(frames, encoder=EventFrames(60), max_steps=200)
    assert int(result.spikes.moving.sum(1)[50:59].sum()) == 0, "it was quiet"
    assert result.converged and torch.equal(result.logits, call(small_qann, frames.sum(0)))


def test_nothing_settles_before_every_stage_has_started(small_qann):
    snn = convert(small_qann)
    snn.set_schedule(delay=25)
    result = snn.run(IMAGES, max_steps=1000)
    assert int((result.spikes.moving.sum(1) == 0).sum()) > 1, "it was quiet in between"
    assert result.converged and torch.equal(result.logits, call(small_qann, IMAGES))


class Tokens(nn.Module):
    """Neurons on a constant of five tokens, which no sample owns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.first, self.last = nn.Parameter(torch.randn(5, 6)), nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, x):
        return self.last(x + self.first(self.tokens)).mean(1)


def test_neurons_that_no_sample_owns_are_counted_once():
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    snn = convert(calibrated(Tokens(), x))
    snn.clock.keep_trains = "*"
    result = snn.run(x)
    assert result.converged and torch.equal(result.logits, call(snn.qann, x))
    for i, name in enumerate(result.spikes.layers):
        train = torch.stack(snn.model.get_submodule(name).calls[0].train)
        assert torch.equal(result.spikes.moving[:, i], (train != 0).flatten(1).sum(1))
    assert result.certificate.neurons == 5 * 6 + 3 * 5 * 6


def test_retired_samples_leave_the_batch(small_qann):
    snn = convert(small_qann, dtype=torch.float64)
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    images *= torch.linspace(0, 4, 8).reshape(-1, 1, 1, 1)
    images = images[snn.run(images).per_sample_steps.argsort()]
    result = snn.run(images, retire=True)
    whole = snn.run(images)
    assert whole.per_sample_steps[0] + 1 < whole.per_sample_steps[-1], "the first one leaves while others go on"
    assert torch.equal(result.per_sample_steps, whole.per_sample_steps)
    assert torch.allclose(result.logits, whole.logits, atol=1e-12)


def test_layer_by_layer_equals_step_by_step(small_qann):
    snn = convert(small_qann, dtype=torch.float64)
    steps = snn.run(IMAGES, max_steps=12, stop="none", return_trajectory=True).trajectory
    assert torch.allclose(snn.run_multi_step(IMAGES, 12), steps, atol=1e-12)


def test_shared_layers_have_one_state_a_call():
    make, inputs = FAMILIES["albert"]
    snn = convert(calibrated(make(), inputs))
    result = snn.run(inputs)
    assert any("#1" in name for name in result.spikes.layers)
    assert {len(site.calls) for site in snn.sites} == {1, 2}


def test_the_library_reset_works(small_qann):
    snn = convert(small_qann)
    first = snn.run(IMAGES)
    functional.reset_net(snn)
    assert snn.clock.t == 0 and not snn.sites[0].calls
    again = snn.run(IMAGES)
    assert torch.equal(first.logits, again.logits) and first.spikes.total == again.spikes.total


def test_integers_are_those_of_the_forward(small_qann):
    found = integers(small_qann, IMAGES)
    norm = small_qann.blocks[0].norm1
    seen = []
    hook = norm.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        small_qann(IMAGES)
    hook.remove()
    assert torch.equal(found["blocks.0.norm1.1"][0] * norm[1].s, seen[0])


def test_conversion_leaves_the_qann_alone(small_qann):
    before = {k: v.clone() for k, v in small_qann.state_dict().items()}
    convert(small_qann, dtype=torch.float64).run(as_type(IMAGES, torch.float64))
    assert all(torch.equal(v, before[k]) for k, v in small_qann.state_dict().items())


def test_few_steps_can_be_trained_through(small_qann):
    """Thresholds and weights get gradients from a run that is cut after four steps."""
    snn = convert(small_qann)
    for site in snn.sites:
        site.theta.requires_grad_(True)
    snn.model.head.weight.requires_grad_(True)
    snn.clock.batch = len(IMAGES)
    for _ in range(4):
        out = snn(IMAGES)
    out.square().sum().backward()
    thetas = [site.theta.grad for site in snn.sites]
    assert sum(g is not None and bool(g.abs() > 0) for g in thetas) > len(thetas) // 2
    assert snn.model.head.weight.grad.abs().sum() > 0


# Errors


def test_conversion_errors_name_the_module():
    qann = calibrated(timm_vit(), IMAGES)
    qann.blocks[1].attn.quan_k.s.data.fill_(-0.5)
    with pytest.raises(ConversionError, match=r"blocks\.1\.attn\.quan_k.*theta"):
        convert(qann)
    with pytest.raises(UncalibratedError, match=r"patch_embed\.proj\.1"):
        convert(quantize(timm_vit()))
    with pytest.raises(ConversionError, match="no quantisers"):
        convert(timm_vit())
    with pytest.raises(UserError, match="engine"):
        convert(qann, engine="m")


def test_training_mode_dropout_and_autocast(small_qann):
    qann = calibrated(timm_vit(proj_drop_rate=0.1), IMAGES)
    qann.blocks[0].mlp.drop1.train()
    with pytest.raises(ConversionError, match=r"blocks\.0\.mlp\.drop1: dropout"):
        convert(qann)
    with pytest.raises(ConversionError, match="training mode"):
        convert(calibrated(timm_vit(), IMAGES).train())
    snn = convert(small_qann)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ConversionError, match="autocast"):
            convert(small_qann)
        with pytest.raises(ConversionError, match="autocast"):
            snn.run(IMAGES)


class Written(nn.Module):
    """A function written into a forward, after a linear map and its quantiser."""

    def __init__(self, function):
        super().__init__()
        self.norm, self.linear2, self.function = nn.LayerNorm(6), nn.Linear(6, 4), function

    def forward(self, x):
        return self.function(self.linear2(self.norm(x)))


@pytest.mark.parametrize("function", [torch.relu, torch.tanh, nn.functional.gelu, lambda x: x.softmax(-1)])
def test_event_engine_refuses_functions_of_increments(function):
    """Also a ReLU, of what may be negative."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    qann = calibrated(Written(function), x)
    with pytest.raises(ConversionError, match=r"the model \(Written\).*nonlinear function"):
        convert(qann, engine="event").run(x)
    assert compare(convert(qann), x).bitwise, "the drive engine takes them"


def test_a_relu_of_what_is_never_negative_lets_increments_pass():
    """DistilBERT's head, before which a spike that is taken back must arrive."""
    make, inputs = FAMILIES["distilbert"]
    snn = convert(calibrated(make(), inputs), engine="event", dtype=torch.float64, resync=False)
    result = snn.run(inputs, max_steps=300)
    head = result.spikes.layers.index("pre_classifier.1")
    assert result.spikes.negative[:, head].sum() > 0, "or the test shows nothing"
    assert torch.allclose(result.logits, call(snn.qann, inputs), atol=1e-12)


def test_event_engine_refuses_unknown_constants():
    model = timm_vit()
    model.blocks[0].temperature = nn.Parameter(torch.ones(1))
    with pytest.raises(ConversionError, match=r"blocks\.0\.temperature"):
        convert(calibrated(model, IMAGES), engine="event")


def test_state_errors(small_qann):
    snn = convert(small_qann)
    snn.run(IMAGES)
    with pytest.raises(StateError, match="3 samples"):
        snn.run(IMAGES[:2], reset=False)
    snn.set_burst(2)
    with pytest.raises(StateError, match="reset"):
        snn(IMAGES)
    snn.reset()
    snn(IMAGES)
    with pytest.raises(StateError, match=r"patch_embed.*reset"):
        snn(IMAGES[:2])
    text = convert(calibrated(FAMILIES["bert"][0](), TEXT))
    text.warm_start(TEXT)
    with pytest.raises(StateError, match="warm start"):
        text.run({k: v[:, :5] for k, v in TEXT.items()})


def test_bad_values(small_qann):
    snn = convert(small_qann)
    for wrong in ({"max_steps": 0}, {"stop": "never"}, {"patience": 0}):
        with pytest.raises(UserError):
            snn.run(IMAGES, **wrong)
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="NaN or infinity"):
            snn.run(torch.full_like(IMAGES, value))
    with pytest.raises(UserError, match="empty"):
        snn.run(IMAGES[:0])
    with pytest.raises(UserError, match="delay"):
        snn.set_schedule(delay=-1)
    with pytest.raises(UserError, match="burst"):
        snn.set_burst(0)
    with pytest.raises(UserError, match="n is 0"):
        Rate(0)
    with pytest.raises(UserError, match="drive engine"):
        convert(small_qann, engine="event").run(IMAGES, retire=True)
    with pytest.raises(UserError, match="rate encoding"):
        snn.run({"x": IMAGES}, encoder=Rate(2))
