import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dpo3d import testbed
from dpo3d.cli import app
from safetensors.torch import load_file
from typer.testing import CliRunner


def run(*arguments: Any, code: int = 0) -> Any:
    """Call the command in this process; the exit code must be as told."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments: Any) -> str:
    """The one line of an error."""
    text = run(*arguments, code=2).stderr
    lines = [line for line in text.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, sorter: Any, tokenizer: Any, digits: Dataset) -> dict[str, Path]:
    """A model folder in the real format and data files, as a user has them."""
    folder = tmp_path_factory.mktemp("world")
    sorter.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    digits.to_json(folder / "pairs.jsonl")
    digits.select_columns(["prompt"]).to_json(folder / "prompts.jsonl")
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "1234=", "chos')
    (folder / "no_columns.jsonl").write_text('{"text": "a"}\n')
    return {"model": folder / "model", "folder": folder, "pairs": folder / "pairs.jsonl"}


CPU = [
    "--use_cpu",
    "--bf16",
    "False",
    "--report_to",
    "none",
    "--gradient_checkpointing",
    "False",
    "--disable_tqdm",
    "True",
]


def train_arguments(world: dict[str, Path], output: Path, *more: str) -> list[Any]:
    base = ["train", "--model_name_or_path", world["model"], "--dataset_name", world["pairs"], "--output", output]
    return [*base, *CPU, "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--logging_steps", "1", *more]


def test_help_and_version_without_torch() -> None:
    for arguments in (
        ["--help"],
        ["--version"],
        *([c, "--help"] for c in ("demo", "toy", "audit", "pairs", "train", "watch", "bench")),
    ):
        assert run(*arguments).stdout
    code = "import sys, dpo3d, dpo3d.cli; assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names() -> None:
    import dpo3d

    assert all(getattr(dpo3d, name) is not None for name in dpo3d.__all__) and set(dpo3d.__all__) <= set(dir(dpo3d))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dpo3d.nothing  # noqa: B018


def test_toy(tmp_path: Path) -> None:
    small = ["--width", 8, "--steps", 20, "--seeds", 2, "--output", tmp_path]
    result = run("toy", "--scenario", "1,3", "--loss", "dpo,flex.02,orpo", "--json", *small)
    rows = json.loads(result.stdout)
    assert len(rows) == 6 and rows[0]["scenario"] == "S1"
    assert "the paper's curve" in result.stderr
    for name in ("toy_curves", "toy_heat_maps", "toy_gradients_dpo", "toy_gradients_flex.02"):
        assert (tmp_path / f"{name}.png").exists() and (tmp_path / f"{name}.svg").exists(), name


def test_toy_errors(tmp_path: Path) -> None:
    assert "no method named 'dpoo'" in refused("toy", "--loss", "dpoo", "--output", tmp_path)
    assert "scenario 9 does not exist" in refused("toy", "--scenario", "9", "--output", tmp_path)
    assert "scenario is 'one'" in refused("toy", "--scenario", "one", "--output", tmp_path)
    assert "activation is 'selu'" in refused("toy", "--activation", "selu", "--output", tmp_path)
    assert not list(tmp_path.iterdir())


def test_audit(world: dict[str, Path], tmp_path: Path) -> None:
    arguments = [
        "audit",
        "--model",
        world["model"],
        "--dataset",
        world["pairs"],
        "--output",
        tmp_path,
        "--max-new-tokens",
        9,
    ]
    result = run(*arguments, "--json", "--band", "--keep", "S1,S2", "--max-ches-quantile", 0.9)
    assert json.loads(result.stdout)["pairs"] == 24
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 24
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept and kept[0].keys() == {"prompt", "chosen", "rejected"}
    assert "start with sft_gamma" in run(*arguments, "--limit", 6).stdout


def test_audit_errors(world: dict[str, Path], tmp_path: Path) -> None:
    folder = world["folder"]

    def audit(dataset: Any, model: Any = world["model"]) -> str:
        return refused("audit", "--model", model, "--dataset", dataset, "--output", tmp_path / "out")

    assert "does not exist" in audit(folder / "none.jsonl")
    assert "is empty" in audit(folder / "empty.jsonl")
    assert "could not be read" in audit(folder / "broken.jsonl")
    assert "no column chosen, rejected" in audit(folder / "no_columns.jsonl")
    assert "is no data file or saved dataset" in audit(folder)
    assert "neither a data file here nor a dataset" in audit("someone/some-pairs")
    assert "does not exist" in audit(world["pairs"], folder / "no-model")
    assert "neither a folder here nor a model" in audit(world["pairs"], "someone/some-model")
    (folder / "half").mkdir(exist_ok=True)
    for file in world["model"].iterdir():
        whole = file.read_bytes()
        (folder / "half" / file.name).write_bytes(whole[:200] if file.suffix == ".safetensors" else whole)
    assert "holds a damaged safetensors file" in audit(world["pairs"], folder / "half")
    assert "device 'abacus' cannot be used" in refused(
        "audit",
        "--model",
        world["model"],
        "--dataset",
        world["pairs"],
        "--device",
        "abacus",
        "--output",
        tmp_path / "out",
    )
    assert not (tmp_path / "out").exists()


def test_saved_datasets(world: dict[str, Path], digits: Dataset, tmp_path: Path) -> None:
    from datasets import DatasetDict
    from dpo3d.dataset import load_split
    from tenfold_shared.errors import UserError

    digits.save_to_disk(tmp_path / "one")
    DatasetDict({"train": digits}).save_to_disk(tmp_path / "many")
    assert len(load_split(str(tmp_path / "one"))) == len(load_split(str(tmp_path / "many"))) == 24
    with pytest.raises(UserError, match="no split 'test'.*train"):  # noqa: RUF043
        load_split(str(tmp_path / "many"), "test")


def test_pairs(world: dict[str, Path], tmp_path: Path) -> None:
    base = ["pairs", "--model", world["model"], "--output", tmp_path / "out", "--max-new-tokens", 9]
    prompts = ["--prompts", world["folder"] / "prompts.jsonl"]
    result = run(*base, *prompts, "--scorer", "dpo3d.testbed:is_right", "--json")
    told = json.loads(result.stdout)
    rows = [json.loads(line) for line in Path(told["file"]).read_text().splitlines()]
    assert len(rows) == told["pairs"] > 5 and rows[0]["score_chosen"] == 1
    assert "expected module:function" in refused(*base, *prompts, "--scorer", "nothing")
    assert "could not be imported" in refused(*base, *prompts, "--scorer", "no_such_module:f")
    wrong = ["--prompts", world["folder"] / "no_columns.jsonl"]
    assert "has no column prompt" in refused(*base, *wrong, "--scorer", "dpo3d.testbed:is_right")


def test_train_with_monitor_then_watch(world: dict[str, Path], tmp_path: Path) -> None:
    arguments = train_arguments(world, tmp_path, "--max_steps", "4", "--beta_rejected", "0.02", "--sft_gamma", "0.05")
    told = json.loads(run(*arguments, "--monitor", "--monitor-every", 2, "--probe", 4, "--json").stdout)
    assert told["steps"] == 4 and Path(told["report"]).read_text().count("data:image/png") == 3
    assert (tmp_path / "model" / "model.safetensors").exists() and not (tmp_path / "model.partial").exists()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(told["model"]) and AutoTokenizer.from_pretrained(told["model"])
    page = Path(told["report"])
    page.unlink()
    # The monitor's own log gives its whole page again; without it what the trainer logged gives the passive one.
    rows = json.loads(run("watch", tmp_path, "--json").stdout)
    assert [row["step"] for row in rows] == [0, 2, 4] and page.read_text().count("data:image/png") == 3
    (tmp_path / "dpo3d_log.jsonl").rename(tmp_path / "kept.jsonl")
    rows = json.loads(run("watch", tmp_path, "--beta-rejected", 0.02, "--json").stdout)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and page.read_text().count("data:image/png") == 1
    (tmp_path / "dpo3d_log.jsonl").write_text("{half a rec")
    assert "is not a monitor's log" in refused("watch", tmp_path)


def test_train_lora(world: dict[str, Path], tmp_path: Path) -> None:
    run(
        *train_arguments(world, tmp_path, "--max_steps", "2", "--use_peft", "--lora_target_modules", "q_proj", "v_proj")
    )
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()


def test_the_command_on_two_processes_is_one(world: dict[str, Path], tmp_path: Path) -> None:
    """Two gloo processes of the command itself, LoRA and the monitor, give one process's adapter and figures."""
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_dropout", "0", "--beta_rejected", "0.02"]
    common = ["--max_steps", "3", *lora, "--monitor", "--monitor-every", "2", "--probe", "4"]
    launch = ["--standalone", "--nproc_per_node=2", "--master_addr=127.0.0.1", "--master_port=0"]
    arguments = [str(a) for a in train_arguments(world, tmp_path / "two", *common)]
    arguments[arguments.index("--per_device_train_batch_size") + 1] = "2"
    # Without the two dashes torchrun takes `--monitor` for an abbreviation of its own options.
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "--", "dpo3d"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *arguments, "--json"], env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # One of the two processes answers.
    assert json.loads(done.stdout)["steps"] == 3
    run(*train_arguments(world, tmp_path / "one", *common))
    weights = [load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("one", "two")]
    assert any(float(value.abs().max()) > 0 for key, value in weights[0].items() if "lora_B" in key)
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-4, atol=1e-5)
    logs = [(tmp_path / n / "dpo3d_log.jsonl").read_text().splitlines() for n in ("one", "two")]
    last = [json.loads(log[-1]) for log in logs]
    assert len(logs[0]) == len(logs[1]) == 3
    assert last[0]["delta_rejected"] == pytest.approx(last[1]["delta_rejected"], abs=1e-4)
    assert last[0]["self_ref_logp"] == pytest.approx(last[1]["self_ref_logp"], abs=1e-3)
    assert (tmp_path / "two" / "dpo3d_report.html").read_text().count("data:image/png") == 3


