"""The language, its models, the demo, and the routers for comparison."""

import json

import pytest
import torch
from adamoe import AdaMoEConfig, convert, record_load, revert, routers
from adamoe.errors import ConfigError, ConversionError
from adamoe.routing import expert_load, route
from adamoe.testbed import (
    KINDS,
    OPERATORS,
    VALUES,
    Language,
    fine_tune,
    make_model,
    make_tokenizer,
    score,
    symbols,
    train,
)
from tiny_mixtures import converted


def test_the_language_says_what_it_labels():
    language = Language.make(0)
    tokens, kinds = language.batch(20, 64, torch.Generator().manual_seed(0))
    seen = dict.fromkeys(KINDS, 0)
    for row, labels in zip(tokens.tolist(), kinds.tolist(), strict=True):
        for i in range(63):
            here, following = row[i], row[i + 1]
            if labels[i] == 1:
                assert following - VALUES == int(language.successor[here - VALUES])
            if labels[i] == 2:
                operator, a = row[i - 2] - 2 * VALUES, row[i - 1]
                assert following == int(language.tables[operator, a, here])
            if labels[i] >= 0:
                seen[KINDS[labels[i]]] += 1
    assert all(count > 100 for count in seen.values())
    order = language.successor[torch.arange(VALUES)]
    assert sorted(order.tolist()) == list(range(VALUES)) and (order != torch.arange(VALUES)).all()
    other = language.changed(0)
    half = OPERATORS // 2
    assert torch.equal(other.tables[:half], language.tables[:half]) and not torch.equal(other.tables, language.tables)


def test_the_tokenizer_reads_what_the_language_writes():
    tokenizer = make_tokenizer()
    tokens, _ = Language.make(1).batch(1, 16, torch.Generator().manual_seed(0))
    text = " ".join(symbols()[t] for t in tokens[0].tolist())
    assert tokenizer(text)["input_ids"] == tokens[0].tolist()


def test_training_learns_and_depends_on_the_seed_alone():
    language = Language.make(0)
    losses = [
        train(make_model(3, hidden_size=32, intermediate_size=32), language, 25, seed=1, lr=3e-3, rows=8, length=32)
        for _ in range(2)
    ]
    assert losses[0] == losses[1] and sum(losses[0][-5:]) < 0.95 * sum(losses[0][:5])


