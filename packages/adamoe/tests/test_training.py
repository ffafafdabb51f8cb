"""Trainer, accumulation, two processes, PEFT, the controller, and resuming after a kill."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adamoe import (
    AdaMoEConfig,
    AnnealCallback,
    LoadController,
    TargetLoadCallback,
    calibrate,
    from_pretrained,
    record_load,
    set_load,
)
from adamoe.conversion import base_of, layer_routers
from adamoe.errors import ConfigError, ConversionError
from adamoe.finetuning import Recipe, collate, fine_tune, read_texts, with_lora
from one_rank import KERNELS, LIMIT, loss_of, model_of
from tenfold_shared.errors import UserError
from tiny_mixtures import build, converted
from transformers import Trainer, TrainingArguments

TESTS = Path(__file__).parent


def one_step(rows, *, batch, accumulation, tmp_path, coefficient=1.0):
    """The router gradients of one optimizer step, as Trainer computes them, and its reported loss."""
    model = converted(noise=0.2, aux_coef=(coefficient, coefficient)).train()
    kept = {}

    class Watched(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            step = optimizer.step

            def keep(*args, **kwargs):
                kept.update({n: p.grad.clone() for n, p in model.named_parameters() if "gate." in n})
                return step(*args, **kwargs)

            optimizer.step = keep
            return optimizer

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        report_to="none", use_cpu=True, logging_steps=1, save_strategy="no", max_grad_norm=0.0, disable_tqdm=True,
    )  # fmt: skip
    trainer = Watched(model=model, args=arguments, train_dataset=rows, data_collator=lambda b: collate(b, 0))
    trainer.train()
    return kept, trainer.state.log_history[0]["loss"]


def test_accumulation_of_copies_equals_one_batch(tmp_path, tokens):
    rows = [{"input_ids": tokens[0].tolist()}] * 8
    whole, loss = one_step(rows, batch=8, accumulation=1, tmp_path=tmp_path)
    parts, loss_of_parts = one_step(rows, batch=1, accumulation=8, tmp_path=tmp_path)
    assert whole and all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)
    assert loss_of_parts == pytest.approx(loss, abs=2e-3)


def test_accumulation_of_different_sequences_keeps_the_share_of_the_balance(tmp_path):
    rows = [
        {"input_ids": torch.randint(3, 40, (16 + i,), generator=torch.Generator().manual_seed(i)).tolist()}
        for i in range(8)
    ]
    part = {}
    for batch, accumulation in ((8, 1), (1, 8)):
        with_it, without = (
            one_step(rows, batch=batch, accumulation=accumulation, tmp_path=tmp_path, coefficient=c)[1]
            for c in (1.0, 0.0)
        )
        part[batch] = with_it - without
    assert part[1] == pytest.approx(part[8], rel=0.25) and part[8] > 1


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What two gloo processes, one of them without any expert, have as gradients: kernel, then name; one per rank."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, str(TESTS / "one_rank.py")]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen([*command, str(rank), str(folder)], env=settings, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        # The ranks give up by themselves earlier than this.
        codes = [rank.wait(timeout=2 * LIMIT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text() for rank in range(2))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_processes_one_of_them_without_any_expert(kernel, of_two):
    """They do not wait for each other for ever, and their mean gradient is that of one process."""
    alone = []
    for rank in (0, 1):
        model = model_of(rank, kernel)
        loss_of(model, rank).backward()
        alone.append({n: p.grad for n, p in model.named_parameters()})
    assert not any(grad.any() for name, grad in alone[1].items() if "experts" in name)
    for both in of_two:
        assert both[kernel].keys() == alone[0].keys()
        for name, grad in both[kernel].items():
            assert torch.allclose(grad, (alone[0][name] + alone[1][name]) / 2, atol=1e-6), name


RANK = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_training import STEERED, data
from adamoe.finetuning import Recipe, fine_tune
for name, config in STEERED.items():
    recipe = Recipe(steps=3, batch_size=1, lr=1e-3)
    fine_tune({base!r}, data(name), recipe, config, output=Path({out!r}) / name, device="cpu")
torch.distributed.barrier()
os._exit(0)  # taking a gloo group down can deadlock
"""
# Eq. 6 is no mean over sequences: it is compared on sequences that are alike, the controller's counts on different ones.
STEERED = {
    "alike": AdaMoEConfig(null_init="copy_noise", target_load=1.0, aux_coef=(0.1, 0.1)),
    "different": AdaMoEConfig(null_init="copy_noise", target_load=1.0, aux_coef=(0.0, 0.0)),
}


