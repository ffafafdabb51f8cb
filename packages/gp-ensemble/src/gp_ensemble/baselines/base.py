"""The interface of a baseline, and tuning on labelled images that are not training images."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.validation import check_is_fitted
from tenfold_shared.errors import UserError

from gp_ensemble.errors import PriorMissingError
from gp_ensemble.features import FeatureTable, unit_rows
from gp_ensemble.zero_shot import columns_by_name


class Baseline(ClassifierMixin, BaseEstimator):
    """A classifier of features. Subclasses give `_fit` and `_logits`."""

    tuned_on = "nothing (fixed defaults)"
    needs_prior = False
    fitting: tuple[str, ...] = ()
    """Parameters that matter in `fit`; the others act in prediction alone."""

    def fit(self, X: Mapping[str, Any], y: Any, prior_logits: Any = None) -> "Baseline":
        """X: encoder to (n, d_i). y: (n,). prior_logits: zero-shot logits (n, C), columns in the order of
        `classes_`."""
        self.classes_, numbers = np.unique(np.asarray(y), return_inverse=True)
        if len(self.classes_) < 2:
            raise UserError("all labels are of one class, expected 2 classes or more")
        self._fit(self._units(X), numbers, self._prior(X, prior_logits))
        self.fitted_ = True
        return self

    def predict_proba(self, X: Mapping[str, Any], prior_logits: Any = None) -> np.ndarray:
        """(n, C)."""
        check_is_fitted(self, "fitted_")
        return softmax(self._logits(self._units(X), self._prior(X, prior_logits)), axis=1)

    def predict(self, X: Mapping[str, Any], prior_logits: Any = None) -> np.ndarray:
        """(n,) labels."""
        return self.classes_[self.predict_proba(X, prior_logits).argmax(1)]

    def _fit(self, X: dict[str, np.ndarray], y: np.ndarray, z: np.ndarray) -> None:
        raise NotImplementedError

    def _logits(self, X: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
        """(n, C); `softmax` of them are the probabilities."""
        raise NotImplementedError

    def _units(self, X: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: unit_rows(np.asarray(array, dtype=np.float64)) for name, array in X.items()}

    def _prior(self, X: Mapping[str, Any], given: Any) -> np.ndarray:
        if given is None and isinstance(X, FeatureTable) and X.prior_logits is not None:
            given = X.prior_logits[:, columns_by_name(X.class_names, self.classes_)]
        if given is None and self.needs_prior:
            raise PriorMissingError(f"{type(self).__name__} needs zero-shot logits", hint="pass prior_logits")
        return np.zeros((0, 0)) if given is None else np.asarray(given, dtype=np.float64)


def side_by_side(X: Mapping[str, np.ndarray], encoder: str | None) -> np.ndarray:
    """One encoder's features, or all of them concatenated when None."""
    return np.concatenate(list(X.values()), axis=1) if encoder is None else X[encoder]


class Tuned(Baseline):
    """A baseline whose hyper-parameters are the best of a grid on labelled images given to `fit`.

    grid: parameter to values. on: what those images are, for the tables.
    """

    def __init__(
        self, baseline: Baseline, grid: Mapping[str, Sequence[Any]] | None = None, *, on: str = "the test set"
    ):
        self.baseline = baseline
        self.grid = grid
        self.on = on

    @property
    def tuned_on(self) -> str:  # type: ignore[override]
        return self.on

    def fit(
        self,
        X: Mapping[str, Any],
        y: Any,
        prior_logits: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        prior_val: Any = None,
    ) -> "Tuned":
        """X_val, y_val: the images that choose."""
        grid = self.grid or {}
        best = -1.0
        fitted = None
        for values in itertools.product(*grid.values()):
            candidate = clone(self.baseline).set_params(**dict(zip(grid, values, strict=True)))
            # Only parameters that matter in fitting need another fit; the rest act in prediction alone.
            if fitted is None or any(name in candidate.fitting for name in grid):
                fitted = candidate.fit(X, y, prior_logits)
            else:
                fitted.set_params(**dict(zip(grid, values, strict=True)))
            score = float((fitted.predict(X_val, prior_val) == np.asarray(y_val)).mean())
            if score > best:
                best, self.best_params_ = score, dict(zip(grid, values, strict=True))
        self.best_ = clone(self.baseline).set_params(**self.best_params_).fit(X, y, prior_logits)
        self.classes_ = self.best_.classes_
        self.fitted_ = True
        return self

    def predict_proba(self, X: Mapping[str, Any], prior_logits: Any = None) -> np.ndarray:
        return self.best_.predict_proba(X, prior_logits)
