import pytest
import torch
from spikezip import ops
from spikingjelly.activation_based import functional
from tenfold_shared.errors import UserError
from torch import nn

T = 7


def increments(*shape, seed=0):
    return torch.randn(T, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(op, *sequences, **kwargs):
    return sum(op(*step, **kwargs) for step in zip(*sequences, strict=True))


@pytest.mark.parametrize("bias_steps", [1, 3])
def test_linear_sums_to_the_linear_of_the_sum_with_one_bias(bias_steps):
    source = nn.Linear(4, 5).double()
    op = ops.SpikeLinear(source, bias_steps=bias_steps)
    x = increments(2, 4)
    assert torch.allclose(summed(op, x), source(x.sum(0)), atol=1e-12)
    assert torch.allclose(op(0 * x[0]), torch.zeros(2, 5).double(), atol=0), "no second bias"


def test_bias_parts_sum_to_the_bias_to_the_last_bit():
    source = nn.Linear(1, 50)
    op = ops.SpikeLinear(source, bias_steps=2)
    total = op(torch.zeros(1, 1)) + op(torch.zeros(1, 1))
    assert torch.equal(total[0], source.bias)


def test_convolution_with_borders_and_stride():
    source = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    x = increments(2, 2, 6, 6)
    assert torch.allclose(summed(ops.SpikeConv2d(source), x), source(x.sum(0)), atol=1e-12)


def test_embedding_speaks_once_and_again_when_its_indices_change():
    source = nn.Embedding(9, 4)
    op = ops.SpikeEmbedding(source)
    ids, other = torch.tensor([[1, 2, 8]]), torch.tensor([[1, 3, 8]])
    assert torch.equal(op(ids), source(ids))
    assert not op(ids).any()
    assert torch.equal(op(other), source(other) - source(ids))


def test_a_shared_operator_has_a_state_for_each_call_in_a_step():
    op, alone = ops.SpikeFn(torch.tanh), [ops.SpikeFn(torch.tanh), ops.SpikeFn(torch.tanh)]
    x = increments(2, 3)
    for step in x:
        op.begin_step()
        for part, single in zip(step, alone, strict=True):
            assert torch.equal(op(part), single(part))
    functional.reset_net(op)
    assert op.called is None and torch.equal(op(x[0]), torch.tanh(x[0]))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_product_in_two_parts_is_the_product_of_the_sums(scale):
    a, b = increments(2, 3, 4), increments(2, 4, 5, seed=1)
    op = ops.SpikeMatmul()
    total = 0
    for t in range(T):
        total = total + op(a[t], b[t], scale)
        assert torch.allclose(total, scale * a[: t + 1].sum(0) @ b[: t + 1].sum(0), atol=1e-12)


def test_product_equals_the_three_part_formula():
    a, b = increments(3, 4), increments(4, 5, seed=1)
    op, a_sum, b_sum = ops.SpikeMatmul(), 0, 0
    for x, y in zip(a, b, strict=True):
        a_sum, b_sum = a_sum + x, b_sum + y
        assert torch.allclose(op(x, y), a_sum @ y + x @ b_sum - x @ y, atol=1e-12)


def test_softmax_with_a_mask_of_minus_infinity_has_no_nan():
    mask = torch.zeros(1, 4).double()
    mask[0, 2:] = -torch.inf
    x = increments(3, 4)
    out = summed(ops.SpikeSoftmax(), x, [mask] * T)
    assert torch.allclose(out, torch.softmax(x.sum(0) + mask, -1), atol=1e-12)


def test_layer_norm_keeps_the_sources_eps():
    source = nn.LayerNorm(6, eps=0.3).double()
    x = increments(2, 6)
    assert torch.allclose(summed(ops.SpikeLayerNorm(source), x), source(x.sum(0)), atol=1e-12)


def test_any_function_and_add():
    x = increments(5)
    assert torch.allclose(summed(ops.SpikeFn(torch.tanh), x), torch.tanh(x.sum(0)), atol=1e-12)
    assert torch.equal(ops.SpikeAdd()(x[0], x[1]), x[0] + x[1])


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: ops.SpikeLinear(nn.Linear(4, 5).double()), [(2, 4)]),
        (lambda: ops.SpikeConv2d(nn.Conv2d(1, 2, 3).double()), [(2, 1, 5, 5)]),
        (lambda: ops.SpikeMatmul(), [(3, 4), (4, 2)]),
        (lambda: ops.SpikeSoftmax(), [(3, 4)]),
        (lambda: ops.SpikeLayerNorm(nn.LayerNorm(4).double()), [(3, 4)]),
        (lambda: ops.SpikeAdd(), [(3, 4), (3, 4)]),
    ],
)
def test_step_modes_agree_and_reset_forgets(make, shapes):
    op = make()
    sequences = [increments(*shape, seed=i) for i, shape in enumerate(shapes)]
    singles = torch.stack([op(*step) for step in zip(*sequences, strict=True)])
    functional.reset_net(op)
    functional.set_step_mode(op, "m")
    assert torch.equal(op(*sequences), singles)


def test_drive_form_resynchronises():
    x = increments(3, 4)
    op = ops.SpikeFn(torch.tanh)
    op(x[0] + 1e-3)
    op.form = "drive"
    assert torch.equal(op(x[:2].sum(0)), torch.tanh(x[:2].sum(0)))
    op.form = "event"
    assert torch.allclose(op(x[2]), torch.tanh(x[:3].sum(0)) - torch.tanh(x[:2].sum(0)), atol=1e-15)


def test_bias_steps_must_be_one_or_more():
    with pytest.raises(UserError, match="bias_steps"):
        ops.SpikeLinear(nn.Linear(2, 2), bias_steps=0)