def data(name):
    return rows(8) if name == "different" else rows(1) * 8


def test_trainer_in_two_processes_ends_as_in_one(tmp_path):
    """Weights, null rows and the controller's biases."""
    build().save_pretrained(tmp_path / "base")
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(tests=str(TESTS), base=str(tmp_path / "base"), out=str(tmp_path / "two")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(script)], env={**os.environ, **meeting, "RANK": r, "LOCAL_RANK": r})
        for r in ("0", "1")
    ]
    try:
        assert [rank.wait(timeout=LIMIT) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    recipe = Recipe(steps=3, batch_size=2, lr=1e-3)
    for name, config in STEERED.items():
        alone, _ = fine_tune(
            tmp_path / "base", data(name), recipe, config, output=tmp_path / f"one-{name}", device="cpu"
        )
        both = from_pretrained(tmp_path / "two" / name / "model").state_dict()
        assert min(float(v) for k, v in both.items() if k.endswith("null_bias")) > 0.02
        for key, value in alone.state_dict().items():
            # Adam makes of a gradient's last bits a visible step; biases do not go through it.
            near = 1e-6 if key.endswith("null_bias") else 5e-4
            assert torch.allclose(value, both[key], rtol=0, atol=near), (name, key)


def test_peft_trains_experts_and_routers_and_is_saved(tmp_path, tokens):
    from peft import PeftModel

    model = with_lora(converted(noise=0.2)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any("null_weight" in n for n in before) and any("experts" in n for n in before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any("null_weight" in n for n in changed) and any("experts" in n and "lora_B" in n for n in changed)
    model.eval()
    with torch.no_grad():
        ours = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(converted(noise=0.2), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=tokens).logits, ours, atol=1e-5)
    with record_load(again) as record, torch.no_grad():
        again(input_ids=tokens)
    assert record.per_token.shape == (2, 24)


def test_a_peft_model_can_be_converted(tokens):
    from adamoe import convert
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = model(input_ids=tokens).logits
    assert torch.allclose(convert(model)(input_ids=tokens).logits, before, atol=1e-5)
    assert base_of(model) is model.get_base_model()


def test_the_controller_reaches_its_target():
    from adamoe import convert
    from adamoe.testbed import Language, make_model, train

    language = Language.make(0)
    model = make_model(0, hidden_size=32, intermediate_size=32)
    convert(model, AdaMoEConfig(target_load=1.2, null_init="copy_noise"))
    controller = LoadController(model)
    train(model, language, 60, seed=0, lr=1e-3, rows=8, length=32, after_step=lambda m, p: controller.step())
    with record_load(model) as record, torch.no_grad():
        model(language.batch(32, 32, torch.Generator().manual_seed(9))[0])
    assert record.by_layer().tolist() == pytest.approx([1.2, 1.2], abs=0.15)


@pytest.mark.parametrize("per_layer", [False, True])
def test_calibration_to_any_load(per_layer, tokens):
    model = converted(noise=0.5)
    batch = torch.randint(3, 40, (16, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(batch)
    mask[:, 20:] = 0
    for target in (0.5, 1.0, 1.7, 2.4):
        load = calibrate(model, [{"input_ids": batch, "attention_mask": mask}], target_load=target, per_layer=per_layer)
        assert load == pytest.approx(target, abs=0.02)
        with record_load(model, token_ids=batch, attention_mask=mask) as record, torch.no_grad():
            model(batch, attention_mask=mask)
        assert record.mean == pytest.approx(load, abs=1e-6)
        if per_layer:
            assert record.by_layer().tolist() == pytest.approx([target] * 2, abs=0.03)


def test_per_layer_biases_under_peft(tokens):
    """PEFT keeps a frozen router beside the one it trains; a layer is one all the same."""
    model = with_lora(converted(noise=0.5))
    load = calibrate(model, [tokens], target_load=1.5, per_layer=True, tolerance=0.1)
    biases = [float(r.null_bias) for r in layer_routers(model)]
    assert load == pytest.approx(1.5, abs=0.1) and len(biases) == 4 and biases[0] == biases[1] != biases[2] == biases[3]
    set_load(model, null_bias=torch.tensor([0.1, 0.2]))
    assert [float(r.null_bias) for r in layer_routers(model)] == pytest.approx([0.1, 0.1, 0.2, 0.2])
    set_load(model, null_bias=torch.tensor(0.3))
    assert [float(r.null_bias) for r in layer_routers(model)] == pytest.approx([0.3] * 4)


def test_calibration_says_what_it_cannot_do(tokens, mixtral):
    model = converted()
    with pytest.warns(UserWarning, match="still copies"):
        calibrate(model, [tokens], target_load=1.5)
    with pytest.raises(ConfigError, match="the model can have 0 to 3"):
        calibrate(model, [tokens], target_load=4)
    with pytest.raises(ConfigError, match="nothing to calibrate on"):
        calibrate(model, [], target_load=1)
    with pytest.raises(ConfigError, match="3 numbers, the model 2"):
        set_load(model, null_bias=[0, 0, 0])
    with pytest.raises(ConfigError, match="not a number"):
        set_load(model, null_bias=float("nan"))
    with pytest.raises(ConfigError, match="no target"):
        LoadController(model)
    with pytest.raises(ConfigError, match="the model can have 0 to 3"):
        LoadController(model, 5.0)


def test_the_record(tokens):
    model = converted(noise=0.4)
    with record_load(model, token_ids=tokens) as record, torch.no_grad():
        model(tokens)
    loads = record.per_token
    assert loads.shape == (2, 2, 12) and float(record.histogram().sum()) == pytest.approx(1)
    assert record.by_layer().tolist() == pytest.approx(loads.float().mean((1, 2)).tolist())
    token = int(tokens[0, 0])
    here = (tokens == token).nonzero()
    expected = torch.stack([loads[:, r, c].float().mean() for r, c in here]).mean()
    assert record.by_token()[token] == (pytest.approx(float(expected)), len(here))
    table = record.to_dataframe()
    assert len(table) == 48 and table.loc[30, "token"] == tokens.flatten()[6] and table["load"].sum() == loads.sum()


def test_a_record_of_other_tokens_than_it_was_told(tokens):
    model = converted(noise=0.4)
    with record_load(model, token_ids=tokens) as record, torch.no_grad():
        model(tokens)
        model(tokens)
    assert record.per_token.shape == (2, 48) and 0 < record.mean < 3
    for table in (record.by_token, record.to_dataframe):
        with pytest.raises(ConversionError, match="token_ids has 24 places, 48 tokens were recorded"):
            table()
    with record_load(model, attention_mask=torch.ones(2, 5)) as record, torch.no_grad():
        model(tokens)
    with pytest.raises(ConversionError, match="attention_mask has 10 places, 24 tokens were recorded"):
        _ = record.mean


def test_padding_is_not_in_the_record(tokens):
    model = converted(noise=0.4)
    mask = torch.ones_like(tokens)
    mask[1, -7:] = 0
    with record_load(model, token_ids=tokens, attention_mask=mask) as record, torch.no_grad():
        model(tokens, attention_mask=mask)
    kept = record.per_token[:, mask.bool()].float()
    assert record.mean == pytest.approx(float(kept.mean())) != pytest.approx(float(record.per_token.float().mean()))
    assert record.by_layer().tolist() == pytest.approx(kept.mean(1).tolist())
    shares = [float((kept == i).float().mean()) for i in range(len(record.histogram()))]
    assert record.histogram().tolist() == pytest.approx(shares)
    assert sum(count for _, count in record.by_token().values()) == int(mask.sum())


def rows(count=24):
    g = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 40, (12,), generator=g).tolist()} for _ in range(count)]


def test_trainer_anneals_and_steers(tmp_path):
    build().save_pretrained(tmp_path / "base")
    recipe = Recipe(steps=6, batch_size=2, lr=1e-3, save_steps=100)
    config = AdaMoEConfig(target_load=1.0, null_init="copy_noise")
    model, losses = fine_tune(tmp_path / "base", rows(), recipe, config, output=tmp_path / "out", device="cpu")
    assert len(losses) == 6 and base_of(model).adamoe.coefficient == 1e-4
    assert all(float(r.null_bias) > 0.01 for r in layer_routers(model))
    assert (tmp_path / "out/model/config.json").exists()


def test_a_converted_model_is_trained_as_the_settings_say(tmp_path):
    """What it computes stays the checkpoint's; coefficient, schedule and target are those given now."""
    converted(noise=0.2, num_null_experts=16).save_pretrained(tmp_path / "base")
    config = AdaMoEConfig(aux_coef=(0.3, 0.2), anneal_at=0.9, target_load=1.0)
    recipe = Recipe(steps=2, batch_size=2, lr=1e-3)
    model, _ = fine_tune(tmp_path / "base", rows(4), recipe, config, output=tmp_path / "out", device="cpu")
    settings = base_of(model).adamoe.config
    assert (settings.num_null_experts, settings.top_k) == (16, 4)
    assert (settings.aux_coef, settings.anneal_at, settings.target_load) == ((0.3, 0.2), 0.9, 1.0)
    assert all(float(r.null_bias) != 0 for r in layer_routers(model))
    with pytest.raises(ConfigError, match="target_load is 7, the model can have 0 to 4"):
        fine_tune(tmp_path / "base", rows(4), recipe, AdaMoEConfig(target_load=7), output=tmp_path / "no", device="cpu")
    assert not (tmp_path / "no").exists()


RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from adamoe import AdaMoEConfig
from adamoe.finetuning import Recipe, fine_tune
from test_training import rows
import adamoe.training, time
real = adamoe.training.AnnealCallback.on_step_begin
def slow(self, args, state, control, **kwargs):
    real(self, args, state, control, **kwargs)
    if state.global_step >= {stop}:
        print("waiting", file=sys.__stdout__, flush=True)  # Trainer runs with stdout redirected
        time.sleep(600)
adamoe.training.AnnealCallback.on_step_begin = slow
fine_tune({base!r}, rows(), Recipe(steps=6, batch_size=2, lr=1e-3, save_steps=2), AdaMoEConfig(target_load=1.0), output=Path({out!r}), device="cpu")
"""


def test_killed_and_resumed_it_ends_the_same(tmp_path):
    base = tmp_path / "base"
    build().save_pretrained(base)
    recipe, config = Recipe(steps=6, batch_size=2, lr=1e-3, save_steps=2), AdaMoEConfig(target_load=1.0)
    whole, _ = fine_tune(base, rows(), recipe, config, output=tmp_path / "whole", device="cpu")
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(TESTS), base=str(base), out=str(tmp_path / "cut"), stop=5))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "waiting" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut/model").exists()
    resumed, _ = fine_tune(base, rows(), recipe, config, output=tmp_path / "cut", resume=True, device="cpu")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match="no checkpoint to resume"):
        fine_tune(base, rows(), recipe, config, output=tmp_path / "new", resume=True, device="cpu")


@pytest.mark.parametrize("method", ["topk", "top1", "top_p"])
def test_other_methods(method, tmp_path):
    build().save_pretrained(tmp_path / "base")
    recipe = Recipe(method=method, steps=2, batch_size=2)
    model, losses = fine_tune(tmp_path / "base", rows(4), recipe, AdaMoEConfig(), output=tmp_path / "out", device="cpu")
    with record_load(model) as record, torch.no_grad():
        model(torch.tensor([rows(1)[0]["input_ids"]]))
    assert len(losses) == 2 and record.mean == {"topk": 2.0, "top1": 1.0}.get(method, record.mean)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "is empty"),
        ("nonsense", "line 1 has no text"),
        ('{"text": ""}', "empty text"),
        ('{"text": 3}', "empty text"),
        ("[1]", "no text"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_text_files(text, cause, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=cause):
        read_texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("settings", [{"method": "magic"}, {"steps": 0}, {"lr": float("nan")}, {"accumulation": 0}])
def test_recipes(settings):
    with pytest.raises(ConfigError):
        Recipe(**settings)


def test_callbacks_are_transformers_own():
    from transformers import TrainerCallback

    assert issubclass(AnnealCallback, TrainerCallback) and issubclass(TargetLoadCallback, TrainerCallback)
