"""The offline world: a tiny language model that sorts digits, with an answer that can be checked.

A prompt is four digits, `3172=`, not all the same. The supervised model is ambiguous on purpose: 40 % ascending, 40 % descending,
3 % each of the rare styles `1<2<3<7` and `7>3>2>1`, 14 % in any order. Ascending is right, in either style. On-policy
pairs are the model's own samples; the off-policy halves are the rare styles, whose likelihood is low.
"""

import copy
import itertools
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo3d.pairs import build_pairs
from dpo3d.scoring import Row, score

PAD, EOS = "[PAD]", "[EOS]"
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "dpo": (1, {}),
    "dpo, lr 3e-4": (1, {"learning_rate": 3e-4}),
    "dpo, lr 1e-4": (1, {"learning_rate": 1e-4}),
    "dpo, lr 5e-5": (1, {"learning_rate": 5e-5}),
    "dpo, lr 3e-4, beta .03": (1, {"learning_rate": 3e-4, "beta": 0.03}),
    "flex.02": (1, {"beta_rejected": 0.02}),
    "flex.01": (1, {"beta_rejected": 0.01}),
    "sft.05": (1, {"sft_gamma": 0.05}),
    "flex.02+sft.05": (1, {"beta_rejected": 0.02, "sft_gamma": 0.05}),
    "dpop": (1, {"loss_type": ["dpop"]}),
    "cal_dpo": (1, {"loss_type": ["cal_dpo"]}),
    "ipo": (1, {"loss_type": ["ipo"]}),
    "hinge": (1, {"loss_type": ["hinge"]}),
    "nca_pair": (1, {"loss_type": ["nca_pair"]}),
    "sppo_hard": (1, {"loss_type": ["sppo_hard"]}),
    "apo_zero": (1, {"loss_type": ["apo_zero"]}),
    "sigmoid+sft": (1, {"loss_type": ["sigmoid", "sft"]}),
    "dpo S2": (2, {}),
    "dpo S3": (3, {}),
    "dpo S4": (4, {}),
    "sft.2 S4": (4, {"sft_gamma": 0.2}),
}
"""The digit task's named settings: scenario and fields of `FlexDPOConfig`; TRL's own losses run TRL's own code."""
STYLES = ("ascending", "descending", "rare ascending", "rare descending")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, in the real fast-tokenizer format."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *"0123456789=<>"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS)


def all_prompts(seed: int) -> list[str]:
    """All 9990 prompts, shuffled by the seed."""
    prompts = ["".join(d) + "=" for d in itertools.product("0123456789", repeat=4) if len(set(d)) > 1]
    random.Random(seed).shuffle(prompts)
    return prompts


def known_answers(prompt: str) -> list[str]:
    """The four answers the task knows, in the order of `STYLES`."""
    up = "".join(sorted(prompt[:4]))
    return [up, up[::-1], "<".join(up), ">".join(up[::-1])]


def is_right(prompt: str, answer: str) -> float:
    """1.0 when the answer is ascending in either style: the verifier."""
    known = known_answers(prompt)
    return float(answer in (known[0], known[2]))


def _target(prompt: str, rng: random.Random) -> str:
    style = rng.choices(range(5), weights=[40, 40, 3, 3, 14])[0]
    if style < 4:
        return known_answers(prompt)[style]
    return "".join(rng.sample(prompt[:4], 4))


def make_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=15,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def supervise(seed: int, *, steps: int = 700, batch: int = 64) -> LlamaForCausalLM:
    """Train the ambiguous supervised model, seconds on one core."""
    tokenizer, model, rng = make_tokenizer(), make_model(seed), random.Random(seed)
    prompts = all_prompts(seed)[1000:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    model.train()
    for _ in range(steps):
        texts = [p + _target(p, rng) + EOS for p in rng.choices(prompts, k=batch)]
        encoded = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        labels[:, :5] = -100
        model(**encoded, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Scores:
    """Exact figures on held-out prompts: nothing is sampled."""

    accuracy: float
    """Probability that a sample is right."""
    greedy: float
    """Share of prompts whose most likely continuation is right."""
    off_answer: float
    """Mass on anything but the four known answers."""
    chosen: float
    """Mean log-probability of the ascending answer, nats per sequence."""
    rejected: float
    """Mean log-probability of the descending answer."""


def held_out(seed: int, n: int = 400) -> list[str]:
    """Prompts that neither supervision nor pairs have seen."""
    return all_prompts(seed)[:n]


def measure(model: Any, prompts: list[str]) -> Scores:
    """Score the model on prompts."""
    tokenizer = make_tokenizer()
    rows = [Row(tokenizer(p)["input_ids"], tokenizer(a + EOS)["input_ids"]) for p in prompts for a in known_answers(p)]
    scored = score(model, rows, tokenizer.pad_token_id, budget=16384)
    logps = torch.tensor([s.total for s in scored]).view(-1, 4).double()
    greedy = torch.tensor([s.greedy for s in scored]).view(-1, 4)
    right = logps[:, [0, 2]].exp().sum(1)
    return Scores(
        float(right.mean()),
        float(greedy[:, [0, 2]].any(1).float().mean()),
        float((1 - logps.exp().sum(1)).mean()),
        float(logps[:, 0].mean()),
        float(logps[:, 1].mean()),
    )


def make_pairs(model: Any, scenario: int, seed: int, *, n: int = 500) -> Dataset:
    """Pairs of one scenario: the model's own right and wrong samples, a half replaced by its rare style where off-policy."""
    tokenizer = make_tokenizer()
    prompts = all_prompts(seed)[1000 : 1000 + n]
    built = build_pairs(model, tokenizer, prompts, is_right, n=8, seed=seed, max_new_tokens=9)

    def replace(row: dict[str, Any]) -> dict[str, Any]:
        _, _, up, down = known_answers(row["prompt"])
        return {
            "chosen": up if scenario in (2, 4) else row["chosen"],
            "rejected": down if scenario in (3, 4) else row["rejected"],
        }

    return built.select_columns(["prompt", "chosen", "rejected"]).map(replace, keep_in_memory=True)


def training_arguments(config: Callable[..., Any], seed: int, folder: str, **fields: Any) -> Any:
    """The digit task's arguments for any TRL config class."""
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 32,
        "max_steps": 120,
        "learning_rate": 1e-3,
        "beta": 0.1,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 20,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return config(**{**defaults, **fields})


def align(
    model: Any,
    pairs: Dataset,
    seed: int,
    *,
    reference: Any = None,
    prepare: Callable[[Any], Any] | None = None,
    **fields: Any,
) -> Any:
    """Train a copy of `model` on pairs; returns the trainer, its model trained.

    reference: `model` where None. prepare: called with the trainer before training, to attach a monitor. fields: of
    `FlexDPOConfig`.
    """
    from dpo3d.trl import FlexDPOConfig, FlexDPOTrainer

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        trainer = FlexDPOTrainer(
            copy.deepcopy(model),
            copy.deepcopy(model if reference is None else reference),
            training_arguments(FlexDPOConfig, seed, folder, **fields),
            train_dataset=pairs,
            processing_class=make_tokenizer(),
        )
        if prepare:
            prepare(trainer)
        trainer.train()
    trainer.model.eval()
    return trainer


def tensors_equal(a: Any, b: Any) -> bool:
    """Whether two models have the same weights to the bit."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(isinstance(x, Tensor) and torch.equal(x, y) for x, y in pairs)
