"""What the Gaussian process is compared with; one scikit-learn interface and the same inputs for all.

    fit(X, y, prior_logits), predict(X, prior_logits), predict_proba(X, prior_logits)

X is a mapping from encoder to features. `tuned_on` says which data chose a method's hyper-parameters. scikit-learn's
and
gpytorch's own models are the real ones; the adapters of CLIP have no maintained package and are written here after
their papers and public code.
"""

from gp_ensemble.baselines.adapters import CacheFusion, TipAdapter, TipAdapterF
from gp_ensemble.baselines.base import Baseline, Tuned
from gp_ensemble.baselines.linear import GDA, LinearProbe, LinearProbeEnsemble, LPPlusPlus, ZeroShot
from gp_ensemble.baselines.processes import DirichletGP, KernelRidge, SklearnGPC

__all__ = [
    "GDA",
    "Baseline",
    "CacheFusion",
    "DirichletGP",
    "KernelRidge",
    "LPPlusPlus",
    "LinearProbe",
    "LinearProbeEnsemble",
    "SklearnGPC",
    "TipAdapter",
    "TipAdapterF",
    "Tuned",
    "ZeroShot",
]
