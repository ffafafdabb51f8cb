"""Every sub-command as a user types it, on the model that `adamoe toy` writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adamoe.cli import app
from adamoe.conversion import layer_routers
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner


def adamoe(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def result(*arguments):
    done = adamoe(*arguments, "--json")
    assert done.exit_code == 0, done.stderr or done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "toy"
    assert adamoe("toy", "-o", folder, "--steps", 0).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def nulls(toy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "toy-null"
    assert result("convert", "--model", toy, "--null-init", "copy_noise", "--out", folder)["top_k"] == 3
    return folder


def test_help_and_version():
    names = [
        "demo",
        "toy",
        "convert",
        "train",
        "eval",
        "load-report",
        "calibrate",
        "export",
        "flops",
        "bench",
        "serve-args",
    ]
    text = adamoe("--help").stdout
    for name in names:
        assert name in text
        assert "Example: adamoe " + name in adamoe(name, "--help").stdout.replace("\n", " ")
    assert adamoe("--version").stdout.startswith("adamoe 0.1")
    code = "import sys, adamoe.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_convert_warns_about_a_k_that_changes_the_function(toy, tmp_path):
    done = adamoe("convert", "--model", toy, "--top-k", 2, "--out", tmp_path / "x")
    assert done.exit_code == 0 and "top_k 2 with 8 null experts changes the function" in done.stderr
    assert (tmp_path / "x/tokenizer.json").exists()


def test_train_and_resume(toy, tmp_path):
    options = ["train", "--model", toy, "--steps", 4, "--batch-size", 2, "--save-steps", 2, "--rows", 8, "--lr", 1e-3, "--device", "cpu", "-o", tmp_path]  # fmt: skip
    first = result(*options, "--target-load", 1.5)
    assert Path(first["model"]).is_dir() and first["last loss"] > 0
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["adamoe"]["target_load"] == 1.5
    assert adamoe(*options, "--resume").exit_code == 0


def test_options_reach_a_model_that_is_converted_already(nulls, tmp_path):
    options = ["--steps", 2, "--batch-size", 2, "--rows", 4, "--device", "cpu", "-o", tmp_path / "out"]
    result("train", "--model", nulls, "--aux", "5:2", "--target-load", 1.25, *options)
    settings = json.loads((tmp_path / "out/model/config.json").read_text())["adamoe"]
    assert settings["aux_coef"] == [5.0, 2.0] and settings["target_load"] == 1.25 and settings["top_k"] == 3


def test_top_p_is_trained_and_measured_with_its_rule(toy, tmp_path):
    options = ["--steps", 2, "--batch-size", 2, "--rows", 4, "--device", "cpu", "-o", tmp_path / "out"]
    done = adamoe("train", "--model", toy, "--method", "top_p", "--threshold", 0.2, *options)
    assert done.exit_code == 0 and "give eval --top-p 0.2" in done.stderr
    assert result("eval", "--model", tmp_path / "out/model", "--rows", 4)["load"] == 2
    assert result("eval", "--model", tmp_path / "out/model", "--rows", 4, "--top-p", 0.2)["load"] < 2


def test_train_on_a_file_with_lora(toy, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "+ 3 a 7 A B C D"}\n{"text": "* 1 2 3"}\n')
    found = result(
        "train", "--model", toy, "--data", tmp_path / "data.jsonl", "--steps", 2, "--batch-size", 2, "--lora", "--device", "cpu", "-o", tmp_path / "out",
    )  # fmt: skip
    assert (Path(found["model"]) / "adapter_model.safetensors").exists()


def test_eval_on_both_kinds_of_data(toy, nulls, tmp_path):
    stock = result("eval", "--model", toy, "--rows", 4)
    assert stock["load"] == 2 and set(stock) >= {"loss", "accuracy hard", "load easy", "multiply-adds per token"}
    assert 0 < result("eval", "--model", nulls, "--rows", 4)["load"] <= 3
    (tmp_path / "data.jsonl").write_text('{"text": "+ 3 a 7 A B C D"}\n{"text": "* 1 2 3"}\n')
    assert result("eval", "--model", nulls, "--data", tmp_path / "data.jsonl")["loss"] > 0


def test_load_report(nulls, tmp_path):
    rows = result("load-report", "--model", nulls, "--text", "+ 3 a 7 A B C D")
    assert [row["token"] for row in rows] == ["+", "3", "a", "7", "A", "B", "C", "D"] and set(rows[0]) >= {
        "layer 0",
        "layer 1",
        "mean",
    }
    (tmp_path / "t.txt").write_text("+ 3 a 7\nA B C D\n")
    for suffix, part in ((".html", "<span"), (".csv", "position")):
        assert (
            adamoe(
                "load-report", "--model", nulls, "--file", tmp_path / "t.txt", "-o", tmp_path / f"r{suffix}"
            ).exit_code
            == 0
        )
        assert part in (tmp_path / f"r{suffix}").read_text()


def test_calibrate_export_flops_and_serve_args(toy, nulls, tmp_path):
    found = result("calibrate", "--model", nulls, "--target-load", 1.25, "--rows", 16, "--out", tmp_path / "c")
    assert found["load"] == pytest.approx(1.25, abs=0.02)
    assert result("eval", "--model", tmp_path / "c", "--rows", 16)["load"] == pytest.approx(1.25, abs=0.3)
    assert result("export", "--model", nulls, "--layout", "stock", "--out", tmp_path / "s")["layout"] == "stock"
    assert result("eval", "--model", tmp_path / "s", "--rows", 2)["load"] == 2
    assert result("flops", "--model-config", toy, "--load", 1.5)["saved, %"] > 0
    line = adamoe("serve-args", "--model", nulls).stdout
    assert "--hf-overrides" in line and "AdaMoEMixtralForCausalLM" in line


def test_bench():
    rows = result("bench", "layer", "--hidden", 16, "--inner", 16, "--tokens", 32, "--repeats", 3)
    assert len(rows) == 3 and set(rows[0]) >= {"load", "eager", "grouped_mm", "adamoe", "dense floor"}
    assert next(row["model"] for row in result("bench", "train", "--repeats", 3)) == "stock top-2"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["convert", "--model", "./nowhere"], "does not exist"),
        (["convert", "--model", "TOY", "--null-experts", "-1"], "num_null_experts is -1"),
        (["convert", "--model", "TOY", "--top-k", "40"], "top_k is 40 with 8 true and 8 null"),
        (["convert", "--model", "TOY", "--top-k", "many"], "top-k is 'many'"),
        (["convert", "--model", "NULLS"], "already has null experts"),
        (["train", "--model", "TOY", "--method", "magic"], "method is 'magic'"),
        (["train", "--model", "TOY", "--aux", "a:b"], "aux is 'a:b'"),
        (["train", "--model", "TOY", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "--model", "TOY", "--resume", "-o", "nothing"], "no checkpoint to resume"),
        (["eval", "--model", "TOY", "--data", "EMPTY"], "is empty"),
        (["load-report", "--model", "NULLS"], "one of --text and --file"),
        (["load-report", "--model", "NULLS", "--text", "A", "--out", "x.pdf"], "neither .html nor .csv"),
        (["load-report", "--model", "TOY", "--text", "A"], "has no null experts"),
        (["calibrate", "--model", "NULLS", "--target-load", "9"], "the model can have 0 to 3"),
        (["export", "--model", "NULLS", "--layout", "zip"], "layout is 'zip'"),
        (["flops", "--model-config", "TOY", "--load", "-1"], "load is -1"),
        (["bench", "wings"], "no benchmark 'wings'"),
        (["bench", "layer", "--dtype", "int4"], "dtype is 'int4'"),
        (["bench", "layer", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["train", "--model", "TOY", "--device", "toaster"], "device 'toaster' cannot be used"),
        (
            ["train", "--model", "TOY", "--target-load", "9", "-o", "nothing"],
            "target_load is 9.0, the model can have 0 to 3",
        ),
        (["train", "--model", "TOY", "--data", "BINARY"], "not a text file"),
        (["load-report", "--model", "NULLS", "--file", "BINARY"], "not a text file"),
        (["eval", "--model", "NULLS", "--data", "SHORT"], "no text of short.jsonl has two tokens"),
        (["eval", "--model", "TOY", "--top-p", "0.5"], "no null routers"),
        (["eval", "--model", "DENSE"], "no num_local_experts"),
        (["serve-args", "--model", "TOY"], "has no null experts"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, cause, toy, nulls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "short.jsonl").write_text('{"text": "A"}')
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    names = {"TOY": str(toy), "NULLS": str(nulls), "EMPTY": "empty.jsonl", "SHORT": "short.jsonl", "BINARY": "binary"}
    if "DENSE" in arguments:
        LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path / "dense")  # fmt: skip
        names["DENSE"] = "./dense"
    done = adamoe(*(names.get(a, a) for a in arguments))
    assert done.exit_code == 2, done.output
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert cause in line and "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"empty.jsonl", "short.jsonl", "binary", "dense"}


def test_an_adapter_becomes_a_model_as_the_readme_says(nulls, tmp_path):
    from adamoe import export, from_pretrained
    from peft import PeftModel

    options = ["--steps", 2, "--batch-size", 2, "--rows", 4, "--lr", 1e-2, "--device", "cpu", "-o", tmp_path / "out"]
    done = adamoe("train", "--model", nulls, "--lora", *options)
    assert done.exit_code == 0 and f"is an adapter of '{nulls}'" in done.stderr
    merged = PeftModel.from_pretrained(from_pretrained(nulls), tmp_path / "out/model").merge_and_unload()
    export(merged, tmp_path / "whole")
    assert not torch.equal(
        next(layer_routers(merged)).null_weight, next(layer_routers(from_pretrained(nulls))).null_weight
    )
    assert 0 < result("eval", "--model", tmp_path / "whole", "--rows", 2)["load"] <= 3
