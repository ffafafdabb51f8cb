"""What stochastic consistency distillation (2403.01505) brings, per number of steps, and what it costs.

python benchmarks/scott.py            everything; distilled students are kept, so that a stopped run goes on
python benchmarks/scott.py --only mixture
python benchmarks/scott.py --part 0/2 & python benchmarks/scott.py --part 1/2    the students alone, on two cores; then as above
python benchmarks/scott.py --spread     how the spread of the mixture's weights was chosen, into results/scott/spread.json
python benchmarks/scott.py --attempts   other settings, into results/scott/attempts.json; both on seeds that are not reported
"""

# ruff: noqa: E402
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# This script has the package's name, and Python puts its folder first on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import diffusers
import torch
from safetensors.torch import load_file, save_file
from scott import GaussianMixture, SDESolver, digits, testbed
from scott.lab import data_distance, marginal_error, mean_distance
from scott.metrics import sliced_wasserstein
from scott.recipes import RECIPES
from scott.solvers import NOISE_FUNCTIONS
from tenfold_shared import figures
from tenfold_shared.claims import Claim, run_benchmark, source_digest, spread
from tenfold_shared.help_time import help_time
from tenfold_shared.hub import replace_atomically
from torch import Tensor

torch.set_num_threads(1)
PAPER = "2403.01505"
RESULTS = Path(__file__).resolve().parent / "results"
PARTIAL = RESULTS / ".partial" / "scott"
STEPS = (1, 2, 4, 8)
METHODS = ("SCott", "LCM", "ODE + GAN", "SDE 5", "ODE", "late noise", "late noise + GAN")
"""SCott first, then everything that always stands beside it."""
GROUPS = 4
"""Sets of 4000 samples that a figure of the mixture is the mean of."""
LCM_NOTE = (
    "LCM (one ODE step, no discriminator) is trained here with the same code, since no library packages its training"
)
DIGIT_METHODS = ("SCott", "LCM", "ODE + GAN")
SD15 = (
    "scott prepare-latents laion-aesthetics-6plus --model stable-diffusion-v1-5/stable-diffusion-v1-5 --output latents && "
    "accelerate launch -m scott train --config packages/scott/configs/sd15.yaml --dataset latents --output student && "
    "scott sample --student student --prompts coco2017-5k.txt --steps 2 --output samples && "
    "scott eval --real coco2017-5k --fake samples/steps-2 --features openai/clip-vit-base-patch32 --metrics frechet coverage clip"
)

Scores = dict[tuple[str, int], list[dict[str, float]]]
"""(method, steps) to one dictionary of metrics per seed."""


def median(rows: Sequence[dict[str, float]], metric: str) -> float:
    return statistics.median(row[metric] for row in rows)


def claim(id: str, statement: str, metric: str, ours: Sequence[float], peers: dict[str, float], *, bar: str, passed: bool | None,
          seeds: list[int], **more: object) -> Claim:  # fmt: skip
    return Claim(
        id=id, paper=PAPER, statement=statement, metric=metric, ours=statistics.median(ours), peers=peers, bar=bar,
        passed=passed, seeds=seeds, spread=spread(ours), **more,
    )  # fmt: skip


