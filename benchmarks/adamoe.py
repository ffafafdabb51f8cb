"""Null experts: quality at a load, and time at a load.

Quality is measured on the mixed-difficulty language of adamoe.testbed. For each seed one top-2 Mixtral is pre-trained; every
arm starts from it and sees the same fine-tuning batches, coefficients and steps. Arms are kept with a digest of the modules
they ran through, so that a stopped run goes on where it was. `--train SEED... --part 0/2` trains every second arm of the
named seeds and stops, so that two processes can share the work. Times are CPU seconds of one thread, interleaved.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from adamoe import (
    AdaMoEConfig,
    calibrate,
    convert,
    count_flops,
    flops_reduction,
    record_load,
    routers,
    set_load,
)
from adamoe.conversion import base_of, layer_routers
from adamoe.testbed import KINDS, fine_tune, make_model, pretrain, score
from tenfold_shared.claims import Claim, run_benchmark, spread
from tenfold_shared.figures import OURS, PEERS, save, style
from tenfold_shared.hub import replace_atomically

PAPER = "2406.13233"
RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / ".partial" / "adamoe"
PRETRAIN, STEPS = 600, 200
Scores = dict[str, float]

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="top_k .* changes the function")


def digest(*names: str) -> str:
    """Of the modules that training runs through."""
    paths = [Path(str(importlib.util.find_spec(f"adamoe.{name}").origin)) for name in names]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


@cache
def sources() -> str:
    return digest("config", "conversion", "kernels", "loss", "routing", "routers", "training", "testbed", "records")


class TopP:
    """Top-p whose threshold follows a wanted load in training, and is set by bisection at the end."""

    def __init__(self, model: Any, wanted: float):
        self.model, self.wanted, self.threshold = model, wanted, 0.5
        base_of(model).adamoe.counting = True
        routers.use(model, routers.top_p, threshold=self.threshold)

    def __call__(self, model: Any, progress: float) -> None:
        balance = base_of(model).adamoe
        load = float(balance.load.mean() / balance.tokens)
        balance.reset()
        self.set(self.threshold - 0.05 * (load - self.wanted))

    def set(self, threshold: float) -> None:
        self.threshold = min(0.999, max(0.01, threshold))
        routers.use(self.model, routers.top_p, threshold=self.threshold)

    @torch.no_grad()
    def bisect(self, tokens: torch.Tensor) -> None:
        low, high = 0.01, 0.999
        for _ in range(16):
            self.set((low + high) / 2)
            with record_load(self.model) as record:
                self.model(tokens)
            low, high = (low, self.threshold) if record.mean > self.wanted else (self.threshold, high)


def arm(name: str, seed: int) -> Scores:
    """Scores of one arm on held-out sequences of tables B, from the kept file or by training."""
    file = KEPT / f"{name}-{seed}-{PRETRAIN}-{STEPS}-{sources()}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    start = time.process_time()
    base, language = pretrained(seed)
    changed = language.changed(seed)
    if name == "pre-trained":
        result = {f"A {k}": v for k, v in score(base, language, seed=seed).items()} | score(base, changed, seed=seed)
    else:
        result = _tuned(name, seed, base, changed)
    result["seconds"] = time.process_time() - start
    with replace_atomically(file) as partial:
        partial.write_text(json.dumps(result), encoding="utf-8")
    print(
        f"    {name} {seed}: {result['seconds']:.0f} s",
        {k: round(v, 3) for k, v in result.items()},
        file=sys.stderr,
        flush=True,
    )
    return result


SETTINGS: dict[str, dict[str, Any]] = {
    "top-2": {"num_null_experts": 0},
    "top-1": {"num_null_experts": 0, "top_k": 1},
    "AdaMoE": {},
    "nulls balanced one by one": {"balance": "individual"},
    "AdaMoE, load controller": {"target_load": 1.5},
    "top-p": {"num_null_experts": 0},
    "identity nulls": {"null_type": "identity"},
    "weights over all selected": {"weight_normalization": "selected_all"},
    "MoE++": {},
    "bias-balanced nulls": {"aux_coef": (0.0, 0.0)},
}


def _tuned(name: str, seed: int, base: Any, language: Any) -> Scores:
    kept: dict[str, Any] = {}

    def prepare(model: Any) -> Any:
        if name == "top-p":
            kept["top-p"] = TopP(model, arm("AdaMoE", seed)["load"])
            return kept["top-p"]
        if name == "MoE++":
            routers.use(model, routers.moepp, copies=1, constants=1)
        if name == "bias-balanced nulls":
            balancer = routers.BiasBalancer(model)
            return lambda model, progress: balancer.step()
        return None

    def fresh(offset: int) -> torch.Tensor:
        return language.batch(96, 64, torch.Generator().manual_seed(offset + seed))[0]

    model = fine_tune(base, language, AdaMoEConfig(**SETTINGS[name]), seed=seed, steps=STEPS, prepare=prepare)
    if name == "top-p":
        kept["top-p"].bisect(fresh(91_000))
    result = score(model, language, seed=seed)
    if name == "AdaMoE":
        for target in (1.75, 1.5, 1.25, 1.0, 0.75):
            calibrate(model, [fresh(91_000)], target_load=target)
            found = score(model, language, seed=seed)
            result |= {
                f"to {target} load": found["load"],
                f"to {target} ce": found["ce"],
                f"to {target} hard": found["accuracy hard"],
            }
        set_load(model, null_bias=0.0)
    if name in ("AdaMoE", "AdaMoE, load controller"):
        with record_load(model) as record, torch.no_grad():
            model(fresh(92_000))
        result |= {f"layer {i}": v for i, v in enumerate(record.by_layer().tolist())}
        result |= {f"share {i}": v for i, v in enumerate(record.histogram().tolist())}
    return result


@cache
def pretrained(seed: int) -> tuple[Any, Any]:
    from adamoe.testbed import Language

    file = KEPT / f"pretrained-{seed}-{PRETRAIN}-{sources()}.pt"
    if file.exists():
        model = make_model(seed)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval(), Language.make(seed)
    model, language = pretrain(seed, PRETRAIN)
    with replace_atomically(file) as partial:
        torch.save(model.state_dict(), partial)
    return model, language


def train(seeds: list[int], part: str = "0/1") -> None:
    first, step = (int(v) for v in part.split("/"))
    for seed in seeds:
        for name in ["pre-trained", *SETTINGS][first::step]:
            arm(name, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--train", nargs="+", type=int)
    parser.add_argument("--part", default="0/1")
    options, rest = parser.parse_known_args()
    if options.train:
        train(options.train, options.part)
        sys.exit()
