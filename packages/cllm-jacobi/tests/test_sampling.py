"""Sampling: exact token by token with Gumbel noise, exact in distribution with speculative acceptance."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from cllm_jacobi import jacobi_generate, sampling
from scipy.stats import chisquare

DRAWS = 20_000


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """(5, 5) next-token distributions of a toy language: the next token depends on the last one."""
    return torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).mul(1.2).softmax(-1).double()


def decode(table: torch.Tensor, generator: torch.Generator, judge: Any) -> tuple[int, ...]:
    """Speculative Jacobi of three tokens after token 0, with the bookkeeping of the loop: refused tails are redrawn."""
    out: list[int] = []
    draft: list[int] = torch.randint(5, (3,), generator=generator).tolist()
    proposals: list[torch.Tensor | None] = [None] * 3
    while len(out) < 3:
        draft, proposals = draft[: 2 - len(out)], proposals[: 2 - len(out)]
        p = table[[[0, *out][-1], *draft]]
        tokens, kept = judge(draft, proposals, p, generator)
        out += tokens
        proposals = list(p[kept + 1 :])
        draft = [sampling.draw(q, generator) for q in proposals]
    return tuple(out)


def keep_without_test(draft, proposals, p, generator):
    """The broken variant: the first draft is believed."""
    if not draft:
        return sampling.speculate(draft, proposals, p, generator)
    tokens, kept = sampling.speculate(draft[1:], proposals[1:], p[1:], generator)
    return [draft[0], *tokens], kept + 1


def p_value(table: torch.Tensor, judge: Any) -> float:
    generator = torch.Generator().manual_seed(1)
    seen = Counter(decode(table, generator, judge) for _ in range(DRAWS))
    cells = list(itertools.product(range(5), repeat=3))
    expected = [float(table[0, a] * table[a, b] * table[b, c]) * DRAWS for a, b, c in cells]
    # Rare cells are pooled, as the test asks for about five of each.
    big = [i for i, e in enumerate(expected) if e >= 5]
    counts = [seen[cells[i]] for i in big]
    wanted = [expected[i] for i in big]
    if DRAWS - sum(wanted) > 1e-6:
        counts, wanted = [*counts, DRAWS - sum(counts)], [*wanted, DRAWS - sum(wanted)]
    return float(chisquare(counts, wanted).pvalue)


def test_speculative_acceptance_is_lossless(table):
    assert p_value(table, sampling.speculate) > 0.001


def test_keeping_a_draft_without_the_test_is_not(table):
    assert p_value(table, keep_without_test) < 1e-6


@pytest.mark.parametrize("guess", range(5))
def test_a_fixed_guess_does_not_move_the_distribution(table, guess):
    """Whichever it is; over guesses drawn at random a wrong residual would average out."""
    generator = torch.Generator().manual_seed(guess)
    drawn = [sampling.speculate([guess], [None], table[[0, guess]], generator)[0][0] for _ in range(3000)]
    assert chisquare(torch.tensor(drawn).bincount(minlength=5).numpy(), (table[0] * 3000).numpy()).pvalue > 0.001


def test_equal_distributions_always_accept(table):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        draft = [sampling.draw(table[0], generator)]
        assert sampling.speculate(draft, [table[0]], table[[0, draft[0]]], generator)[1] == 1


def chain_model(table: torch.Tensor) -> Any:
    """A GPT-2 whose next token depends on the last token as `table` says: no attention, no MLP, a lookup."""
    import transformers as t

    model = t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=5, n_positions=16, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # Rows of an orthogonal basis with mean zero survive the layer norm up to a factor.
        basis = torch.linalg.qr(
            torch.cat([torch.ones(8, 1), torch.randn(8, 7, generator=torch.Generator().manual_seed(2))], 1)
        )[0]
        codes = basis[:, 1:6].T
        model.transformer.wte.weight.copy_(codes)
        model.transformer.ln_f.weight.fill_(1.0)
        seen = torch.nn.functional.layer_norm(codes, (8,))
        model.lm_head.weight.copy_((torch.linalg.pinv(seen) @ table.log().float()).T)
    return model


def test_the_whole_loop_is_lossless(table):
    """20,000 rows of the real loop, batch and all, against the enumerated joint distribution."""
    model = chain_model(table)
    ids = torch.zeros(2000, 1, dtype=torch.long)
    probabilities = model(torch.arange(5)[:, None]).logits[:, 0].softmax(-1).detach().double()
    assert torch.allclose(probabilities, table, atol=1e-5)
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(DRAWS // 2000):
        out = jacobi_generate(
            model, ids, max_new_tokens=3, do_sample=True, top_k=0, sampling="speculative", block_size=3, seed=seed, attention_mask=torch.ones_like(ids)
        )  # fmt: skip
        seen.update(tuple(row) for row in out[:, 1:].tolist())
    cells = list(itertools.product(range(5), repeat=3))
    expected = [float(table[0, a] * table[a, b] * table[b, c]) * DRAWS for a, b, c in cells]
    big = [i for i, e in enumerate(expected) if e >= 5]
    counts, wanted = [seen[cells[i]] for i in big], [expected[i] for i in big]
    counts, wanted = [*counts, DRAWS - sum(counts)], [*wanted, DRAWS - sum(wanted)]
    assert chisquare(counts, wanted).pvalue > 0.001


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gumbel_is_the_autoregressive_loop_with_the_same_noise(tiny, batch, name):
    """Token for token over twenty seeds, against a loop written out here, and independent of block size and window."""
    model = tiny(name)
    ids = batch["input_ids"][:1]
    wanted = {"do_sample": True, "temperature": 1.3, "top_k": 20, "max_new_tokens": 12}
    distinct = set()
    for seed in range(20):
        noise = sampling.GumbelNoise(seed, 0, 61)
        expected, tokens = [], ids
        for position in range(12):
            logits = model(tokens).logits[0, -1].float() / 1.3
            logits[logits < logits.topk(20).values[-1]] = -torch.inf
            expected.append(int((logits + noise.rows(position, 1)[0]).argmax()))
            tokens = torch.cat([tokens, torch.tensor([[expected[-1]]])], 1)
            if expected[-1] == 1:
                break
        for settings in ({"block_size": 1}, {"block_size": 8}, {"block_size": 5, "window": "block"}):
            ours = jacobi_generate(model, ids, attention_mask=torch.ones_like(ids), seed=seed, **wanted, **settings)
            assert ours[0, 9:].tolist() == expected, (seed, settings)
        distinct.add(tuple(expected))
    assert len(distinct) > 10


def test_rows_of_a_batch_have_noise_of_their_own(tiny, batch):
    """Equal prompts are sampled independently; row 0 of a batch is the prompt alone."""
    ids = batch["input_ids"][:1].repeat(4, 1)
    wanted = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "block_size": 4, "seed": 2}
    for sampled in ("gumbel", "speculative"):
        rows = jacobi_generate(tiny("llama"), ids, attention_mask=torch.ones_like(ids), sampling=sampled, **wanted)
        assert len({tuple(row) for row in rows.tolist()}) == 4
    alone = jacobi_generate(tiny("llama"), ids[:1], attention_mask=torch.ones_like(ids[:1]), **wanted)
    first = jacobi_generate(tiny("llama"), ids, attention_mask=torch.ones_like(ids), **wanted)[0]
    assert first[: alone.shape[1]].tolist() == alone[0].tolist()


def test_gumbel_noise_samples_the_distribution(table):
    noise = [sampling.GumbelNoise(s, 0, 5).rows(0, 1)[0] for s in range(4000)]
    counts = torch.bincount(torch.stack([(table[0].log() + n).argmax() for n in noise]), minlength=5)
    assert chisquare(counts.numpy(), (table[0] * 4000).numpy()).pvalue > 0.001


def test_the_draft_does_not_move_the_sample(tiny, batch):
    outs = {
        str(
            jacobi_generate(
                tiny("llama"), **batch, do_sample=True, max_new_tokens=10, seed=4, init=init, block_size=6
            ).tolist()
        )
        for init in ("prompt", "random", "repeat", "ngram")
    }
    assert len(outs) == 1
