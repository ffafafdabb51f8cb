"""What a model says of given answers, and answers it gives: the one place where models are run outside a trainer.

Rows are tokenised as TRL tokenises preference data (standard, conversational, implicit prompt), so that the figures of
the audit and of the monitor are those of the trainer.
"""

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tenfold_shared.errors import UserError
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One answer to one prompt, in token ids."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Scored:
    """What the model says of one row."""

    logps: list[float]
    """log π of each completion token."""
    greedy: bool
    """Whether every token is the most likely one."""
    entropy: float | None = None
    """Mean entropy of the next-token distribution over the completion, nats."""
    hidden_sum: Tensor | None = field(default=None, repr=False)
    """Sum of the last hidden states from the last prompt token to the last but one completion token, `(width,)`."""

    @property
    def total(self) -> float:
        """log π of the completion, nats."""
        return sum(self.logps)

    @property
    def per_token(self) -> float:
        """Mean log π per token."""
        return self.total / max(len(self.logps), 1)


def is_conversational(example: dict[str, Any]) -> bool:
    """Whether the answers are lists of messages."""
    return isinstance(example["chosen"], list)


def tokenize_pair(example: dict[str, Any], tokenizer: Any) -> tuple[Row, Row]:
    """Chosen and rejected row of one example, as TRL's trainer cuts them.

    Raises UserError when `chosen` or `rejected` is missing, or the tokenizer has no chat template for messages.
    """
    if missing := [name for name in ("chosen", "rejected") if name not in example]:
        raise UserError(
            f"the data has no column {', '.join(missing)}", hint="expected chosen, rejected and mostly prompt"
        )
    if "prompt" not in example:
        from trl import extract_prompt

        example = extract_prompt(example)
    if is_conversational(example):
        if not tokenizer.chat_template:
            raise UserError("the data is conversational and the tokenizer has no chat template")
        ids = {
            "prompt": _template(tokenizer, example["prompt"], generation=True),
            "chosen": _template(tokenizer, example["prompt"] + example["chosen"]),
            "rejected": _template(tokenizer, example["prompt"] + example["rejected"]),
        }
    else:
        texts = {"prompt": example["prompt"]}
        for half in ("chosen", "rejected"):
            ended = (
                example[half] if example[half].endswith(tokenizer.eos_token) else example[half] + tokenizer.eos_token
            )
            texts[half] = example["prompt"] + ended
        ids = {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
    cut = min(_common_prefix(ids["prompt"], ids["chosen"]), _common_prefix(ids["prompt"], ids["rejected"]))
    prompt = ids["prompt"][:cut]
    return Row(prompt, ids["chosen"][cut:]), Row(prompt, ids["rejected"][cut:])


def tokenize_prompt(prompt: Any, tokenizer: Any) -> list[int]:
    """A prompt alone, text or messages, ready to be continued."""
    if isinstance(prompt, list):
        return _template(tokenizer, prompt, generation=True)
    return tokenizer(prompt)["input_ids"]


def _template(tokenizer: Any, messages: list[dict[str, str]], generation: bool = False) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=generation, return_dict=True)
    return list(encoded["input_ids"])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batches(rows: Sequence[Row], budget: int) -> list[list[int]]:
    """Row indices in batches of at most `budget` padded tokens (one row at least), rows of like length together."""
    plan: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].completion)):
        length = len(rows[i].prompt) + len(rows[i].completion)
        if plan and (len(plan[-1]) + 1) * length <= budget:
            plan[-1].append(i)
        else:
            plan.append([i])
    return plan


