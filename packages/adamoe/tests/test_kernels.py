"""Against a naive loop over tokens: values, gradients, and the number of rows that are multiplied."""

import contextlib

import pytest
import torch
from adamoe import kernels, measure_flops, record_load
from adamoe.conversion import layer_routers
from adamoe.errors import ConversionError
from tiny_mixtures import converted
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

KERNELS = ["adamoe_loop", "adamoe_grouped", "adamoe_static", "eager", "grouped_mm", "batched_mm"]


def layer(name="mixtral", kernel="adamoe_loop"):
    model = converted(name, experts_implementation=kernel)
    part = model.model.layers[0]
    return (part.block_sparse_moe if hasattr(part, "block_sparse_moe") else part.mlp).experts


def naive(experts, hidden, index, weights):
    """Token by token, slot by slot, through the module's own arithmetic."""
    out = []
    for t in range(len(hidden)):
        total = torch.zeros_like(hidden[t])
        for k in range(index.shape[1]):
            e = int(index[t, k])
            if e == experts.num_experts:
                continue
            up, down = experts.gate_up_proj[e], experts.down_proj[e]
            inner = hidden[t] @ (up if experts.is_transposed else up.T)
            inner = inner + experts.gate_up_proj_bias[e] if experts.has_bias else inner
            value = experts._apply_gate(inner) @ (down if experts.is_transposed else down.T)
            value = value + experts.down_proj_bias[e] if experts.has_bias else value
            total = total + weights[t, k] * value
        out.append(total)
    return torch.stack(out)


def problem(null=0.4, rows=17, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 32, generator=g).to(dtype).requires_grad_()
    index = torch.rand(rows, 8, generator=g).argsort(-1)[:, :3]
    index = torch.where(torch.rand(rows, 3, generator=g) < null, 8, index)
    weights = (torch.rand(rows, 3, generator=g) * (index < 8)).to(dtype).requires_grad_()
    return hidden, index, weights


def run(experts, hidden, index, weights, kernel):
    for p in experts.parameters():
        p.grad = None
    hidden.grad = weights.grad = None
    out = naive(experts, hidden, index, weights) if kernel == "naive" else experts(hidden, index, weights)
    out.float().square().sum().backward()
    return [out.detach(), hidden.grad, weights.grad * (index < 8), *(p.grad for p in experts.parameters())]


@pytest.mark.parametrize(
    ("name", "kernel"), [("mixtral", k) for k in KERNELS] + [("gpt_oss", k) for k in KERNELS if k != "eager"]
)
@pytest.mark.parametrize("null", [0.0, 0.4, 0.9])
def test_values_and_all_gradients(name, kernel, null):
    experts = layer(name, kernel)
    for ours, plain in zip(run(experts, *problem(null), kernel), run(experts, *problem(null), "naive"), strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * max(1.0, float(plain.abs().max()))


@pytest.mark.parametrize("kernel", ["adamoe_loop", "adamoe_grouped"])
def test_in_bfloat16(kernel):
    experts = layer(kernel=kernel).to(torch.bfloat16)
    ours = run(experts, *problem(dtype=torch.bfloat16), kernel)[0]
    plain = run(experts.float(), *(t.detach().float().requires_grad_() if t.is_floating_point() else t for t in problem(dtype=torch.bfloat16)), "naive")[0]  # fmt: skip
    assert ours.dtype == torch.bfloat16 and (ours.float() - plain).abs().max() < 0.02 * plain.abs().max()


@contextlib.contextmanager
def poisoned():
    """Uninitialised memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize(
    ("kernel", "null"),
    # The stock eager path leaves experts without a token out of the graph, so an all-null batch has no gradient there.
    [(k, 0.9) for k in KERNELS] + [(k, 1.0) for k in KERNELS if k != "eager"],
)
def test_nothing_uninitialised_is_read(kernel, null):
    experts = layer(kernel=kernel)
    with poisoned():
        results = run(experts, *problem(null), kernel)
    assert all(r is not None and r.isfinite().all() for r in results)
    if null == 1.0:
        assert all(not r.any() for r in results)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_all_null_model_is_finite_and_its_layers_are_zero(kernel, tokens):
    model = converted(experts_implementation=kernel).train()
    for router in layer_routers(model):
        router.null_bias.fill_(torch.inf)
    outputs = []
    for part in model.model.layers:
        part.mlp.register_forward_hook(lambda module, args, output: outputs.append(output))
    with poisoned():
        model(tokens, labels=tokens).loss.backward()
    assert len(outputs) == 2 and not any(o.any() for o in outputs)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if kernel != "eager":  # stock eager leaves experts without a token out of the graph
        experts = [p for name, p in model.named_parameters() if "experts" in name]
        assert all(p.grad is not None and not p.grad.any() for p in experts)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_multiplied_are_the_true_pairs(kernel, monkeypatch):
    """Counted where the products are made: rows of each linear, or the last offset of a grouped product."""
    experts = layer(kernel=kernel)
    hidden, index, weights = problem(0.5, rows=40)
    pairs, rows = int((index < 8).sum()), []
    real = moe._grouped_mm

    def grouped(input, weight, offs):
        rows.append(int(offs[-1]))
        return real(input, weight, offs)

    plain = torch.nn.functional.linear

    def counted(input, weight, bias=None):
        rows.append(len(input))
        return plain(input, weight, bias)

    monkeypatch.setattr(moe, "_grouped_mm", grouped)
    monkeypatch.setattr(kernels, "linear", counted)
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    with torch.no_grad():
        experts(hidden, index, weights)
    if kernel == "batched_mm":
        # The stock batched path multiplies the null slots as well; nothing of ours chooses it.
        assert not rows and kernel != kernels.choose(experts, hidden)
    else:
        assert sum(rows) == 2 * pairs, "one product up and one down for every pair"
    if kernel == "adamoe_grouped":
        compact = []
        monkeypatch.setattr(moe, "_grouped_mm", lambda i, w, offs: compact.append(len(i)) or real(i, w, offs))
        experts(hidden, index, weights)
        assert compact == [pairs, pairs], "and no other row is moved"


def test_torch_counts_the_same_work(tokens):
    """The library's counter on a whole model: the difference between two loads is that of the pairs."""
    model = converted(noise=0.3)
    full = measure_flops(model, tokens)
    for router in layer_routers(model):
        router.null_bias.fill_(0.5)
    less = measure_flops(model, tokens)
    assert less.load < full.load
    assert full.total - less.total == pytest.approx(full.experts - less.experts, rel=1e-6)


def test_all_names_are_known_to_transformers(mixtral):
    for name in ("adamoe", *kernels.KERNELS):
        assert name in ALL_EXPERTS_FUNCTIONS


def test_a_stock_path_that_knows_no_empty_slot_is_refused():
    with pytest.raises(ConversionError, match="eager"):
        converted("gpt_oss", experts_implementation="eager")


def test_the_choice():
    experts = layer()
    assert kernels.choose(experts, torch.zeros(1, 32)) == "adamoe_loop"


def test_loads_are_the_same_in_every_kernel(tokens):
    seen = set()
    for kernel in KERNELS:
        model = converted(noise=0.3, experts_implementation=kernel)
        with record_load(model) as record, torch.no_grad():
            model(tokens)
        seen.add(tuple(record.per_token.flatten().tolist()))
    assert len(seen) == 1
