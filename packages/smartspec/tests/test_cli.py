import json
import re
import subprocess
import sys

import numpy as np
import pytest
from smartspec import StepSample, cli, testbed
from smartspec.profiling import save_profile
from typer.testing import CliRunner

SUBCOMMANDS = ["demo", "profile", "fit", "simulate", "explain", "table", "serve-args", "generate", "verify", "bench"]


def call(*words, code=0):
    result = CliRunner().invoke(cli.app, [str(w) for w in words])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def answer(*words, code=0):
    return json.loads(call(*words, "--json", code=code).stdout)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_help_ends_with_an_example(name):
    text = " ".join(call(name, "--help").stdout.split())
    assert f"Example: smartspec {name}" in text


def test_no_heavy_import_and_a_version():
    code = "import sys, smartspec.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert re.match(r"smartspec \d+\.\d+\.\d+", call("--version").stdout)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    made = answer(
        "profile", "--target", "testbed", "--draft", "testbed", "--out", folder / "p.json", "--repeats", 1,
        "--batch-sizes", "1,4", "--contexts", "8,24", "--draft-lens", "0,1,3", "--device", "cpu", "--clock", "cpu",
    )  # fmt: skip
    assert made["points"] == 20 and "llama" in made["target"]
    fitted = answer("fit", folder / "p.json", "--out", folder / "cost.json")
    assert fitted["mean relative error"] < 1
    return folder


def test_from_a_profile_to_a_vllm_command_line_and_a_table(profiled):
    cost = profiled / "cost.json"
    line = call("serve-args", "--target", "big", "--draft", "small", "--cost", cost, "--metrics", "m.txt").stdout
    assert "--scheduler-cls smartspec.vllm_plugin.SmartSpecScheduler" in line and str(cost) in line
    rows = answer("table", "--cost", cost, "--acceptance", 0.8, "--max-num-seqs", 16)
    assert rows["num_speculative_tokens_per_batch_size"][0][0] == 1
    assert call("table", "--cost", cost, "--max-num-seqs", 4).stdout.strip().endswith("}")
    steps = json.loads(call("table", "--sglang", "--max-num-seqs", 64).stdout)
    assert all(min(v["candidate_steps"]) >= 0 for v in steps.values())
    shown = answer("explain", "--cost", cost, "--batch", 4, "--context", 24)
    assert len(shown) == 9 and sum(r["chosen"] for r in shown) == 1
    grid = answer(
        "simulate", "--cost", cost, "--rates", 1, "--requests", 5, "--policies", "none,goodput", "--output-tokens", 8
    )
    assert [r["policy"] for r in grid] == ["none", "goodput"]


def test_a_profile_that_no_model_fits_is_said_to_be_so(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for name, noise in (("quiet", 0.0), ("loud", 1.5)):
        samples = [
            StepSample(100 * n, n * (k + 1), n, ms=(5 + n * (k + 1)) * float(np.exp(noise * rng.normal())))
            for n in (1, 4, 16, 64)
            for k in range(8)
        ]
        save_profile(tmp_path / f"{name}.json", samples, {})
    call("fit", tmp_path / "quiet.json", "--out", tmp_path / "c.json")
    assert "misses" not in caplog.text
    call("fit", tmp_path / "loud.json", "--out", tmp_path / "c.json")
    assert "profile again" in caplog.text


def test_fit_of_every_kind(profiled):
    for kind in ("linear", "table"):
        assert answer("fit", profiled / "p.json", "--kind", kind, "--out", profiled / f"{kind}.json")["kind"] == kind


def test_simulate_knows_every_policy_and_writes_csv(tmp_path):
    names = "none,k=2,goodput,ragged,paper,released,disable,table,ema,oracle"
    rows = answer(
        "simulate",
        "--rates",
        "20",
        "--requests",
        20,
        "--output-tokens",
        20,
        "--policies",
        names,
        "--csv",
        tmp_path / "t.csv",
    )
    assert [r["policy"] for r in rows] == names.split(",") and all(r["p95_ms"] >= r["p50_ms"] > 0 for r in rows)
    assert (tmp_path / "t.csv").read_text().splitlines()[0].startswith("rate,policy")
    (tmp_path / "trace").write_text("0 0.1 0.2")
    assert len(answer("simulate", "--trace", tmp_path / "trace", "--policies", "none", "--output-tokens", 9)) == 1


def test_generate_gives_the_targets_text(profiled):
    import torch

    words = testbed.tokenizer()
    prompt = words.decode(testbed.prompts(1, 10)[0])
    fixed = answer("generate", prompt, "--max-new-tokens", 12, "--device", "cpu")
    ruled = answer("generate", prompt, "--max-new-tokens", 12, "--device", "cpu", "--cost", profiled / "cost.json")
    looked = answer("generate", prompt, "--max-new-tokens", 12, "--device", "cpu", "--draft", "prompt_lookup")
    ids = torch.tensor([testbed.prompts(1, 10)[0]])
    model = testbed.load("target")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert fixed["text"] == ruled["text"] == looked["text"] == words.decode(out[0, 10:].tolist())
    assert fixed["target steps"] < 12


def test_verify_says_lossless():
    result = answer("verify", "--draws", 300, "--max-new-tokens", 12, "--device", "cpu")
    assert result["lossless"] and result["greedy identical"] == "64 of 64"


def test_bench_compares_on_the_engine(profiled):
    rows = answer(
        "bench", "--concurrency", "2", "--lengths", "0,2", "--rounds", 1, "--new-tokens", 8, "--cost", profiled / "cost.json",
        "--device", "cpu",
    )  # fmt: skip
    assert [r["policy"] for r in rows] == ["k=0", "k=2", "goodput"] and all(r["same tokens"] for r in rows)


def test_models_in_folders(tmp_path):
    from safetensors.torch import save_file
    from smartspec.medusa import MedusaHeads

    testbed.save(testbed.load("target"), tmp_path / "t")
    testbed.save(testbed.load("draft"), tmp_path / "d")
    text = "w5 w17 w9"
    plain = answer("generate", text, "--target", tmp_path / "t", "--draft", tmp_path / "d", "--max-new-tokens", 6)
    state = MedusaHeads(2, 128, testbed.VOCAB).heads.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "medusa_lm_head.safetensors")
    heads = answer(
        "generate",
        text,
        "--target",
        tmp_path / "t",
        "--draft",
        tmp_path / "medusa_lm_head.safetensors",
        "--max-new-tokens",
        6,
    )
    assert plain["text"] == heads["text"]


