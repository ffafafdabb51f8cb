"""Eq. 6 and its relatives against loops written from the formulas; what the hooks add to a model's loss."""

import copy

import pytest
import torch
from adamoe import AdaMoEConfig, aux_coefficient, convert, load_balancing_loss, set_progress
from adamoe.conversion import layer_routers
from adamoe.errors import ConversionError
from tiny_mixtures import build, converted
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

N, M, K = 8, 16, 4


def logits(layers=3, rows=20):
    return [torch.randn(rows, N + M, generator=torch.Generator().manual_seed(i)) for i in range(layers)]


def by_loop(layers, mask=None, *, average=True):
    """(n + m) sum_i f'_i P_i, the mean over layers, one token and one expert at a time."""
    values = []
    for z in layers:
        f, P, tokens = [0.0] * (N + M), [0.0] * (N + M), 0
        for t in range(len(z)):
            if mask is not None and not mask.reshape(-1)[t]:
                continue
            tokens += 1
            chosen = sorted(range(N + M), key=lambda i: -float(z[t, i]))[:K]
            p = z[t].exp() / z[t].exp().sum()
            for i in range(N + M):
                f[i] += float(i in chosen)
                P[i] += float(p[i])
        f, P = [v / tokens for v in f], [v / tokens for v in P]
        if average:
            f[N:] = [sum(f[N:]) / M] * M
        values.append((N + M) * sum(a * b for a, b in zip(f, P, strict=True)))
    return sum(values) / len(values)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("balance", ["null_average", "individual"])
def test_it_is_the_formula(masked, balance):
    mask = (torch.arange(20) % 5 != 0).long().view(2, 10) if masked else None
    ours = load_balancing_loss(logits(), N, top_k=K, attention_mask=mask, balance=balance)
    assert float(ours) == pytest.approx(by_loop(logits(), mask, average=balance == "null_average"), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_individual_and_pooled_is_the_published_value(masked):
    """The published code's null averaging does nothing; its value is the stock loss over all n + m."""
    mask = (torch.arange(20) % 5 != 0).long().view(2, 10) if masked else None
    ours = load_balancing_loss(logits(), N, top_k=K, attention_mask=mask, balance="individual", aux_reduction="pooled")
    stock = load_balancing_loss_func(tuple(logits()), N + M, K, mask)
    assert float(ours) == pytest.approx(float(stock), rel=1e-6)
    assert float(load_balancing_loss(logits(), N, top_k=K)) != pytest.approx(float(stock), rel=1e-4)


def test_pooled_with_averaged_nulls_by_hand():
    """Pooling adds f and P over the layers first."""
    shares, means = [], []
    for z in logits():
        f = torch.zeros_like(z).scatter_(1, z.topk(K, 1)[1], 1.0).mean(0)
        f[N:] = f[N:].mean()
        shares.append(f)
        means.append(z.softmax(-1).mean(0))
    expected = (N + M) * (sum(shares) / 3 * sum(means) / 3).sum()
    ours = load_balancing_loss(logits(), N, top_k=K, aux_reduction="pooled")
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)


def test_perfect_balance_is_k():
    z = torch.zeros(N + M, N + M) + 1e-4 * torch.stack([torch.arange(N + M).roll(i).float() for i in range(N + M)])
    assert float(load_balancing_loss(z, N, top_k=K)) == pytest.approx(K, rel=1e-4)


def test_f_has_no_gradient_and_p_has():
    z = torch.randn(6, N + M, requires_grad=True)
    load_balancing_loss(z, N, top_k=K).backward()
    f = torch.zeros(6, N + M).scatter_(1, z.topk(K, 1)[1], 1.0).mean(0)
    f[N:] = f[N:].mean()
    w = z.detach().clone().requires_grad_()
    ((N + M) * (f * w.softmax(-1).mean(0)).sum()).backward()
    assert torch.allclose(z.grad, w.grad, atol=1e-7)