def test_scores_and_fine_tuning_leave_the_model_alone():
    model, language = make_model(0, hidden_size=32, intermediate_size=32), Language.make(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = fine_tune(model, language, AdaMoEConfig(), seed=0, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    found = score(tuned, language, rows=8)
    assert 0 < found["load"] <= 3 and found["ce"] > 1 and set(found) >= {f"load {kind}" for kind in KINDS}


def test_the_demo_writes_its_record(tmp_path):
    from adamoe.demo import run

    table = run(tmp_path, 0, steps=4)
    record = json.loads((tmp_path / "summary.json").read_text())
    assert len(table.rows) == 7 and [f["file"] for f in record["figures"]] == ["load.png", "cost.png"]
    assert (
        all((tmp_path / f["file"]).exists() for f in record["figures"])
        and "<span" in (tmp_path / "load.html").read_text()
    )


def logits(rows=50, total=16):
    return torch.randn(rows, total, generator=torch.Generator().manual_seed(0))


def test_topk_and_null_are_route():
    z = logits()
    assert torch.equal(routers.topk(z, 8, 2).index, route(z[:, :8], 8, 2).index)
    assert torch.equal(routers.null(z, 8, 3).index, route(z, 8, 3).index)


def test_top_p_collects_the_probability():
    z = 2 * logits(total=8)
    routing = routers.top_p(z, 8, 8, threshold=0.6)
    p = z.softmax(-1)
    for t in range(len(z)):
        chosen = [i for i in routing.index[t].tolist() if i < 8]
        best = p[t].sort(descending=True)[0]
        need = int((best.cumsum(0) < 0.6).sum()) + 1
        assert len(chosen) == need and float(p[t, chosen].sum()) == pytest.approx(float(best[:need].sum()))
    assert torch.allclose(routing.weights.sum(-1), torch.ones(50))
    assert expert_load(routers.top_p(logits(), 8, 8, threshold=0.6).index, 8) < expert_load(routing.index, 8) + 8
    with pytest.raises(ConfigError, match="threshold is 0"):
        routers.top_p(z, 8, 8, threshold=0)


def test_expert_choice_balances_exactly():
    routing = routers.expert_choice(logits(total=8), 8, 2)
    counts = torch.bincount(routing.index.flatten(), minlength=9)[:8]
    assert set(counts.tolist()) == {13}


def test_mod_leaves_a_share_of_the_tokens_out():
    routing = routers.mod(logits(total=9), 8, 2, capacity=0.6)
    assert sorted(routing.load(8).tolist()) == [0] * 20 + [2] * 30
    with pytest.raises(ConfigError, match="there is none"):
        routers.mod(logits(total=8), 8, 2)
    with pytest.raises(ConfigError, match="capacity is 2"):
        routers.mod(logits(total=9), 8, 2, capacity=2)


def test_bias_balance_evens_the_selection():
    model = converted(noise=0.3)
    balancer = routers.BiasBalancer(model, rate=0.05)
    tokens = torch.randint(3, 40, (16, 24), generator=torch.Generator().manual_seed(0))
    uneven = []
    for _ in range(80):
        with torch.no_grad():
            model(tokens)
        uneven.append(float(torch.stack([c.std() / c.mean() for c in balancer.counts]).mean()))
        balancer.step()
    assert uneven[-1] < 0.5 * uneven[0]


@pytest.mark.parametrize(
    "router", [routers.topk, routers.top_p, routers.expert_choice, routers.mod, routers.moepp, routers.null]
)
def test_every_router_trains_in_a_model(router, tokens):
    model = routers.use(converted(noise=0.2), router).train()
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with record_load(model) as record, torch.no_grad():
        model(tokens)
    assert 0 <= record.mean <= 8
    routers.use(model, None)
    plain = converted(noise=0.2)
    assert torch.equal(model.eval()(tokens).logits, plain(tokens).logits)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_constant_experts_are_added_once(tokens):
    model = routers.use(converted(noise=0.2), routers.moepp)
    once = model(tokens).logits
    assert torch.equal(routers.use(model, routers.moepp)(tokens).logits, once)
    revert(model)
    assert torch.equal(model(tokens).logits, revert(converted(noise=0.2))(tokens).logits)


def test_a_copy_never_displaces_its_expert_in_bias_balance(tokens):
    z = logits(total=8).repeat(1, 2)
    routing = routers.aux_free(z, 8, 3, bias=torch.zeros(16))
    best = z[:, :8].topk(2, -1)[1]
    assert torch.equal(routing.load(8), torch.full((50,), 2))
    assert [sorted(i for i in row if i < 8) for row in routing.index.tolist()] == [sorted(row) for row in best.tolist()]


def test_moepp_copy_and_constant_experts(tokens):
    """An all-copy layer gives the sum of the copies' weights times the token."""
    model = routers.use(converted(num_null_experts=8, top_k=8), routers.moepp, copies=8, constants=0)
    hidden = torch.randn(1, 6, 32)
    block = model.model.layers[0].mlp
    routing = block.gate.adamoe_route(block.gate.adamoe_logits(hidden[0]))
    assert int(routing.index.max()) == 9
    with pytest.raises(ConfigError, match="9 copy"):
        routers.moepp(logits(), 8, 3, copies=9)
    share = (routing.weights * (routing.index == 9)).sum(-1)
    for p in block.experts.parameters():
        torch.nn.init.zeros_(p)
    assert torch.allclose(block(hidden)[0], share.unsqueeze(-1) * hidden[0], atol=1e-6)


def test_use_needs_null_routers(mixtral):
    with pytest.raises(ConversionError, match="call convert first"):
        routers.use(mixtral, routers.top_p)
    assert convert(mixtral, AdaMoEConfig(num_null_experts=0)) is mixtral


def test_nulls_and_top_p_together():
    """A null among the collected does nothing."""
    routing = routers.top_p(logits(), 8, 16, threshold=0.9)
    assert float(expert_load(routing.index, 8)) < float(
        expert_load(routers.top_p(logits()[:, :8], 8, 8, threshold=0.9).index, 8)
    )
    mask = torch.zeros(50)
    mask[:10] = 1
    assert float(expert_load(routing.index, 8, attention_mask=mask)) == pytest.approx(
        float(routing.load(8)[:10].float().mean())
    )
