import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from smartspec.sampling import Sampling, verify_greedy, verify_sampling, verify_tree
from smartspec.tree import TokenTree
from tenfold_shared.errors import UserError

V, DRAWS = 5, 200_000


def rows(seed, *shape):
    torch.manual_seed(seed)
    return torch.randn(*shape, V).mul(1.2).softmax(-1)


def language(seed):
    """p(next | last two tokens) over V tokens, as a (V, V, V) table."""
    return rows(seed, V, V)


def p_value(pairs, p, first, second):
    """Chi-squared of the first two tokens against the target's own distribution."""
    expected = (p[first, second][:, None] * p[second]).flatten().double().numpy() * len(pairs)
    seen = torch.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V).numpy()
    assert expected.min() > 5
    return chisquare(seen, expected * seen.sum() / expected.sum()).pvalue


def then(p, second, kept, draft, last, generator):
    """First two tokens of the output: what was kept, the final token, and one more from the target where that is short."""
    first = torch.where(kept > 0, draft[:, 0], last)
    after = torch.multinomial(p[second, first], 1, generator=generator)[:, 0]
    late = draft[:, 1] if draft.shape[1] > 1 else last
    return torch.stack([first, torch.where(kept > 1, late, torch.where(kept == 1, last, after))], 1)


def chain(seed, q_table, lens=None, trim=None, k=2):
    g = torch.Generator().manual_seed(seed)
    p, a, b = language(1), 0, 1
    draft = torch.zeros(DRAWS, k, dtype=torch.long)
    q = torch.zeros(DRAWS, k, V)
    target = torch.zeros(DRAWS, k + 1, V)
    before, last = torch.full((DRAWS,), a), torch.full((DRAWS,), b)
    for j in range(k):
        target[:, j] = p[before, last]
        q[:, j] = q_table[before, last]
        draft[:, j] = torch.multinomial(q[:, j], 1, generator=g)[:, 0]
        before, last = last, draft[:, j]
    target[:, k] = p[before, last]
    lens = torch.full((DRAWS,), k) if lens is None else lens
    if trim is not None:
        lens = trim(q, draft, g)
    kept, final = verify_sampling(target, draft, lens, q, generator=g)
    return p_value(then(p, b, kept, draft, final, g), p, a, b)


def test_a_chain_keeps_the_targets_distribution():
    assert chain(0, language(2)) > 1e-3


def test_trimming_by_chance_or_by_the_drafts_own_certainty_is_lossless():
    assert chain(1, language(2), trim=lambda q, draft, g: torch.randint(0, 3, (DRAWS,), generator=g)) > 1e-3
    certain = lambda q, draft, g: (q.max(-1).values > 0.45).long().cumprod(1).sum(1)  # noqa: E731
    assert chain(2, language(2), trim=certain) > 1e-3


def test_trimmed_by_the_drawn_token_is_not_lossless():
    """The negative control: keeping only drafts whose own drawn token was likely shifts the output."""
    drawn = lambda q, draft, g: (q.gather(2, draft[..., None])[..., 0] > 0.3).long().cumprod(1).sum(1)  # noqa: E731
    assert chain(3, language(2), trim=drawn) < 1e-6


def test_prompt_lookup_proposals_keep_the_distribution():
    g = torch.Generator().manual_seed(5)
    p, a, b = language(1), 0, 1
    draft = torch.tensor([[3, 2]]).repeat(DRAWS, 1)
    target = torch.stack([p[a, b], p[b, 3], p[3, 2]]).repeat(DRAWS, 1, 1)
    kept, last = verify_sampling(target, draft, torch.full((DRAWS,), 2), generator=g)
    assert p_value(then(p, b, kept, draft, last, g), p, a, b) > 1e-3


