"""The packed pass gives what a pair of passes for every block gives."""

import copy
import random
from typing import Any

import pytest
import torch
from cllm_jacobi.losses import consistency_terms, divergence, forward, global_consistency_loss, local_consistency_loss
from cllm_jacobi.packing import IGNORE, DataCollatorForConsistency, can_pack, packed_mask
from cllm_jacobi.trajectory import first_wrong
from tenfold_shared.errors import UserError

N = 5


def rows(count: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up trajectories: answers of 12, 5, 1 and 9 tokens after prompts of 3 to 6, short last blocks among them."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        prompt = [rng.randrange(2, 61) for _ in range(3 + i % 4)]
        answer = [rng.randrange(2, 61) for _ in range((12, 5, 1, 9)[i % 4])]
        blocks = []
        for start in range(0, len(answer), N):
            target = answer[start : start + N]
            states = [
                target[:k] + [rng.randrange(2, 61) for _ in target[k:]]
                for k in range(0, len(target), 1 + rng.randrange(2))
            ]
            blocks.append([*states, target])
        out.append({"prompt_ids": prompt, "answer_ids": answer, "trajectories": blocks, "labels": [], "n": N})
    return out


def model64(tiny: Any, name: str = "llama") -> Any:
    """In float64, and at the usual scale of fresh weights."""
    model = copy.deepcopy(tiny(name)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.div_(4.0)
    return model


def loss_and_gradients(model: Any, batch: Any, packed: bool, **kind: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    terms = consistency_terms(forward(model, batch, packed=packed), batch, **kind)
    terms.total(10.0).backward()
    return terms, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["global", "local"])
@pytest.mark.parametrize("lora", [False, True])
def test_packed_is_unpacked(tiny, loss, lora):
    """Loss to 1e-10 and gradients to 1e-7 in float64, with short last blocks, padding and LoRA."""
    model = model64(tiny)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).double()
    packed, unpacked = (DataCollatorForConsistency(loss=loss, packed=p)(rows()) for p in (True, False))
    assert len(packed["input_ids"]) == 4 < len(unpacked["input_ids"])
    a, grads_a = loss_and_gradients(model, packed, True)
    b, grads_b = loss_and_gradients(model, unpacked, False)
    assert (a.pairs, a.labels) == (b.pairs, b.labels) and a.pairs > 10
    assert (
        abs(a.consistency - b.consistency) < 1e-10 * a.pairs
        and abs(a.autoregressive - b.autoregressive) < 1e-10 * a.labels
    )
    assert abs(a.total(10.0) - b.total(10.0)) < 1e-10
    assert grads_a.keys() == grads_b.keys()
    assert max(float((grads_a[k] - grads_b[k]).abs().max()) for k in grads_a) < 1e-7
    assert max(float(g.abs().max()) for g in grads_a.values()) > 1e-3


@pytest.mark.parametrize("loss", ["global", "local"])
def test_packed_is_the_definition(tiny, loss):
    """The sum over blocks of the paper's losses, each written out with two passes and no mask at all."""
    model, data = model64(tiny), rows()
    reference = {"global": global_consistency_loss, "local": local_consistency_loss}[loss]
    batch = DataCollatorForConsistency(loss=loss)(data)
    terms = consistency_terms(forward(model, batch, packed=True), batch)
    width = batch["input_ids"].shape[1]
    students = {tuple(divmod(s, width)) for s in batch["student"].tolist()}
    total, count = 0.0, 0
    for i, row in enumerate(data):
        for segment in sorted(set(batch["segments"][i].tolist()) - {-1, 0}):
            at = (batch["segments"][i] == segment).nonzero().flatten().tolist()
            if not any((i, t) in students for t in at):
                continue  # a teacher's state
            base = int(batch["horizons"][i, at[0]])
            states = row["trajectories"][(base - len(row["prompt_ids"])) // N]
            prefix = torch.tensor((row["prompt_ids"] + row["answer_ids"])[:base])
            found = reference(model, prefix, states, states.index(batch["input_ids"][i, at].tolist()))
            total, count = total + float(found.detach().sum()), count + len(found)
    assert count == terms.pairs > 8
    assert abs(total - float(terms.consistency)) < 1e-9


def test_pairs_start_at_the_first_wrong_token(tiny):
    """Before it student and teacher are the same numbers; behind the block's last token nothing is asked."""
    data = rows()
    batch = DataCollatorForConsistency()(data)
    logits = forward(model64(tiny), batch, packed=True).flatten(0, 1)
    width = batch["input_ids"].shape[1]
    for student in batch["student"].tolist():
        row, at = divmod(student, width)
        segment = (batch["segments"][row] == batch["segments"][row, at]).nonzero().flatten()
        assert at < segment[-1]
    gaps = divergence(logits[batch["teacher"]], logits[batch["student"]])
    assert (gaps > 1e-9).all()
    # One step earlier the two sides agree.
    firsts = [s for s in batch["student"].tolist() if s - 1 not in batch["student"].tolist()]
    for s in firsts:
        row, at = divmod(s, width)
        if batch["segments"][row, at - 1] == batch["segments"][row, at]:
            t = int(batch["teacher"][batch["student"].tolist().index(s)])
            assert float(divergence(logits[t - 1][None], logits[s - 1][None])) < 1e-9


def test_padding_never_gives_nan(tiny):
    batch = DataCollatorForConsistency(pad_token_id=1)(rows())
    assert torch.isfinite(forward(tiny("llama"), batch, packed=True)).all()
    visible = packed_mask(batch["segments"], batch["horizons"], torch.float32)[:, 0] == 0
    assert visible.any(-1).all()


def test_cost_is_about_half(tiny):
    """P + 2A tokens against the sum of 2 (P + b n + n)."""
    row = rows()[0]
    batch = DataCollatorForConsistency()([row])
    p, a = len(row["prompt_ids"]), len(row["answer_ids"])
    assert batch["input_ids"].shape == (1, p + 2 * a)
    official = sum(2 * (p + len(row["answer_ids"][: (b + 1) * N])) for b in range(3))
    assert p + 2 * a < 0.6 * official


def test_a_block_without_a_wrong_state_keeps_the_autoregressive_loss():
    row = {**rows()[1]}
    row["trajectories"] = [[row["answer_ids"]]]
    batch = DataCollatorForConsistency()([row])
    assert len(batch["student"]) == 0 and (batch["shift_labels"] != IGNORE).sum() == 5


def test_labels_prompt_mask_and_length():
    row = {**rows()[0], "labels": [7, 8, 9]}
    truth = DataCollatorForConsistency(use_labels=True)([row])
    labels = truth["shift_labels"][truth["shift_labels"] != IGNORE].tolist()
    assert labels == [7, 8, 9] and len(truth["input_ids"]) == 2
    cut = DataCollatorForConsistency(use_labels=True, max_length=3 + 2)([row])
    assert cut["shift_labels"][cut["shift_labels"] != IGNORE].tolist() == [7, 8]
    everything = DataCollatorForConsistency(mask_prompt=False)([row])
    assert int((everything["shift_labels"] != IGNORE).sum()) == 3 + 12 - 1
    short = DataCollatorForConsistency(max_length=3 + 2 * N)([row])
    assert int((short["shift_labels"] != IGNORE).sum()) == 2 * N


def test_draws_depend_on_seed_epoch_and_row_only():
    data = rows()
    whole = DataCollatorForConsistency(seed=3)(data)["input_ids"]
    alone = DataCollatorForConsistency(seed=3)([data[2]])["input_ids"]
    assert whole[2, : alone.shape[1]].tolist() == alone[0].tolist()
    assert DataCollatorForConsistency(seed=3, epoch=1)(data)["input_ids"].tolist() != whole.tolist()
    drawn = {tuple(DataCollatorForConsistency(seed=s)([data[0]])["input_ids"][0].tolist()) for s in range(40)}
    assert len(drawn) > 10
    # Rows of one shape do not all draw the same state.
    states = [[2] * k + [9] * (N - k) for k in range(N)] + [[2] * N]
    alike = [{**data[0], "prompt_ids": [i, 7], "answer_ids": [2] * N, "trajectories": [states]} for i in range(20)]
    assert len({tuple(r) for r in DataCollatorForConsistency()(alike)["input_ids"][:, -N:].tolist()}) > 2


def test_augmentation_leaves_the_last_state_before_the_fixed_point():
    """As published: every state except the last two; the earlier ones get right tokens behind the first wrong one."""
    target, first, second = [9, 8, 7, 6, 5], [2, 2, 2, 2, 2], [9, 8, 2, 2, 2]
    row = {"prompt_ids": [3, 4], "answer_ids": target, "labels": [], "n": N}

    def drawn(states: list[list[int]]) -> set[tuple[int, ...]]:
        collators = (DataCollatorForConsistency(augment=True, seed=s) for s in range(60))
        return {tuple(c([{**row, "trajectories": [states]}])["input_ids"][0, -N:].tolist()) for c in collators}

    assert drawn([first, target]) == {tuple(first)}
    found = drawn([first, second, target])
    assert tuple(second) in found and tuple(first) not in found and len(found) > 4
    assert all(state[0] == 2 or state == tuple(second) for state in found)


def test_augmentation_and_corruption():
    data = rows()
    for collator in (DataCollatorForConsistency(augment=True), DataCollatorForConsistency(states="random")):
        batch = collator(data)
        assert len(batch["student"]) > 0
    with pytest.raises(UserError, match="step by step"):
        DataCollatorForConsistency(loss="local", augment=True)
    with pytest.raises(UserError, match="loss is 'both'"):
        DataCollatorForConsistency(loss="both")
    with pytest.raises(UserError, match="states is 'noise'"):
        DataCollatorForConsistency(states="noise")


def test_label_smoothing(tiny):
    """A share of the weight goes to all tokens alike."""
    batch = DataCollatorForConsistency()(rows())
    logits = forward(tiny("llama"), batch, packed=True).detach()
    kept = batch["shift_labels"] != IGNORE
    log_p = logits[kept].log_softmax(-1)
    right = log_p.gather(1, batch["shift_labels"][kept][:, None])[:, 0]
    for share in (0.0, 0.1):
        expected = -((1 - share) * right + share * log_p.mean(-1)).sum()
        terms = consistency_terms(logits, batch, label_smoothing=share)
        assert float(terms.autoregressive) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences(kind):
    """Zero for equal sides, the definition otherwise, and no gradient into the teacher."""
    generator = torch.Generator().manual_seed(0)
    t, s = (torch.randn(3, 7, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert divergence(t, t, kind=kind).abs().max() < 1e-12
    value = divergence(t, s, kind=kind, beta=0.3)
    p, q = t.softmax(-1), s.softmax(-1)
    m = 0.3 * p + 0.7 * q
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    expected = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m)}[kind]
    assert torch.allclose(value, expected)
    value.sum().backward()
    assert t.grad is None and s.grad.abs().max() > 0


def test_the_published_soft_cross_entropy_has_the_same_gradient():
    generator = torch.Generator().manual_seed(0)
    t, s = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
    divergence(t, a).sum().backward()
    (-(t.softmax(-1) * b.log_softmax(-1)).sum()).backward()
    assert torch.allclose(a.grad, b.grad)


def test_divergence_settings():
    x = torch.zeros(1, 3)
    with pytest.raises(UserError, match="divergence is 'l2'"):
        divergence(x, x, kind="l2")
    with pytest.raises(UserError, match="jsd_beta is 1"):
        divergence(x, x, kind="jsd", beta=1.0)


def test_which_models_can_be_packed(tiny):
    assert can_pack(tiny("llama").config) and can_pack(tiny("qwen2").config) and can_pack(tiny("qwen3").config)
    for name in ("gpt2", "mistral", "gemma3"):
        assert not can_pack(tiny(name).config)
    config = copy.deepcopy(tiny("llama").config)
    config._attn_implementation = "flash_attention_2"
    assert not can_pack(config)


def test_unpacked_rows_serve_the_others(tiny):
    """A sliding window, where a packed mask would be wrong, against the definition."""
    model, data = model64(tiny, "mistral"), rows(1)
    batch = DataCollatorForConsistency(packed=False)(data)
    terms = consistency_terms(forward(model, batch, packed=False), batch)
    clean, total = data[0]["prompt_ids"] + data[0]["answer_ids"], 0.0
    for r in range(1, len(batch["input_ids"])):
        ids = batch["input_ids"][r][batch["segments"][r] == 0].tolist()
        base = len(ids) - (len(ids) - 3 - 1) % N - 1
        states = data[0]["trajectories"][(base - 3) // N]
        total += float(
            global_consistency_loss(model, torch.tensor(clean[:base]), states, states.index(ids[base:])).sum()
        )
    assert abs(total - float(terms.consistency)) < 1e-9


def test_first_wrong():
    assert first_wrong([1, 2], [1, 2]) is None and first_wrong([1, 3], [1, 2]) == 1
