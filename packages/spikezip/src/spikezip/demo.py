"""The main job on the testbed: train a digits ViT, quantise, convert, and see it settle on the quantised network's logits."""

from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from tenfold_shared.cli import Table, console, write_summary

from spikezip import testbed


def run(output: Path, *, seed: int = 0, levels: int = 16, epochs: int = 20, fine_tuning: int = 4) -> Table:
    """Train, quantise, fine-tune, convert and compare; writes `accuracy.png`, `raster.png`, `summary.json` into output."""
    from spikezip import QATTrainer, QuantConfig, calibrate, compare, convert, quantize
    from spikezip.energy import measure

    # Matrices this small gain nothing from more threads, and lose much when the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    data, ann = testbed.digits(seed), testbed.digits_vit(seed)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("training the ANN", total=epochs)
        testbed.train(
            ann, data.loader(seed=seed), epochs=epochs, augment=testbed.roll, seed=seed,
            report=lambda epoch: progress.update(bar, completed=epoch),
        )  # fmt: skip
        bar = progress.add_task(f"fine-tuning at {levels} levels", total=None)
        qann = quantize(ann, QuantConfig(levels=levels))
        calibrate(qann, [data.train[:512]], method="mse")
        calibrated = testbed.accuracy(qann, data.test, data.test_labels)
        trainer = QATTrainer(qann, ann, loss="kl", augment=testbed.roll, seed=seed, device="cpu")
        trainer.fit(data.loader(seed=seed), fine_tuning)
        progress.remove_task(bar)
        bar = progress.add_task("running the spiking network", total=None)
        snn = convert(qann)
        images = data.test[:180]
        snn.clock.keep_trains = "blocks.1.mlp.act.0"
        report, result = measure(snn, images, max_steps=200, return_trajectory=True)
        exact = compare(snn, images, result)
    assert result.trajectory is not None
    curve = [float((step.argmax(-1) == data.test_labels[:180]).float().mean()) for step in result.trajectory]
    labels = data.test_labels[:180]
    scores = {
        "ANN": testbed.accuracy(ann, images, labels),
        "calibrated only": calibrated,
        "QANN": testbed.accuracy(qann, images, labels),
        "SNN": curve[-1],
    }
    price = report.paper()
    train = snn.model.get_submodule("blocks.1.mlp.act.0").calls[0].train
    _accuracy_figure(output, curve, scores, levels)
    _raster_figure(output, train)
    torch.set_num_threads(threads)
    rows: list[list[Any]] = [
        ["ANN, fp32", 100 * scores["ANN"], None, price["ANN fp32"], None],
        [f"QANN, {levels} levels, int8", 100 * scores["QANN"], None, price["QANN int8"], None],
        ["SNN at equilibrium", 100 * scores["SNN"], result.steps, price["SNN"], result.spikes.total // len(images)],
    ]
    for t in (4, 8, 12):
        if t < len(curve):
            rows.append([f"SNN after {t} steps", 100 * curve[t - 1], t, None, None])
    columns = ["network", "accuracy, %", "steps", "energy, uJ an image (matrix products)", "spikes an image"]
    table = Table(f"Digits ViT, {len(images)} test images", columns, rows)
    notes = [f"Exactness: {exact}."]
    if price["SNN"] > price["QANN int8"]:
        notes.append("At this size the quantised network in int8 arithmetic is cheaper than the spiking one.")
    write_summary(
        output, "spikezip", table,
        [("accuracy.png", "Accuracy against time-steps"), ("raster.png", "Spikes of the second block's MLP, one image")],
        notes,
    )  # fmt: skip
    console.print(f"exactness: {exact}", soft_wrap=True)
    return table


def _accuracy_figure(output: Path, curve: list[float], scores: dict[str, float], levels: int) -> None:
    from tenfold_shared.figures import OURS, PEERS, save, style

    with style() as plt:
        figure, axis = plt.subplots(figsize=(6.4, 3.8))
        axis.plot(range(1, len(curve) + 1), [100 * a for a in curve], color=OURS, lw=2, label="SNN")
        axis.axhline(100 * scores["ANN"], color=PEERS[0], ls=":", label="ANN")
        axis.axhline(100 * scores["QANN"], color=PEERS[2], ls="--", label=f"QANN, {levels} levels")
        axis.set(xlabel="time-steps", ylabel="accuracy, %", title="The spiking network settles on the quantised one")
        axis.set_ylim(0, 102)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="lower right")
        save(figure, output / "accuracy")


def _raster_figure(output: Path, train: list[torch.Tensor]) -> None:
    """Spikes of one image's class token: upward in red, taken back in blue."""
    from tenfold_shared.figures import OURS, PEERS, save, style

    spikes = torch.stack(train)[:, 0, 0]
    with style() as plt:
        figure, axis = plt.subplots(figsize=(6.4, 4.4))
        for sign, colour, name in ((1, OURS, "+1"), (-1, PEERS[0], "-1, taking one back")):
            t, neuron = (spikes == sign).nonzero(as_tuple=True)
            axis.scatter(t + 1, neuron, s=9, marker="s", color=colour, label=name, linewidths=0)
        axis.set(
            xlabel="time-step",
            ylabel="neuron of the class token",
            title="Spikes before the MLP's ReLU, block 2, one image",
        )
        axis.set_xlim(0, len(train) + 1)
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", ncols=2, markerscale=2)
        save(figure, output / "raster")
