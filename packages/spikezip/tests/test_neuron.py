import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from spikezip.errors import ConversionError, StateError
from spikezip.functional import drive_step, stbif_plus_multi_step, stbif_plus_step
from spikezip.neuron import STBIFPlusNode
from spikezip.qann.quantizer import Quantizer, levels
from spikingjelly.activation_based import base, functional
from spikingjelly.activation_based import neuron as library
from tenfold_shared.errors import UserError

T = 30
THETA = torch.tensor(0.25, dtype=torch.float64)


def dyadic(*shape, seed=0):
    """Multiples of 1/64, whose sums are exact in float64."""
    return torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(seed)).double() / 64


def test_event_form_is_the_tracker_of_limited_slew():
    x_seq = dyadic(T, 500)
    v, acc, tracked, total = 0.5 + 0 * x_seq[0], 0 * x_seq[0], 0 * x_seq[0], 0 * x_seq[0]
    for x in x_seq:
        o, v, acc = stbif_plus_step(x, v, acc=acc, theta=THETA, lo=-4, hi=3)
        total = total + x
        spikes, tracked = drive_step(total, tracked, theta=THETA, lo=-4, hi=3)
        assert torch.equal(acc, tracked) and torch.equal(o, spikes)


def test_charge_is_conserved():
    x_seq = dyadic(T, 500, seed=1)
    _, v, acc = stbif_plus_multi_step(
        x_seq, torch.full((500,), 0.5).double(), acc=torch.zeros(500).double(), theta=THETA, lo=-4, hi=3
    )
    assert torch.equal(v, 0.5 + x_seq.sum(0) / THETA - acc)


@pytest.mark.parametrize("burst", [1, 2, 100])
@pytest.mark.parametrize(("lo", "hi"), [(-8, 7), (0, 15), (-3, 12)])
def test_constant_drive_settles_on_the_quantiser_in_at_most_hi_minus_lo_steps(lo, hi, burst):
    x = dyadic(2000, seed=2) * 8
    node = STBIFPlusNode(THETA, lo, hi, input_form="drive", burst=burst)
    for _ in range(hi - lo):
        out = node(x)
    assert torch.equal(node.acc, levels(x, THETA, lo, hi))
    assert torch.equal(out, Quantizer_of(lo, hi)(x))
    leap = STBIFPlusNode(THETA, lo, hi, input_form="drive", burst=burst)
    assert torch.equal(leap(x), out.clamp(-burst * THETA, burst * THETA)), "as far as a burst goes in one step"
    assert torch.equal(node(x), out), "an equilibrium stays"


def Quantizer_of(lo, hi):
    quantizer = Quantizer(lo, hi).double()
    quantizer.s.data = THETA.clone()
    return quantizer.requires_grad_(False)


def test_the_equilibrium_does_not_depend_on_the_order_of_the_input():
    x_seq = dyadic(T, 300, seed=3)
    quiet = torch.zeros(40, 300).double()
    ends = []
    for order in (torch.arange(T), torch.randperm(T), torch.arange(T).flip(0)):
        node = STBIFPlusNode(THETA, -8, 7, step_mode="m")
        node(torch.cat((x_seq[order], quiet)))
        ends.append(node.acc)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_same_spikes_as_the_library_neuron():
    x_seq = torch.randn(T, 400)
    ours = STBIFPlusNode(0.25, -8, 7, step_mode="m")
    theirs = library.STBIFNode(torch.tensor(0.25), level=16, sym=True, step_mode="m")
    assert torch.equal(ours(x_seq), theirs(x_seq))


def test_bounds_are_never_left_and_steps_are_ternary():
    node = STBIFPlusNode(0.25, -2, 1, step_mode="m")
    out = node(torch.randn(T, 400) * 3)
    assert set((out / 0.25).unique().tolist()) == {-1, 0, 1}
    assert out.cumsum(0).amin() >= -0.5 and out.cumsum(0).amax() <= 0.25


def test_compiled_spikes_are_identical():
    x_seq = torch.randn(17, 256)
    start = {"acc": torch.zeros(256), "theta": torch.tensor(0.3), "lo": -8, "hi": 7}
    eager = stbif_plus_multi_step(x_seq, torch.full((256,), 0.5), **start)
    try:
        compiled = stbif_plus_multi_step(x_seq, torch.full((256,), 0.5), **start, backend="compile")
    finally:
        torch._dynamo.reset()
    assert compiled[0].dtype == torch.int8 and compiled[0].abs().max() == 1
    assert all(torch.equal(a, b.float()) for a, b in zip(eager, compiled, strict=True))


