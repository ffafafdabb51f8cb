"""What arXiv 2404.00312 claims of Gaussian-process ensembles, measured against real peers on the two offline worlds.

    python benchmarks/gp_ensemble.py                   measure what is not measured yet, write results/gp-ensemble.json
    python benchmarks/gp_ensemble.py --only digits     measure one function again

Every run is kept under results/.partial with the digest of the sources, so that a run that was stopped goes on in the
middle of a function. A seed draws the split and the labelled images; the encoders are frozen.
"""
# ruff: noqa: E402

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

# This script has the name of the package, and Python puts its folder first.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
from gp_ensemble import FeatureTable, GPEnsembleClassifier, SharedKernelGP
from gp_ensemble.features import Normaliser
from gp_ensemble.gp import one_hot
from gp_ensemble.kernels import EnsembleKernel
from gp_ensemble.protocol import METHODS, SLOW, mean_of, run_grid, single_encoder
from gp_ensemble.testbed import load_world
from gp_ensemble.tuning import SharedSolve
from tenfold_shared import figures
from tenfold_shared.claims import Claim, run_benchmark, source_digest, spread
from tenfold_shared.help_time import help_time
from tenfold_shared.hub import replace_atomically
from tenfold_shared.timing import compare
from threadpoolctl import threadpool_limits

PAPER = "2404.00312"
RESULTS = Path(__file__).resolve().parent / "results"
SHOTS = (1, 2, 4, 8, 16)
OURS = "GP ensemble"
LR = "LR, concatenated"
CACHES = ("Tip-Adapter", "CaFo-style fusion", "GDA, concatenated", "LR per encoder, averaged")
VARIANTS = tuple(name for name in METHODS if name.startswith("GP ensemble"))
TESTED = tuple(name for name in METHODS if name.endswith("test-tuned"))
FAIR = tuple(name for name in METHODS if name not in (*VARIANTS, *TESTED, *SLOW))
REWRITTEN = (
    "Tip-Adapter, CaFo fusion, GDA and LP++ have no maintained package and are written here after their papers; "
    "logistic regression is scikit-learn's. "
)


def records_file() -> Path:
    """Runs made with these sources; what no run passes through does not count."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(files("gp_ensemble"))).rglob("*")):
        if path.suffix in (".py", ".safetensors") and not {path.stem, path.parent.name} & {"cli", "demo", "vision"}:
            digest.update(path.read_bytes())
    return RESULTS / ".partial" / "gp-ensemble" / f"runs-{digest.hexdigest()[:16]}.jsonl"


def grid(world: str, names: Sequence[str], seeds: list[int], shots: Sequence[int] = SHOTS) -> list[dict]:
    """Runs of methods by name; `alone:ENCODER` is the process on one encoder."""
    loaded = load_world(world)
    methods = {n: single_encoder(n.removeprefix("alone:")) if n.startswith("alone:") else METHODS[n] for n in names}
    return run_grid(
        loaded.draw, methods, shots=shots, seeds=seeds, data=world, elsewhere=loaded.elsewhere, records=records_file()
    )


def per_seed(runs: list[dict], method: str, metric: str, seeds: list[int], **where: object) -> list[float]:
    """Mean over shots for each seed."""
    return [mean_of(runs, metric, method=method, seed=s, **where) for s in seeds]


def percent(runs: list[dict], method: str, **where: object) -> float:
    return 100 * mean_of(runs, "accuracy", method=method, **where)


def by_shots(runs: list[dict], method: str, metric: str, shots: Sequence[int] = SHOTS) -> list[float]:
    return [mean_of(runs, metric, method=method, shots=s) for s in shots]


def choosers(runs: list[dict], *names: str) -> str:
    """Which data chose each method's hyper-parameters."""
    found = {n: " / ".join(sorted({r["tuned_on"] for r in runs if r["method"] == n})) for n in names}
    groups: dict[str, list[str]] = {}
    for name, chooser in found.items():
        groups.setdefault(chooser, []).append(name)
    return "Hyper-parameters chosen by " + "; by ".join(f"{c}: {', '.join(n)}" for c, n in groups.items()) + "."


def numbers(values: Sequence[float], digits: int = 3) -> str:
    return "/".join(f"{v:.{digits}f}" for v in values)


