"""What cllm-jacobi claims and measures: python benchmarks/cllm_jacobi.py [--only NAME ...] [--try SEED]

A world is a target trained from nothing, its trajectories, and the consistency model made of both; one for each seed, kept
under results/.partial for the sources they were made with. Two trainings run at a time, a thread each; what is timed
runs alone in this process, decoders in turn. vLLM runs in the environment of `make vllm`, one engine per process; where
there is none its rows say so. `--try SEED` trains other recipes for the row `accuracy-kept`, on a seed that the table does not
use, and writes `results/cllm-jacobi/tried.json`; what is finished is kept.
"""

import ast
import fcntl
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

PAPER = "2403.00835"
HERE = Path(__file__).resolve().parent
# This script has the package's name and its folder comes first on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
VLLM = Path(os.environ.get("CLLM_JACOBI_VLLM_PYTHON", HERE.parent / ".vllm/bin/python"))
SCIENCE = ("testbed", "trajectory", "cleaning", "packing", "losses", "trainer", "draft")
DECODING = ("jacobi", "cache", "draft", "sampling")
TEST = 2000
TIMED = 25
SHORT: dict[str, Any] = {"steps": 250, "batch": 8, "learning_rate": 4e-3}
SUBSET, ASKED = 1500, 200
"""Of an ablation: its training, prompts, test questions."""


def _claim(**fields: Any) -> Any:
    from tenfold_shared.claims import Claim

    return Claim(paper=PAPER, **fields)


def _spread(values: Any) -> dict[str, float]:
    from tenfold_shared.claims import spread

    return spread([float(v) for v in values])


def _mean(values: Any) -> float:
    return float(np.mean([float(v) for v in values]))


def _code(names: Sequence[str]) -> str:
    """Digest of some of the package's files; their layout and comments do not count."""
    import cllm_jacobi

    source = Path(cllm_jacobi.__file__).parent
    code = "".join(ast.dump(ast.parse((source / f"{name}.py").read_text(encoding="utf-8"))) for name in names)
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _kept(seed: int) -> Path:
    """Folder of a seed's weights, by the code that shapes them."""
    return HERE / "results/.partial/cllm-jacobi" / f"world-{seed}-{_code(SCIENCE)}"


