"""Random two-layer models of every family."""

import warnings
from typing import Any

import torch

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 8,
    "num_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 8, "n_shared_experts": 1, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 0, "num_key_value_heads": 4,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_moe": {"head_dim": 8, "norm_topk_prob": True},
    "olmoe": {},
    "phimoe": {},
    "deepseek_v2": {**LATENT, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT, "n_group": 2, "topk_group": 1},
    "glm4_moe": {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 8, "first_k_dense_replace": 0},
    "granitemoe": {},
    "gpt_oss": {"head_dim": 8, "layer_types": ["full_attention", "full_attention"]},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    "jamba": {
        "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0, "use_mamba_kernels": False,
    },
}  # fmt: skip
TIER_1 = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe")
TIER_2 = tuple(name for name in OWN if name not in TIER_1)


def build(model_type: str = "mixtral", *, seed: int = 0, **settings: Any) -> Any:
    """A random two-layer model, wide enough in its weights for logits of order one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SIZES, **OWN[model_type], **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.normal_(std=0.05)
    return model


def converted(model_type: str = "mixtral", *, seed: int = 0, noise: float = 0.0, **settings: Any) -> Any:
    """`build` converted. noise: spread of what is added to the copied null rows."""
    from adamoe import AdaMoEConfig, convert
    from adamoe.conversion import layer_routers

    model = build(model_type, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(model, AdaMoEConfig(**settings))
    with torch.no_grad():
        for router in layer_routers(model):
            router.null_weight.add_(noise * torch.randn_like(router.null_weight))
    return model
