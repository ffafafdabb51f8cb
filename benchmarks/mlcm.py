"""Multistep latent consistency models: bars on an exact mixture and on digits in a tiny latent space.

On the mixture the teacher is the exact posterior mean, so every figure is the distillation's own. The three seeds of one
method train side by side in one batched network. Equal student iterations for every method; joint's
iterations hold a batch of each of its two losses, which the cost printed beside the figures includes. LCM and TCD are sampled
with diffusers' own schedulers; their training, and that of PCM, is written in mlcm.testbed, as no library packages it.
"""

import hashlib
import statistics
import sys
import time
from functools import cache
from pathlib import Path

import torch
from mlcm.mixture import GaussianMixture
from mlcm.testbed import (
    RECIPES,
    Distillation,
    make_reference,
    scheduler_points,
    student_points,
    teacher_points,
)
from tenfold_shared.claims import Claim, run_benchmark, spread
from tenfold_shared.figures import OURS, PEERS, save, style
from tenfold_shared.help_time import help_time
from tenfold_shared.hub import replace_atomically

PAPER = "2406.05768"
RESULTS = Path(__file__).parent / "results"
ITERATIONS = 2000
EVALUATION = 1000
"""Offset of the evaluation's seeds from those of training."""
Score = dict[str, list[float]]

torch.set_num_threads(1)


@cache
def mixture() -> GaussianMixture:
    return GaussianMixture.rings()


@cache
def references(guidance: float, seeds: tuple[int, ...]) -> list:
    return [make_reference(mixture(), guidance_scale=guidance, seed=EVALUATION + s) for s in seeds]


@cache
def sources() -> str:
    """Digest of the modules that training on the mixture runs through."""
    names = ("distill", "losses", "mixture", "network", "randomness", "sampling", "schedule", "testbed", "trajectory")
    text = "".join(Path(sys.modules[f"mlcm.{name}"].__file__).read_text(encoding="utf-8") for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def trained(name: str, guidance: float, seeds: tuple[int, ...]) -> Distillation:
    """Train, or take what an interrupted run of the same sources has trained."""
    run = Distillation(mixture(), RECIPES[name], seeds, iterations=ITERATIONS, guidance_scale=guidance)
    key = f"{name}-{guidance:g}-{ITERATIONS}-{'-'.join(map(str, seeds))}-{sources()}"
    kept = RESULTS / ".partial" / "mlcm" / f"{key.replace(' ', '_')}.pt"
    if kept.exists():
        record = torch.load(kept, weights_only=True)
        run.student.load_state_dict(record["student"])
        run.seconds, run.teacher_calls = record["seconds"], record["teacher_calls"]
        run.student.requires_grad_(False)
        return run
    run.run()
    record = {"student": run.student.state_dict(), "seconds": run.seconds, "teacher_calls": run.teacher_calls}
    with replace_atomically(kept) as partial:
        torch.save(record, partial)
    return run


@cache
def scores(name: str, guidance: float, seeds: tuple[int, ...], steps: int, sampler: str = "renoise") -> Score:
    """Figures of every seed. name: a recipe, or "DDIM" for the exact teacher."""
    rows = []
    for member, (seed, reference) in enumerate(zip(seeds, references(guidance, seeds), strict=True)):
        if name == "DDIM":
            points = teacher_points(mixture(), reference, steps, guidance_scale=guidance)
        elif name in ("LCM", "TCD"):
            gamma = float(sampler) if name == "TCD" else 0.0
            student = trained(name, guidance, seeds).student
            points = scheduler_points(student, member, reference, steps, f"{name}Scheduler", gamma=gamma, seed=seed)
        else:
            student = trained(name, guidance, seeds).student
            points = student_points(student, member, reference, steps, sampler=sampler, seed=seed)
        rows.append(reference.score(mixture(), points))
    return {key: [row[key] for row in rows] for key in rows[0]}


def ratio(ours: list[float], peer: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, peer, strict=True)]


def median(values: list[float]) -> float:
    return statistics.median(values)


