"""A fitted classifier as a folder: `config.json` and `tensors.safetensors`. No pickle, so a stranger's folder is safe
to read.

The factorisation is stored, not made again, so that a loaded classifier answers with the same bits.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor

from gp_ensemble.errors import CacheError
from gp_ensemble.features import Normaliser
from gp_ensemble.gp import SharedKernelGP
from gp_ensemble.kernels import EnsembleKernel
from gp_ensemble.means import MEANS
from gp_ensemble.solvers import CholeskySolver, make_solver
from gp_ensemble.tuning import Tuned
from gp_ensemble.zero_shot import ZeroShotClassifier

if TYPE_CHECKING:
    from gp_ensemble.classifier import GPEnsembleClassifier

FORMAT = "gp-ensemble classifier 1"


def save(classifier: "GPEnsembleClassifier", directory: str | Path) -> Path:
    """Write the folder, whole or not at all. Raises UserError for a kernel object, which no name would bring back."""
    kernels = classifier.kernel.values() if isinstance(classifier.kernel, Mapping) else [classifier.kernel]
    if not all(isinstance(kernel, str) for kernel in kernels):
        raise UserError("a classifier with a gpytorch kernel object cannot be saved", hint="give the kernel by name")
    parameters = classifier.get_params(deep=False)
    cuts, zero_shot = parameters.pop("encoders"), parameters.pop("zero_shot")
    gp, solver = classifier.gp_, classifier.gp_.solver
    tensors = {f"gp.{name}": p.detach() for name, p in gp.named_parameters()}
    tensors |= {f"features.{name}": u for name, u in gp.features.items()}
    tensors |= {f"center.{name}": m for name, m in classifier.normaliser_.means.items() if m is not None}
    tensors |= {"targets": gp.targets, "noise_scale": gp.noise_scale}
    config = {
        "format": FORMAT,
        "parameters": parameters,
        "encoders": {name: [s.start, s.stop, s.step] for name, s in cuts.items()} if cuts else None,
        "classes": classifier.classes_.tolist(),
        "temperature": classifier.temperature_,
        "encoder_names": gp.kernel.encoders,
        "mean": next(name for name, kind in MEANS.items() if type(gp.mean) is kind),
        "solver": type(solver).__name__.removesuffix("Solver").lower(),
        "tuned": vars(classifier.tuned_),
        "n_features_in": classifier.n_features_in_,
    }
    if gp.prior_logits is not None:
        tensors["prior_logits"] = gp.prior_logits
    if classifier.prior_bias_ is not None:
        tensors["prior_bias"] = classifier.prior_bias_
    if isinstance(solver, CholeskySolver):
        tensors |= {f"solver.{name}": value for name, value in solver.state().items()}
        config["jitter"] = solver.jitter
    if zero_shot is not None:
        tensors["zero_shot.weights"] = torch.from_numpy(zero_shot.weights)
        config["zero_shot"] = {n: getattr(zero_shot, n) for n in ("class_names", "scale", "encoder", "bias")}
    text = json.dumps(config, indent=1)
    directory = Path(directory)
    with replace_atomically(directory) as partial:
        partial.mkdir()
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(
            {name: value.cpu().contiguous().clone() for name, value in tensors.items()}, partial / "tensors.safetensors"
        )
    return directory


def load(kind: type["GPEnsembleClassifier"], directory: str | Path, device: str) -> "GPEnsembleClassifier":
    """Read the folder. Raises CacheError naming the file that is missing, damaged or something else."""
    directory = Path(directory)
    for file in ("config.json", "tensors.safetensors"):
        if not (directory / file).is_file():
            raise CacheError(f"'{directory / file}' does not exist", hint="pass a folder written by gp-ensemble fit")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise KeyError(f"format {config['format']}")
        return _restore(kind, config, _aligned(directory / "tensors.safetensors", device), device)
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"the classifier in '{directory}' is damaged ({error})", hint="fit it again") from error


def _aligned(path: Path, device: str) -> dict[str, Tensor]:
    """Tensors in memory of torch's own: BLAS rounds differently in memory that is aligned differently."""
    return {name: value.clone() for name, value in load_file(path, device=device).items()}


def _restore(
    kind: type["GPEnsembleClassifier"], config: dict[str, Any], tensors: dict[str, Tensor], device: str
) -> "GPEnsembleClassifier":
    cuts = {name: slice(*cut) for name, cut in config["encoders"].items()} if config["encoders"] else None
    zero_shot = None
    if "zero_shot" in config:
        zero_shot = ZeroShotClassifier(weights=tensors["zero_shot.weights"].cpu().numpy(), **config["zero_shot"])
    result = kind(**{**config["parameters"], "encoders": cuts, "zero_shot": zero_shot, "device": device})
    names = config["encoder_names"]
    features = {name: tensors[f"features.{name}"] for name in names}
    targets = tensors["targets"]
    gp = SharedKernelGP(EnsembleKernel(names, result.kernel), MEANS[config["mean"]](1.0))
    with torch.no_grad():
        for name, parameter in gp.named_parameters():
            parameter.copy_(tensors[f"gp.{name}"])
    dims = {name: u.shape[1] for name, u in features.items()}
    given = {"prior_logits": tensors.get("prior_logits"), "noise_scale": tensors["noise_scale"]}
    if config["solver"] == "cholesky":
        state = {n.removeprefix("solver."): t for n, t in tensors.items() if n.startswith("solver.")}
        gp.restore(features, targets, solver=CholeskySolver.restored(features, state, config["jitter"]), **given)
    else:
        solver = make_solver(
            config["solver"],
            gp.kernel,
            rows=len(targets),
            dimensions=sum(dims.values()),
            classes=targets.shape[1],
            dtype=targets.dtype,
            device=device,
            max_memory=result.max_memory,
            inducing=result.inducing_points,
        )
        gp.condition(features, targets, solver=solver, **given)
    result.gp_, result.classes_ = gp, np.asarray(config["classes"])
    result.normaliser_ = Normaliser({name: tensors.get(f"center.{name}") for name in names}, dims)
    result.prior_bias_ = tensors.get("prior_bias")
    result.temperature_, result.tuned_ = config["temperature"], Tuned(**config["tuned"])
    result.n_features_in_ = config["n_features_in"]
    result._dtype, result._device, result._loo = targets.dtype, torch.device(device), None
    return result