def _figures(seed: int, name: str, made_with: Any, measure: Callable[[], Any]) -> Any:
    """What `measure` gives, kept for the code and the settings that it was made with."""
    mark = hashlib.sha256(f"{_code(DECODING)} {made_with}".encode()).hexdigest()[:12]
    kept = _kept(seed) / f"{name}-{mark}.json"
    if not kept.exists():
        found = measure()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def _parallel(jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Results of the jobs, two processes of one thread each."""
    with multiprocessing.get_context("spawn").Pool(2, initializer=_quiet) as pool:
        waiting = [pool.apply_async(job, arguments) for job, arguments in jobs]
        return [w.get() for w in waiting]


def _quiet() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _score(model: Any, pairs: list[tuple[str, str]], *, speed_on: int = 100, **settings: Any) -> dict[str, Any]:
    """Accuracy by execution of the greedy answers, and tokens per forward, block and rolling, one prompt at a time."""
    from cllm_jacobi import testbed

    texts, _ = testbed.answer(model, pairs, batch=250, block_size=1)
    found: dict[str, Any] = {"right": testbed.accuracy(texts, pairs)}
    found["exact"] = _mean(text == query for text, (_, query) in zip(texts, pairs, strict=True))
    for window in ("block", "rolling"):
        same, speed = testbed.answer(model, pairs[:speed_on], batch=1, window=window, **settings)
        found[window] = float(speed.mean())
        found[f"{window}_equal"] = same == texts[:speed_on]
    return found


def _train(seed: int) -> None:
    """Train a seed's target, assistant and consistency model where they are not kept; one process at a time for a seed."""
    from cllm_jacobi import load_trajectories, save_trajectories, testbed

    folder = _kept(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "target.safetensors").exists():
            testbed.store(testbed.train_target(seed=seed), "target", folder)
        target = _stored(seed, "target")  # the float16 weights, as everything below reads them
        if not (folder / "trajectories.parquet").exists():
            save_trajectories(testbed.gather(target, seed=seed), folder / "trajectories.parquet")
        if not (folder / "consistent.safetensors").exists():
            data = load_trajectories(folder / "trajectories.parquet")
            testbed.store(testbed.make_consistent(target, data, seed=seed), "consistent", folder)
        if not (folder / "assistant.safetensors").exists():
            testbed.store(testbed.train_target(seed=seed, layers=1, steps=500), "assistant", folder)


def _world(seed: int) -> dict[str, Any]:
    """Train a seed's models, and their figures."""
    _train(seed)
    return _figures(seed, "world", TEST, lambda: _measured(seed))


def _measured(seed: int) -> dict[str, Any]:
    from cllm_jacobi import load_trajectories, testbed
    from cllm_jacobi.metrics import fast_forwarded, stationary

    models = {name: _stored(seed, name) for name in ("target", "consistent")}
    data = load_trajectories(_kept(seed) / "trajectories.parquet")
    pairs = testbed.questions(TEST, split="test", seed=seed)
    figures: dict[str, Any] = {name: _score(model, pairs) for name, model in models.items()}
    figures["trajectories"] = {
        "states": _mean(len(states) for row in data for states in row["trajectories"]),
        "tokens": sum(len(row["answer_ids"]) for row in data),
        "disagreements": sum(row["disagreements"] for row in data),
    }
    for name, model in models.items():
        blocks = [
            s for row in testbed.collect(model, [q for q, _ in pairs[:100]], seed=seed) for s in row["trajectories"]
        ]
        figures[name] |= {
            "fast_forwarded": _mean(map(fast_forwarded, blocks)),
            "stationary": _mean(map(stationary, blocks)),
        }
    trained_on = {q for q, _ in testbed.questions(testbed.PROMPTS, seed=2000 + seed)}
    trained_on |= {
        q for q, _ in testbed.questions(testbed.TARGET_STEPS * testbed.TARGET_BATCH, seed=1000 + seed, distinct=False)
    }
    figures["seen"] = sum(q in trained_on for q, _ in pairs)
    return figures


def _stored(seed: int, kind: str) -> Any:
    from cllm_jacobi import testbed

    return testbed.load(kind, _kept(seed), layers=1 if kind == "assistant" else 3)


def trainings(seeds: list[int]) -> list[Any]:
    """Everything that is trained, in one pool, so that no core waits: worlds, then the second task, then ablations."""
    jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(_world, (seed,)) for seed in seeds]
    jobs += [(_free_text, (seed,)) for seed in seeds]
    jobs += [(_ablation, (seed, name)) for seed in seeds for name in VARIANTS]
    found = dict(zip(((job.__name__, *arguments) for job, arguments in jobs), _parallel(jobs), strict=True))
    worlds = [found["_world", seed] for seed in seeds]
    ablations = {name: [found["_ablation", seed, name] for seed in seeds] for name in VARIANTS}
    texts = [found["_free_text", seed] for seed in seeds]
    return [*_world_claims(seeds, worlds), _text_claim(seeds, texts, worlds), *_ablation_claims(seeds, ablations)]