def curves(world: str, runs: list[dict], shots: Sequence[int]) -> str:
    """The picture of a world: accuracy, calibration and detection by shots."""
    shown = [OURS, "zero-shot", LR, "LR per encoder, averaged", "Tip-Adapter-F", "CaFo-style fusion, test-tuned"]
    shown += ["GDA, concatenated, test-tuned", "LP++, concatenated"]
    panels = {"accuracy": "accuracy", "ece": "expected calibration error", "auroc_max_prob": "AUROC of strangers"}
    with figures.style() as plt:
        figure, axes = plt.subplots(1, 3, figsize=(14, 4.4))
        for axis, (metric, title) in zip(axes, panels.items(), strict=True):
            for name, colour in zip(shown, (figures.OURS, *figures.PEERS), strict=True):
                width = 2.6 if name == OURS else 1.3
                axis.plot(shots, by_shots(runs, name, metric, shots), "o-", color=colour, lw=width, ms=4, label=name)
            axis.set_xscale("log", base=2)
            axis.set_xticks(shots, [str(s) for s in shots])
            axis.set(title=f"{world}: {title}", xlabel="examples per class")
        variance = by_shots(runs, OURS, "auroc_variance", shots)
        axes[2].plot(shots, variance, "o--", color=figures.OURS, lw=2.6, ms=4, label=f"{OURS}, variance")
        axes[2].set_title(f"{world}: AUROC of strangers (1 - max p)")
        figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figures.save(figure, RESULTS / "gp-ensemble" / world)
    return f"gp-ensemble/{world}.png"


