import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gp_ensemble import (
    CacheError,
    ClassNameError,
    EncoderMismatchError,
    FeatureError,
    FeatureTable,
    GPEnsembleClassifier,
    PriorMissingError,
    ZeroShotClassifier,
)
from gp_ensemble.features import unit_rows
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

Problem = dict[str, Any]

EXPECTED_TO_FAIL = {
    "check_estimators_dtypes": "its integers hold an all-zero row, which has no direction and is refused"
}


def fitted(problem: Problem, **kwargs: object) -> GPEnsembleClassifier:
    return GPEnsembleClassifier(**kwargs).fit(problem["X"], problem["y"], problem["z"])


def test_scikit_learns_checks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(GPEnsembleClassifier(), expected_failed_checks=EXPECTED_TO_FAIL, on_skip=None)
    status = {r["check_name"]: r["status"] for r in results}
    assert {n for n, s in status.items() if s not in ("passed", "xfail")} <= {
        "check_array_api_input"
    }  # needs an env variable
    assert {n for n, s in status.items() if s == "xfail"} == set(EXPECTED_TO_FAIL)


def test_it_learns(problem: Problem) -> None:
    clf = fitted(problem)
    accuracy = clf.score(problem["X_test"], problem["y_test"], problem["z_test"])
    zero_shot = np.mean(clf.classes_[problem["z_test"].argmax(1)] == problem["y_test"])
    assert accuracy > 0.85 and accuracy >= zero_shot
    assert sum(clf.encoder_weights_.values()) == pytest.approx(1.0) and clf.loo_accuracy_ > 0.8
    proba = clf.predict_proba(problem["X_test"], problem["z_test"])
    np.testing.assert_allclose(proba.sum(1), 1.0)


def test_order_of_rows_encoders_and_classes_does_not_matter(problem: Problem) -> None:
    base = fitted(problem, objective="none").predict_proba(problem["X_test"], problem["z_test"])
    order = np.random.default_rng(0).permutation(len(problem["y"]))
    X = {name: problem["X"][name][order] for name in reversed(list(problem["X"]))}
    moved = GPEnsembleClassifier(objective="none").fit(X, problem["y"][order], problem["z"][order])
    np.testing.assert_allclose(moved.predict_proba(problem["X_test"], problem["z_test"]), base, atol=1e-8)
    names = {"cat": "z", "dog": "y", "fox": "x", "owl": "w"}
    renamed = GPEnsembleClassifier(objective="none").fit(
        problem["X"], np.asarray([names[c] for c in problem["y"]]), problem["z"][:, ::-1]
    )
    got = renamed.predict_proba(problem["X_test"], problem["z_test"][:, ::-1])
    np.testing.assert_allclose(got[:, ::-1], base, atol=1e-8)


def test_scale_of_an_encoder_or_of_the_logits_does_not_matter(problem: Problem) -> None:
    base = fitted(problem).predict_proba(problem["X_test"], problem["z_test"])
    X, X_test = ({n: a * (1000 if n == "dino" else 1) for n, a in problem[k].items()} for k in ("X", "X_test"))
    got = (
        GPEnsembleClassifier()
        .fit(X, problem["y"], 50 * problem["z"] + 3)
        .predict_proba(X_test, 50 * problem["z_test"] + 3)
    )
    np.testing.assert_allclose(got, base, atol=1e-6)


def test_test_images_do_not_move_the_centre(problem: Problem) -> None:
    clf = fitted(problem)
    whole = clf.predict_proba(problem["X_test"], problem["z_test"])
    for i in range(5):
        one = clf.predict_proba({n: a[i : i + 1] for n, a in problem["X_test"].items()}, problem["z_test"][i : i + 1])
        np.testing.assert_allclose(one[0], whole[i], atol=1e-12)


def test_batches_are_singles(problem: Problem) -> None:
    a, b = fitted(problem), fitted(problem, batch_size=7)
    for method in ("predict_proba", "predict"):
        left, right = (getattr(c, method)(problem["X_test"], problem["z_test"]) for c in (a, b))
        assert np.all(left == right) or np.allclose(left, right, atol=1e-12)


@pytest.mark.parametrize("solver", ["cholesky", "primal", "nystrom"])
@pytest.mark.parametrize("mean", ["logits", "probs", "zero"])
def test_save_and_load_answer_with_the_same_bits(problem: Problem, tmp_path: Path, solver: str, mean: str) -> None:
    clf = fitted(problem, solver=solver, mean=mean, kernel="linear", link="mean_field")
    loaded = GPEnsembleClassifier.load(clf.save(tmp_path / "clf"))
    for name in ("predict", "predict_proba", "contributions"):
        a, b = (getattr(c, name)(problem["X_test"], problem["z_test"]) for c in (clf, loaded))
        for x, y in zip(*((v.values() if isinstance(v, dict) else [v]) for v in (a, b)), strict=True):
            assert np.array_equal(x, y)
    assert np.array_equal(clf.ood_score(problem["X_test"]), loaded.ood_score(problem["X_test"]))
    assert loaded.hyperparameters_ == clf.hyperparameters_ and loaded.get_params() == clf.get_params()
    assert sorted(p.suffix for p in (tmp_path / "clf").iterdir()) == [".json", ".safetensors"]


