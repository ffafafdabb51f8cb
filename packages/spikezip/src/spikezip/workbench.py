"""The jobs behind the commands: a folder in, a folder or a table out."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_model as load_from_hub
from tenfold_shared.hub import replace_atomically
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spikezip.engine import SpikingModel, convert
from spikezip.errors import CheckpointError
from spikezip.exactness import Exactness, compare
from spikezip.official import load_official
from spikezip.qann.calibration import Calibration, calibrate, call
from spikezip.qann.placement import QuantConfig, build, quantize
from spikezip.qann.quantizer import quantizers
from spikezip.qann.training import QATTrainer
from spikezip.storage import load, load_quantized, save

TEACHER = "teacher.safetensors"


@dataclass
class Samples:
    """Inputs and labels, and the part of them that is for testing."""

    inputs: Any
    labels: Tensor
    test_inputs: Any
    test_labels: Tensor

    def head(self, n: int | None) -> "Samples":
        """The first n training samples."""
        return Samples(_first(self.inputs, n), self.labels[:n], self.test_inputs, self.test_labels)

    def test(self, n: int) -> "Samples":
        """The first n test samples, as inputs and labels."""
        inputs, labels = _first(self.test_inputs, n), self.test_labels[:n]
        return Samples(inputs, labels, inputs, labels)

    def rows(self) -> list[Any]:
        """One entry a sample, as a DataLoader takes them."""
        if isinstance(self.inputs, dict):
            return [{**{k: v[i] for k, v in self.inputs.items()}, "labels": y} for i, y in enumerate(self.labels)]
        return list(zip(self.inputs, self.labels, strict=True))


def _first(inputs: Any, n: int | None) -> Any:
    return {k: v[:n] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[:n]


def dataset(name: str) -> Samples:
    """The samples of a safetensors file.

    It holds `labels` and either `inputs` or the model's own keyword arguments (`pixel_values`, `input_ids`,
    `attention_mask`); all of it serves for training and for testing.

    Raises UserError when the file is missing, damaged, empty or has no labels.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"data '{name}' is neither digits nor sentiment nor a file", hint="pass a safetensors file")
    try:
        tensors = load_file(str(path))
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error})") from error
    if "labels" not in tensors or len(tensors) < 2:
        raise UserError(f"{path} holds {', '.join(tensors) or 'nothing'}, expected labels and inputs")
    sizes = {len(v) for v in tensors.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"the entries of {path} have {sorted(sizes)} samples, expected one number above 0")
    inputs, labels = split_labels(tensors)
    inputs = inputs.get("inputs", inputs)
    return Samples(inputs, labels, inputs, labels)


def split_labels(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {k: v for k, v in tensors.items() if k != "labels"}, tensors["labels"]


def plain_model(name: str) -> nn.Module:
    """A model by name: timm's with `timm:` before it, or transformers' from a folder or the hub."""
    if name.startswith("timm:"):
        import timm

        try:
            return timm.create_model(name.removeprefix("timm:"), pretrained=True).eval()
        except Exception as error:  # timm and its hub client raise classes of their own for each way to fail
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"timm could not make '{name}' ({reason})", hint="check the name and the network"
            ) from error
    import transformers

    config = load_from_hub(transformers.AutoConfig, name, use_safetensors=None)
    classes = getattr(config, "architectures", None) or []
    cls = getattr(transformers, classes[0], None) if classes else None
    if cls is None:
        raise UserError(f"'{name}' names no architecture of transformers ({classes})")
    return load_from_hub(cls, name).eval()


def quantized(model: nn.Module, config: QuantConfig, output: Path) -> nn.Module:
    """Quantise a model and write it, with itself as the teacher."""
    qann = quantize(model, config)
    save(qann, output)
    with replace_atomically(output / TEACHER) as partial:
        save_model(model, str(partial))
    return qann


def _write_again(qann: nn.Module, folder: Path) -> None:
    """Save over a folder, whose teacher stays."""
    teacher = folder / TEACHER
    kept = folder.with_name(f".{folder.name}.{TEACHER}")
    if teacher.exists():
        shutil.copy2(teacher, kept)
    save(qann, folder)
    if kept.exists():
        kept.replace(teacher)