def _world_claims(seeds: list[int], worlds: list[dict[str, Any]]) -> list[Any]:
    """Target and consistency model of every seed: tokens per forward, accuracy, confirmed and stationary tokens."""

    def column(model: str, key: str) -> list[float]:
        return [w[model][key] for w in worlds]

    accuracy = {m: [_mean(w[m]["right"]) for w in worlds] for m in ("target", "consistent")}
    lost = [
        sum(a and not b for a, b in zip(w["target"]["right"], w["consistent"]["right"], strict=True)) for w in worlds
    ]
    won = [
        sum(b and not a for a, b in zip(w["target"]["right"], w["consistent"]["right"], strict=True)) for w in worlds
    ]
    change = [a - b for a, b in zip(accuracy["consistent"], accuracy["target"], strict=True)]
    best_target = [max(w["target"]["block"], w["target"]["rolling"]) for w in worlds]
    equal = all(
        w[m][f"{window}_equal"] for w in worlds for m in ("target", "consistent") for window in ("block", "rolling")
    )
    tokens = _mean(w["trajectories"]["tokens"] for w in worlds)
    ratio = [
        _mean([w["consistent"][k] for k in ("fast_forwarded",)]) / max(w["target"]["fast_forwarded"], 1e-9)
        for w in worlds
    ]
    gains = [
        b / max(a, 1e-9)
        for a, b in zip(column("target", "stationary"), column("consistent", "stationary"), strict=True)
    ]
    return [
        _claim(
            id="target-tokens-per-forward",
            statement="An ordinary model gains nearly nothing from Jacobi decoding.",
            metric="tokens per forward of the target, better of block and rolling, 100 unseen questions one at a time",
            ours=_mean(best_target),
            peers={
                "autoregressive": 1.0,
                "block": _mean(column("target", "block")),
                "rolling": _mean(column("target", "rolling")),
            },
            bar="<= 1.2 in every seed",
            passed=max(best_target) <= 1.2,
            seeds=seeds,
            spread=_spread(best_target),
        ),
        _claim(
            id="trained-tokens-per-forward",
            statement="After consistency training the same architecture confirms several tokens a pass.",
            metric="tokens per forward, rolling window, n = 16, 100 unseen questions one at a time (higher is better)",
            ours=_mean(column("consistent", "rolling")),
            peers={
                "block window (as published)": _mean(column("consistent", "block")),
                "target, rolling": _mean(column("target", "rolling")),
                "autoregressive": 1.0,
            },
            bar="block >= 2.4 in every seed, and rolling >= block",
            passed=min(column("consistent", "block")) >= 2.4
            and all(
                r >= b for r, b in zip(column("consistent", "rolling"), column("consistent", "block"), strict=True)
            ),
            seeds=seeds,
            spread=_spread(column("consistent", "rolling")),
            note=f"Trained on {tokens:,.0f} answer tokens of the target a seed.",
            headline=True,
        ),
        _claim(
            id="accuracy-kept",
            statement="Consistency training keeps the target's quality.",
            metric=f"execution accuracy in sqlite, trained minus target, {TEST} unseen questions a seed, paired (higher is better)",
            ours=_mean(change),
            peers={
                "accuracy, target": _mean(accuracy["target"]),
                "accuracy, trained": _mean(accuracy["consistent"]),
                "exact match, target": _mean(column("target", "exact")),
                "exact match, trained": _mean(column("consistent", "exact")),
            },
            bar=">= -0.01 in the mean of the seeds",
            passed=_mean(change) >= -0.01,
            seeds=seeds,
            spread=_spread(change),
            note=f"Questions lost and won by seed: {', '.join(f'{a} and {b}' for a, b in zip(lost, won, strict=True))}. Test questions that occur in either training stream: {sum(w['seen'] for w in worlds)}.",
            headline=True,
        ),
        _claim(
            id="output-equals-greedy",
            statement="Jacobi decoding gives the greedy output of the same weights, token for token.",
            metric="share of answers equal, target and trained, block and rolling (higher is better)",
            ours=float(equal),
            peers={},
            bar="all",
            passed=equal,
            seeds=seeds,
            note="Against batched autoregressive decoding; the identities with generate are tests.",
        ),
        _claim(
            id="fast-forwarded",
            statement="A trained model fast-forwards more tokens an iteration than its target.",
            metric="fast-forwarded tokens an iteration, trained (higher is better)",
            ours=_mean(column("consistent", "fast_forwarded")),
            peers={"target": _mean(column("target", "fast_forwarded")), "trained / target": _mean(ratio)},
            bar=">= 2 times the target's in every seed (published: 2.0 to 6.8 times)",
            passed=min(ratio) >= 2,
            seeds=seeds,
            spread=_spread(column("consistent", "fast_forwarded")),
        ),
        _claim(
            id="stationary",
            statement="A trained model holds more stationary tokens than its target: right ones behind a wrong one.",
            metric="stationary tokens a block, trained (higher is better)",
            ours=_mean(column("consistent", "stationary")),
            peers={"target": _mean(column("target", "stationary")), "trained / target": _mean(gains)},
            bar=">= 2 times the target's in every seed (published: 2.0 to 6.8 times)",
            passed=min(gains) >= 2,
            seeds=seeds,
            spread=_spread(column("consistent", "stationary")),
        ),
    ]


