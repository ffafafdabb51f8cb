"""The command `dpo3d`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from tenfold_shared.cli import Device, Json, Output, Resume, Seed, Table, console, emit, make_app
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError

app = make_app("dpo3d", "See, explain and mend what DPO does to likelihoods.")

Model = Annotated[str, typer.Option("--model", help="Hub id or folder of the causal language model.")]


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _load(name: str, device: str) -> tuple[Any, Any]:
    from tenfold_shared.hub import load_model, load_tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name)
    return load_model(AutoModelForCausalLM, name).to(pick_device(device)).eval(), tokenizer


@app.command(epilog="Example: dpo3d demo --output out --seed 0")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
    """The toy, then DPO and its remedies on a checkable task under the monitor; offline, about a minute."""
    from dpo3d.demo import run

    _quiet()
    emit(run(output, seed), json)
    console.print(f"figures, summary and reports: {output}")


@app.command(epilog="Example: dpo3d toy --scenario 1,3 --loss dpo,flex.02,sft.1 --seeds 4 --output out/toy")
def toy(
    scenario: Annotated[str, typer.Option(help="Scenarios, 1 to 4, with commas.")] = "1,2,3,4",
    loss: Annotated[str, typer.Option(help="Methods or registered losses, with commas; 'all' for every one.")] = "all",
    seeds: Annotated[int, typer.Option(help="Seeds per scenario.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 600,
    width: Annotated[int, typer.Option(help="Hidden units.")] = 64,
    activation: Annotated[str, typer.Option(help="relu, gelu or tanh.")] = "relu",
    optimizer: Annotated[str, typer.Option(help="adam or sgd.")] = "adam",
    seed: Seed = 0,
    output: Output = Path("out/toy"),
    json: Json = False,
) -> None:
    """The paper's toy: four prompts, ten answers, every loss, in log space; curves, heat-maps, gradients."""
    import torch
    from rich.progress import track

    from dpo3d import plots
    from dpo3d import toy as model

    torch.set_num_threads(1)
    names = list(model.METHODS) if loss == "all" else _list(loss)
    for name in names:
        model.method_of(name)
    try:
        scenarios = [int(s) for s in _list(scenario)]
    except ValueError as error:
        raise UserError(f"scenario is '{scenario}', expected numbers from 1 to 4 with commas") from error
    settings = model.Settings(width=width, activation=activation, optimizer=optimizer, steps=steps)  # type: ignore[arg-type]
    world = model.pretrain(scenarios, list(range(seed, seed + seeds)), settings)
    runs = [model.train(world, name) for name in track(names, description="methods", console=console)]
    found = [outcome for run in runs for outcome in model.outcomes(run)]
    plots.likelihood_curves(runs[:8], output / "toy_curves")
    plots.heat_maps(runs[:7], output / "toy_heat_maps", scenario=scenarios[0])
    for run in runs:
        options = model.method_of(run.method).options
        if model.method_of(run.method).loss in ("sigmoid", "flex"):
            shown = {key: options[key] for key in ("beta_rejected", "gamma") if key in options}
            plots.gradient_picture(run, output / f"toy_gradients_{run.method}", **shown)
    emit(_toy_table(found), json)
    for note in model.not_reproduced(found):
        console.print(note, highlight=False)
    console.print(f"figures: {output}")


def _toy_table(found: list[Any]) -> Table:
    columns = [
        "method",
        "scenario",
        "π+ at the end",
        "± seeds",
        "π+ at its peak",
        "peak step",
        "log10 π−",
        "mass off the pair",
        "on others' chosen",
    ]
    rows = [
        [
            o.method,
            f"S{o.scenario}",
            o.chosen,
            o.chosen_std,
            o.peak,
            o.peak_step,
            o.log10_rejected,
            o.off_pair,
            o.others_chosen,
        ]
        for o in found
    ]
    return Table("The toy: means over seeds and prompts", columns, rows)


