"""Fine-tuning with transformers' Trainer: the schedule, the controller, LoRA, checkpoints and an exact resume."""

import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tenfold_shared import hub
from tenfold_shared.errors import UserError
from torch import Tensor

from adamoe.checkpoints import copy_tokenizer, from_pretrained
from adamoe.config import AdaMoEConfig
from adamoe.conversion import base_of, convert, is_converted, layer_routers, revert, settings_of
from adamoe.errors import ConfigError
from adamoe.training import AnnealCallback, TargetLoadCallback

METHODS = ("adamoe", "topk", "top1", "top_p")


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; checked when made (ConfigError)."""

    method: str = "adamoe"
    """"adamoe"; "topk": the stock router; "top1": one expert; "top_p": the fewest experts that reach `threshold`."""
    steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 5e-5
    lora: bool = False
    """LoRA of rank 8 on attention and experts, the router whole; only these are trained (extra `peft`)."""
    threshold: float = 0.5
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is '{self.method}'", hint=f"take one of {', '.join(METHODS)}")
        for name in ("steps", "batch_size", "accumulation", "save_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr is {self.lr}, expected a number above 0")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file. Raises UserError when it is not UTF-8; the OSError of a file that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 ({error.reason})", hint="convert it first") from error


def read_texts(path: str | Path) -> list[str]:
    """The `text` of every line of a JSONL file. Raises UserError, which names the line, for anything else."""
    texts = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["text"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number} has no text", hint='write one {"text": ...} a line') from error
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path} line {number} has an empty text", hint='write one {"text": ...} a line')
        texts.append(text)
    if not texts:
        raise UserError(f"{path} is empty", hint='write one {"text": ...} a line')
    return texts


def collate(rows: Sequence[Any], pad: int) -> dict[str, Tensor]:
    """Token lists of any lengths to input_ids, attention_mask and labels (-100 at padding), all (B, S)."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def prepare(model: Any, recipe: Recipe, config: AdaMoEConfig) -> Any:
    """Convert the model as the method asks, and wrap it with LoRA where the recipe says so."""
    if recipe.method != "adamoe":
        if is_converted(model):
            revert(model)
        values = {**config.to_dict(), "num_null_experts": 0, "target_load": None}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="top_k 1 .* changes the function")  # it is what was asked for
            convert(model, AdaMoEConfig.from_dict({**values, "top_k": 1 if recipe.method == "top1" else "preserve"}))
        if recipe.method == "top_p":
            from adamoe.routers import top_p, use

            use(model, top_p, threshold=recipe.threshold)
    elif not is_converted(model):
        convert(model, config)
    return with_lora(model) if recipe.lora else model


def with_lora(model: Any) -> Any:
    """LoRA of rank 8 on the attention's and the experts' matrices; the routers, nulls included, are trained whole.

    Experts and routers are no linear modules: the experts' matrices are reached by `target_parameters`, which allow no
    dropout. Raises UserError when peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("LoRA needs peft", hint="pip install adamoe[peft]") from error
    base = base_of(model)
    experts = sorted({n.rpartition(".")[2] for n, p in base.named_parameters() if ".experts." in n and p.dim() == 3})
    linear = {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "attn" in n}
    blocks = sorted(
        {".".join(n.split(".")[-3:-1]) for n, p in base.named_parameters() if ".experts." in n and p.dim() == 3}
    )
    router = next(n.rpartition(".")[2] for n, m in base.named_modules() if hasattr(m, "adamoe_watchers"))
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=sorted(linear), modules_to_save=[router],
        target_parameters=[f"{block}.{name}" for block in blocks for name in experts],
    )  # fmt: skip
    return get_peft_model(model, config)


def fine_tune(
    source: str | Path, rows: Sequence[Any], recipe: Recipe, config: AdaMoEConfig, *, output: Path,
    resume: bool = False, pad: int = 0, device: str = "auto",
) -> tuple[Any, list[float]]:  # fmt: skip
    """Fine-tune the model in `source` with Trainer; returns it (LoRA merged back by the caller, if ever) and the losses.

    rows: mappings with input_ids. config: of a converted model only the way of training counts. Checkpoints go to output/checkpoints, the model to output/model. resume: go on from the
    last checkpoint, with the weights an uninterrupted run would have; the recipe must be the same.

    Launched by `accelerate launch` or torchrun, it runs on all processes. Raises UserError when there is nothing to resume.
    """
    from accelerate.utils import set_seed
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    set_seed(recipe.seed)
    folder = output / "checkpoints"
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    if resume and last is None:
        raise UserError(f"'{output}' holds no checkpoint to resume from", hint="run without --resume")
    model = load_for_training(last if last and not recipe.lora else source, config)
    model = prepare(model, recipe, config)
    callbacks: list[Any] = [AnnealCallback()]
    settings, router = base_of(model).adamoe.config, next(layer_routers(model))
    if settings.target_load is not None:
        settings.check_target(settings.target_load, router.num_experts, router.adamoe_top_k)
        callbacks.append(TargetLoadCallback())
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation, learning_rate=recipe.lr, save_steps=recipe.save_steps,
        save_total_limit=2, seed=recipe.seed, report_to="none", logging_steps=1, lr_scheduler_type="linear",
        weight_decay=0.0, max_grad_norm=1.0, use_cpu=device == "cpu", ddp_find_unused_parameters=False,
        disable_tqdm=False, remove_unused_columns=False,
    )  # fmt: skip
    # Trainer would wrap the model in DataParallel where it sees several GPUs; for those there is `accelerate launch`.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        callbacks=callbacks,
        data_collator=lambda b: collate(b, pad),
    )
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its log where our results go
        trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        with hub.replace_atomically(output / "model") as partial:
            model.save_pretrained(partial)
            copy_tokenizer(source, partial)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def load_for_training(name: str | Path, config: AdaMoEConfig) -> Any:
    """A converted model, which is to be trained as `config` says, or a stock one.

    A checkpoint is opened with `from_pretrained`: Trainer's own loading takes the on-disk names of the experts for names of
    the model and leaves the fused experts as they were.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    saved = settings_of(hub.load_model(AutoConfig, name, use_safetensors=None))
    if saved is not None:
        return from_pretrained(name, adamoe_config=saved.trained_as(config))
    return hub.load_model(AutoModelForCausalLM, name)