def digits(seeds: list[int]) -> list[Claim]:
    """Real digits: accuracy, single encoders, calibration."""
    encoders = load_world("digits").table.keys()
    alone = [f"alone:{name}" for name in encoders]
    runs = grid("digits", [*VARIANTS, *FAIR, *TESTED, *alone], seeds)
    picture = curves("digits", runs, SHOTS)
    ours = per_seed(runs, OURS, "accuracy", seeds)
    fair = {name: percent(runs, name) for name in FAIR}
    upper = {name: percent(runs, name) for name in TESTED}
    best = max(fair, key=lambda n: fair[n])
    gaps = [percent(runs, OURS, shots=s) - percent(runs, LR, shots=s) for s in SHOTS]
    value = percent(runs, OURS)
    note = REWRITTEN + choosers(runs, OURS, *FAIR, *TESTED)
    claims = [
        Claim(
            "digits-accuracy", PAPER, "The kernel ensemble beats other ensembles of the same encoders (digits)",
            "accuracy %, mean over 1/2/4/8/16 shots, higher is better", value, fair | upper,
            "0.8 points above the best peer that uses no held-out data",
            value >= fair[best] + 0.8, seeds, spread([100 * v for v in ours]),
            note=f"Best peer without held-out data: {best} {fair[best]:.1f}. By shots ours "
            f"{numbers([percent(runs, OURS, shots=s) for s in SHOTS], 1)}, that peer "
            f"{numbers([percent(runs, best, shots=s) for s in SHOTS], 1)}. " + note,
            figures=[picture], headline=True,
        ),
        Claim(
            "digits-every-shot-count", PAPER, "Never below logistic regression on all features (digits)",
            "accuracy minus that of logistic regression, points, smallest over 1/2/4/8/16 shots, higher is better",
            min(gaps), {LR: 0.0}, "-0.5 or more at every number of shots", min(gaps) >= -0.5, seeds,
            spread([100 * min(mean_of(runs, "accuracy", method=OURS, shots=s, seed=d)
                              - mean_of(runs, "accuracy", method=LR, shots=s, seed=d) for s in SHOTS) for d in seeds]),
            note=f"By shots {numbers(gaps, 1)}. " + choosers(runs, OURS, LR),
        ),
    ]  # fmt: skip
    single = {name.removeprefix("alone:") + " alone": percent(runs, name) for name in alone}
    strongest = max(single, key=lambda n: single[n])
    zero, first = percent(runs, "zero-shot", shots=1), percent(runs, OURS, shots=1)
    variants = {name: percent(runs, name) for name in VARIANTS if name != OURS}
    claims += [
        Claim(
            "digits-single-encoder", PAPER, "Several encoders are better than the best one of them (digits)",
            "accuracy %, mean over 1/2/4/8/16 shots, higher is better", value, single,
            "2 points above the best single encoder with the same prior mean",
            value >= single[strongest] + 2, seeds, spread([100 * v for v in ours]),
            note=f"Best: {strongest}. The best encoder was picked by test accuracy, in its favour.",
        ),
        Claim(
            "digits-over-zero-shot", PAPER, "One example per class already beats zero-shot (digits)",
            "accuracy %, 1 shot, higher is better", first, {"zero-shot": zero}, "10 points above zero-shot",
            first >= zero + 10, seeds, spread([100 * v for v in per_seed(runs, OURS, "accuracy", seeds, shots=1)]),
        ),
        Claim(
            "digits-choices", PAPER, "The defaults are as good as the other choices the paper leaves open (digits)",
            "accuracy %, mean over 1/2/4/8/16 shots, higher is better", value, variants,
            "within 1 point of the best variant", value >= max(variants.values()) - 1, seeds,
            spread([100 * v for v in ours]),
            note="An ablation: what the paper leaves open, varied. " + "; ".join(
                f"{n} {numbers([percent(runs, n, shots=s) for s in SHOTS], 1)}" for n in VARIANTS),
        ),
    ]  # fmt: skip
    ece = by_shots(runs, OURS, "ece")
    others = {name: by_shots(runs, name, "ece") for name in CACHES}
    below = all(e < o for name in CACHES for e, o in zip(ece, others[name], strict=True))
    likelihood = mean_of(runs, "nll", method=OURS)
    regressions = {name: mean_of(runs, "nll", method=name) for name in (LR, "LR, concatenated, C=100")}
    theirs = min(regressions.values())
    claims += [
        Claim(
            "digits-calibration", PAPER, "Calibrated, although labels are regressed (digits)",
            "expected calibration error (15 bins), largest over 1/2/4/8/16 shots, lower is better", max(ece),
            {n: max(v) for n, v in others.items()} | {LR: max(by_shots(runs, LR, "ece"))},
            "at most 0.08 and below Tip-Adapter, CaFo-style, GDA and averaged LR at every shot count",
            max(ece) <= 0.08 and below, seeds,
            spread([max(mean_of(runs, "ece", method=OURS, shots=s, seed=d) for s in SHOTS) for d in seeds]),
            note=f"By shots ours {numbers(ece)}; " + "; ".join(f"{n} {numbers(v)}" for n, v in others.items())
            + f"; {LR} {numbers(by_shots(runs, LR, 'ece'))}. " + choosers(runs, OURS, *CACHES),
            headline=True,
        ),
        Claim(
            "digits-nll", PAPER, "Probabilities as good as logistic regression's (digits)",
            "negative log likelihood, nats, mean over 1/2/4/8/16 shots, lower is better", likelihood,
            regressions | {name: mean_of(runs, "nll", method=name) for name in (*CACHES, "zero-shot")},
            "at most 1.1 times the better of the two logistic regressions on all features",
            likelihood <= 1.1 * theirs, seeds,
            spread(per_seed(runs, OURS, "nll", seeds)),
            note=f"By shots ours {numbers(by_shots(runs, OURS, 'nll'))}, {LR} {numbers(by_shots(runs, LR, 'nll'))}.",
        ),
    ]  # fmt: skip
    return claims


