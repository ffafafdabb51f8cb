"""The command `cllm-jacobi`: parses, calls, prints."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from tenfold_shared.cli import Device, Json, Output, Resume, Seed, Table, console, emit, make_app
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError

app = make_app("cllm-jacobi", "Exact parallel decoding, and the consistency training that makes it fast.")


Model = Annotated[
    str, typer.Option("--model", "-m", help="Hub id, folder, or testbed-target, testbed-consistent.", show_default=True)
]
Tokenizer = Annotated[str, typer.Option("--tokenizer", help="Tokenizer, where it is not the model's own.")]
Prompts = Annotated[
    str, typer.Option("--prompts", help="File: one prompt a line, or JSON lines with prompt and answer; or `testbed`.")
]
Template = Annotated[str, typer.Option(help="Prompt form: none, gsm8k, spider, python, sharegpt.")]
System = Annotated[str, typer.Option(help="System text of the forms that have one.")]
BlockSize = Annotated[int, typer.Option("--block-size", "-n", help="Tokens of a block; 1 is autoregressive decoding.")]
Window = Annotated[str, typer.Option(help="rolling or block.")]
Init = Annotated[str, typer.Option(help="First guesses: prompt, random, repeat, pad, ngram.")]
DType = Annotated[str, typer.Option(help="Number format: float32, bfloat16, float16, float64.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.", min=1)]
Limit = Annotated[int, typer.Option(help="Use the first so many prompts; 0 for all.", min=0)]
Trajectories = Annotated[Path, typer.Option("--data", help="Trajectory file, or the published code's JSON.")]
TESTBED = ("testbed-target", "testbed-consistent")


@app.command(epilog="Example: cllm-jacobi demo --output out --seed 0")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
    """The target decodes a token a pass, the trained model many: side by side, live, then the table and the heat map."""
    from cllm_jacobi.demo import run

    emit(run(output, seed, progress=_progress("training")), json)
    console.print(f"heat map: {output / 'confirmed.png'}; record: {output / 'summary.json'}", markup=False)


@app.command(
    epilog="Example: cllm-jacobi generate 'give me the number of items with cost over 53 and mass exactly 26' -m testbed-consistent --compare"
)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; or give --prompts.")] = None,
    prompts: Annotated[
        str, typer.Option(help="File: one prompt a line, or JSON lines with prompt; or `testbed`.")
    ] = "",
    model: Model = "testbed-consistent",
    tokenizer: Tokenizer = "",
    template: Template = "none",
    system: System = "",
    block_size: BlockSize = 16,
    window: Window = "rolling",
    init: Init = "prompt",
    max_new_tokens: NewTokens = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of the most likely token.")] = False,
    sampling: Annotated[str, typer.Option(help="gumbel or speculative.")] = "gumbel",
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Decode token by token as well.")] = False,
    limit: Limit = 0,
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Answer one prompt, or a file of them; with --compare autoregressive and Jacobi decoding side by side."""
    import time
    from dataclasses import replace

    from transformers import TextStreamer

    from cllm_jacobi.jacobi import JacobiConfig, jacobi_generate

    if (prompt is None) == (not prompts):
        raise UserError("expected a prompt or --prompts FILE", hint="give one of the two")
    ours = JacobiConfig(block_size=block_size, window=window, init=init, sampling=sampling, seed=seed)
    contestants = {"autoregressive": replace(ours, block_size=1)} if compare else {}
    contestants["Jacobi"] = ours
    wanted: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample, "return_dict_in_generate": True}
    if sample:
        wanted |= {"temperature": temperature, "top_p": top_p}
    texts = (
        [p.text for p in _prompts(prompts, template, system, limit, model, split="test", seed=seed)]
        if prompt is None
        else [_in_form(prompt, template, system, model)]
    )
    net, words = _model(model, tokenizer, device, dtype)
    rows = []
    for number, asked in enumerate(texts):
        ids = _encode(words, asked).to(net.device)
        for name, config in contestants.items():
            shown = stream and name == "Jacobi"
            streamer = TextStreamer(words, skip_prompt=True, skip_special_tokens=True) if shown else None
            start = time.perf_counter()
            out = jacobi_generate(net, ids, decoder=config.decoder(streamer), **wanted)
            text = words.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
            seconds = time.perf_counter() - start
            # One pass has no iterations behind the prefill.
            later = float(out.tokens_per_iteration[0]) if out.forward_passes[0] > 1 else None
            counts = [int(out.new_tokens[0]), int(out.forward_passes[0]), float(out.tokens_per_forward[0]), later]
            rows.append([number, name, *counts, seconds, text])
    columns = [
        "prompt",
        "decoding",
        "tokens",
        "passes",
        "tokens per forward",
        "tokens per iteration",
        "seconds",
        "text",
    ]
    emit(Table("", columns, rows), json)


