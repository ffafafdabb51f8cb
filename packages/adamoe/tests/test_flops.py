"""The paper's Table 1, and the arithmetic behind it."""

import pytest
from adamoe import count_flops, flops_reduction
from adamoe.errors import ConfigError
from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig

MIXTRAL = MixtralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("load", "printed"), [(1.66, 14.99), (1.68, 14.10), (1.59, 18.07), (1.63, 16.31), (1.70, 13.22), (1.67, 14.55)]
)
def test_table_1(load, printed):
    assert round(100 * flops_reduction(MIXTRAL, load, num_null_experts=8), 2) == printed


def test_by_hand():
    sizes = {
        "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_local_experts": 5, "vocab_size": 7, "num_experts_per_tok": 2,
    }  # fmt: skip
    attention = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 2 * 10 * 4
    expected = 3 * (attention + 1.5 * 3 * 4 * 6 + 4 * (5 + 2)) + 4 * 7
    assert count_flops(sizes, 1.5, seq_len=10, num_null_experts=2) == expected
    assert count_flops(sizes, 1.5, seq_len=10, num_null_experts=2, lm_head=False) == expected - 28


def test_shared_experts_count():
    config = Qwen2MoeConfig(shared_expert_intermediate_size=16)
    without = Qwen2MoeConfig(shared_expert_intermediate_size=0)
    extra = config.num_hidden_layers * 3 * config.hidden_size * 16
    assert count_flops(config, 2.0) - count_flops(without, 2.0) == extra


def test_errors():
    with pytest.raises(ConfigError, match="load is -1"):
        count_flops(MIXTRAL, -1)
    with pytest.raises(ConfigError, match="load is nan"):
        count_flops(MIXTRAL, float("nan"))
    with pytest.raises(ConfigError, match="seq_len is 0"):
        count_flops(MIXTRAL, 1, seq_len=0)
    with pytest.raises(ConfigError, match="no num_local_experts"):
        count_flops(LlamaConfig(), 1)