def cost(name: str, guidance: float, seeds: tuple[int, ...]) -> str:
    run = trained(name, guidance, seeds)
    calls = run.teacher_calls / run.iterations / run.batch / len(seeds)
    return f"{name} {run.seconds / len(seeds):.0f} s a seed, {calls:.1f} teacher calls a row"


def _bars(guidance: float, seeds: list[int]) -> list[Claim]:
    own = tuple(seeds)
    tag, words = ("w1", "without guidance") if guidance == 1 else ("w3", "with guidance 3")
    get = {
        (name, k): scores(name, guidance, own, k, sampler)
        for name, sampler, steps in (
            ("joint", "renoise", (2, 4, 8)), ("LCM", "", (2, 4, 8)), ("DDIM", "", (4, 8)), ("PCM-like", "renoise", (4, 8)),
        )
        for k in steps
    }  # fmt: skip
    det = {name: scores(name, guidance, own, 8, "ddim") for name in ("stage 1", "PCM-like")}
    tcd = [scores("TCD", guidance, own, 4, gamma) for gamma in ("0", "0.3")]
    best_tcd = min(tcd, key=lambda s: median(s["sw2"]))
    ours = get["joint", 4]
    note = "; ".join(cost(n, guidance, own) for n in ("joint", "stage 1", "LCM", "TCD", "PCM-like"))

    def claim(
        id: str, statement: str, metric: str, values: list[float], peers: dict[str, float], bar: str, ok: bool, **more
    ) -> Claim:
        return Claim(
            id=f"{id}-{tag}", paper=PAPER, statement=f"{statement}, {words}", metric=metric, ours=median(values),
            peers=peers, bar=bar, passed=ok, seeds=seeds, spread=spread(values), **{"note": note, **more},
        )  # fmt: skip

    sw2 = "sliced W2 to the exact distribution, lower is better (median of seeds)"
    against = {
        "LCM 4": median(get["LCM", 4]["sw2"]), "DDIM 4": median(get["DDIM", 4]["sw2"]), "DDIM 8": median(get["DDIM", 8]["sw2"]),
        "TCD 4": median(best_tcd["sw2"]), "PCM-like 4": median(get["PCM-like", 4]["sw2"]),
    }  # fmt: skip
    lcm, ddim = median(ratio(ours["sw2"], get["LCM", 4]["sw2"])), median(ratio(ours["sw2"], get["DDIM", 8]["sw2"]))
    stage1, lcm8 = det["stage 1"], get["LCM", 8]
    far = median(ratio(ours["far"], get["LCM", 4]["far"]))
    better, covered = (
        median(ratio(stage1["sw2"], get["DDIM", 8]["sw2"])),
        median(ratio(stage1["coverage"], lcm8["coverage"])),
    )
    unified = median(ratio(get["joint", 8]["sw2"], ours["sw2"]))
    parity = median(ratio(get["joint", 2]["sw2"], get["LCM", 2]["sw2"]))
    figure = f"mlcm/mixture-{tag}.png"
    draw(guidance, own, RESULTS / figure)
    return [
        claim("b1-lcm", "4 steps are nearer to the truth than 4 steps of LCM", sw2, ours["sw2"], against,
              f"ratio to LCM at 4 steps at most 0.80; measured {lcm:.2f}", lcm <= 0.80,
              headline=guidance == 3, figures=[figure]),
        claim("b1-ddim", "4 steps are nearer to the truth than 8 DDIM steps of the exact teacher", sw2, ours["sw2"],
              against, f"ratio to DDIM at 8 steps at most 0.75; measured {ddim:.2f}", ddim <= 0.75),
        claim("b1-far", "Fewer samples lie between the modes than with 4 steps of LCM",
              "share of samples beyond 4 std of every mode, lower is better", ours["far"],
              {"LCM 4": median(get["LCM", 4]["far"]), "DDIM 8": median(get["DDIM", 8]["far"]), "TCD 4": median(best_tcd["far"])},
              f"ratio to LCM at most 0.6; measured {far:.2f}", far <= 0.6),
        claim("b2-ddim", "Stage 1 alone with 8 deterministic steps beats 8 DDIM steps of its exact teacher", sw2, stage1["sw2"],
              {"DDIM 8": median(get["DDIM", 8]["sw2"]), "LCM 8": median(lcm8["sw2"]), "PCM-like 8": median(det["PCM-like"]["sw2"])},
              f"ratio to DDIM at 8 steps at most 0.7; measured {better:.2f}", better <= 0.7),
        claim("b2-coverage", "Stage 1 alone with 8 deterministic steps covers more than 8 steps of LCM",
              "coverage (k = 5), higher is better", stage1["coverage"],
              {"LCM 8": median(lcm8["coverage"]), "DDIM 8": median(get["DDIM", 8]["coverage"]),
               "PCM-like 8": median(det["PCM-like"]["coverage"])},
              f"ratio to LCM at least 1.05; measured {covered:.2f}", covered >= 1.05),
        claim("b3-tcd", "4 steps are at least as near as TCD's best 4 steps (gamma 0 or 0.3)", sw2, ours["sw2"],
              {f"TCD 4, gamma {g}": median(s["sw2"]) for g, s in zip(("0", "0.3"), tcd, strict=True)},
              "at most TCD's best", median(ours["sw2"]) <= median(best_tcd["sw2"])),
        claim("b4-unified", "One student serves 4 and 8 steps", sw2, get["joint", 8]["sw2"], {"joint 4": median(ours["sw2"])},
              f"8 steps at most 1.15 x 4 steps; measured {unified:.2f}", unified <= 1.15),
        claim("b5-two-steps", "2 steps are on a par with 2 steps of LCM", sw2, get["joint", 2]["sw2"],
              {"LCM 2": median(get["LCM", 2]["sw2"])}, f"ratio to LCM at 2 steps at most 1.3; measured {parity:.2f}", parity <= 1.3),
    ]  # fmt: skip