def test_train_from_a_config_file(world: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("beta_rejected: 0.02\nmax_steps: 1\n")
    assert "steps" in run(*train_arguments(world, tmp_path / "out", "--config", str(config))).stdout
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    # β− σ(−z) of a policy that is still its reference.
    assert float(log[0]["dpo3d/weight_rejected"]) == pytest.approx(0.02 * 0.5)


def test_train_errors(world: dict[str, Path], tmp_path: Path) -> None:
    def train(*more: str) -> str:
        return refused(*train_arguments(world, tmp_path / "out", *more))

    assert "no loss named 'dpoo'" in train("--loss_type", "dpoo")
    assert "'ipo' has one beta" in train("--loss_type", "ipo", "--beta_rejected", "0.02")
    assert "not used by the HfArgumentParser" in train("--no_such_option", "1")
    assert "invalid float value" in train("--beta", "much")
    assert "pass --output" in train("--output_dir", "x")
    assert "beta_rejected is -1.0" in train("--beta_rejected", "-1")
    assert "No such file" in train("--config", str(tmp_path / "none.yaml"))
    base = ["train", "--output", tmp_path / "out", *CPU]
    assert "no model given" in refused(*base)
    assert "no data given" in refused(*base, "--model_name_or_path", world["model"])
    assert "is empty" in refused(
        *base, "--model_name_or_path", world["model"], "--dataset_name", world["folder"] / "empty.jsonl"
    )
    assert "--beta_rejected" in run("train", "--options").stdout
    assert not (tmp_path / "out" / "model").exists()


def test_watch_errors(tmp_path: Path) -> None:
    assert "does not exist" in refused("watch", tmp_path / "none")
    assert "no trainer_state.json" in refused("watch", tmp_path)
    (tmp_path / "trainer_state.json").write_text("[]")
    assert "is not a trainer's state" in refused("watch", tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"loss": 1.0, "step": 1}]}')
    assert "no logps/chosen" in refused("watch", tmp_path)
    assert "beta is 0" in refused("watch", tmp_path, "--beta", 0)
    assert not list(tmp_path.glob("*.html"))