TREE = TokenTree(((0,), (1,), (0, 0), (0, 1), (1, 0)))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_tree_keeps_the_distribution(sampled):
    g = torch.Generator().manual_seed(6)
    p, table, a, b = language(1), language(3), 0, 1
    parents = TREE.parents.tolist()
    q = None
    if sampled:
        tokens = torch.zeros(DRAWS, 5, dtype=torch.long)
        q = torch.zeros(DRAWS, 6, V)
        q[:, 0] = table[a, b]
        for i, parent in enumerate(parents):
            tokens[:, i] = torch.multinomial(q[:, parent + 1], 1, generator=g)[:, 0]
            above = torch.full((DRAWS,), b) if parent < 0 else tokens[:, parent]
            q[:, i + 1] = table[above, tokens[:, i]]
    else:
        tokens = torch.tensor([[2, 4, 0, 3, 1]]).repeat(DRAWS, 1)
    target = torch.zeros(DRAWS, 6, V)
    target[:, 0] = p[a, b]
    for i, parent in enumerate(parents):
        above = torch.full((DRAWS,), b) if parent < 0 else tokens[:, parent]
        target[:, i + 1] = p[above, tokens[:, i]]
    path, last = verify_tree(target, tokens, TREE, q, generator=g)
    kept = (path >= 0).sum(1)
    draft = torch.where(path >= 0, tokens.gather(1, path.clamp(min=0)), 0)
    assert {0, 1, 2} == set(kept.tolist())
    assert p_value(then(p, b, kept, draft, last, g), p, a, b) > 1e-3


def test_greedy_is_sampling_from_one_point():
    torch.manual_seed(0)
    logits, draft = torch.randn(64, 4, V), torch.randint(0, V, (64, 3))
    draft[:32] = logits[:32, :3].argmax(-1)
    lens = torch.randint(0, 4, (64,))
    greedy = verify_greedy(logits, draft, lens)
    p = torch.nn.functional.one_hot(logits.argmax(-1), V).float()
    for mine, theirs in zip(greedy, verify_sampling(p, draft, lens), strict=True):
        assert torch.equal(mine, theirs)
    kept, _ = greedy
    assert (kept[:32] == lens[:32]).all() and (kept <= lens).all()


def test_a_chain_is_a_tree_of_one_rank():
    torch.manual_seed(0)
    p = torch.nn.functional.one_hot(torch.randint(0, V, (64, 4)), V).float()
    draft = torch.randint(0, V, (64, 3))
    draft[:40] = p[:40, :3].argmax(-1)
    kept, last = verify_sampling(p, draft, torch.full((64,), 3))
    path, end = verify_tree(p, draft, TokenTree.chain(3))
    assert torch.equal((path >= 0).sum(1), kept) and torch.equal(end, last)


def test_equal_models_accept_everything():
    p = rows(0, 100, 4)
    draft = torch.multinomial(p[:, :3].reshape(-1, V), 1).reshape(100, 3)
    kept, _ = verify_sampling(p, draft, torch.full((100,), 3), p[:, :3])
    assert (kept == 3).all()


def test_nothing_drafted_is_plain_sampling():
    p = rows(0, 8, 1)
    kept, last = verify_sampling(p, torch.zeros(8, 0, dtype=torch.long), torch.zeros(8, dtype=torch.long))
    assert (kept == 0).all() and last.shape == (8,)


def test_processors_are_those_of_generate():
    torch.manual_seed(0)
    logits = torch.randn(1, 30)
    p = Sampling(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3).probabilities(logits, [[3, 7]])[0]
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(5),
            TopPLogitsWarper(0.9),
        ]
    )
    wanted = chain(torch.tensor([[3, 7]]), logits)[0].softmax(-1)
    assert torch.allclose(p, wanted) and 1 <= int((p > 0).sum()) <= 5
    assert np.flatnonzero(Sampling().probabilities(logits, [[]])[0]).tolist() == [int(logits.argmax())]


@pytest.mark.parametrize("bad", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}])
def test_bad_sampling(bad):
    with pytest.raises(UserError, match="out of range"):
        Sampling(**bad)