def draw(guidance: float, seeds: tuple[int, ...], path: Path) -> None:
    """Sliced W2 and far share against steps."""
    lines = [("ours, joint", "joint", "renoise", OURS), ("ours, stage 1, deterministic", "stage 1", "ddim", "#e0937f"),
             ("LCM", "LCM", "", PEERS[0]), ("TCD, gamma 0.3", "TCD", "0.3", PEERS[1]),
             ("PCM-like", "PCM-like", "renoise", PEERS[2]), ("DDIM, exact teacher", "DDIM", "", PEERS[6])]  # fmt: skip
    with style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
        for label, name, sampler, color in lines:
            found = [scores(name, guidance, seeds, k, sampler) for k in (2, 4, 8)]
            for axis, key in zip(axes, ("sw2", "far"), strict=True):
                axis.plot((2, 4, 8), [median(f[key]) for f in found], "o-", color=color, label=label)
        for axis, title in zip(
            axes, ("sliced W2 to the exact distribution", "share of samples off every mode"), strict=True
        ):
            axis.set(title=title, xlabel="network calls of the student, steps of DDIM", yscale="log", xscale="log")
            axis.set_xticks((2, 4, 8), ("2", "4", "8"))
            axis.minorticks_off()
        axes[1].legend(fontsize=8)
        save(figure, path)


def unguided(seeds: list[int]) -> list[Claim]:
    return _bars(1.0, seeds)


def guided(seeds: list[int]) -> list[Claim]:
    return _bars(3.0, seeds)