def _below(ours: list[float], default: list[float]) -> bool:
    return all(a < b for a, b in zip(ours, default, strict=True))


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "w = 10": {"ar_weight": 10.0},
    "w = 1": {"ar_weight": 1.0},
    "w = 0": {"ar_weight": 0.0},
    "local loss": {"loss": "local"},
    "augmented states": {"augment": True},
    "random corruption": {"states": "random"},
    "LoRA r = 16": {"lora_r": 16, "learning_rate": 5e-3},
    "500 prompts": {"prompts": 500},
    "4000 prompts": {"prompts": 4000},
    "n = 8": {"block_size": 8},
    "n = 32": {"block_size": 32},
}
"""The one thing that each ablation changes."""


def _ablation(seed: int, name: str) -> dict[str, float]:
    """A short consistency training with one thing changed."""
    from cllm_jacobi import load_trajectories, testbed

    _train(seed)
    settings = dict(VARIANTS[name])

    def measure() -> dict[str, float]:
        target = _stored(seed, "target")
        count = settings.pop("prompts", SUBSET)
        n = settings.get("block_size", testbed.BLOCK)
        if n == testbed.BLOCK:
            data = load_trajectories(_kept(seed) / "trajectories.parquet")
            data = data.select(range(min(count, len(data))))
        else:
            data = testbed.gather(target, count, seed=seed, block_size=n)
        model = testbed.make_consistent(target, data, seed=seed, **{**SHORT, **settings})
        pairs = testbed.questions(ASKED, split="test", seed=seed)
        scored = _score(model, pairs, speed_on=30, block_size=n)
        return {"accuracy": _mean(scored["right"]), "rolling": scored["rolling"], "block": scored["block"]}

    return _figures(seed, "ablation", (name, dict(settings), SHORT, SUBSET, ASKED), measure)


def _ablation_claims(seeds: list[int], found: dict[str, list[dict[str, float]]]) -> list[Any]:
    """What each part of the recipe is worth, in short trainings. The paper's design has one bar here: w = 0 collapses."""
    from cllm_jacobi import testbed

    recipe = f"{SHORT['steps']} steps of {SHORT['batch']} answers; the default has the global loss, w = {testbed.AR_WEIGHT:g}, n = 16, all weights and {SUBSET} prompts"

    def column(name: str, key: str) -> list[float]:
        return [figures[key] for figures in found[name]]

    def changes(key: str) -> str:
        by_seed = {
            name: ", ".join(f"{a - b:+.3f}" for a, b in zip(column(name, key), column("default", key), strict=True))
            for name in found
            if name != "default"
        }
        return "; ".join(f"{name} {values}" for name, values in by_seed.items())

    def reported(key: str, id: str, metric: str) -> Any:
        return _claim(
            id=id,
            statement=f"Ablations (reported, no bar): {metric.split(',')[0]} of the default recipe, and with one thing changed.",
            metric=f"{metric} (higher is better)",
            ours=_mean(column("default", key)),
            peers={name: _mean(column(name, key)) for name in found if name != "default"},
            bar="reported either way",
            passed=None,
            seeds=seeds,
            spread=_spread(column("default", key)),
            note=f"{recipe}. Against it, by seed: {changes(key)}.",
        )

    collapsed = column("w = 0", "accuracy")
    return [
        _claim(
            id="ablation-w0",
            statement="Ablation, w = 0: without the autoregressive loss the answers are worthless.",
            metric=f"execution accuracy on {ASKED} unseen questions",
            ours=_mean(collapsed),
            peers={
                "default": _mean(column("default", "accuracy")),
                "tokens per forward, rolling window": _mean(column("w = 0", "rolling")),
                "default, tokens per forward, rolling window": _mean(column("default", "rolling")),
            },
            bar="<= 0.1 in every seed: it must collapse",
            passed=max(collapsed) <= 0.1,
            seeds=seeds,
            spread=_spread(collapsed),
            note=f"{recipe}.",
        ),
        reported("accuracy", "ablations-accuracy", f"execution accuracy, {ASKED} unseen questions"),
        reported("rolling", "ablations-tokens", "tokens per forward, rolling window, 30 unseen questions"),
    ]


def _free_text(seed: int) -> dict[str, float]:
    """A second task with real entropy: sentences of a stochastic grammar of phrases, no right answer."""
    return _figures(seed, "free-text", None, lambda: _phrases(seed))