def shapes(seeds: list[int]) -> list[Claim]:
    """Drawn shapes on clutter, twenty classes, a weak zero-shot classifier."""
    shots = (1, 4, 16)
    runs = grid("shapes", [*VARIANTS, *FAIR, *TESTED], seeds, shots)
    picture = curves("shapes", runs, shots)
    everyone = {name: percent(runs, name, shots=16) for name in (*FAIR, *TESTED)}
    most, mean = percent(runs, OURS, shots=16), percent(runs, OURS)
    plus = "LP++, concatenated"
    note = REWRITTEN + choosers(runs, OURS, *FAIR, *TESTED)
    return [
        Claim(
            "shapes-16-shots", PAPER, "At 16 shots no peer is better, test-tuned ones included (shapes)",
            "accuracy %, 16 shots, higher is better", most, everyone, "at or above every peer",
            most >= max(everyone.values()), seeds,
            spread([100 * v for v in per_seed(runs, OURS, "accuracy", seeds, shots=16)]), note=note,
            figures=[picture], headline=True,
        ),
        Claim(
            "shapes-accuracy", PAPER, "The kernel ensemble beats other ensembles of the same encoders (shapes)",
            "accuracy %, mean over 1/4/16 shots, higher is better", mean,
            {name: percent(runs, name) for name in (*FAIR, *TESTED)},
            f"3 points above {LR} and no more than 1 below {plus}",
            mean >= percent(runs, LR) + 3 and mean >= percent(runs, plus) - 1, seeds,
            spread([100 * v for v in per_seed(runs, OURS, "accuracy", seeds)]),
            note=f"By shots ours {numbers([percent(runs, OURS, shots=s) for s in shots], 1)}, {LR} "
            f"{numbers([percent(runs, LR, shots=s) for s in shots], 1)}, {plus} "
            f"{numbers([percent(runs, plus, shots=s) for s in shots], 1)}. " + note,
        ),
        Claim(
            "shapes-calibration", PAPER, "Calibrated, although labels are regressed (shapes)",
            "expected calibration error (15 bins), largest over 1/4/16 shots, lower is better",
            max(by_shots(runs, OURS, "ece", shots)),
            {name: max(by_shots(runs, name, "ece", shots)) for name in (LR, *CACHES)},
            "below every peer at every number of shots",
            all(e < o for name in (LR, *CACHES) for e, o in zip(
                by_shots(runs, OURS, "ece", shots), by_shots(runs, name, "ece", shots), strict=True)),
            seeds, spread([max(mean_of(runs, "ece", method=OURS, shots=s, seed=d) for s in shots) for d in seeds]),
            note="By shots "
            + "; ".join(f"{n} {numbers(by_shots(runs, n, 'ece', shots))}" for n in (OURS, LR, *CACHES)),
        ),
    ]  # fmt: skip


def strangers(seeds: list[int]) -> list[Claim]:
    """Images of another kind, told by the variance."""
    claims = []
    for world, shots in (("digits", SHOTS), ("shapes", (1, 4, 16))):
        runs = grid(world, [OURS, LR, "Tip-Adapter", "zero-shot"], seeds, shots)
        ours = by_shots(runs, OURS, "auroc_variance", shots)
        theirs = {n: by_shots(runs, n, "auroc_max_prob", shots) for n in (LR, "Tip-Adapter", "zero-shot", OURS)}
        above = all(a > b for a, b in zip(ours, theirs[LR], strict=True))
        if world == "digits":
            bar = "0.88 at 1 shot, 0.95 from 4 shots on, and above logistic regression's max p at every number of shots"
            passed = above and ours[0] >= 0.88 and min(ours[2:]) >= 0.95
        else:
            bar, passed = "above logistic regression's max p at every number of shots", above
        claims.append(
            Claim(
                f"{world}-strangers", PAPER, f"The variance tells images of another kind ({world})",
                f"AUROC, mean over {'/'.join(map(str, shots))} shots, higher is better", float(np.mean(ours)),
                {f"{n}, 1 - max p": float(np.mean(v)) for n, v in theirs.items()}, bar, passed, seeds,
                spread(per_seed(runs, OURS, "auroc_variance", seeds)),
                note=f"By shots: variance {numbers(ours)}; "
                + "; ".join(f"{n}, 1 - max p, {numbers(v)}" for n, v in theirs.items()),
                headline=world == "digits",
            )
        )  # fmt: skip
    return claims


def score(train: FeatureTable, test: FeatureTable, mean: str = "auto") -> float:
    return 100 * GPEnsembleClassifier(mean=mean).fit(train, train.labels).score(test, test.labels)


def with_noise(table: FeatureTable, rng: np.random.Generator) -> FeatureTable:
    noise = {f"noise {i}": rng.normal(size=(len(table), 64)).astype(np.float32) for i in range(3)}
    return FeatureTable({**table.features, **noise}, table.labels, [], table.prior_logits, table.class_names)


def with_wrong_text(table: FeatureTable, order: np.ndarray) -> FeatureTable:
    return FeatureTable(table.features, table.labels, [], table.prior_logits[:, order], table.class_names)


