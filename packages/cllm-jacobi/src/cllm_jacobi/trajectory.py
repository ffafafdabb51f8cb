"""Jacobi trajectories: the states that a target passes through on its way to its own greedy answer.

For each prompt, block after block of n tokens: guess the block, iterate y^(j+1) = argmax p(. | y^(j), x), keep every state up
to the fixed point y*, append y* to the prompt (2403.00835, section 3.2.1, Algorithm 1). The fixed point is known beforehand,
it is the greedy answer, so a row stops when it gets there; a last pass over y* checks that it is a fixed point, and what
differs (a near-tie) is counted.

A trajectory file is a Parquet file of one row a prompt. `read_official` and `write_official` speak the JSON of the published code, one
record a block.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from cllm_jacobi import cache as caches
from cllm_jacobi.draft import Drafter, Init
from cllm_jacobi.jacobi import JacobiConfig
from cllm_jacobi.metrics import right_prefix
from cllm_jacobi.sampling import mix

MARK = "run.json"
"""Beside finished batches: which run they belong to."""
IDS = List(Value("int32"))
FEATURES = Features(
    {
        "prompt_ids": IDS,
        "answer_ids": IDS,
        "trajectories": List(List(IDS)),
        "labels": IDS,
        "n": Value("int32"),
        "model": Value("string"),
        "seed": Value("int64"),
        "source_row": Value("int64"),
        "truncated": Value("bool"),
        "disagreements": Value("int32"),
    }
)
"""prompt_ids, answer_ids: ids, EOS included. trajectories: blocks x states x ids; a last block may be shorter than n, tokens
behind the end do not exist. labels: the true answer, may be empty. truncated: the answer was cut by the budget."""


def collect_trajectories(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    block_size: int = 16,
    max_new_tokens: int = 512,
    batch_size: int = 32,
    labels: Sequence[str] | None = None,
    init: Init = "prompt",
    seed: int = 0,
    shards: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Dataset:
    """Trajectories of `model` for each prompt, greedy, as a dataset with the columns of `FEATURES`.

    prompts: texts, or ids. labels: true answers, as texts. shards: a folder in which every finished batch is kept, so that
    a run that was stopped goes on behind its last batch and ends with the same rows.

    Raises UserError for a block size under 1, empty prompts, and shards of another run.
    """
    if block_size < 1:
        raise UserError(f"block_size is {block_size}", hint="16 is usual")
    if not len(prompts):
        raise UserError("there are no prompts to collect from")
    if labels is not None and len(labels) != len(prompts):
        raise UserError(f"there are {len(labels)} labels for {len(prompts)} prompts")
    encoded = [tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
    if empty := [i for i, ids in enumerate(encoded) if not ids]:
        raise UserError(f"prompt {empty[0]} is empty", hint="give at least one token, or leave the row out")
    truth = (
        [tokenizer(t, add_special_tokens=False)["input_ids"] for t in labels]
        if labels is not None
        else [[]] * len(encoded)
    )
    collector = _Collector(model, tokenizer, block_size=block_size, max_new_tokens=max_new_tokens, init=init, seed=seed)
    digest = _digest({**collector.settings(), "batch_size": batch_size, "prompts": encoded, "labels": truth})
    if shards is not None:
        _refuse_foreign(Path(shards), digest)
    parts = []
    for start in range(0, len(encoded), batch_size):
        rows = range(start, min(start + batch_size, len(encoded)))
        file = Path(shards) / f"part-{start:08d}.parquet" if shards is not None else None
        if file is not None and file.exists():
            part = Dataset.from_parquet(str(file), features=FEATURES, cache_dir=str(file.parent / "cache"))
        else:
            part = Dataset.from_list(
                collector([encoded[i] for i in rows], [truth[i] for i in rows], start), features=FEATURES
            )
            if file is not None:
                with replace_atomically(file.with_name(MARK)) as partial:
                    partial.write_text(json.dumps({"digest": digest}), encoding="utf-8")
                with replace_atomically(file) as partial:
                    part.to_parquet(str(partial))
        parts.append(part)
        progress(rows.stop, len(encoded))
    return concatenate_datasets(parts)


def _digest(settings: dict[str, Any]) -> str:
    """One word for everything that decides what a run collects."""
    import hashlib

    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _refuse_foreign(folder: Path, digest: str) -> None:
    """Refuse a folder whose batches belong to another run."""
    mark = folder / MARK
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")).get("digest") != digest:
        raise UserError(
            f"{folder} holds the batches of a run with other prompts or settings", hint="choose another folder"
        )


class _Collector:
    """Collects one batch at a time."""

    def __init__(
        self, model: Any, tokenizer: Any, *, block_size: int, max_new_tokens: int, init: Init, seed: int
    ) -> None:
        self.model, self.n, self.budget, self.init, self.seed = model.eval(), block_size, max_new_tokens, init, seed
        eos = model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos = [eos] if isinstance(eos, int) else list(eos or [])
        pads = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *self.eos, 0)
        self.pad = next(p for p in pads if p is not None)
        self.name = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__

    def settings(self) -> dict[str, Any]:
        return {"n": self.n, "budget": self.budget, "init": str(self.init), "seed": self.seed, "model": self.name}

    @torch.inference_mode()
    def __call__(self, prompts: list[list[int]], labels: list[list[int]], start: int) -> list[dict[str, Any]]:
        """The rows of one batch; `start` is the number of its first prompt."""
        device = self.model.device
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        answers = self.answers(ids, mask)
        states = self.iterate(ids, mask, prompts, answers, start)
        return [
            {
                "prompt_ids": prompt,
                "answer_ids": answer,
                "trajectories": states[i][0],
                "labels": labels[i],
                "n": self.n,
                "model": self.name,
                "seed": self.seed,
                "source_row": start + i,
                "truncated": not answer or answer[-1] not in self.eos,
                "disagreements": states[i][1],
            }
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    def answers(self, ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        """Greedy answers, EOS included, whatever the model's own generation settings are."""
        config = GenerationConfig(max_length=ids.shape[1] + self.budget, do_sample=False, return_dict_in_generate=True)
        # As generate prepares it; generate itself would add the model's penalties, under which y* is no fixed point.
        config._eos_token_tensor, config._pad_token_tensor = (
            torch.tensor(self.eos, dtype=torch.long),
            torch.tensor(self.pad),
        )
        out = JacobiConfig(block_size=1).decoder()(
            self.model,
            ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList(),
            stopping_criteria=StoppingCriteriaList(),
            generation_config=config,
        )
        new = out.sequences[:, ids.shape[1] :].tolist()
        return [row[:length] for row, length in zip(new, out.new_tokens.tolist(), strict=True)]

    def iterate(
        self, ids: torch.Tensor, mask: torch.Tensor, prompts: list[list[int]], answers: list[list[int]], start: int
    ) -> list[tuple[list[list[list[int]]], int]]:
        """For each row its blocks of states, and how many positions of y* are no fixed point in a block pass."""
        n, device, rows = self.n, ids.device, range(len(prompts))
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        fills = [
            Drafter(self.init, p, vocab_size=vocabulary, pad=self.pad, seed=mix(self.seed, start + i, 3))
            for i, p in enumerate(prompts)
        ]
        cache = caches.open_cache(self.model)
        base = mask.sum(1) - 1
        if ids.shape[1] > 1:
            self.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)  # fmt: skip
            cache.activate_past_recording()
        head = ids[:, -1:]
        blocks: list[list[list[list[int]]]] = [[] for _ in rows]
        differ = [0 for _ in rows]

        def feed(inputs: torch.Tensor, done: int) -> torch.Tensor:
            """Predictions behind each of `inputs`, (rows, tokens), fed behind `done` tokens of the block."""
            full = mask[:, : ids.shape[1] - 1 + length + done + inputs.shape[1]]
            positions = base[:, None] + done + torch.arange(inputs.shape[1], device=device)
            return self.model(input_ids=inputs, attention_mask=full, position_ids=positions, past_key_values=cache, use_cache=True).logits.argmax(-1)  # fmt: skip

        length = 0
        for b in range(-(-max(map(len, answers)) // n)):
            targets = [answer[b * n : (b + 1) * n] for answer in answers]
            target = torch.tensor([t + [self.pad] * (n - len(t)) for t in targets], device=device)
            valid = torch.tensor([len(t) for t in targets], device=device)
            inside = torch.arange(n, device=device) < valid[:, None]
            context = [prompts[i] + answers[i][: b * n] for i in rows]
            state = torch.tensor([fills[i].fill(context[i], n) for i in rows], device=device)
            kept = [[state[i, : len(targets[i])].tolist()] for i in rows]
            mask = torch.cat([mask, mask.new_ones(len(prompts), n)], 1)
            done, wrong = 0, torch.zeros_like(inside)
            for _ in range(n):
                active = ((state != target) & inside).any(1)
                if not bool(active.any()):
                    break
                inputs = torch.cat([head, state[:, :-1]], 1)
                state = torch.cat([state[:, :done], feed(inputs[:, done:], done)], 1)
                # Rows that have arrived, and tokens behind the end, hold nobody back.
                right = ((inputs[:, 1:] == target[:, :-1]) | ~inside[:, :-1]).long().cumprod(1).sum(1)
                keep = min(int(right[active].min()) + 1, n - 1) if n > 1 else 0
                caches.take_back(cache, n - max(keep, done))
                # Said behind a right prefix: the model's own word on y*.
                wrong[:, done:keep] = (state != target)[:, done:keep]
                done = max(keep, done)
                state = torch.where(active[:, None], state, target)
                # Positions behind a right prefix are known even where a near-tie says otherwise.
                state[:, :done] = torch.where(inside[:, :done], target[:, :done], state[:, :done])
                for i in rows:
                    if active[i]:
                        kept[i].append(state[i, : len(targets[i])].tolist())
            clean = torch.cat([head, target[:, :-1]], 1)
            wrong[:, done:] = feed(clean[:, done:], done) != target[:, done:]
            caches.take_back(cache, 0)
            length += n
            base = base + n
            head = target[:, -1:]
            for i in rows:
                if targets[i]:
                    if kept[i][-1] != targets[i]:
                        kept[i].append(targets[i])
                    blocks[i].append(kept[i])
                    differ[i] += int((wrong[i] & inside[i]).sum())
        return list(zip(blocks, differ, strict=True))


def save_trajectories(dataset: Dataset, file: str | Path) -> Path:
    """Write a trajectory file, whole or not at all."""
    with replace_atomically(file) as partial:
        dataset.to_parquet(str(partial))
    return Path(file)


def load_trajectories(file: str | Path, *, block_size: int | None = None, vocab_size: int | None = None) -> Dataset:
    """Read and check a trajectory file.

    Raises UserError when it is missing or no trajectory file, was made with another n, holds ids of a larger tokenizer, or a
    trajectory does not end in its answer.
    """
    import pyarrow.parquet as parquet

    path = Path(file)
    if not path.is_file():
        raise UserError(f"trajectory file '{file}' does not exist", hint="make one with cllm-jacobi collect")
    try:
        table = parquet.read_table(path)
        dataset = Dataset.from_list(
            table.select([c for c in FEATURES if c in table.column_names]).to_pylist(), features=FEATURES
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"'{file}' is no trajectory file ({reason})", hint="make one with cllm-jacobi collect"
        ) from error
    check_trajectories(dataset, block_size=block_size, vocab_size=vocab_size)
    return dataset


def check_trajectories(dataset: Dataset, *, block_size: int | None = None, vocab_size: int | None = None) -> None:
    """Raises UserError for what `load_trajectories` names."""
    if not len(dataset):
        raise UserError("there are no trajectories", hint="collect some first")
    for number, row in enumerate(dataset):
        if block_size is not None and row["n"] != block_size:
            raise UserError(f"the trajectories were made with n = {row['n']}, asked for is {block_size}", hint="collect again, or change block_size")  # fmt: skip
        largest = max((max(part, default=0) for part in (row["prompt_ids"], row["answer_ids"])), default=0)
        largest = max([largest, *(max(s, default=0) for b in row["trajectories"] for s in b)])
        if vocab_size is not None and largest >= vocab_size:
            raise UserError(f"row {number} holds the id {largest}, the model has {vocab_size} tokens", hint="use the tokenizer that collected them")  # fmt: skip
        for b, states in enumerate(row["trajectories"]):
            if not states or states[-1] != row["answer_ids"][b * row["n"] : (b + 1) * row["n"]]:
                raise UserError(
                    f"row {number}, block {b}: the last state is not the answer's block", hint="collect the row again"
                )
            if any(len(state) != len(states[-1]) for state in states):
                raise UserError(f"row {number}, block {b}: the states differ in length", hint="collect the row again")


def deduplicate_states(states: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each state once, in order; the fixed point stays last."""
    unique = list(dict.fromkeys(tuple(s) for s in states))
    last = tuple(states[-1])
    return [list(s) for s in unique if s != last] + [list(last)]


def first_wrong(state: Sequence[int], target: Sequence[int]) -> int | None:
    """Index of the first token that differs, None when all are right."""
    right = right_prefix(state, target)
    return None if right == len(target) else right


def write_official(dataset: Dataset, file: str | Path, *, pad_token_id: int = 0) -> Path:
    """Write the published code's JSON: a list of one record a block, short last blocks filled with padding."""
    records = []
    for i, row in enumerate(dataset):
        fixed: list[int] = []
        for b, states in enumerate(row["trajectories"]):
            fill = [pad_token_id] * (row["n"] - len(states[-1]))
            record = {
                "data_id": f"data_{i}",
                "jacobian_itr_id": f"itr_{b}",
                "prompt_ids_len": len(row["prompt_ids"]) + len(fixed),
                "prompt_ids": [row["prompt_ids"] + fixed],
                "answer_trajectory_ids": [state + fill for state in states],
            }
            fixed = fixed + states[-1]
            record["teacher_output_ids"] = [row["prompt_ids"] + fixed + fill]
            record["complete_teacher_output_ids"] = row["answer_ids"]
            if row["labels"]:
                record["labels_ids"] = row["prompt_ids"] + row["labels"]
            records.append(record)
    with replace_atomically(file) as partial:
        partial.write_text(json.dumps(records), encoding="utf-8")
    return Path(file)


def read_official(file: str | Path, *, eos_token_id: int | Sequence[int] = (), model: str = "") -> Dataset:
    """Read the published code's JSON. eos_token_id: where answers end; without it every block is taken whole.

    Raises UserError, naming the record, for a file that is not in that layout.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"trajectory file '{file}' does not exist")
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    number = -1
    try:
        for record in json.loads(path.read_text(encoding="utf-8")):
            number += 1
            groups[record["data_id"]].append(record)
        rows = [_from_official(i, group, ends, model) for i, group in enumerate(groups.values())]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        where = f"record {number}: " if number >= 0 else ""
        raise UserError(
            f"'{file}' is not in the published layout ({where}{type(error).__name__} {error})", hint="expected a list of records with data_id, prompt_ids and answer_trajectory_ids"
        ) from error  # fmt: skip
    if not rows:
        raise UserError(f"'{file}' holds no records")
    return Dataset.from_list(rows, features=FEATURES)


def _from_official(number: int, records: list[dict[str, Any]], ends: set[int], model: str) -> dict[str, Any]:
    records = sorted(records, key=lambda r: int(str(r["jacobian_itr_id"]).rsplit("_", 1)[-1]))
    prompt = _flat(records[0]["prompt_ids"])
    answer: list[int] = []
    blocks = []
    for record in records:
        states = [_flat(state) for state in record["answer_trajectory_ids"]]
        end = next((i + 1 for i, token in enumerate(states[-1]) if token in ends), len(states[-1]))
        blocks.append(deduplicate_states([state[:end] for state in states]))
        answer += states[-1][:end]
        if end < len(states[-1]) or states[-1][end - 1] in ends:
            break
    labels = _flat(records[0].get("labels_ids") or [])
    return {
        "prompt_ids": prompt,
        "answer_ids": answer,
        "trajectories": blocks,
        "labels": labels[len(prompt) :],
        "n": len(_flat(records[0]["answer_trajectory_ids"][0])),
        "model": model,
        "seed": 0,
        "source_row": number,
        "truncated": bool(ends) and answer[-1] not in ends,
        "disagreements": 0,
    }


def _flat(ids: Any) -> list[int]:
    """Ids with or without a batch dimension of one."""
    return [int(t) for t in (ids[0] if ids and isinstance(ids[0], list) else ids)]
