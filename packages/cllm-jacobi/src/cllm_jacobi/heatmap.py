"""Pictures of trajectories: which positions of a block are confirmed after which pass."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cllm_jacobi.metrics import confirmed_map


def confirmed_share(blocks: Sequence[Sequence[Sequence[int]]]) -> NDArray[Any]:
    """(passes + 1, n) share of blocks in which a position is confirmed after so many passes; short blocks count where they are."""
    n = max(len(states[-1]) for states in blocks)
    rows = max(len(states) for states in blocks)
    hits, seen = np.zeros((rows, n)), np.zeros((rows, n))
    for states in blocks:
        found = np.array(confirmed_map(states), dtype=float)
        # A fixed point stays.
        found = np.vstack([found, np.ones((rows - len(found), found.shape[1]))])
        hits[:, : found.shape[1]] += found
        seen[:, : found.shape[1]] += 1
    return hits / np.maximum(seen, 1)


def draw_confirmed(groups: Mapping[str, Sequence[Sequence[Sequence[int]]]], path: str | Path) -> Path:
    """Heat maps beside each other, one for each name's blocks; writes PNG and SVG and returns the PNG's path."""
    from tenfold_shared import figures

    maps = {name: confirmed_share(blocks) for name, blocks in groups.items()}
    passes = max(len(m) for m in maps.values())
    with figures.style() as plt:
        figure, axes = plt.subplots(1, len(maps), figsize=(4.6 * len(maps) + 0.8, 4.0), squeeze=False)
        for axis, (name, share) in zip(axes[0], maps.items(), strict=True):
            share = np.vstack([share, np.ones((passes - len(share), share.shape[1]))])
            image = axis.imshow(
                share,
                vmin=0,
                vmax=1,
                aspect="auto",
                origin="upper",
                extent=(0.5, share.shape[1] + 0.5, passes - 0.5, -0.5),
            )
            axis.set(title=name, xlabel="position in the block", ylabel="passes done")
            axis.grid(False)
        figure.colorbar(image, ax=axes[0].tolist(), label="share of blocks with the position confirmed")
        return figures.save(figure, path)
