"""Text coloured by the number of true experts each token got, as HTML and as a picture."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold_shared import figures

COLOURS = ("#e9e9e9", "#a9c7e0", "#f0b37e", "#c1432e")
"""0, 1, 2 and 3 or more true experts."""


def colour(load: float) -> str:
    """The colour of a load, by its nearest whole number."""
    return COLOURS[min(len(COLOURS) - 1, max(0, round(load)))]


def to_html(tokens: Sequence[Sequence[str]], loads: Sequence[Sequence[float]], title: str) -> str:
    """A page with one line per sequence. tokens, loads: (B, S), loads as means over the layers."""
    lines = []
    for row, values in zip(tokens, loads, strict=True):
        spans = (
            f'<span style="background:{colour(load)}" title="{load:.2f}">{html.escape(token)}</span>'
            for token, load in zip(row, values, strict=True)
        )
        lines.append(f"<p>{' '.join(spans)}</p>")
    legend = " ".join(f'<span style="background:{c}">{i}</span>' for i, c in enumerate(COLOURS))
    style = (
        "body{font:15px/1.9 monospace;max-width:1000px;margin:2rem auto}span{padding:.15rem .3rem;border-radius:3px}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
        f"<h1>{html.escape(title)}</h1><p>true experts: {legend} (3 or more)</p>{''.join(lines)}</html>\n"
    )


def to_figure(
    tokens: Sequence[Sequence[str]], loads: Any, path: str | Path, *, titles: Sequence[str], per_line: int = 32
) -> Path:
    """A picture of short sequences, one panel per layer. loads: (L, B, S). titles: one per panel."""
    with figures.style() as plt:
        lines = sum(-(-len(row) // per_line) for row in tokens)
        figure, axes = plt.subplots(len(loads), 1, figsize=(11, 0.5 + len(loads) * (0.6 + 0.34 * lines)), squeeze=False)
        for axis, layer, title in zip(axes[:, 0], loads, titles, strict=True):
            y = 0
            for row, values in zip(tokens, layer, strict=True):
                for start in range(0, len(row), per_line):
                    for x, i in enumerate(range(start, min(start + per_line, len(row)))):
                        axis.add_patch(plt.Rectangle((x, y), 0.94, 0.86, color=colour(float(values[i])), linewidth=0))
                        axis.text(
                            x + 0.47, y + 0.46, row[i], ha="center", va="center", fontsize=8.5, family="monospace"
                        )
                    y += 1
            axis.set(xlim=(0, per_line), ylim=(y, 0), title=title)
            axis.set_axis_off()
        handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS]
        figure.legend(handles, ["0", "1", "2", "3"], title="true experts", loc="outside lower center", ncols=4)
        return figures.save(figure, path)