def test_killed_and_resumed_ends_with_the_same_weights(world: dict[str, Path], tmp_path: Path) -> None:
    """Killed with -9 after a checkpoint, gone on with --resume: the weights of the uninterrupted run."""
    common = ["--max_steps", "30", "--save_strategy", "steps", "--save_steps", "5", "--beta_rejected", "0.02"]
    command = [sys.executable, "-m", "dpo3d", *map(str, train_arguments(world, tmp_path / "cut", *common))]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not (tmp_path / "cut" / "checkpoint-5" / "trainer_state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "cut" / "model").exists()
    # A checkpoint that the kill left half-written is passed over.
    (tmp_path / "cut" / "checkpoint-99").mkdir()
    told = json.loads(run(*train_arguments(world, tmp_path / "cut", *common), "--resume", "--json").stdout)
    assert told["resumed_from"] in {f"checkpoint-{s}" for s in (5, 10, 15, 20, 25)} and told["steps"] == 30
    run(*train_arguments(world, tmp_path / "whole", *common))
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("cut", "whole")]
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())


def test_bench(tmp_path: Path) -> None:
    small = ["--seeds", 1, "--steps", 2, "--supervised-steps", 150, "--json"]
    rows = json.loads(run("bench", "digits", "--method", "dpo,sft.2 S4", *small).stdout)
    assert [row["method"] for row in rows] == ["dpo", "sft.2 S4"]
    assert "no method named 'magic'" in refused("bench", "digits", "--method", "magic")
    assert "expected toy or digits" in refused("bench", "poems")


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo in small: the same code with fewer steps."""
    from dpo3d import demo

    whole = demo.run
    monkeypatch.setattr(demo, "run", lambda output, seed: whole(output, seed, seeds=1, supervised_steps=150, steps=6))
    assert "SFT-DPO" in run("demo", "--output", tmp_path, "--seed", 1).stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["rows"]) == 4 and all((tmp_path / f["file"]).exists() for f in summary["figures"])
    assert (tmp_path / "dpo" / "dpo3d_report.html").exists()


def test_prompts_are_never_shared_with_training() -> None:
    assert not set(testbed.held_out(0)) & set(testbed.all_prompts(0)[1000:])