def test_no_compiler_falls_back_with_one_warning(monkeypatch):
    from spikezip import functional as ours

    def broken():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ours, "_compiled", lambda: lambda *a: broken())
    ours._warn_eager.cache_clear()
    x_seq = torch.randn(9, 8)
    start = {"acc": torch.zeros(8), "theta": torch.tensor(0.3), "lo": -8, "hi": 7}
    with pytest.warns(UserWarning, match="no compiler"):
        spikes, _, _ = stbif_plus_multi_step(x_seq, torch.full((8,), 0.5), **start, backend="compile")
    assert torch.equal(spikes, stbif_plus_multi_step(x_seq, torch.full((8,), 0.5), **start)[0])


INTERPRETED = """
import torch
from spikezip.functional import _scan
from spikezip.triton_scan import scan
torch.manual_seed(0)
for kind in (torch.float32, torch.float64):
    for theta in (torch.tensor(0.3), torch.rand(37) + 0.1):
        for (lo, hi), burst, scale in (((-8, 7), 1, 1), ((0, 15), 3, 1), ((-300, 300), 1000, 60)):
            x = scale * torch.randn(9, 29, 37, dtype=kind)
            start = (torch.full((29, 37), 0.5, dtype=kind), torch.zeros(29, 37, dtype=kind))
            wanted = _scan(x, *start, theta.to(kind), lo, hi, burst)
            spikes, v, acc = scan(x, *start, theta=theta, lo=lo, hi=hi, burst=burst)
            assert spikes.dtype == (torch.int16 if burst > 127 else torch.int8)
            assert wanted[0].abs().max() > (0 if burst == 1 else 1)
            for got, want in zip((spikes.to(kind), v, acc), wanted, strict=True):
                assert torch.equal(got, want), (kind, lo, burst)
print("identical")
"""


def test_the_triton_kernel_gives_identical_spikes():
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == "identical", out.stderr[-2000:]


def test_the_triton_kernel_compiles_for_a_gpu_with_rounded_division():
    """To machine code, without a GPU; a division that is only nearly rounded would give other spikes."""
    triton = pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    from spikezip.triton_scan import _kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kind, division in (("fp32", "div.rn.f32"), ("fp64", "div.rn.f64")):
        types = {
            "steps": "i32",
            "neurons": "i32",
            "theta_stride": "i32",
            "spikes_ptr": "*i8",
            "lo": "fp32",
            "hi": "fp32",
        }
        types |= {"burst": "fp32", "SINGLE": "constexpr", "BLOCK": "constexpr"}
        signature = {name: types.get(name, f"*{kind}") for name in _kernel.arg_names}
        source = ASTSource(_kernel, signature, {"SINGLE": kind == "fp32", "BLOCK": 512})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
        assert set(re.findall(r"div\.[a-z0-9.]+", made["ptx"])) == {division} and len(made["cubin"]) > 1000
        assert "fma" not in made["ptx"], "a fused multiply-add would round once where the other paths round twice"


def test_automatic_backend_takes_triton_on_cuda_when_nothing_is_learned(monkeypatch):
    """The dispatch alone: a tensor that says it is on CUDA, and the kernel's wrapper replaced."""
    from spikezip import functional as ours

    class OnCuda(torch.Tensor):
        is_cuda = True

    taken = []
    monkeypatch.setattr(ours, "_scan_triton", lambda *a: taken.append("triton") or ours._scan(*a))
    start = {"acc": torch.zeros(4), "theta": torch.tensor(0.3), "lo": -8, "hi": 7}
    x_seq, v = torch.randn(3, 4), torch.full((4,), 0.5)
    stbif_plus_multi_step(x_seq, v, **start)
    assert not taken
    stbif_plus_multi_step(x_seq.as_subclass(OnCuda), v, **start)
    assert taken == ["triton"]
    stbif_plus_multi_step(x_seq.as_subclass(OnCuda), v, **{**start, "theta": torch.tensor(0.3, requires_grad=True)})
    assert taken == ["triton"], "gradients need the eager path"


def test_triton_without_cuda_falls_back_with_a_warning():
    from spikezip import functional as ours

    ours._warn_eager.cache_clear()
    x_seq, start = torch.randn(3, 8), {"acc": torch.zeros(8), "theta": torch.tensor(0.3), "lo": -8, "hi": 7}
    with pytest.warns(UserWarning, match="triton is not to be had here.*on cpu"):
        spikes, _, _ = stbif_plus_multi_step(x_seq, torch.full((8,), 0.5), **start, backend="triton")
    assert torch.equal(spikes, stbif_plus_multi_step(x_seq, torch.full((8,), 0.5), **start)[0])


