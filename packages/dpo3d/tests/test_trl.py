"""Contract tests, held for the TRL named in dpo3d.trl; each compares with TRL's own trainer in the same process."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from dpo3d.losses import LOSSES, PairLogps, preference_loss
from dpo3d.trl import TRL_LOSSES, FlexDPOConfig, FlexDPOTrainer
from tenfold_shared.errors import UserError
from trl import DPOConfig, DPOTrainer

Make = Callable[..., Any]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def first_loss(trainer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    loss, gradients = first_loss(ours)
    expected, expected_gradients = first_loss(theirs)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=tolerance, msg=name)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-4


def moved(base: Any) -> Any:
    """The base model after a step of its own, so that Δ is not zero everywhere."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    return model


def test_the_contract_is_with_this_trl() -> None:
    assert trl.__version__.split(".")[:2] == ["1", "16"], (
        f"TRL {trl.__version__} is installed; these tests hold for 1.16, look through them before widening the bound"
    )


def test_the_names_are_those_of_the_installed_trl() -> None:
    source = Path(trl.trainer.dpo_trainer.__file__).read_text()
    named = set(re.findall(r'loss_type == "(\w+)"', source))
    assert named == TRL_LOSSES, f"TRL {trl.__version__} has other losses than the contract"


SETTINGS: dict[str, tuple[dict, dict]] = {
    "full": ({}, {}),
    "lora": ({}, {"peft_config": "lora"}),
    "precomputed reference": ({"precompute_ref_log_probs": True}, {}),
    "ld_alpha": ({"ld_alpha": 0.5}, {}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_betas_are_trl(setting: str, make_trainer: Make, base: Any) -> None:
    fields, extra = SETTINGS[setting]
    extra = {k: lora() for k in extra} or {"ref_model": copy.deepcopy(base)}
    if "peft_config" in extra:
        extra["ref_model"] = None
    arguments = {"model": moved(base), **fields}
    ours = make_trainer(
        FlexDPOTrainer, FlexDPOConfig, extra=copy.deepcopy(extra), beta_chosen=0.1, beta_rejected=0.1, **arguments
    )
    theirs = make_trainer(DPOTrainer, DPOConfig, extra=copy.deepcopy(extra), **arguments)
    assert ours.args.extends_trl
    assert_same(ours, theirs)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_equal_betas_train_like_trl(accumulation: int, make_trainer: Make) -> None:
    fields = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    runs = []
    for trainer_class, config_class, extra in (
        (FlexDPOTrainer, FlexDPOConfig, {"beta_chosen": 0.1}),
        (DPOTrainer, DPOConfig, {}),
    ):
        trainer = make_trainer(trainer_class, config_class, **fields, **extra)
        trainer.train()
        runs.append(trainer)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    logged = [[e for e in r.state.log_history if "rewards/margins" in e] for r in runs]
    for ours, theirs in zip(*logged, strict=True):
        for key in ("loss", "entropy", *(k for k in theirs if k.startswith(("rewards/", "logps/", "logits/")))):
            assert float(ours[key]) == pytest.approx(float(theirs[key]), abs=2e-3), key
        assert {k for k in ours if k.startswith("dpo3d/")} == {
            "dpo3d/weight_chosen",
            "dpo3d/weight_rejected",
            "dpo3d/log_grad_ratio",
            "dpo3d/chosen_share",
        }


@pytest.mark.parametrize("name", sorted(TRL_LOSSES))
def test_every_trl_name_passes_through(name: str, make_trainer: Make, base: Any) -> None:
    fields = {"loss_type": [name], "label_smoothing": 0.05 if name in ("exo_pair", "robust") else 0.0}
    ours = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), **fields)
    theirs = make_trainer(DPOTrainer, DPOConfig, model=moved(base), **fields)
    assert not ours.args.extends_trl
    assert_same(ours, theirs, 0.0)


@pytest.mark.parametrize("name", sorted((TRL_LOSSES & LOSSES.keys()) - {"sft"}))
def test_our_losses_of_trl_names_are_trl(name: str, make_trainer: Make, base: Any) -> None:
    """γ is so small that it does not count, but it sends the loss through the registry."""
    fields = {"loss_type": [name], "label_smoothing": 0.05 if name == "robust" else 0.0}
    ours = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), sft_gamma=1e-12, **fields)
    theirs = make_trainer(DPOTrainer, DPOConfig, model=moved(base), **fields)
    assert ours.args.extends_trl
    assert_same(ours, theirs)


