"""One engine, one scenario: python driver.py SCENARIO OPTIONS ANSWER."""

import json
import sys
import time
from pathlib import Path
from typing import Any


def save(folder: Path) -> None:
    """Write the package's two models as vLLM reads them; without datasets, which this environment lacks."""
    from cllm_jacobi import testbed

    for kind in ("target", "consistent"):
        testbed.save(testbed.load(kind), folder / kind)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    from cllm_jacobi import testbed

    words = {w: i for i, w in enumerate(testbed.vocabulary())}
    return [[words[w] for w in testbed.prompt(q).split()] for q, _ in testbed.questions(count, split="test", seed=seed)]


def start(options: dict[str, Any]) -> Any:
    """An engine in this process; which drafting the options say."""
    from cllm_jacobi.vllm_plugin import engine_args
    from vllm import LLM

    settings = {
        "model": options["model"], "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 128, "seed": 0,
        "disable_log_stats": False, **options.get("engine", {}),
    }  # fmt: skip
    way = options.get("way", "jacobi")
    n = options.get("n", 16)
    if way in ("jacobi", "discard"):
        settings |= engine_args(n, reuse=way == "jacobi")
    elif way == "ngram":
        settings["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": n - 1,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 1,
        }
    settings |= options.get("override", {})
    return LLM(**settings)


def count_passes(llm: Any) -> list[int]:
    """Counts the model runner's passes, whatever drafts."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    seen = [0]
    inner = runner.execute_model

    def counted(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        seen[0] += bool(scheduler_output.total_num_scheduled_tokens)
        return inner(scheduler_output, *args, **kwargs)

    runner.execute_model = counted
    return seen


def generate(options: dict[str, Any]) -> dict[str, Any]:
    """Serve prompts, together or one at a time; gives tokens, finish reasons, passes and seconds."""
    from vllm import SamplingParams

    llm = start(options)
    asked = prompts(options.get("count", 12))
    if options.get("shared_prefix"):
        head = prompts(1, seed=9)[0] * 3
        asked = [head + p for p in asked]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=options.get("lengths", [32])[i % len(options.get("lengths", [32]))],
            **options.get("params", {}),
        )
        for i in range(len(asked))
    ]
    passes = count_passes(llm)
    feeds: list[Any] = [{"prompt_token_ids": p} for p in asked]
    warm = llm.generate(feeds[:1], params[:1], use_tqdm=False)
    del warm
    passes[0] = 0
    if options.get("way") in (None, "jacobi", "discard"):
        llm.collective_rpc("jacobi_stats")
    begun = time.perf_counter()
    if options.get("together", True):
        outs = llm.generate(feeds, params, use_tqdm=False)
    else:
        outs = [llm.generate([f], [p], use_tqdm=False)[0] for f, p in zip(feeds, params, strict=True)]
    seconds = time.perf_counter() - begun
    answer = {
        "outputs": [list(o.outputs[0].token_ids) for o in outs],
        "reasons": [o.outputs[0].finish_reason for o in outs],
        "passes": passes[0],
        "seconds": seconds,
    }
    if options.get("way") in (None, "jacobi", "discard"):
        answer["stats"] = llm.collective_rpc("jacobi_stats")[0]
    for metric in llm.get_metrics():
        if metric.name in ("vllm:num_preemptions", "vllm:prefix_cache_hits"):
            answer[metric.name.split(":")[1]] = metric.value
    return answer


def measure(options: dict[str, Any]) -> list[dict[str, Any]]:
    """One request at a time, one set of prompts for each seed, in one engine."""
    from vllm import SamplingParams

    llm = start(options)
    passes = count_passes(llm)
    params = SamplingParams(temperature=0.0, max_tokens=32)
    for p in prompts(3, seed=99):
        llm.generate([{"prompt_token_ids": p}], params, use_tqdm=False)
    runs = []
    for seed in options["seeds"]:
        asked = prompts(options["count"], seed=seed)
        passes[0] = 0
        begun = time.perf_counter()
        outs = [llm.generate([{"prompt_token_ids": p}], params, use_tqdm=False)[0] for p in asked]
        seconds = time.perf_counter() - begun
        tokens = [list(o.outputs[0].token_ids) for o in outs]
        reasons = [o.outputs[0].finish_reason for o in outs]
        runs.append({"outputs": tokens, "reasons": reasons, "passes": passes[0], "seconds": seconds})
    return runs


def refused(options: dict[str, Any]) -> dict[str, str]:
    """What the plug-in says when it cannot work."""
    from vllm import SamplingParams

    try:
        llm = start(options)
        if options.get("temperature"):
            llm.generate(
                [{"prompt_token_ids": [5, 6]}],
                SamplingParams(temperature=options["temperature"], max_tokens=3),
                use_tqdm=False,
            )
    except BaseException as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return {"kind": "", "error": ""}


if __name__ == "__main__":
    scenario, options, path = sys.argv[1:]
    if scenario == "save":
        save(Path(path))
    else:
        result = {f.__name__: f for f in (generate, measure, refused)}[scenario](json.loads(options))
        Path(path).write_text(json.dumps(result))
