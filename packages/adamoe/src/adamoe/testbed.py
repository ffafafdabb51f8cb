"""The offline world: a language of easy, hard and unpredictable tokens, and small mixtures that learn it on the spot.

A sequence is made of blocks of four tokens, half of them easy (a cycle symbol and its three successors under a fixed
permutation), half hard: an operator, two values a and b, and the value table[operator][a, b], which has to be memorised.
Every position is labelled by what must be predicted there: "easy" (the successor), "hard" (the table's value) or "random"
(a and b, which cannot be predicted: ln 16 nats). Models are trained on tables A and fine-tuned on tables B, in which half
of the operators have new tables.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from adamoe.config import AdaMoEConfig

VALUES, OPERATORS = 16, 4
VOCABULARY = 2 * VALUES + OPERATORS + 4
KINDS = ("random", "easy", "hard")
UNSCORED = -1


@dataclass
class Language:
    """One set of tables. `batch` draws sequences; `text` writes them with letters a reader can follow."""

    successor: Tensor
    """(16,) permutation of the cycle symbols."""
    tables: Tensor
    """(operators, 16, 16) values."""

    @classmethod
    def make(cls, seed: int) -> "Language":
        """Tables A of a seed."""
        g = torch.Generator().manual_seed(seed)
        # One cycle through all symbols: a permutation with fixed points would be easier than the name says.
        order = torch.randperm(VALUES, generator=g)
        successor = torch.empty(VALUES, dtype=torch.long)
        successor[order] = order.roll(-1)
        return cls(successor, torch.randint(0, VALUES, (OPERATORS, VALUES, VALUES), generator=g))

    def changed(self, seed: int) -> "Language":
        """Tables B: the second half of the operators has new tables."""
        g = torch.Generator().manual_seed(10_000 + seed)
        tables = self.tables.clone()
        tables[OPERATORS // 2 :] = torch.randint(0, VALUES, tables[OPERATORS // 2 :].shape, generator=g)
        return Language(self.successor, tables)

    def batch(self, rows: int, length: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (rows, length) and kinds (rows, length): what must be predicted at each position, -1 for nothing."""
        blocks = -(-length // 4)
        shape = (rows, blocks)
        start, a, b = (torch.randint(0, VALUES, shape, generator=g) for _ in range(3))
        operator = torch.randint(0, OPERATORS, shape, generator=g)
        second = self.successor[start]
        third = self.successor[second]
        easy = torch.stack((start, second, third, self.successor[third]), -1) + VALUES
        hard = torch.stack((operator + 2 * VALUES, a, b, self.tables[operator, a, b]), -1)
        is_hard = (torch.rand(shape, generator=g) < 0.5).unsqueeze(-1)
        tokens = torch.where(is_hard, hard, easy)
        # At position i stands the kind of token i + 1; the first token of the next block is a coin's choice.
        of_easy, of_hard = torch.tensor([1, 1, 1, UNSCORED]), torch.tensor([0, 0, 2, UNSCORED])
        kinds = torch.where(is_hard, of_hard, of_easy)
        return tokens.view(rows, -1)[:, :length], kinds.view(rows, -1)[:, :length]


def symbols() -> list[str]:
    """The vocabulary as text: digits are values, letters cycle symbols, signs operators."""
    values = [f"{i:x}" for i in range(VALUES)]
    cycle = [chr(ord("A") + i) for i in range(VALUES)]
    return values + cycle + ["+", "*", "/", "%"] + ["<pad>", "<s>", "</s>", "<unk>"]


def make_tokenizer() -> Any:
    """A real tokenizer of transformers for the language, one symbol a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(symbols())}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(seed: int = 0, *, model_type: str = "mixtral", **settings: Any) -> Any:
    """A small untrained mixture: hidden 128, 2 layers, 8 experts, 2 of them per token. settings: of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    set_seed(seed)
    values = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts": 8,
        "num_experts_per_tok": 2, "tie_word_embeddings": True, "initializer_range": 0.05, "max_position_embeddings": 256,
        "pad_token_id": 36, "bos_token_id": 37, "eos_token_id": 38,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **settings}))


Step = Callable[[Any, float], None]


def train(
    model: Any,
    language: Language,
    steps: int,
    *,
    seed: int,
    lr: float,
    rows: int = 24,
    length: int = 64,
    after_step: Step | None = None,
) -> list[float]:
    """AdamW with warm-up and linear decay to 10 %, gradients clipped to norm 1; returns the losses.

    after_step: called with the model and the share of training done, for schedules and controllers. The batches depend on
    the seed alone. Router rows carry no weight decay: without a loss of their own it would only shrink them.
    """
    from adamoe.training import set_progress

    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True
    )
    model.train()
    losses = []
    for step in range(steps):
        share = min(1.0, (step + 1) / 20) * (1.0 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        set_progress(model, step / steps)
        tokens, _ = language.batch(rows, length, g)
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if after_step is not None:
            after_step(model, (step + 1) / steps)
        losses.append(float(output.loss.detach()))
    model.eval()
    return losses


def pretrain(seed: int, steps: int = 600) -> tuple[Any, Language]:
    """A top-2 Mixtral trained on tables A, and the language. 0.1 s a step on one thread."""
    language = Language.make(seed)
    model = make_model(seed, router_aux_loss_coef=0.01, output_router_logits=True)
    train(model, language, steps, seed=seed, lr=2e-3)
    model.config.output_router_logits = False
    return model, language


@torch.no_grad()
def score(model: Any, language: Language, *, seed: int = 0, rows: int = 96, length: int = 64) -> dict[str, float]:
    """Held-out figures: cross-entropy, and by kind cross-entropy, accuracy and load (of a converted model)."""
    from adamoe.conversion import is_converted
    from adamoe.records import record_load

    g = torch.Generator().manual_seed(77_000 + seed)
    tokens, kinds = language.batch(rows, length, g)
    kinds, result = kinds[:, :-1], {}
    loads = None
    if is_converted(model):
        with record_load(model, token_ids=tokens) as record:
            logits = model(input_ids=tokens).logits
        loads = record.per_token.float().mean(0)[:, :-1]
        result["load"] = float(record.per_token.float().mean())
    else:
        logits = model(input_ids=tokens).logits
        result["load"] = float(model.config.num_experts_per_tok)
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    right = (logits[:, :-1].argmax(-1) == tokens[:, 1:]).float()
    result["ce"] = float(ce.mean())
    for i, kind in enumerate(KINDS):
        here = kinds == i
        result[f"ce {kind}"], result[f"accuracy {kind}"] = float(ce[here].mean()), float(right[here].mean())
        result[f"load {kind}"] = float(loads[here].mean()) if loads is not None else result["load"]
    return result


def fine_tune(
    model: Any,
    language: Language,
    config: AdaMoEConfig | None,
    *,
    seed: int,
    steps: int = 300,
    prepare: Callable[[Any], Step | None] | None = None,
) -> Any:
    """A copy of the model, converted as `config` says (None: not at all), fine-tuned on `language`.

    prepare: called with the converted copy; may return what to call after each step.
    """
    from adamoe.conversion import convert
    from adamoe.training import LoadController

    model = copy.deepcopy(model)
    if config is not None:
        convert(model, config)
    after = prepare(model) if prepare is not None else None
    if after is None and config is not None and config.target_load is not None:
        controller = LoadController(model)
        after = lambda model, progress: controller.step()  # noqa: E731
    train(model, language, steps, seed=50_000 + seed, lr=1e-3, after_step=after)
    return model


def save(model: Any, folder: Path) -> Path:
    """Write model and tokenizer as a folder that `from_pretrained` opens."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