def _phrases(seed: int) -> dict[str, float]:
    import torch
    from cllm_jacobi import collect_trajectories, jacobi_generate, testbed

    rng = np.random.default_rng([seed, 7])
    phrases = [rng.integers(4, 200, rng.integers(2, 6)).tolist() for _ in range(60)]
    after = [rng.choice(60, 6, replace=False).tolist() for _ in range(60)]

    def text(count: int, stream: int) -> torch.Tensor:
        draw = np.random.default_rng([seed, stream])
        out: list[int] = []
        at = 0
        while len(out) < count * 48:
            out += phrases[at]
            at = after[at][draw.choice(6, p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.1])]
        return torch.tensor(out[: count * 48]).reshape(count, 48)

    model = testbed.untrained(seed=seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=200)
    stream = text(200 * 16, 1)
    for step in range(200):
        batch = stream[step * 16 : (step + 1) * 16]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    model.generation_config.eos_token_id = None
    prompts = text(400, 2)[:, :12].tolist()
    data = collect_trajectories(
        model, testbed.tokenizer(), prompts, block_size=16, max_new_tokens=32, batch_size=100, seed=seed
    )
    trained = testbed.make_consistent(model, data, seed=seed, steps=120)
    asked = text(25, 3)[:, :12]
    found = {}
    for name, net in (("target", model), ("trained", trained)):
        for way, sample in (("greedy", False), ("sampled", True)):
            speeds = [
                float(
                    jacobi_generate(
                        net,
                        row[None],
                        attention_mask=torch.ones(1, 12, dtype=torch.long),
                        max_new_tokens=32,
                        eos_token_id=None,
                        do_sample=sample,
                        top_k=0,
                        seed=seed,
                        return_dict_in_generate=True,
                    ).tokens_per_forward
                )
                for row in asked
            ]
            found[f"{name}, {way}"] = _mean(speeds)
    return found


def _text_claim(seeds: list[int], found: list[dict[str, float]], worlds: list[dict[str, Any]]) -> Any:
    """A task where there should be less to gain."""
    ours = [f["trained, sampled"] for f in found]
    queries = [w["consistent"]["rolling"] for w in worlds]
    target = [f["target, sampled"] for f in found]
    return _claim(
        id="free-text",
        statement="Free text with real entropy: Jacobi decoding still gains, and less than on queries, since the next phrase is a draw.",
        metric="tokens per forward of the trained model, sampled with Gumbel noise at temperature 1 (higher is better)",
        ours=_mean(ours),
        peers={
            "target, sampled": _mean(target),
            "trained, greedy": _mean(f["trained, greedy"] for f in found),
            "target, greedy": _mean(f["target, greedy"] for f in found),
            "text-to-SQL, trained, greedy": _mean(queries),
        },
        bar="above its target and below the trained model on text-to-SQL, in every seed",
        passed=_below(target, ours) and _below(ours, queries),
        seeds=seeds,
        spread=_spread(ours),
        note="A stochastic grammar of 60 phrases with six successors each; 400 prompts, 120 steps.",
    )


