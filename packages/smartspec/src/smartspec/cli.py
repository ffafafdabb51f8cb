"""The command `smartspec`: parses, calls, prints."""

import json as json_module
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from tenfold_shared.cli import Device, Json, Output, Seed, Table, console, emit, make_app
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError

log = logging.getLogger(__name__)
app = make_app("smartspec", "Speculative decoding that picks its own length at every step.")

Cost = Annotated[str, typer.Option("--cost", help="File made by `smartspec fit`, or a preset's name.")]
Target = Annotated[str, typer.Option("--target", help="Target model: hub id, folder, or `testbed`.")]
Draft = Annotated[
    str, typer.Option("--draft", help="Draft model: hub id, folder, `testbed`, `prompt_lookup`, or Medusa heads' file.")
]
DType = Annotated[str, typer.Option(help="Number format of both models: float32, bfloat16, float16.")]
MaxLength = Annotated[int, typer.Option("--max-draft-len", help="Largest speculation length.", min=1)]


@app.command(epilog="Example: smartspec demo --output out --seed 0")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
    """Latency against request rate, and the chosen length while load rises and falls; simulated, under a minute."""
    from smartspec.demo import run

    emit(run(output, seed, progress=_progress("simulating")), json)


@app.command(epilog="Example: smartspec profile --target testbed --draft testbed --out profile.json --repeats 1")
def profile(
    target: Target = "testbed",
    draft: Draft = "testbed",
    out: Annotated[Path, typer.Option("--out", "--output", "-o", help="File for the profile.")] = Path("profile.json"),
    batch_sizes: Annotated[str, typer.Option(help="Requests, comma separated.")] = "1,2,4,8,16",
    contexts: Annotated[str, typer.Option(help="Tokens of each request, comma separated.")] = "32,128",
    draft_lens: Annotated[str, typer.Option(help="Draft lengths, comma separated.")] = "0,1,3,7",
    repeats: Annotated[int, typer.Option(help="Rounds; the fastest of each point counts.", min=1)] = 3,
    clock: Annotated[str, typer.Option(help="wall, or cpu for the process's CPU time.")] = "wall",
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Time a target and its drafter on this machine, over batch sizes, contexts and draft lengths."""
    from smartspec.profiling import fingerprint_of, profile_engine, save_profile

    model, drafter, _ = _pair(target, draft, device, dtype)
    samples = profile_engine(
        model,
        drafter,
        batch_sizes=_numbers("batch-sizes", batch_sizes),
        contexts=_numbers("contexts", contexts),
        draft_lens=_numbers("draft-lens", draft_lens),
        repeats=repeats,
        seed=seed,
        clock=_clock(clock),
        progress=_progress("timing"),
    )
    found = fingerprint_of(model, drafter)
    save_profile(out, samples, found)
    emit({"file": str(out), "points": len(samples), **found}, json)


@app.command(epilog="Example: smartspec fit profile.json --out cost.json")
def fit(
    file: Annotated[Path, typer.Argument(help="Profile made by `smartspec profile` or written by the vLLM plug-in.")],
    out: Annotated[Path, typer.Option("--out", "--output", "-o", help="File for the cost model.")] = Path("cost.json"),
    kind: Annotated[
        str, typer.Option(help="piecewise (maximum of two planes), linear (as published), table (staircase).")
    ] = "piecewise",
    json: Json = False,
) -> None:
    """Fit a cost model to a profile and say how well it fits."""
    from smartspec.cost import LinearCostModel, PiecewiseCostModel, TableCostModel
    from smartspec.profiling import load_profile

    kinds: dict[str, Any] = {"piecewise": PiecewiseCostModel, "linear": LinearCostModel, "table": TableCostModel}
    if kind not in kinds:
        raise UserError(f"kind is '{kind}', expected {', '.join(kinds)}")
    samples, found = load_profile(file)
    model = kinds[kind].fit(samples, fingerprint=found)
    model.save(out)
    error = {k: kinds[k].fit(samples).error(samples) for k in ("piecewise", "linear")}
    missed = model.error(samples)
    if missed > 0.25:
        log.warning(
            "the model misses the profile by %.0f %%: profile again with more --repeats, --clock cpu or a quiet machine",
            100 * missed,
        )
    emit({"file": str(out), "kind": kind, "points": len(samples), "mean relative error": missed, **{f"error, {k}": v for k, v in error.items()}}, json)  # fmt: skip


@app.command(epilog="Example: smartspec simulate --rates 8,24 --requests 100 --acceptance 0.7")
def simulate(
    hardware: Annotated[str, typer.Option(help="Hardware preset; ignored with --cost.")] = "a100-7b-160m",
    cost: Annotated[str, typer.Option(help="Simulate the machine of this cost model (file or preset) instead.")] = "",
    rates: Annotated[str, typer.Option(help="Requests per second, comma separated.")] = "4,16,28",
    policies: Annotated[
        str, typer.Option(help="none, k=N, goodput, ragged, paper, released, disable, table, ema, oracle.")
    ] = "none,k=1,k=3,k=5,paper,goodput",
    acceptance: Annotated[float, typer.Option(help="Mean acceptance of a drafted token.")] = 0.7,
    requests: Annotated[int, typer.Option(help="Requests in each run.", min=1)] = 300,
    prompt: Annotated[float, typer.Option(help="Median prompt tokens.")] = 180.0,
    output_tokens: Annotated[float, typer.Option(help="Median output tokens.")] = 180.0,
    burstiness: Annotated[float, typer.Option(help="Shape of the Gamma arrivals; 1 is Poisson.")] = 1.0,
    trace: Annotated[Path | None, typer.Option(help="File of arrival times in seconds, instead of rates.")] = None,
    max_draft_len: MaxLength = 8,
    csv: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Latency and throughput of policies over request rates, on a simulated server."""
    from smartspec import sim

    machine, model = _machine(hardware, cost)
    work = sim.Workload(1.0, requests, acceptance, prompt, output_tokens, burstiness=burstiness)
    columns = ["rate", "policy", "mean_ms", "p50_ms", "p95_ms", "ttft_ms", "tokens_per_s", "goodput_per_s", "mean_k"]
    loads = [sim.read_trace(trace, work)] if trace else [sim.replace(work, rate=r) for r in _floats("rates", rates)]
    names = [p.strip() for p in policies.split(",") if p.strip()]
    # Every name is read before any run starts.
    made = [_policy(name, machine, model, acceptance, max_draft_len) for _ in loads for name in names]
    progress = _progress("simulating")
    rows: list[list[Any]] = []
    for i, load in enumerate(loads):
        for j, name in enumerate(names):
            figures = sim.simulate(made[i * len(names) + j], machine, load, seed).summary()
            rows.append(["trace" if trace else load.rate, name, *(figures[c] for c in columns[2:])])
            progress(len(rows), len(made))
    table = Table(f"{machine.name}, acceptance {acceptance:g}, seed {seed}", columns, rows)
    if csv:
        _write(csv, "\n".join(",".join(str(v) for v in row) for row in [list(columns), *rows]) + "\n")
    emit(table, json)


@app.command(epilog="Example: smartspec explain --cost a100-7b-160m --batch 32 --acceptance 0.7")
def explain(
    cost: Cost = "a100-7b-160m",
    batch: Annotated[int, typer.Option(help="Decoding requests.", min=1)] = 8,
    context: Annotated[int, typer.Option(help="Tokens of each request.", min=1)] = 512,
    acceptance: Annotated[float, typer.Option(help="Acceptance of a drafted token.")] = 0.7,
    prefill_tokens: Annotated[int, typer.Option(help="Prefill tokens in the same step.", min=0)] = 0,
    max_draft_len: MaxLength = 8,
    json: Json = False,
) -> None:
    """What the controller sees and decides for one state: tokens, time and goodput for each length."""
    import numpy as np

    from smartspec.controller import BatchState, GoodputController

    controller = GoodputController(_cost(cost), max_draft_len)
    state = BatchState(
        range(batch), np.full(batch, context), n_prefill=prefill_tokens, acceptance=np.full(batch, acceptance)
    )
    if not 0 <= acceptance <= 1:
        raise UserError(f"acceptance is {acceptance}, expected a probability between 0 and 1")
    rows = controller.explain(state)
    decision = controller.decide(state)
    title = (
        f"k = {decision.draft_len} ({decision.reason}): {batch} requests of {context} tokens, acceptance {acceptance:g}"
    )
    columns = ["k", "tokens", "ms", "ms_without_prefill", "goodput_per_s", "verified", "chosen"]
    emit(Table(title, columns, [[*(r[c] for c in columns[:-1]), r["k"] == decision.draft_len] for r in rows]), json)


@app.command(epilog="Example: smartspec table --cost a100-7b-160m --acceptance 0.7")
def table(
    cost: Cost = "a100-7b-160m",
    acceptance: Annotated[float, typer.Option(help="Acceptance of a drafted token.")] = 0.7,
    context: Annotated[int, typer.Option(help="Tokens of each request.", min=1)] = 512,
    max_num_seqs: Annotated[int, typer.Option(help="Largest batch.", min=1)] = 256,
    max_draft_len: MaxLength = 8,
    sglang: Annotated[
        bool, typer.Option("--sglang", help="Candidate steps by batch size for SGLang's adaptive rule instead.")
    ] = False,
    json: Json = False,
) -> None:
    """A static table for stock vLLM (num_speculative_tokens_per_batch_size), for servers that keep their scheduler."""
    from smartspec.policies import recommend_table

    rows = recommend_table(
        _cost(cost), acceptance, context=context, max_draft_len=max_draft_len, max_num_seqs=max_num_seqs
    )
    if sglang:
        steps = {str(low): {"candidate_steps": sorted({max(k - 1, 0), k, k + 1} if k else {0})} for low, _, k in rows}
        emit(steps, True)
        return
    if json:
        emit({"num_speculative_tokens_per_batch_size": rows}, True)
        return
    emit(Table("num_speculative_tokens_per_batch_size", ["from", "to", "k"], rows))
    typer.echo(json_module.dumps({"num_speculative_tokens_per_batch_size": rows}))


@app.command("serve-args", epilog="Example: smartspec serve-args --target big --draft small --cost cost.json")
def serve_args(
    target: Annotated[str, typer.Option(help="Target model, as vLLM takes it.")],
    draft: Annotated[str, typer.Option(help="Draft model, as vLLM takes it, or prompt_lookup.")] = "prompt_lookup",
    cost: Annotated[str, typer.Option(help="Cost model; learned while serving when not given.")] = "",
    metrics: Annotated[str, typer.Option(help="File for the counters, Prometheus' text format.")] = "",
    rest: Annotated[
        bool, typer.Option("--rest", help="Run a draft model only in steps that draft; schedules synchronously.")
    ] = False,
    max_draft_len: MaxLength = 5,
    json: Json = False,
) -> None:
    """The command line that runs the controller in a stock vLLM."""
    import shlex

    from smartspec.serving import Settings
    from smartspec.serving import serve_args as arguments

    settings = {k: v for k, v in (("cost", cost), ("metrics", metrics)) if v}
    Settings.read(settings).load_cost()
    words = arguments(
        target, None if draft == "prompt_lookup" else draft, max_draft_len=max_draft_len, settings=settings, rest=rest
    )
    if json:
        emit({"arguments": words}, True)
    else:
        typer.echo(shlex.join(words))


@app.command(epilog="Example: smartspec generate 'w5 w17 w9' --target testbed --draft testbed --max-new-tokens 12")
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    target: Target = "testbed",
    draft: Draft = "testbed",
    cost: Annotated[str, typer.Option(help="Cost model; a fixed length of 4 when not given.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 for all.")] = 1.0,
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Generate with speculation; the text is the target's own."""
    from smartspec.controller import GoodputController
    from smartspec.engine import Sampling, SpecEngine
    from smartspec.policies import FixedLength

    sampling = Sampling(temperature, top_k, top_p)
    policy = GoodputController(_cost(cost), 8) if cost else FixedLength(4)
    model, drafter, words = _pair(target, draft, device, dtype)
    ids = words(prompt)["input_ids"]
    engine = SpecEngine(model, drafter, policy=policy, max_num_seqs=1, max_len=len(ids) + max_new_tokens + 1, seed=seed)
    (tokens,) = engine.generate([ids], max_new_tokens, sampling=sampling, eos=words.eos_token_id)
    stats = engine.stats
    result = {
        "text": words.decode(tokens),
        "tokens": len(tokens),
        "target steps": stats.steps + 1,
        "accepted of drafted": f"{stats.accepted} of {stats.drafted}",
        "mean length": stats.mean_draft_len,
    }
    emit(result, json)


@app.command(epilog="Example: smartspec verify --target testbed --draft testbed --draws 2000")
def verify(
    target: Target = "testbed",
    draft: Draft = "testbed",
    prompts: Annotated[str, typer.Option(help="Prompts, separated by |; the testbed has its own.")] = "",
    draws: Annotated[int, typer.Option(help="Samples of the chi-squared test at temperature 1.", min=100)] = 4000,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the greedy comparison.", min=1)] = 32,
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Check that a pair is lossless here: greedy ids equal generate's, sampled ones follow the target's distribution."""
    from smartspec.check import lossless

    model, drafter, words = _pair(target, draft, device, dtype)
    texts = [t for t in prompts.split("|") if t.strip()]
    if not texts and target != "testbed":
        raise UserError("no prompts given", hint="pass --prompts 'one|another'")
    result = lossless(model, drafter, _prompts(texts, words), new_tokens=max_new_tokens, draws=draws, seed=seed)
    emit(result, json)
    if not result["lossless"]:
        raise typer.Exit(1)


@app.command(
    epilog="Example: smartspec bench --target testbed --draft testbed --concurrency 1,4 --rounds 1 --new-tokens 16"
)
def bench(
    target: Target = "testbed",
    draft: Draft = "testbed",
    engine: Annotated[str, typer.Option(help="engine (transformers) or vllm.")] = "engine",
    cost: Annotated[
        str, typer.Option(help="Cost model; profiled here (engine) or learned (vllm) when not given.")
    ] = "",
    lengths: Annotated[str, typer.Option(help="Fixed lengths to compare with, comma separated.")] = "0,1,3,6",
    concurrency: Annotated[str, typer.Option(help="Requests together, comma separated.")] = "1,4,16",
    new_tokens: Annotated[int, typer.Option(help="Tokens of each request.", min=1)] = 48,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 5,
    clock: Annotated[str, typer.Option(help="cpu (the process's CPU time) or wall.")] = "cpu",
    device: Device = "auto",
    dtype: DType = "float32",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fixed lengths and the controller on a real engine, in turn, medians over the rounds."""
    from smartspec.bench import compare

    if engine not in ("engine", "vllm"):
        raise UserError(f"engine is '{engine}', expected engine or vllm")
    sizes, fixed = _numbers("concurrency", concurrency), _numbers("lengths", lengths)
    timer = _clock(clock)
    if engine == "vllm":
        from smartspec.measure import VllmServer

        if "testbed" in (target, draft):
            raise UserError(
                "vLLM needs models in folders", hint="write the testbed's with smartspec.testbed.save, or pass your own"
            )
        server: Any = VllmServer(target, draft, max_draft_len=max([*fixed, 1]), max_num_seqs=max(sizes), clock=timer)
        words = _tokenizer(target)
        model = None
    else:
        from smartspec.engine import SpecEngine
        from smartspec.measure import EngineServer

        model, drafter, words = _pair(target, draft, device, dtype)
        server = EngineServer(
            SpecEngine(
                model,
                drafter,
                max_num_seqs=max(sizes),
                max_len=512,
                max_draft_len=max([*fixed, 1]),
                clock=timer,
                seed=seed,
            )
        )
    model_cost = _cost(cost) if cost else None
    rows = compare(
        server,
        _prompts([], words),
        sizes,
        fixed,
        new_tokens=new_tokens,
        rounds=rounds,
        cost=model_cost,
        progress=_progress("serving"),
    )
    columns = ["concurrency", "policy", "tokens per second", "of the best fixed", "mean k", "same tokens"]
    emit(Table(f"{engine}, {clock} time, {rounds} rounds", columns, rows), json)


def _cost(name: str) -> Any:
    from smartspec.cost import CostModel, presets

    return presets()[name]() if name in presets() else CostModel.load(name)


def _machine(hardware: str, cost: str) -> tuple[Any, Any]:
    """The simulated machine, and the cost model that policies are given."""
    from smartspec.cost import PiecewiseCostModel
    from smartspec.sim import Hardware

    if cost:
        model = _cost(cost)
        return Hardware.from_cost(model, cost), model
    machine = Hardware.preset(hardware)
    return machine, PiecewiseCostModel.fit(machine.profile())


def _policy(name: str, machine: Any, cost: Any, acceptance: float, most: int) -> Any:
    from smartspec import controller, policies

    if name.startswith("k=") and name[2:].isdigit():
        return policies.FixedLength(int(name[2:]))
    known = {
        "none": policies.NoSpeculation,
        "goodput": lambda: controller.GoodputController(cost, most),
        "ragged": lambda: controller.GoodputController(cost, most, verify="ragged"),
        "paper": lambda: controller.paper_controller(cost, most),
        "released": lambda: controller.paper_controller(cost, most, as_released=True),
        "disable": lambda: policies.DisableByBatchSize(min(5, most), 16),
        "table": lambda: policies.BatchSizeTable(policies.recommend_table(cost, acceptance, max_draft_len=most)),
        "ema": policies.AcceptLengthEMA,
        "oracle": lambda: policies.Oracle(cost, most),
    }
    if name not in known:
        raise UserError(f"no policy '{name}'", hint=f"use k=N, {', '.join(known)}")
    return known[name]()


def _pair(target: str, draft: str, device: str, dtype: str) -> tuple[Any, Any, Any]:
    """Target, drafter and tokenizer."""
    import torch
    from tenfold_shared.hub import load_model
    from transformers import AutoModelForCausalLM

    from smartspec import testbed
    from smartspec.engine import check_tokenizers
    from smartspec.medusa import MedusaHeads

    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is '{dtype}', expected float32, bfloat16 or float16")
    number = getattr(torch, dtype)
    place = pick_device(device)

    def causal(name: str, kind: str) -> Any:
        model = testbed.load(kind) if name == "testbed" else load_model(AutoModelForCausalLM, name)
        return model.to(device=place, dtype=number).eval()

    model = causal(target, "target")
    words = _tokenizer(target)
    if draft == "prompt_lookup":
        return model, draft, words
    if draft.endswith((".pt", ".safetensors")) or any(Path(draft).glob("medusa_lm_head.*")):
        return model, MedusaHeads.load(draft).to(device=place, dtype=number), words
    drafter = causal(draft, "draft")
    if draft != "testbed" and target != "testbed":
        check_tokenizers(words, _tokenizer(draft))
    return model, drafter, words


def _tokenizer(name: str) -> Any:
    from tenfold_shared.hub import load_tokenizer

    from smartspec import testbed

    return testbed.tokenizer() if name == "testbed" else load_tokenizer(name)


def _prompts(texts: list[str], words: Any) -> list[list[int]]:
    from smartspec import testbed

    if texts:
        return [words(text)["input_ids"] for text in texts]
    size = len(words)
    # Other vocabularies get the same pieces of text as plain ids.
    return [[t % size for t in prompt] for prompt in testbed.prompts(64, 24, seed=7)]


def _clock(name: str) -> Any:
    if name not in ("wall", "cpu"):
        raise UserError(f"clock is '{name}', expected wall or cpu")
    return time.process_time if name == "cpu" else time.perf_counter


def _numbers(name: str, text: str) -> list[int]:
    numbers = _floats(name, text)
    if any(n != int(n) for n in numbers):
        raise UserError(f"{name} is '{text}', expected whole numbers")
    return [int(n) for n in numbers]


def _floats(name: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{name} is '{text}', expected numbers separated by commas") from error
    if not numbers or any(not 0 <= n < float("inf") for n in numbers):
        raise UserError(f"{name} is '{text}', expected numbers from 0 up")
    return numbers


def _write(path: Path, text: str) -> None:
    from tenfold_shared.hub import replace_atomically

    with replace_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _progress(what: str) -> Any:
    """A line on stderr that says how far it is; nothing when stderr is no terminal."""

    def show(done: int, total: int) -> None:
        if console.is_terminal:
            console.print(f"{what}: {done} of {total}", end="\r" if done < total else "\n")

    return show
