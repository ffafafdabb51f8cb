"""What the plug-in computes and refuses, without vLLM."""

from types import SimpleNamespace

import pytest
import torch
from adamoe.config import AdaMoEConfig
from adamoe.errors import PluginError
from adamoe.routing import route
from adamoe.serving import ARCHITECTURES, architecture, serve_arguments
from adamoe.vllm_plugin.checks import Settings, check_config, check_kernel, check_names, check_version, choose_mode
from adamoe.vllm_plugin.slots import extended_map, mask_slots, true_pairs


def routing():
    z = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    return route(z, 8, 4, null_bias=0.7)


def dense(weights, index, experts):
    """(T, n) weight of every expert, from slots."""
    total = torch.zeros(len(index), experts)
    for t in range(len(index)):
        for w, e in zip(weights[t], index[t], strict=True):
            if e < experts:
                total[t, e] += w
    return total


def test_gathered_pairs_and_masked_slots_are_the_same_mixture():
    r = routing()
    assert int((r.load(8) == 0).sum()) > 0 and int((r.load(8) > 1).sum()) > 0
    expected = dense(r.weights, r.index, 8)
    token, weights, experts = true_pairs(r.weights, r.index, 8)
    gathered = torch.zeros(40, 8).index_put_((token, experts[:, 0]), weights[:, 0], accumulate=True)
    masked = mask_slots(r.weights, r.index, 8)
    assert len(token) == int(r.load(8).sum()) and torch.equal(gathered, expected)
    assert int(masked.max()) < 8 and torch.equal(dense(r.weights, masked, 8), expected)


def test_no_pair_at_all():
    token, weights, experts = true_pairs(torch.zeros(3, 2), torch.full((3, 2), 8), 8)
    assert token.shape == (0,) and weights.shape == experts.shape == (0, 1)
    assert not mask_slots(torch.zeros(3, 2), torch.full((3, 2), 8), 8).any()


def test_the_absent_expert():
    assert extended_map(None, 4).tolist() == [0, 1, 2, 3, -1]
    parallel = torch.tensor([-1, -1, 0, 1])
    assert extended_map(parallel, 4).tolist() == [-1, -1, 0, 1, -1] and extended_map(parallel, 4).dtype == torch.int32


def engine(**changes):
    parallel = {"data_parallel_size": 1, "enable_eplb": False, "enable_expert_parallel": False}
    settings = AdaMoEConfig(top_k=3).to_dict()
    hf = SimpleNamespace(adamoe=changes.pop("adamoe", settings))
    model = SimpleNamespace(
        hf_text_config=hf, hf_config=hf, enable_return_routed_experts=changes.pop("returned", False)
    )
    lora = changes.pop("lora", None)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{**parallel, **changes}), model_config=model, lora_config=lora
    )


def test_what_is_served():
    assert check_config(engine(), cuda=False).num_null_experts == 8
    assert check_config(engine(enable_expert_parallel=True), cuda=True).top_k == 3


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size is 2; run one server per replica"),
        ({"enable_eplb": True}, "load balancing"),
        ({"enable_expert_parallel": True}, "use tensor parallelism"),
        ({"returned": True}, "leave that option out"),
        ({"lora": object()}, "merge the adapter"),
        ({"adamoe": None}, "no null experts"),
        ({"adamoe": AdaMoEConfig(null_type="identity").to_dict()}, "only zero nulls"),
    ],
)
def test_what_is_refused(changes, cause):
    with pytest.raises(PluginError, match=cause):
        check_config(engine(**changes), cuda=False)


def test_versions_names_modes_and_kernels():
    check_version("0.32.0")
    check_version("0.32.1+cpu")
    for version in ("0.31.2", "0.33.0"):
        with pytest.raises(PluginError, match=r"tested with 0\.32\.0"):
            check_version(version)
    with pytest.raises(PluginError, match="has no FusedMoEFactory"):
        check_names(SimpleNamespace(__name__="m", GateLinear=1))
    assert choose_mode(Settings(), cuda=False) == "compact" and choose_mode(Settings(), cuda=True) == "absent"
    assert choose_mode(Settings(nulls="masked"), cuda=True) == "masked"
    with pytest.raises(PluginError, match="ignore the expert map"):
        choose_mode(Settings(nulls="absent"), cuda=False)
    check_kernel("TritonExperts", "absent")
    check_kernel("FlashInferExperts", "masked")
    with pytest.raises(PluginError, match='moe_backend="triton"'):
        check_kernel("FlashInferExperts", "absent")


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"speed": 1}, "no setting speed"),
        ({"nulls": "x"}, "nulls is 'x'"),
        ({"null_bias": float("nan")}, "null_bias is nan"),
        ({"null_bias": "high"}, "null_bias is 'high'"),
        ({"count": "yes"}, "count is 'yes'"),
        ([1], r"adamoe is \[1\]"),
    ],
)
def test_settings(values, cause):
    with pytest.raises(PluginError, match=cause):
        Settings.read(values)


def test_serve_arguments():
    config = SimpleNamespace(model_type="qwen3_moe", adamoe={"num_null_experts": 8})
    assert serve_arguments("m", config)[-1] == '{"architectures": ["AdaMoEQwen3MoeForCausalLM"]}'
    with pytest.raises(PluginError, match="no null experts"):
        serve_arguments("m", SimpleNamespace(model_type="mixtral"))
    with pytest.raises(PluginError, match="'jamba' is not served"):
        architecture("jamba")
    assert set(ARCHITECTURES) == {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}