@app.command(epilog="Example: dpo3d audit --model out/sft --dataset pairs.jsonl --keep S1 --output out/audit")
def audit(
    model: Model,
    dataset: Annotated[str, typer.Option(help="File, saved dataset or hub id of preference pairs.")],
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    limit: Annotated[int, typer.Option(help="Audit the first so many pairs; 0 for all.", min=0)] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens that training will cut at; TRL's default.")] = 1024,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the policy's own samples.")] = 128,
    ches: Annotated[bool, typer.Option(help="Rank pairs by CHES.")] = True,
    on_policy_z: Annotated[
        float, typer.Option(help="A half whose likelihood is below this z-score is off-policy.")
    ] = -3.0,
    band: Annotated[bool, typer.Option(help="First-order band of each pair; a backward pass each.")] = False,
    keep: Annotated[str, typer.Option(help="Write pairs of these scenarios only, as S1,S2.")] = "",
    max_ches_quantile: Annotated[float, typer.Option(help="Write pairs up to this quantile of CHES only.")] = 1.0,
    device: Device = "auto",
    seed: Seed = 0,
    output: Output = Path("out/audit"),
    json: Json = False,
) -> None:
    """Which scenario the pairs are in for this policy, which are a risk, and what γ and β− to start with."""
    from dpo3d.dataset import load_split, write_records
    from dpo3d.diagnostics import audit_pairs

    _quiet(small=False)
    data = load_split(dataset, split)
    data = data.select(range(min(limit, len(data)))) if limit else data
    policy, tokenizer = _load(model, device)
    report = audit_pairs(
        policy,
        tokenizer,
        data,
        ches=ches,
        band=band,
        on_policy_z=on_policy_z,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    write_records(output / "audit.jsonl", report.rows)
    if keep or max_ches_quantile < 1:
        quantile = max_ches_quantile if max_ches_quantile < 1 else None
        kept = report.filter(max_ches_quantile=quantile, scenarios=_list(keep) or None)
        write_records(output / "kept.jsonl", kept)
        console.print(f"kept {len(kept)} of {len(data)} pairs: {output / 'kept.jsonl'}")
    summary = report.summary
    shown = {
        "pairs": summary["pairs"],
        **{f"share of {name}": share for name, share in summary["shares"].items()},
        **{f"flagged {flag}": count for flag, count in summary["flags"].items()},
        "median length ratio": summary["length_ratio"],
        "riskiest pairs (CHES)": ", ".join(map(str, summary["risk"][:10])) or "-",
        "start with sft_gamma, per token": summary["sft_gamma"],
        "start with beta_rejected": summary["beta_rejected"],
        "why": summary["advice"],
    }
    emit(summary if json else shown, json)
    console.print(f"every pair: {output / 'audit.jsonl'}")


@app.command(
    epilog="Example: dpo3d pairs --model out/sft --prompts prompts.jsonl --scorer scorers:is_right --output out/pairs"
)
def pairs(
    model: Model,
    prompts: Annotated[str, typer.Option(help="File, saved dataset or hub id with a column prompt.")],
    scorer: Annotated[str, typer.Option(help="module:function, called as (prompt, completion) -> float.")],
    split: Annotated[str, typer.Option(help="Split of the prompts.")] = "train",
    n: Annotated[int, typer.Option(help="Answers sampled per prompt.")] = 8,
    select: Annotated[str, typer.Option(help="best_worst or random.")] = "best_worst",
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    device: Device = "auto",
    seed: Seed = 0,
    output: Output = Path("out/pairs"),
    json: Json = False,
) -> None:
    """On-policy pairs: sample answers, score them, keep the best and the worst."""
    from dpo3d.dataset import load_split, write_records
    from dpo3d.pairs import build_pairs

    _quiet(small=False)
    function = _function(scorer)
    data = load_split(prompts, split)
    if "prompt" not in data.column_names:
        raise UserError(f"'{prompts}' has no column prompt", hint=f"it has {', '.join(data.column_names)}")
    policy, tokenizer = _load(model, device)
    built = build_pairs(
        policy,
        tokenizer,
        data["prompt"][:],
        function,
        n=n,
        select=select,  # type: ignore[arg-type]
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    path = write_records(output / "pairs.jsonl", built)
    emit({"prompts": len(data), "pairs": len(built), "file": str(path)}, json)


def _function(name: str) -> Any:
    """The function that `module:function` names, the present folder included."""
    import importlib
    import sys

    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(f"scorer is '{name}', expected module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"scorer '{name}' could not be imported ({error})") from error
    finally:
        sys.path.pop(0)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: dpo3d train --model_name_or_path out/sft --dataset_name pairs.jsonl --beta_rejected 0.02 --monitor",
)
def train(
    context: typer.Context,
    output: Output = Path("out/train"),
    resume: Resume = False,
    monitor: Annotated[bool, typer.Option("--monitor", help="Watch the three D's; writes an HTML report.")] = False,
    monitor_every: Annotated[int, typer.Option(help="Steps between the monitor's evaluations.", min=1)] = 50,
    probe: Annotated[int, typer.Option(help="Held-out pairs that the monitor watches.", min=1)] = 64,
    options: Annotated[bool, typer.Option("--options", help="List TRL's and dpo3d's training options.")] = False,
    json: Json = False,
) -> None:
    """Train with FlexDPOTrainer; every option of TRL's DPO, ModelConfig (PEFT) and FlexDPOConfig is taken too."""
    from dpo3d import training

    if options:
        typer.echo(training.options_text())
        return
    request = training.Request(output, resume, monitor, monitor_every, probe)
    import os
    import sys
    from contextlib import redirect_stdout

    # The trainer prints its log on stdout, which is for results.
    with redirect_stdout(sys.stderr):
        result = training.run(context.args, request)

    if os.environ.get("RANK", "0") == "0":
        emit(result, json)


@app.command(epilog="Example: dpo3d watch out/train")
def watch(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished TRL training.", metavar="RUN_DIR")],
    beta: Annotated[float, typer.Option(help="The run's β.")] = 0.1,
    beta_rejected: Annotated[float, typer.Option(help="The run's β−, where it had one of its own.")] = math.nan,
    json: Json = False,
) -> None:
    """The report of a run: of the monitor's log where it had one, else the passive one of plain TRL's trainer_state.json."""
    from dpo3d.monitor import LOG, REPORT
    from dpo3d.report import monitor_log, passive_history, trainer_log, write_report

    if not beta > 0:
        raise UserError(f"beta is {beta}, expected more than 0")
    columns = ["step", "delta_chosen", "delta_rejected", "drop_ratio", "chosen_share"]
    if (run / LOG).exists():
        history, alarms = monitor_log(run / LOG)
        columns += [c for c in ("chosen_drawdown", "off_pair_mass", "self_ref_logp") if c in (history or [{}])[-1]]
    else:
        rejected = None if math.isnan(beta_rejected) else beta_rejected
        history, alarms = passive_history(trainer_log(run), beta=beta, beta_rejected=rejected)
        columns += ["logp_chosen", "logp_rejected"]
    path = write_report(run / REPORT, history, alarms, title=f"The three D's: {run.name}")
    emit(Table("What the run logged", columns, [[r[c] for c in columns] for r in history]), json)
    for alarm in alarms:
        console.print(alarm.message, highlight=False)
    console.print(f"report: {path}")


@app.command(epilog="Example: dpo3d bench digits --method dpo,sft.05 --seeds 1 --steps 60")
def bench(
    which: Annotated[str, typer.Argument(help="toy or digits.")],
    method: Annotated[str, typer.Option(help="Methods with commas; 'all' for every one.")] = "all",
    seeds: Annotated[int, typer.Option(help="Seeds.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Steps on the digit task.", min=1)] = 120,
    supervised_steps: Annotated[int, typer.Option(help="Supervised steps on the digit task.", min=1)] = 700,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Methods side by side on the toy or on the digit task."""
    import torch

    torch.set_num_threads(1)
    if which == "toy":
        from dpo3d import toy as model

        names = list(model.METHODS) if method == "all" else _list(method)
        world = model.pretrain([1, 2, 3, 4], list(range(seed, seed + seeds)))
        emit(_toy_table([o for name in names for o in model.outcomes(model.train(world, name))]), json)
        return
    if which != "digits":
        raise UserError(f"bench is '{which}', expected toy or digits")
    from dpo3d import testbed

    _quiet()
    names = list(testbed.METHODS) if method == "all" else _list(method)
    if unknown := [name for name in names if name not in testbed.METHODS]:
        raise UserError(f"no method named '{unknown[0]}'", hint=f"there are {', '.join(testbed.METHODS)}")
    rows = []
    for number in range(seed, seed + seeds):
        start = testbed.supervise(number, steps=supervised_steps)
        prompts = testbed.held_out(number)
        data: dict[int, Any] = {}
        for name in names:
            scenario, fields = testbed.METHODS[name]
            if scenario not in data:
                data[scenario] = testbed.make_pairs(start, scenario, number)
            trainer = testbed.align(start, data[scenario], number, **{"max_steps": steps, **fields})
            got = testbed.measure(trainer.model, prompts)
            rows.append([name, number, got.accuracy, got.greedy, got.off_answer, got.chosen, got.rejected])
    columns = [
        "method",
        "seed",
        "accuracy of a sample",
        "greedy accuracy",
        "mass off the answers",
        "log π chosen",
        "log π rejected",
    ]
    emit(Table("Sorting digits", columns, rows), json)


def _quiet(*, small: bool = True) -> None:
    """No bars of other libraries; small: one thread, which is faster for the testbed's models."""
    import logging

    import torch
    from datasets import disable_progress_bars

    if small:
        torch.set_num_threads(1)
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
