"""Real vLLM, one engine per subprocess: a second engine in one process fails to register its kernels."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = {"vllm": "vllm", "torch": "torch", "adamoe": "adamoe"}


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: needs the environment of `make vllm`")


def pytest_collection_modifyitems(items):
    missing = [name for name, module in PARTS.items() if importlib.util.find_spec(module) is None]
    for item in items:
        item.add_marker(pytest.mark.vllm)
        if missing:
            item.add_marker(
                pytest.mark.skip(reason=f"missing in this environment: {', '.join(missing)} (run make vllm)")
            )


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


@pytest.fixture
def engine(tmp_path):
    """Run a scenario of driver.py in a process of its own; gives its answer."""

    def run(scenario, **options):
        runtime = Path(sys.prefix) / "lib" / "libiomp5.so"
        env = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if runtime.exists():
            env["LD_PRELOAD"] = str(runtime)
        answer = tmp_path / "answer.json"
        command = [sys.executable, str(Path(__file__).parent / "driver.py"), scenario, json.dumps(options), str(answer)]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, cwd=tmp_path)
        assert answer.exists(), f"{scenario} ended with {result.returncode}:\n{result.stderr[-3000:]}"
        return json.loads(answer.read_text())

    return run
