"""The command line: convert a model, train it, measure it, calibrate it, and hand it on."""

from pathlib import Path
from typing import Annotated, Any

import typer
from tenfold_shared.cli import Device, Json, Output, Resume, Seed, Table, emit, make_app
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError

app = make_app("adamoe", "Null experts: any mixture-of-experts language model, token-adaptive.")

Model = Annotated[str, typer.Option("--model", help="Folder or hub id of a mixture-of-experts language model.")]
Out = Annotated[Path, typer.Option("--out", "--output", "-o", help="Folder for the model; replaced whole.")]
Data = Annotated[str, typer.Option(help="JSONL file with a text a line, or 'synthetic' for the testbed's language.")]
Rows = Annotated[int, typer.Option(min=1, help="Sequences of the synthetic language, or lines of the file, at most.")]


@app.command(epilog="Example: adamoe demo --output out")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False) -> None:
    """Train a small Mixtral, convert it, and show which tokens get how many experts; offline, about two minutes."""
    from adamoe.demo import run

    emit(run(output, seed), json)


@app.command(epilog="Example: adamoe toy -o toy")
def toy(
    output: Output = Path("toy"),
    steps: Annotated[int, typer.Option(min=0, help="Training steps; 0 leaves it random.")] = 120,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write a small Mixtral of the testbed's language, with its tokenizer, to try the other commands on."""
    from tenfold_shared.hub import replace_atomically

    from adamoe.testbed import make_model, pretrain, save

    model = pretrain(seed, steps)[0] if steps else make_model(seed)
    with replace_atomically(output) as partial:
        save(model, partial)
    emit({"model": str(output)}, json)


@app.command(epilog="Example: adamoe convert --model toy --null-experts 8 --out toy-null")
def convert(
    model: Model,
    null_experts: Annotated[
        int, typer.Option(help="Null experts m; a multiple of the true ones keeps the function.")
    ] = 8,
    top_k: Annotated[str, typer.Option(help="Selected per token, or 'preserve'.")] = "preserve",
    null_init: Annotated[str, typer.Option(help="copy, copy_noise, zeros or bias.")] = "copy",
    null_type: Annotated[str, typer.Option(help="zero or identity.")] = "zero",
    out: Out = Path("converted"),
    json: Json = False,
) -> None:
    """Give a model null experts and write it; the stock library still opens it, as the stock model."""
    import warnings

    from adamoe import AdaMoEConfig, export, from_pretrained
    from adamoe.checkpoints import copy_tokenizer

    config: Any = AdaMoEConfig.from_dict(
        {"num_null_experts": null_experts, "top_k": _top_k(top_k), "null_init": null_init, "null_type": null_type}
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        converted = from_pretrained(_unconverted(model), adamoe_config=config)
    for warning in said:
        if "changes the function" in str(warning.message):
            typer.echo(f"warning: {warning.message}", err=True)
    export(converted, out)
    copy_tokenizer(model, out)
    chosen = converted.config.adamoe
    emit({"model": str(out), "null experts": chosen["num_null_experts"], "top_k": chosen["top_k"]}, json)


@app.command(epilog="Example: adamoe train --model toy --data synthetic --steps 20 --lr 1e-3 -o tuned")
def train(
    model: Model,
    data: Data = "synthetic",
    method: Annotated[str, typer.Option(help="adamoe, topk, top1 or top_p.")] = "adamoe",
    aux: Annotated[
        str, typer.Option(help="Coefficient of the balancing loss before and after the half.")
    ] = "0.02:1e-4",
    null_experts: Annotated[int, typer.Option(help="Null experts, where the model has none yet.")] = 8,
    target_load: Annotated[float | None, typer.Option(help="Steer to this many true experts per token.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-5,
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA of rank 8 and the routers only.")] = False,
    threshold: Annotated[float, typer.Option(help="Probability that top_p collects.")] = 0.5,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    rows: Rows = 512,
    output: Output = Path("tuned"),
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Fine-tune with transformers' Trainer; checkpoints and the model go to OUTPUT."""
    from adamoe import AdaMoEConfig
    from adamoe.finetuning import Recipe, fine_tune

    pick_device(device)
    recipe = Recipe(method, steps, batch_size, accumulation, lr, lora, threshold, save_steps, seed)
    config = AdaMoEConfig(num_null_experts=null_experts, aux_coef=_pair(aux), target_load=target_load)
    tokens, pad = _tokens(model, data, rows, seed)
    _, losses = fine_tune(
        model,
        [{"input_ids": ids} for ids in tokens],
        recipe,
        config,
        output=output,
        resume=resume,
        pad=pad,
        device=device,
    )
    if method == "top_p":
        typer.echo(f"note: a checkpoint does not hold the rule; give eval --top-p {threshold:g}", err=True)
    if lora:
        typer.echo(f"note: {output / 'model'} is an adapter of '{model}'; PeftModel.from_pretrained opens it", err=True)
    emit({"model": str(output / "model"), "first loss": losses[0], "last loss": losses[-1]}, json)


@app.command(epilog="Example: adamoe eval --model toy-null --data synthetic --rows 32")
def eval(
    model: Model,
    data: Data = "synthetic",
    rows: Rows = 96,
    top_p: Annotated[
        float | None, typer.Option(help="Route by top-p with this threshold, as train --method top_p did.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Loss, load and multiply-adds; on the synthetic language also accuracy and load by kind of token."""
    import torch

    from adamoe.conversion import is_converted
    from adamoe.flops import count_flops

    loaded = _load(model)
    count_flops(loaded.config, 0.0)  # refuses a dense model before any work
    if top_p is not None:
        from adamoe import routers

        routers.use(loaded, routers.top_p, threshold=top_p)
    load: float
    if data == "synthetic":
        from adamoe.testbed import Language, score

        found = score(loaded, Language.make(seed), seed=seed, rows=rows)
        load = found["load"]
        table = {"loss": found["ce"], "load": load}
        for kind in ("easy", "hard", "random"):
            table |= {f"{name} {kind}": found[f"{name} {kind}"] for name in ("accuracy", "load")}
    else:
        from adamoe.calibration import mean_load
        from adamoe.finetuning import collate

        tokens, pad = _tokens(model, data, rows, seed)
        batch = collate([{"input_ids": ids} for ids in tokens], pad)
        with torch.no_grad():
            loss = float(loaded(**batch).loss)
            keys = {k: batch[k] for k in ("input_ids", "attention_mask")}
            load = mean_load(loaded, [keys]) if is_converted(loaded) else float(loaded.config.num_experts_per_tok)
        table = {"loss": loss, "load": load}
    table["multiply-adds per token"] = count_flops(loaded.config, load)
    emit(table, json)


@app.command("load-report", epilog="Example: adamoe load-report --model toy-null --text '+ 3 a 7 A B C D'")
def load_report(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Text to show the loads of.")] = None,
    file: Annotated[Path | None, typer.Option(help="Text file, a line a sequence, instead of --text.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--output", "-o", help="Write .html or .csv instead of a table.")
    ] = None,
    json: Json = False,
) -> None:
    """True experts of every token, by layer."""
    import torch
    from tenfold_shared.hub import load_tokenizer, replace_atomically

    from adamoe import record_load
    from adamoe.finetuning import read_lines

    if (text is None) == (file is None):
        raise UserError("expected one of --text and --file")
    if out is not None and out.suffix not in (".html", ".csv"):
        raise UserError(f"'{out}' ends with neither .html nor .csv")
    lines = [text] if text is not None else read_lines(str(file))
    lines = [line for line in lines if line and line.strip()]
    if not lines:
        raise UserError("there is no text")
    loaded, tokenizer = _converted(model), load_tokenizer(model)
    words, means, rows = [], [], []
    for number, line in enumerate(lines):
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        with record_load(loaded, token_ids=ids) as record, torch.no_grad():
            loaded(ids)
        names = [tokenizer.decode([t]) for t in ids[0].tolist()]
        loads = record.per_token[:, 0]
        words.append(names)
        means.append(loads.float().mean(0).tolist())
        rows += [[number, i, name, *loads[:, i].tolist(), round(means[-1][i], 3)] for i, name in enumerate(names)]
    columns = ["line", "position", "token", *(f"layer {i}" for i in range(len(loads))), "mean"]
    if out is None:
        emit(Table(f"true experts per token, {len(rows)} tokens", columns, rows), json)
        return
    with replace_atomically(out) as partial:
        if out.suffix == ".html":
            from adamoe.rendering import to_html

            partial.write_text(to_html(words, means, "True experts per token"), encoding="utf-8")
        else:
            import csv

            with partial.open("w", newline="", encoding="utf-8") as handle:
                csv.writer(handle).writerows([columns, *rows])
    emit({"report": str(out), "tokens": len(rows)}, json)


@app.command(epilog="Example: adamoe calibrate --model tuned/model --target-load 1.5 --data synthetic --out calibrated")
def calibrate(
    model: Model,
    target_load: Annotated[float, typer.Option(help="True experts per token wanted.")],
    data: Data = "synthetic",
    rows: Rows = 64,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Every layer gets the load, by a bias of its own.")
    ] = False,
    out: Out = Path("calibrated"),
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Give a model another load without training: one number added to the nulls' scores."""
    import adamoe
    from adamoe.checkpoints import copy_tokenizer
    from adamoe.finetuning import collate

    loaded = _converted(model)
    tokens, pad = _tokens(model, data, rows, seed)
    batch = collate([{"input_ids": ids} for ids in tokens], pad)
    keys = {k: batch[k] for k in ("input_ids", "attention_mask")}
    load = adamoe.calibrate(loaded, [keys], target_load=target_load, per_layer=per_layer)
    adamoe.export(loaded, out)
    copy_tokenizer(model, out)
    emit({"model": str(out), "load": load}, json)


@app.command(epilog="Example: adamoe export --model toy-null --layout stock --out toy-stock")
def export(
    model: Model,
    layout: Annotated[
        str, typer.Option(help="official (gate2), stock (no nulls), registered or in_place.")
    ] = "official",
    out: Out = Path("exported"),
    json: Json = False,
) -> None:
    """Write a converted model in another layout."""
    import adamoe
    from adamoe.checkpoints import copy_tokenizer

    adamoe.export(_converted(model), out, layout)  # type: ignore[arg-type]
    copy_tokenizer(model, out)
    emit({"model": str(out), "layout": layout}, json)


@app.command(epilog="Example: adamoe flops --model-config toy --null-experts 8 --load 1.66")
def flops(
    model_config: Annotated[str, typer.Option("--model-config", help="Folder or hub id with a config.json.")],
    load: Annotated[float, typer.Option(help="Mean true experts per token.")],
    null_experts: Annotated[int, typer.Option(min=0, help="Null experts m.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Sequence length of the attention's part.")] = 128,
    json: Json = False,
) -> None:
    """Multiply-adds per token at a load, and what that saves."""
    from tenfold_shared.hub import load_model
    from transformers import AutoConfig

    from adamoe.flops import count_flops, flops_reduction

    config = load_model(AutoConfig, model_config, use_safetensors=None)
    emit(
        {
            "multiply-adds per token": count_flops(config, load, seq_len=seq_len, num_null_experts=null_experts),
            "saved, %": round(100 * flops_reduction(config, load, num_null_experts=null_experts, seq_len=seq_len), 2),
        },
        json,
    )


@app.command("bench", epilog="Example: adamoe bench layer --hidden 128 --inner 256 --tokens 256 --repeats 3")
def bench(
    what: Annotated[str, typer.Argument(help="layer: one expert layer; train: a training step of the small Mixtral.")],
    hidden: Annotated[int, typer.Option(min=8)] = 512,
    inner: Annotated[int, typer.Option(min=8)] = 1024,
    tokens: Annotated[int, typer.Option(min=1)] = 1024,
    repeats: Annotated[int, typer.Option(min=3)] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Time against load, beside the stock paths."""
    from adamoe.speed import layer_table, training_table

    device = str(pick_device(device))
    if what not in ("layer", "train"):
        raise UserError(f"there is no benchmark '{what}'", hint="take layer or train")
    if what == "train":
        import torch

        from adamoe.testbed import Language, make_model

        batch, _ = Language.make(0).batch(24, 64, torch.Generator().manual_seed(0))
        emit(training_table(lambda: make_model(0), batch, repeats=repeats), json)
    else:
        emit(layer_table(hidden=hidden, inner=inner, tokens=tokens, repeats=repeats, dtype=dtype, device=device), json)


@app.command("serve-args", epilog="Example: adamoe serve-args --model toy-null")
def serve_args(model: Model, json: Json = False) -> None:
    """The vLLM command line that serves a converted model."""
    from tenfold_shared.hub import load_model
    from transformers import AutoConfig

    from adamoe.serving import serve_arguments

    config = load_model(AutoConfig, model, use_safetensors=None)
    arguments = serve_arguments(model, config)
    if json:
        emit({"arguments": arguments}, True)
    else:
        import shlex

        typer.echo(shlex.join(arguments))


def _top_k(text: str) -> int | str:
    if text == "preserve":
        return text
    if not text.lstrip("-").isdigit():
        raise UserError(f"top-k is '{text}'", hint="take 'preserve' or a whole number")
    return int(text)


def _pair(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last or first)
    except ValueError as error:
        raise UserError(f"aux is '{text}'", hint="write two numbers as 0.02:1e-4") from error


def _load(name: str) -> Any:
    """A converted or a stock model."""
    from tenfold_shared.hub import load_model
    from transformers import AutoConfig

    from adamoe import from_pretrained
    from adamoe.checkpoints import register, stock_model

    register()
    config = load_model(AutoConfig, name, use_safetensors=None)
    return from_pretrained(name) if getattr(config, "adamoe", None) else stock_model(name)


def _converted(name: str) -> Any:
    from adamoe import from_pretrained

    return from_pretrained(name)


def _unconverted(name: str) -> str:
    from tenfold_shared.hub import load_model
    from transformers import AutoConfig

    if getattr(load_model(AutoConfig, name, use_safetensors=None), "adamoe", None):
        raise UserError(f"'{name}' already has null experts", hint="export it with --layout stock first")
    return name


def _tokens(model: str, data: str, rows: int, seed: int) -> tuple[list[list[int]], int]:
    """Token ids of the data, and the id that pads."""
    if data == "synthetic":
        import torch

        from adamoe.testbed import Language

        batch = Language.make(seed).changed(seed).batch(rows, 64, torch.Generator().manual_seed(seed + 5))[0]
        return batch.tolist(), 36
    from tenfold_shared.hub import load_tokenizer

    from adamoe.finetuning import read_texts

    texts = read_texts(data)[:rows]
    tokenizer = load_tokenizer(model)
    tokens = [ids for text in texts if len(ids := tokenizer(text)["input_ids"]) > 1]
    if not tokens:
        raise UserError(f"no text of {data} has two tokens", hint="a next token is needed to predict")
    return tokens, tokenizer.pad_token_id or 0
