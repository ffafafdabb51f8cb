import copy
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dpo3d import testbed
from dpo3d.alarms import Alarms
from dpo3d.monitor import ThreeDMonitor, log_gradient, passive_record
from dpo3d.probe import ProbeSet
from dpo3d.report import passive_history, trainer_log, write_report
from dpo3d.scoring import Row, score
from dpo3d.trl import FlexDPOConfig, FlexDPOTrainer
from tenfold_shared.errors import UserError
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer


def probe_of(digits: Dataset, tokenizer: Any, **options: Any) -> ProbeSet:
    return ProbeSet.from_dataset(digits, tokenizer, **{"n": 6, "k": 2, "enumerator": testbed.known_answers, **options})


def same_weights(a: Any, b: Any) -> bool:
    return testbed.tensors_equal(a.model, b.model)


@pytest.mark.parametrize("kind", ["plain DPO", "flex", "lora"])
def test_training_is_bit_identical(
    kind: str, make_trainer: Any, digits: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    """GPT-2 would hide a lost dropout state: dropout stays on here, so that the random state matters."""
    runs = []
    for watched in (False, True):
        extra: dict[str, Any] = {}
        if kind == "lora":
            from peft import LoraConfig

            extra["peft_config"] = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        classes = (DPOTrainer, DPOConfig) if kind == "plain DPO" else (FlexDPOTrainer, FlexDPOConfig)
        fields = {} if kind == "plain DPO" else {"beta_rejected": 0.02}
        trainer = make_trainer(*classes, extra=extra, max_steps=4, disable_dropout=False, learning_rate=1e-2, **fields)
        if watched:
            ThreeDMonitor(probe_of(digits, tokenizer), 2, output_dir=tmp_path / "log", every_grad=2).attach(trainer)
        trainer.train()
        runs.append(trainer)
    assert same_weights(*runs)


def test_dropout_would_reveal_a_changed_random_state(make_trainer: Any, small_models: dict) -> None:
    """The control: one random number drawn in between changes the weights."""
    from transformers import TrainerCallback

    class Draw(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(1)

    runs = []
    for callbacks in ([], [Draw()]):
        trainer = make_trainer(
            DPOTrainer, DPOConfig, model=small_models["gpt2"], extra={"callbacks": callbacks}, disable_dropout=False
        )
        trainer.train()
        runs.append(trainer)
    assert not same_weights(*runs)


@pytest.fixture(scope="module")
def watched(sorter: Any, digits: Dataset, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A short DPO run under the monitor, at a learning rate that shows everything."""
    folder = tmp_path_factory.mktemp("watched")
    monitor = ThreeDMonitor(probe_of(digits, tokenizer, n=12), 4, output_dir=folder, every_grad=12)
    fields = {"max_steps": 14, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    trainer = testbed.align(sorter, digits, 0, prepare=monitor.attach, **fields)
    return trainer, monitor, folder


def test_evaluations_at_the_start_every_k_steps_and_the_end(watched: Any) -> None:
    _, monitor, folder = watched
    assert [r["step"] for r in monitor.history] == [0, 4, 8, 12, 14]
    logged = [json.loads(line) for line in (folder / "dpo3d_log.jsonl").read_text().splitlines()]
    assert logged == json.loads(json.dumps(monitor.history))


def test_step_zero_is_the_origin(watched: Any) -> None:
    first = watched[1].history[0]
    assert first["delta_chosen"] == first["delta_rejected"] == first["chosen_drawdown"] == 0
    assert first["kl_k1"] == pytest.approx(0, abs=1e-5) and first["kl_k3"] == pytest.approx(0, abs=1e-5)
    assert all(kind["delta"] == 0 for kind in first["kinds"].values())


def test_figures_are_what_scoring_says(watched: Any, sorter: Any) -> None:
    trainer, monitor, _ = watched
    last, probe = monitor.history[-1], monitor.probe
    rows = {
        k: [Row(p, a[0]) for p, a in zip(probe.prompts, probe.answers[k], strict=True)] for k in ("chosen", "rejected")
    }
    now = {k: [s.total for s in score(trainer.model, r, 0)] for k, r in rows.items()}
    then = {k: [s.total for s in score(sorter, r, 0)] for k, r in rows.items()}
    delta = {k: sum(now[k]) / 12 - sum(then[k]) / 12 for k in rows}
    assert last["delta_chosen"] == pytest.approx(delta["chosen"], abs=1e-3)
    assert last["delta_rejected"] == pytest.approx(delta["rejected"], abs=1e-3)
    assert last["chosen_share"] == pytest.approx(delta["chosen"] / (delta["chosen"] - delta["rejected"]), rel=1e-2)
    known = [
        score(trainer.model, [Row(p, a) for a in group], 0)
        for p, group in zip(probe.prompts, probe.answers["known"], strict=True)
    ]
    mass = sum(math.exp(s.total) for group in known for s in group) / 12
    assert last["off_pair_mass"] == pytest.approx(1 - mass, abs=1e-4)
    assert [r["step"] for r in monitor.history if "band" in r] == [0, 12]
    assert monitor.history[3]["band"].keys() == {"low", "high", "inside"}


def test_unseen_kinds(watched: Any) -> None:
    probe = watched[1].probe
    assert set(probe.unseen) == {"ref_samples", "shuffled_chosen", "perturbed"}
    for i in range(len(probe.prompts)):
        pair = probe.answers["chosen"][i] + probe.answers["rejected"][i]
        for kind in probe.unseen:
            assert all(answer not in pair for answer in probe.answers[kind][i])
        (chosen,), (changed,) = probe.answers["chosen"][i], probe.answers["perturbed"][i]
        assert len(chosen) == len(changed) and sum(a != b for a, b in zip(chosen, changed, strict=True)) == 1


def test_the_report_is_self_contained(watched: Any) -> None:
    text = (watched[2] / "dpo3d_report.html").read_text()
    assert text.count("data:image/png;base64,") == 3 and "http" not in text.replace("http-equiv", "")


def test_resumed_run_keeps_its_baseline(make_trainer: Any, digits: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}

    def run(folder: str, **options: Any) -> tuple[Any, ThreeDMonitor]:
        trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, output_dir=str(tmp_path / folder), **fields)
        monitor = ThreeDMonitor(probe_of(digits, tokenizer), 2, output_dir=tmp_path / folder).attach(trainer)
        trainer.train(**options)
        return trainer, monitor

    whole, first = run("whole")
    lines = (tmp_path / "whole" / "dpo3d_log.jsonl").read_text()
    again, second = run("whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same_weights(whole, again)

    def plain(record: dict) -> dict:
        return {k: v for k, v in record.items() if k != "seconds"}

    # The first call's models are bit-identical, so are all figures; step 3 is the extra evaluation of the resumed run.
    kept = [r for r in second.history if r["step"] != 3]
    assert [plain(r) for r in kept] == [plain(json.loads(line)) for line in lines.splitlines()]
    assert first.history[0]["step"] == 0 and second._baseline == first._baseline


def test_resume_without_a_log_says_so(
    make_trainer: Any, digits: Dataset, tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    fields = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    make_trainer(FlexDPOTrainer, FlexDPOConfig, **fields).train()
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, **fields)
    monitor = ThreeDMonitor(probe_of(digits, tokenizer)).attach(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "counted from step 1" in caplog.text and monitor.history[0]["step"] == 1


def record(step: int, **fields: Any) -> dict:
    quiet = {"delta_chosen": 0.5, "delta_rejected": -3.0, "drop_ratio": 6.0, "chosen_share": 0.14}
    return {"step": step, "delta_rejected_per_token": -0.6, "chosen_drawdown": 0.0, **quiet, **fields}


DROP = {"delta_rejected_per_token": -2.0, "drop_ratio": 40.0}
FALL = {"delta_chosen": -2.0, "delta_rejected": -30.0, "chosen_share": -0.07}


@pytest.mark.parametrize(
    ("fields", "kind", "figure", "remedy"),
    [
        (DROP, "drop", "2.00 nats/token", "on-policy pairs"),
        (FALL, "degradation", "-2.00 nats", "sft_gamma=0.25 with sft_reduction=token"),
        ({"chosen_drawdown": 0.2}, "degradation", "0.20 nats/token below", "beta_rejected=0.02"),
        ({"self_ref_logp": -1.2}, "dispersion", "0.90 nats/token under the reference", "learning rate"),
        ({"off_pair_mass": 0.6}, "dispersion", "grew by 0.40", "sft_gamma=0.25"),
    ],
)
def test_each_alarm_names_figure_cause_and_remedy(fields: dict, kind: str, figure: str, remedy: str) -> None:
    first = record(0, self_ref_logp=-0.3, off_pair_mass=0.2)
    (alarm,) = Alarms().check([first, record(10, **fields), record(20, **fields)])
    assert alarm.kind == kind and alarm.step == 20
    assert figure in alarm.message and "Cause: " in alarm.message and remedy in alarm.message.split("Remedy: ")[1]


def test_alarms_are_patient_and_raised_once() -> None:
    history = [record(0), record(10, **DROP)]
    assert not Alarms().check(history)
    assert Alarms(patience=1).check(history)
    history += [record(20, **DROP)]
    assert [a.kind for a in Alarms().check(history)] == ["drop"]
    assert not Alarms().check(history, ["drop"])
    assert not Alarms().check([record(0), record(10), record(20)])


@pytest.mark.parametrize("reaction", ["warn", "save", "stop"])
def test_reactions(
    reaction: Any, make_trainer: Any, digits: Dataset, tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    eager = Alarms(drop_per_token=-1.0, drop_ratio=-1.0, patience=2)
    trainer = make_trainer(DPOTrainer, DPOConfig, output_dir=str(tmp_path))
    ThreeDMonitor(probe_of(digits, tokenizer), 1, alarms=eager, on_alarm=reaction).attach(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "drop at step 1" in caplog.text
    assert trainer.state.global_step == (1 if reaction == "stop" else 3)
    assert bool(list(tmp_path.glob("checkpoint-*"))) == (reaction == "save")


def test_reaction_of_your_own(make_trainer: Any, digits: Dataset, tokenizer: Any) -> None:
    heard: list[str] = []
    trainer = make_trainer(DPOTrainer, DPOConfig)
    eager = Alarms(drop_per_token=-1.0, drop_ratio=-1.0, patience=1)
    ThreeDMonitor(probe_of(digits, tokenizer), alarms=eager, on_alarm=lambda a: heard.append(a.kind)).attach(trainer)
    trainer.train()
    assert heard == ["drop"]


def test_other_trainers(make_trainer: Any, base: Any, digits: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    """KTO and SFT: the probe works on any trainer; SFT keeps no reference, so nothing is said of it."""
    rows = [
        {"prompt": r["prompt"], "completion": r[h], "label": h == "chosen"}
        for r in digits
        for h in ("chosen", "rejected")
    ]
    kto = make_trainer(KTOTrainer, KTOConfig, extra={"train_dataset": Dataset.from_list(rows)}, max_steps=2)
    monitor = ThreeDMonitor(probe_of(digits, tokenizer), 1).attach(kto)
    kto.train()
    assert monitor.history[-1]["self_ref_logp"] is not None and len(monitor.history) == 3
    texts = Dataset.from_list([{"text": r["prompt"] + r["chosen"]} for r in digits])
    args = SFTConfig(str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    sft = SFTTrainer(copy.deepcopy(base), args=args, train_dataset=texts, processing_class=tokenizer)
    monitor = ThreeDMonitor(probe_of(digits, tokenizer), 1).attach(sft)
    sft.train()
    assert monitor.history[-1]["self_ref_logp"] is None and math.isfinite(monitor.history[-1]["entropy"])


def test_conversational_probe(make_trainer: Any, conversation: Dataset, talker: Any) -> None:
    trainer = make_trainer(
        DPOTrainer, DPOConfig, extra={"train_dataset": conversation, "processing_class": talker}, max_steps=2
    )
    monitor = ThreeDMonitor(ProbeSet.from_dataset(conversation, talker, n=4), 1).attach(trainer)
    trainer.train()
    assert len(monitor.history) == 3


def test_own_columns(digits: Dataset, tokenizer: Any) -> None:
    data = digits.add_column("refusal", ["9999"] * len(digits))
    probe = ProbeSet.from_dataset(data, tokenizer, n=3, unseen=(), columns=["refusal"])
    assert probe.unseen == ["refusal"]
    assert probe.answers["refusal"][0] == [tokenizer("9999" + testbed.EOS)["input_ids"]]


def test_passive_monitor(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(DPOTrainer, DPOConfig, output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2)
    monitor = ThreeDMonitor(output_dir=tmp_path).attach(trainer)
    trainer.train()
    assert [r["step"] for r in monitor.history] == [1, 2, 3, 4]
    entry = next(e for e in trainer.state.log_history if e["step"] == 4)
    assert monitor.history[-1]["delta_rejected"] == pytest.approx(float(entry["rewards/rejected"]) / 0.1)
    assert (tmp_path / "dpo3d_report.html").exists()


def test_passive_record_divides_each_half_by_its_own_beta() -> None:
    logs = {"logps/chosen": "-5", "logps/rejected": "-40", "rewards/chosen": "-0.2", "rewards/rejected": "-0.7"}
    found = passive_record(logs, 3, (0.1, 0.02), [])
    assert found is not None
    assert found["delta_chosen"] == pytest.approx(-2) and found["delta_rejected"] == pytest.approx(-35)
    free = passive_record({"logps/chosen": -4, "logps/rejected": -9}, 9, (0.1, 0.1), [found])
    assert free is not None and free["delta_chosen"] == 1 and free["delta_rejected"] == 31
    assert passive_record({"loss": 1.0}, 1, (0.1, 0.1), []) is None


def test_passive_alarms_from_a_finished_run(make_trainer: Any, tmp_path: Path) -> None:
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    make_trainer(DPOTrainer, DPOConfig, **fields).train()
    history, _ = passive_history(trainer_log(tmp_path))
    assert [r["step"] for r in history] == [1, 2, 3, 4]
    log = [
        {"step": s, "logps/chosen": -5 - s, "logps/rejected": -50 - s, "rewards/chosen": -0.2, "rewards/rejected": -4.0}
        for s in range(3)
    ]
    _, alarms = passive_history(log)
    assert [a.kind for a in alarms] == ["drop", "degradation"]


def test_gradient_of_the_log_likelihood(base: Any, digits: Dataset, tokenizer: Any) -> None:
    from dpo3d.scoring import tokenize_pair

    row = tokenize_pair(digits[0], tokenizer)[0]
    gradient = log_gradient(base, [row], 0)
    assert all(p.grad is None for p in base.parameters())
    moved, size = copy.deepcopy(base), 1e-3 / float(gradient.norm())
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(moved.parameters()) + size * gradient, moved.parameters()
    )
    rise = score(moved, [row], 0)[0].total - score(base, [row], 0)[0].total
    assert rise == pytest.approx(size * float(gradient @ gradient), rel=2e-2)


def test_errors(make_trainer: Any, digits: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every is 0"):
        ThreeDMonitor(every=0)
    with pytest.raises(UserError, match="on_alarm is 'shout'"):
        ThreeDMonitor(on_alarm="shout")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="patience is 0"):
        Alarms(patience=0)
    with pytest.raises(UserError, match="no unseen kind 'noise'"):
        ProbeSet.from_dataset(digits, tokenizer, unseen=["noise"])
    with pytest.raises(UserError, match="n is 0"):
        ProbeSet.from_dataset(digits, tokenizer, n=0)
    with pytest.raises(UserError, match="has no rows"):
        ProbeSet.from_dataset(digits.select([]), tokenizer)
    with pytest.raises(UserError, match="no column refusal"):
        ProbeSet.from_dataset(digits, tokenizer, columns=["refusal"])
    whole = Dataset.from_list([{h: row["prompt"] + row[h] for h in ("chosen", "rejected")} for row in digits])
    with pytest.raises(UserError, match="the enumerator needs a column prompt"):
        ProbeSet.from_dataset(whole, tokenizer, enumerator=testbed.known_answers)
    with pytest.raises(UserError, match="two different chosen answers"):
        ProbeSet.from_dataset(digits.select([0]), tokenizer)
    trainer = make_trainer(DPOTrainer, DPOConfig)
    monitor = ThreeDMonitor().attach(trainer)
    with pytest.raises(UserError, match="attached already"):
        monitor.attach(trainer)
    with pytest.raises(UserError, match="no evaluations"):
        write_report(tmp_path / "r.html", [], [])
    with pytest.raises(UserError, match="does not exist"):
        trainer_log(tmp_path / "none")
    with pytest.raises(UserError, match=r"no trainer_state\.json"):
        trainer_log(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{not json")
    with pytest.raises(UserError, match="is not a trainer's state"):
        trainer_log(tmp_path)
    with pytest.raises(UserError, match="no logps/chosen"):
        passive_history([{"loss": 1.0}])


TWO = """
import copy, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from datasets import Dataset
from dpo3d import FlexDPOConfig, FlexDPOTrainer, ProbeSet, ThreeDMonitor, testbed
folder, batch = sys.argv[1], int(sys.argv[2])
tokenizer, model, other = testbed.make_tokenizer(), testbed.make_model(1), testbed.make_model(2)
rows = [{"prompt": p, "chosen": testbed.known_answers(p)[0], "rejected": testbed.known_answers(p)[1]} for p in testbed.held_out(0, 16)]
data = Dataset.from_list(rows)
fields = {"max_steps": 3, "per_device_train_batch_size": batch, "beta_rejected": 0.03, "sft_gamma": 0.05, "logging_steps": 1}
args = testbed.training_arguments(FlexDPOConfig, 0, folder, **fields)
trainer = FlexDPOTrainer(model, other, args, train_dataset=data, processing_class=tokenizer)
ThreeDMonitor(ProbeSet.from_dataset(data, tokenizer, n=5), 2, output_dir=folder).attach(trainer)
trainer.train()
trainer.save_model(folder + "/model")
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Two gloo processes with half the batch each give the weights and the monitor's figures of one process."""
    import os

    from safetensors.torch import load_file

    script = tmp_path / "two.py"
    script.write_text(TWO)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    one = subprocess.Popen([sys.executable, script, tmp_path / "one", "8"], env=settings)
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        "--master_port=0",
        "--standalone",
    ]
    two = subprocess.run(
        [sys.executable, *launch, script, tmp_path / "two", "4"], env=settings, capture_output=True, text=True
    )
    assert one.wait() == 0 and two.returncode == 0, two.stderr[-2000:]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-4, atol=1e-5)
    logs = [(tmp_path / name / "dpo3d_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 3
    for a, b in zip(*logs, strict=True):
        ours, theirs = json.loads(a), json.loads(b)
        assert ours["delta_rejected"] == pytest.approx(theirs["delta_rejected"], abs=1e-3)
        assert ours["kinds"]["ref_samples"]["per_token"] == pytest.approx(
            theirs["kinds"]["ref_samples"]["per_token"], abs=1e-3
        )
