"""Consistency training under Trainer: one process or two, cut short or not, the same weights."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cllm_jacobi import ConsistencyConfig, ConsistencyTrainer, testbed
from cllm_jacobi.losses import consistency_terms, forward
from cllm_jacobi.trajectory import FEATURES, write_official
from datasets import Dataset
from in_process import command, half
from safetensors.torch import load_file
from tenfold_shared.errors import UserError

N = 8


def made_up(count: int = 24) -> Dataset:
    """Queries as answers, and states that become right from the left: what a target gives, without one."""
    import random

    words = {w: i for i, w in enumerate(testbed.vocabulary())}
    rng = random.Random(0)
    rows = []
    for i, (question, query) in enumerate(testbed.questions(count)):
        prompt = [words[w] for w in testbed.prompt(question).split()]
        answer = [words[w] for w in query.split()] + [1]
        blocks = []
        for start in range(0, len(answer), N):
            target = answer[start : start + N]
            blocks.append(
                [target[:k] + [rng.choice(prompt) for _ in target[k:]] for k in range(len(target))] + [target]
            )
        rows.append(
            {"prompt_ids": prompt, "answer_ids": answer, "trajectories": blocks, "labels": [], "n": N, "model": "", "seed": 0,
             "source_row": i, "truncated": False, "disagreements": 0}
        )  # fmt: skip
    return Dataset.from_list(rows, features=FEATURES)


def config(output: Path, **settings: Any) -> ConsistencyConfig:
    wanted = {
        "max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "block_size": N,
    }  # fmt: skip
    return ConsistencyConfig(output_dir=str(output), **{**wanted, **settings})


def train(output: Path, *, data: Any = None, model: Any = None, **settings: Any) -> ConsistencyTrainer:
    peft_config = settings.pop("peft_config", None)
    trainer = ConsistencyTrainer(
        model or testbed.untrained(layers=1), config(output, **settings), train_dataset=data or made_up(),
        processing_class=testbed.tokenizer(), peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    return trainer


def difference(a: Any, b: Any) -> float:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return max(float((left[k].double() - right[k].double()).abs().max()) for k in left)


def test_both_losses_fall(tmp_path):
    log = train(tmp_path, max_steps=25, learning_rate=5e-3, num_train_epochs=9).state.log_history
    first, last = log[0], [e for e in log if "ar_loss" in e][-1]
    assert last["ar_loss"] < 0.75 * first["ar_loss"]
    assert first["loss"] == pytest.approx(first["consistency_loss"] + 10 * first["ar_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"loss": "local"}, {"divergence": "reverse_kl"}, {"divergence": "jsd"}, {"teacher": "frozen"}, {"augment": True}, {"states": "random"}, {"packed": "no"}, {"label_smoothing": 0.1, "mask_prompt": False}],
)  # fmt: skip
def test_every_setting_trains(tmp_path, settings):
    trainer = train(tmp_path, **settings)
    assert trainer.state.global_step == 3 and difference(trainer.model, testbed.untrained(layers=1)) > 0


def test_packed_training_is_unpacked_training(tmp_path):
    packed, unpacked = train(tmp_path, packed="yes"), train(tmp_path, packed="no")
    assert packed.packed and not unpacked.packed
    assert difference(packed.model, unpacked.model) < 2e-4  # Adam amplifies rounding of tiny gradients


def test_accumulated_steps_are_one_large_batch(tmp_path):
    """Means are over all tokens of a step, so micro-batches of any size give the same update."""
    whole = train(tmp_path, per_device_train_batch_size=8, **SGD)
    parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **SGD)
    assert difference(whole.model, testbed.untrained(layers=1)) > 1e-3 and difference(whole.model, parts.model) < 1e-6
    assert whole.state.log_history[0]["loss"] == pytest.approx(parts.state.log_history[0]["loss"], rel=1e-4)


def test_a_frozen_teacher_stays(tmp_path):
    """At the first step both teachers are the same weights; later they are not."""
    one = [train(tmp_path, teacher=t, max_steps=1, optim="sgd").model for t in ("self", "frozen")]
    assert difference(*one) < 1e-7
    few = [train(tmp_path, teacher=t, max_steps=4, learning_rate=0.5, optim="sgd").model for t in ("self", "frozen")]
    assert difference(*few) > 1e-7


def test_lora_and_checkpointing(tmp_path):
    from peft import LoraConfig

    model = testbed.untrained(layers=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = train(
        tmp_path, model=model, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), gradient_checkpointing=True, learning_rate=0.05
    )  # fmt: skip
    assert all(torch.equal(v, before[k.replace(".base_layer", "")]) for k, v in trainer.model.base_model.model.state_dict().items() if "lora" not in k)  # fmt: skip
    assert max(float(p.abs().max()) for k, p in trainer.model.named_parameters() if "lora_B" in k) > 0
    frozen = train(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"]), teacher="frozen")
    assert frozen.state.global_step == 3
    with pytest.raises(UserError, match="the head is tied"):
        train(tmp_path, peft_config=LoraConfig(r=4, target_modules=["lm_head"]))


def test_the_saved_model_is_the_trained_one(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = train(tmp_path)
    trainer.save_model(str(tmp_path / "model"))
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), trainer.model) == 0


def test_evaluation_gives_the_loss(tmp_path):
    data = made_up(6)
    model = testbed.untrained(layers=1)
    trainer = ConsistencyTrainer(
        model, config(tmp_path), train_dataset=data, eval_dataset=data, processing_class=testbed.tokenizer()
    )
    loss = trainer.evaluate()["eval_loss"]
    batches = [trainer.data_collator([data[i] for i in rows]) for rows in ((0, 1, 2, 3, 4, 5),)]
    terms = consistency_terms(forward(model, batches[0], packed=True), batches[0])
    assert loss == pytest.approx(float(terms.total(10.0)), rel=0.05)


def test_the_guard_sees_collapse(tmp_path, caplog):
    """Without the autoregressive term the task is forgotten; the guard stops, and the trainer had warned."""
    import transformers

    data = made_up(40)
    model = train(tmp_path / "a", data=data, max_steps=60, learning_rate=1e-2, num_train_epochs=9).model
    transformers.logging.enable_propagation()
    try:
        trainer = train(
            tmp_path / "b", data=data, model=model, ar_weight=0.0, max_steps=400, learning_rate=3e-2, guard_steps=5, guard_rows=16, guard_drop=0.2
        )  # fmt: skip
    finally:
        transformers.logging.disable_propagation()
    assert "constant output satisfies this loss" in caplog.text and "stopped at step" in caplog.text
    seen = [e["guard_accuracy"] for e in trainer.state.log_history if "guard_accuracy" in e]
    assert trainer.state.global_step < 400 and seen[-1] < seen[0] - 0.2
    assert all(
        {"guard_ar_loss", "guard_repetition"} <= set(e) for e in trainer.state.log_history if "guard_accuracy" in e
    )


def test_the_published_json_trains(tmp_path):
    """A tiny Llama on a file in the published layout, through the same call as the command."""
    from cllm_jacobi.training import run

    write_official(
        made_up(8), tmp_path / "cleaned_task_jacobi_max_new_tokens8_augFalse_labels_False_max_seq_len_64.json"
    )
    (file,) = tmp_path.glob("*.json")
    testbed.save(testbed.untrained(layers=1), tmp_path / "target")
    result = run(
        str(tmp_path / "target"), file, tmp_path / "out", max_steps=2, per_device_train_batch_size=2, use_cpu=True, logging_steps=1, disable_tqdm=True
    )  # fmt: skip
    assert result["steps"] == 2 and (tmp_path / "out/model/model.safetensors").exists()
    with pytest.raises(UserError, match="checkpoints of an earlier run"):
        run(str(tmp_path / "target"), file, tmp_path / "out", max_steps=2, use_cpu=True)


def test_bad_settings_and_data(tmp_path):
    for settings, cause in (
        ({"divergence": "l2"}, "divergence is 'l2'"),
        ({"teacher": "ema"}, "teacher is 'ema'"),
        ({"ar_weight": -1.0}, "ar_weight is -1"),
        ({"block_size": 1}, "no guesses"),
        ({"loss": "both"}, "loss is 'both'"),
        ({"block_size": 16}, "made with n = 8, asked for is 16"),
        ({"use_gt_labels": True}, "row 0 has no labels"),
    ):
        with pytest.raises(UserError, match=cause):
            train(tmp_path, **settings)
    broken = made_up(2).to_list()
    broken[1]["prompt_ids"][0] = 9999
    with pytest.raises(UserError, match="the model has"):
        train(tmp_path, data=Dataset.from_list(broken, features=FEATURES))


def test_packed_where_it_cannot_be(tmp_path, tiny):
    data = Dataset.from_list([{**row, "prompt_ids": [5], "answer_ids": [3, 4], "trajectories": [[[9, 4], [3, 4]]]} for row in made_up(4).to_list()], features=FEATURES)  # fmt: skip
    with pytest.raises(UserError, match="cannot follow a packed mask"):
        train(tmp_path, model=tiny("mistral"), data=data, packed="yes")
    flash = testbed.untrained(layers=1)
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="flash attention cannot follow a packed mask"):
        train(tmp_path, model=flash, packed="yes")


def test_nan_stops_and_keeps_the_checkpoint(tmp_path):
    model = testbed.untrained(layers=1)

    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.model.norm.weight.data.fill_(float("nan"))

    trainer = ConsistencyTrainer(
        model, config(tmp_path, save_strategy="steps", save_steps=1, max_steps=4), train_dataset=made_up(), processing_class=testbed.tokenizer()
    )  # fmt: skip
    trainer.add_callback(Poison())
    with pytest.raises(UserError, match="the loss is nan at step 2"):
        trainer.train()
    assert torch.isfinite(load_file(tmp_path / "checkpoint-1/model.safetensors")["model.norm.weight"]).all()


SGD = {"max_steps": 4, "optim": "sgd", "learning_rate": 2e-3, "max_grad_norm": 0.0}
"""Without clipping, which would hide a wrong scale of the gradients."""


def test_two_gloo_processes_are_one(tmp_path, processes):
    """Half the batch each, four steps, the weights of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [processes.Process(target=half, args=(rank, port, str(tmp_path / "2"))) for rank in (0, 1)]
    for process in both:
        process.start()
    one = train(tmp_path / "1", per_device_train_batch_size=8, **SGD).model.state_dict()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    two = load_file(tmp_path / "2/model/model.safetensors")
    assert max(float((one[k] - two[k]).abs().max()) for k in two) < 1e-6


def test_killed_and_resumed_ends_with_the_same_weights(tmp_path, processes):
    """kill -9 in the middle, --resume, and the weights of the run that nobody disturbed."""
    from cllm_jacobi import cli, save_trajectories
    from typer.testing import CliRunner

    save_trajectories(made_up(), tmp_path / "data.parquet")
    testbed.save(testbed.untrained(layers=1), tmp_path / "target")
    words = [
        "train", "--model", str(tmp_path / "target"), "--data", str(tmp_path / "data.parquet"), "--max-steps", "20",
        "--batch-size", "4", "--save-steps", "2", "--learning-rate", "0.002", "--device", "cpu", "--json",
    ]  # fmt: skip
    killed = processes.Process(target=command, args=([*words, "--output", str(tmp_path / "b")],))
    killed.start()
    until = time.monotonic() + 400
    while not (tmp_path / "b/checkpoint-4/trainer_state.json").exists() and time.monotonic() < until:
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert not (tmp_path / "b/model").exists()
    assert "earlier run" in CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "b")]).stderr
    resumed = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "b"), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["resumed from"].startswith("checkpoint-")
    assert CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "a")]).exit_code == 0
    a, b = (load_file(tmp_path / w / "model/model.safetensors") for w in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)