def robustness(seeds: list[int]) -> list[Claim]:
    """Useless encoders and a wrong text model, at 16 shots on the digits."""
    world = load_world("digits")
    rows: dict[str, list[float]] = {"plain": [], "noise": [], "shuffled": [], "no text": []}
    peers: dict[str, list[float]] = {"plain": [], "noise": []}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        train, test = world.draw(16, seed)

        noisy = with_noise(train, rng), with_noise(test, rng)
        order = rng.permutation(10)
        rows["plain"].append(score(train, test))
        rows["noise"].append(score(*noisy))
        rows["shuffled"].append(score(with_wrong_text(train, order), with_wrong_text(test, order)))
        rows["no text"].append(score(train, test, "zero"))
        for key, (a, b) in {"plain": (train, test), "noise": noisy}.items():
            peers[key].append(100 * float((METHODS[LR]().fit(a, a.labels).predict(b) == b.labels).mean()))
    loss = np.subtract(rows["plain"], rows["noise"])
    lost_text = np.subtract(rows["no text"], rows["shuffled"])
    return [
        Claim(
            "robust-to-noise-encoders", PAPER, "Three encoders of pure noise do little harm (digits)",
            "accuracy lost at 16 shots, points, lower is better", float(loss.mean()),
            {LR: float(np.subtract(peers["plain"], peers["noise"]).mean())}, "at most 2 points", loss.mean() <= 2,
            seeds, spread(loss.tolist()),
            note=f"From {np.mean(rows['plain']):.1f} % to {np.mean(rows['noise']):.1f} %; {LR} from "
            f"{np.mean(peers['plain']):.1f} % to {np.mean(peers['noise']):.1f} %.",
        ),
        Claim(
            "robust-to-wrong-text", PAPER, "A shuffled zero-shot classifier does little harm (digits)",
            "accuracy lost against mean='zero' at 16 shots, points, lower is better", float(lost_text.mean()),
            {}, "at most 2 points", lost_text.mean() <= 2, seeds, spread(lost_text.tolist()),
            note=f"Shuffled {np.mean(rows['shuffled']):.1f} %, none {np.mean(rows['no text']):.1f} %, "
            f"right {np.mean(rows['plain']):.1f} %.",
        ),
    ]  # fmt: skip


def processes(seeds: list[int]) -> list[Claim]:
    """Other Gaussian processes for classification, from the libraries that have them."""
    seeds, shots = seeds[:3], (1, 4)
    runs = grid("digits", [OURS, "GP ensemble, no text", *SLOW], seeds, shots)
    value = percent(runs, OURS)
    peers = {name: percent(runs, name) for name in ("GP ensemble, no text", *SLOW)}
    return [
        Claim(
            "other-processes", PAPER, "Better than other Gaussian-process classifiers (digits)",
            "accuracy %, mean over 1/4 shots, higher is better", value, peers,
            "above every peer, without the zero-shot prior too",
            min(value, peers["GP ensemble, no text"]) > max(peers[n] for n in SLOW), seeds,
            spread([100 * v for v in per_seed(runs, OURS, "accuracy", seeds)]),
            note="Peers on concatenated features, by their own marginal likelihood. Seconds to fit: "
            + "; ".join(f"{n} {numbers(by_shots(runs, n, 'seconds', shots), 2)}" for n in (OURS, *SLOW)) + ".",
        )
    ]  # fmt: skip


