import itertools

import numpy as np
import pytest
from smartspec import TokenTree, best_tree, expected_length, expected_tree_length
from tenfold_shared.errors import UserError

BETA = np.array([[0.6, 0.2, 0.1], [0.5, 0.3, 0.1], [0.4, 0.2, 0.0]])


def test_one_rank_is_a_chain():
    tree, products = best_tree(np.full((4, 1), 0.7), 4)
    assert tree == TokenTree.chain(4)
    assert 1 + products.sum() == pytest.approx(expected_length(0.7, 4))


@pytest.mark.parametrize("n", range(1, 13))
def test_the_best_nodes_are_closed_under_ancestors_and_nested(n):
    tree, products = best_tree(BETA, n)
    assert (np.diff(products) <= 1e-12).all()
    assert tree == best_tree(BETA, 13)[0].first(n)
    paths = [[BETA[j, r] for j, r in enumerate(path)] for path in tree.paths]
    assert 1 + products.sum() == pytest.approx(expected_tree_length(paths))


def test_the_best_tree_beats_every_other_of_its_size():
    beta = BETA[:2, :2]
    everything = [p for n in (1, 2) for p in itertools.product(range(2), repeat=n)]
    for size in range(1, 6):
        best = best_tree(beta, size)[1].sum()
        for some in itertools.combinations(everything, size):
            if all(len(p) == 1 or p[:1] in some for p in some):
                assert best >= sum(np.prod([beta[j, r] for j, r in enumerate(p)]) for p in some) - 1e-12


def test_ancestors_parents_depths():
    tree = TokenTree(((0,), (1,), (0, 0), (0, 0, 1)))
    assert tree.parents.tolist() == [-1, -1, 0, 2] and tree.depths.tolist() == [1, 1, 2, 3]
    assert tree.ancestors()[3].tolist() == [True, False, True, True]


def test_bad_trees():
    with pytest.raises(UserError, match="parent"):
        TokenTree(((0, 0), (0,)))
    with pytest.raises(UserError, match="asked for"):
        best_tree([[0.5, 0.5]], 3)
    with pytest.raises(UserError, match="probabilities"):
        best_tree([[0.9, 0.5]], 1)
    with pytest.raises(UserError, match="probabilities"):
        best_tree([[float("nan")]], 1)
