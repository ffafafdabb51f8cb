"""Consistency training under transformers' Trainer: one packed pass, one summed loss, one optimizer step a batch.

    L = L_consistency + w L_AR                                       (2403.00835, section 3.2.2, Algorithm 2)

Means are over the tokens of a whole optimizer step: over gradient accumulation and over processes, which is why two
processes give the weights of one.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tenfold_shared.errors import UserError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from cllm_jacobi.losses import DIVERGENCES, ConsistencyTerms, consistency_terms, forward
from cllm_jacobi.metrics import repetition
from cllm_jacobi.packing import IGNORE, DataCollatorForConsistency, can_pack
from cllm_jacobi.trajectory import check_trajectories

logger = logging.get_logger(__name__)
OFFICIAL: dict[str, Any] = {
    "ar_weight": 10.0,
    "label_smoothing": 0.1,
    "mask_prompt": False,
    "augment": True,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": True,
    "max_length": 2048,
}
"""The published script's settings, on 4 GPUs; full sharding comes from accelerate's configuration, bf16 from a flag of yours."""


@dataclass
class ConsistencyConfig(TrainingArguments):
    """TrainingArguments and what consistency training adds.

    Raises UserError for a value out of its range.
    """

    block_size: int | None = field(default=None, metadata={"help": "Tokens of a block; must be the data's own."})
    loss: str = field(default="global", metadata={"help": "global or local."})
    divergence: str = field(default="forward_kl", metadata={"help": "forward_kl, reverse_kl or jsd."})
    jsd_beta: float = field(default=0.5, metadata={"help": "Weight of the teacher in jsd."})
    ar_weight: float = field(default=10.0, metadata={"help": "Weight w of the autoregressive loss."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Of the autoregressive loss."})
    mask_prompt: bool = field(default=True, metadata={"help": "No autoregressive loss on the prompt."})
    use_gt_labels: bool = field(
        default=False, metadata={"help": "Learn the column labels instead of the target's answer."}
    )
    teacher: str = field(
        default="self", metadata={"help": "self (the current model) or frozen (the model at the start)."}
    )
    packed: str = field(default="auto", metadata={"help": "auto, yes or no: one packed row an answer."})
    augment: bool = field(default=False, metadata={"help": "Put right tokens behind wrong ones."})
    states: str = field(default="trajectory", metadata={"help": "trajectory, or random corruption of the answer."})
    max_length: int | None = field(default=None, metadata={"help": "Prompt and answer tokens of a row."})
    disable_dropout: bool = field(default=True, metadata={"help": "With dropout the teacher would not be the student."})
    guard_steps: int = field(default=0, metadata={"help": "Look for collapse on held-out answers every so many steps."})
    guard_rows: int = field(default=64, metadata={"help": "Rows held out for it when there is no eval_dataset."})
    guard_drop: float = field(default=0.2, metadata={"help": "Stop when token accuracy fell by so much."})

    def __post_init__(self) -> None:
        # The collator draws states from whole rows.
        self.remove_unused_columns = False
        if self.block_size is not None and self.block_size < 2:
            raise UserError(
                f"block_size is {self.block_size}", hint="a block of 1 has no guesses to be consistent about"
            )
        for name, known in (
            ("divergence", DIVERGENCES),
            ("teacher", ("self", "frozen")),
            ("packed", ("auto", "yes", "no")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is '{getattr(self, name)}', expected {', '.join(known)}")
        if self.ar_weight < 0 or not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"ar_weight is {self.ar_weight} and label_smoothing {self.label_smoothing}, expected 0 or more, and 0 to 1"
            )
        super().__post_init__()


class ConsistencyTrainer(Trainer):
    """Trainer of a consistency model from trajectories.

    model: a causal LM, started at the target's weights, or a PEFT model. args: `ConsistencyConfig`. train_dataset:
    trajectories as `collect_trajectories` gives them. processing_class: the tokenizer. peft_config: wraps the model in LoRA.

    Raises UserError for data of another block size or tokenizer, or without the labels it shall learn, for packed=yes with a model that cannot, and when the loss
    becomes NaN (the last checkpoint stays).
    """

    def __init__(
        self,
        model: Any,
        args: ConsistencyConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        check_trajectories(train_dataset, block_size=args.block_size, vocab_size=vocabulary)
        bare = (i for i, row in enumerate(train_dataset) if not row.get("labels"))
        if args.use_gt_labels and (row := next(bare, None)) is not None:
            raise UserError(f"use_gt_labels is set and row {row} has no labels", hint="collect with an answer for every prompt")  # fmt: skip
        self.packed = _packing(model, args.packed)
        if peft_config is not None:
            model = _with_adapters(model, peft_config, args)
        if args.ar_weight == 0 and args.teacher == "self":
            logger.warning(
                "ar_weight is 0 and the teacher is the model itself: constant output satisfies this loss, and training finds it"
            )
        if args.disable_dropout:
            _disable_dropout(model)
        pad = getattr(processing_class, "pad_token_id", None)
        pad = model.config.get_text_config(decoder=True).pad_token_id if pad is None else pad
        collator = DataCollatorForConsistency(
            pad_token_id=pad if isinstance(pad, int) else 0,
            loss=args.loss,
            packed=self.packed,
            augment=args.augment,
            states=args.states,
            use_labels=args.use_gt_labels,
            mask_prompt=args.mask_prompt,
            max_length=args.max_length,
            seed=args.seed,
        )
        self.frozen = _frozen(model) if args.teacher == "frozen" else None
        guard = None
        if args.guard_steps:
            if eval_dataset is None:
                held = min(args.guard_rows, len(train_dataset) // 2)
                guard_data = train_dataset.select(range(held))
                train_dataset = train_dataset.select(range(held, len(train_dataset)))
            else:
                guard_data = eval_dataset.select(range(min(args.guard_rows, len(eval_dataset))))
            guard = CollapseGuard(self, guard_data)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # Every term is divided by the counts of the whole step, here.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._counts = torch.ones(2)
        self._parts: list[tuple[float, float]] = []
        self.add_callback(_Epochs(collator))
        if guard is not None:
            self.add_callback(guard)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one step, and how many pairs and labels they hold in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._counts = self._count(batches)
        return batches, self._counts[1]

    def _count(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        pairs = sum(len(b["student"]) for b in batches)
        labels = sum(int((b["shift_labels"] != IGNORE).sum()) for b in batches)
        counts = torch.tensor([pairs, labels], dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts.clamp_min(1)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss."""
        terms = self._terms(model, inputs)
        counts = self._counts if model.training else self._count([inputs])
        consistency, entropy = terms.consistency / counts[0], terms.autoregressive / counts[1]
        loss = consistency + self.args.ar_weight * entropy
        if not torch.isfinite(loss):
            step = self.state.global_step
            mend = "lower the learning rate; the last checkpoint is kept" if step else "check the model's weights; nothing has been trained yet"  # fmt: skip
            raise UserError(f"the loss is {loss.item()} at step {step}", hint=mend)
        if model.training:
            self._parts.append((float(consistency.detach()), float(entropy.detach())))
            # Gradients are averaged over processes; the counts are of all of them.
            loss = loss * self.args.world_size
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _terms(self, model: Any, batch: dict[str, torch.Tensor]) -> ConsistencyTerms:
        teacher = None
        if self.frozen is not None:
            frozen, context = self.frozen(self.accelerator.unwrap_model(model))
            with torch.no_grad(), context:
                teacher = forward(frozen, batch, packed=self.packed)
        return consistency_terms(
            forward(model, batch, packed=self.packed),
            batch,
            kind=self.args.divergence,
            beta=self.args.jsd_beta,
            label_smoothing=self.args.label_smoothing,
            teacher_logits=teacher,
        )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._parts:
            steps = max(len(self._parts) / self.args.gradient_accumulation_steps, 1)
            logs["consistency_loss"] = sum(c for c, _ in self._parts) / steps
            logs["ar_loss"] = sum(a for _, a in self._parts) / steps
            self._parts.clear()
        super().log(logs, *args, **kwargs)