@app.command(epilog="Example: cllm-jacobi collect -m testbed-target --prompts testbed --limit 50 --output out/data")
def collect(
    model: Model = "testbed-target",
    prompts: Prompts = "testbed",
    output: Output = Path("out/trajectories"),
    tokenizer: Tokenizer = "",
    template: Template = "none",
    system: System = "",
    block_size: BlockSize = 16,
    max_new_tokens: NewTokens = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts together.", min=1)] = 32,
    init: Init = "prompt",
    limit: Limit = 0,
    resume: Resume = False,
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Run the target and keep its Jacobi trajectories in OUTPUT/trajectories.parquet; finished batches are kept."""
    import shutil

    from cllm_jacobi.metrics import fast_forwarded, stationary
    from cllm_jacobi.trajectory import collect_trajectories, save_trajectories

    shards = output / "shards"
    if any(shards.glob("part-*")) and not resume:
        raise UserError(f"{output} holds batches of an earlier run", hint="pass --resume, or another folder")
    read = _prompts(prompts, template, system, limit, model, split="train", seed=seed)
    net, words = _model(model, tokenizer, device, dtype)
    answers = [p.answer for p in read]
    data = collect_trajectories(
        net,
        words,
        [_encode(words, p.text)[0].tolist() for p in read],
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        labels=[a for a in answers if a is not None] if all(a is not None for a in answers) else None,
        init=init,
        seed=seed,
        shards=shards,
        progress=_progress("collecting"),
    )
    file = save_trajectories(data, output / "trajectories.parquet")
    shutil.rmtree(shards)
    blocks = [states for row in data for states in row["trajectories"]]
    emit(
        {
            "file": str(file), "prompts": len(data), "blocks": len(blocks),
            "states per block": sum(map(len, blocks)) / max(len(blocks), 1),
            "fast-forwarded per iteration": sum(map(fast_forwarded, blocks)) / max(len(blocks), 1),
            "stationary per block": sum(map(stationary, blocks)) / max(len(blocks), 1),
            "cut by the budget": sum(row["truncated"] for row in data),
            "near-ties": sum(row["disagreements"] for row in data),
        },
        json,
    )  # fmt: skip


@app.command(
    epilog="Example: cllm-jacobi clean --data out/data/trajectories.parquet --output out/data -m testbed-target"
)
def clean(
    data: Trajectories,
    output: Output = Path("out/trajectories"),
    model: Annotated[str, typer.Option("--model", "-m", help="Whose tokenizer shows examples and finds lines.")] = "",
    augment: Annotated[bool, typer.Option("--augment", help="Put right tokens behind wrong ones.")] = False,
    keep_truncated: Annotated[bool, typer.Option("--keep-truncated", help="Keep answers cut by the budget.")] = False,
    max_run: Annotated[int, typer.Option(help="Shortest run of one token that removes a row.", min=2)] = 10,
    max_repetition: Annotated[float, typer.Option(help="Largest share of repeated 4-grams.", min=0, max=1)] = 0.5,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Remove repetition, duplicates, cut answers and repeated states; print what each rule removed; write OUTPUT/clean.parquet."""
    from cllm_jacobi.cleaning import augment_trajectories, clean_trajectories
    from cllm_jacobi.trajectory import save_trajectories

    words = _tokenizer(model) if model else None
    kept, report = clean_trajectories(
        _data(data, words), words, max_run=max_run, max_repetition=max_repetition, keep_truncated=keep_truncated
    )
    if augment:
        kept = augment_trajectories(kept, seed=seed)
    save_trajectories(kept, output / "clean.parquet")
    emit(report.table(), json)


@app.command(
    epilog="Example: cllm-jacobi train -m testbed-target --data out/data/clean.parquet --output out/model --max-steps 4 --learning-rate 0.002"
)
def train(
    data: Trajectories,
    model: Model = "testbed-target",
    output: Output = Path("out/model"),
    tokenizer: Tokenizer = "",
    preset: Annotated[str, typer.Option(help="official: the published script's settings; flags still count.")] = "",
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers of a process and step.")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Batches of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")] = None,
    loss: Annotated[str | None, typer.Option(help="global or local.")] = None,
    divergence: Annotated[str | None, typer.Option(help="forward_kl, reverse_kl or jsd.")] = None,
    ar_weight: Annotated[float | None, typer.Option(help="Weight of the autoregressive loss.")] = None,
    teacher: Annotated[str | None, typer.Option(help="self or frozen.")] = None,
    packed: Annotated[str | None, typer.Option(help="auto, yes or no.")] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", "-n", help="Refuse data made with another n.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Prompt and answer tokens of a row.")] = None,
    lora_r: Annotated[int, typer.Option(help="Rank of LoRA adapters; 0 trains all weights (extra peft).", min=0)] = 0,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 500,
    guard_steps: Annotated[int, typer.Option(help="Steps between looks for collapse; 0 for none.", min=0)] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    dtype: DType = "float32",
    device: Device = "auto",
    resume: Resume = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Consistency training; several processes by `accelerate launch -m cllm_jacobi train ...`."""
    from cllm_jacobi.trainer import OFFICIAL
    from cllm_jacobi.training import run

    if preset not in ("", "official"):
        raise UserError(f"preset is '{preset}', expected official")
    flags = {
        "num_train_epochs": epochs, "max_steps": max_steps, "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps, "learning_rate": learning_rate, "loss": loss,
        "divergence": divergence, "ar_weight": ar_weight, "teacher": teacher, "packed": packed, "block_size": block_size,
        "max_length": max_length,
    }  # fmt: skip
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0, "logging_steps": 10}
    settings |= {**(OFFICIAL if preset else {}), **{k: v for k, v in flags.items() if v is not None}}
    with _folder_of(model) as folder:
        result = run(
            folder, data, output, resume=resume, tokenizer_name=tokenizer or None, lora_r=lora_r, dtype=dtype, seed=seed,
            save_steps=save_steps, guard_steps=guard_steps, bf16=bf16, use_cpu=device == "cpu", **settings,
        )  # fmt: skip
    emit(result, json)


@app.command(epilog="Example: cllm-jacobi evaluate -m testbed-consistent --prompts testbed --limit 5")
def evaluate(
    model: Model = "testbed-consistent",
    prompts: Prompts = "testbed",
    tokenizer: Tokenizer = "",
    template: Template = "none",
    system: System = "",
    block_size: BlockSize = 16,
    init: Init = "prompt",
    max_new_tokens: NewTokens = 256,
    assistant: Annotated[str, typer.Option(help="Assistant model for assisted generation.")] = "",
    limit: Limit = 20,
    repeats: Annotated[int, typer.Option(help="Rounds over the prompts.", min=1)] = 1,
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Accuracy, tokens per forward and speed against autoregressive decoding, prompt lookup and assisted generation."""
    from cllm_jacobi.evaluate import LEAN, compare_decoders, decoders, speed_ratio
    from cllm_jacobi.jacobi import JacobiConfig

    read = _prompts(prompts, template, system, limit, model, split="test", seed=seed)
    net, words = _model(model, tokenizer, device, dtype)
    helper = _model(assistant, "", device, dtype)[0] if assistant else None
    eos, pad = _ends(net, words)
    contestants = decoders(
        net, JacobiConfig(block_size=block_size, init=init, seed=seed), max_new_tokens=max_new_tokens, eos=eos, pad=pad, assistant=helper
    )  # fmt: skip
    ids = [_encode(words, p.text).to(net.device) for p in read]
    figures = compare_decoders(net, ids, contestants, repeats=repeats, progress=_progress("decoding"))
    rows = []
    for name, row in figures.items():
        texts = [words.decode(out, skip_special_tokens=True) for out in row.outputs]
        speed = sum(row.tokens_per_forward) / len(row.tokens_per_forward)
        rows.append(
            [
                name,
                _accuracy(texts, read, prompts, template),
                row.equal,
                speed,
                row.tokens_per_second,
                speed_ratio(row, figures[LEAN]),
            ]
        )
    columns = [
        "decoder",
        "accuracy",
        "equal to the lean loop",
        "tokens per forward",
        "tokens per second",
        "speed over the lean loop",
    ]
    emit(Table(f"{len(read)} prompts, {model}", columns, rows), json)


