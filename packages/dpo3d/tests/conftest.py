import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from dpo3d import testbed
from dpo3d.scoring import preserved_rng
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return testbed.make_tokenizer()


@pytest.fixture(scope="session")
def base() -> LlamaForCausalLM:
    """An untrained digit model; tests that train take a copy."""
    with preserved_rng():
        return testbed.make_model(0).eval()


@pytest.fixture(scope="session")
def sorter() -> LlamaForCausalLM:
    """A briefly supervised digit model: it answers in the known styles most of the time."""
    with preserved_rng():
        return testbed.supervise(0, steps=300)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Pairs as the digit task has them, without sampling: right and wrong orders, of unequal length in some rows."""
    rows = []
    for i, prompt in enumerate(testbed.all_prompts(0)[:24]):
        up, down, rare_up, _ = testbed.known_answers(prompt)
        rows.append({"prompt": prompt, "chosen": rare_up if i % 3 == 0 else up, "rejected": down})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def talker(tokenizer: Any) -> Any:
    """The digit tokenizer with a chat template."""
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    return talking


@pytest.fixture(scope="session")
def conversation(digits: Dataset) -> Dataset:
    """The digit pairs as messages."""

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": said("user", row["prompt"][:4]),
                "chosen": said("assistant", row["chosen"]),
                "rejected": said("assistant", row["rejected"]),
            }
            for row in digits
        ]
    )


@pytest.fixture(scope="session")
def small_models() -> dict[str, Any]:
    """One untrained model of three architectures that people align."""
    with preserved_rng():
        torch.manual_seed(1)
        shape = {"vocab_size": 15, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        qwen = Qwen2Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            **shape,
        )
        gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **shape)
        return {
            "llama": testbed.make_model(1),
            "qwen": Qwen2ForCausalLM(qwen),
            "gpt2": GPT2LMHeadModel(gpt2),
        }


@pytest.fixture
def make_trainer(base: Any, digits: Dataset, tokenizer: Any, tmp_path: Any) -> Callable[..., Any]:
    """A trainer of any class and config class on the digit pairs, reference in memory."""

    def make(
        trainer_class: Any, config_class: Any, *, model: Any = None, extra: dict | None = None, **fields: Any
    ) -> Any:
        fields = {"per_device_train_batch_size": 8, "max_steps": 3, "logging_steps": 1, **fields}
        folder = fields.pop("output_dir", str(tmp_path / "run"))
        seed = fields.pop("seed", 0)
        args = testbed.training_arguments(config_class, seed, folder, **fields)
        source = base if model is None else model
        arguments = {"train_dataset": digits, "processing_class": tokenizer, **(extra or {})}
        if "peft_config" not in arguments and "ref_model" not in arguments:
            # Another model than the policy where there is one, so that Δ is not zero.
            arguments["ref_model"] = copy.deepcopy(base if type(source) is type(base) else source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trainer_class(copy.deepcopy(source), args=args, **arguments)

    return make
