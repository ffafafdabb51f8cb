import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from small_models import IMAGES, TEXT, timm_vit, transformers_model
from spikezip import QuantConfig
from spikezip.cli import app
from spikezip.workbench import quantized
from typer.testing import CliRunner

COMMANDS = (
    "demo", "quantize", "calibrate", "train", "convert", "eval", "energy", "schedules", "stats", "inspect", "import-official", "export", "bench",
)  # fmt: skip
runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.safetensors"
    x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"inputs": x, "labels": torch.arange(24) % 10}, str(file))
    return file


@pytest.fixture
def qann(tmp_path):
    quantized(timm_vit(), QuantConfig(levels=8), tmp_path / "qann")
    return tmp_path / "qann"


def test_help_and_version_without_torch():
    code = "import sys, spikezip, spikezip.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert "0.1.0" in run("--version").output
    for command in COMMANDS:
        text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help").output)
        assert f"Example: spikezip {command}" in " ".join(text.split())
        assert all(option in text for option in ("--config", "--seed", "--json"))


def test_every_stage_by_command(tmp_path, qann, data):
    report = json.loads(run("calibrate", qann, "--data", data, "--method", "mse", "--json").stdout)
    assert len(report) == 22 and all(row["step"] > 0 for row in report)
    history = json.loads(
        run("train", qann, "--data", data, "--epochs", 2, "--batch", 8, "--device", "cpu", "--json").stdout
    )
    assert [row["epoch"] for row in history] == [1, 2]
    again = run("train", qann, "--data", data, "--epochs", 3, "--batch", 8, "--device", "cpu", "--resume", "--json")
    assert len(json.loads(again.stdout)) == 3
    snn = tmp_path / "snn"
    assert json.loads(run("convert", qann, "--output", snn, "--json").stdout)["neuron sites"] == 22
    rows = json.loads(run("eval", snn, "--data", data, "--at", 2, "--json").stdout)
    assert rows[-1]["agreement with the QANN, %"] == 100 and rows[1]["steps"] == 2
    assert "0 of" in run("eval", snn, "--data", data).output
    cost = json.loads(run("energy", snn, "--data", data, "--delay", 1, "--json").stdout)
    assert {"ANN fp32", "QANN int8", "SNN"} <= set(cost[0])
    front = json.loads(run("schedules", snn, "--data", data, "--delay", 0, "--burst", 1, "--burst", 2, "--json").stdout)
    assert [row["burst"] for row in front] == [2, 1] and front[0]["on the front"]
    table = tmp_path / "spikes.csv"
    assert len(json.loads(run("stats", snn, "--data", data, "--csv", table, "--json").stdout)) == 22
    assert table.read_text().startswith("layer,neurons")
    assert len(json.loads(run("inspect", qann, "--json").stdout)) == 22
    compared = json.loads(run("inspect", qann, "--compare", "--data", data, "--engine", "event", "--json").stdout)
    assert all(row["mismatches"] == 0 for row in compared)
    refused = run("export", snn, "--format", "nir", "--to", tmp_path / "x.nir", "--data", data, code=2)
    assert "NIR has no counterpart" in refused.output and not (tmp_path / "x.nir").exists()


def test_quantize_a_transformers_folder(tmp_path):
    transformers_model("Roberta").save_pretrained(tmp_path / "model")
    out = run("quantize", tmp_path / "model", "--levels", 8, "--output", tmp_path / "q", "--json")
    assert json.loads(out.stdout)["quantisers"] == 22
    file = tmp_path / "text.safetensors"
    save_file({**TEXT, "labels": torch.tensor([0, 1, 2])}, str(file))
    run("calibrate", tmp_path / "q", "--data", file)
    run("convert", tmp_path / "q", "--output", tmp_path / "s")
    assert (
        json.loads(run("eval", tmp_path / "s", "--data", file, "--json").stdout)[-1]["agreement with the QANN, %"]
        == 100
    )