def test_the_schedule():
    step = AdaMoEConfig()
    assert [aux_coefficient(step, p) for p in (0, 0.49, 0.5, 1)] == [0.02, 0.02, 1e-4, 1e-4]
    linear = AdaMoEConfig(anneal="linear", anneal_at=0.5)
    assert aux_coefficient(linear, 0.75) == pytest.approx((0.02 + 1e-4) / 2)
    cosine = AdaMoEConfig(anneal="cosine", anneal_at=0.0)
    assert aux_coefficient(cosine, 0.5) == pytest.approx((0.02 + 1e-4) / 2)
    assert all(aux_coefficient(c, 1.0) == pytest.approx(1e-4) for c in (linear, cosine))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_a_models_loss_is_cross_entropy_plus_alpha_times_eq_6(name, tokens):
    model = converted(name, noise=0.2, num_null_experts=M).train()
    mask = torch.ones_like(tokens)
    mask[1, -3:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    found = []
    handles = [r.register_forward_hook(lambda m, a, out: found.append(out[0].detach())) for r in layer_routers(model)]
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    for handle in handles:
        handle.remove()
    model.eval()
    plain = model(tokens, attention_mask=mask, labels=labels).loss
    expected = _aux(model, tokens, mask)
    assert float(loss - plain) == pytest.approx(0.02 * float(expected), rel=1e-3)
    if name in ("mixtral", "qwen2_moe", "olmoe"):
        assert float(expected) == pytest.approx(by_loop(found, mask), rel=1e-4)


def _aux(model, tokens, mask):
    """From the logits and choices of a second pass, through the public function."""
    with torch.no_grad():
        output = model(tokens, attention_mask=mask, output_router_logits=True, labels=tokens)
    return output.aux_loss


def test_router_logits_and_aux_loss_are_given_on_request(tokens):
    model = converted(noise=0.2)
    output = model(tokens, labels=tokens, output_router_logits=True)
    assert [tuple(z.shape) for z in output.router_logits] == [(24, 16)] * 2
    assert float(output.aux_loss) == pytest.approx(
        float(load_balancing_loss(output.router_logits, 8, top_k=3)), rel=1e-5
    )
    assert float(output.loss) == pytest.approx(float(model(tokens, labels=tokens).loss)), (
        "evaluation is cross-entropy alone"
    )
    assert not any(r.adamoe_watchers for r in layer_routers(model))


def test_where_the_null_rows_get_their_gradient(tokens):
    """From eq. 6 alone: the task's loss gives them nothing, unless the straight-through gradient is on."""
    for gradient, coefficient, some in (
        ("true_only", 0.0, False),
        ("true_only", 0.02, True),
        ("straight_through", 0.0, True),
    ):
        model = converted(noise=0.2, weight_gradient=gradient, aux_coef=(coefficient, coefficient)).train()
        model(tokens, labels=tokens).loss.backward()
        for router in layer_routers(model):
            grad = router.null_weight.grad
            assert bool(grad is not None and grad.abs().max() > 1e-6) is some


def test_straight_through_keeps_the_values(tokens):
    plain, through = (converted(noise=0.2, weight_gradient=g) for g in ("true_only", "straight_through"))
    assert torch.allclose(plain(tokens).logits, through(tokens).logits, atol=1e-5)


def test_the_schedule_reaches_the_loss(tokens):
    model = converted(noise=0.2).train()
    first = float(model(tokens, labels=tokens).loss)
    set_progress(model, 0.9)
    last = float(model(tokens, labels=tokens).loss)
    assert first - last == pytest.approx((0.02 - 1e-4) * float(_aux_train(model, tokens)), rel=1e-3)


def _aux_train(model, tokens):
    return model(tokens, labels=tokens, output_router_logits=True).aux_loss


def test_gradient_checkpointing_gives_the_same_gradients(tokens):
    plain = converted(noise=0.2).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert saving.is_gradient_checkpointing
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_what_would_train_without_the_balance_loss_is_refused(tokens):
    """Reentrant checkpointing records logits without a gradient; DataParallel's replicas write into one record."""
    model = converted(noise=0.2).train()
    with pytest.raises(ConversionError, match="accelerate launch"):
        model._replicate_for_data_parallel()(tokens, labels=tokens)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ConversionError, match="use_reentrant"):
        model(tokens, labels=tokens, use_cache=False)


def test_compiled_and_checkpointed_it_is_the_same_step(tokens):
    plain = converted(noise=0.2).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    compiled = torch.compile(saving, backend="aot_eager")
    for progress in (0.0, 0.9):
        for model in (plain, saving):
            set_progress(model, progress)
            model.zero_grad()
        losses = [m(tokens, labels=tokens, use_cache=False).loss for m in (plain, compiled)]
        for loss in losses:
            loss.backward()
        assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-5)
        for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-5), name


def test_nothing_but_padding_adds_nothing(tokens):
    model = converted(noise=0.2).train()
    nothing = {"attention_mask": torch.zeros_like(tokens), "labels": torch.full_like(tokens, -100)}
    loss = model(tokens, num_items_in_batch=5, **nothing).loss
    loss.backward()
    assert float(loss) == 0 and all(r.null_weight.grad.isfinite().all() for r in layer_routers(model))


def test_a_copy_of_a_model_has_hooks_of_its_own(tokens):
    model = converted(noise=0.2).train()
    other = copy.deepcopy(model)
    set_progress(other, 1.0)
    assert model.adamoe.progress == 0.0 and other.adamoe is not model.adamoe
    assert float(other(tokens, labels=tokens).loss) < float(model(tokens, labels=tokens).loss)


def test_a_tuple_gets_the_loss_too(tokens):
    model = converted(noise=0.2)
    plain = model(tokens, labels=tokens, return_dict=False)
    assert isinstance(plain, tuple) and float(plain[0]) == pytest.approx(float(model(tokens, labels=tokens).loss))
    model.train()
    output = model(tokens, labels=tokens, return_dict=False)
    assert float(output[0]) == pytest.approx(float(model(tokens, labels=tokens).loss))
    assert float(output[0]) > float(plain[0]) + 0.02 and torch.allclose(output[1], plain[1], atol=1e-5)


def test_a_mask_given_by_position_counts(tokens):
    model = converted(noise=0.2).train()
    mask = torch.ones_like(tokens)
    mask[1, -5:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    by_name = float(model(tokens, attention_mask=mask, labels=labels).loss)
    assert float(model(tokens, mask, labels=labels).loss) == by_name


def test_labels_without_a_converted_model_are_stock(tokens):
    model = build()
    stock = model(tokens, labels=tokens).loss
    assert torch.allclose(convert(model).eval()(tokens, labels=tokens).loss, stock, atol=1e-5)