def second_stages(seeds: list[int]) -> list[Claim]:
    """Joint against the two second stages of the paper's revisions, and against itself with the paper's loss, without guidance."""
    own = tuple(seeds)
    names = {
        "joint": "joint",
        "joint, the paper's uniform loss": "joint, uniform",
        "sequential, as the last revision": "sequential",
        "progressive": "progressive",
    }
    four, eight = (
        {label: scores(n, 1.0, own, 4)["sw2"] for label, n in names.items()},
        {label: scores(n, 1.0, own, 8)["coverage"] for label, n in names.items()},
    )
    note = "; ".join(cost(n, 1.0, own) for n in names.values())
    rest4 = {n: median(v) for n, v in four.items() if n != "joint"}
    rest8 = {n: median(v) for n, v in eight.items() if n != "joint"}
    forgotten = scores("stage 1", 1.0, own, 8)["coverage"]
    return [
        Claim("stage2-joint-4", PAPER, "Joint with velocity weights is the best second stage at 4 steps",
              "sliced W2 to the exact distribution, lower is better", median(four["joint"]), rest4,
              "at most the best of the others", median(four["joint"]) <= min(rest4.values()),
              seeds, spread(four["joint"]), note=note),
        Claim("stage2-joint-8", PAPER, "The joint second stage does not forget 8 steps", "coverage (k = 5), higher is better",
              median(eight["joint"]), {**rest8, "stage 1 alone": median(forgotten)},
              "at least that of sequential", median(eight["joint"]) >= rest8["sequential, as the last revision"],
              seeds, spread(eight["joint"]), note=note),
    ]  # fmt: skip


def preference(seeds: list[int]) -> list[Claim]:
    """300 iterations that raise the nearness to one mode of each sample's class."""
    from mlcm.testbed import tune_reward

    started = time.perf_counter()
    found = [tune_reward(mixture(), trained("joint", 1.0, tuple(seeds)).student, m, references(1.0, tuple(seeds))[m], seed=s)
             for m, s in enumerate(seeds)]  # fmt: skip
    seconds = (time.perf_counter() - started) / len(seeds)
    gains, losses, held = ([f[key] for f in found] for key in ("gain", "coverage_loss", "held_out_gain"))
    before = {"before: coverage": median([f["coverage_before"] for f in found])}
    note = f"distillation loss as anchor, 300 iterations, {seconds:.0f} s a seed; the reward it was tuned on is no evidence by itself"
    return [
        Claim("reward-gain", PAPER, "The reward stage raises its reward at 4 steps", "share of the gap to the best reward, higher is better",
              median(gains), {}, "at least 0.20", median(gains) >= 0.2, seeds, spread(gains), note=note),
        Claim("reward-coverage", PAPER, "It keeps the distribution", "relative loss of coverage at 4 steps, lower is better",
              median(losses), before, "at most 0.15", median(losses) <= 0.15, seeds, spread(losses), note=note),
        Claim("reward-held-out", PAPER, "A reward it was not tuned on (another norm) rises too",
              "share of the gap, higher is better", median(held), {}, "above 0", median(held) > 0, seeds, spread(held), note=note),
    ]  # fmt: skip


