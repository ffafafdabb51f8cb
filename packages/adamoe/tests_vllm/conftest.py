"""Models for the tests on real vLLM."""

import pytest

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8, "num_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN = {"mixtral": {}, "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True}}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Write a random converted model, once per kind; gives its folder. rows: copied, noisy or all-null."""
    folder = tmp_path_factory.mktemp("models")

    def make(model_type, rows, nulls):
        path = folder / f"{model_type}-{rows}-{nulls}"
        if path.exists():
            return path
        import torch
        from adamoe import AdaMoEConfig, convert, set_load
        from adamoe.conversion import layer_routers
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **OWN[model_type]}))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" not in name:
                    p.normal_(std=0.15)
            convert(model, AdaMoEConfig(num_null_experts=nulls))
            if rows != "copied":
                for router in layer_routers(model):
                    router.null_weight.add_(0.1 * torch.randn_like(router.null_weight))
        if rows == "all-null":
            set_load(model, null_bias=1e4)
        model.save_pretrained(path)
        return path

    return make