@torch.no_grad()
def pair_of(trainer: Any) -> PairLogps:
    """The first batch's log-probabilities, computed from the plain forward: prompt tokens must not count."""
    batch = next(iter(trainer.get_train_dataloader()))
    sums = []
    for model in (trainer.model, trainer.ref_model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        per_token = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        sums += (per_token * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    return PairLogps(*sums, *batch["completion_mask"].sum(1).chunk(2))


def test_flex_and_gamma_by_hand(make_trainer: Make, base: Any) -> None:
    fields = {"beta_chosen": 0.2, "beta_rejected": 0.03, "sft_gamma": 0.05}
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), **fields)
    loss, _ = first_loss(trainer)
    expected = preference_loss("flex", pair_of(trainer), beta_chosen=0.2, beta_rejected=0.03, gamma=0.05).loss.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dpop", "slic", "ipo_sum", "cal_dpo", "simpo", "orpo"])
def test_our_own_names(name: str, make_trainer: Make, base: Any) -> None:
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), loss_type=[name], dpop_lambda=3.0)
    loss, _ = first_loss(trainer)
    options = {"dpop_lambda": 3.0} if name == "dpop" else {}
    expected = preference_loss(name, pair_of(trainer), **options).loss.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_mixture_weights_ours_and_theirs(make_trainer: Make, base: Any) -> None:
    mixed = {"loss_type": ["dpop", "sft", "discopop"], "loss_weights": [0.5, 2.0, 0.25]}
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), **mixed)
    loss, _ = first_loss(trainer)
    parts = [
        first_loss(make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), loss_type=[n]))[0]
        for n in mixed["loss_type"]
    ]
    total = sum(w * part for w, part in zip(mixed["loss_weights"], parts, strict=True))
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    assert trainer.loss_types == mixed["loss_type"] and not trainer.precompute_ref_logps


def test_trl_sft_is_gamma_per_token_when_lengths_are_equal(make_trainer: Make, base: Any, digits: Any) -> None:
    equal = digits.filter(lambda row: len(row["chosen"]) == 4)
    extra = {"train_dataset": equal, "ref_model": copy.deepcopy(base)}
    by_token = {"sft_gamma": 0.25, "sft_reduction": "token"}
    ours = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), extra=extra, **by_token)
    theirs = make_trainer(
        DPOTrainer, DPOConfig, model=moved(base), extra=extra, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.25]
    )
    assert_same(ours, theirs)
    # Five tokens each, the end token included.
    by_sequence = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), extra=extra, sft_gamma=0.05)
    assert_same(by_sequence, theirs)


def test_lora_leaves_the_reference_alone(make_trainer: Make, base: Any) -> None:
    trainer = make_trainer(
        FlexDPOTrainer, FlexDPOConfig, extra={"peft_config": lora()}, beta_rejected=0.02, learning_rate=1e-2
    )
    batch = next(iter(trainer.get_train_dataloader()))
    before = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.train()
    after = trainer.compute_ref_log_probs(trainer.model, batch)
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained)


def test_dropout_is_off_in_the_reference(make_trainer: Make, small_models: dict) -> None:
    """GPT-2 has dropout 0.1; at the start policy and reference are the same, so Δ must be exactly 0."""
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=small_models["gpt2"], beta_rejected=0.02)
    loss, _ = first_loss(trainer)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
def test_architectures_train(architecture: str, make_trainer: Make, small_models: dict) -> None:
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=small_models[architecture], dpo_lambda=0.2, max_steps=2)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_dpo_lambda_is_an_alias(make_trainer: Make, base: Any) -> None:
    one = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), beta_chosen=0.2, dpo_lambda=0.25)
    two = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), beta_chosen=0.2, beta_rejected=0.05)
    assert_same(one, two, 0.0)