def digits(seeds: list[int]) -> list[Claim]:
    """A real latent UNet with a LoRA, through the trainer itself, against LCM with the same LoRA."""
    from mlcm import digits as d
    from mlcm.metrics import frechet_distance

    world, steps, rows = d.load_world(), 150, []
    for seed in seeds:
        generator = torch.Generator().manual_seed(EVALUATION + seed)
        count = 1000
        labels = torch.randint(0, d.CLASSES, (count,), generator=generator)
        noise, other = (torch.randn(count, *d.SHAPE, generator=generator) for _ in range(2))
        truth = world.features(d.draw_teacher(world, other, labels, 50))
        started = time.perf_counter()
        ours = d.distil(world, steps=steps, seed=seed)
        middle = time.perf_counter()
        lcm = d.distil_lcm(world, steps=steps, seed=seed)
        took = (middle - started, time.perf_counter() - middle)
        found = {f"ours {k}": d.draw(ours, noise, labels, k, seed=seed) for k in (2, 4, 8)}
        found |= {f"LCM {k}": d.draw_lcm(lcm, noise, labels, k, seed=seed) for k in (2, 4, 8)}
        found |= {f"DDIM {k}": d.draw_teacher(world, noise, labels, k) for k in (4, 8, 50)}
        rows.append({name: (frechet_distance(truth, world.features(z)), world.accuracy(z, labels)) for name, z in found.items()}
                    | {"seconds": took})  # fmt: skip
        if seed == seeds[0]:
            picture(world, d, noise, found, labels)
    fd = {name: [r[name][0] for r in rows] for name in found}
    accuracy = {name: [r[name][1] for r in rows] for name in found}
    # The teacher's 50 steps from other noise: as near as samples of this number can be.
    against = {n.replace("DDIM 50", "floor, DDIM 50"): median(v) for n, v in fd.items() if n != "ours 4"}
    to_lcm = median(ratio(fd["ours 4"], fd["LCM 4"]))
    took = [statistics.fmean(r["seconds"][i] for r in rows) for i in (0, 1)]
    note = (f"{steps} iterations x 64 rows each; ours {took[0]:.0f} s, LCM {took[1]:.0f} s a seed; LCM trains on real latents, "
            "ours on none; LCM's training is written here")  # fmt: skip
    metric = (
        "Fréchet distance to the guided teacher's 50-step samples in a digit classifier's features, lower is better"
    )
    figures = ["mlcm/digits.png"]
    return [
        Claim("digits-lcm", PAPER, "On digits in a latent space, 4 steps are nearer to the teacher than 4 steps of LCM", metric,
              median(fd["ours 4"]), against, f"ratio to LCM at 4 steps at most 0.9; measured {to_lcm:.2f}", to_lcm <= 0.9,
              seeds, spread(fd["ours 4"]), note=note, figures=figures, headline=True),
        Claim("digits-ddim", PAPER, "and than 8 DDIM steps of the teacher", metric, median(fd["ours 4"]),
              {"DDIM 8": against["DDIM 8"]}, "at most DDIM at 8 steps", median(fd["ours 4"]) <= against["DDIM 8"],
              seeds, spread(fd["ours 4"]), note=note, figures=figures),
        Claim("digits-accuracy", PAPER, "The digits drawn in 4 steps are the digits asked for", "share read as their class, higher is better",
              median(accuracy["ours 4"]), {n: median(v) for n, v in accuracy.items() if n != "ours 4"},
              "at least LCM's at 4 steps", median(accuracy["ours 4"]) >= median(accuracy["LCM 4"]),
              seeds, spread(accuracy["ours 4"]), note=note),
    ]  # fmt: skip


def picture(world, d, noise, found, labels) -> None:
    order = torch.cat([(labels == c).nonzero()[:2, 0] for c in range(d.CLASSES)])
    shown = {"teacher, 50 steps": d.draw_teacher(world, noise[order], labels[order], 50),
             **{name: z[order] for name, z in found.items() if name != "DDIM 50"}}  # fmt: skip
    with style() as plt:
        figure, axes = plt.subplots(len(shown), 1, figsize=(9, 0.62 * len(shown)))
        for axis, (name, z) in zip(axes, shown.items(), strict=True):
            axis.imshow(d.grid(world, z), cmap="gray_r", vmin=0, vmax=1, aspect="equal")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            axis.set_ylabel(
                name, rotation=0, ha="right", va="center", color=OURS if name.startswith("ours") else "black"
            )
        save(figure, RESULTS / "mlcm/digits.png")


def full_size(seeds: list[int]) -> list[Claim]:
    """The paper's own size, which needs a GPU and downloaded weights."""
    command = (
        "mlcm train --config sdxl.yaml --output out && mlcm eval stabilityai/stable-diffusion-xl-base-1.0 --lora out/checkpoint "
        "--prompts prompts.txt --clip openai/clip-vit-large-patch14 --fid --device cuda"
    )
    return [
        Claim("sdxl-coco", PAPER, "SDXL distilled without data, 4 steps, CLIP score and FID on COCO prompts",
              "CLIP score, higher is better", None, {}, "33.30 as stated in the abstract", None, [], note=f"not run here: {command}"),
        Claim("digits-larger", PAPER, "The digits experiment for 20 times as long, batch 256, on a GPU",
              "Fréchet distance at 4 steps, lower is better", None, {}, "at most 0.9 x LCM's at 4 steps", None, [],
              note="not run here: mlcm bench digits --iterations 3000 --batch 256 --device cuda"),
    ]  # fmt: skip


if __name__ == "__main__":
    run_benchmark(
        "mlcm",
        [unguided, second_stages, preference, guided, digits, full_size, help_time("mlcm", PAPER)],
        libraries=["diffusers", "peft", "accelerate", "transformers"],
    )
