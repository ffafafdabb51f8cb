"""The command `spikezip`: parses, calls, prints."""

from pathlib import Path
from typing import Annotated, Any

import typer
from tenfold_shared.cli import Device, Json, Output, Resume, Seed, Table, console, emit, make_app
from tenfold_shared.errors import UserError

app = make_app("spikezip", "Stock transformers into spiking networks, exactly.")


def _defaults(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a YAML or JSON file as defaults; what the command line says wins."""
    if path is None:
        return None
    import yaml

    if not path.is_file():
        raise UserError(f"configuration {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} is neither YAML nor JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"configuration {path} holds no mapping of options")
    values = {str(k).replace("-", "_"): v for k, v in values.items()}
    known = {p.name for p in ctx.command.params}
    if unknown := sorted(set(values) - known):
        raise UserError(f"configuration {path} has unknown options: {', '.join(unknown)}")
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


Config = Annotated[
    Path | None, typer.Option("--config", help="YAML or JSON file of options.", callback=_defaults, is_eager=True)
]
Folder = Annotated[Path, typer.Argument(help="Folder of a quantised or spiking network.")]
Data = Annotated[str, typer.Option(help="digits, sentiment, or a safetensors file of inputs and labels.")]
Samples = Annotated[int, typer.Option(help="Samples used.", min=1)]
Steps = Annotated[int, typer.Option("--max-steps", help="Most time-steps.", min=1)]
Delay = Annotated[int, typer.Option(help="Steps by which each stage starts after the one before.", min=0)]
Burst = Annotated[int, typer.Option(help="Unit spikes a neuron may send in a step; 1 is the paper's.", min=1)]


def _data(name: str, seed: int) -> Any:
    """The testbed's digits or sentences, or the samples of a file."""
    from spikezip import testbed, workbench

    if name == "digits":
        images = testbed.digits(seed)
        return workbench.Samples(images.train, images.train_labels, images.test, images.test_labels)
    if name == "sentiment":
        text = testbed.sentiment(seed)
        return workbench.Samples(*workbench.split_labels(text.train), *workbench.split_labels(text.test))
    return workbench.dataset(name)


def _model(name: str, seed: int, epochs: int) -> Any:
    """The testbed's networks, trained on the spot, or a model by name."""
    from spikezip import testbed, workbench

    if name == "digits":
        images = testbed.digits(seed)
        model = testbed.digits_vit(seed)
        return testbed.train(model, images.loader(seed=seed), epochs=epochs, augment=testbed.roll, seed=seed)
    if name == "sentiment":
        text = testbed.sentiment(seed)
        return testbed.train(
            testbed.sentiment_roberta(text.vocabulary, seed), text.loader(seed=seed), epochs=epochs, seed=seed
        )
    return workbench.plain_model(name)


@app.command(epilog="Example: spikezip demo --output out --seed 0")
def demo(output: Output = Path("out"), seed: Seed = 0, json: Json = False, config: Config = None) -> None:
    """Train, quantise, convert and run a small ViT on digits, offline; ends in two pictures and a table."""
    from spikezip import demo as module

    emit(module.run(output, seed=seed), json)
    if not json:
        console.print(f"pictures and summary.json are in {output}")


@app.command(epilog="Example: spikezip quantize digits --levels 16 --output qann")
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of transformers, timm:NAME, or digits or sentiment.")],
    output: Output = Path("qann"),
    levels: Annotated[int, typer.Option(help="Levels of every quantiser.")] = 16,
    attn_levels: Annotated[int | None, typer.Option(help="Levels inside attention; the same if not given.")] = None,
    activation: Annotated[str, typer.Option(help="keep, or relu as in the paper.")] = "keep",
    per_channel: Annotated[bool, typer.Option("--per-channel", help="One step for each channel.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of module paths to leave alone.")] = None,
    epochs: Annotated[int, typer.Option(help="Training of digits and sentiment.", min=1)] = 20,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Put quantisers into a model; writes the QANN, not yet calibrated, and the model as its teacher."""
    from spikezip import QuantConfig
    from spikezip import workbench as bench
    from spikezip.qann.quantizer import quantizers

    settings = QuantConfig(
        levels=levels, attn_levels=attn_levels, activation=activation, per_channel=per_channel, skip=tuple(skip or ())
    )
    plain = _model(model, seed, epochs)
    qann = bench.quantized(plain, settings, output)
    emit({"quantisers": len(quantizers(qann)), "folder": str(output)}, json)


@app.command(epilog="Example: spikezip calibrate qann --data digits --method mse")
def calibrate(
    folder: Folder,
    data: Data = "digits",
    method: Annotated[str, typer.Option(help="lsq, mse, percentile or kl.")] = "lsq",
    samples: Samples = 512,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Set every step from data, and report what each quantiser clips; the folder is written anew."""
    from spikezip import workbench as bench

    report = bench.calibrated(folder, _data(data, seed).head(samples), method=method, device=device)
    rows = [[c.name, f"[{c.lo}, {c.hi}]", c.step, 100 * c.clipped, c.error] for c in report]
    emit(Table(f"Calibration by {method}", ["quantiser", "bounds", "step", "clipped, %", "relative error"], rows), json)


@app.command(epilog="Example: spikezip train qann --data digits --epochs 6 --loss kl")
def train(
    folder: Folder,
    data: Data = "digits",
    epochs: Annotated[int, typer.Option(help="Passes over the data.", min=1)] = 6,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 2.0,
    loss: Annotated[str, typer.Option(help="official or kl.")] = "official",
    batch: Annotated[int, typer.Option(help="Batch size, all processes together.", min=1)] = 96,
    samples: Annotated[int | None, typer.Option(help="Training samples; all if not given.", min=1)] = None,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Fine-tune a calibrated QANN against its teacher; checkpoints each epoch beside the folder."""
    from spikezip import workbench as bench

    history = bench.trained(
        folder, _data(data, seed).head(samples), epochs=epochs, lr=lr, temperature=temperature, loss=loss,
        batch=batch, resume=resume, seed=seed, device=device,
    )  # fmt: skip
    emit(
        Table("Quantisation-aware training", ["epoch", "mean loss"], [[i + 1, x] for i, x in enumerate(history)]), json
    )


@app.command(epilog="Example: spikezip convert qann --output snn --engine drive")
def convert(
    folder: Folder,
    output: Output = Path("snn"),
    engine: Annotated[str, typer.Option(help="drive or event.")] = "drive",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    resync: Annotated[bool, typer.Option(help="Event engine: end in summed values.")] = True,
    delay: Delay = 0,
    burst: Burst = 1,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Turn a calibrated QANN into a spiking network."""
    from spikezip import workbench as bench

    snn = bench.converted(folder, engine=engine, dtype=dtype, resync=resync)
    snn.set_schedule(delay=delay)
    snn.set_burst(burst)
    snn.save_pretrained(output)
    emit({"engine": engine, "neuron sites": len(snn.sites), "folder": str(output)}, json)


@app.command("eval", epilog="Example: spikezip eval snn --data digits --samples 120 --at 4 --at 8")
def evaluate(
    folder: Folder,
    data: Data = "digits",
    samples: Samples = 120,
    at: Annotated[list[int] | None, typer.Option(help="Steps at which the accuracy is shown.")] = None,
    max_steps: Steps = 128,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Accuracy against time-steps, agreement and exactness; ends with the certificate."""
    from spikezip import workbench as bench

    rows, exact = bench.evaluated(
        folder, _data(data, seed).test(samples), at=at or [4, 8, 16, 32], max_steps=max_steps, device=device
    )
    emit(
        Table("Accuracy against time-steps", ["network", "steps", "accuracy, %", "agreement with the QANN, %"], rows),
        json,
    )
    console.print(str(exact), soft_wrap=True)


@app.command(epilog="Example: spikezip energy snn --data digits --samples 60 --delay 1")
def energy(
    folder: Folder,
    data: Data = "digits",
    samples: Samples = 60,
    max_steps: Steps = 256,
    delay: Delay = 0,
    burst: Burst = 1,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """What a sample costs as ANN in fp32, quantised in int8, and spiking."""
    from spikezip import workbench as bench

    rows, notes = bench.priced(
        folder, _data(data, seed).test(samples), max_steps=max_steps, delay=delay, burst=burst, device=device
    )
    emit(Table("Cost of a sample", ["what is counted", "ANN fp32", "QANN int8", "SNN"], rows), json)
    for note in notes:
        console.print(note, soft_wrap=True)


@app.command(
    epilog="Example: spikezip schedules snn --data digits --samples 20 --delay 0 --delay 1 --burst 1 --burst 4"
)
def schedules(
    folder: Folder,
    data: Data = "digits",
    samples: Samples = 20,
    delay: Annotated[list[int] | None, typer.Option(help="Delays to try; 0, 1 and 2 if not given.")] = None,
    burst: Annotated[list[int] | None, typer.Option(help="Bursts to try; 1, 2 and 4 if not given.")] = None,
    max_steps: Steps = 512,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Steps and work of every pair of delay and burst, all of which end in the same logits."""
    from spikezip import workbench as bench

    rows = bench.scheduled(
        folder, _data(data, seed).test(samples), delays=delay or [0, 1, 2], bursts=burst or [1, 2, 4],
        max_steps=max_steps, device=device,
    )  # fmt: skip
    emit(Table("Schedules", ["delay", "burst", "steps", "accumulations a sample", "on the front"], rows), json)


@app.command(epilog="Example: spikezip stats snn --data digits --samples 30")
def stats(
    folder: Folder,
    data: Data = "digits",
    samples: Samples = 60,
    max_steps: Steps = 256,
    csv: Annotated[Path | None, typer.Option(help="Also write the table as CSV.", dir_okay=False)] = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Spikes of every layer: how many, of which sign, how many were wasted, and when the layer settled."""
    from tenfold_shared.hub import replace_atomically

    from spikezip import workbench as bench

    result = bench.network(folder, device).run(_data(data, seed).test(samples).inputs, max_steps=max_steps)
    rows = result.spikes.rows()
    emit(Table("Spikes", list(rows[0]), [list(row.values()) for row in rows]), json)
    if csv is not None:
        with replace_atomically(csv) as partial:
            partial.write_text(result.spikes.csv(), encoding="utf-8")
    console.print(str(result.certificate), soft_wrap=True)


@app.command(epilog="Example: spikezip inspect qann --compare --data digits --samples 20")
def inspect(
    folder: Folder,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the network and name the first layer that differs.")
    ] = False,
    engine: Annotated[str, typer.Option(help="Engine to compare: drive or event.")] = "drive",
    resync: Annotated[bool, typer.Option(help="Event engine: end in summed values.")] = True,
    data: Data = "digits",
    samples: Samples = 20,
    max_steps: Steps = 256,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Every quantiser with its bounds and step; with --compare, how many integers differ in each layer."""
    from spikezip import workbench as bench

    if not compare:
        columns = ["quantiser", "bounds", "steps", "mean step"]
        emit(Table("Quantisers", columns, bench.quantiser_map(folder)), json)
        return
    exact = bench.compared(
        folder, _data(data, seed).test(samples), engine=engine, resync=resync, max_steps=max_steps, device=device
    )
    emit(Table("Integers that differ from the QANN", ["layer", "mismatches"], list(exact.layers.items())), json)
    console.print(str(exact), soft_wrap=True)


@app.command(
    "import-official", epilog="Example: spikezip import-official vit_small_q32.pth --arch vit_small --levels 32"
)
def import_official(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the official implementation.")],
    arch: Annotated[str, typer.Option(help="vit_small, vit_base, vit_large or roberta.")],
    levels: Annotated[int | None, typer.Option(help="Levels the checkpoint was trained with; it does not say.")] = None,
    activation: Annotated[str, typer.Option(help="relu or gelu, roberta only.")] = "relu",
    architecture: Annotated[Path | None, typer.Option(help="YAML of sizes that differ from the arch's.")] = None,
    output: Output = Path("qann"),
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Read an official checkpoint, without executing it, into a QANN folder."""
    from spikezip import workbench as bench

    count = bench.imported(
        checkpoint, arch=arch, levels=levels, activation=activation, architecture=architecture, output=output
    )
    emit({"quantisers": count, "folder": str(output)}, json)


@app.command(epilog="Example: spikezip export snn --format onnx --to step.onnx --data digits --samples 4")
def export(
    folder: Folder,
    to: Annotated[Path, typer.Option(help="File to write.", dir_okay=False)],
    format: Annotated[
        str, typer.Option(help="onnx: one drive step with explicit state; nir: feed-forward networks.")
    ] = "onnx",
    data: Data = "digits",
    samples: Samples = 1,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Write a network as ONNX or NIR."""
    from spikezip import workbench as bench

    bench.exported(folder, _data(data, seed).test(samples), to=to, format=format)
    emit({"format": format, "file": str(to), "bytes": to.stat().st_size}, json)


@app.command(epilog="Example: spikezip bench --steps 16 --neurons 20000 --device cpu")
def bench(
    steps: Annotated[int, typer.Option(help="Time-steps.", min=1)] = 32,
    neurons: Annotated[int, typer.Option(help="Neurons.", min=1)] = 400_000,
    backend: Annotated[str, typer.Option(help="auto, eager, compile or triton.")] = "compile",
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """The neuron alone, against spikingjelly's: time, identical spikes, share of the memory bandwidth."""
    from spikezip import workbench

    emit(workbench.neuron_bench(steps=steps, neurons=neurons, backend=backend, seed=seed, device=device), json)
