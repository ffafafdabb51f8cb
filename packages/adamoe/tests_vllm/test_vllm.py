import json

import pytest

ARCHITECTURE = {"mixtral": "AdaMoEMixtralForCausalLM", "qwen3_moe": "AdaMoEQwen3MoeForCausalLM"}
NULLS = {"mixtral": 8, "qwen3_moe": 16}
PROMPTS = [[(7 * i + 3 * j) % 61 + 3 for j in range(4 + 3 * i)] for i in range(8)]
NEW = 12


@pytest.fixture(scope="session")
def ours():
    """Greedy tokens of our transformers model, without a cache; and the load."""

    def run(folder):
        import torch
        from adamoe import from_pretrained, record_load

        model, tokens = from_pretrained(folder).eval(), []
        loads = []
        with torch.no_grad():
            for prompt in PROMPTS:
                ids = list(prompt)
                for _ in range(NEW):
                    with record_load(model) as record:
                        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                loads.append(record.mean)
                tokens.append(ids[len(prompt) :])
        return tokens, sum(loads) / len(loads)

    return run


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("rows", ["copied", "noisy", "all-null"])
def test_greedy_tokens_are_those_of_transformers(engine, saved, ours, model_type, rows):
    folder = saved(model_type, rows, NULLS[model_type])
    expected, load = ours(folder)
    got = engine("generate", model=str(folder), architecture=ARCHITECTURE[model_type], prompts=PROMPTS, new=NEW)
    assert got["tokens"] == expected
    assert len(got["blocks"]) == 2
    assert all(pairs == computed for _, pairs, computed in got["blocks"]), (
        "one kernel row for each true pair, and no other"
    )
    if rows == "copied":
        assert all(pairs == {"mixtral": 2, "qwen3_moe": 4}[model_type] * tokens for tokens, pairs, _ in got["blocks"])
    if rows == "all-null":
        assert load == 0 and all(pairs == 0 for _, pairs, _ in got["blocks"])


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_compiled(engine, saved, ours, model_type):
    folder = saved(model_type, "noisy", NULLS[model_type])
    got = engine(
        "generate", model=str(folder), architecture=ARCHITECTURE[model_type], prompts=PROMPTS, new=NEW, compiled=True
    )
    assert got["tokens"] == ours(folder)[0]


def test_masked_is_the_same_function(engine, saved, ours):
    folder = saved("mixtral", "noisy", 16)
    got = engine(
        "generate", model=str(folder), architecture=ARCHITECTURE["mixtral"], prompts=PROMPTS, new=NEW, nulls="masked"
    )
    assert got["tokens"] == ours(folder)[0]


def test_copied_rows_serve_the_stock_function(engine, saved, tmp_path):
    """`export --layout stock` opens without the plug-in, and gives what the copied rows give; in bfloat16 nearly."""
    from adamoe import export, from_pretrained

    folder = saved("mixtral", "copied", 8)
    export(from_pretrained(folder), tmp_path / "stock", "stock")
    stock = engine("generate", model=str(tmp_path / "stock"), prompts=PROMPTS, new=NEW)
    adaptive = engine("generate", model=str(folder), architecture=ARCHITECTURE["mixtral"], prompts=PROMPTS, new=NEW)
    assert adaptive["tokens"] == stock["tokens"]
    half = {
        name: engine("generate", model=str(path), architecture=name, prompts=PROMPTS, new=1, dtype="bfloat16")
        for name, path in (("", tmp_path / "stock"), (ARCHITECTURE["mixtral"], folder))
    }
    for a, b in zip(half[""]["logprobs"], half[ARCHITECTURE["mixtral"]]["logprobs"], strict=True):
        assert abs(a[0] - b[0]) < 0.1


def test_without_the_plug_in_the_engine_says_what_is_in_its_way(engine, saved):
    """It stops at the first tensor it does not know: `null_bias` or `null_weight`."""
    error = engine("refused", model=str(saved("mixtral", "copied", 8)))["error"]
    assert "no module or parameter named" in error and "block_sparse_moe.gate.null_" in error


@pytest.mark.parametrize(
    ("change", "settings", "cause"),
    [
        ("no rows", {}, "no null_weight"),
        ("", {"speed": 3}, "no setting speed"),
        ("", {"nulls": "absent"}, "ignore the expert map"),
    ],
)
def test_refusals_name_the_cause(engine, saved, tmp_path, change, settings, cause):
    folder = saved("mixtral", "copied", 8)
    if change == "no rows":
        from adamoe import export, from_pretrained

        settings_of = json.loads((folder / "config.json").read_text())["adamoe"]
        export(from_pretrained(folder), tmp_path / "m", "stock")
        config = json.loads((tmp_path / "m/config.json").read_text())
        (tmp_path / "m/config.json").write_text(json.dumps({**config, "adamoe": settings_of}))
        folder = tmp_path / "m"
    got = engine("refused", model=str(folder), architecture=ARCHITECTURE["mixtral"], settings=settings)
    assert cause in got["error"] and got["kind"]


def test_serve_args_name_an_architecture_that_is_registered(saved):
    from adamoe.serving import serve_arguments
    from transformers import AutoConfig

    folder = saved("mixtral", "copied", 8)
    arguments = serve_arguments(str(folder), AutoConfig.from_pretrained(folder))
    assert json.loads(arguments[-1]) == {"architectures": [ARCHITECTURE["mixtral"]]}