def test_updates_are_refits_at_the_same_hyperparameters(problem: Problem, tmp_path: Path) -> None:
    owl = problem["y"] == "owl"
    some = np.flatnonzero(~owl)[:12]
    more = np.setdiff1d(np.flatnonzero(~owl), some)

    def part(index: np.ndarray) -> dict[str, np.ndarray]:
        return {n: a[index] for n, a in problem["X"].items()}

    clf = GPEnsembleClassifier().fit(part(some), problem["y"][some], problem["z"][some, :3])
    clf.add_examples(part(more), problem["y"][more], problem["z"][more, :3])
    seen = np.r_[some, more]
    clf.add_class("owl", part(owl), prior_logits=problem["z"][owl], support_prior_logits=problem["z"][seen, 3])
    order = np.r_[seen, np.flatnonzero(owl)]

    def refit(index: np.ndarray) -> np.ndarray:
        other = clone(clf).fit(part(some), problem["y"][some], problem["z"][some, :3])
        features = other.normaliser_(part(index), dtype=torch.float64)
        targets = torch.as_tensor((problem["y"][index][:, None] == clf.classes_).astype(float))
        other.prior_bias_ = torch.cat([other.prior_bias_, torch.zeros(1)])
        other.gp_.condition(features, targets, prior_logits=torch.as_tensor(problem["z"][index]) - other.prior_bias_)
        other.classes_ = clf.classes_
        return other.predict_dist(problem["X_test"], problem["z_test"])

    got, expected = clf.predict_dist(problem["X_test"], problem["z_test"]), refit(order)
    np.testing.assert_allclose(got.mean, expected.mean, atol=1e-8)
    np.testing.assert_allclose(got.variance, expected.variance, atol=1e-8)
    clf = GPEnsembleClassifier.load(clf.save(tmp_path / "grown"))
    clf.forget([0, 5, 20])
    got, expected = clf.predict_dist(problem["X_test"], problem["z_test"]), refit(np.delete(order, [0, 5, 20]))
    np.testing.assert_allclose(got.mean, expected.mean, atol=1e-8)
    np.testing.assert_allclose(got.variance, expected.variance, atol=1e-8)


def test_forgetting_with_recentring_forgets_the_centre_too(problem: Problem) -> None:
    gone = [1, 2, 9]
    clf = fitted(problem, objective="none").forget(gone, recenter=True)
    rest = {n: np.delete(a, gone, axis=0) for n, a in problem["X"].items()}
    fresh = GPEnsembleClassifier(objective="none", temperature=clf.temperature_)
    fresh.fit(rest, np.delete(problem["y"], gone), np.delete(problem["z"], gone, axis=0))
    with torch.no_grad():  # the scale of the mean starts from the data; everything else does not
        fresh.gp_.mean.log_scale.copy_(clf.gp_.mean.log_scale)
        fresh.gp_.condition(fresh.gp_.features, fresh.gp_.targets, prior_logits=fresh.gp_.prior_logits)
    a, b = (c.predict_dist(problem["X_test"], problem["z_test"]).mean for c in (clf, fresh))
    np.testing.assert_allclose(a, b, atol=1e-8)


def test_a_zero_shot_classifier_gives_the_logits_by_name(problem: Problem) -> None:
    names = ["owl", "cat", "fox", "dog", "yak"]
    columns = [["cat", "dog", "fox", "owl"].index(n) for n in names[:-1]]
    text = np.c_[problem["text"][:, columns], np.ones(7)]
    zero_shot = ZeroShotClassifier(names, text, 1.0)
    by_name = GPEnsembleClassifier(zero_shot=zero_shot).fit(problem["X"], problem["y"])
    z, z_test = (unit_rows(problem[k]["clip"]) @ problem["text"] for k in ("X", "X_test"))
    by_hand = GPEnsembleClassifier().fit(problem["X"], problem["y"], z)
    np.testing.assert_allclose(
        by_name.predict_proba(problem["X_test"]), by_hand.predict_proba(problem["X_test"], z_test), atol=1e-4
    )
    assert by_name.predict(problem["X_test"]).tolist() == by_hand.predict(problem["X_test"], z_test).tolist()
    table = FeatureTable(problem["X_test"], prior_logits=zero_shot.logits(problem["X_test"]["clip"]), class_names=names)
    assert by_hand.predict(table).tolist() == by_name.predict(problem["X_test"]).tolist()
    new = {n: a[:2] + 5 for n, a in problem["X"].items()}
    grown = by_name.add_class("yak", new)
    assert grown.predict(new).tolist() == ["yak", "yak"]
    with pytest.raises(ClassNameError, match="no zero-shot column for class gnu"):
        grown.add_class("gnu", new)


