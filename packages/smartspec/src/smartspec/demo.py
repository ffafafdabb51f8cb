"""What the controller does, in one picture: latency over request rate, and the chosen length while load rises and falls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tenfold_shared import figures
from tenfold_shared.cli import Table, write_summary
from tenfold_shared.errors import UserError

from smartspec.controller import GoodputController, Policy, paper_controller
from smartspec.cost import PiecewiseCostModel
from smartspec.policies import FixedLength, NoSpeculation
from smartspec.sim import Hardware, Workload, simulate

RATES = (4.0, 10.0, 16.0, 22.0, 28.0, 34.0)
WAVE = ((6.0, 3.0), (6.0, 12.0), (6.0, 34.0), (6.0, 34.0), (8.0, 10.0), (8.0, 2.0))


def run(output: Path, seed: int, *, requests: int = 250, progress: Callable[[int, int], None] | None = None) -> Table:
    """Simulate, draw `output`/smartspec.png and .svg, write `output`/summary.json, and return the table.

    requests: in each run of the left picture. Raises UserError when matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the demo draws with matplotlib, which is not installed", hint="pip install 'smartspec[plot]'"
        ) from error
    hardware = Hardware.preset("a100-7b-160m")
    cost = PiecewiseCostModel.fit(hardware.profile(seed))
    policies: dict[str, Callable[[], Policy]] = {
        "no speculation": NoSpeculation,
        "fixed k = 1": lambda: FixedLength(1),
        "fixed k = 3": lambda: FixedLength(3),
        "fixed k = 5": lambda: FixedLength(5),
        "published rule": lambda: paper_controller(cost),
        "SmartSpec": lambda: GoodputController(cost),
    }
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    lengths: list[float] = []
    for i, rate in enumerate(RATES):
        for j, (name, make) in enumerate(policies.items()):
            report = simulate(make(), hardware, Workload(rate, requests, 0.7), seed)
            seconds[name].append(report.mean_latency / 1000)
            if name == "SmartSpec":
                lengths.append(report.mean_draft_len)
            if progress is not None:
                progress(i * len(policies) + j + 1, len(RATES) * len(policies) + 1)
    wave = simulate(GoodputController(cost), hardware, Workload(WAVE, 560, 0.7), seed)
    _draw(output, seconds, wave.trace)
    columns = ["requests per second", *(f"{name}, s" for name in policies), "mean k of SmartSpec"]
    rows = [[rate, *(seconds[n][i] for n in policies), lengths[i]] for i, rate in enumerate(RATES)]
    table = Table(
        "Mean request latency in seconds, A100 with a 7B target and a 160M draft, acceptance 0.7 (simulated)",
        columns,
        rows,
    )
    note = "Simulated hardware: a roofline with 3 % noise. The controller sees a noisy profile and the outcomes, nothing else."
    caption = (
        "Left: latency against load. Right: the length chosen while load rises and falls, and the batch that causes it."
    )
    write_summary(output, "smartspec", table, [("smartspec.png", caption)], [note])
    return table


def _draw(output: Path, seconds: dict[str, list[float]], trace: np.ndarray) -> None:
    with figures.style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.2), width_ratios=(1, 1.15))
        for i, (name, values) in enumerate(seconds.items()):
            ours = name == "SmartSpec"
            color = figures.OURS if ours else figures.PEERS[i]
            left.plot(
                RATES,
                values,
                marker="o",
                ms=4,
                color=color,
                lw=2.4 if ours else 1.5,
                label=name,
                zorder=3 if ours else 2,
            )
        left.set(
            xlabel="requests per second", ylabel="mean latency in seconds", yscale="log", title="Latency against load"
        )
        left.set(ylim=(0.8, 6))
        left.set_yticks([1, 2, 3, 5], ["1", "2", "3", "5"])
        left.minorticks_off()
        left.legend(fontsize=8)
        time, batch, k = trace[:, 0] / 1000, trace[:, 1], trace[:, 2]
        # With one or two requests running the length follows each of them; seconds show what load does.
        second = np.floor(time).astype(int)
        shown = np.unique(second[batch > 0])
        mean = [k[(second == s) & (batch > 0)].mean() for s in shown]
        right.fill_between(time, batch, color=figures.PEERS[0], alpha=0.25, lw=0)
        right.set(
            xlabel="seconds",
            ylabel="requests in the batch (area)",
            ylim=(0, None),
            title="Load rises and falls, the length follows",
        )
        twin = right.twinx()
        twin.spines["right"].set_visible(True)
        twin.grid(False)
        twin.plot(shown + 0.5, mean, color=figures.OURS, lw=2.2, marker="o", ms=3)
        twin.set(ylabel="chosen length k, mean of a second (line)", ylim=(0, 8))
        figures.save(figure, output / "smartspec")