def test_metrics_use_each_halfs_beta(make_trainer: Make, base: Any) -> None:
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=moved(base), beta_chosen=0.2, beta_rejected=0.02)
    first_loss(trainer)
    metrics, pair = trainer._metrics["train"], pair_of(trainer)
    assert metrics["rewards/chosen"][0] == pytest.approx(float(0.2 * pair.delta_chosen.mean()), abs=1e-5)
    assert metrics["rewards/rejected"][0] == pytest.approx(float(0.02 * pair.delta_rejected.mean()), abs=1e-5)
    plus, minus = float(pair.delta_chosen.mean()), float(pair.delta_rejected.mean())
    assert metrics["dpo3d/chosen_share"][0] == pytest.approx(plus / (plus - minus), rel=1e-2)
    w = torch.sigmoid(-pair.margin(0.2, 0.02))
    assert metrics["dpo3d/weight_rejected"][0] == pytest.approx(float(0.02 * w.mean()), abs=1e-6)


def test_mixture_of_experts_keeps_its_auxiliary_loss(make_trainer: Make) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=15,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = MixtralForCausalLM(config)
    ours = make_trainer(FlexDPOTrainer, FlexDPOConfig, model=model, beta_chosen=0.1)
    theirs = make_trainer(DPOTrainer, DPOConfig, model=model)
    assert_same(ours, theirs)
    assert "aux_loss" in ours._metrics["train"]


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.06), ("cosine", 0.06), ("constant", 0.1)])
def test_schedule(kind: str, middle: float, tmp_path: Path) -> None:
    final = None if kind == "constant" else 0.02
    config = FlexDPOConfig(str(tmp_path), bf16=False, beta_rejected_schedule=kind, beta_rejected_final=final)
    assert config.beta_rejected_at(0.0) == pytest.approx(0.1)
    assert config.beta_rejected_at(0.5) == pytest.approx(middle)
    assert config.beta_rejected_at(1.0) == pytest.approx(final or 0.1)


def test_evaluation_and_config_round_trip(make_trainer: Make, digits: Any) -> None:
    trainer = make_trainer(FlexDPOTrainer, FlexDPOConfig, extra={"eval_dataset": digits}, beta_rejected=0.02)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.args.to_dict()["beta_rejected"] == 0.02


ERRORS: list[tuple[dict, type[Exception], str]] = [
    ({"loss_type": ["dpoo"]}, UserError, "no loss named 'dpoo'"),
    ({"beta_chosen": -0.1}, UserError, "beta_chosen is -0.1"),
    ({"beta_rejected": -1.0}, UserError, "beta_rejected is -1.0"),
    ({"beta_rejected": 0.1, "dpo_lambda": 0.5}, UserError, "both dpo_lambda and beta_rejected"),
    ({"beta_rejected_schedule": "step"}, UserError, "expected constant, linear or cosine"),
    ({"beta_rejected_schedule": "linear"}, UserError, "go together"),
    ({"sft_gamma": -1.0}, UserError, "gamma is -1.0"),
    ({"sft_gamma": 0.1, "sft_reduction": "words"}, UserError, "expected sequence or token"),
    ({"beta_rejected": 0.02, "loss_type": ["aot"]}, NotImplementedError, "'aot' has one beta"),
    ({"beta_rejected": 0.02, "loss_type": ["aot_unpaired"]}, NotImplementedError, "'aot_unpaired' has one beta"),
    ({"beta_rejected": 0.02, "loss_type": ["ipo"]}, NotImplementedError, "'ipo' has one beta"),
    ({"beta_rejected": 0.02, "f_divergence_type": "forward_kl"}, NotImplementedError, "f_divergence_type 'forward_kl'"),
    ({"sft_gamma": 0.1, "use_weighting": True}, NotImplementedError, "use_weighting"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), ERRORS)
def test_config_errors(fields: dict, kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        FlexDPOConfig(str(tmp_path), bf16=False, **fields)


def test_trainer_errors(make_trainer: Make) -> None:
    with pytest.raises(UserError, match="args is a DPOConfig, expected a FlexDPOConfig"):
        make_trainer(FlexDPOTrainer, DPOConfig)
    with pytest.raises(UserError, match="only in memory and there is no ref_model"):
        make_trainer(FlexDPOTrainer, FlexDPOConfig, extra={"ref_model": None})