def calibrated(folder: Path, data: Samples, *, method: str, device: str) -> list[Calibration]:
    """Calibrate the QANN of a folder in place."""
    qann = load_quantized(folder).to(pick_device(device))
    batches = [_part(data.inputs, i) for i in range(0, len(data.labels), 64)]
    report = calibrate(qann, batches, method=method, max_batches=len(batches))
    _write_again(qann.cpu(), folder)
    return report


def _part(inputs: Any, start: int, size: int = 64) -> Any:
    if isinstance(inputs, dict):
        return {k: v[start : start + size] for k, v in inputs.items()}
    return inputs[start : start + size]


def trained(folder: Path, data: Samples, *, batch: int, epochs: int, resume: bool, **settings: Any) -> list[float]:
    """Fine-tune the QANN of a folder in place; returns the mean loss of each epoch."""
    if not (folder / TEACHER).is_file():
        raise CheckpointError(f"{folder / TEACHER} does not exist", hint="make the folder with spikezip quantize")
    qann = load_quantized(folder)
    teacher = build(qann.spike_origin)
    load_model(teacher, str(folder / TEACHER))
    if len(data.labels) < batch:
        raise UserError(f"there are {len(data.labels)} samples for a batch of {batch}", hint="pass a smaller --batch")
    loader: DataLoader[Any] = DataLoader(data.rows(), batch_size=batch, shuffle=True, drop_last=True)
    trainer = QATTrainer(qann, teacher, output=folder.with_name(f"{folder.name}-training"), resume=resume, **settings)
    qann = trainer.fit(loader, epochs)
    _write_again(qann.cpu(), folder)
    return trainer.history


def converted(folder: Path, *, engine: str, dtype: str, resync: bool) -> SpikingModel:
    """The spiking network of a folder's QANN."""
    if dtype not in ("float32", "float64"):
        raise UserError(f"dtype is '{dtype}', expected float32 or float64")
    return convert(load_quantized(folder), engine=engine, dtype=getattr(torch, dtype), resync=resync)


def network(folder: Path, device: str) -> SpikingModel:
    return load(folder).to(pick_device(device))