def speed(seeds: list[int]) -> list[Any]:
    """Wall clock of every decoder on the same questions, in turn, one thread."""
    import torch
    from cllm_jacobi import JacobiConfig, testbed
    from cllm_jacobi.evaluate import LEAN, compare_decoders, decoders, speed_ratio

    torch.set_num_threads(1)
    words = testbed.tokenizer()
    ratios: dict[str, dict[str, list[float]]] = {}
    speeds: dict[str, list[float]] = {}
    equal = True
    for seed in seeds:
        _train(seed)
        ids = [
            words(testbed.prompt(q), return_tensors="pt")["input_ids"]
            for q, _ in testbed.questions(TIMED, split="test", seed=seed)
        ]
        assistant = _stored(seed, "assistant")
        for kind in ("consistent", "target"):
            model = _stored(seed, kind)
            contestants = decoders(
                model,
                JacobiConfig(seed=seed),
                max_new_tokens=testbed.MAX_NEW_TOKENS,
                eos=[1],
                pad=0,
                assistant=assistant,
            )
            figures = compare_decoders(model, ids, contestants, repeats=2, warmup=2)
            equal &= all(row.equal == len(ids) for row in figures.values())
            for name, row in figures.items():
                speeds.setdefault(f"{kind}: {name}", []).append(_mean(row.tokens_per_forward))
                for ours in ("Jacobi, rolling", "Jacobi, block"):
                    ratios.setdefault(f"{kind}: {ours}", {}).setdefault(name, []).append(
                        speed_ratio(figures[ours], row)
                    )
    ours = ratios["consistent: Jacobi, rolling"]
    peers = {name: _mean(values) for name, values in ours.items() if name != "Jacobi, rolling"}
    target = ratios["target: Jacobi, rolling"]

    def row(id: str, statement: str, peer: str, bar: float, headline: bool = False) -> Any:
        return _claim(
            id=id, statement=statement, metric=f"wall clock, seconds of {peer} / seconds of Jacobi rolling, {TIMED} questions twice, one at a time (higher is better)",
            ours=_mean(ours[peer]), peers={f"Jacobi rolling over {name}": value for name, value in peers.items() if name != peer},
            bar=f">= {bar:g} in the mean of the seeds" if bar > 1 else "> 1 in every seed",
            passed=(_mean(ours[peer]) >= bar if bar > 1 else min(ours[peer]) > 1) and equal, seeds=seeds, spread=_spread(ours[peer]),
            note="One thread; decoders in turn on every question; all outputs equal." if equal else "OUTPUTS DIFFER between decoders.",
            headline=headline,
        )  # fmt: skip

    return [
        row("speed-over-lean-loop", "The trained model answers faster than the leanest autoregressive loop.", LEAN, 2.0, True),
        row("speed-over-generate", "The trained model answers faster than model.generate.", "generate", 2.4),
        row("speed-over-prompt-lookup", "Faster than transformers' prompt lookup.", "prompt lookup", 1.0),
        row("speed-over-assisted", "Faster than transformers' assisted generation with a one-layer assistant of the same data.", "assisted generation", 1.0),
        _claim(
            id="speed-of-the-untrained-target",
            statement="On the untouched target Jacobi decoding costs time: passes are dearer and as many.",
            metric="wall clock, seconds of the lean loop / seconds of Jacobi rolling, on the target (higher is better)",
            ours=_mean(target[LEAN]),
            peers={
                "over generate": _mean(target["generate"]),
                "block window": _mean(ratios["target: Jacobi, block"][LEAN]),
                **{f"tokens per forward, {name}": _mean(speeds[f"target: {name}"]) for name in ("prompt lookup", "assisted generation", "Jacobi, rolling")},
            },
            bar="< 1 in every seed",
            passed=max(target[LEAN]) < 1 and equal,
            seeds=seeds,
            spread=_spread(target[LEAN]),
        ),
    ]  # fmt: skip


def block_sizes(seeds: list[int]) -> list[Any]:
    """Tokens per forward, price of a pass and expected gain by decoding block size."""
    from cllm_jacobi import testbed
    from cllm_jacobi.heatmap import draw_confirmed
    from cllm_jacobi.profiling import profile_blocks
    from tenfold_shared import figures

    words = testbed.tokenizer()
    sizes = (1, 4, 8, 16, 24, 32)
    rows = []
    for seed in seeds:
        _train(seed)
        ids = [
            words(testbed.prompt(q), return_tensors="pt")["input_ids"]
            for q, _ in testbed.questions(30, split="test", seed=seed)
        ]
        rows.append(
            profile_blocks(
                _stored(seed, "consistent"), ids, sizes=sizes, max_new_tokens=testbed.MAX_NEW_TOKENS, seed=seed
            )
        )
    speed = {n: [r[i].tokens_per_forward for r in rows] for i, n in enumerate(sizes)}
    gain = {n: [r[i].gain for r in rows] for i, n in enumerate(sizes)}
    asked = [q for q, _ in testbed.questions(200, split="test", seed=seeds[0])]
    maps = {
        name: [s for row in testbed.collect(_stored(seeds[0], kind), asked) for s in row["trajectories"]]
        for name, kind in (("target", "target"), ("consistency-trained", "consistent"))
    }
    draw_confirmed(maps, HERE / "results/cllm-jacobi/confirmed")
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(5.6, 3.8))
        axis.errorbar(
            sizes,
            [_mean(speed[n]) for n in sizes],
            [float(np.std(speed[n])) for n in sizes],
            marker="o",
            color=figures.OURS,
            label="tokens per forward",
        )
        axis.plot(sizes, [_mean(gain[n]) for n in sizes], "s--", color=figures.PEERS[0], label="expected gain in time")
        axis.set(
            xlabel="block size n at decoding",
            title="Longer blocks confirm more and cost more",
            xticks=sizes,
            ylim=(0, None),
        )
        axis.legend()
        figures.save(figure, HERE / "results/cllm-jacobi/block-sizes")
    return [
        _claim(
            id="decoding-block-size",
            statement="The block size is chosen at decoding: tokens per forward grow with n, and what is gained in time follows the price of a pass.",
            metric="tokens per forward at n = 16 over that at n = 8, trained with n = 16 (higher is better)",
            ours=_mean(a / b for a, b in zip(speed[16], speed[8], strict=True)),
            peers={
                **{f"tokens per forward, n = {n}": _mean(speed[n]) for n in sizes},
                **{f"expected gain, n = {n}": _mean(gain[n]) for n in sizes},
            },
            bar="> 1 in every seed",
            passed=all(a > b for a, b in zip(speed[16], speed[8], strict=True)),
            seeds=seeds,
            spread=_spread([a / b for a, b in zip(speed[16], speed[8], strict=True)]),
            figures=["cllm-jacobi/confirmed.png", "cllm-jacobi/block-sizes.png"],
        )
    ]