def test_the_demo_writes_a_picture_and_a_summary(tmp_path, monkeypatch):
    from smartspec import demo

    monkeypatch.setattr(demo, "RATES", (4.0, 20.0))
    monkeypatch.setattr(demo, "WAVE", ((2.0, 4.0), (2.0, 20.0)))
    table = demo.run(tmp_path, 0, requests=20)
    assert len(table.rows) == 2
    record = json.loads((tmp_path / "summary.json").read_text())
    assert record["package"] == "smartspec" and (tmp_path / "smartspec.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["fit", "none.json"], "none.json: No such file"),
        (["fit", "EMPTY"], "not JSON"),
        (["fit", "FEW"], "the profile has 1 points"),
        (["fit", "FLAT"], "rank deficient"),
        (["explain", "--cost", "EMPTY"], "not JSON"),
        (["explain", "--cost", "NAN"], "finite"),
        (["explain", "--acceptance", "2"], "probability"),
        (["explain", "--acceptance", "nan"], "probability"),
        (["table", "--acceptance", "-1"], "probability"),
        (["simulate", "--rates", "fast"], "numbers separated by commas"),
        (["simulate", "--rates", "0"], "above zero"),
        (["simulate", "--policies", "luck"], "no policy 'luck'"),
        (["simulate", "--hardware", "abacus"], "no hardware preset"),
        (["simulate", "--acceptance", "1.5"], "probabilities"),
        (["profile", "--target", "./none"], "does not exist"),
        (["profile", "--device", "tpu9"], "cannot be used"),
        (["profile", "--clock", "sun"], "wall or cpu"),
        (["profile", "--dtype", "int4"], "dtype"),
        (["generate", "w5", "--temperature", "-1"], "out of range"),
        (["generate", "w5", "--draft", "heads.pt"], "does not exist"),
        (["bench", "--engine", "steam"], "engine or vllm"),
        (["bench", "--engine", "vllm"], "folders"),
        (["verify", "--target", "./none", "--draft", "./none"], "does not exist"),
        (["serve-args", "--target", "big", "--cost", "none.json"], "No such file"),
        (["serve-args", "--target", "big", "--max-draft-len", "0"], "greater than or equal"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, cause, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = {"n_ctx": 9, "n_batched": 2, "n_seqs": 1, "ms": 1.0}
    files = {
        "EMPTY": "",
        "FEW": json.dumps({"schema": 1, "fingerprint": {}, "samples": [sample]}),
        "FLAT": json.dumps({"schema": 1, "fingerprint": {}, "samples": [sample] * 9}),
        "NAN": '{"schema": 1, "kind": "linear", "fingerprint": {}, "largest": [1, 1], "draft": {}, "planes": [[0, NaN, 0, 1]]}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    result = call(*words, code=2)
    assert cause in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    if result.stderr.startswith("error:"):
        assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


def test_a_vocabulary_that_differs_is_named(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    testbed.save(LlamaForCausalLM(config), tmp_path / "odd")
    result = call("generate", "w5", "--target", "testbed", "--draft", tmp_path / "odd", "--max-new-tokens", 4, code=2)
    assert "9 tokens in its vocabulary, the target 512" in result.stderr
