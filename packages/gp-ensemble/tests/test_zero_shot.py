import numpy as np
import pytest
from gp_ensemble import ClassNameError, ZeroShotClassifier
from gp_ensemble.errors import UserError


def test_logits_are_scaled_cosines_in_the_order_asked_for() -> None:
    weights = np.eye(3)[:, [0, 2]]
    zero_shot = ZeroShotClassifier(["cat", "dog"], weights, 10.0, bias=-1.0)
    features = np.asarray([[3.0, 0.0, 4.0]])
    np.testing.assert_allclose(zero_shot.logits(features), [[5.0, 7.0]], rtol=1e-6)
    np.testing.assert_allclose(zero_shot.logits(features, ["dog", "cat"]), [[7.0, 5.0]], rtol=1e-6)
    assert zero_shot.predict(features).tolist() == ["dog"]


def test_errors() -> None:
    with pytest.raises(ClassNameError, match="there twice: cat"):
        ZeroShotClassifier(["cat", "cat"], np.eye(2))
    with pytest.raises(UserError, match=r"expected .dimensions, classes."):
        ZeroShotClassifier(["cat"], np.eye(2))
    with pytest.raises(UserError, match="NaN"):
        ZeroShotClassifier(["cat"], np.full((2, 1), np.nan))
    zero_shot = ZeroShotClassifier(["cat", "dog"], np.eye(2))
    with pytest.raises(ClassNameError, match="no zero-shot column for class yak"):
        zero_shot.logits(np.eye(2), ["cat", "yak"])
    with pytest.raises(UserError, match="'clip'"):
        zero_shot.logits(np.ones((1, 3)))