def test_a_saved_zero_shot_classifier_comes_back(problem: Problem, tmp_path: Path) -> None:
    zero_shot = ZeroShotClassifier(["cat", "dog", "fox", "owl"], problem["text"], 12.0, bias=-3.0)
    clf = GPEnsembleClassifier(zero_shot=zero_shot).fit(problem["X"], problem["y"])
    loaded = GPEnsembleClassifier.load(clf.save(tmp_path / "clf"))
    assert np.array_equal(clf.predict_proba(problem["X_test"]), loaded.predict_proba(problem["X_test"]))


def test_two_dimensional_input_is_cut_into_encoders(problem: Problem) -> None:
    X, X_test = (np.concatenate(list(problem[k].values()), axis=1) for k in ("X", "X_test"))
    cuts = {"clip": slice(0, 7), "dino": slice(7, 16), "mae": slice(16, 21)}
    cut = GPEnsembleClassifier(encoders=cuts).fit(X, problem["y"], problem["z"])
    expected = fitted(problem).predict_proba(problem["X_test"], problem["z_test"])
    np.testing.assert_allclose(cut.predict_proba(X_test, problem["z_test"]), expected, atol=1e-12)


def test_scikit_learns_tools(problem: Problem) -> None:
    X = np.concatenate(list(problem["X"].values()), axis=1)
    cuts = {"clip": slice(0, 7), "rest": slice(7, 21)}
    assert cross_val_score(GPEnsembleClassifier(encoders=cuts), X, problem["y"], cv=3).mean() > 0.7
    search = GridSearchCV(GPEnsembleClassifier(), {"kernel": ["rbf", "linear"]}, cv=2).fit(X, problem["y"])
    assert set(search.cv_results_["param_kernel"]) == {"rbf", "linear"}
    assert make_pipeline(StandardScaler(), GPEnsembleClassifier()).fit(X, problem["y"]).score(X, problem["y"]) > 0.9
    table = FeatureTable(problem["X"], labels=problem["y"])
    assert cross_val_score(GPEnsembleClassifier(), table, problem["y"], cv=3).mean() > 0.7
    restored = pickle.loads(pickle.dumps(fitted(problem)))
    assert restored.score(problem["X_test"], problem["y_test"], problem["z_test"]) > 0.8


def test_variance_finds_strangers_and_bad_labels_are_suspected(problem: Problem) -> None:
    clf = fitted(problem)
    strangers = {n: np.random.default_rng(1).normal(size=a.shape) * 3 for n, a in problem["X_test"].items()}
    assert clf.ood_score(strangers).mean() > clf.ood_score(problem["X_test"]).mean()
    for kind in ("max_prob", "entropy"):
        assert clf.ood_score(problem["X_test"], kind, prior_logits=problem["z_test"]).shape == (30,)
    wrong = problem["y"].copy()
    wrong[4] = "dog" if wrong[4] != "dog" else "cat"
    assert 4 in GPEnsembleClassifier().fit(problem["X"], wrong, problem["z"]).suspect_labels(3)


def test_suggestions_are_the_largest_conditional_variances(problem: Problem) -> None:
    clf = fitted(problem)
    picked = clf.suggest(problem["X_test"], 3)
    assert picked[0] == clf.predict_dist(problem["X_test"], problem["z_test"]).variance.argmax()
    grown = fitted(problem).add_examples(
        {n: a[picked[:1]] for n, a in problem["X_test"].items()}, ["cat"], problem["z_test"][picked[:1]]
    )
    variance = grown.predict_dist(problem["X_test"], problem["z_test"]).variance
    variance[picked[0]] = -1
    assert picked[1] == variance.argmax() and len(set(picked.tolist())) == 3


def test_abstention_and_sets(problem: Problem) -> None:
    clf = fitted(problem)
    half = clf.predict(problem["X_test"], problem["z_test"], reject_at=0.5)
    assert 0 < half.mask.sum() < 30
    assert clf.predict(problem["X_test"], problem["z_test"], reject_at=1.0).mask.sum() <= half.mask.sum()
    small, large = (clf.predict_set(problem["X_test"], problem["z_test"], alpha=a) for a in (0.5, 0.01))
    assert small.any(1).all() and (large | ~small).all() and large.sum() > small.sum()