def shared_factor(seeds: list[int]) -> list[Claim]:
    """One factorisation for all classes against gpytorch's one per class."""
    import gpytorch

    torch.set_default_dtype(torch.float64)
    n, classes = 400, 25
    batch = torch.Size([classes])

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x: torch.Tensor, targets: torch.Tensor, likelihood: gpytorch.likelihoods.Likelihood):
            super().__init__(x, targets, likelihood)
            self.mean_module = gpytorch.means.ConstantMean(batch_shape=batch)
            self.mean_module.initialize(constant=1 / classes)
            base = gpytorch.kernels.RBFKernel(batch_shape=batch)
            base.lengthscale = 1.5**-0.5
            self.covar_module = gpytorch.kernels.ScaleKernel(base, batch_shape=batch)
            self.covar_module.outputscale = 0.3

        def forward(self, x: torch.Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    ratios, differences, intervals = [], [], []
    for seed in seeds[:3]:
        generator = torch.Generator().manual_seed(seed)
        _, u = Normaliser.fit({"a": torch.randn(n, 64, generator=generator)}, dtype=torch.float64)
        y = one_hot(torch.randint(0, classes, (n,), generator=generator), classes, torch.float64)
        gp = SharedKernelGP(EnsembleKernel(["a"]))
        prepared = gp.kernel.prepare(u)

        def ours(gp: SharedKernelGP = gp, y: torch.Tensor = y, prepared: list = prepared) -> float:
            residual = y - 1 / classes
            a = gp.kernel.evaluate(prepared) + gp.log_noise.exp() * torch.eye(n)
            alpha, _, logdet = SharedSolve.apply(a, residual)
            loss = 0.5 * (residual * alpha).sum() + classes / 2 * logdet + n * classes / 2 * np.log(2 * np.pi)
            loss.backward()
            return float(loss)

        likelihood = gpytorch.likelihoods.GaussianLikelihood(batch_shape=batch)
        likelihood.noise = gp.noise

        model = Model(u["a"], y.mT.contiguous(), likelihood).train()
        evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)

        def theirs(model: Model = model, y: torch.Tensor = y, evidence: torch.nn.Module = evidence) -> float:
            with gpytorch.settings.max_cholesky_size(10**6):
                loss = -evidence(model(*model.train_inputs), y.mT).sum() * n
                loss.backward()
            return float(loss)

        differences.append(abs(ours() / theirs() - 1))
        timed = compare(ours, theirs, repeats=5, clock=time.process_time)
        ratios.append(timed.ratio)
        intervals.append(timed.interval)
    torch.set_default_dtype(torch.float32)
    ratio = float(np.median(ratios))
    return [
        Claim(
            "shared-factorisation", PAPER, "One factorisation serves all classes, with the same marginal likelihood",
            f"CPU time of gpytorch's batch of independent processes over ours, loss and gradient, n={n}, C={classes}; "
            "higher is better", ratio, {"gpytorch ExactGP, one kernel matrix per class": 1.0},
            "5 times faster, with values equal to 1e-6", ratio >= 5 and max(differences) < 1e-6, seeds[:3],
            {"low": min(i[0] for i in intervals), "high": max(i[1] for i in intervals)},
            note=f"Largest relative difference of the two losses: {max(differences):.1e}.",
        )
    ]  # fmt: skip


N, C, DIMENSIONS = 8000, 500, {"a": 512, "b": 768, "c": 1024}


