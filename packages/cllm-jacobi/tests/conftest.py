import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processes() -> Any:
    """Makes processes that have imported everything already: one server imports, the others are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cllm_jacobi.training", "cllm_jacobi.cli", "cllm_jacobi.testbed", "accelerate"])
    return context


VOCABULARY = 61
POSITIONS = 96


def build(name: str) -> Any:
    """A tiny random model of the named architecture, float32, with EOS 1 and padding 0."""
    import transformers as t

    common = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
    }
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**common, **size)),
        "qwen2": lambda: t.Qwen2ForCausalLM(
            t.Qwen2Config(**common, **{k: v for k, v in size.items() if k != "head_dim"})
        ),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**common, **size)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(**common, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4)
        ),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**common, **size, sliding_window=7)),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**common, **size, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
        ),
    }
    torch.manual_seed(1)
    model = makers[name]().eval()
    # At the usual scale random models say one token for ever; repetition would hide mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Any]:
    kept: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in kept:
            kept[name] = build(name)
        return kept[name]

    return get


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Four prompts of 9, 4, 7 and 1 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 4, 7, 1)):
        ids[row, : 9 - length] = 0
        mask[row, : 9 - length] = 0
    return {"input_ids": ids, "attention_mask": mask}
