"""Every sub-command, as a user types it."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cllm_jacobi import cli, testbed
from in_process import command
from typer.testing import CliRunner

CPU = ["--device", "cpu"]


def run(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(w) for w in words])
    assert result.exit_code == code, f"{words}: {result.output} {result.exception}"
    return result


def error(*words: str) -> str:
    """The one line of a refused command."""
    result = run(*words, code=2)
    (line,) = [part for part in result.stderr.splitlines() if part.startswith("error:")]
    assert "Traceback" not in result.output
    return line


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """A small untrained target in a folder, and a file of prompts."""
    folder = tmp_path_factory.mktemp("world")
    model = testbed.untrained(layers=1)
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    testbed.save(model, folder / "model")
    with torch.no_grad():
        for parameter in (broken := testbed.untrained(layers=1)).parameters():
            parameter.fill_(float("nan"))
    testbed.save(broken, folder / "nan")
    pairs = testbed.questions(6)
    (folder / "prompts.txt").write_text("\n".join(testbed.prompt(q) for q, _ in pairs))
    lines = [json.dumps({"prompt": testbed.prompt(q), "answer": a}) for q, a in pairs]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return {
        "folder": str(folder),
        "model": str(folder / "model"),
        "nan": str(folder / "nan"),
        "txt": str(folder / "prompts.txt"),
        "jsonl": str(folder / "prompts.jsonl"),
    }


@pytest.fixture(scope="module")
def collected(world) -> Path:
    output = Path(world["folder"]) / "collected"
    run(
        "collect",
        "-m",
        world["model"],
        "--prompts",
        world["jsonl"],
        "-n",
        "8",
        "--max-new-tokens",
        "20",
        "--output",
        output,
        *CPU,
    )
    return output / "trajectories.parquet"


def test_help_and_version_do_not_import_torch():
    code = "import sys; from cllm_jacobi.cli import app; assert 'torch' not in sys.modules; import cllm_jacobi; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    module = subprocess.run(
        [sys.executable, "-m", "cllm_jacobi", "--version"], check=True, capture_output=True, text=True
    )
    assert module.stdout == "cllm-jacobi 0.1.0\n"
    assert "cllm-jacobi 0.1.0" in run("--version").stdout
    for name in (
        "demo",
        "generate",
        "collect",
        "clean",
        "train",
        "evaluate",
        "verify",
        "profile",
        "convert",
        "export",
        "serve-args",
    ):
        assert "Example: cllm-jacobi" in run(name, "--help").stdout


def test_the_public_names():
    import cllm_jacobi

    for name in cllm_jacobi.__all__:
        assert getattr(cllm_jacobi, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cllm_jacobi.nothing  # noqa: B018


def test_generate_and_compare(world):
    words = [
        "generate",
        "show the city",
        "-m",
        world["model"],
        "--template",
        "testbed",
        "--max-new-tokens",
        "12",
        *CPU,
        "--json",
    ]
    (alone,) = json.loads(run(*words).stdout)
    plain, ours = json.loads(run(*words, "--compare").stdout)
    assert plain["text"] == ours["text"] == alone["text"]
    assert plain["passes"] == plain["tokens"] and plain["tokens per forward"] == 1
    streamed = run(*words[:-1], "--stream").stdout
    assert alone["text"].split()[0] in streamed
    sampled = json.loads(run(*words, "--sample", "--temperature", "0.7", "--seed", "3").stdout)
    again = json.loads(run(*words, "--sample", "--temperature", "0.7", "--seed", "3", "-n", "5").stdout)
    assert sampled[0]["text"] == again[0]["text"]


def test_generate_from_a_file(world):
    words = ["generate", "-m", world["model"], "--template", "testbed", "--max-new-tokens", "6", *CPU, "--json"]
    rows = json.loads(run(*words, "--prompts", world["txt"], "--limit", "2", "--compare").stdout)
    assert [(row["prompt"], row["decoding"]) for row in rows] == [
        (number, name) for number in (0, 1) for name in ("autoregressive", "Jacobi")
    ]
    assert rows[0]["text"] == rows[1]["text"] and rows[0]["tokens per iteration"] == 1
    (once,) = json.loads(run(*words[:5], "show", "--max-new-tokens", "1", *CPU, "--json").stdout)
    assert once["passes"] == 1 and once["tokens per iteration"] is None
    for wrong in ([], ["show", "--prompts", world["txt"]]):
        assert "expected a prompt or --prompts FILE" in error("generate", *wrong)


def test_collect_clean_convert_train(world, collected, tmp_path):
    report = run(
        "clean",
        "--data",
        collected,
        "--output",
        tmp_path,
        "-m",
        world["model"],
        "--keep-truncated",
        "--max-repetition",
        "1",
        "--max-run",
        "99",
        "--augment",
    ).stdout
    assert "rows kept" in report and "token repetition" in report
    run("convert", tmp_path / "clean.parquet", tmp_path / "official.json")
    back = json.loads(
        run("convert", tmp_path / "official.json", tmp_path / "back.parquet", "--eos", "1", "--json").stdout
    )
    assert back["n"] == 8
    for file in ("clean.parquet", "official.json"):
        result = json.loads(
            run("train", "-m", world["model"], "--data", tmp_path / file, "--output", tmp_path / f"out-{file}", "--max-steps", "2", "--batch-size", "2", *CPU, "--json").stdout
        )  # fmt: skip
        assert result["steps"] == 2 and (Path(result["model"]) / "model.safetensors").exists()
    lora = json.loads(run("train", "-m", world["model"], "--data", tmp_path / "clean.parquet", "--output", tmp_path / "lora", "--max-steps", "1", "--lora-r", "2", "--batch-size", "2", *CPU, "--json").stdout)  # fmt: skip
    assert (Path(lora["model"]) / "adapter_model.safetensors").exists()


def test_the_official_preset(world, collected, tmp_path):
    result = run(
        "train",
        "-m",
        world["model"],
        "--data",
        collected,
        "--output",
        tmp_path,
        "--preset",
        "official",
        "--max-steps",
        "1",
        *CPU,
        "--json",
    )
    assert json.loads(result.stdout)["steps"] == 1
    assert "preset is 'paper'" in error("train", "--data", collected, "--preset", "paper")


def test_evaluate(world):
    rows = json.loads(run("evaluate", "-m", world["model"], "--prompts", world["jsonl"], "--assistant", world["model"], "--limit", "2", "--max-new-tokens", "8", *CPU, "--json").stdout)  # fmt: skip
    names = {row["decoder"]: row for row in rows}
    assert {"generate", "prompt lookup", "assisted generation", "Jacobi, block", "Jacobi, rolling"} < names.keys()
    assert all(row["equal to the lean loop"] == 2 for row in rows)
    assert names["autoregressive, lean loop"]["tokens per forward"] == 1
    rows = json.loads(
        run(
            "evaluate",
            "-m",
            world["model"],
            "--prompts",
            world["txt"],
            "--limit",
            "1",
            "--max-new-tokens",
            "3",
            *CPU,
            "--json",
        ).stdout
    )
    assert rows[0]["accuracy"] is None


def test_gsm8k_answers_go_by_their_last_number():
    from cllm_jacobi.evaluate import share_right

    texts = ["so 3 + 4 = 7 apples", "The answer is 1,200.", "none", "-2.5 degrees", "it is 70"]
    truth = ["add them\n#### 7", "#### 1200", "#### 3", "#### -2.50", "#### 7"]
    assert share_right(texts, truth, final_number=True) == pytest.approx(3 / 5)
    assert share_right([" a ", "b"], ["a", "c"]) == 0.5


def test_verify_agrees_and_exits_0(world):
    title = run("verify", "-m", world["model"], "--prompts", world["txt"], "--max-new-tokens", "12", *CPU).stdout
    assert "6 equal, 0 near-tie, 0 different" in title


def test_verify_exits_1_at_a_real_difference_and_names_ties(world, monkeypatch):
    from cllm_jacobi import verify

    real = verify.jacobi_generate

    def wrong(model, ids, **settings):
        out = real(model, ids, **settings)
        out[0, ids.shape[1] + 3] = (out[0, ids.shape[1] + 3] + 1) % 200
        return out

    monkeypatch.setattr(verify, "jacobi_generate", wrong)
    words = [
        "verify",
        "-m",
        world["model"],
        "--prompts",
        world["txt"],
        "--limit",
        "1",
        "--max-new-tokens",
        "8",
        *CPU,
        "--json",
    ]
    (row,) = json.loads(run(*words, code=1).stdout)
    assert row["verdict"] == "different" and row["token"] == 3 and row["logit gap"] > 0
    # A token that is not among the two best is no tie, however close those are.
    (row,) = json.loads(run(*words, "--tolerance", "1000", code=1).stdout)
    assert row["verdict"] == "different"

    # The second-best token, and a tolerance above its gap: a near-tie.
    def second(model, ids, **settings):
        out = real(model, ids, **settings)
        out[0, ids.shape[1] + 3] = model(out[:, : ids.shape[1] + 3]).logits[0, -1].topk(2).indices[1]
        return out

    monkeypatch.setattr(verify, "jacobi_generate", second)
    (row,) = json.loads(run(*words, "--tolerance", "1000").stdout)
    assert row["verdict"] == "near-tie"
    (row,) = json.loads(run(*words, "--tolerance", "0", code=1).stdout)
    assert row["verdict"] == "different"


def test_profile_proposes_a_block_size(world, tmp_path):
    rows = json.loads(run("profile", "-m", world["model"], "--prompts", world["txt"], "--limit", "2", "--sizes", "1,4", "--max-new-tokens", "8", "--output", tmp_path, *CPU, "--json").stdout)  # fmt: skip
    assert [row["block_size"] for row in rows] == [1, 4] and sum(row["chosen"] for row in rows) == 1
    assert rows[0]["tokens_per_forward"] == 1 and rows[0]["expected_gain"] == 1
    assert (tmp_path / "confirmed.png").stat().st_size > 5000


def test_the_proposal_follows_price_and_speed(tiny, batch):
    """With made-up prices: where a pass costs the same at any length the longest wins, where it costs n nothing does."""
    import torch
    from cllm_jacobi.profiling import best, profile_blocks

    ids = [batch["input_ids"][:1]]
    model = tiny("llama")
    said = model.generate(ids[0], attention_mask=torch.ones_like(ids[0]), max_new_tokens=40, do_sample=False)[
        0, 9:
    ].tolist()
    oracle = {"init": lambda tokens, count: (said[len(tokens) :] + [2] * count)[:count], "max_new_tokens": 33}
    flat = profile_blocks(model, ids, sizes=(1, 4, 8), costs={1: 1.0, 4: 1.0, 8: 1.0}, **oracle)
    steep = profile_blocks(model, ids, sizes=(1, 4, 8), costs={1: 1.0, 4: 8.0, 8: 16.0}, **oracle)
    assert best(flat).block_size == 8 and best(steep).block_size == 1
    assert flat[1].gain == pytest.approx(flat[1].tokens_per_forward)


def test_export_and_serve_args(tmp_path):
    run("export", "--output", tmp_path)
    assert (tmp_path / "custom_generate/generate.py").exists()
    line = run("serve-args", "some/model", "-n", "8").stdout
    assert "vllm serve some/model" in line and '"num_speculative_tokens": 7' in line and "JacobiWorker" in line
    assert "needs at least one drafted token" in error("serve-args", "some/model", "-n", "1")


def test_a_killed_collection_resumes_to_the_same_file(world, tmp_path, processes):
    base = [
        "collect", "-m", world["model"], "--prompts", "testbed", "--limit", "40", "-n", "8", "--max-new-tokens", "16",
        "--batch-size", "2", *CPU,
    ]  # fmt: skip
    words = [*base, "--output", str(tmp_path / "b")]
    killed = processes.Process(target=command, args=(words,))
    killed.start()
    until = time.monotonic() + 400
    while len(list((tmp_path / "b").glob("shards/part-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert not (tmp_path / "b/trajectories.parquet").exists()
    assert "holds batches of an earlier run" in error(*words)
    run(*words, "--resume")
    run(*base, "--output", str(tmp_path / "a"))
    from cllm_jacobi import load_trajectories

    a, b = (load_trajectories(tmp_path / name / "trajectories.parquet").to_list() for name in ("a", "b"))
    assert a == b and len(a) == 40


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["generate", "x", "-m", "/nowhere/model"], "does not exist"),
        (["generate", "x", "-n", "0", "-m", "MODEL"], "1 is plain autoregressive decoding"),
        (["generate", "x", "--window", "wide", "-m", "MODEL"], "window is 'wide'"),
        (["generate", "x", "--init", "zeros", "-m", "MODEL"], "init is 'zeros'"),
        (["generate", "", "-m", "MODEL", "--template", "none"], "the prompt has no tokens"),
        (["generate", "x", "-m", "MODEL", "--dtype", "int8"], "dtype is 'int8'"),
        (["generate", "x", "-m", "MODEL", "--template", "poem"], "template is 'poem'"),
        (["verify", "-m", "MODEL", "--prompts", "/nowhere.txt"], "prompt file '/nowhere.txt' does not exist"),
        (["verify", "-m", "MODEL", "--prompts", "EMPTY"], "is empty"),
        (["verify", "-m", "MODEL", "--prompts", "BAD"], "line 1 is no JSON object"),
        (["profile", "-m", "MODEL", "--prompts", "TXT", "--sizes", "a,b"], "sizes is 'a,b'"),
        (["clean", "--data", "/nowhere.parquet"], "does not exist"),
        (["clean", "--data", "EMPTY"], "is no trajectory file"),
        (["train", "--data", "DATA", "-m", "MODEL", "-n", "16"], "made with n = 8, asked for is 16"),
        (
            ["train", "--data", "DATA", "-m", "MODEL", "--loss", "both", "--output", "OUT", "--device", "cpu"],
            "loss is 'both'",
        ),
        (["convert", "DATA", "OUT.parquet"], "one of the two files must end in .json"),
        (["convert", "BAD.json", "OUT.parquet"], "not in the published layout"),
        (["train", "--data", "BAD.json", "-m", "MODEL", "--output", "OUT"], "not in the published layout"),
        (["train", "--data", "EMPTY", "-m", "MODEL", "--output", "OUT"], "is no trajectory file"),
        (["demo", "--output", "EMPTY"], "empty.txt', a file; give a folder"),
        (["export", "--output", "EMPTY/x"], "empty.txt/x', inside the file"),
        (["generate", "x", "-m", "NAN", *CPU], "logits for the prompt are NaN"),
        (["verify", "-m", "NAN", "--prompts", "TXT", *CPU], "logits for the prompt are NaN"),
        (["collect", "-m", "NAN", "--prompts", "TXT", "--output", "OUT", *CPU], "logits for the prompt are NaN"),
        (["train", "-m", "NAN", "--data", "DATA", "--output", "OUT", *CPU], "'model.embed_tokens.weight' of"),
    ],
)
def test_errors_are_one_line(world, collected, tmp_path, words, cause):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text("not json\n")
    (tmp_path / "bad.json").write_text("{")
    names = {"MODEL": world["model"], "NAN": world["nan"], "EMPTY": tmp_path / "empty.txt", "EMPTY/x": tmp_path / "empty.txt/x", "BAD": tmp_path / "bad.jsonl", "TXT": world["txt"], "DATA": collected,
             "OUT": tmp_path / "out", "OUT.parquet": tmp_path / "out.parquet", "BAD.json": tmp_path / "bad.json"}  # fmt: skip
    assert cause in error(*[str(names.get(w, w)) for w in words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "bad.jsonl", "empty.txt"]


def test_all_rows_removed_prints_the_counts(collected, tmp_path):
    from cllm_jacobi import load_trajectories, save_trajectories

    data = load_trajectories(collected)
    cut = data.from_list([{**row, "truncated": True} for row in data], features=data.features)
    save_trajectories(cut, tmp_path / "cut.parquet")
    line = error("clean", "--data", tmp_path / "cut.parquet", "--output", tmp_path, "--max-run", "99")
    assert "cleaning removed all 6 rows (truncated 6)" in line and not (tmp_path / "clean.parquet").exists()