class _Epochs(TrainerCallback):
    """Tells the collator the epoch, by which it draws states."""

    def __init__(self, collator: DataCollatorForConsistency) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed epoch begins at a fraction.
        self.collator.epoch = int((state.epoch or 0) + 1e-6)


class CollapseGuard(TrainerCallback):
    """Watches held-out answers: mean loss, token accuracy and repetition of what the model would say.

    Training that forgets the task shows there long before it shows in the consistency loss, which falls. Stops when the
    accuracy is `guard_drop` below where it started.
    """

    def __init__(self, trainer: ConsistencyTrainer, rows: Dataset) -> None:
        self.trainer, self.rows = trainer, rows

    @torch.no_grad()
    def look(self, model: Any) -> dict[str, float]:
        """`guard_ar_loss`, `guard_accuracy`, `guard_repetition`."""
        trained = model.training
        model.eval()
        collator = self.trainer.data_collator
        loss = right = count = 0.0
        repeats = []
        for start in range(0, len(self.rows), 16):
            rows = [{**self.rows[i], "labels": []} for i in range(start, min(start + 16, len(self.rows)))]
            plain = DataCollatorForConsistency(collator.pad_token_id, packed=False)
            batch = plain([{**row, "trajectories": [[states[-1]] for states in row["trajectories"]]} for row in rows])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            logits = forward(model, batch, packed=False)
            terms = consistency_terms(logits, batch)
            kept = batch["shift_labels"] != IGNORE
            said = logits.argmax(-1)
            loss += float(terms.autoregressive)
            right += int((said == batch["shift_labels"])[kept].sum())
            count += terms.labels
            repeats += [repetition(said[i][kept[i]].tolist()) for i in range(len(said))]
        model.train(trained)
        return {
            "guard_ar_loss": loss / count,
            "guard_accuracy": right / count,
            "guard_repetition": sum(repeats) / len(repeats),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.log(self.look(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % args.guard_steps:
            return
        seen = self.look(model)
        self.trainer.log(seen)
        start = next(entry["guard_accuracy"] for entry in state.log_history if "guard_accuracy" in entry)
        if seen["guard_accuracy"] < start - args.guard_drop:
            logger.warning(
                f"stopped at step {state.global_step}: token accuracy on held-out answers fell from {start:.3f} to "
                f"{seen['guard_accuracy']:.3f}, repetition is {seen['guard_repetition']:.2f}; raise ar_weight or clean the data"
            )
            control.should_training_stop = True


def _packing(model: Any, wanted: str) -> bool:
    flash = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    if wanted == "yes" and flash:
        raise UserError(
            "flash attention cannot follow a packed mask", hint="use attn_implementation='sdpa', or packed='no'"
        )
    if wanted == "yes" and not can_pack(model.config):
        raise UserError(
            f"{type(model).__name__} cannot follow a packed mask (it needs rotary positions and full attention)", hint="use packed='no'"
        )  # fmt: skip
    return wanted == "yes" or (wanted == "auto" and can_pack(model.config))


def _with_adapters(model: Any, peft_config: Any, args: ConsistencyConfig) -> Any:
    from peft import get_peft_model

    targets = set(peft_config.target_modules or ()) | set(peft_config.modules_to_save or ())
    if getattr(model.config, "tie_word_embeddings", False) and targets & {"lm_head", "embed_tokens", "wte"}:
        raise UserError("the head is tied to the embeddings; an adapter on one would untie them", hint="leave lm_head and the embeddings out of target_modules")  # fmt: skip
    adapted = get_peft_model(model, peft_config)
    if args.gradient_checkpointing:
        # Checkpointing detaches a graph whose inputs need no gradient.
        adapted.enable_input_require_grads()
    return adapted


def _disable_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _frozen(model: Any) -> Any:
    """A function from the training model to the frozen teacher and a context to run it in."""
    if hasattr(model, "disable_adapter"):
        return lambda current: (current, current.disable_adapter())
    kept = copy.deepcopy(model).eval().requires_grad_(False)
    return lambda current: (kept, nullcontext())