def test_float32_and_float16_features_agree(problem: Problem) -> None:
    base = fitted(problem, objective="none").predict_proba(problem["X_test"], problem["z_test"])
    single = fitted(problem, objective="none", dtype="float32").predict_proba(problem["X_test"], problem["z_test"])
    np.testing.assert_allclose(single, base, atol=1e-3)
    half = {n: torch.as_tensor(a, dtype=torch.bfloat16) for n, a in problem["X"].items()}
    clf = GPEnsembleClassifier().fit(half, problem["y"], problem["z"])
    assert clf.score(problem["X_test"], problem["y_test"], problem["z_test"]) > 0.8


def test_tuning_on_whole_classes_keeps_all_columns(problem: Problem) -> None:
    clf = fitted(problem, tune_max_points=13, loo_max_points=5, random_state=0)
    assert clf.tuned_.rows == 12 and clf.gp_.targets.shape == (24, 4)
    assert clf.score(problem["X_test"], problem["y_test"], problem["z_test"]) > 0.8


def test_errors(problem: Problem, tmp_path: Path) -> None:
    X, y, z = problem["X"], problem["y"], problem["z"]
    clf = fitted(problem)
    with pytest.raises(PriorMissingError, match="without them"):
        clf.predict(problem["X_test"])
    with pytest.raises(PriorMissingError, match="mean='logits'"):
        GPEnsembleClassifier(mean="logits").fit(X, y)
    with pytest.raises(EncoderMismatchError, match="missing: mae; extra: none"):
        clf.predict({n: X[n] for n in ("clip", "dino")}, z)
    with pytest.raises(EncoderMismatchError, match=r"dino \(8\)"):
        clf.predict({**X, "dino": X["dino"][:, :8]}, z)
    broken = {**X, "dino": X["dino"].copy()}
    broken["dino"][7, 2] = np.nan
    with pytest.raises(FeatureError, match=r"'dino' hold NaN or infinity .* row 7"):
        GPEnsembleClassifier().fit(broken, y)
    broken["dino"][7] = 0.0
    with pytest.raises(FeatureError, match="'dino' are all zero in row 7"):
        GPEnsembleClassifier().fit(broken, y)
    with pytest.raises(FeatureError, match="different numbers of rows"):
        GPEnsembleClassifier().fit({**X, "mae": X["mae"][:-1]}, y)
    with pytest.raises(FeatureError, match="no encoder"):
        GPEnsembleClassifier().fit({}, y)
    with pytest.raises(ValueError, match="one class"):
        GPEnsembleClassifier().fit(X, np.full(24, "cat"))
    with pytest.raises(ValueError, match="expected 2 or more"):
        GPEnsembleClassifier().fit({n: a[:1] for n, a in X.items()}, y[:1])
    with pytest.raises(ValueError, match="23 labels"):
        GPEnsembleClassifier().fit(X, y[:-1])
    with pytest.raises(ValueError, match=r"prior_logits of shape \(24, 3\)"):
        GPEnsembleClassifier().fit(X, y, z[:, :3])
    with pytest.raises(ValueError, match="positive numbers"):
        GPEnsembleClassifier().fit(X, y, z, noise_scale=np.zeros(24))
    with pytest.raises(NotFittedError):
        GPEnsembleClassifier().predict(X)
    with pytest.raises(ValueError, match="unknown class yak"):
        clf.add_examples({n: a[:1] for n, a in X.items()}, ["yak"], z[:1])
    with pytest.raises(PriorMissingError, match="support_prior_logits"):
        clf.add_class("yak", {n: a[:1] for n, a in X.items()})
    with pytest.raises(ValueError, match="there are 24 training images"):
        clf.forget([24])
    with pytest.raises(ValueError, match="2 or more"):
        clf.forget(range(23))
    for bad in ({"mean": "median"}, {"objective": "best"}, {"link": "probit"}, {"dtype": "int8"}, {"kernel": "cubic"}):
        with pytest.raises(ValueError, match="expected"):
            GPEnsembleClassifier(**bad).fit(X, y, z)
    doubled, other = {n: np.r_[a, a[:1]] for n, a in X.items()}, "owl" if y[0] != "owl" else "cat"
    with pytest.warns(UserWarning, match="different label"):
        GPEnsembleClassifier().fit(doubled, np.append(y, other))
    with pytest.raises(CacheError, match="does not exist"):
        GPEnsembleClassifier.load(tmp_path / "nothing")
    clf.save(tmp_path / "clf")
    (tmp_path / "clf" / "tensors.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CacheError, match="damaged"):
        GPEnsembleClassifier.load(tmp_path / "clf")
    (tmp_path / "clf" / "config.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CacheError, match="damaged"):
        GPEnsembleClassifier.load(tmp_path / "clf")


def test_the_class_count_and_memory_estimate_are_checked_before_work(problem: Problem) -> None:
    with pytest.raises(MemoryError, match="GiB"):
        fitted(problem, max_memory=1e-9)
