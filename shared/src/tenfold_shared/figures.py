"""One look for every picture: a style, the colours of ours and of the peers, and a save that writes PNG and SVG."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS = "#c1432e"
PEERS = ("#35608d", "#6a9a4b", "#b8893b", "#7b6aa8", "#4f9c9c", "#a65a78", "#7a7a7a")
"""Colour-blind-safe apart in lightness; use them in order, `OURS` for our own method only."""

STYLE = {
    "figure.dpi": 110, "savefig.dpi": 150, "figure.constrained_layout.use": True, "svg.hashsalt": "tenfold",
    "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "image.cmap": "viridis",
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.7,
}  # fmt: skip


@contextmanager
def style() -> Iterator[Any]:
    """`with style() as plt:` gives pyplot with the house style, on a backend that needs no screen."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from cycler import cycler
    from matplotlib import pyplot

    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycler(color=PEERS)}):
        yield pyplot


def save(figure: Any, path: str | Path) -> Path:
    """Write `figure` as PNG and SVG beside each other, close it, and return the PNG's path.

    path: where to, with or without a suffix; folders are made.
    """
    from matplotlib import pyplot

    from tenfold_shared.hub import replace_atomically

    path = Path(path)
    if path.suffix in (".png", ".svg"):
        path = path.with_suffix("")
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        with replace_atomically(path.with_name(path.name + suffix)) as partial:
            figure.savefig(partial, metadata=metadata)
    pyplot.close(figure)
    return path.with_name(path.name + ".png")
