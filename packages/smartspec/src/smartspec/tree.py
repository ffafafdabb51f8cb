"""Trees of drafted tokens: several guesses a level, of which the target takes at most one path.

A node at level j with rank r has the conditional acceptance beta[j][r], "the guess of rank r is the one taken, given its
parent was". Its path product is the probability that it is reached, so nodes in the order of path products always form a
tree, and the best tree of n nodes is the first n of them (2406.14066, tree-style verification).
"""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tenfold_shared.errors import UserError


@dataclass(frozen=True)
class TokenTree:
    """Nodes below the last accepted token, parents before children.

    paths: for each node the ranks on its way from the root; (0,), (0, 0), ... is a chain.

    Raises UserError when a node is there twice or its parent is missing or comes later.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        seen: set[tuple[int, ...]] = {()}
        for path in self.paths:
            if not path or path in seen or path[:-1] not in seen:
                raise UserError(f"node {path} of the tree is empty, doubled, or before its parent")
            seen.add(path)

    @staticmethod
    def chain(length: int) -> "TokenTree":
        """A tree of one path."""
        return TokenTree(tuple((0,) * (j + 1) for j in range(length)))

    @property
    def parents(self) -> NDArray[Any]:
        """(nodes,) index of each node's parent, -1 for the root."""
        index = {(): -1, **{path: i for i, path in enumerate(self.paths)}}
        return np.array([index[path[:-1]] for path in self.paths], dtype=int)

    @property
    def depths(self) -> NDArray[Any]:
        """(nodes,) level of each node, 1 for a child of the root."""
        return np.array([len(path) for path in self.paths], dtype=int)

    def ancestors(self) -> NDArray[Any]:
        """(nodes, nodes) True where the column's node is the row's node or one of its ancestors."""
        mask: NDArray[Any] = np.eye(len(self.paths), dtype=bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                mask[i] |= mask[parent]
        return mask

    def first(self, n: int) -> "TokenTree":
        """The tree of the first n nodes."""
        return TokenTree(self.paths[:n])


def best_tree(acceptance: ArrayLike, nodes: int) -> tuple[TokenTree, NDArray[Any]]:
    """The tree of `nodes` nodes with the largest expected length, and the (nodes,) path products, largest first.

    acceptance: (levels, ranks) conditional acceptance beta[j][r], each row summing to at most 1.

    Raises UserError for values that are no probabilities, or fewer possible nodes than wanted.
    """
    beta = np.asarray(acceptance, dtype=float)
    if beta.ndim != 2 or not ((beta >= 0) & (beta <= 1)).all() or (beta.sum(axis=1) > 1 + 1e-9).any():
        raise UserError("tree acceptance is not a (levels, ranks) array of probabilities with rows up to 1")
    levels, ranks = beta.shape
    # Equal products keep parents first because a shorter path sorts first.
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-float(beta[0, r]), 1, (r,)) for r in range(ranks)]
    heapq.heapify(heap)
    paths: list[tuple[int, ...]] = []
    products: list[float] = []
    while heap and len(paths) < nodes:
        negative, depth, path = heapq.heappop(heap)
        paths.append(path)
        products.append(-float(negative))
        if depth < levels:
            for r in range(ranks):
                heapq.heappush(heap, (negative * float(beta[depth, r]), depth + 1, (*path, r)))
    if len(paths) < nodes:
        raise UserError(f"a tree of {levels} levels and {ranks} ranks has {len(paths)} nodes, {nodes} were asked for")
    return TokenTree(tuple(paths)), np.array(products)
