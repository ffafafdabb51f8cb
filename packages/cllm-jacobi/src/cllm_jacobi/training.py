"""The training behind `cllm-jacobi train`: a model by hub id or folder, LoRA, accelerate, and resuming after a kill."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_model, load_tokenizer
from transformers import AutoModelForCausalLM

from cllm_jacobi.trainer import ConsistencyConfig, ConsistencyTrainer
from cllm_jacobi.trajectory import load_trajectories, read_official


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written whole; the trainer writes its state last."""
    found = [p for p in output.glob("checkpoint-*") if p.name[11:].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name[11:]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def run(
    model_name: str,
    data: str | Path,
    output: Path,
    *,
    resume: bool = False,
    tokenizer_name: str | None = None,
    lora_r: int = 0,
    dtype: str = "float32",
    **settings: Any,
) -> dict[str, Any]:
    """Train; returns where the model is and the last figures. The model goes to `output`/model, with its tokenizer.

    data: a trajectory file, or the published code's JSON. settings: fields of `ConsistencyConfig`.

    Raises UserError for a model or data that cannot be used, before any training, and when `output` holds checkpoints of a
    run that was not asked to be resumed.
    """
    checkpoint = last_checkpoint(output) if resume else None
    if not resume and last_checkpoint(output) is not None:
        raise UserError(f"{output} holds checkpoints of an earlier run", hint="pass --resume, or another folder")
    tokenizer = load_tokenizer(tokenizer_name or model_name)
    config = ConsistencyConfig(output_dir=str(output), report_to=[], **settings)
    if str(data).endswith(".json"):
        trajectories = read_official(data, eos_token_id=[t for t in [tokenizer.eos_token_id] if t is not None])
    else:
        trajectories = load_trajectories(data, block_size=config.block_size, vocab_size=len(tokenizer))
    model = load_model(AutoModelForCausalLM, model_name, dtype=dtype)
    if broken := next((name for name, weights in model.named_parameters() if not weights.isfinite().all()), None):
        raise UserError(f"the weights '{broken}' of '{model_name}' are not finite", hint="save or download the model again, or pass another --dtype")  # fmt: skip
    peft_config = None
    if lora_r:
        from peft import LoraConfig

        # The published QLoRA settings: r = 32, alpha = 16, dropout 0.05; dropout is switched off with `disable_dropout`.
        peft_config = LoraConfig(
            r=lora_r, lora_alpha=max(lora_r // 2, 1), lora_dropout=0.05, target_modules="all-linear"
        )
    trainer = ConsistencyTrainer(
        model, config, train_dataset=trajectories, processing_class=tokenizer, peft_config=peft_config
    )
    # Trainer prints its log on stdout, which is for results.
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    target = output / "model"
    partial = output / "model.partial"
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()
    logged = [entry for entry in trainer.state.log_history if "consistency_loss" in entry]
    return {
        "model": str(target),
        "steps": trainer.state.global_step,
        "resumed from": None if checkpoint is None else checkpoint.name,
        "packed": trainer.packed,
        "consistency loss": logged[-1]["consistency_loss"] if logged else None,
        "autoregressive loss": logged[-1]["ar_loss"] if logged else None,
    }