def test_step_modes_agree_and_the_library_functions_work():
    x_seq = torch.randn(T, 20)
    net = torch.nn.Sequential(STBIFPlusNode(0.25, -8, 7))
    singles = torch.stack([net(x) for x in x_seq])
    functional.reset_net(net)
    assert isinstance(net[0].acc, float) and net[0].v == 0.5
    functional.set_step_mode(net, "m")
    assert torch.equal(net(x_seq), singles)
    assert dict(base.named_memories(net)).keys() == {"0.v", "0.acc"}
    functional.detach_net(net)
    assert not net[0].v.requires_grad
    assert torch.equal(net[0].accumulated, net[0].acc * 0.25)


def test_functional_forward_keeps_no_state():
    net = STBIFPlusNode(0.25, -8, 7)
    states = net.materialize_states((torch.ones(3),), tuple(net.memories()), "s")
    (out,), after = net.single_step_functional_forward((torch.ones(3),), states)
    assert torch.equal(out, torch.full((3,), 0.25)) and torch.equal(after[1], torch.ones(3))
    assert net.acc == 0.0


def test_v_sequence_is_stored_on_demand():
    node = STBIFPlusNode(0.25, -8, 7, step_mode="m", store_v_seq=True)
    node(torch.randn(5, 3))
    assert node.v_seq.shape == (5, 3)


def test_a_copy_and_a_cast_keep_the_state():
    node = STBIFPlusNode(0.25, -8, 7)
    node(torch.ones(3))
    assert torch.equal(copy.deepcopy(node).acc, node.acc)
    assert node.double().acc.dtype == torch.float64


def test_from_quantizer_with_a_step_a_channel():
    quantizer = Quantizer(-8, 7, channels=3, axis=1)
    quantizer.s.data = torch.tensor([0.1, 0.2, 0.4])
    quantizer.requires_grad_(False)
    node = STBIFPlusNode.from_quantizer(quantizer, input_form="drive")
    x = torch.randn(2, 3, 5)
    for _ in range(15):
        out = node(x)
    assert torch.equal(out, quantizer(x))


@pytest.mark.parametrize("form", ["event", "drive"])
def test_it_trains_for_few_steps(form):
    """Four steps of a small net, thresholds and weights trained; the library's neuron refuses gradients."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(0, 2, (64,))
    y = (x[:, 0] > 0).long()
    first, last = torch.nn.Linear(6, 16), torch.nn.Linear(16, 2)
    node = STBIFPlusNode(0.5, -8, 7, input_form=form)
    node.theta.requires_grad_(True)
    optimizer = torch.optim.Adam([*first.parameters(), *last.parameters(), node.theta], lr=0.05)
    losses = []
    for _ in range(30):
        node.reset()
        total = 0.0
        for t in range(4):
            drive = first(x)
            out = node(drive if form == "drive" or t == 0 else torch.zeros_like(drive))
            total = out if form == "drive" else total + out
        loss = torch.nn.functional.cross_entropy(last(total), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert node.theta.item() != 0.5 and first.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_must_be_finite_and_positive(theta):
    with pytest.raises(ConversionError, match="theta"):
        STBIFPlusNode(theta, -8, 7)


def test_other_bad_settings():
    with pytest.raises(ConversionError, match="floating"):
        STBIFPlusNode(torch.tensor(1), -8, 7)
    with pytest.raises(UserError, match="bounds"):
        STBIFPlusNode(0.5, 1, 7)
    with pytest.raises(UserError, match="burst"):
        STBIFPlusNode(0.5, -8, 7, burst=0)
    with pytest.raises(UserError, match="input_form"):
        STBIFPlusNode(0.5, -8, 7, input_form="rate")
    start = {"acc": torch.zeros(2), "theta": torch.tensor(1.0), "lo": 0, "hi": 1}
    with pytest.raises(UserError, match="no steps"):
        stbif_plus_multi_step(torch.zeros(0, 2), torch.zeros(2), **start)
    with pytest.raises(UserError, match="backend"):
        stbif_plus_multi_step(torch.zeros(1, 2), torch.zeros(2), **start, backend="cuda")
    with pytest.raises(UserError, match="burst"):
        stbif_plus_multi_step(torch.zeros(1, 2), torch.zeros(2), **start, burst=0)


def test_a_shape_that_changes_without_a_reset():
    node = STBIFPlusNode(0.25, -8, 7)
    node(torch.ones(3))
    with pytest.raises(StateError, match="reset"):
        node(torch.ones(4))
    with pytest.raises(StateError, match="state yet"):
        _ = STBIFPlusNode(0.25, -8, 7).accumulated