def say(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def kept(name: str, seeds: Sequence[int], measure: Callable[[], Any]) -> Any:
    """What `measure` gives, kept on disk as JSON as long as the sources stay the same."""
    file = PARTIAL / f"{name}-{source_digest('scott')}-{'-'.join(map(str, seeds))}.kept"
    if not file.exists():
        say(name)
        made = measure()
        with replace_atomically(file) as partial:
            partial.write_text(json.dumps(made), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


# Solvers


N, PAIRS = 1000, 16
"""Points of a set, and how many sets are compared: the share of each mode makes one pair a poor measure."""


def marginals(seeds: list[int]) -> list[Claim]:
    """Bar B6: a thousand sub-steps with the exact denoiser end on the mixture, whatever the noise function."""
    mixture = testbed.mixture_world()
    claims = []
    for noise in NOISE_FUNCTIONS:
        ratios = kept(f"marginal {noise}", seeds, functools.partial(_ratios, mixture, noise, seeds))
        claims.append(
            claim(
                f"marginal-{noise.replace('.', '-')}",
                f"1000 sub-steps of the solver '{noise}' reproduce the mixture",
                "sliced W2 to data over that of data to data, lower is better", ratios,
                {"diffusers DDPMScheduler, 1000 steps": statistics.median(_ddpm(mixture, s) for s in seeds)}
                if noise == "sde" else {}, bar="at most 1.3", passed=statistics.median(ratios) <= 1.3, seeds=seeds,
            )
        )  # fmt: skip
    return claims


def _ratios(mixture: GaussianMixture, noise: str, seeds: list[int]) -> list[float]:
    solver = SDESolver(mixture.schedule, noise=noise, substeps=1000)
    runs = [marginal_error(solver, mixture, n=N, pairs=PAIRS, seed=s) for s in seeds]
    return [error / floor for error, floor in runs]


def exact_sampling(mixture: GaussianMixture, scheduler: object, steps: int, *, seed: int, n: int) -> Tensor:
    """The exact denoiser under a diffusers scheduler."""
    generator = torch.Generator().manual_seed(1000 * seed + 4)
    _, label = mixture.sample(n, generator=generator)
    scheduler.set_timesteps(steps)
    z = torch.randn(n, 2, generator=generator) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        t = torch.full((n,), int(time))
        scaled = scheduler.scale_model_input(z, time)
        alpha, sigma = (v.float()[:, None] for v in (mixture.schedule.alpha(t), mixture.schedule.sigma(t)))
        epsilon = (scaled - alpha * mixture.x0(scaled, t, label)) / sigma
        z = scheduler.step(epsilon, time, z, generator=generator).prev_sample
    return z


def stock(name: str, **kwargs: object) -> object:
    return getattr(diffusers, name)(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **kwargs
    )


def _ddim() -> object:
    return stock("DDIMScheduler", clip_sample=False, timestep_spacing="trailing")


def _ddpm(mixture: GaussianMixture, seed: int) -> float:
    x = exact_sampling(mixture, stock("DDPMScheduler", clip_sample=False), 1000, seed=seed, n=N * PAIRS)
    return mean_distance(mixture, x, n=N, seed=seed) / data_distance(mixture, n=N, seed=seed)


# The mixture


@functools.cache
def student(name: str, seeds: tuple[int, ...]) -> testbed.Student:
    """Distilled by this recipe, one member per seed; kept on disk as long as the sources stay the same."""
    file = PARTIAL / f"{name}-{source_digest('scott')}-{'-'.join(map(str, seeds))}.safetensors"
    made = testbed.Student(testbed.mixture_world(), len(seeds))
    if file.exists():
        made.load_state_dict(load_file(file))
        return made.requires_grad_(False)
    say(f"distilling {name}")
    made = testbed.distil(RECIPES[name], seeds)
    with replace_atomically(file) as partial:
        save_file(made.state_dict(), partial)
    return made


def mixture_scores(names: Sequence[str], seeds: list[int]) -> Scores:
    """Samples of every method in every number of steps, measured."""

    def measure(name: str) -> list[list[dict[str, float]]]:
        made = student(name, tuple(seeds))
        points = [testbed.samples(made, seeds, steps=steps, n=GROUPS * testbed.GROUP) for steps in STEPS]
        return [[testbed.measure(x, seed=s) for x, s in zip(each, seeds, strict=True)] for each in points]

    return {
        (name, steps): rows
        for name in names
        for steps, rows in zip(STEPS, kept(name, seeds, functools.partial(measure, name)), strict=True)
    }


def picture(scores: Scores, names: Sequence[str], metrics: dict[str, str], steps: Sequence[int], path: Path) -> str:
    """Metrics over steps, a line a method."""
    with figures.style() as plt:
        figure, axes = plt.subplots(1, len(metrics), figsize=(3.7 * len(metrics) + 1.6, 3.3))
        for axis, (metric, label) in zip(axes, metrics.items(), strict=True):
            colours = iter(figures.PEERS)
            for name in names:
                rows = [scores[name, k] for k in steps]
                middle = [median(row, metric) for row in rows]
                colour = figures.OURS if name == "SCott" else next(colours)
                axis.plot(steps, middle, "o-", color=colour, lw=2.2 if name == "SCott" else 1.3, ms=4, label=name)
                low, high = ([f(r[metric] for r in row) for row in rows] for f in (min, max))
                axis.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(steps, [str(k) for k in steps])
            axis.set(title=label, xlabel="student calls")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figures.save(figure, path)
    return f"{path.parent.name}/{path.name}"


TOY_METRICS = {
    "sw2": "sliced W2, lower is better",
    "coverage": "coverage, higher is better",
    "far": "strays, lower is better",
}
TOY_BARS = {(2, "coverage"): 1.04, (2, "far"): 0.85, (4, "sw2"): 0.85, (4, "coverage"): 1.06, (4, "far"): 0.65}
"""Bar B1: SCott over LCM."""


def against_lcm(scores: Scores, names: Sequence[str], seeds: list[int], *, world: str, metrics: dict[str, str],
                bars: dict[tuple[int, str], float], steps: Sequence[int], better_high: set[str], figure: str,
                headline: set[tuple[int, str]], elsewhere: str) -> list[Claim]:  # fmt: skip
    """A row for each metric and number of steps, with every method beside the first, which is ours; the second is LCM.

    elsewhere: the metric of which `sde_or_ode` shows every number of steps, so that only its bars are rows here.
    """
    ours, lcm = names[:2]
    claims = []
    for metric, label in metrics.items():
        for k in steps:
            middle = {name: median(scores[name, k], metric) for name in names}
            factor, up = bars.get((k, metric)), metric in better_high
            if factor is None and metric == elsewhere:
                continue
            measured = f"measured {middle[ours] / middle[lcm]:.2f}"
            if factor is None:
                bar, passed, reported = f"none; {measured} of LCM", None, " (reported, no bar)"
            else:
                bar, reported = f"{'at least' if up else 'at most'} {factor:g} × LCM; {measured}", ""
                passed = middle[ours] >= factor * middle[lcm] if up else middle[ours] <= factor * middle[lcm]
            claims.append(
                claim(
                    f"{world}-{metric}-{k}", f"{world}: SCott against LCM, {k} step{'s' if k > 1 else ''}{reported}",
                    label, [row[metric] for row in scores[ours, k]], {n: middle[n] for n in names if n != ours},
                    bar=bar, passed=passed, seeds=seeds, figures=[figure], headline=(k, metric) in headline, note=LCM_NOTE,
                )
            )  # fmt: skip
    return claims


def sde_or_ode(scores: Scores, seeds: list[int], *, world: str, metric: str, label: str, steps: Sequence[int],
               figure: str) -> list[Claim]:  # fmt: skip
    """The paper's thesis, a row a number of steps: under the same discriminator, noise in the solver helps."""
    rows = []
    for k in steps:
        ours, ode = [row[metric] for row in scores["SCott", k]], median(scores["ODE + GAN", k], metric)
        others = {n: median(scores[n, k], metric) for n in METHODS if n != "SCott" and (n, k) in scores}
        rows.append(
            claim(
                f"{world}-sde-or-ode-{k}",
                f"{world}: with the discriminator, SDE noise beats the ODE at {k} step{'s' if k > 1 else ''}", label, ours,
                others, bar=f"at most ODE + GAN; measured {statistics.median(ours) / ode:.2f} of it", passed=statistics.median(ours) <= ode, seeds=seeds, figures=[figure],
            )
        )  # fmt: skip
    return rows


def mixture(seeds: list[int]) -> list[Claim]:
    """Bars B1, B2, B3, B5, the solver question per step count, and late noise."""
    scores = mixture_scores(METHODS, seeds)
    figure = picture(scores, METHODS, TOY_METRICS, STEPS, RESULTS / "scott" / "mixture.png")
    claims = against_lcm(
        scores, METHODS, seeds, world="mixture", metrics=TOY_METRICS, bars=TOY_BARS, steps=STEPS, better_high={"coverage"},
        figure=figure, headline={(2, "coverage"), (4, "far")}, elsewhere="sw2",
    )  # fmt: skip
    claims += sde_or_ode(
        scores, seeds, world="mixture", metric="sw2", label=TOY_METRICS["sw2"], steps=STEPS, figure=figure
    )

    sw2 = {key: median(rows, "sw2") for key, rows in scores.items()}
    one, two, four = (sw2["SCott", k] for k in (1, 2, 4))
    claims.append(
        claim(
            "mixture-improves-with-steps", "SCott improves from 1 to 2 to 4 steps", TOY_METRICS["sw2"],
            [row["sw2"] for row in scores["SCott", 4]],
            {
                "SCott, 1 step": one, "SCott, 2 steps": two,
                "two draws of the data": statistics.median(
                    data_distance(testbed.mixture_world(), n=testbed.GROUP, seed=s) for s in seeds
                ),
            },
            bar="4 steps at most 2 steps at most 1 step", passed=four <= two <= one, seeds=seeds, figures=[figure],
        )
    )  # fmt: skip
    claims.append(
        claim(
            "mixture-noise-helps-many-steps", "without a discriminator, SDE noise beats the ODE at 8 steps",
            TOY_METRICS["sw2"], [row["sw2"] for row in scores["SDE 5", 8]],
            {name: sw2[name, 8] for name in ("ODE", "LCM", "late noise")}, bar="at most 0.85 × ODE",
            passed=sw2["SDE 5", 8] <= 0.85 * sw2["ODE", 8], seeds=seeds, figures=[figure],
        )
    )  # fmt: skip
    for steps, against, factor in ((1, "SDE 5", 0.5), (4, "LCM", 1.0)):
        claims.append(
            claim(
                f"mixture-late-noise-{steps}",
                f"noise only below t = 400, no discriminator: against {against} at {steps} step{'s' if steps > 1 else ''}",
                TOY_METRICS["sw2"], [row["sw2"] for row in scores["late noise", steps]],
                {name: sw2[name, steps] for name in METHODS if name != "late noise"}, bar=f"at most {factor:g} × {against}",
                passed=sw2["late noise", steps] <= factor * sw2[against, steps], seeds=seeds, figures=[figure],
                note="our own variant, not the paper's",
            )
        )  # fmt: skip
    makers: dict[str, Callable[[], object]] = {
        "exact teacher, DDIMScheduler": _ddim,
        "exact teacher, DPMSolverMultistepScheduler": lambda: stock(
            "DPMSolverMultistepScheduler", timestep_spacing="trailing"
        ),
        "exact teacher, sde-dpmsolver++": lambda: stock(
            "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"
        ),
        "exact teacher, EulerAncestralDiscreteScheduler": lambda: stock(
            "EulerAncestralDiscreteScheduler", timestep_spacing="trailing"
        ),
    }
    peers = {}
    for name, make in makers.items():
        for steps in (4, 8):
            runs = [
                testbed.measure(
                    exact_sampling(testbed.mixture_world(), make(), steps, seed=s, n=GROUPS * testbed.GROUP), seed=s
                )
                for s in seeds
            ]
            peers[f"{name}, {steps} steps"] = median(runs, "sw2")
    claims.append(
        claim(
            "mixture-beats-ddim-8", "SCott in 4 steps against the exact teacher under stock samplers", TOY_METRICS["sw2"],
            [row["sw2"] for row in scores["SCott", 4]], peers, bar="below the exact teacher with DDIM in 8 steps",
            passed=four < peers["exact teacher, DDIMScheduler, 8 steps"], seeds=seeds, headline=True,
        )
    )  # fmt: skip
    return claims


def fixed_points(seeds: list[int]) -> list[Claim]:
    """Bar B4: what each solver's student is at t = 999."""
    world = testbed.mixture_world()
    rms: dict[str, list[float]] = {"full SDE": [], "ODE": []}
    blur: list[float] = []
    for member, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(1000 * seed + 6)
        z, (_, label) = torch.randn(4000, 2, generator=generator), world.sample(4000, generator=generator)
        t = torch.full((4000,), 999)
        ode = SDESolver(world.schedule, "ode", substeps=1000)
        end = ode.solve(z, t, torch.full_like(t, -1), lambda z, t, label=label: world.x0(z, t, label))
        wanted = {"full SDE": world.x0(z, t, label), "ODE": end}
        for name in rms:
            made, labels, zs = student(name, tuple(seeds)), label.expand(len(seeds), -1), z.expand(len(seeds), -1, -1)
            with torch.no_grad():
                jump = made.f(labels)(zs, t.expand(len(seeds), -1))[member]
            rms[name].append(float((jump - wanted[name]).square().sum(1).mean().sqrt()))
        blur.append(float((wanted["full SDE"] - end).square().sum(1).mean().sqrt()))
    unit = "root mean square distance at t = 999, lower is better"
    apart = {"distance between the two limits": statistics.median(blur)}
    return [
        claim("fixed-point-full-noise", "with full noise the student is the posterior mean, and gains nothing in one step",
              unit, rms["full SDE"], apart, bar="at most 0.1", passed=statistics.median(rms["full SDE"]) <= 0.1,
              seeds=seeds),
        claim("fixed-point-no-noise", "without noise the student is the end point of the teacher's ODE", unit, rms["ODE"],
              apart, bar="at most 0.35", passed=statistics.median(rms["ODE"]) <= 0.35, seeds=seeds),
    ]  # fmt: skip


# Digits

DIGIT_METRICS = {
    "frechet": "Fréchet distance of 64 features, lower is better",
    "coverage": "coverage, higher is better",
}
DIGIT_BARS = {(2, "coverage"): 1.03, (4, "coverage"): 1.03, (2, "frechet"): 0.9, (4, "frechet"): 0.9}


STOCK = (("DDIMScheduler", 4), ("DPMSolverMultistepScheduler", 4), ("DDIMScheduler", 20))
"""Samplers of the digits' teacher, and their steps."""


def _stock(name: str, steps: int, seeds: list[int]) -> list[dict[str, float]]:
    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = stock(name, timestep_spacing="trailing", **options)
    return [digits.measure(digits.teacher_samples(scheduler, steps=steps, seed=s)) for s in seeds]


def digit_scores(name: str, seeds: list[int]) -> Scores:
    """A recipe's samples, a seed after the other, kept on disk as they come, and what they measure."""
    scores: Scores = {(name, k): [] for k in STEPS[:3]}
    for seed in seeds:
        file = PARTIAL / f"digits-{name}-{source_digest('scott')}-{seed}.safetensors"
        if not file.exists():
            say(f"distilling digits: {name}, seed {seed}")
            trainer = digits.distil(RECIPES[name], seed)
            labels = digits.digits()[1].tolist()
            made = {str(k): trainer.sample(labels, steps=k, seed=seed) for k in STEPS[:3]}
            with replace_atomically(file) as partial:
                save_file(made, partial)
        for k, images in load_file(file).items():
            scores[name, int(k)].append(digits.measure(images))
    return scores


def handwriting(seeds: list[int]) -> list[Claim]:
    """The same trainer as for Stable Diffusion on a class-conditional U-Net."""
    scores: Scores = {}
    for name in DIGIT_METHODS:
        scores |= digit_scores(name, seeds)
    steps = STEPS[:3]
    metrics = {**DIGIT_METRICS, "precision": "precision, higher is better"}
    figure = picture(scores, DIGIT_METHODS, metrics, steps, RESULTS / "scott" / "digits.png")
    claims = against_lcm(
        scores, DIGIT_METHODS, seeds, world="digits", metrics=DIGIT_METRICS, bars=DIGIT_BARS, steps=steps,
        better_high={"coverage"}, figure=figure, headline=set(), elsewhere="frechet",
    )  # fmt: skip
    claims += sde_or_ode(
        scores, seeds, world="digits", metric="frechet", label=DIGIT_METRICS["frechet"], steps=steps, figure=figure
    )
    peers = {
        f"teacher, {name}, {k} steps": median(kept(f"digits {name} {k}", seeds, functools.partial(_stock, name, k, seeds)), "frechet")
        for name, k in STOCK
    }  # fmt: skip
    four = [row["frechet"] for row in scores["SCott", 4]]
    claims.append(
        claim(
            "digits-against-the-teacher", "SCott in 4 steps against its teacher under stock samplers",
            DIGIT_METRICS["frechet"], four, peers, bar="below the teacher with DDIM in 4 steps",
            passed=statistics.median(four) < peers["teacher, DDIMScheduler, 4 steps"], seeds=seeds, figures=[figure],
            note=f"features of a classifier that names {digits.accuracy(digits.classifier()):.1%} of held-out digits rightly",
        )
    )  # fmt: skip
    return claims


# Not here


def full_size(seeds: list[int]) -> list[Claim]:
    """The paper's own figures, which need its teacher, its data and GPUs."""
    rows = [
        ("coco-fid", "FID of 2 steps on COCO-2017 5K, Stable Diffusion 1.5", "FID, lower is better", 21.9),
        (
            "coverage-gain",
            "diversity over other consistency models at high resolution",
            "gain of coverage, higher is better",
            0.16,
        ),
    ]
    return [
        Claim(id=id, paper=PAPER, statement=statement, metric=metric, ours=None, peers={"stated in the abstract": stated},
              bar="as stated", passed=None, seeds=[], note=f"not run here; command: {SD15}")
        for id, statement, metric, stated in rows
    ]  # fmt: skip


# Tuning

REFERENCE = {1: (0.676, 0.997), 2: (0.428, 0.684), 4: (0.195, 0.449)}
"""Sliced W2 and strays of the exact teacher under DDIM, by steps, where the bars come from."""
ATTEMPTS: dict[str, dict[str, float]] = {
    "as reported": {}, "half the weight": {"adv_weight": 0.02}, "twice the rate": {"lr": 1e-3},
    "smoother discriminator": {"scale": 3.0}, "slower discriminator": {"disc_lr": 5e-4},
}  # fmt: skip
"""Settings of `testbed.distil` other than the reported ones."""


def spreads(seeds: Sequence[int] = (10, 11, 12)) -> None:
    """How far the exact teacher is from the reference for every spread of the mixture's weights."""
    rows = []
    for spread_ in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        world = GaussianMixture(testbed.mixture_world().schedule, spread=spread_)
        row: dict[str, float] = {"spread": spread_, "error": 0.0}
        for steps, reference in REFERENCE.items():
            runs = []
            for s in seeds:
                x = exact_sampling(world, _ddim(), steps, seed=s, n=testbed.GROUP)
                real, _ = world.sample(len(x), generator=torch.Generator().manual_seed(1000 * s + 5))
                runs.append((sliced_wasserstein(real, x), world.far(x)))
            for name, ours, theirs in zip(
                ("sw2", "far"), map(statistics.fmean, zip(*runs, strict=True)), reference, strict=True
            ):
                row[f"{name}, {steps} steps"] = ours
                row["error"] += (ours / theirs - 1) ** 2
        rows.append(row)
    _write("spread", {"seeds": list(seeds), "spread of the weights": rows})


def attempts(seeds: Sequence[int] = (10, 11, 12)) -> None:
    """Other ways to the bars that are missed."""
    found = []
    for attempt, settings in ATTEMPTS.items():
        for name in ("SCott", "LCM"):
            if name == "LCM" and not {"lr"} & set(settings) and settings:
                continue
            say(f"{name}, {attempt}")
            made = testbed.distil(RECIPES[name], seeds, **settings)
            for steps in STEPS:
                points = testbed.samples(made, seeds, steps=steps, n=GROUPS * testbed.GROUP)
                rows = [testbed.measure(x, seed=s) for x, s in zip(points, seeds, strict=True)]
                middle = {metric: median(rows, metric) for metric in TOY_METRICS}
                found.append({"method": name, "settings": attempt, "steps": steps, **middle})
    _write("attempts", {"seeds": list(seeds), "distillation": found})


def _write(name: str, found: dict[str, Any]) -> None:
    with replace_atomically(RESULTS / "scott" / f"{name}.json") as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def prepare(part: str, seeds: list[int]) -> None:
    """Part i of n, `i/n`, of what is kept on disk, so that several processes can share the work."""
    i, n = map(int, part.split("/"))
    jobs: list[Callable[[], object]] = [functools.partial(mixture_scores, [name], seeds) for name in METHODS]
    jobs += [functools.partial(digit_scores, name, [seed]) for seed in seeds for name in DIGIT_METHODS]
    jobs.append(functools.partial(student, "full SDE", tuple(seeds)))
    world = testbed.mixture_world()
    jobs += [
        functools.partial(kept, f"marginal {noise}", seeds, functools.partial(_ratios, world, noise, seeds))
        for noise in NOISE_FUNCTIONS
    ]
    jobs += [
        functools.partial(kept, f"digits {name} {k}", seeds, functools.partial(_stock, name, k, seeds))
        for name, k in STOCK
    ]
    for job in jobs[i::n]:
        job()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        prepare(sys.argv[2], [0, 1, 2])
        sys.exit()
    if sys.argv[1:] in (["--spread"], ["--attempts"]):
        (spreads if sys.argv[1] == "--spread" else attempts)()
        sys.exit()
    run_benchmark(
        "scott",
        [mixture, fixed_points, marginals, handwriting, full_size, help_time("scott", PAPER)],
        libraries=["diffusers", "peft", "accelerate"],
    )