def evaluated(
    folder: Path, data: Samples, *, at: Sequence[int], max_steps: int, device: str
) -> tuple[list[list[Any]], Exactness]:
    """Rows of accuracy and agreement at some steps and at the end, and how exact the end is."""
    snn = network(folder, device)
    result = snn.run(data.inputs, max_steps=max_steps, return_trajectory=True)
    exact = compare(snn, data.inputs, result)
    with torch.no_grad():
        wanted = call(snn.qann, _cast(data.inputs, snn.dtype)).argmax(-1).cpu()

    def share(predicted: Tensor, against: Tensor) -> float:
        return 100 * float((predicted.cpu() == against).float().mean())

    rows: list[list[Any]] = [["QANN", None, share(wanted, data.labels), 100.0]]
    assert result.trajectory is not None
    for step in sorted({*(t for t in at if t < result.steps), result.steps}):
        predicted = result.trajectory[step - 1].argmax(-1)
        rows.append(["SNN", step, share(predicted, data.labels), share(predicted, wanted)])
    return rows, exact


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, dict):
        return {k: _cast(v, dtype) for k, v in inputs.items()}
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def priced(
    folder: Path, data: Samples, *, max_steps: int, delay: int, burst: int, device: str
) -> tuple[list[list[Any]], list[str]]:
    """Rows of cost, and what is to be said about them."""
    from spikezip.energy import measure

    snn = network(folder, device)
    snn.set_schedule(delay=delay)
    snn.set_burst(burst)
    report, result = measure(snn, data.inputs, max_steps=max_steps)
    rows = [["matrix products, uJ", *report.paper().values()], ["everything, uJ", *report.full().values()]]
    for what in ("weights", "state", "weight reads"):
        rows.append([f"{what}, bytes", *(figures[what] for figures in report.memory().values())])
    rows.append(["AC", None, None, report.total_ac // report.samples])
    rows.append(["MAC", *[report.total_ann_macs // report.samples] * 2, report.total_mac // report.samples])
    notes = [str(result.certificate)]
    if burst > 1 or delay:
        notes.append(f"not the paper's neuron: bursts of up to {burst}, each stage {delay} steps after the one before")
    notes.append(f"{100 * report.skippable:.0f} % of the tokens' rows in linear maps had no spike in a step")
    price = report.paper()
    if price["SNN"] > min(price["ANN fp32"], price["QANN int8"]):
        notes.append("the spiking network is not the cheapest here")
    return rows, notes


def scheduled(
    folder: Path, data: Samples, *, delays: Sequence[int], bursts: Sequence[int], max_steps: int, device: str
) -> list[list[Any]]:
    """Rows of every pair of delay and burst, in order of steps."""
    from spikezip.schedules import search

    found = search(network(folder, device), data.inputs, delays=delays, bursts=bursts, max_steps=max_steps)
    return [[s.delay, s.burst, s.steps, s.accumulations, s.best] for s in found]


def quantiser_map(folder: Path) -> list[list[Any]]:
    return [
        [name, f"[{q.lo}, {q.hi}]", q.s.numel(), float(q.s.detach().mean())]
        for name, q in quantizers(load_quantized(folder)).items()
    ]


def compared(folder: Path, data: Samples, *, engine: str, resync: bool, max_steps: int, device: str) -> Exactness:
    """A fresh conversion of the folder's QANN against the QANN."""
    snn = convert(load_quantized(folder), engine=engine, resync=resync).to(pick_device(device))
    return compare(snn, data.inputs, max_steps=max_steps)


def imported(
    checkpoint: Path, *, arch: str, levels: int | None, activation: str, architecture: Path | None, output: Path
) -> int:
    """An official checkpoint into a QANN folder; returns the number of quantisers."""
    import yaml

    sizes = None
    if architecture is not None:
        if not architecture.is_file():
            raise UserError(f"{architecture} does not exist", hint="pass a YAML file of sizes")
        sizes = yaml.safe_load(architecture.read_text(encoding="utf-8"))
        if not isinstance(sizes, dict):
            raise UserError(f"{architecture} holds no mapping of sizes")
    qann = load_official(checkpoint, arch=arch, levels=levels, activation=activation, architecture=sizes)
    save(qann, output)
    return len(quantizers(qann))


def exported(folder: Path, data: Samples, *, to: Path, format: str) -> None:
    from spikezip.export import export_nir, export_onnx

    if format not in ("onnx", "nir"):
        raise UserError(f"format is '{format}', expected onnx or nir")
    snn = load(folder)
    if format == "onnx":
        export_onnx(snn, to, inputs=data.inputs)
    else:
        export_nir(snn, to, input_shape=tuple(data.inputs.shape[1:]))


def neuron_bench(*, steps: int, neurons: int, backend: str, seed: int, device: str) -> dict[str, Any]:
    """Median times of our scan, spikingjelly's and a plain copy of the same data, and whether the spikes are the same."""
    from spikingjelly.activation_based.functional import stbif_multi_step
    from tenfold_shared.timing import compare as time_both

    from spikezip.functional import stbif_plus_multi_step

    place = pick_device(device)
    x_seq = torch.randn(steps, neurons, generator=torch.Generator().manual_seed(seed)).to(place)
    theta, half = torch.tensor(0.4, device=place), torch.full((neurons,), 0.5, device=place)
    zeros, bounds = torch.zeros_like(half), (torch.tensor(7.0, device=place), torch.tensor(-8.0, device=place))

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize()

    def ours() -> Tensor:
        spikes = stbif_plus_multi_step(x_seq, half, acc=zeros, theta=theta, lo=-8, hi=7, backend=backend)[0]
        wait()
        return spikes

    def theirs() -> Tensor:
        out = stbif_multi_step(x_seq, half, zeros, theta, *bounds)[0]
        wait()
        return out

    def copy() -> Tensor:
        out = x_seq.clone()
        wait()
        return out

    with torch.no_grad():
        same = torch.equal(ours() * theta, theirs())
        against, bandwidth = time_both(ours, theirs, repeats=5), time_both(ours, copy, repeats=5)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    return {
        "device": name,
        "backend": backend,
        "milliseconds": 1e3 * against.ours,
        "spikingjelly, milliseconds": 1e3 * against.peer,
        "times faster": against.ratio,
        "copy of the input, milliseconds": 1e3 * bandwidth.peer,
        "times a copy's time": 1 / bandwidth.ratio,
        "identical spikes": same,
    }
