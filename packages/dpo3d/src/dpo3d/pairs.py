"""On-policy preference pairs: sample, score, keep the best and the worst.

Pairs drawn from the model that is trained suffer least from the three D's (2406.07327, section 4.2), and their
provenance is exact: each row says who sampled it and how likely it was.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from datasets import Dataset
from tenfold_shared.errors import UserError

from dpo3d.scoring import Row, evaluating, sample, score, tokenize_prompt

Scorer = Callable[[Any, str], float]
Select = Literal["best_worst", "random"]


def build_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    scorer: Scorer,
    *,
    n: int = 8,
    select: Select = "best_worst",
    drop_ties: bool = True,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> Dataset:
    """Sample `n` answers per prompt, score them, and keep a pair per prompt.

    prompts: texts, or message lists (the pairs are then conversational). scorer: `(prompt, completion) -> float`, a
    verifier, reward model or judge. select: the best and the worst answer (among equals, the first sampled), or a random
    pair of different score. drop_ties: leave prompts out whose answers all score alike; else two random ones are paired.

    Columns: prompt, chosen, rejected, score_chosen, score_rejected, logp_chosen, logp_rejected (nats, of the sampler),
    sampler (its name).

    Raises UserError for no prompts, n under 2, an unknown `select`, a score that is not a number, and when no pair
    survives, with the counts of prompts whose answers were all alike.
    """
    if not prompts:
        raise UserError("no prompts given")
    if n < 2:
        raise UserError(f"n is {n}, expected 2 or more answers per prompt")
    if select not in ("best_worst", "random"):
        raise UserError(f"select is '{select}', expected best_worst or random")
    rng = random.Random(seed)
    ids = [tokenize_prompt(p, tokenizer) for p in prompts]
    rows: list[dict[str, Any]] = []
    scoring: list[Row] = []
    alike: list[float] = []
    with evaluating(model):
        answers = sample(model, ids, tokenizer, n=n, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        for prompt, prompt_ids, samples in zip(prompts, ids, answers, strict=True):
            texts = [tokenizer.decode(s, skip_special_tokens=True) for s in samples]
            scores = [float(scorer(prompt, text)) for text in texts]
            if bad := [s for s in scores if s != s]:
                raise UserError(f"the scorer gave {bad[0]} for prompt {prompt!r}, expected a number")
            best, worst = _choose(scores, select, rng)
            if scores[best] == scores[worst]:
                alike.append(scores[best])
                if drop_ties:
                    continue
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": _as(prompt, texts[best]),
                    "rejected": _as(prompt, texts[worst]),
                    "score_chosen": scores[best],
                    "score_rejected": scores[worst],
                }
            )
            scoring += [Row(prompt_ids, samples[best]), Row(prompt_ids, samples[worst])]
        if not rows:
            high = max(alike)
            good = sum(s == high and s > 0 for s in alike)
            raise UserError(
                f"no pair survives: {good} prompts with all-good and {len(alike) - good} with all-bad answers",
                hint="raise n or the temperature, or choose harder or easier prompts",
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        scored = score(model, scoring, pad)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    for i, row in enumerate(rows):
        row.update(logp_chosen=scored[2 * i].total, logp_rejected=scored[2 * i + 1].total, sampler=name)
    return Dataset.from_list(rows)


def _choose(scores: list[float], select: Select, rng: random.Random) -> tuple[int, int]:
    """Indices of the chosen and the rejected answer."""
    order = range(len(scores))
    if min(scores) == max(scores):
        first, second = rng.sample(order, 2)
        return first, second
    if select == "best_worst":
        return max(order, key=scores.__getitem__), min(order, key=scores.__getitem__)
    while True:
        first, second = sorted(rng.sample(order, 2), key=scores.__getitem__)
        if scores[first] != scores[second]:
            return second, first


def _as(prompt: Any, text: str) -> Any:
    """An answer in the prompt's own format."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text


def iterate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    scorer: Scorer,
    train: Callable[[Any, Dataset, int], Any],
    *,
    rounds: int = 3,
    seed: int = 0,
    **options: Any,
) -> Iterator[tuple[Any, Dataset]]:
    """Rounds of pairs from the present model and training on them; yields the model and the pairs after each round.

    train: `(model, pairs, round) -> model`. options: of `build_pairs`.

    Renewing pairs at every step cures DPO in the toy; that a few rounds do so for a language model is not shown here.
    """
    for i in range(rounds):
        pairs = build_pairs(model, tokenizer, prompts, scorer, seed=seed + i, **options)
        model = train(model, pairs, i)
        yield model, pairs