def score(
    model: Any,
    rows: Sequence[Row],
    pad_id: int,
    *,
    budget: int = 4096,
    entropy: bool = False,
    hidden: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[Scored]:
    """Score every row with `model`, without gradients.

    budget: padded tokens in one forward pass; their float32 logits are in memory at once.
    share: (rank, world size); each rank runs the same number of forward passes, and all get all results.
    Completion tokens alone count; a row's figures do not depend on the rows beside it.

    Raises UserError for an empty completion, a prompt of no tokens, or a log-probability that is not finite.
    """
    for i, row in enumerate(rows):
        if not row.prompt or not row.completion:
            raise UserError(f"row {i} has an empty {'completion' if row.prompt else 'prompt'}", hint="drop such rows")
    plan = batches(rows, budget)
    rank, world = share
    padded = plan + [plan[-1]] * (-len(plan) % world) if plan else []
    found: dict[int, Scored] = {}
    for batch in padded[rank::world]:
        found.update(zip(batch, _score_batch(model, [rows[i] for i in batch], pad_id, entropy, hidden), strict=True))
    if world > 1:
        from accelerate.utils import gather_object

        for part in gather_object([found]):
            found.update(part)
    if bad := [i for i, scored in found.items() if not math.isfinite(scored.total)]:
        raise UserError(
            f"the model's log-probability of row {bad[0]} is not finite", hint="NaN in its weights, or fp16"
        )
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def _score_batch(model: Any, rows: Sequence[Row], pad_id: int, entropy: bool, hidden: bool) -> list[Scored]:
    device = next(model.parameters()).device
    ids, attention, _ = pad_rows(rows, pad_id, device)
    outputs = model(input_ids=ids, attention_mask=attention, output_hidden_states=hidden, use_cache=False)
    logits, targets = outputs.logits[:, :-1].float(), ids[:, 1:]
    log_z = logits.logsumexp(-1)
    logps = (logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_z).tolist()
    hits = (logits.argmax(-1) == targets).tolist()
    spread = (log_z - (logits.softmax(-1) * logits).sum(-1)).tolist() if entropy else None
    states = outputs.hidden_states[-1].float() if hidden else None
    scored = []
    for i, row in enumerate(rows):
        # Position t predicts token t + 1.
        span = slice(len(row.prompt) - 1, len(row.prompt) + len(row.completion) - 1)
        scored.append(
            Scored(
                logps[i][span],
                all(hits[i][span]),
                None if spread is None else statistics.fmean(spread[i][span]),
                None if states is None else states[i, span].sum(0).cpu(),
            )
        )
    return scored


def pad_rows(rows: Sequence[Row], pad_id: int, device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and completion mask, `(rows, tokens)`, padded on the right."""
    texts = [row.prompt + row.completion for row in rows]
    length = max(map(len, texts))
    ids = torch.tensor([text + [pad_id] * (length - len(text)) for text in texts])
    place = torch.arange(length)
    start, end = torch.tensor(
        [[len(row.prompt), len(text)] for row, text in zip(rows, texts, strict=True)]
    ).T.unsqueeze(-1)
    attention = (place < end).long()
    completion = attention * (place >= start)
    return ids.to(device), attention.to(device), completion.to(device)


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    tokenizer: Any,
    *,
    n: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    budget: int = 32768,
) -> list[list[list[int]]]:
    """n sampled completions of each prompt, in token ids, the end token included where it was reached.

    The global random state is left as it was. budget: tokens, prompts' and new ones, whose keys and values are in memory
    at once.
    Raises UserError for a temperature or n that is not positive.
    """
    if not temperature > 0 or n < 1:
        raise UserError(f"temperature is {temperature} and n is {n}, expected more than 0")
    from transformers import GenerationConfig

    flat = [prompt for prompt in prompts for _ in range(n)]
    batch = max(1, min(512, budget // (max(map(len, prompts)) + max_new_tokens)))
    device, end = next(model.parameters()).device, tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
        eos_token_id=end,
    )
    out: list[list[int]] = []
    with preserved_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(flat), batch):
            part = flat[start : start + batch]
            width = max(map(len, part))
            ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + p for p in part], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
            generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            out += [_until(row, end) for row in generated[:, width:].tolist()]
    return [out[i : i + n] for i in range(0, len(out), n)]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's random states, on every device, as they were."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Every module in evaluation mode; each one's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
