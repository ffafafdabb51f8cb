import math

import pytest
import torch
from small_models import IMAGES, timm_vit
from spikezip import QuantConfig, quantize
from spikezip.errors import QuantizationError, UncalibratedError
from spikezip.qann.quantizer import SMALLEST_STEP, Quantizer, bounds, keep_positive, levels
from tenfold_shared.errors import UserError
from torch import nn


def made(lo=-8, hi=7, s=0.5, **kwargs):
    quantizer = Quantizer(lo, hi, **kwargs)
    quantizer.s.data.fill_(s)
    return quantizer


def test_every_half_goes_up_and_bounds_clip():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 40.0, -40.0])
    assert levels(x, torch.tensor(1.0), -8, 7).tolist() == [-2, -1, 0, 1, 2, 3, 7, -8]
    assert torch.round(x)[3] == 0, "half to even is what must not be used"


def test_official_bounds():
    assert bounds(16, True) == (-8, 7)
    assert bounds(16, False) == (0, 15)
    assert bounds(32, True) == (-16, 15)
    assert bounds(3, True) == (-1, 1)


def test_output_is_step_times_level_in_training_and_evaluation():
    x = torch.randn(5, 7)
    quantizer = made()
    trained = quantizer(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(quantizer(x), levels(x, quantizer.s, -8, 7) * quantizer.s)
        assert torch.equal(trained, quantizer(x))


def test_quantising_twice_changes_nothing():
    quantizer = made(s=0.25)
    with torch.no_grad():
        once = quantizer(torch.randn(100))
        assert torch.equal(quantizer(once), once)


def test_gradients_are_straight_through_and_scaled():
    x = torch.tensor([0.3, -0.2, 9.0, -9.0], requires_grad=True)
    quantizer = made(-2, 1)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]
    u = x.detach() / 0.5
    q = levels(x.detach(), torch.tensor(0.5), -2, 1)
    inside = (u >= -2) & (u <= 1)
    expected = torch.where(inside, q - u, q).sum() / math.sqrt(4 * 1)
    assert quantizer.s.grad == pytest.approx(float(expected))


def test_two_processes_scale_the_gradient_for_the_whole_batch():
    x = torch.randn(8, 4)
    whole = made()
    whole(x.clone().requires_grad_()).mean().backward()
    grads = []
    for half in x.split(4):
        part = made()
        part.replicas = 2
        part(half.clone().requires_grad_()).mean().backward()
        grads.append(part.s.grad)
    assert torch.allclose(torch.stack(grads).mean(), whole.s.grad)


def test_one_step_a_channel():
    quantizer = Quantizer(-8, 7, channels=3, axis=1)
    quantizer.s.data = torch.tensor([0.1, 1.0, 10.0])
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        for c, s in enumerate((0.1, 1.0, 10.0)):
            assert torch.equal(quantizer(x)[:, c], made(s=s)(x[:, c]))


def test_asymmetric_bounds_of_ones_own():
    qann = quantize(timm_vit(nn.GELU), QuantConfig(bounds={"*.act.1": (-3, 12)}))
    assert (qann.blocks[0].mlp.act[1].lo, qann.blocks[0].mlp.act[1].hi) == (-3, 12)
    assert qann.blocks[0].norm1[1].lo == -8


def test_steps_are_put_back_above_zero():
    module = nn.Sequential(made(s=-3.0))
    keep_positive(module)
    assert module[0].s.item() == pytest.approx(SMALLEST_STEP)


@pytest.mark.parametrize("n", [1, 0, -4, 2.5, True])
def test_levels_must_be_two_or_more(n):
    with pytest.raises(QuantizationError, match="levels"):
        bounds(n, True)


def test_bounds_must_hold_zero():
    with pytest.raises(QuantizationError, match="lo <= 0 < hi"):
        Quantizer(1, 4)


def test_uncalibrated_is_an_error_and_survives_saving():
    qann = quantize(timm_vit())
    with pytest.raises(UncalibratedError, match="calibrate"):
        qann(IMAGES)
    state = qann.state_dict()
    assert torch.isnan(state["blocks.0.norm1.1.s"])


@pytest.mark.parametrize(
    "wrong",
    [{"symmetric": "maybe"}, {"activation": "silu"}, {"placement": "x"}, {"bounds": {"*": (1, 3)}}, {"levels": 1}],
)
def test_a_configuration_is_checked_at_the_door(wrong):
    with pytest.raises(UserError):
        QuantConfig(**wrong)
