import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo3d import plots, toy
from dpo3d.losses import PairLogps, preference_loss
from tenfold_shared.errors import UserError

FAST = toy.Settings(width=16, steps=40, sft_steps=300)


@pytest.fixture(scope="module")
def world() -> toy.World:
    return toy.pretrain([1, 2, 3, 4], [0, 1], FAST)


def test_supervision_fits_the_paper_table() -> None:
    world = toy.pretrain([1, 4], [0], toy.Settings(sft_steps=300))
    assert world.reference[0, :, :4].exp().sub(0.12).abs().max() < 0.02
    assert world.reference[1, :, 8].exp().sub(0.8).abs().max() < 0.05
    torch.testing.assert_close(world.reference.exp().sum(-1), torch.ones(2, 4))


def test_rejected_answers_are_a_permutation(world: toy.World) -> None:
    assert all(sorted(row) == [4, 5, 6, 7] for row in world.rejected.tolist())


@pytest.mark.parametrize("name", ["dpo", "sft.1", "policy-gradient"])
def test_stacked_runs_equal_single_ones(name: str, world: toy.World) -> None:
    stacked = toy.train(world, name)
    alone = toy.train(toy.pretrain([2], [1], FAST), name)
    torch.testing.assert_close(stacked.logps[:, 3], alone.logps[:, 0], rtol=1e-3, atol=1e-4)


def test_first_gradient_is_the_registered_loss(world: toy.World) -> None:
    run = toy.train(world, "flex.02", toy.Settings(width=16, steps=1))
    pair = PairLogps(*(x.flatten() for x in (run.chosen[0], run.rejected[0], run.chosen[0], run.rejected[0])))
    loss = preference_loss("flex", pair, beta_rejected=0.02).loss
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_masses(world: toy.World) -> None:
    run = toy.train(world, "dpo")
    total = run.chosen.exp() + run.rejected.exp() + run.off_pair
    torch.testing.assert_close(total, torch.ones_like(total))
    assert (run.others_chosen <= run.off_pair + 1e-6).all()
    by_hand = run.logps[-1, 0, 2].exp()[[0, 1, 3]].sum()
    torch.testing.assert_close(run.others_chosen[-1, 0, 2], by_hand)


def test_log_space_outlives_float32() -> None:
    world = toy.pretrain([1], [0], toy.Settings(sft_steps=100))
    run = toy.train(world, "flex.01", toy.Settings(steps=250))
    assert run.rejected[-1].mean() < -110 and run.rejected[-1].exp().max() < 1e-38
    chosen, rejected = run.gradients(beta_rejected=0.01)
    assert chosen.isfinite().all() and rejected.isfinite().all()


def test_the_band_holds_at_the_step_it_is_computed_for() -> None:
    """With plain gradient steps a β− inside the band lets no chosen answer fall in the mean."""
    world = toy.pretrain([1, 3], [0, 1], toy.Settings(width=16, sft_steps=300))
    plainly = toy.Settings(width=16, optimizer="sgd", learning_rate=0.1, steps=400)
    banded, plain = (toy.train(world, name, plainly).chosen.mean(-1) for name in ("band", "dpo"))
    worst = [(path[1:] - path[:-1]).amin(0) for path in (banded, plain)]
    assert (worst[0] > -3e-5).all() and (worst[1] < -5e-5).all()
    assert (banded[-1] > plain[-1] + 0.02).all()


def test_optimum_solves_the_regularised_problem(world: toy.World) -> None:
    best = world.optimum()
    score = world.reward.double() - world.settings.beta * (best - world.reference.double())
    # At the optimum r − β log(π*/π0) is the same for every answer.
    assert float((score - score[..., :1]).abs().max()) < 1e-6
    start = world.reference[:, 0, 0].double().exp()
    by_hand = start * math.exp(10) / (start * math.exp(10) + 1 - start)
    torch.testing.assert_close(best[:, 0, 0].exp(), by_hand)


def test_three_ds_and_a_remedy() -> None:
    """The behaviour in small: DPO stalls and drops the rejected, γ keeps the chosen rising."""
    world = toy.pretrain([1], [0, 1], toy.Settings(sft_steps=300))
    settings = toy.Settings(steps=300)
    (dpo,) = toy.outcomes(toy.train(world, "dpo", settings))
    (sft,) = toy.outcomes(toy.train(world, "sft.1", settings))
    assert dpo.chosen < 0.5 < 0.9 < sft.chosen and dpo.log10_rejected < -10 and dpo.off_pair > 0.5


def test_outcomes_and_what_did_not_reproduce(world: toy.World) -> None:
    found = [o for name in ("dpo", "flex.02") for o in toy.outcomes(toy.train(world, name))]
    assert len(found) == 8 and all(o.peak >= o.chosen for o in found)
    notes = toy.not_reproduced(found)
    assert any("the paper's curve, by eye, at 0.58" in note for note in notes)
    assert any("on-policy rejected" in note for note in notes)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_settings(activation: Any, optimizer: Any) -> None:
    settings = toy.Settings(width=8, activation=activation, optimizer=optimizer, steps=3, sft_steps=5)
    assert toy.train(toy.pretrain([1], [0], settings), "reinforce").logps.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(toy.METHODS) | {"sft", "robust"}))
def test_every_method_runs(name: str, world: toy.World) -> None:
    run = toy.train(world, name, toy.Settings(width=16, steps=2))
    assert run.logps.isfinite().all() and not torch.equal(run.logps[0], run.logps[-1])


def test_pictures(world: toy.World, tmp_path: Path) -> None:
    runs = [toy.train(world, name) for name in ("dpo", "sft.1")]
    files = [
        plots.likelihood_curves(runs, tmp_path / "curves"),
        plots.heat_maps(runs, tmp_path / "maps", scenario=1),
        plots.gradient_picture(runs[0], tmp_path / "gradients"),
    ]
    assert all(f.stat().st_size > 5000 and f.with_suffix(".svg").exists() for f in files)


def test_paper_tables_are_data() -> None:
    from importlib.resources import files

    tables = json.loads((files("dpo3d") / "data" / "paper_tables.json").read_text())
    assert tables["table_8"]["S1"][0] == 7.9 and len(tables["table_9"]["DPO"]) == 4


def test_errors(world: toy.World) -> None:
    with pytest.raises(UserError, match="scenario 5 does not exist"):
        toy.pretrain([5], [0])
    with pytest.raises(UserError, match="no scenario or no seed"):
        toy.pretrain([1], [])
    with pytest.raises(UserError, match=r"no method named 'magic'.*flex\.02"):
        toy.train(world, "magic")
    with pytest.raises(UserError, match="activation is 'selu'"):
        toy.Settings(activation="selu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="optimizer is 'lion'"):
        toy.Settings(optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="steps is 0"):
        toy.Settings(steps=0)
