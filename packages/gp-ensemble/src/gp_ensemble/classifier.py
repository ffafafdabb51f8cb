"""The estimator: scikit-learn's interface around normalisation, tuning, the Gaussian process and the link."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
from tenfold_shared.errors import UserError
from torch import Tensor

from gp_ensemble.errors import FeatureError, PriorMissingError
from gp_ensemble.features import Features, FeatureTable, Normaliser
from gp_ensemble.gp import SharedKernelGP, one_hot
from gp_ensemble.kernels import EnsembleKernel, rows
from gp_ensemble.links import TEMPERATURE, fit_temperature, get_link, temperature_width
from gp_ensemble.means import MEANS, PriorMean, ZeroMean, class_bias, margin
from gp_ensemble.solvers import make_solver, pivoted_cholesky
from gp_ensemble.tuning import choose_objective, tune
from gp_ensemble.zero_shot import ZeroShotClassifier, columns_by_name

OOD_SCORES = ("variance", "max_prob", "entropy")


@dataclass(frozen=True)
class Posterior:
    """mean (n, C) and variance (n,) of the latent function, and the noise variance of an observation."""

    mean: np.ndarray
    variance: np.ndarray
    noise: float


@dataclass(frozen=True)
class LooResult:
    """Each training image predicted from all others.

    mean (n, C); variance (n,) with the noise; proba (n, C). With one image per class the class of the left-out image
    has no example left, so this is no evidence of calibration.
    """

    mean: np.ndarray
    variance: np.ndarray
    proba: np.ndarray


class GPEnsembleClassifier(ClassifierMixin, BaseEstimator):
    """Low-shot classifier on the features of several frozen encoders (arXiv 2404.00312).

    X is a mapping from encoder to (n, d_i) array (a `FeatureTable`, a dict), or one 2-D array, which `encoders` cuts
    into column slices. y holds n labels. Zero-shot logits (n, C), columns in the order of `classes_`, are given as
    `prior_logits` to fit and predict alike, come with a `FeatureTable` (matched by name), or are computed by
    `zero_shot`. No data but the training images choose the hyper-parameters.

    kernel: "rbf", "linear", "matern52", a gpytorch kernel, or one of these per encoder.
    mean: "logits", "probs", "zero"; "auto" is "logits" with zero-shot logits and "zero" without.
    debias: subtract what the zero-shot logits favour each class by on the training images (`means.class_bias`).
    objective: "ml", "loo", "loo_ce", "none"; "auto" is "ml" up to two images in the smallest class, "loo_ce" above.
    link: "softmax", "argmax", "mean_field", "clip".
    prior_strength: factor of the log prior of the hyper-parameters; 0 removes it.
    center: subtract the training mean of each encoder's unit vectors.
    solver: "cholesky", "primal", "nystrom", "cg", "auto".
    encoders: name to slice of the columns of a 2-D X.
    prior_encoder: encoder whose features `zero_shot` takes; its own when None.
    zero_shot: a `ZeroShotClassifier`.
    temperature: of the link; chosen by leave-one-out when None.
    dtype: "float64", "float32"; "auto" is float64 up to 4000 training images.
    device: torch device.
    max_memory: GiB that fitting may use; what is free when None.
    tune_max_points: training images used for tuning; whole classes are drawn.
    loo_max_points: training images up to which the temperature is chosen on all of them.
    inducing_points: of the Nystrom solver.
    batch_size: images predicted at a time.
    random_state: of the draw of classes for tuning.

    After fitting: `classes_`, `gp_` (the `SharedKernelGP`), `tuned_`, `temperature_`, `prior_bias_`, `encoder_weights_`,
    `loo_`, `log_marginal_likelihood_`.
    """

    def __init__(
        self,
        kernel: Any = "rbf",
        mean: str = "auto",
        *,
        debias: bool = True,
        objective: str = "auto",
        link: str = "softmax",
        prior_strength: float = 1.0,
        center: bool = True,
        solver: str = "auto",
        encoders: Mapping[str, slice] | None = None,
        prior_encoder: str | None = None,
        zero_shot: ZeroShotClassifier | None = None,
        temperature: float | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        max_memory: float | None = None,
        tune_max_points: int = 2000,
        loo_max_points: int = 4000,
        inducing_points: int = 1000,
        batch_size: int = 1024,
        random_state: int | None = None,
    ):
        self.kernel = kernel
        self.mean = mean
        self.debias = debias
        self.objective = objective
        self.link = link
        self.prior_strength = prior_strength
        self.center = center
        self.solver = solver
        self.encoders = encoders
        self.prior_encoder = prior_encoder
        self.zero_shot = zero_shot
        self.temperature = temperature
        self.dtype = dtype
        self.device = device
        self.max_memory = max_memory
        self.tune_max_points = tune_max_points
        self.loo_max_points = loo_max_points
        self.inducing_points = inducing_points
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(
        self, X: Any, y: Any, prior_logits: Any = None, *, noise_scale: Sequence[float] | None = None
    ) -> "GPEnsembleClassifier":
        """Take in n labelled images.

        X, y, prior_logits: see the class. noise_scale: (n,) positive factors of the noise variance, for images whose
        label is trusted less (above 1) or more (below 1).

        Raises UserError or a class of `gp_ensemble.errors`, all of them ValueErrors.
        """
        raw = self._check_training(X)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        n = _length(raw)
        if len(y) != n:
            raise UserError(f"{n} rows of features and {len(y)} labels")
        if n < 2:
            raise UserError(f"{n} sample (n_samples=1), expected 2 or more training images")
        if len(self.classes_) < 2:
            raise UserError(f"all labels are of one class ({self.classes_[0]}), expected 2 classes or more")
        self._dtype = self._choose_dtype(n)
        self._device = torch.device(self.device)
        get_link(self.link)
        self.normaliser_, features = Normaliser.fit(raw, self.center, dtype=self._dtype, device=self._device)
        self._warn_duplicates(features, numbers)
        y_index = torch.as_tensor(numbers, device=self._device)
        targets = one_hot(y_index, len(self.classes_), self._dtype)
        z = self._prior_logits(X, raw, prior_logits, n)
        self.prior_bias_: Tensor | None = None
        if z is not None:
            self.prior_bias_ = class_bias(z, targets) if self.debias else torch.zeros_like(z[0])
            z = z - self.prior_bias_
        mean = self._make_mean(z)
        z = z if mean.needs_logits else None
        smallest = int(np.bincount(numbers).min())
        objective = choose_objective(self.objective, smallest)
        if smallest == 1 and self.prior_strength == 0 and objective != "none":
            warnings.warn(
                "a class has one image and prior_strength is 0: the images then hold only negative evidence for "
                "similarity, and tuning tends to a diagonal kernel",
                stacklevel=2,
            )
        self.gp_ = SharedKernelGP(EnsembleKernel(list(raw), self.kernel), mean)
        solver = make_solver(
            self.solver,
            self.gp_.kernel,
            rows=n,
            dimensions=sum(self.normaliser_.dims.values()),
            classes=len(self.classes_),
            dtype=self._dtype,
            device=self._device,
            max_memory=self.max_memory,
            inducing=self.inducing_points,
        )
        scale = None if noise_scale is None else self._noise_scale(noise_scale, n)
        self.tuned_ = tune(
            self.gp_,
            objective=objective,
            prior_strength=self.prior_strength,
            **self._subset(numbers, features, targets, z, scale),
        )
        self.gp_.condition(features, targets, prior_logits=z, noise_scale=scale, solver=solver)
        width = temperature_width(smallest)
        if self.temperature is not None:
            self.temperature_ = self.temperature
        elif self.link not in ("softmax", "mean_field") or self.solver == "cg" or width == 0:
            self.temperature_ = TEMPERATURE
        elif n <= self.loo_max_points:
            self.temperature_ = fit_temperature(self.gp_.leave_one_out().mean, y_index, width)
        else:
            subset = self._subset(numbers, features, targets, z, scale)
            small = SharedKernelGP(self.gp_.kernel, self.gp_.mean, self.gp_.noise).condition(**subset)
            self.temperature_ = fit_temperature(small.leave_one_out().mean, subset["targets"].argmax(1), width)
        self._loo: LooResult | None = None
        return self

    def predict(self, X: Any, prior_logits: Any = None, *, reject_at: float | None = None) -> np.ndarray:
        """Labels (n,), the largest posterior mean.

        reject_at: coverage in (0, 1]; the images whose confidence is below the one that this share of the training
        images reaches in leave-one-out are masked, and a masked array is returned.
        """
        mean, variance = self._mean_variance(X, prior_logits, variance=reject_at is not None)
        labels = self.classes_[mean.argmax(1).cpu().numpy()]
        if reject_at is None:
            return labels
        if not 0 < reject_at <= 1:
            raise UserError(f"reject_at is {reject_at}, expected a coverage above 0 and up to 1")
        threshold = np.quantile(self.loo_.proba.max(1), 1 - reject_at)
        confidence = get_link(self.link)(mean, variance, self.temperature_).amax(1).cpu().numpy()
        return np.ma.MaskedArray(labels, mask=confidence < threshold)

    def predict_proba(self, X: Any, prior_logits: Any = None) -> np.ndarray:
        """Probabilities (n, C) by the link."""
        mean, variance = self._mean_variance(X, prior_logits, variance=self.link in ("argmax", "mean_field"))
        return get_link(self.link)(mean, variance, self.temperature_).cpu().numpy()

    def score(self, X: Any, y: Any, prior_logits: Any = None) -> float:
        """Accuracy."""
        return float((self.predict(X, prior_logits) == np.asarray(y)).mean())

    def predict_dist(self, X: Any, prior_logits: Any = None) -> Posterior:
        """The posterior of the latent function."""
        mean, variance = self._mean_variance(X, prior_logits, variance=True)
        return Posterior(mean.cpu().numpy(), variance.cpu().numpy(), self.gp_.noise)

    def predict_set(self, X: Any, prior_logits: Any = None, *, alpha: float = 0.1) -> np.ndarray:
        """Sets of classes (n, C), bool, that hold the true one with probability of about 1 - alpha.

        Conformal with leave-one-out scores 1 - p(y); like the jackknife's, the guarantee is approximate. A set may be
        empty only if every class scores worse than the leave-one-out quantile; then the likeliest class is put in.
        """
        if not 0 < alpha < 1:
            raise UserError(f"alpha is {alpha}, expected a probability above 0 and below 1")
        scores = np.sort(1 - self.loo_.proba[np.arange(len(self._numbers())), self._numbers()])
        rank = int(np.ceil((len(scores) + 1) * (1 - alpha)))
        threshold = scores[rank - 1] if rank <= len(scores) else 1.0
        proba = self.predict_proba(X, prior_logits)
        return (1 - proba <= threshold) | (proba == proba.max(1, keepdims=True))

    def ood_score(self, X: Any, kind: str = "variance", *, prior_logits: Any = None) -> np.ndarray:
        """How unlike the training images each image is (n,); larger is farther.

        kind: "variance" (posterior over prior variance, in [0, 1]; needs no prior logits), "max_prob" (1 - max p),
        "entropy" (nats).
        """
        check_is_fitted(self)
        if kind not in OOD_SCORES:
            raise UserError(f"kind is {kind!r}, expected one of {', '.join(OOD_SCORES)}")
        if kind == "variance":
            parts = []
            for features in self._batches(self._check_features(X)):
                variance = self.gp_.solver.variance(self.gp_.kernel, features)
                parts.append(variance / self.gp_.kernel.diagonal(features))
            return torch.cat(parts).detach().cpu().numpy()
        proba = self.predict_proba(X, prior_logits)
        if kind == "max_prob":
            return 1 - proba.max(1)
        return -(proba * np.log(np.maximum(proba, 1e-300))).sum(1)

    def contributions(self, X: Any, prior_logits: Any = None) -> dict[str, np.ndarray]:
        """What the prior and each encoder add to the posterior mean: (n, C) each, summing to it."""
        features = self._check_features(X)
        z = self._prediction_logits(X, prior_logits)
        terms = self.gp_.contributions(features, prior_logits=z)
        return {name: term.cpu().numpy() for name, term in terms.items()}

    @property
    def encoder_weights_(self) -> dict[str, float]:
        """Share of each encoder in the kernel; they sum to 1."""
        check_is_fitted(self)
        w = self.gp_.kernel.weights.detach()
        return dict(zip(self.gp_.kernel.encoders, (w / w.sum()).tolist(), strict=True))

    @property
    def hyperparameters_(self) -> dict[str, float]:
        """Every positive hyper-parameter by name."""
        check_is_fitted(self)
        kernel = self.gp_.kernel
        values = {f"weight[{n}]": float(w) for n, w in zip(kernel.encoders, kernel.weights.detach(), strict=True)}
        for name, base in zip(kernel.encoders, kernel.kernels, strict=True):
            if hasattr(base, "beta"):
                values[f"beta[{name}]"] = float(base.beta.detach())
        values |= {n.removeprefix("log_"): float(p.detach().exp()) for n, p in self.gp_.mean.named_parameters()}
        return values | {"noise": self.gp_.noise, "temperature": float(self.temperature_)}

    @property
    def loo_(self) -> LooResult:
        """Leave-one-out predictions of the training images, by the closed formula."""
        check_is_fitted(self)
        if self._loo is None:
            loo = self.gp_.leave_one_out()
            latent = (loo.variance - self.gp_.noise * self.gp_.noise_scale).clamp_min(0)
            proba = get_link(self.link)(loo.mean, latent, self.temperature_)
            self._loo = LooResult(loo.mean.cpu().numpy(), loo.variance.cpu().numpy(), proba.cpu().numpy())
        return self._loo

    @property
    def loo_accuracy_(self) -> float:
        """Share of the training images that leave-one-out predicts rightly."""
        return float((self.loo_.mean.argmax(1) == self._numbers()).mean())

    @property
    def log_marginal_likelihood_(self) -> float:
        """log p(Y | X) at the hyper-parameters."""
        check_is_fitted(self)
        return self.gp_.log_marginal_likelihood()

    def suspect_labels(self, k: int = 10) -> np.ndarray:
        """Indices of the k training images whose label leave-one-out finds least likely, worst first."""
        own = self.loo_.proba[np.arange(len(self._numbers())), self._numbers()]
        return np.argsort(own, kind="stable")[:k]

    def suggest(self, X_pool: Any, k: int = 1) -> np.ndarray:
        """Indices of k unlabelled images worth labelling: each has the largest variance given those before it."""
        pool = self._check_features(X_pool)
        variance = torch.cat([self.gp_.solver.variance(self.gp_.kernel, f) for f in self._batches(pool)])

        def column(i: int) -> Tensor:
            return self.gp_.covariance(pool, rows(pool, [i]))[:, 0]

        return np.asarray(pivoted_cholesky(variance.detach(), column, min(k, len(variance)), self.gp_.noise))

    def add_examples(self, X: Any, y: Any, prior_logits: Any = None) -> "GPEnsembleClassifier":
        """Take in more images of known classes; exactly a refit with these hyper-parameters and this centring."""
        features = self._check_features(X)
        y = column_or_1d(y)
        if unknown := sorted({str(c) for c in y} - {str(c) for c in self.classes_}):
            raise UserError(f"unknown class {', '.join(unknown)}", hint="add it with add_class")
        position = {str(c): i for i, c in enumerate(self.classes_)}
        numbers = torch.tensor([position[str(c)] for c in y], device=self._device)
        if len(numbers) != _length(features):
            raise UserError(f"{_length(features)} rows of features and {len(numbers)} labels")
        z = self._prediction_logits(X, prior_logits)
        self.gp_.add(features, one_hot(numbers, len(self.classes_), self._dtype), prior_logits=z)
        self._loo = None
        return self

    def add_class(
        self,
        name: Any,
        X: Any,
        *,
        prior_logits: Any = None,
        support_prior_logits: Any = None,
        zero_shot: ZeroShotClassifier | None = None,
    ) -> "GPEnsembleClassifier":
        """Take in a new class by its images, as the last of `classes_`; exactly a refit at these hyper-parameters.

        With a zero-shot prior its logits are needed too: either `zero_shot`, with the new class among its names, or
        `prior_logits` (m, C + 1) of the new images and `support_prior_logits` (n,), the new column for all earlier
        ones.
        """
        features = self._check_features(X)
        if str(name) in {str(c) for c in self.classes_}:
            raise UserError(f"class {name} exists", hint="add its images with add_examples")
        m = _length(features)
        classes: Any = np.append(self.classes_, np.asarray([name], dtype=np.asarray([name]).dtype))
        z = None
        if self.gp_.prior_logits is not None:
            assert self.prior_bias_ is not None
            bias = torch.cat([self.prior_bias_, self.prior_bias_.new_zeros(1)])  # a new class has no images to judge by
            zero_shot = zero_shot or self.zero_shot
            if prior_logits is None and zero_shot is not None:
                encoder = self.prior_encoder or zero_shot.encoder
                support = self.normaliser_.uncentred(encoder, self.gp_.features[encoder]).cpu().numpy()
                wide = zero_shot.logits(support, classes) - bias.cpu().numpy()
                prior_logits = zero_shot.logits(self._mapping(X)[encoder], classes)
                self.zero_shot = zero_shot
            elif prior_logits is None or support_prior_logits is None:
                raise PriorMissingError(
                    f"class {name} is added without zero-shot logits, but the classifier has them",
                    hint="pass zero_shot, or prior_logits and support_prior_logits",
                )
            else:
                column: Any = np.reshape(np.asarray(support_prior_logits), (-1, 1))
                if len(column) != len(self.gp_.targets):
                    raise UserError(f"{len(column)} support_prior_logits for {len(self.gp_.targets)} training images")
                wide = np.concatenate([self.gp_.prior_logits.cpu().numpy(), column], axis=1)
            z = self._check_logits(prior_logits, m, len(classes)) - bias
            self.prior_bias_ = bias
            self.gp_.prior_logits = self._check_logits(wide, len(wide), len(classes))
        targets = torch.zeros(m, len(classes), dtype=self._dtype, device=self._device)
        targets[:, -1] = 1
        self.gp_.add(features, targets, prior_logits=z)
        self.classes_ = classes
        self._loo = None
        return self

    def forget(self, indices: Sequence[int] | np.ndarray, *, recenter: bool = False) -> "GPEnsembleClassifier":
        """Remove training images by index.

        What remains is exactly the predictor that never saw them, at these hyper-parameters and this centring, both of
        which they did influence; recenter=True computes the centring and the class bias anew.
        """
        check_is_fitted(self)
        n = len(self.gp_.targets)
        gone: Any = np.asarray(indices, dtype=int)
        if gone.size and (gone.min() < 0 or gone.max() >= n):
            raise UserError(f"indices from {gone.min()} to {gone.max()}, there are {n} training images")
        keep: Any = np.ones(n, dtype=bool)
        keep[gone] = False
        if keep.sum() < 2:
            raise UserError(f"forgetting leaves {keep.sum()} training images, expected 2 or more")
        if recenter:
            units = {name: self.normaliser_.uncentred(name, u)[keep] for name, u in self.gp_.features.items()}
            self.normaliser_, fresh = Normaliser.fit(units, self.center, dtype=self._dtype, device=self._device)
            everything = {name: torch.zeros_like(u) for name, u in self.gp_.features.items()}
            for name, array in everything.items():
                array[torch.as_tensor(keep, device=self._device)] = fresh[name]
            self.gp_.features = everything
            if self.gp_.prior_logits is not None and self.debias:
                kept, raw = torch.as_tensor(keep, device=self._device), self.gp_.prior_logits + self.prior_bias_
                self.prior_bias_ = class_bias(raw[kept], self.gp_.targets[kept])
                self.gp_.prior_logits = raw - self.prior_bias_
        self.gp_.forget(torch.as_tensor(keep, device=self._device))
        self._loo = None
        return self

    def save(self, directory: str | Path) -> Path:
        """Write the fitted classifier to a folder of JSON and safetensors. Raises UserError (see `storage`)."""
        from gp_ensemble.storage import save

        check_is_fitted(self)
        return save(self, directory)

    @classmethod
    def load(cls, directory: str | Path, *, device: str = "cpu") -> "GPEnsembleClassifier":
        """Read what `save` wrote. Raises CacheError naming the file when it is missing or damaged."""
        from gp_ensemble.storage import load

        return load(cls, directory, device)

    def _check_training(self, X: Any) -> dict[str, Any]:
        if isinstance(X, Mapping) and not issparse(X):
            if not X.keys():
                raise FeatureError("no encoder given, expected at least one")
            raw = dict(X.items())
            self.n_features_in_ = sum(int(np.shape(array)[-1]) for array in raw.values())
            return raw
        return self._split(validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2))

    def _mapping(self, X: Any) -> dict[str, Any]:
        check_is_fitted(self)
        if isinstance(X, Mapping) and not issparse(X):
            return dict(X.items())
        return self._split(validate_data(self, X, dtype=[np.float64, np.float32], reset=False))

    def _split(self, X: np.ndarray) -> dict[str, Any]:
        if self.encoders is None:
            return {"features": X}
        parts = {name: X[:, columns] for name, columns in self.encoders.items()}
        if empty := [name for name, part in parts.items() if part.shape[1] == 0]:
            raise UserError(f"no column for encoder {', '.join(empty)}: X has {X.shape[1]} columns")
        return parts

    def _check_features(self, X: Any) -> Features:
        return self.normaliser_(self._mapping(X), dtype=self._dtype, device=self._device)

    def _choose_dtype(self, n: int) -> torch.dtype:
        choices = {"auto": torch.float64 if n <= 4000 else torch.float32, "float64": torch.float64}
        choices["float32"] = torch.float32
        if self.dtype not in choices:
            raise UserError(f"dtype is {self.dtype!r}, expected one of {', '.join(choices)}")
        return choices[self.dtype]

    def _make_mean(self, z: Tensor | None) -> PriorMean:
        name = self.mean if self.mean != "auto" else "zero" if z is None else "logits"
        if name not in MEANS:
            raise UserError(f"mean is {name!r}, expected auto or one of {', '.join(MEANS)}")
        if name == "zero":
            return ZeroMean()
        if z is None:
            raise PriorMissingError(
                f"mean={name!r} without zero-shot logits", hint="pass prior_logits or zero_shot, or use mean='zero'"
            )
        return MEANS[name](margin(z))

    def _prior_logits(self, X: Any, raw: Mapping[str, Any], given: Any, n: int) -> Tensor | None:
        """z (n, C) from the argument, the table or `zero_shot`, in this order; None where there is none."""
        if given is None and isinstance(X, FeatureTable) and X.prior_logits is not None:
            given = X.prior_logits[:, columns_by_name(X.class_names, self.classes_)]
        if given is None and self.zero_shot is not None:
            encoder = self.prior_encoder or self.zero_shot.encoder
            if encoder not in raw:
                raise PriorMissingError(
                    f"no features of the prior encoder '{encoder}'", hint=f"encoders are {', '.join(raw)}"
                )
            given = self.zero_shot.logits(raw[encoder], self.classes_)
        return None if given is None else self._check_logits(given, n, len(self.classes_))

    def _prediction_logits(self, X: Any, given: Any) -> Tensor | None:
        if not self.gp_.mean.needs_logits:
            return None
        raw = self._mapping(X)
        z = self._prior_logits(X, raw, given, _length(raw))
        if z is None:
            raise PriorMissingError(
                "fitted with zero-shot logits, asked to predict without them", hint="pass prior_logits here too"
            )
        return z - self.prior_bias_

    def _check_logits(self, given: Any, n: int, classes: int) -> Tensor:
        z = check_array(np.asarray(given), dtype=[np.float64, np.float32], input_name="prior_logits")
        if z.shape != (n, classes):
            raise UserError(f"prior_logits of shape {z.shape}, expected {(n, classes)}: images by classes")
        return torch.tensor(np.ascontiguousarray(z), dtype=self._dtype, device=self._device)

    def _noise_scale(self, given: Sequence[float], n: int) -> Tensor:
        scale = torch.tensor(np.asarray(given), dtype=self._dtype, device=self._device)
        if scale.shape != (n,) or not (torch.isfinite(scale) & (scale > 0)).all():
            raise UserError(f"noise_scale of shape {tuple(scale.shape)}, expected {n} positive numbers")
        return scale

    def _subset(
        self, numbers: np.ndarray, features: Features, targets: Tensor, z: Tensor | None, scale: Tensor | None
    ) -> dict[str, Any]:
        """What tuning sees, in float64: whole classes, drawn until `tune_max_points` are reached, and at least two."""
        pick: Any = slice(None)
        if len(numbers) > self.tune_max_points:
            counts = np.bincount(numbers)
            order = np.random.RandomState(self.random_state).permutation(len(counts))
            enough = max(int((counts[order].cumsum() <= self.tune_max_points).sum()), 2)
            pick = torch.as_tensor(np.flatnonzero(np.isin(numbers, order[:enough])), device=self._device)
        return {
            "features": {name: array.double() for name, array in rows(features, pick).items()},
            "targets": targets[pick].double(),
            "prior_logits": None if z is None else z[pick].double(),
            "noise_scale": None if scale is None else scale[pick].double(),
        }

    def _warn_duplicates(self, features: Features, numbers: np.ndarray) -> None:
        first = next(iter(features.values())).cpu().numpy()
        seen: dict[int, int] = {}
        digests = (hash(row.tobytes()) for row in first)
        clashes = sum(seen.setdefault(digest, label) != label for digest, label in zip(digests, numbers, strict=True))
        if clashes:
            warnings.warn(
                f"{clashes} training images equal another one with a different label: they count as noise", stacklevel=3
            )

    def _batches(self, features: Features) -> list[Features]:
        return [
            rows(features, slice(start, start + self.batch_size))
            for start in range(0, _length(features), self.batch_size)
        ]

    def _mean_variance(self, X: Any, prior_logits: Any, variance: bool) -> tuple[Tensor, Tensor]:
        check_is_fitted(self)
        features = self._check_features(X)
        z = self._prediction_logits(X, prior_logits)
        parts = []
        for i, batch in enumerate(self._batches(features)):
            here = None if z is None else z[i * self.batch_size : (i + 1) * self.batch_size]
            parts.append(self.gp_.posterior(batch, prior_logits=here, variance=variance))
        return torch.cat([p.mean for p in parts]), torch.cat([p.variance for p in parts])

    def _numbers(self) -> np.ndarray:
        """Class number of each training image."""
        return self.gp_.targets.argmax(1).cpu().numpy()


def _length(features: Mapping[str, Any]) -> int:
    return len(next(iter(features.values())))