def scale_problem(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(C), N // C)
    features = {}
    for name, d in DIMENSIONS.items():
        centres = rng.standard_normal((C, d), dtype=np.float32)
        features[name] = centres[y] + rng.standard_normal((N, d), dtype=np.float32)
    return features, y


def fit_at_scale(features: dict[str, np.ndarray], y: np.ndarray) -> GPEnsembleClassifier:
    return GPEnsembleClassifier(objective="none", temperature=0.1, max_memory=100).fit(features, y)


def bare(features: dict[str, np.ndarray], y: np.ndarray) -> torch.Tensor:
    """The same arithmetic without any care: kernel, Cholesky, solve."""
    k = torch.zeros(N, N)
    for array in features.values():
        u = torch.nn.functional.normalize(torch.from_numpy(array), dim=1)
        u = torch.nn.functional.normalize(u - u.mean(0), dim=1)
        k += 0.1 * torch.exp(1.5 * (u @ u.mT - 1))
    k.diagonal().add_(0.02)
    residual = one_hot(torch.from_numpy(y), C, torch.float32) - 1 / C
    return torch.cholesky_solve(residual, torch.linalg.cholesky(k))


def probe(kind: str, seed: int) -> dict[str, float]:
    """What `print_time` or `print_memory` prints in a process of its own; kept, as the runs are."""
    kept = records_file().with_name(f"{kind}-{source_digest('gp-ensemble')}-{seed}.json")
    if not kept.exists():
        command = [sys.executable, __file__, "--probe", kind, str(seed)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        with replace_atomically(kept) as partial:
            partial.write_text(answer)
    return json.loads(kept.read_text())


def scale(seeds: list[int]) -> list[Claim]:
    """8000 images, 500 classes, three encoders: time against bare torch, and memory."""
    seeds = seeds[:3]
    times = [probe("time", seed) for seed in seeds]
    ratios, errors = [t["ratio"] for t in times], [t["error"] for t in times]
    matrices = [probe("memory", seed)["matrices"] for seed in seeds]
    where = f"n={N}, C={C}, {sum(DIMENSIONS.values())} dimensions, fixed hyper-parameters"
    return [
        Claim(
            "scale-time", PAPER, "The public fit costs little more than its bare arithmetic",
            f"CPU time of fit over kernel + Cholesky + solve in torch, {where}; lower is better",
            float(np.mean(ratios)),
            {"bare torch": 1.0}, "at most 1.5", float(np.mean(ratios)) <= 1.5, seeds, spread(ratios),
            note="Ours computes one triangle of the kernel matrix, factorises in place and refines the solution in "
            f"float64; the two solutions differ by {max(errors):.0e} relative.",
        ),
        Claim(
            "scale-memory", PAPER, "Fitting needs little more than one kernel matrix",
            f"peak memory above the imports, raw features included, in n x n float32 matrices, {where}; "
            "lower is better",
            float(np.mean(matrices)), {}, "at most 2.5", float(np.mean(matrices)) <= 2.5, seeds, spread(matrices),
        ),
    ]  # fmt: skip


def print_time(seed: int) -> None:
    """CPU time of `fit_at_scale` over that of `bare`, and how far apart their solutions are."""
    features, y = scale_problem(seed)
    start = time.process_time()
    alpha = bare(features, y)
    middle = time.process_time()
    model = fit_at_scale(features, y)
    ratio = (time.process_time() - middle) / (middle - start)
    print(json.dumps({"ratio": ratio, "error": float((model.gp_.solver.dual() - alpha).norm() / alpha.norm())}))


def print_memory(seed: int) -> None:
    """Peak resident memory of `fit_at_scale`, in kernel matrices."""
    small = {name: np.random.default_rng(0).normal(size=(40, 8)) for name in DIMENSIONS}
    GPEnsembleClassifier(objective="none").fit(small, np.arange(40) % 2)  # everything is imported
    before = peak_memory()
    features, y = scale_problem(seed)
    fit_at_scale(features, y)
    print(json.dumps({"matrices": (peak_memory() - before) / (4 * N * N)}))


def peak_memory() -> int:
    """Bytes at most resident so far. `ru_maxrss` would start at what the process that started this one held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def at_full_size(seeds: list[int]) -> list[Claim]:
    """The paper's own setting, which needs its data sets and downloaded weights."""
    command = (
        "gp-ensemble extract DATA --encoder clip=open_clip:RN50/openai --prior clip -o train "
        "--encoder dino=timm:vit_small_patch14_dinov2.lvd142m --encoder moco=timm:resnet50@moco_v3.pth "
        "&& gp-ensemble benchmark train/features.safetensors test/features.safetensors --seeds 3"
    )
    return [
        Claim(
            "eleven-data-sets", PAPER, "Better than competing ensembles on the customary low-shot data sets",
            "accuracy %, mean of 11 data sets at 1/2/4/8/16 shots", None, {},
            "above CaFo and GDA in the same run", None, [], note=f"Needs the data sets and weights. Run: {command}",
        )
    ]  # fmt: skip


MEASUREMENTS: list[Callable[[list[int]], list[Claim]]] = [
    digits,
    shapes,
    strangers,
    robustness,
    processes,
    shared_factor,
    scale,
    at_full_size,
    help_time("gp-ensemble", PAPER),
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    threadpool_limits(
        1
    )  # scikit-learn's and scipy's BLAS: two spinning threads a matrix of this size cost more than they save
    if "--probe" in sys.argv:
        {"time": print_time, "memory": print_memory}[sys.argv[-2]](int(sys.argv[-1]))
    else:
        run_benchmark(
            "gp-ensemble", MEASUREMENTS, seeds=(0, 1, 2, 3, 4), libraries=("scikit-learn", "gpytorch", "scipy")
        )