@app.command(epilog="Example: cllm-jacobi verify -m testbed-consistent --prompts testbed --limit 5")
def verify(
    model: Model = "testbed-consistent",
    prompts: Prompts = "testbed",
    tokenizer: Tokenizer = "",
    template: Template = "none",
    system: System = "",
    block_size: BlockSize = 16,
    window: Window = "rolling",
    init: Init = "prompt",
    max_new_tokens: NewTokens = 128,
    tolerance: Annotated[
        float | None, typer.Option(help="Logit gap of a near-tie; by precision when not given.")
    ] = None,
    limit: Limit = 0,
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare with `generate` on a file of prompts; exit 1 at a real difference, name near-ties."""
    from cllm_jacobi.jacobi import JacobiConfig
    from cllm_jacobi.verify import verify as check

    read = _prompts(prompts, template, system, limit, model, split="test", seed=seed)
    config = JacobiConfig(block_size=block_size, window=window, init=init, seed=seed)
    net, words = _model(model, tokenizer, device, dtype)
    ids = [_encode(words, p.text).to(net.device) for p in read]
    verdicts = check(net, ids, config=config, max_new_tokens=max_new_tokens, tolerance=tolerance)
    rows = [[v.row, v.kind, v.position, v.greedy, v.jacobi, v.gap] for v in verdicts if v.kind != "equal"]
    counts = {kind: sum(v.kind == kind for v in verdicts) for kind in ("equal", "near-tie", "different")}
    title = f"{len(verdicts)} prompts: {', '.join(f'{n} {kind}' for kind, n in counts.items())}"
    emit(Table(title, ["prompt", "verdict", "token", "generate", "Jacobi", "logit gap"], rows), json)
    if counts["different"]:
        raise typer.Exit(1)


@app.command(
    epilog="Example: cllm-jacobi profile -m testbed-consistent --prompts testbed --limit 4 --sizes 1,8,16 --output out"
)
def profile(
    model: Model = "testbed-consistent",
    prompts: Prompts = "testbed",
    output: Output = Path("out/profile"),
    tokenizer: Tokenizer = "",
    template: Template = "none",
    system: System = "",
    sizes: Annotated[str, typer.Option(help="Block sizes, comma separated.")] = "1,2,4,8,16,32,64",
    max_new_tokens: NewTokens = 64,
    limit: Limit = 20,
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Price of a pass, tokens per forward and the block size that pays; a heat map of confirmed positions in OUTPUT."""
    from cllm_jacobi.heatmap import draw_confirmed
    from cllm_jacobi.metrics import fast_forwarded, stationary
    from cllm_jacobi.profiling import best, profile_blocks
    from cllm_jacobi.trajectory import collect_trajectories

    try:
        numbers = [int(n) for n in sizes.split(",")]
    except ValueError as error:
        raise UserError(f"sizes is '{sizes}', expected numbers with commas") from error
    read = _prompts(prompts, template, system, limit, model, split="test", seed=seed)
    net, words = _model(model, tokenizer, device, dtype)
    ids = [_encode(words, p.text).to(net.device) for p in read]
    rows = profile_blocks(
        net, ids, sizes=numbers, max_new_tokens=max_new_tokens, seed=seed, progress=_progress("profiling")
    )
    chosen = best(rows)
    n = max(chosen.block_size, 2)
    data = collect_trajectories(
        net, words, [i[0].tolist() for i in ids], block_size=n, max_new_tokens=max_new_tokens, seed=seed
    )
    blocks = [states for row in data for states in row["trajectories"]]
    picture = draw_confirmed({model: blocks}, output / "confirmed")
    counts = [sum(map(count, blocks)) / len(blocks) for count in (fast_forwarded, stationary)]
    title = f"block size {chosen.block_size} is best here; n = {n}: {counts[0]:.2f} fast-forwarded an iteration, {counts[1]:.2f} stationary a block; {picture}"
    columns = ["block_size", "tokens_per_forward", "cost_ms", "expected_gain", "chosen"]
    emit(
        Table(title, columns, [[r.block_size, r.tokens_per_forward, r.cost_ms, r.gain, r == chosen] for r in rows]),
        json,
    )


@app.command(epilog="Example: cllm-jacobi convert out/data/trajectories.parquet out/data/official.json")
def convert(
    source: Annotated[Path, typer.Argument(help="Trajectory file, or the published code's JSON.")],
    target: Annotated[Path, typer.Argument(help="The other of the two; .json is the published layout.")],
    eos: Annotated[str, typer.Option(help="EOS ids of the published file, comma separated: where answers end.")] = "",
    pad: Annotated[int, typer.Option(help="Id that fills short last blocks of the published file.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Trajectories from the published JSON to our Parquet file, or back."""
    from cllm_jacobi.trajectory import load_trajectories, read_official, save_trajectories, write_official

    try:
        ends = [int(t) for t in eos.split(",") if t]
    except ValueError as error:
        raise UserError(f"eos is '{eos}', expected ids with commas") from error
    if (source.suffix == ".json") == (target.suffix == ".json"):
        raise UserError("one of the two files must end in .json", hint="give the published JSON and a .parquet file")
    if source.suffix == ".json":
        rows = read_official(source, eos_token_id=ends)
        save_trajectories(rows, target)
    else:
        rows = load_trajectories(source)
        write_official(rows, target, pad_token_id=pad)
    emit({"file": str(target), "prompts": len(rows), "n": rows[0]["n"]}, json)


@app.command("export", epilog="Example: cllm-jacobi export --output out/decoder")
def export(output: Output = Path("out/decoder"), json: Json = False) -> None:
    """Write a folder for `model.generate(custom_generate=OUTPUT, trust_remote_code=True, block_size=16)`."""
    from cllm_jacobi.export import export_custom_generate

    emit({"folder": str(export_custom_generate(output))}, json)


@app.command("serve-args", epilog="Example: cllm-jacobi serve-args cllm/consistency-llm-7b-math -n 16")
def serve_args(
    model: Annotated[str, typer.Argument(help="Model, as vLLM takes it.")],
    block_size: BlockSize = 16,
    refill: Annotated[str, typer.Option(help="Where fresh guesses come from: prompt or repeat.")] = "prompt",
    json: Json = False,
) -> None:
    """The vLLM command line that serves a model with Jacobi decoding."""
    import shlex

    from cllm_jacobi.vllm_plugin import serve_args as arguments

    words = arguments(model, block_size, refill=refill)
    if json:
        emit({"arguments": words}, True)
    else:
        typer.echo(shlex.join(words))


# What the commands share.


def _progress(text: str) -> Callable[[int, int], None]:
    """A line on stderr for every tenth of the work."""
    last = -1

    def show(done: int, of: int) -> None:
        nonlocal last
        tenth = 10 * done // of
        if tenth != last:
            last = tenth
            console.print(f"{text}: {done} of {of}", highlight=False)

    return show


def _model(name: str, tokenizer: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from tenfold_shared.hub import load_model
    from transformers import AutoModelForCausalLM

    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise UserError(f"dtype is '{dtype}', expected float32, bfloat16, float16 or float64")
    where = pick_device(device)
    if name in TESTBED:
        from cllm_jacobi import testbed

        net = testbed.load(name.removeprefix("testbed-")).to(getattr(torch, dtype))
    else:
        net = load_model(AutoModelForCausalLM, name, dtype=getattr(torch, dtype))
    return net.to(where).eval(), _tokenizer(tokenizer or name)


def _tokenizer(name: str) -> Any:
    from tenfold_shared.hub import load_tokenizer

    if name in TESTBED:
        from cllm_jacobi import testbed

        return testbed.tokenizer()
    return load_tokenizer(name, padding_side="left")


def _folder_of(name: str) -> Any:
    """A context that gives a folder or hub id; the testbed's models are written to a temporary folder."""
    import tempfile
    from contextlib import contextmanager

    @contextmanager
    def folder() -> Any:
        if name not in TESTBED:
            yield name
            return
        from cllm_jacobi import testbed

        with tempfile.TemporaryDirectory() as scratch:
            yield str(testbed.save(testbed.load(name.removeprefix("testbed-")), scratch))

    return folder()


def _in_form(text: str, template: str, system: str, model: str) -> str:
    from cllm_jacobi.prompts import TEMPLATES

    if template == "none" and model in TESTBED:
        template = "testbed"
    if template not in TEMPLATES:
        raise UserError(f"template is '{template}', expected {', '.join(TEMPLATES)}")
    return TEMPLATES[template].format(question=text, system=system)


def _prompts(file: str, template: str, system: str, limit: int, model: str, *, split: str, seed: int) -> list[Any]:
    from cllm_jacobi.prompts import Prompt, read_prompts

    if file != "testbed":
        template = "testbed" if template == "none" and model in TESTBED else template
        return read_prompts(file, template=template, system=system, limit=limit or None)
    from cllm_jacobi import testbed

    return [Prompt(testbed.prompt(q), q, a) for q, a in testbed.questions(limit or 100, split=split, seed=seed)]


def _encode(words: Any, text: str) -> Any:
    ids = words(text, return_tensors="pt")["input_ids"]
    if not ids.shape[1]:
        raise UserError("the prompt has no tokens", hint="give at least one word")
    return ids.long()


def _ends(net: Any, words: Any) -> tuple[list[int], int]:
    """EOS ids and the padding id."""
    eos = net.generation_config.eos_token_id
    eos = words.eos_token_id if eos is None else eos
    ends = [eos] if isinstance(eos, int) else list(eos or [])
    pad = next((p for p in (words.pad_token_id, *ends) if p is not None), 0)
    return ends, pad


def _accuracy(texts: list[str], read: list[Any], prompts: str, template: str) -> float | None:
    """Share of right answers: by execution in the testbed, by the last number in gsm8k, else by text; None without answers."""
    if any(p.answer is None for p in read):
        return None
    if prompts == "testbed":
        from cllm_jacobi import testbed

        right = testbed.accuracy(texts, [(p.question, p.answer) for p in read])
        return sum(right) / len(right)
    from cllm_jacobi.evaluate import share_right

    return share_right(texts, [p.answer for p in read], final_number=template == "gsm8k")


def _data(file: Path, words: Any = None) -> Any:
    from cllm_jacobi.trajectory import load_trajectories, read_official

    if file.suffix == ".json":
        eos = getattr(words, "eos_token_id", None)
        return read_official(file, eos_token_id=[] if eos is None else [eos])
    return load_trajectories(file)
