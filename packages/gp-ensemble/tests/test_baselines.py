from typing import Any

import numpy as np
import pytest
from gp_ensemble import baselines
from gp_ensemble.baselines import Tuned
from gp_ensemble.errors import PriorMissingError, UserError
from gp_ensemble.features import unit_rows
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

Problem = dict[str, Any]
EVERY = [
    baselines.ZeroShot(),
    baselines.LinearProbe(),
    baselines.LinearProbe("dino"),
    baselines.LinearProbeEnsemble(),
    baselines.TipAdapter(),
    baselines.TipAdapterF(epochs=2),
    baselines.CacheFusion(),
    baselines.GDA(),
    baselines.LPPlusPlus(),
    baselines.KernelRidge(),
    baselines.DirichletGP(steps=5),
    baselines.SklearnGPC(),
]


@pytest.mark.parametrize("baseline", EVERY, ids=lambda b: repr(b)[:24])
def test_each_gives_probabilities_and_says_who_tuned_it(baseline: baselines.Baseline, problem: Problem) -> None:
    baseline.fit(problem["X"], problem["y"], problem["z"])
    proba = baseline.predict_proba(problem["X_test"], problem["z_test"])
    np.testing.assert_allclose(proba.sum(1), 1, atol=1e-6)
    labels = baseline.predict(problem["X_test"], problem["z_test"])
    assert (labels == problem["y_test"]).mean() > 0.5 and baseline.tuned_on


def test_zero_shot_is_the_logits_and_tip_without_cache_is_zero_shot(problem: Problem) -> None:
    zero_shot = baselines.ZeroShot().fit(problem["X"], problem["y"], problem["z"])
    expected = zero_shot.predict_proba(problem["X_test"], problem["z_test"])
    for other in (baselines.TipAdapter(alpha=0), baselines.CacheFusion(alpha=0), baselines.GDA(alpha=0)):
        other.fit(problem["X"], problem["y"], problem["z"])
        np.testing.assert_allclose(other.predict_proba(problem["X_test"], problem["z_test"]), expected)


def test_linear_probe_is_scikit_learns(problem: Problem) -> None:
    ours = baselines.LinearProbe("clip").fit(problem["X"], problem["y"]).predict_proba(problem["X_test"])
    theirs = LogisticRegression(C=10, max_iter=1000).fit(unit_rows(problem["X"]["clip"]), problem["y"])
    np.testing.assert_allclose(ours, theirs.predict_proba(unit_rows(problem["X_test"]["clip"])))


def test_tip_is_its_formula(problem: Problem) -> None:
    tip = baselines.TipAdapter(2.0, 3.0).fit(problem["X"], problem["y"], problem["z"])
    f, keys = unit_rows(problem["X_test"]["clip"]), unit_rows(problem["X"]["clip"])
    one_hot = (problem["y"][:, None] == tip.classes_).astype(float)
    logits = problem["z_test"] + 2 * np.exp(-3 * (1 - f @ keys.T)) @ one_hot
    np.testing.assert_allclose(tip._logits({"clip": f}, problem["z_test"]), logits)


def test_gda_agrees_with_scikit_learns_discriminant_where_shrinkage_is_small(problem: Problem) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 2000)
    x = rng.normal(size=(3, 4))[y] * 2 + rng.normal(size=(6000, 4))
    gda = baselines.GDA(alpha=1e6).fit({"a": x}, y, np.zeros((6000, 3)))
    lda = LinearDiscriminantAnalysis().fit(unit_rows(x), y)
    assert (gda.predict({"a": x}, np.zeros((6000, 3))) == lda.predict(unit_rows(x))).mean() > 0.99


def test_fine_tuning_lowers_the_training_loss(problem: Problem) -> None:
    y = np.searchsorted(np.unique(problem["y"]), problem["y"])
    before = baselines.TipAdapter().fit(problem["X"], problem["y"], problem["z"])
    after = baselines.TipAdapterF(epochs=30).fit(problem["X"], problem["y"], problem["z"])
    losses = [-np.log(b.predict_proba(problem["X"], problem["z"])[np.arange(24), y]).mean() for b in (before, after)]
    assert losses[1] < losses[0]


def test_tuned_takes_the_best_of_its_grid(problem: Problem) -> None:
    held_out = {"X_val": problem["X_test"], "y_val": problem["y_test"], "prior_val": problem["z_test"]}
    grid = {"alpha": (0.0, 1.0, 10.0), "beta": (1.0, 5.5)}
    tuned = Tuned(baselines.TipAdapter(), grid).fit(problem["X"], problem["y"], problem["z"], **held_out)
    scores = []
    for alpha in grid["alpha"]:
        for beta in grid["beta"]:
            plain = baselines.TipAdapter(alpha, beta).fit(problem["X"], problem["y"], problem["z"])
            scores.append((plain.predict(problem["X_test"], problem["z_test"]) == problem["y_test"]).mean())
    assert (tuned.predict(problem["X_test"], problem["z_test"]) == problem["y_test"]).mean() == max(scores)
    assert tuned.tuned_on == "the test set"


def test_errors(problem: Problem) -> None:
    with pytest.raises(PriorMissingError, match="TipAdapter needs zero-shot logits"):
        baselines.TipAdapter().fit(problem["X"], problem["y"])
    with pytest.raises(UserError, match="one class"):
        baselines.LinearProbe().fit(problem["X"], ["cat"] * 24)