def test_import_official(tmp_path):
    from small_models import calibrated
    from test_storage import SMALL, official_vit

    official_vit(tmp_path / "q.pth", calibrated(timm_vit(), IMAGES, levels=16))
    sizes = tmp_path / "sizes.yaml"
    sizes.write_text(json.dumps(SMALL))
    out = run("import-official", tmp_path / "q.pth", "--arch", "vit_small", "--levels", 16, "--architecture", sizes,
              "--output", tmp_path / "q", "--json")  # fmt: skip
    assert json.loads(out.stdout)["quantisers"] == 22
    assert "levels are not given" in run("import-official", tmp_path / "q.pth", "--arch", "vit_small", code=2).output


def test_bench_compares_spikes():
    out = json.loads(
        run("bench", "--steps", 4, "--neurons", 500, "--backend", "eager", "--device", "cpu", "--json").stdout
    )
    assert out["identical spikes"] is True and out["times faster"] > 0


def test_configuration_files(tmp_path, qann):
    file = tmp_path / "c.yaml"
    file.write_text("method: median\n")
    assert "median" in run("calibrate", qann, "--config", file, code=2).output
    file.write_text("no-such-option: 1\n")
    assert "unknown options: no_such_option" in run("calibrate", qann, "--config", file, code=2).output
    file.write_text("- a\n")
    assert "no mapping" in run("calibrate", qann, "--config", file, code=2).output
    file.write_text("a: [\n")
    assert "neither YAML nor JSON" in run("calibrate", qann, "--config", file, code=2).output
    assert "does not exist" in run("calibrate", qann, "--config", tmp_path / "no.yaml", code=2).output


def test_bad_input_is_one_line_and_exit_2(tmp_path, qann, data):
    empty, wrong, nan = tmp_path / "empty.safetensors", tmp_path / "wrong.safetensors", tmp_path / "nan.safetensors"
    empty.write_bytes(b"")
    save_file({"inputs": torch.zeros(3, 1, 8, 8)}, str(wrong))
    save_file({"inputs": torch.full((3, 1, 8, 8), float("nan")), "labels": torch.zeros(3, dtype=torch.long)}, str(nan))
    before = (qann / "model.safetensors").read_bytes()
    for arguments, words in (
        (("convert", tmp_path / "nothing"), "does not exist"),
        (("convert", qann), "patch_embed.proj.1 has no step size yet"),
        (("convert", qann, "--dtype", "float16"), "dtype is"),
        (("calibrate", qann, "--data", tmp_path / "no"), "neither digits nor"),
        (("calibrate", qann, "--data", empty), "no safetensors file"),
        (("calibrate", qann, "--data", wrong), "expected labels and inputs"),
        (("calibrate", qann, "--data", nan), "not finite"),
        (("calibrate", qann, "--data", data, "--device", "cuda:99"), "cannot be used"),
        (("train", qann, "--data", data, "--batch", 99), "24 samples for a batch of 99"),
        (("quantize", str(tmp_path / "no" / "model")), "does not exist"),
        (("quantize", "digits", "--levels", 1), "levels is 1"),
        (("export", qann, "--to", tmp_path / "x", "--format", "tflite", "--data", data), "onnx or nir"),
    ):
        result = run(*arguments, code=2)
        assert words in result.output and "Traceback" not in result.output, result.output
        assert result.stderr.strip().count("\n") == 0
    assert (qann / "model.safetensors").read_bytes() == before, "nothing half-written"


def test_a_hub_model_without_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = run("quantize", "nobody/no-such-model", code=2)
    assert "neither a folder here nor a model" in out.output


def test_demo_makes_its_pictures(tmp_path):
    from spikezip import demo

    table = demo.run(tmp_path, seed=0, epochs=2, fine_tuning=1)
    record = json.loads((tmp_path / "summary.json").read_text())
    assert {f["file"] for f in record["figures"]} == {"accuracy.png", "raster.png"}
    assert all((tmp_path / f["file"]).stat().st_size > 5000 for f in record["figures"])
    assert "logits bitwise equal, 0 of" in record["notes"][0]
    assert table.rows[1][1] == pytest.approx(table.rows[2][1]), "the SNN is the QANN"
