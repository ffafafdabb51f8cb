"""The training behind `dpo3d train`: a model by hub id or folder, PEFT, accelerate, the monitor, and resuming.

Run it on several processes with `accelerate launch -m dpo3d train ...`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_model, load_tokenizer
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from dpo3d.dataset import load_split
from dpo3d.monitor import ThreeDMonitor
from dpo3d.probe import ProbeSet
from dpo3d.trl import FlexDPOConfig, FlexDPOTrainer


@dataclass(frozen=True)
class Request:
    """What the command line adds to TRL's own arguments."""

    output: Path
    resume: bool = False
    monitor: bool = False
    every: int = 50
    probe: int = 64


def parse(arguments: Sequence[str], output: Path) -> tuple[ScriptArguments, FlexDPOConfig, ModelConfig]:
    """TRL's and dpo3d's fields from flags or `--config FILE.yaml`. Raises UserError for what cannot be understood."""
    parser = TrlParser((ScriptArguments, FlexDPOConfig, ModelConfig), prog="dpo3d train")

    def refuse(message: str) -> None:
        raise UserError(message, hint="dpo3d train --options lists every option")

    parser.error = refuse
    if any(a.split("=")[0] == "--output_dir" for a in arguments):
        raise UserError("--output_dir is TRL's name", hint="pass --output")
    try:
        script, config, model = parser.parse_args_and_config([*arguments, "--output_dir", str(output)])
    except (TypeError, ValueError, NotImplementedError, FileNotFoundError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(error)) from error
    if not model.model_name_or_path:
        raise UserError("no model given", hint="pass --model_name_or_path with a hub id or a folder")
    if not script.dataset_name:
        raise UserError("no data given", hint="pass --dataset_name with a file, a saved dataset or a hub id")
    return script, config, model


def options_text() -> str:
    """Every option of `parse`."""
    return TrlParser((ScriptArguments, FlexDPOConfig, ModelConfig), prog="dpo3d train").format_help()


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written whole; the trainer writes its state last."""

    def step(path: Path) -> int:
        return int(path.name.rsplit("-", 1)[-1])

    for path in sorted((p for p in output.glob("checkpoint-*") if p.name[11:].isdigit()), key=step, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def run(arguments: Sequence[str], request: Request) -> dict[str, Any]:
    """Train; returns where the model is and the last figures.

    The model goes to `output/model`, the log to `output/trainer_state.json`, checkpoints beside them.
    Raises UserError for arguments, model or data that cannot be used, before any training.
    """
    script, config, model_config = parse(arguments, request.output)
    name = model_config.model_name_or_path
    tokenizer = load_tokenizer(name, revision=model_config.model_revision)
    train, held_out = _data(script, request)
    if config.eval_strategy != "no" and held_out is None:
        held_out = load_split(script.dataset_name, script.dataset_test_split, config=script.dataset_config)
    peft = get_peft_config(model_config)
    needs_reference = peft is None and not config.precompute_ref_log_probs
    trainer = FlexDPOTrainer(
        _model(name, model_config, config),
        _model(name, model_config, config) if needs_reference else None,
        config,
        train_dataset=train,
        eval_dataset=held_out if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=peft,
    )
    monitor = None
    if request.monitor:
        probe = ProbeSet.from_dataset(held_out, tokenizer, n=request.probe)
        monitor = ThreeDMonitor(probe, request.every, output_dir=request.output).attach(trainer)
    checkpoint = last_checkpoint(request.output) if request.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _save(trainer, request.output / "model")
    trainer.save_state()
    result: dict[str, Any] = {
        "model": str(request.output / "model"),
        "steps": trainer.state.global_step,
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "loss": trainer.state.log_history[-1].get("train_loss"),
    }
    if monitor is not None:
        result["alarms"] = "; ".join(alarm.kind for alarm in monitor.raised) or "none"
        result["report"] = str(request.output / "dpo3d_report.html")
    return result


def _model(name: str, model_config: ModelConfig, config: FlexDPOConfig) -> Any:
    wanted = {
        "revision": model_config.model_revision,
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "quantization_config": get_quantization_config(model_config),
        **(config.model_init_kwargs or {}),
    }
    return load_model(AutoModelForCausalLM, name, **{k: v for k, v in wanted.items() if v is not None})


def _data(script: ScriptArguments, request: Request) -> tuple[Dataset, Dataset | None]:
    """Training pairs, and where the monitor wants a probe pairs that are not trained on: the test split or a part."""
    train = load_split(script.dataset_name, script.dataset_train_split, config=script.dataset_config)
    if missing := sorted({"chosen", "rejected"} - set(train.column_names)):
        raise UserError(
            f"the data has no column {', '.join(missing)}", hint="expected chosen, rejected and mostly prompt"
        )
    if not request.monitor:
        return train, None
    try:
        held_out = load_split(script.dataset_name, script.dataset_test_split, config=script.dataset_config)
        if held_out._fingerprint != train._fingerprint:
            return train, held_out
    except UserError:
        pass
    if len(train) < 4:
        raise UserError(f"the data has {len(train)} rows, too few to hold some out for the monitor")
    parts = train.train_test_split(test_size=min(request.probe, max(len(train) // 10, 2)), seed=0)
    return parts["train"], parts["test"]


def _save(trainer: Any, target: Path) -> None:
    """Write the model beside its place and move it there, so that a kill leaves no half model."""
    partial = target.with_name(target.name + ".partial")
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        import shutil

        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    trainer.accelerator.wait_for_everyone()