def _vllm_job(scenario: str, options: dict[str, Any]) -> Any:
    """Run a scenario of the vLLM tests' driver in a process of its own."""
    runtime = VLLM.parent.parent / "lib/libiomp5.so"
    sources = os.pathsep.join(str(HERE.parent / folder) for folder in ("packages/cllm-jacobi/src", "shared/src"))
    env = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": sources,
        **({"LD_PRELOAD": str(runtime)} if runtime.exists() else {}),
    }  # fmt: skip
    driver = HERE.parent / "packages/cllm-jacobi/tests_vllm/driver.py"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [str(VLLM), str(driver), scenario, json.dumps(options), str(answer)], env=env, capture_output=True, text=True, cwd=folder
        )  # fmt: skip
        if not answer.exists():
            raise RuntimeError(f"the vLLM engine ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(answer.read_text())


def vllm(seeds: list[int]) -> list[Any]:
    """Stock vLLM on the CPU with and without the plug-in, and its controls; one request at a time."""
    fields: dict[str, Any] = {
        "id": "vllm",
        "statement": "Served by stock vLLM, the trained model needs far fewer passes; greedy tokens are vLLM's own.",
        "metric": "new tokens a pass, one request at a time, n = 16, prefill included (higher is better)",
        "bar": "tokens identical, and passes < 0.4 of plain vLLM's, in every seed",
    }
    if not VLLM.exists():
        return [_claim(**fields, ours=None, peers={}, passed=None, seeds=[], note="not run here: no vLLM environment; make vllm && make bench-cllm-jacobi")]  # fmt: skip
    from cllm_jacobi import testbed

    ways = {
        "plain": ("consistent", "plain"),
        "ours": ("consistent", "jacobi"),
        "tail discarded": ("consistent", "discard"),
        "untrained weights": ("target", "jacobi"),
        "vLLM's ngram": ("consistent", "ngram"),
    }
    _train(seeds[0])
    with tempfile.TemporaryDirectory() as folder:
        models = {
            kind: str(testbed.save(_stored(seeds[0], kind), Path(folder) / kind)) for kind in ("target", "consistent")
        }
        runs = {
            name: _vllm_job("measure", {"model": models[kind], "way": way, "seeds": seeds, "count": 20})
            for name, (kind, way) in ways.items()
        }

    def per_pass(name: str) -> list[float]:
        return [sum(map(len, run["outputs"])) / run["passes"] for run in runs[name]]

    def faster(name: str, base: str) -> list[float]:
        return [a["seconds"] / b["seconds"] for a, b in zip(runs[base], runs[name], strict=True)]

    equal = all(
        a["outputs"] == b["outputs"] and a["reasons"] == b["reasons"]
        for name, base in (("ours", "plain"), ("tail discarded", "plain"), ("vLLM's ngram", "plain"))
        for a, b in zip(runs[name], runs[base], strict=True)
    )  # fmt: skip
    share = [a["passes"] / b["passes"] for a, b in zip(runs["ours"], runs["plain"], strict=True)]
    return [
        _claim(
            **fields,
            ours=_mean(per_pass("ours")),
            peers={
                **{f"{name}, tokens a pass": _mean(per_pass(name)) for name in ways if name != "ours"},
                **{
                    f"{name}, speed over plain": _mean(faster(name, "plain"))
                    for name in ("ours", "tail discarded", "vLLM's ngram")
                },
            },
            passed=equal and max(share) < 0.4,
            seeds=seeds,
            spread=_spread(per_pass("ours")),
            note="The models of the first seed; the seeds choose the questions, 20 each. CPU back-end, one thread, float32; wall clock of engines run one after the other. "
            + ("All tokens and finish reasons identical." if equal else "TOKENS DIFFER."),
        )
    ]


def gpu(seeds: list[int]) -> list[Any]:
    """What needs a GPU or downloaded weights, with its command."""
    note = "not run here: "
    return [
        _claim(
            id="gpu-7b",
            statement="2.4 to 3.4 times faster generation with the published 7B models (the paper's abstract); GSM8K 3.0 times.",
            metric="tokens per second over autoregressive decoding (higher is better)",
            ours=None, peers={}, bar=">= 2.4", passed=None, seeds=[],
            note=note + "cllm-jacobi evaluate -m cllm/consistency-llm-7b-math --tokenizer GAIR/Abel-7B-001 --prompts gsm8k.jsonl --template gsm8k --device cuda --dtype bfloat16 --limit 100",
        ),
        _claim(
            id="gpu-static-cache",
            statement="A target of about 100M parameters on a GPU in bf16, static cache and compiled pass, against generate and prompt lookup.",
            metric="wall clock over model.generate (higher is better)",
            ours=None, peers={}, bar="reported", passed=None, seeds=[],
            note=note + "cllm-jacobi evaluate -m FOLDER --prompts FILE --device cuda --dtype bfloat16, and JacobiConfig(cache='static', compile=True) in Python",
        ),
    ]  # fmt: skip


TRIED: dict[str, dict[str, Any]] = {
    "as in the table": {},
    "w = 10": {"ar_weight": 10.0},
    "w = 10, half the learning rate": {"ar_weight": 10.0, "learning_rate": 1e-3},
    "w = 10, 4000 prompts": {"ar_weight": 10.0, "prompts": 4000},
    "4000 prompts": {"prompts": 4000},
}
"""What `--try` changes in the recipe of the consistency model."""


def _tried(seed: int, name: str) -> dict[str, Any]:
    """One recipe against its target: accuracy on the unseen questions of the seed, and tokens per forward on 100."""
    from cllm_jacobi import load_trajectories, testbed

    settings = dict(TRIED[name])

    def measure() -> dict[str, Any]:
        data = load_trajectories(_kept(seed) / "trajectories.parquet")
        data = data.select(range(settings.pop("prompts", len(data))))
        target = _stored(seed, "target")
        model = testbed.make_consistent(target, data, seed=seed, **settings) if TRIED[name] else _stored(seed, "consistent")  # fmt: skip
        pairs = testbed.questions(TEST, split="test", seed=seed)
        scored = _score(model, pairs)
        before = testbed.accuracy(testbed.answer(target, pairs, block_size=1, batch=250)[0], pairs)
        return {
            "accuracy": _mean(scored["right"]),
            "accuracy minus target": _mean(scored["right"]) - _mean(before),
            **{f"tokens per forward, {window}": scored[window] for window in ("block", "rolling")},
        }

    return {"recipe": name, **_figures(seed, "tried", (name, dict(settings), TEST), measure)}


def try_recipes(seed: int) -> None:
    """Everything of `--try`."""
    from tenfold_shared.hub import replace_atomically

    _train(seed)
    rows = _parallel([(_tried, (seed, name)) for name in TRIED])
    with replace_atomically(HERE / "results/cllm-jacobi/tried.json") as partial:
        partial.write_text(json.dumps({"seed": seed, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from tenfold_shared.claims import run_benchmark
    from tenfold_shared.help_time import help_time

    _quiet()
    if sys.argv[1:2] == ["--try"]:
        try_recipes(int(sys.argv[2]))
        sys.exit()
    run_benchmark(
        "cllm-jacobi",
        [trainings, speed, vllm, block_sizes, gpu, help_time("cllm-jacobi", PAPER)],
        libraries=["transformers", "accelerate", "datasets", "peft"],
    )
